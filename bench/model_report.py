"""Tables of what `model` predicts."""

import statistics

from . import report
from .gpus import REGISTERS

COLUMNS = {
    "optimizer": lambda row: row["optimizer"],
    "shapes": lambda row: row["shapes"],
    "device": lambda row: row["device"],
    "predicted ms": lambda row: report.number(row["predicted_ms"]),
    "measured ms": lambda row: report.number(row.get("median_ms")),
    "error %": lambda row: f"{row['error_percent']:+.1f}" if "error_percent" in row else "–",
    "launches": lambda row: report.number(row["launches"]),
    "L2 hits": lambda row: report.ratio(row["l2_hits"]),
    "words": lambda row: report.number(row["words"]),
    "% of copy": lambda row: report.number(row["percent_of_copy"]),
    "% of roofline": lambda row: report.number(row["percent_of_roofline"]),
}


def table(rows):
    names = [name for name in COLUMNS if any(COLUMNS[name](row) != "–" for row in rows)]
    return report.aligned([names] + [[COLUMNS[name](row) for name in names] for row in rows])


def sweep(found):
    """The points of a sweep, best first."""
    best = min(point["score"] for point in found)
    cases = [f"{k}: {row['shapes']}, {row['optimizer']}" for k, row in enumerate(found[0]["rows"], 1)]
    columns = [f"{k} {what}" for k in range(1, len(cases) + 1) for what in ("ms", "words")]
    lines = [[*found[0]["constants"], "registers", "/ best", *columns]]
    for point in sorted(found, key=lambda point: point["score"]):
        constants = point["constants"]
        registers = min(255, REGISTERS // (constants["threads"] * constants["blocks"]))
        cells = [report.number(row[key]) for row in point["rows"] for key in ("predicted_ms", "words")]
        lines.append([*map(str, (*constants.values(), registers)), f"{point['score'] / best:.3f}", *cells])
    return "\n".join([*cases, report.aligned(lines)])


def median_error(rows):
    errors = [row["error_percent"] for row in rows]
    if not errors:
        return "no row has a model"
    size = statistics.median(map(abs, errors))
    return f"median error {statistics.median(errors):+.1f} %, of its size {size:.1f} %, over {len(errors)} rows"
