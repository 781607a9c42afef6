"""The demo's two pictures: test accuracy of every optimizer, trust ratios of every layer."""

from matplotlib import ticker
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure  # no pyplot: no display, no global state

# 21 curves in one frame cannot be told apart: one panel per family, all other curves in grey behind it
FAMILIES = {
    "momentum": ("torch.SGD:foreach", "torch.SGD:fused", "SGD", "LARS"),
    "Adam": ("torch.Adam:foreach", "torch.Adam:fused", "Adam"),
    "AdamW": ("torch.AdamW:foreach", "torch.AdamW:fused", "AdamW"),
    "trust ratio or norm of the layer": ("LAMB", "LAMBC", "NovoGrad"),
    "belief and direction": ("AdaBelief", "AdaM3", "Aida", "SETAdam"),
    "stepsize or gradient norm": ("LAdam", "LAdaBelief", "AdamNorm", "AdaBeliefNorm"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by colour-blind readers, too
# where two curves are one and the same, as torch's and ours should be, the three lie visibly on top of each other
TORCH = {"foreach": {"color": "#F0C808", "linewidth": 6}, "fused": {"color": "#000000", "linewidth": 3}}
TICKS = (0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def accuracy(result, path):
    """Test accuracy over steps, one panel per family; the scale is logit, which shows 97 % apart from 98 %."""
    rows = result["optimizers"]
    families = {title: [n for n in names if n in rows] for title, names in FAMILIES.items()}
    families = {title: names for title, names in families.items() if names}
    across = min(3, len(families))
    down = -(-len(families) // across)
    figure = Figure(figsize=(0.6 + 4.4 * across, 1 + 3.4 * down), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    ceiling = 1 - 0.5 / result["images"]["test"]  # logit(1) is infinite: half an image stands for no error
    for panel, (title, names) in zip(panels.flat, families.items(), strict=False):
        _family(panel, rows, names, ceiling)
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for panel in panels.flat[len(families) :]:
        panel.set_visible(False)
    best = min(ceiling, max(max(row["curve"]["accuracy"], default=0) for row in rows.values()))
    panels[0, 0].set_ylim(0.08, max(0.99, 1 - (1 - best) / 1.5))  # shared by all
    figure.suptitle(f"Test accuracy on the digits, batch {result['batch']}, lr picked on the validation split")
    figure.supxlabel("step", fontsize=10)
    figure.savefig(path)


def _family(panel, rows, names, ceiling):
    ours = iter(COLOURS)
    for name, row in rows.items():
        if name not in names:
            _curve(panel, row, ceiling, color="#D8D8D8", linewidth=0.8, zorder=1)
    for name in names:
        style = TORCH.get(name.partition(":")[2]) or {"color": next(ours), "linewidth": 1.6}
        _curve(panel, rows[name], ceiling, label=f"{name}  {rows[name]['accuracy']:.1%}", zorder=2, **style)
    panel.set_yscale("logit")
    panel.set_yticks(TICKS)
    panel.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", fontsize=8.5, framealpha=0.95)


def _curve(panel, row, ceiling, **style):
    points = row["curve"]
    panel.plot(points["steps"], [min(max(a, 1 - ceiling), ceiling) for a in points["accuracy"]], **style)


def trust_ratios(ratios, path, name):
    """Trust ratio of every layer over steps as a heat map with a logarithmic scale of colours."""
    layers = list(ratios)
    values = [[float("nan") if v is None else v for v in ratios[layer]] for layer in layers]
    positive = [v for row in values for v in row if v > 0]
    scale = LogNorm(min(positive), max(positive)) if positive else None
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(layers)), dpi=110, layout="constrained")
    panel = figure.subplots()
    steps = len(values[0])
    extent = (0.5, steps + 0.5, len(layers) - 0.5, -0.5)
    image = panel.imshow(values, aspect="auto", interpolation="nearest", norm=scale, cmap="viridis", extent=extent)
    panel.set_yticks(range(len(layers)), layers)
    panel.set_xlabel("step")
    panel.set_title(f"{name}: trust ratio of each layer, from the first layer down to the last", fontsize=11)
    bar = figure.colorbar(image, ax=panel, label="trust ratio")
    bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    figure.savefig(path)
