"""What nvcc makes of the CUDA engine, without a GPU.

Read from the objects of setup.py's own build. Leaves out what only a GPU can tell: that the code runs, and how fast.
"""

import re
from functools import cache

import cuda_codegen
import pytest
from cuda_codegen import SASS, check_accesses, check_arithmetic, check_constant, check_order, expected
from native_build import ROOT, device_build

from layerfused import _cpu

RULES = pytest.mark.parametrize("rule", sorted(_cpu.rules()))
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB of a multiprocessor


def made(rule):
    """The object that a rule was compiled to."""
    if not cuda_codegen.cuobjdump():
        pytest.skip("no cuobjdump: a CUDA toolkit or Triton has one")
    setup, engine, _ = device_build()
    return ROOT / engine.path(setup.build_folder()) / f"rule-{rule}.o"


@cache
def codes(rule):
    """The PTX of both kernels."""
    found = list(cuda_codegen.ptx(made(rule)).values())
    assert len(found) == 2
    return found


def has_stats(rule):
    return _cpu.rules()[rule]["sums"] + _cpu.rules()[rule]["minima"] > 0


def takes_roots(rule):
    return "root(" in (ROOT / "csrc/rules" / f"{rule}.h").read_text()


def constant(name):
    return int(re.search(rf"constexpr int {name} = (\d+);", (ROOT / "csrc/cuda/launch.h").read_text())[1])


@RULES
def test_what_a_thread_needs(rule):
    """As many blocks as launch.h says fit on a multiprocessor, and nothing is spilled."""
    blocks, threads = constant("BLOCKS"), constant("THREADS")
    found = cuda_codegen.resources(made(rule))
    assert len(found) % 2 == 0 and found
    for (arch, _), usage in found.items():
        assert usage["stack"] == usage["local"] == 0, (arch, usage)
        assert usage["registers"] <= 65536 // (blocks * threads), (arch, usage)
        assert blocks * usage["shared"] <= 1024 * SHARED.get(arch, 100), (arch, usage)
    print(f"{rule}: registers a thread", {arch: usage["registers"] for (arch, _), usage in found.items()})


@RULES
def test_every_operand_moves_in_vectors(rule):
    for code in codes(rule):
        check_accesses(code, rule)


@RULES
@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.all) for arch in ("sm_80", "sm_100"))]
)
def test_machine_code(rule, arch):
    """Its accesses of 16 bytes are those of the PTX; one of 8 stands beside each that has a choice; no local memory."""
    names = [name for target, name in cuda_codegen.resources(made(rule)) if target == arch]
    if not names:
        pytest.skip(f"not built for {arch}")
    for name in names if arch != "sm_90" else names[:1]:
        words = cuda_codegen.sass(made(rule), arch, name)
        found = {access: words[word] for access, word in SASS.items() if words[word]}
        assert found in [*expected(rule), *expected(rule, merged=True)]
        half = {access: words[word.replace("128", "64")] for access, word in SASS.items()}
        *_, least = expected(rule, merged=True, plain=False)  # of p there may be more: ptxas parts what it has merged
        assert all(half[access] >= count for access, count in least.items())
        assert not any(word.startswith(("LDL", "STL")) for word in words)


@RULES
def test_only_gradients_are_constant(rule):
    for code in codes(rule):
        check_constant(code)


@RULES
def test_arithmetic_is_exact(rule):
    for code in codes(rule):
        check_arithmetic(code, takes_roots(rule))


@RULES
def test_what_is_published_is_released_and_acquired(rule):
    for code in codes(rule):
        check_order(code, has_stats(rule))


def ordered(code):
    check_order(code, True)


def vectors(code):
    check_accesses(code, "lamb")


def arithmetic(code):
    check_arithmetic(code, True)


DEFECTS = {  # what would find it, what stands in LAMB's PTX, and what takes its place
    "no barrier": (ordered, r"bar\.sync", "membar.cta; //"),
    "a flag without release": (ordered, r"st\.release\.gpu\.global", "st.relaxed.gpu.global"),
    "a flag without acquire": (ordered, r"ld\.acquire\.gpu\.global", "ld.relaxed.gpu.global"),
    "a flag of the block's own": (ordered, r"st\.release\.gpu", "st.release.cta"),
    "arrival without order": (ordered, r"atom\.acq_rel", "atom.relaxed"),
    "elements one by one": (vectors, r"ld\.global\.cs\.v4", "ld.global.cs"),
    "no word on what is dead": (vectors, r"st\.global\.cs", "st.global"),
    "what is read again dies": (vectors, r"ld\.global\.cg\.v", "ld.global.cs.v"),
    "a parameter as constant": (check_constant, r"ld\.global\.cs\.v4", "ld.global.cs.nc.v4"),
    "a gradient that is not constant": (check_constant, r"\.cs\.nc\.v4", ".cs.v4"),
    "contraction allowed": (arithmetic, r"mul\.rn\.f32", "mul.f32"),
    "contraction": (arithmetic, r"add\.rn\.f32", "fma.rn.f32"),
    "flushed": (arithmetic, r"add\.rn\.f32", "add.rn.ftz.f32"),
    "an approximate quotient": (arithmetic, r"div\.rn\.f32", "div.full.f32"),
    "an approximate root": (arithmetic, r"sqrt\.rn\.f32", "sqrt.approx.f32"),
    "contraction in double": (arithmetic, r"cvt\.f64\.f32", "mov.f64"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect):
    check, right, wrong = DEFECTS[defect]
    code = codes("lamb")[0]
    check(code)
    changed = [re.sub(right, wrong, line) for line in code]
    assert changed != code
    with pytest.raises((AssertionError, ValueError)):
        check(changed)


@pytest.mark.parametrize("place", ["before a release", "behind an acquire"])
def test_a_missing_barrier_is_found(place):
    """A program of one sweep on either side of a flag; its barriers are right, then one of them is not there."""
    text = """
        ld.shared.u32 %r1, [%r0];
        $again:
        st.global.cs.v4.u32 [%rd1], {%r1, %r1, %r1, %r1};
        @%p1 bra $again;
        bar.sync 0; // before a release
        @%p2 bra $waits;
        st.release.gpu.global.u32 [%rd2], 1;
        $waits:
        ld.acquire.gpu.global.u32 %r2, [%rd2];
        @%p3 bra $waits;
        bar.sync 0; // behind an acquire
        @wide ld.global.cs.v4.u32 {%r1, %r1, %r1, %r1}, [%rd1];
        ret;
    """
    assert cuda_codegen.hazards(cuda_codegen.lines(text)) == set()
    (found,) = cuda_codegen.hazards([line for line in cuda_codegen.lines(text) if place not in line])
    assert found.startswith(place.split()[-1])
