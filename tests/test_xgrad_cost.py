"""What XGrad costs beside the optimizer inside: traffic, native calls, memory, checkpoints.

Left out: time.
"""

import host_cuda
import pytest
import torch
from device_cases import DEVICE
from engines import make, parameters, randn
from test_xgrad_bits import give
from xgrad_oracle import phases_of, tensors

import layerfused as lf

COSTS = ["sgd-momentum", "adamw", "lamb", "novograd", "setadam"]


def large(name, dtype=torch.float32):
    params = parameters(randn(n, n).to(dtype) for n in (10_000, 300))
    give(params, 0)
    return make(name, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COSTS)
def test_one_word_more_in_one_launch(name, dtype):
    plain, xg = large(name, dtype).traffic(), lf.XGrad(large(name, dtype))
    for _ in range(2):
        xg.step()
        found = xg.traffic()
        word = 10_300 * dtype.itemsize
        assert found["requested"] - plain["requested"] == found["compulsory"] - plain["compulsory"] == word
        assert found["launches"] == plain["launches"] == 1


def test_a_step_is_one_native_call(monkeypatch):
    xg = lf.XGrad(large("lamb"))
    plain = large("lamb")
    with phases_of(monkeypatch) as seen:
        plain.step()
    (whole,) = seen
    with phases_of(monkeypatch) as seen:
        for t in range(3):
            xg.zero_grad()
            give(tensors(xg), t)
            xg.step()
    assert seen == [whole] * 3


@pytest.mark.skipif(DEVICE == "cuda", reason="the build for the host is instrumented, which takes the place of no GPU")
def test_words_that_the_kernel_moves():
    """As the compiler's instrumentation sees them: a step writes one word more, a refresh moves four."""
    pytest.importorskip("layerfused._cuda")
    params = parameters(randn(n, n) for n in (10_000, 300))
    xg = lf.XGrad(make("adamw", params, backend="cuda"))
    give(params, 0)
    xg.step()  # makes the copy
    give(params, 1)
    m, v = ([xg.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq"))
    operands = (xg.optimizer._launches[0].true, params, [p.grad for p in params], m, v)
    for call, words in ((xg.step, ("rw", "w", "r", "rw", "rw")), (xg.train, ("r", "w", "", "r", "r"))):
        with host_cuda.Watched([x for column in operands for x in column]) as watched:
            call()
            seen = watched.seen()
        pairs = [(x.nbytes, word) for word, column in zip(words, operands, strict=True) for x in column]
        assert seen == [(n * ("r" in word), n * ("w" in word)) for n, word in pairs]
        xg.param_groups[0]["lr"] = 0.1


@pytest.mark.parametrize("backend", ["auto", "reference", "cuda"])
def test_memory_is_one_copy_of_the_parameters(backend):
    """Made at the first step; a table of addresses (some words a tensor) may come with it."""
    if backend == "cuda":
        pytest.importorskip("layerfused._cuda")
    params = parameters(randn(n, n).to(DEVICE) for n in (10_000, 300))
    xg = lf.XGrad(lf.LAMB(params, backend=backend))
    before = xg.workspace_bytes()
    give(params, 0)
    for _ in range(2):
        xg.step()
        grown = xg.workspace_bytes() - before
        assert 41_200 <= grown <= 41_200 + 2 * 256
        xg.eval()
        xg.train()


def elements(x):
    if torch.is_tensor(x):
        return x.numel()
    return sum(map(elements, x.values() if isinstance(x, dict) else x)) if isinstance(x, (dict, list, tuple)) else 0


@pytest.mark.parametrize("cls", ["LAMB", "torch.optim.AdamW"])
def test_a_state_dict_has_no_copy(cls):
    """Some numbers a layer: what the last step found, of which its direction is made."""
    made = torch.optim.AdamW if cls.startswith("torch") else getattr(lf, cls)
    params = parameters(randn(n, n) for n in (1000, 300))
    xg = lf.XGrad(made(params))
    give(params, 0)
    xg.step()
    assert 0 <= elements(xg.state_dict()) - elements(xg.optimizer.state_dict()) <= 2 * 16
