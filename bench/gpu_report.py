"""What `python -m bench gpu` shows at its end: ratios to torch's fused AdamW as tables and plots, and what failed."""

from . import report
from .gpu_order import BACKENDS, CORE, REST, on_backend
from .gpu_parts import FAILED, LEFT, RIVALS, SKIPPED, STOPPED

FUSED = RIVALS[0]
COLOURS = {"cuda": "tab:green", "triton": "tab:blue", "torch": "tab:gray"}


def entries():
    """Every contender: its label, its place in the plot, who runs it, and the name its rows have."""
    for place, text in enumerate(CORE + REST):
        for backend in BACKENDS:
            yield f"{text} {backend}", place, backend, on_backend(text, backend)
    for place, text in enumerate(RIVALS, len(CORE + REST)):
        yield text, place, "torch", text


def found(document, dtype):
    """Rows by shapes and name; of a rival measured in several runs the first."""
    lines = {}
    for row in document["rows"]:
        if row["dtype"] == dtype and FUSED in row["ratios"]:
            lines.setdefault(row["shapes"], {}).setdefault(row["optimizer"], row)
    return lines


def table(document, dtype):
    """Times over the time of fused AdamW in the same run; below, what that took itself."""
    lines = found(document, dtype)
    if not lines:
        return ""
    cells = [[f"{dtype}, time / {FUSED}", *lines]]
    for label, _, _, name in entries():
        ratios = [rows[name]["ratios"][FUSED] if name in rows else None for rows in lines.values()]
        cells.append([label, *map(report.ratio, ratios)])
    cells.append([f"{FUSED}, ms", *(report.number(rows[FUSED]["median_ms"]) for rows in lines.values())])
    return report.aligned(cells)


def counted(document):
    """What ncu has seen of each kernel."""
    for row in document["counters"]:
        numbers = {"words/element from and to DRAM": row["dram_words_per_element"], "ms": 1e3 * row.get("seconds", 0)}
        numbers["% L2 hits"] = row.get("l2_hit_percent")
        told = ", ".join(f"{report.number(value)} {name}" for name, value in numbers.items())
        yield f"{row['shapes']}, {row['optimizer']}: {told}"


def text(document):
    """Tables, counters, then what did not run and what failed, which must be the last that one reads."""
    lines = [*filter(None, (table(document, dtype) for dtype in ("fp32", "bf16"))), *counted(document)]
    lines.append(report.where(document))
    for state in (SKIPPED, LEFT, STOPPED, FAILED):
        for name, record in document["parts"].items():
            if record["state"] == state:
                lines.append(f"{state}: {name}: {record.get('reason', '')}")
                lines += [f"    {line}" for line in record.get("tail", [])[-5:] if state in (FAILED, STOPPED)]
    if any(record["state"] == LEFT for record in document["parts"].values()):
        lines.append("the same command goes on with what was left")
    return "\n".join(lines)


def bars(axes, rows):
    """One bar per contender: the backends of an optimizer side by side, fused AdamW as the line at 1."""
    for _, place, runs, name in entries():
        if name in rows:
            shift = {"cuda": -0.2, "triton": 0.2}.get(runs, 0)
            value = rows[name]["ratios"][FUSED]
            bar = axes.barh(place + shift, value, height=0.4, color=COLOURS[runs])
            axes.bar_label(bar, labels=[report.ratio(value)], padding=2, fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)


def plot(document, dtype, path):
    """A PNG with one panel per shapes."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.patches import Patch

    lines, names = found(document, dtype), CORE + REST + RIVALS
    figure = Figure(figsize=(3 + 2.4 * len(lines), 1.5 + 0.33 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
    for axes, (shapes, rows) in zip(panels, lines.items(), strict=True):
        bars(axes, rows)
        axes.set_title(f"{shapes}\n{report.number(rows[FUSED]['median_ms'])} ms", fontsize=8)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    caption = f"{dtype}: time of a step / time of {FUSED}, whose milliseconds stand above (less is better)"
    figure.supxlabel(f"{caption}\n{report.where(document)}", fontsize=8)
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def plots(document, folder):
    """Writes the PNGs; says so where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        yield "skipped: plots: matplotlib is not installed"
        return
    for dtype in ("fp32", "bf16"):
        if found(document, dtype):
            plot(document, dtype, folder / f"ratios-{dtype}.png")
            yield f"{folder.name}/ratios-{dtype}.png"
