"""What one step moves through memory, counted from the table as the rule's sweeps are declared."""

from .forms import Needs, needs_of
from .table import Table

OPERANDS = range(5)  # bits of a sweep's masks: p, g, m, v and the prediction of p, as in csrc/rule.h
P, G, STATES, PREDICTED = 1, 2, 12, 16


def merged(masks: list[tuple[int, int]]) -> tuple[int, int]:
    """The masks of one sweep that does the work of all."""
    reads, writes = 0, 0
    for one in masks:
        reads, writes = reads | one[0], writes | one[1]
    return reads, writes


def sweeps(needs: Needs, row: dict, stats: bool) -> list[tuple[int, int]]:
    """Masks of operands (read, written) for each sweep over a layer, with coupled decay's reading of p."""
    coupled = needs.couples and row["weight_decay"] != 0 and not row.get("decoupled", False)
    masks = [needs.first, needs.second] if stats else [merged([needs.first, needs.second])]
    return [(reads | P if coupled and reads & G else reads, writes) for reads, writes in masks]


def predicting(needs: Needs) -> tuple[int, int]:
    """The masks of a prediction from memory."""
    return P | needs.second[0] & STATES, PREDICTED


def traffic(table: Table, state: dict, norm: bool, on_chip: int, leads: bool = False) -> dict[str, int]:
    """Compulsory and requested bytes of a step of one table.

    Args:
        table, state: the table and the optimizer's states.
        norm: whether the gradients are read once more for their global norm.
        on_chip: layers of one tensor and up to this many elements are read and written once whatever their sweeps.
        leads: whether predicted weights are written beside the true ones.
    """
    needs, total = needs_of(table.rule), {"compulsory": 0, "requested": 0}
    if needs is None:
        return total
    sizes, rests = table.operand_bytes(state), table.rest_bytes()
    for spec in table.layers:
        masks = sweeps(needs, table.groups[spec.group], spec.stats)
        masks[-1] = masks[-1][0], masks[-1][1] | PREDICTED * leads
        once = [merged(masks)]
        small = len(spec.spans) == 1 and spec.spans[0].count <= on_chip
        for span in spec.spans:
            again = span.count * sizes[span.tensor][1] * norm
            bytes_of = sizes[span.tensor], rests[span.tensor]
            total["requested"] += span.count * word_bytes(once if small else masks, *bytes_of) + again
            total["compulsory"] += span.count * word_bytes(once, *bytes_of) + again
    return total


def passes(table: Table, state: dict, masks: list[tuple[int, int]]) -> int:
    """Bytes of sweeps over all layers of a table."""
    sizes = table.operand_bytes(state)
    spans = (span for spec in table.layers for span in spec.spans)
    return sum(span.count * word_bytes(masks, sizes[span.tensor]) for span in spans)


def word_bytes(masks: list[tuple[int, int]], sizes: tuple, rest: tuple[int, int] = (0, 0)) -> int:
    """Bytes that an element costs, p with its rest; a prediction is as large as p."""
    sizes = (*sizes, sizes[0])
    beside = sum(rest[k] for mask in masks for k in (0, 1) if mask[k] & P)
    return beside + sum(sizes[k] for mask in masks for part in mask for k in OPERANDS if part >> k & 1)
