"""What the Triton engine compiles to, without a GPU: in processes of their own, for the interpreter is on in this one.

Leaves out what only a GPU can tell: that the code runs, and how fast.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from layerfused import triton_engine  # noqa: E402
from layerfused.kernels import rules  # noqa: E402

HERE = Path(__file__).parent
TARGETS = ("cuda:90", "cuda:80", "cuda:100", "hip:gfx942")
EXACT = {"div.rn.f32", "div.rn.f64", "sqrt.rn.f32", "sqrt.rn.f64"}
P, G, M, V = rules.P, rules.G, rules.M, rules.V
PREDICTED = 16  # a further operand
MASTER, STOCHASTIC = 1, 4
RESTS = {MASTER: 4, 2: 2, 3: 2}  # bytes of a parameter's other half, by its way


def drive(argument, cache):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(HERE / "triton_codegen.py"), argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Every target's kernels, compiled anew two targets at a time."""
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(TARGETS, pool.map(lambda target: drive(target, cache), TARGETS), strict=True))
    for target, lines in found.items():
        registers = {line["rule"]: line["registers"] for line in lines if line["fields"]["phases"] == 15}
        print(f"{target}: registers a thread {registers}, {sum(line['seconds'] for line in lines):.0f} s")
    return found


def each(kernels, *targets):
    return [(f"{target} {line['rule']} {line['fields']}", line) for target in targets for line in kernels[target]]


NVIDIA = [target for target in TARGETS if target.startswith("cuda")]


@pytest.mark.parametrize("target", TARGETS)
def test_every_rule_compiles_without_local_memory(kernels, target):
    names = {name for name, value in vars(rules).items() if isinstance(value, rules.Rule)}
    assert {line["rule"] for line in kernels[target]} == names
    assert [where for where, line in each(kernels, target) if line["local"]] == []
    most = triton_engine.REGISTERS if target in NVIDIA else 512
    assert max(line["registers"] for line in kernels[target]) <= most


@pytest.mark.parametrize("target", NVIDIA)
def test_arithmetic_is_exact(kernels, target):
    """IEEE quotients and roots, nothing contracted or flushed: or the bits would not be the CPU's."""
    for where, line in each(kernels, target):
        floats = {word for word in line["words"] if word.split(".")[-1] in ("f32", "f64", "f32x2")}
        assert line["flushes"] == 0 and not any(word.startswith("fma") for word in floats), where
        assert {word for word in floats if word.startswith(("div", "sqrt"))} <= EXACT, where
        assert all(".rn." in word for word in floats), where


def sweeps(line):
    """Masks (reads, writes) of the tile loops that a variant has, coupled decay's reading of p included."""
    rule, fields = getattr(rules, line["rule"]), line["fields"]
    if fields["phases"] & 16:
        return [(P | (rule.second.reads & (M | V)), PREDICTED)]
    whole = (rule.first.reads | rule.second.reads, rule.first.writes | rule.second.writes)
    reduces, applies = fields["phases"] & 2, fields["phases"] & 8
    loops = []
    if rule.sums + rule.minima:
        loops += [rule.first] * bool(reduces) + [rule.second] * bool(applies) + [whole] * bool(reduces and applies)
        loops += [whole] * bool(applies and fields.get("mixed"))
    elif applies:
        loops += [whole]
    coupled = P if "coupled" in rule.scalars.split() else 0
    leads = PREDICTED if fields.get("leads") else 0  # what applies writes p
    loops = [(reads | (coupled if reads & G else 0), writes | (leads if writes & P else 0)) for reads, writes in loops]
    return loops + [(G, 0)] * (fields["phases"] & 1)


def accesses(mask, fields, writes=False):
    """Accesses of 16 bytes that a thread needs for its part of a tile of each operand."""
    elements = triton_engine.TILE // (32 * triton_engine.WARPS)
    sizes = [2 if "16" in dtype else 4 for dtype in fields["storage"] or ["float32"] * 4]
    sizes.append(sizes[0])  # predicted weights
    way = fields.get("ways", [0])[0]
    if way in RESTS:
        sizes[0] = RESTS[way] + sizes[0] * (writes or way != MASTER)
    return sum(elements * size // 16 for k, size in enumerate(sizes) if mask >> k & 1)


@pytest.mark.parametrize("target", NVIDIA)
def test_every_operand_moves_in_vectors(kernels, target):
    """Each operand of each tile loop has accesses of 16 bytes for all of its elements."""
    for where, line in each(kernels, target):
        if line["fields"]["phases"] == 4:
            continue  # FINISH alone touches no elements
        reads = sum(accesses(mask, line["fields"]) for mask, _ in sweeps(line))
        writes = sum(accesses(mask, line["fields"], writes=True) for _, mask in sweeps(line))
        found = [line["words"].get(f"{word}.global.v4.b32", 0) for word in ("ld", "st")]
        assert found == [reads, writes], where


def test_noise_is_made_where_it_is_used(kernels):
    """One Philox of 20 long products serves 8 elements, those of a thread: nothing moves between threads for it."""
    lines = [line for line in kernels["cuda:90"] if line["rule"] == "adam" and line["fields"]["phases"] == 14]
    drawn = [line for line in lines if line["fields"].get("ways") == [STOCHASTIC, 0, 0, 0]]
    assert len(drawn) == 2
    for line in drawn:
        plain = {key: value for key, value in line["fields"].items() if key != "ways"}
        moves = [count_shared(one["words"]) for one in (line, *(one for one in lines if one["fields"] == plain))]
        assert len(moves) == 2 and moves[0] == moves[1], plain
        assert 0 < line["words"]["mul.hi.u32"] <= 2 * 20, plain  # two draws where a layer begins between


def count_shared(words):
    return sum(count for word, count in words.items() if ".shared" in word)


@pytest.mark.parametrize("target", NVIDIA)
def test_what_is_published_is_released_and_acquired(kernels, target):
    for where, line in each(kernels, target):
        words = line["words"]
        assert line["hazards"] == {} and words["atom.global.gpu.acq_rel.add.u32"] >= 1, where
        rule, phases = getattr(rules, line["rule"]), line["fields"]["phases"]
        if (phases & 2 and rule.sums + rule.minima) or phases & 1:
            assert words["atom.global.gpu.release.exch.b32"] >= 1, where
        if (phases & 10 == 10 and rule.sums + rule.minima) or phases == 15:
            assert words["ld.global.gpu.acquire.b32"] >= 1, where


def test_amd(kernels):
    """Wide loads and stores, caches written back and invalidated; leaves out whether at the right places."""
    for where, line in each(kernels, "hip:gfx942"):
        words = " ".join(line["words"])
        assert "load_dwordx4" in words and "store_dwordx4" in words, where
        assert "buffer_wbl2" in words and "buffer_inv" in words, where


def test_numbers_do_not_recompile(tmp_path):
    """lr, weight decay, betas, clip, step, seed and missing gradients are data; a tensor for lr is one more variant."""
    steps = drive("launches", tmp_path)[0]
    assert [step["launches"] for step in steps] == [1] * len(steps)
    fresh = [step["what"] for step in steps if step["compiled"]]
    own = ["a rule of one's own", "another rule whose functions have the same names", "stochastic rounding"]
    assert fresh == ["first", "lr on the device", *own]
    again = drive("launches", tmp_path)[0]  # a new process finds the code on disk
    print(f"first step: {steps[0]['seconds']:.2f} s compiled, {again[0]['seconds']:.2f} s from the cache on disk")
    assert again[0]["seconds"] < steps[0]["seconds"]
