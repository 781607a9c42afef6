"""What nvcc made of a rule: its PTX, its registers and its machine code, and what is to be found in them."""

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from cases import FIXED

from layerfused import _cpu

P, G, M, V, PREDICTED = 1, 2, 4, 8, 16
CURVATURE = ("slope_sgd", "slope_adam", "curvature_sgd", "curvature_adam")  # these refuse adapt=False, too
ROUNDS = "add|sub|mul|div|sqrt|rcp|fma|mad|rsqrt|sin|cos|ex2|lg2|tanh"  # arithmetic whose result depends on how
EXACT = {f"{word}.rn.{size}" for word in ("add", "sub", "mul", "div", "sqrt", "rcp") for size in ("f32", "f64")}
PRODUCT = "fma.rn.f64"  # device::add_product: exact product, one rounding
SASS = {  # what becomes of the PTX accesses that device.h makes
    "ld.global.cs.nc": "LDG.E.EF.128.CONSTANT", "ld.global.cg.nc": "LDG.E.128.CONSTANT",
    "ld.global.cs": "LDG.E.EF.128", "ld.global.cg": "LDG.E.128.STRONG.GPU",
    "st.global.cs": "STG.E.EF.128", "st.global.cg": "STG.E.128.STRONG.GPU",
}  # fmt: skip


@cache
def cuobjdump():
    """Triton's wheel has one, a toolkit's is taken first; "" if there is none."""
    found = shutil.which("cuobjdump")
    try:
        import triton
    except ImportError:
        return found or ""
    return found or shutil.which("cuobjdump", path=Path(triton.__file__).parent / "backends/nvidia/bin") or ""


def dump(file, *options):
    return subprocess.run([cuobjdump(), *options, str(file)], capture_output=True, text=True, check=True).stdout


def resources(file):
    """(architecture, kernel's name) -> its registers and bytes of stack, local and shared memory."""
    found, arch = {}, ""
    pattern = r"arch = (sm_\w+)|Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for target, name, *numbers in re.findall(pattern, dump(file, "-res-usage")):
        arch = target or arch
        if name:
            found[arch, name] = dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True))
    return found


def ptx(file):
    """kernel's name -> lines of its PTX: the instructions and labels."""
    _, *entries = re.split(r"^\.(?:visible )?entry ", dump(file, "-ptx"), flags=re.M)
    return {re.match(r"\w+", entry)[0]: lines(entry) for entry in entries}


def lines(text):
    """Without what inline assembler and directives have around instructions."""
    found = (line.strip().removesuffix("}").strip() for line in text.splitlines())
    return [line for line in found if line and not line.startswith((".", "{", "//", ")", "("))]


def sass(file, arch, name):
    """Mnemonics of a kernel's machine code, counted."""
    text = dump(file, "-arch", arch, "-sass", "-fun", name)
    return Counter(re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text, re.M))


def word(line):
    return re.sub(r"^@!?[%\w]+\s+", "", line).split(" ")[0].rstrip(";")


def words(code):
    return Counter(map(word, code))


def sweeps(rule):
    """Masks (reads, writes, what the launch reads again) of the sweeps in a kernel, and what is written beside them.

    The last is that over a layer without stats.
    """
    needs = _cpu.rules()[rule]
    (r1, w1), (r2, w2) = needs["reduce"], needs["apply"]
    lead = w2 | PREDICTED
    found = [(r1 | r2, w1 | lead, 0)]
    if needs["sums"] + needs["minima"]:
        found = [(r1, w1, r2), (r2, lead, 0), (r1 | r2, w1 & ~w2, 0), (0, lead, 0), *found]  # in the middle: on chip
    coupled = P if needs["couples"] else 0
    found = [(reads | (coupled if reads & G else 0), writes, again) for reads, writes, again in found]
    return [(G, 0, G), (P | r2 & (M | V), PREDICTED, 0), *found]


def accesses(masks, merged=False, plain=True):
    """PTX access -> how often it is there: for plain fp32, for what needs a conversion or lies askew, and for the other
    part of a p that has two.

    A sweep that reads one operand takes two quads at once. `merged`: ptxas has made one instruction of p's loads that
    differ in their address alone. `plain`: with those that move fp32 alone.
    """
    found = Counter()
    for reads, writes, again in masks:
        quads = 2 if reads.bit_count() == 1 else 1
        for k in range(5):
            use, kinds = "cg" if again >> k & 1 else "cs", plain + (2 if k == 0 else 1)
            if reads >> k & 1:
                found[f"ld.global.{use}{'.nc' if k == 1 else ''}"] += (plain + 1 if merged else kinds) * quads
            if writes >> k & 1:
                found[f"st.global.{use}"] += kinds * quads
    return found


def expected(rule, **how):
    """Accesses of a rule's kernel, and where adapt=False is refused those without the sweep that is never run."""
    masks = sweeps(rule)
    return [accesses(masks, **how)] + [accesses(masks[:-1], **how)] * (rule in (*FIXED, *CURVATURE))


def check_accesses(code, rule):
    """Each operand of each sweep moves in vectors, 16 bytes of fp32 or 8 of 16 bits, and says whether it is dead."""
    found = words(code)
    for size in ("v4", "v2"):
        vectors = Counter({access: count for access in SASS if (count := found[f"{access}.{size}.u32"])})
        assert vectors in expected(rule), f"{size}: {vectors}, not {expected(rule)}"


def check_constant(code):
    """Only g, which nothing writes, goes through the read-only cache: by where a block keeps operands' addresses."""
    places = {True: set(), False: set()}
    bases = address_bases(code)
    for line in code:
        access = word(line)
        if re.match(r"(ld|st)\.global\.c[sg]\.", access) or ".nc" in access:
            places[".nc" in access].add(bases[re.search(r"\[(%\w+)\]", line)[1]])
    (g,) = places[True]
    assert places[False] <= {g - 8, g + 8, g + 16, g + 24, g + 32}, places


def address_bases(code):
    """Register -> the offset in shared memory of the address that it was added to."""
    loaded = {to: int(at) for to, at in re.findall(r"ld\.shared\.u64 (%\w+), \[%\w+\+(\d+)\];", "\n".join(code))}
    for to, a, b in re.findall(r"add\.s64 (%\w+), (%\w+), (%\w+);", "\n".join(code)):
        base = loaded.get(a, loaded.get(b))
        if base is not None:
            loaded[to] = base
    return loaded


def check_arithmetic(code, rule_has_roots):
    """IEEE quotients and roots, nothing contracted, flushed or approximated: or the bits would not be the CPU's."""
    floats = {x for x in words(code) if re.match(rf"({ROUNDS})\.", x) and re.search(r"\.(f|bf)\d+(x2)?$", x)}
    assert floats <= EXACT | {PRODUCT}, floats - EXACT
    assert not any(".ftz" in line for line in code)
    assert ("sqrt.rn.f32" in floats) == rule_has_roots, floats
    check_products(code)


def check_products(code):
    """What is multiplied and added at once was fp32, so that the product is exact."""
    text = "\n".join(code)
    widened = set(re.findall(r"cvt\.f64\.f32 (%\w+),", text))
    products = re.findall(rf"{PRODUCT} %\w+, (\S+), (\S+), \S+;", text)
    assert len(products) >= 8, "two quads of the gradient norm"
    assert {factor for pair in products for factor in pair} <= widened


def check_order(code, stats):
    """Counters and flags are released and acquired, and a barrier stands where one thread does it for a block."""
    found = words(code)
    assert found["atom.acq_rel.gpu.global.add.u32"] >= 2 + stats  # norm, leaving; a layer
    assert found["st.release.gpu.global.u32"] >= 1 + stats and found["ld.acquire.gpu.global.u32"] >= 1 + stats
    assert found["atom.relaxed.gpu.global.add.u32"] >= 2  # tickets
    assert hazards(code) == set()


def hazards(code):
    """Instructions before which a barrier is missing, on some way through the kernel.

    A release by one thread after stores of elements, which are all threads'; loads of elements after an acquire by
    one thread. g is exempt: nobody writes it.
    """
    found, start, after = set(), blocks(code), {}
    todo = [(0, frozenset())]
    while todo:
        i, state = todo.pop()
        if state <= after.get(i, frozenset()) and i in after:
            continue
        state = after[i] = after.get(i, frozenset()) | state
        body, successors = start[i]
        for line in body:
            state = pass_by(line, state, found)
        todo += [(k, state) for k in successors]
    return found


def pass_by(line, state, found):
    """What is pending behind a line: stores of elements, and acquires, since the last barrier."""
    access = word(line)
    acquires, releases = ".acquire." in access or ".acq_rel." in access, ".release." in access or ".acq_rel." in access
    if access.startswith(("bar.", "barrier.")):
        return frozenset()
    if releases and "stored" in state:
        found.add(f"release: {line}")
    if re.match(r"ld\.(global\.c[sg]\.v|u16|u32)", access) and "acquired" in state:
        found.add(f"acquire: {line}")
    if re.match(r"st\.(global\.c[sg]\.v|u16|u32)", access):
        state |= {"stored"}
    return state | {"acquired"} if acquires else state


def blocks(code):
    """The control flow: a block's first line -> its lines, and the first lines of those that may come next."""
    labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    jumps = [i + 1 for i, line in enumerate(code) if word(line).startswith(("bra", "ret", "exit"))]
    firsts = sorted({0, *labels.values(), *jumps})
    found = {}
    for first, end in pairwise([*firsts, len(code)]):
        last = code[end - 1]
        jump = re.search(r"\bbra(?:\.uni)? ([$\w]+);", last)
        falls = not word(last).startswith(("bra", "ret", "exit")) or last.startswith("@")
        successors = [labels[jump[1]]] if jump else []
        found[first] = code[first:end], [*successors, *([end] if falls and end < len(code) else [])]
    return found
