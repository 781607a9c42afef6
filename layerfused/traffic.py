"""What one step moves through memory, counted from the table as the engines' sweeps are declared."""

from . import _cpu
from .table import Table

OPERANDS = ("p", "g", "m", "v")  # bit k of a sweep's masks, as in csrc/rule.h


def sweeps(rule, row: dict, stats: bool) -> list[tuple[int, int]]:
    """Masks of operands (read, written) for each sweep over a layer, with coupled decay's reading of p."""
    needs = _cpu.rules()[rule.name]
    coupled = needs["couples"] and row["weight_decay"] != 0 and not row.get("decoupled", False)
    masks = [needs["reduce"], needs["apply"]]
    if not stats:
        masks = [tuple(a | b for a, b in zip(*masks, strict=True))]
    return [(reads | 1 if coupled and reads & 2 else reads, writes) for reads, writes in masks]


def traffic(table: Table, state: dict, norm: bool) -> dict[str, int]:
    """Compulsory and requested bytes of a step of one table, with or without a pass for the gradient norm."""
    rule, total = table.rule, {"compulsory": 0, "requested": 0}
    if rule.name not in _cpu.rules():
        return total
    sizes = table.operand_bytes(state)
    for spec in table.layers:
        masks = sweeps(rule, table.groups[spec.group], spec.stats)
        once = [0, 0]
        for mask in masks:
            once = [a | b for a, b in zip(once, mask, strict=True)]
        for span in spec.spans:
            size = sizes[span.tensor]
            for kind, chosen in (("requested", masks), ("compulsory", [once])):
                words = (size[k] for mask in chosen for part in mask for k in range(len(OPERANDS)) if part >> k & 1)
                total[kind] += span.count * sum(words)
                total[kind] += span.count * size[1] * norm  # the norm is needed before anything else can begin
    return total
