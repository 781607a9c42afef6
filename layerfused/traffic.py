"""What one step moves through memory, counted from the table as the rule's sweeps are declared."""

from .forms import Needs, needs_of
from .table import Table

OPERANDS = range(4)  # bits of a sweep's masks: p, g, m, v, as in csrc/rule.h


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
    return [(reads | 1 if coupled and reads & 2 else reads, writes) for reads, writes in masks]


def traffic(table: Table, state: dict, norm: bool, on_chip: int, leads: bool = False) -> dict[str, int]:
    """Compulsory and requested bytes of a step of one table.

    Args:
        table, state: the table and the optimizer's states.
        norm: whether the gradients are read once more for their global norm.
        leads: whether predicted weights are written beside the true ones.
        on_chip: layers of one tensor and up to this many elements are read and written once whatever their sweeps.
    """
    needs, total = needs_of(table.rule), {"compulsory": 0, "requested": 0}
    if needs is None:
        return total
    sizes = table.operand_bytes(state)
    for spec in table.layers:
        masks = sweeps(needs, table.groups[spec.group], spec.stats)
        once = [merged(masks)]
        small = len(spec.spans) == 1 and spec.spans[0].count <= on_chip
        for span in spec.spans:
            size = sizes[span.tensor]
            for kind, chosen in (("requested", once if small else masks), ("compulsory", once)):
                words = (size[k] for mask in chosen for part in mask for k in OPERANDS if part >> k & 1)
                total[kind] += span.count * (sum(words) + size[1] * norm + size[0] * leads)
    return total
