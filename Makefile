# make demo · make test · make test-all · make test-triton · make bench · make gpu · make clean
# Each needs Python >= 3.10 with venv and headers, g++ and make; all else comes into .venv at the versions of
# constraints.txt. A second call finds the stamps and skips what is done. `make gpu` alone uses what is installed.
PYTHON ?= python3
RUN := .venv/bin/python

# `-c` does not reach the isolated environments in which pip builds packages; these do (pip >= 25.3 reads the second).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all test-triton bench gpu clean

demo: .venv/.built
	$(RUN) -m bench.demo

test: .venv/.built
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q

test-all: .venv/.built
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -m ""

# The Triton engine with every version of its range, each in a folder of its own; Triton 3.6 needs an older NumPy.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
test-triton: .venv/.built
	for version in $(TRITONS); do \
	    packages=build/triton-$$version; \
	    PIP_CONSTRAINT= $(RUN) -m pip install -q --no-deps --target $$packages triton==$$version 'numpy<2.4' && \
	    PYTHONPATH=$$packages $(RUN) -m pytest -q -W ignore tests/test_triton_*.py tests/test_own_rule.py || exit 1; \
	done

# README's table, about three minutes on an idle machine.
RESULTS := bench/results/cpu
bench: .venv/.built
	$(RUN) -m bench step --shapes resnet50,gpt2,many-small \
	    --optimizers "LAMB(max_grad_norm=None),AdamW,Aida,SETAdam,LARS,NovoGrad" \
	    --against "torch.AdamW:fused,torch.SGD:fused(momentum=0.9)" \
	    --repeats 15 --seconds 30 --json $(RESULTS).json --plot $(RESULTS).png
	$(RUN) -m bench step --shapes resnet50 --optimizers LAMB --against "clip+torch.AdamW:fused" \
	    --repeats 15 --json $(RESULTS)-clip.json
	$(RUN) -m bench step --shapes resnet50 --optimizers "LAMB(max_grad_norm=None),Aida" \
	    --against pytorch_optimizer.Lamb,pytorch_optimizer.Aida --repeats 9 --json $(RESULTS)-pytorch_optimizer.json
	$(RUN) -m bench step --shapes tiny --optimizers LAMB --against torch.AdamW:fused --json $(RESULTS)-tiny.json
	$(RUN) -m bench report --markdown $(RESULTS).json $(RESULTS)-clip.json $(RESULTS)-pytorch_optimizer.json \
	    $(RESULTS)-tiny.json

# Everything a GPU can show, with the torch, Triton and nvcc of this machine's own $(PYTHON): no .venv, no download.
# Within BUDGET seconds; a second call goes on where the first ended. FOLDER is for results.json and plots.
BUDGET ?= 540
gpu:
	$(PYTHON) -m bench gpu --budget $(BUDGET) $(if $(FOLDER),--folder '$(FOLDER)')

clean:
	rm -rf build dist *.egg-info .venv/.built .pytest_cache .ruff_cache .hypothesis
	find layerfused -name '*.so' -delete
	find layerfused bench tests -name __pycache__ -prune -exec rm -r {} +

# python -m pytest imports the source tree, not a copy in site-packages: hence -e, and a stamp that knows all of csrc
# (directories too, so that a deleted header counts). No build isolation: the build tools are pinned in .venv, and their
# headers keep their place, so ninja reuses its objects. --no-index makes a requirement missing in constraints.txt fail.
.venv/.built: .venv/.installed setup.py pyproject.toml $(shell find csrc)
	$(RUN) -m pip install -q --no-index --no-build-isolation -e '.[test,demo,bench,integrations]'
	@touch $@

# torch first and alone: nothing that depends on it can then choose another.
.venv/.installed: constraints.txt | .venv/bin/pip
	$(RUN) -m pip install "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)"
	$(RUN) -m pip install -r constraints.txt
	@touch $@

# What a bare Debian lacks is named before the long download, not after it.
.venv/bin/pip:
	@$(call need,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))',\
	    Python >= 3.10 (set PYTHON=python3.x))
	@$(call need,$(PYTHON) -c 'import ensurepip$(,) venv',\
	    venv and ensurepip: apt-get install python3-venv)
	@$(call need,$(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")',\
	    the headers of Python: apt-get install python3-dev)
	@$(call need,command -v $(firstword $(CXX)),\
	    a C++ compiler: apt-get install g++ (or set CXX))
	$(PYTHON) -m venv .venv

, := ,
need = $(1) >/dev/null 2>&1 || { echo 'layerfused needs $(strip $(2))' >&2; exit 1; }
