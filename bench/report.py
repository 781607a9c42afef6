"""Tables and plots from a bench's JSON."""

import json
from itertools import groupby
from pathlib import Path

from .constants import named


def add_arguments(parser):
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true", help="the table as README shows it (of a step)")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="bars of the first file, which must be a step's")


def run(args):
    documents = [json.loads(path.read_text()) for path in args.files]
    for document in documents:
        printed = sweep if document["bench"] == "tune" else markdown if args.markdown else text
        print(printed(document))
    if args.plot:
        plot(documents[0], args.plot)


def number(value, unit=1.0):
    """Three significant digits or whole numbers; a dash where nothing was measured."""
    if value is None:
        return "–"
    whole = abs(value) >= 100 * unit or (isinstance(value, int) and unit == 1)
    return f"{value / unit:,.0f}" if whole else f"{value / unit:#.3g}"


def ratio(value):
    """Two decimals, two significant digits below 0.1."""
    return "–" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


COLUMNS = {
    "optimizer": lambda row: row["optimizer"],
    "engine": lambda row: row["engine"],
    "median ms": lambda row: number(row["median_ms"]),
    "p10": lambda row: number(row["p10_ms"]),
    "p90": lambda row: number(row["p90_ms"]),
    "compulsory MiB": lambda row: number(row["compulsory_bytes"], 2**20),
    "requested MiB": lambda row: number(row["requested_bytes"], 2**20),
    "GB/s": lambda row: number(row["gb_per_s"]),
    "% of copy": lambda row: number(row["percent_of_copy"]),
    "native calls": lambda row: number(row["native_calls"]),
    "launches": lambda row: number(row.get("launches")),
    "memcpys": lambda row: number(row.get("memcpys")),
    "host µs": lambda row: number(row["host_us"]),
    "first s": lambda row: number(row.get("first_step_s")),
    "extra KiB": lambda row: number(row["workspace_bytes"], 2**10),
    "extra %": lambda row: number(_extra_percent(row)),
    "allocated MiB": lambda row: number(row.get("allocated_bytes"), 2**20),
    "peak MiB": lambda row: number(row.get("peak_bytes"), 2**20),
}
IN_README = ("optimizer", "median ms", "GB/s", "% of copy", "native calls", "launches", "host µs")


def _extra_percent(row):
    """Bytes beside parameters, gradients and states, in percent of these."""
    held, needed = row["workspace_bytes"], row["needed_bytes"]
    return None if held is None or not needed else 100 * held / needed


def filled(rows, names):
    """Those of the columns in which something was measured: a GPU's are empty on a CPU."""
    return [name for name in names if any(COLUMNS[name](row) != "–" for row in rows)]


def groups(document):
    """Rows that were measured together, with their copy's row."""
    copies = {(copy["shapes"], copy["batch"]): copy for copy in document["copies"]}
    for key, rows in groupby(document["rows"], key=lambda row: (row["shapes"], row["batch"])):
        yield list(rows), copies[key]


def aligned(lines):
    """Lists of cells as text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *rest in lines:
        cells = [first.ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def heading(rows, copy):
    """What is the same for all rows of a group, in one line."""
    row = rows[0]
    return (
        f"{row['shapes']}: {row['tensors']:,} tensors, {row['elements']:,} elements, {row['dtype']}, {row['device']}, "
        f"{row['threads']} threads, {copy['rounds']} rounds; copy {copy['gb_per_s']:.1f} GB/s"
    )


def noise(copy):
    """A warning where others worked on the machine meanwhile, else nothing."""
    others = copy["others_cpus"]
    return f"NOISY: other processes kept {others:.1f} CPUs busy" if others is not None and others > 0.1 else ""


def ratios(rows):
    """Medians over the medians of the competitors in the columns; above 1 is slower."""
    rivals = list(rows[0]["ratios"])
    lines = [[row["optimizer"], *(ratio(row["ratios"].get(rival)) for rival in rivals)] for row in rows]
    return [["time / time of", *rivals], *lines] if rivals else []


def text(document):
    """The whole report as plain aligned tables."""
    parts = []
    for rows, copy in groups(document):
        names = filled(rows, COLUMNS)
        lines = [names] + [[COLUMNS[name](row) for name in names] for row in rows]
        parts += [*filter(None, [heading(rows, copy), noise(copy), aligned(lines), aligned(ratios(rows))]), ""]
    parts += [f"skipped {note['optimizer']}: {note['reason']}" for note in document["skipped"]]
    return "\n".join([*parts, *missing(document), where(document)])


def sweep(document):
    """The points of a sweep of constants, best first; what failed or spilled says why below."""
    points = document["points"]
    start = points[0]["score"]
    cases = [f"{k}: {row['shapes']}, {row['optimizer']}" for k, row in enumerate(points[0]["rows"], 1)]
    columns = [f"{k} {what}" for k in range(1, len(cases) + 1) for what in ("ms", "GB/s", "% of copy")]
    lines = [[*points[0]["constants"], "/ start", *columns, "registers", "spills"]]
    reasons = []
    for point in sorted(points, key=lambda point: point["score"] or float("inf")):
        rows, score = point["rows"], point["score"]
        found = [row.get(key) for row in rows for key in ("median_ms", "gb_per_s", "percent_of_copy")]
        most = [max((row[key] for row in rows if row[key] is not None), default=None) for key in ("n_regs", "n_spills")]
        cells = [number(cell) for cell in (*found, *most)]
        share = score / start if score and start else None
        lines.append([*map(str, point["constants"].values()), ratio(share), *cells])
        told = [f"{k} {row['reason']}" for k, row in enumerate(rows, 1) if row["reason"]]
        reasons += [f"{named(point['constants'])}: {'; '.join(told)}"] if told else []
    ended = [f"stopped: {document['stopped']}"] if document["stopped"] else []
    return "\n".join([*cases, aligned(lines), *reasons, *ended, *missing(document), where(document)])


def missing(document):
    return [f"not measured: {what}" for what in document["not_measured"]]


def where(document):
    """Machine, versions and date in one line."""
    machine, versions = document["machine"], document["versions"]
    place = machine.get("gpu") or f"{machine['cpu']}, {document['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{place}; {packages}; {document['date'][:10]}"


def markdown(document):
    """README's table: one line per shapes and optimizer, competitors' ratios in the last columns."""
    rivals = list(dict.fromkeys(rival for row in document["rows"] for rival in row["ratios"]))
    names = filled(document["rows"], IN_README)
    head = ["shapes", *names, *(f"× {rival}" for rival in rivals)]
    lines = [head, ["---", "---"] + ["---:"] * (len(head) - 2)]
    for row in document["rows"]:
        cells = [COLUMNS[name](row) for name in names]
        lines.append([row["shapes"], *cells, *(ratio(row["ratios"].get(rival)) for rival in rivals)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    warnings = dict.fromkeys(f" {noise(copy)} ({copy['shapes']})." for copy in document["copies"] if noise(copy))
    return f"{table}\n\n{where(document)}. Made by `{document['command']}`.{''.join(warnings)}"


def _bars(axes, rows, copy):
    """Horizontal bars of one group, ours in another colour, lines from the 10th to the 90th percentile."""
    medians = [row["median_ms"] for row in rows]
    spread = [[row["median_ms"] - row["p10_ms"] for row in rows], [row["p90_ms"] - row["median_ms"] for row in rows]]
    colours = ["tab:blue" if row["ours"] else "tab:gray" for row in rows]
    bars = axes.barh(range(len(rows)), medians, xerr=spread, color=colours, ecolor="black", capsize=2)
    axes.bar_label(bars, labels=[f"{number(median)} ms" for median in medians], padding=8, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["optimizer"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(heading(rows, copy), fontsize=8, loc="left")


def plot(document, path):
    """A PNG of milliseconds per optimizer, one panel per shapes."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.patches import Patch

    parts = list(groups(document))
    sizes = [len(rows) + 1.5 for rows, _ in parts]
    figure = Figure(figsize=(9, 0.3 * sum(sizes) + 1.2), layout="constrained")
    panels = figure.subplots(len(parts), squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (rows, copy) in zip(panels, parts, strict=True):
        _bars(axes, rows, copy)
    caption = "milliseconds per step (median; lines: 10th to 90th percentile; less is better)"
    panels[-1].set_xlabel(f"{caption}\n{where(document)}", fontsize=8)
    legend = [Patch(color="tab:blue", label="layerfused"), Patch(color="tab:gray", label="others")]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
