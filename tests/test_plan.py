"""Properties of the plan: what any engine may rely on, whatever the layers and however its workers are scheduled."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import OPTIONS, Workers, layer_lists, needs_reduce, touched

import layerfused
from layerfused import cpu
from layerfused.plan import Chunk, Item, Kind, Layer, LayerSpec, Phase, Span, cut_rows, make_plan
from layerfused.table import Table

FEW = settings(max_examples=100, deadline=None)
ROOT = Path(__file__).parent.parent


def places(plan, *kinds):
    """Chunk -> the positions in the list of items of these kinds that work on it."""
    found = {c: [] for c in range(len(plan.chunks))}
    for at, item in enumerate(plan.items):
        if item.kind in kinds:
            for c in touched(plan, item):
                found[c].append(at)
    return found


@FEW
@given(layer_lists(), OPTIONS)
def test_every_element_is_in_one_chunk_of_its_layer(specs, options):
    plan = make_plan(specs, **options)
    seen, expected = Counter(), Counter()
    for number, (layer, spec) in enumerate(zip(plan.layers, specs, strict=True)):
        own = plan.chunks[layer.first : layer.first + layer.chunks]
        assert all(chunk.layer == number and 0 <= chunk.count <= options["chunk"] for chunk in own)
        assert layer.elements == sum(chunk.elements for chunk in own) == sum(s.stands_for for s in spec.spans)
        assert (layer.group, layer.adapt) == (spec.group, spec.stats)
        assert {c.tensor for c in own} == {s.tensor for s in spec.spans}  # empty ones too: their steps are counted
        seen.update((c.tensor, i) for c in own for i in range(c.start, c.start + c.count))
        expected.update((s.tensor, i) for s in spec.spans for i in range(s.start, s.start + s.count))
    assert seen == expected
    assert sum(layer.chunks for layer in plan.layers) == len(plan.chunks)
    slots = [slot for layer in plan.layers for slot in range(layer.state, layer.state + layer.states)]
    assert slots == list(range(len(slots)))
    assert [layer.states for layer in plan.layers] == [len({s.tensor for s in spec.spans}) for spec in specs]


@FEW
@given(layer_lists(), OPTIONS)
def test_every_chunk_is_reduced_once_and_applied_once_in_order(specs, options):
    plan = make_plan(specs, **options)
    reduced, applied = places(plan, Kind.REDUCE, Kind.WHOLE), places(plan, Kind.APPLY, Kind.WHOLE)
    for c in range(len(plan.chunks)):
        assert len(applied[c]) == 1 and len(reduced[c]) == needs_reduce(plan, c)
    for number, layer in enumerate(plan.layers):
        own = range(layer.first, layer.first + layer.chunks)
        if layer.adapt and Item(Kind.WHOLE, number) not in plan.items:
            assert max(reduced[c][0] for c in own) < min(applied[c][0] for c in own)
            assert [c for _, c in sorted((applied[c][0], c) for c in own)] == list(own)[::-1]  # still in the cache
        elif layer.adapt:
            assert layer.chunks == 1 and plan.chunks[layer.first].count <= options["whole"]
    norms = [item for item in plan.items if item.kind == Kind.NORM]
    assert norms == [Item(Kind.NORM, c) for c in range(len(plan.chunks))] * options["norm"]
    assert plan.items[: len(norms)] == norms


@FEW
@given(layer_lists(), OPTIONS)
def test_look_ahead(specs, options):
    """At least `ahead` elements come between a layer's last reduce and its first apply, unless there are no more.

    No upper bound: what follows may be one item of any size.
    """
    plan = make_plan(specs, **options)
    first_sweep = [0]  # elements that items before this one have reduced (or, without stats, updated at once)
    for item in plan.items:
        new = item.kind in (Kind.REDUCE, Kind.WHOLE) or (item.kind == Kind.APPLY and not needs_reduce(plan, item.index))
        first_sweep.append(first_sweep[-1] + new * sum(plan.chunks[c].count for c in touched(plan, item)))
    reduced, applied = places(plan, Kind.REDUCE), places(plan, Kind.APPLY)
    for layer in plan.layers:
        own = range(layer.first, layer.first + layer.chunks)
        if reduced[layer.first]:
            last, first = max(reduced[c][0] for c in own), min(applied[c][0] for c in own)
            ended = first_sweep[first] == first_sweep[-1]
            assert first_sweep[first] - first_sweep[last + 1] >= options["ahead"] or ended


@FEW
@given(layer_lists(), OPTIONS, st.integers(1, 8), st.sampled_from([1, 2]), st.randoms(use_true_random=False))
def test_any_interleaving_of_any_team_ends(specs, options, workers, hold, random):
    """Some worker can always go on, and no apply begins before its layer's reduces have ended.

    Leaves out what a wait publishes (memory order): that is ThreadSanitizer's part.
    """
    plan = make_plan(specs, **options)
    team = Workers(plan, workers, hold)
    favourite = random.randrange(workers)
    while len(team.ended) < len(plan.items):
        able = [w for w in range(workers) if team.moves(w)]
        assert able, f"deadlock: workers hold {[list(h) for h in team.held]}"
        if random.random() < 0.05:
            favourite = random.randrange(workers)  # one runs far ahead for a while, the others stall
        worker = favourite if favourite in able and random.random() < 0.8 else random.choice(able)
        team.act(worker, random.choice(team.moves(worker)))
    assert sorted(team.ended) == list(range(len(plan.items)))
    order = {ticket: at for at, ticket in enumerate(team.ended)}
    for number, layer in enumerate(plan.layers):
        kinds = {k: [i for i, item in enumerate(plan.items) if item.kind == k] for k in (Kind.REDUCE, Kind.APPLY)}
        own = {k: [order[i] for i in v if plan.chunks[plan.items[i].index].layer == number] for k, v in kinds.items()}
        if layer.adapt and own[Kind.REDUCE]:
            assert max(own[Kind.REDUCE]) < min(own[Kind.APPLY])


def test_a_list_out_of_order_would_deadlock():
    """The simulation can fail: an apply before its reduce blocks a team of one."""
    plan = make_plan([LayerSpec((Span(0, 0, 4),), 0, True)], chunk=4, whole=0, ahead=0)
    team = Workers(plan._replace(items=plan.items[::-1]), 1, 1)
    team.act(0, "claim")
    assert team.moves(0) == []


# Sizes only, nothing is allocated: layers past what 32 bits count.
@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**31 + 1, 2**33 + 7])
def test_huge_layers(size):
    chunk = 2**28
    specs = [LayerSpec((Span(0, 0, size), Span(1, 5, size)), 0, True), LayerSpec((Span(2, size, 3),), 0, True)]
    plan = make_plan(specs, chunk=chunk, whole=2**20, ahead=2**30)
    assert plan.layers[0].elements == 2 * size
    for tensor, start in ((0, 0), (1, 5)):
        own = [c for c in plan.chunks if c.tensor == tensor]
        ends = [c.start + c.count for c in own]
        assert [c.start for c in own] == [start, *ends[:-1]] and ends[-1] == start + size
    assert list(plan.packed()[1])[:4] == [0, 0, chunk, 0]
    assert Chunk(2, size, 3, 1, 3) == plan.chunks[-1]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (6,), (6, 4), (0, 4), (6, 0), (6, 2, 3), (2**31 + 1, 6)])
@pytest.mark.parametrize("layer", ["tensor", "group", "slices", 1, 2, 3, (6,), (1, 2, 3)], ids=str)
def test_cut_rows(shape, layer):
    rows = shape[0] if shape else 0
    if layer in ("tensor", "group"):
        assert cut_rows(shape, layer) == [torch.Size(shape).numel()]
        return
    if layer == "slices":
        counts = [1] * min(rows, 9)
    else:
        counts = [rows // layer] * layer if isinstance(layer, int) else layer
    if not shape or (layer != "slices" and sum(counts) != rows):
        with pytest.raises(ValueError, match=re.escape(f"layer={layer!r}")):
            cut_rows(shape, layer)
    elif rows <= 6 or layer != "slices":  # 2**31 slices would fill the memory
        row = torch.Size(shape[1:]).numel()
        assert cut_rows(shape, layer) == ([n * row for n in counts] or [0])


@pytest.mark.parametrize(
    "layer, sizes",
    [
        ("tensor", [24, 30]),
        ("slices", [4] * 6 + [5] * 6),
        (2, [12, 12, 15, 15]),
        ((1, 2, 3), [4, 8, 12, 5, 10, 15]),
        ("group", [54]),
    ],
    ids=str,
)
def test_layer_maps(layer, sizes):
    """What the table hands to the plan, for parameters of 6x4 and 6x5 elements."""
    params = [torch.nn.Parameter(torch.zeros(6, n)) for n in (4, 5)]
    table = Table(layerfused.LAMB.rule, [{"layer": layer, "adapt": True, "precision": None, "seed": 0}], [params])
    spans = [span for spec in table.layers for span in spec.spans]
    assert [sum(span.count for span in spec.spans) for spec in table.layers] == sizes
    covered = Counter((s.tensor, i) for s in spans for i in range(s.start, s.start + s.count))
    assert covered == Counter((t, i) for t, p in enumerate(params) for i in range(p.numel()))
    plan = make_plan(table.layers, chunk=5, whole=0, ahead=0)
    assert [range(k.state, k.state + k.states) for k in plan.layers] == table.layer_slots
    assert [slot for slots in table.slots for slot in slots] == [slot for slots in table.layer_slots for slot in slots]


def test_chunks_do_not_depend_on_the_number_of_workers(monkeypatch):
    """Else sums would be taken in another order and the bits of a result depend on the machine."""
    asked = []

    def spy(layers, **options):
        asked.append((layers, options))
        return make_plan(layers, **options)

    monkeypatch.setattr(cpu, "make_plan", spy)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            layerfused.LAMB([torch.nn.Parameter(torch.zeros(3 * cpu.CHUNK))])
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2]


def test_packed_is_what_the_engine_reads():
    """Field by field as csrc/plan.h declares them."""
    header = (ROOT / "csrc/plan.h").read_text()
    for row in (Item, Chunk, Layer):
        body = re.search(rf"struct {row.__name__} {{\s*(.*?);\s*}}", header, re.S)[1]
        assert re.findall(r"\w+", re.sub(r"\b(int64_t|Kind)\b", "", body)) == list(row._fields)
    kinds = re.findall(r"^  (\w+),", re.search(r"enum class Kind.*?};", header, re.S)[0], re.M)
    assert {kind.upper(): at for at, kind in enumerate(kinds)} == {k: v for k, v in vars(Kind).items() if k.isupper()}
    phases = dict(re.findall(r"(\w+) = (\d+)", re.search(r"enum Phase[^}]*}", header)[0]))
    assert {k: int(v) for k, v in phases.items()} == {k: v for k, v in vars(Phase).items() if k.isupper()}

    plan = make_plan([LayerSpec((Span(0, 0, 3),), 1, True)], chunk=2, whole=0, ahead=0, norm=True)
    items, chunks, layers = plan.packed()
    assert [a.typecode for a in plan.packed()] == ["q"] * 3
    assert chunks.tolist() == [0, 0, 2, 0, 2, 0, 2, 1, 0, 1]
    assert layers.tolist() == [1, 0, 2, 3, 1, 0, 1]
    assert items.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 2, 1, 2, 0]


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"whole": -1}, {"ahead": -1}], ids=str)
def test_errors(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        make_plan([], **{"chunk": 1, "whole": 0, "ahead": 0, **wrong})
    assert make_plan([], chunk=1, whole=0, ahead=0, norm=True) == ([], [], [])
