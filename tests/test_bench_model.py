"""The model on paper: its cache against an oracle, its counts against the package's, its answers where they are known.

Whether the predicted times are true is not tested here: `python -m bench model --measured FILE.json` says it.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gpus, rivals, shapes
from bench.cache import Cache
from bench.ours import Case, Settings, Work
from bench.simulation import Device, Gate, Job, Kernel, sweep_of

H200 = gpus.GPUS["h200"]
FIXED = Settings(chunk=4096, whole=2048, ahead=2**20, blocks=2, threads=256)  # whatever the engine's constants are
SIZES = {key: key % 3 + 1 for key in range(8)}  # a line's size never changes


class Oracle:
    """The cache as its docstring has it: lines in a plain list, searched from the front."""

    def __init__(self, capacity, eager):
        self.capacity, self.eager, self.keys, self.dirty = capacity, eager, [], set()

    def touch(self, key, writes, keep):
        hit, written = key in self.keys, 0
        if hit:
            self.keys.remove(key)
        self.keys.insert(len(self.keys) if keep else 0, key)
        self.dirty |= {key} if writes else set()
        if self.eager and not keep:
            written += SIZES[key] * (key in self.dirty)
            self.dirty.discard(key)
        while sum(SIZES[k] for k in self.keys) > self.capacity:
            gone = self.keys.pop(0)
            written += SIZES[gone] * (gone in self.dirty)
            self.dirty.discard(gone)
        return hit, written


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(list(SIZES)), st.booleans(), st.booleans()), max_size=40),
)
def test_the_cache_is_its_oracle(capacity, eager, touches):
    cache, oracle = Cache(capacity, eager), Oracle(capacity, eager)
    for key, writes, keep in touches:
        assert cache.touch(key, SIZES[key], writes, keep) == oracle.touch(key, writes, keep)
        assert cache.held == sum(SIZES[k] for k in oracle.keys) <= capacity
    assert cache.flush() == sum(SIZES[k] for k in oracle.dirty)
    assert cache.flush() == 0


@pytest.fixture
def small(tmp_path):
    """Tensors below, at and above a tile, a chunk, a layer that stays on chip; an empty one; 137,000 elements."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps([[2048], [2049], [0], [7], [300, 300], [4096], [1], [38799]]))
    return str(path)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """6.6 million elements in layers of several chunks."""
    path = tmp_path_factory.mktemp("shapes") / "middle.json"
    path.write_text(json.dumps([[256, 256]] * 100))
    return str(path)


def simulated(name, text, settings=None, dtype="fp32", gpu=H200, eager=False):
    case, device = Case.of(name, text, dtype), Device(gpu, eager)
    Work(case, settings or FIXED, gpu).run(device)
    device.finish()
    return case, device


OURS = ["LAMB(max_grad_norm=None)", "LAMB", "AdamW", "Aida", "Aida(weight_decay=0.1)", "LARS", "NovoGrad", "SETAdam"]
OURS += ["SGD(lr=0.1, momentum=0.9)", "AdamNorm"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("text", OURS)
def test_requested_bytes_are_what_the_package_counts(small, text, dtype):
    chosen = FIXED._replace(ahead=20_000)
    case, device = simulated(small, text, chosen, dtype)
    assert device.requested == case.bytes(chosen)["requested"]
    assert device.launches == 1


@pytest.mark.parametrize("text", OURS)
def test_what_fits_in_l2_moves_once(small, text):
    case, device = simulated(small, text)
    moved = case.bytes(FIXED)["compulsory"] - 4 * case.elements * case.norm  # what the norm has read stays there
    assert device.dram == moved


@pytest.mark.parametrize("ahead", [2**16, 2**25])
def test_writing_back_at_once_moves_the_same(middle, ahead):
    chosen = FIXED._replace(ahead=ahead)
    late, early = (simulated(middle, "LAMB(max_grad_norm=None)", chosen, eager=eager)[1] for eager in (False, True))
    assert early.dram == pytest.approx(late.dram, rel=0.01) and early.now <= late.now


@pytest.mark.parametrize("ahead", [2**16, 2**25])
def test_what_does_not_fit_moves_again(middle, ahead):
    gpu = gpus.changed(H200, {"l2_bytes": "8e6"})
    case, near = simulated("tiny", "AdamW", gpu=gpu)
    assert near.dram == case.bytes(FIXED)["compulsory"]
    case, device = simulated(middle, "LAMB(max_grad_norm=None)", FIXED._replace(ahead=ahead), gpu=gpu)
    words = device.dram / 4 / case.elements
    assert words == pytest.approx(7 if ahead < 2**20 else 10, abs=0.3)
    assert device.hits / device.requested == pytest.approx(0.6 if ahead < 2**20 else 0.3, abs=0.03)


def test_larger_chunks_need_more_of_the_cache(middle):
    gpu = gpus.changed(H200, {"l2_bytes": "20e6"})
    found = [
        simulated(middle, "LAMB(max_grad_norm=None)", FIXED._replace(chunk=chunk, whole=0, ahead=2**16), gpu=gpu)[1]
        for chunk in (4096, 65536)
    ]
    assert found[0].dram < 0.9 * found[1].dram


def test_layers_kept_on_chip_are_read_once(small):
    case, device = simulated(small, "LAMB(max_grad_norm=None)", FIXED._replace(resident=100_000))
    assert device.requested == case.bytes(FIXED)["compulsory"]


@pytest.mark.parametrize("field", ["sheet_bandwidth", "l2_write", "processors", "launch_s", "dram_s"])
def test_a_better_device_is_faster(middle, field):
    value = getattr(H200, field)
    better = {field: str(value / 2 if field.endswith("_s") else value * 2)}
    slow = simulated(middle, "AdamW")[1].now
    assert simulated(middle, "AdamW", gpu=gpus.changed(H200, better))[1].now < slow


def test_a_stream_takes_what_dram_takes():
    """Only blocks enough and nothing but reads: no more than the bandwidth, and hardly less."""
    device, sweep = Device(H200), sweep_of((2, 0), (4,) * 4)
    jobs = [Job(4 * k, 4096, (sweep,)) for k in range(20_000)]
    device.launch(Kernel(1024, blocks=8, item_s=0), jobs)
    assert 0.97 < device.dram / H200.bandwidth / device.now < 1


def test_blocks_that_wait_for_each_other_are_found():
    sweep = sweep_of((1, 1), (4,) * 4)
    jobs = [Job(k, 10, (sweep, sweep), None, 0) for k in range(200)]
    with pytest.raises(RuntimeError, match="132 blocks wait for each other"):
        Device(H200).launch(Kernel(1024, 1, 0), jobs, [Gate(200, 0)])


def test_the_constants_are_the_engines():
    root = Path(__file__).parent.parent
    text = (root / "csrc/cuda/launch.h").read_text().partition("#else")[2]
    text += (root / "layerfused/cuda.py").read_text()
    found = {}
    for name, value in re.findall(r"^(?:constexpr int )?([A-Z]+) = ([A-Z0-9*<+ ]+)(?:;|\s+#|$)", text, re.MULTILINE):
        found.setdefault(name, eval(value, {}, found))  # of literals and the names before them
    assert Settings() == tuple(found[name] for name in ("CHUNK", "WHOLE", "AHEAD", "BLOCKS", "THREADS")) + (0,)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400_000), max_size=60))
def test_launches_of_others_hold_what_they_may(sizes):
    limits = rivals.Limits({4: 7}, 12)
    launches = list(rivals.packed(sizes, limits, 4))
    blocks = [block for launch in launches for block in launch]
    covered = Counter()
    for tensor, start, count in blocks:
        assert start == covered[tensor] and 0 < count <= rivals.CHUNK
        covered[tensor] += count
    assert covered == Counter({k: size for k, size in enumerate(sizes) if size})
    for launch in launches:
        tensors = len({tensor for tensor, _, _ in launch})
        assert len(launch) <= 12 and tensors <= 7
        assert launch is launches[-1] or len(launch) == 12 or tensors == 7


@pytest.mark.parametrize(("name", "words"), [("torch.AdamW:fused", 7), ("apex.optimizers.FusedLAMB", 13)])
def test_words_of_others(name, words):
    device, rival = (
        Device(gpus.changed(H200, {"l2_bytes": "1e6"})),
        rivals.RIVALS[name]("many-small", "fp32", rivals.LARGE),
    )
    rival.run(device)
    device.finish()
    assert device.requested == words * 4 * rival.elements
    assert device.dram / 4 / rival.elements == pytest.approx(words, abs=0.3)


@pytest.mark.parametrize(("cuda", "launches"), [("12.8", 11 + 34), ("13.0", 2 + 5)])
def test_launches_of_torch(cuda, launches):
    """1,200 tensors, 110 or 770 to a launch of the steps, 36 or 252 to one of AdamW."""
    assert shapes.elements(shapes.load("many-small")) // 1600 < rivals.CHUNK
    device = Device(H200)
    rivals.TorchAdamW("many-small", "fp32", rivals.limits_of(cuda)).run(device)
    assert device.launches == launches
