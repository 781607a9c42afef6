"""A sharded step on paper: the shard's own step, simulated, with one collective of the packed block or one per norm.

Everything here is predicted. What is assumed:
- A GPU's own part is what `model` predicts for its shard when all is reduced before anything is applied, as a step over
  several ranks must: nothing stays on chip meanwhile, and L2 keeps the last few megabytes.
- A collective takes its latency and its bytes over the bandwidth, as NCCL itself expects of its low-latency protocol
  (LL): rings for all-gathers, double trees for all-reduces. Nothing else is on the links.
- All ranks come at once, and the host is always ahead.
- Others' step is granted the same own part, and 4 all-reduces of one number for each tensor with one more for the
  gradient norm: in timm's LAMB each of a tensor's two norms is compared with zero and divided, and a DTensor that is a
  sum still to be taken is reduced for each of the two anew.
"""

import dataclasses
import math
from dataclasses import dataclass

from layerfused.exchange import MANY
from layerfused.forms import needs_of

from . import report
from .model import case_of, predicted
from .ours import Settings

OPTIMIZER = "LAMB(max_grad_norm=None)"
NORM_BYTES = 4  # one fp32 number


@dataclass(frozen=True)
class Network:
    """GPUs in nodes, and what collectives cost between them; seconds, bytes a second.

    [NCCL]: its own tables for choosing between algorithms, src/graph/tuning.cc in versions 2.19 to 2.28 (`baseLat`,
    `hwLat`, `getNetOverhead`, `llMaxBws`), for LL. It expects 25.2 µs of 16 bytes over two nodes of 8 H100 (issue 1453
    of NVIDIA/nccl); all_reduce(16, 16) is the same. Machines are rarely better than that, and some three times worse.

    Attributes:
        node: GPUs of one node, behind one NVSwitch.
        ring_s, tree_s: of any collective, whatever its size.
        near_s: one hop in a node.
        ring_far_s, tree_far_s: one hop between nodes.
        ring_near_s: one hop in a node of a ring over several: no less than the network's overhead.
        near_bandwidth, far_bandwidth: in one node, and over several.
    """

    node: float = 8  # DGX H100
    ring_s: float = 6.6e-6  # [NCCL]
    tree_s: float = 6.8e-6  # [NCCL]
    near_s: float = 0.6e-6  # [NCCL]
    ring_far_s: float = 2.7e-6  # [NCCL]
    tree_far_s: float = 5.0e-6  # [NCCL]
    ring_near_s: float = 1.0e-6  # [NCCL] 2 µs beside an AMD processor
    near_bandwidth: float = 141e9  # [NCCL] Hopper
    far_bandwidth: float = 20.4e9  # [NCCL] more than two nodes, an Intel processor

    def nodes(self, gpus):
        return math.ceil(gpus / self.node)

    def bandwidth(self, gpus):
        return self.far_bandwidth if self.nodes(gpus) > 1 else self.near_bandwidth

    def all_gather(self, gpus, size):
        """Seconds, of `size` bytes from each GPU."""
        nodes = self.nodes(gpus)
        near = max(self.near_s, self.ring_near_s) if nodes > 1 else self.near_s
        latency = self.ring_s + (gpus - nodes) * near + (nodes - 1) * self.ring_far_s
        return latency + (gpus - 1) * size / self.bandwidth(gpus)

    def all_reduce(self, gpus, size):
        """Seconds, of `size` bytes."""
        nodes = self.nodes(gpus)
        hops = (math.ceil(gpus / nodes) - 1) * self.near_s + math.ceil(math.log2(nodes)) * self.tree_far_s
        return self.tree_s + 2 * hops + 2 * size / self.bandwidth(gpus)


def small_kernels(gpus):
    """Launches of torch around that collective for a block without minima, from one launch's stats.

    A block of zeros, stats read and put into it, and both again behind the collective; gathered rows are added by
    halves, two launches each, and put together.
    """
    return 6 + 2 * math.ceil(math.log2(gpus)) if gpus <= MANY else 5


def block_bytes(shapes):
    """Of the packed block on each rank."""
    case = case_of(shapes, OPTIMIZER, "fp32")
    return 8 * needs_of(case.table.rule).terms * sum(layer.stats for layer in case.table.layers)


def row(shapes, gpus, gpu, network):
    """One prediction; milliseconds."""
    shard = f"{shapes}:{gpus}"
    elements = case_of(shard, OPTIMIZER, "fp32").elements
    own = predicted(shard, OPTIMIZER, "fp32", gpu, Settings(whole=0, ahead=elements), None)
    size, tensors = block_bytes(shapes), len(case_of(shapes, OPTIMIZER, "fp32").table.params)
    ways = {"all-gather": network.all_gather(gpus, size), "all-reduce": network.all_reduce(gpus, size)}
    chosen = "all-gather" if gpus <= MANY else "all-reduce"
    found = {"shapes": shapes, "gpus": gpus, "device": gpu.name, "tensors": tensors, "elements_each": elements}
    found |= {"own_ms": own["predicted_ms"] + 1e3 * gpu.launch_s}  # the second of its two launches
    found |= {"block_bytes": size, "collective": chosen, "collective_ms": 1e3 * ways[chosen]}
    found |= {f"{way.replace('-', '_')}_ms": 1e3 * seconds for way, seconds in ways.items()}
    found |= {"small_kernels_ms": 1e3 * small_kernels(gpus) * (gpu.launch_s + gpu.dram_s)}
    found |= {"step_ms": sum(found[key] for key in ("own_ms", "collective_ms", "small_kernels_ms"))}
    count = 4 * tensors + 1
    others = 1e3 * count * network.all_reduce(gpus, NORM_BYTES)
    found |= {"others_collectives": count, "others_collectives_ms": others, "others_step_ms": found["own_ms"] + others}
    return found | {"ratio": found["others_step_ms"] / found["step_ms"]}


COLUMNS = {
    "shapes": lambda row: row["shapes"],
    "GPUs": lambda row: f"{row['gpus']:,}",
    "elements each": lambda row: f"{row['elements_each']:,}",
    "own part ms": lambda row: report.number(row["own_ms"]),
    "block KiB": lambda row: report.number(row["block_bytes"] / 1024),
    "all-gather ms": lambda row: report.number(row["all_gather_ms"]),
    "all-reduce ms": lambda row: report.number(row["all_reduce_ms"]),
    "chosen": lambda row: row["collective"],
    "small kernels ms": lambda row: report.number(row["small_kernels_ms"]),
    "step ms": lambda row: report.number(row["step_ms"]),
    "per-tensor collectives": lambda row: report.number(row["others_collectives"]),
    "their ms": lambda row: report.number(row["others_collectives_ms"]),
    "their step ms": lambda row: report.number(row["others_step_ms"]),
    "× ours": lambda row: report.number(row["ratio"]),
}


def text(rows, gpu, network):
    """The table, under what it is."""
    constants = " ".join(f"{name}={value:g}" for name, value in dataclasses.asdict(network).items())
    lines = [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    return "\n".join([f"PREDICTED, nothing measured: {OPTIMIZER} on {gpu.name}s; {constants}", report.aligned(lines)])
