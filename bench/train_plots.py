"""One picture per study: what its question is about, and what became of the training."""

import statistics

from . import claims

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # told apart by colour-blind readers, too


def plot(document, path):
    """Writes the PNG of a study's document."""
    rows, draw = document["rows"], PICTURES[document["study"]]
    figure = draw(rows)
    figure.suptitle(document["question"], fontsize=12)
    figure.savefig(path)


def panels_of(down, across, width=4.6, height=3.6):
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(width * across, height * down + 0.6), dpi=100, layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False)


def losses(panel, rows, title):
    """Training loss over steps, mean of the seeds, each at its chosen learning rate."""
    for colour, row in zip(COLOURS, rows, strict=False):
        curves = [run["curve"] for run in row["runs"]]
        shortest = min(len(curve["loss"]) for curve in curves)  # one that diverged is cut off
        points = list(zip(*(curve["loss"][:shortest] for curve in curves), strict=True))
        points = [statistics.mean(point) if None not in point else float("nan") for point in points]
        label = f"{row['optimizer']}, lr {row['lr']:g}"
        panel.plot(curves[0]["steps"][:shortest], points, color=colour, label=label, linewidth=1.6)
    style(panel, f"{title}: training loss", "step", log_y=True)


def style(panel, title, xlabel, log_y=False):
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(xlabel, fontsize=9)
    if log_y:
        panel.set_yscale("log")
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def step_ranges(rows):
    """Per task: the range of step sizes in each layer at the end, its width over training, the loss."""
    settings = list(claims.by_setting(rows))
    figure, panels = panels_of(len(settings), 3)
    for (name, contenders), (bars, spread, curves) in zip(settings, panels, strict=True):
        for k, row in enumerate(contenders.values()):
            _last_ranges(bars, row, k, len(contenders))
            _widths_over_steps(spread, row, COLOURS[k])
        style(bars, f"{name}: step sizes at the end, 1 % – median – 99 %", "", log_y=True)
        style(spread, f"{name}: decades from 1 % to 99 %, mean of the layers", "step")
        losses(curves, contenders.values(), name)
    return figure


def _last_ranges(panel, row, k, count):
    """Of the first seed, its last record."""
    seen = row["runs"][0]["seen"]
    for at, numbers in enumerate(seen.values()):
        low, middle, high = (numbers[name][-1] for name in ("q01", "median", "q99"))
        label = row["optimizer"] if at == 0 else None
        x = at + 0.16 * (k - (count - 1) / 2)
        panel.plot([x, x], [low, high], color=COLOURS[k], linewidth=5, solid_capstyle="butt", label=label, alpha=0.7)
        panel.plot([x], [middle], marker="_", color="black", markersize=9)
    panel.set_xticks(range(len(seen)), [name.removesuffix(".weight") for name in seen], fontsize=8, rotation=15)


def _widths_over_steps(panel, row, colour):
    run = row["runs"][0]
    steps = run["curve"]["steps"][: len(next(iter(run["seen"].values()))["q01"])]
    points = [statistics.mean(values) for values in zip(*claims.decades(run).values(), strict=True)]
    panel.plot(steps, points, color=colour, label=row["optimizer"], linewidth=1.6)


def bounds(rows):
    """By batch size: test accuracy, training loss, and how often the bound was met."""
    figure, panels = panels_of(1, 3, 5.2, 4)
    by_optimizer = {}
    for row in rows:
        by_optimizer.setdefault(row["optimizer"], []).append(row)
    titles = ("test accuracy in % (1,797 has no test split)", "final training loss", "% of layers and steps bounded")
    for panel, title, values in zip(panels[0], titles, (_accuracies, _train_losses, _shares), strict=True):
        for k, (name, found) in enumerate(by_optimizer.items()):
            _by_batch(panel, name, [values(row) for row in found], k)
        batches = [row["setting"].removeprefix("batch ") for row in found]
        panel.set_xticks(range(len(batches)), batches)
        style(panel, title, "batch; lines from the least to the largest of the seeds", log_y=values is _train_losses)
    return figure


def _accuracies(row):
    return [100 * run["test_accuracy"] for run in row["runs"] if run["test_accuracy"] is not None]


def _train_losses(row):
    return [run["train_loss"] for run in row["runs"] if run["train_loss"] is not None]


def _shares(row):
    share = claims.bound(row)[0]
    return [] if share is None else [share]


def _by_batch(panel, name, points, k):
    """The mean of each batch size's values, which stand beside those of other optimizers, not behind them."""
    points = [(at + 0.08 * (k - 2), found) for at, found in enumerate(points) if found]
    means = [statistics.mean(found) for _, found in points]
    spread = [[mean - min(found) for mean, (_, found) in zip(means, points, strict=True)]]
    spread.append([max(found) - mean for mean, (_, found) in zip(means, points, strict=True)])
    at = [place for place, _ in points]
    panel.errorbar(at, means, yerr=spread, color=COLOURS[k], label=name, marker="o", markersize=4, capsize=3)


def predictions(rows):
    """Per task and optimizer: the training loss with and without prediction."""
    settings = list(claims.by_setting(rows))
    bare = list(dict.fromkeys(row["bare"] for row in rows))
    figure, panels = panels_of(len(settings), len(bare))
    for (name, contenders), line in zip(settings, panels, strict=True):
        for text, panel in zip(bare, line, strict=True):
            losses(panel, [row for row in contenders.values() if row["bare"] == text], name)
    return figure


def loss_curves(rows):
    """Per task: the training loss."""
    settings = list(claims.by_setting(rows))
    figure, panels = panels_of(1, len(settings))
    for (name, contenders), panel in zip(settings, panels[0], strict=True):
        losses(panel, contenders.values(), name)
    return figure


def curvature(rows):
    """Per task: loss curves, the final loss over the sweep's learning rates, the step sizes of each layer."""
    settings = list(claims.by_setting(rows))
    figure, panels = panels_of(len(settings), 4)
    for (name, contenders), (curves, sweep, *steps) in zip(settings, panels, strict=True):
        found = list(contenders.values())
        losses(curves, found, name)
        for k, row in enumerate(found):
            _sweep(sweep, row, COLOURS[k])
        style(sweep, f"{name}: final training loss", "learning rate of the sweep", log_y=True)
        for row, panel in zip(found[::2], steps, strict=True):
            _chosen_steps(panel, row)
            style(panel, f"{name}: step sizes of {row['optimizer']}", "step", log_y=True)
    return figure


def _sweep(panel, row, colour):
    """A curve over learning rates; of an optimizer without any, a line across."""
    points = [(point["lr"], point["mean"]["train_loss"]) for point in row["grid"]]
    points = [(lr, loss) for lr, loss in points if loss is not None]
    if len(row["grid"]) == 1:
        for _, loss in points:
            panel.axhline(loss, color=colour, label=row["optimizer"], linestyle="--")
    elif points:
        panel.plot(*zip(*points, strict=True), color=colour, label=row["optimizer"], marker="o", markersize=4)
    panel.set_xscale("log")


def _chosen_steps(panel, row):
    """Of the first seed; matrices in colours from the first to the last, all else in grey."""
    from matplotlib import colormaps

    run = row["runs"][0]
    steps = run["curve"]["steps"]
    weights = [layer for layer in run["seen"] if layer.endswith("weight") and "norm" not in layer]
    for layer, numbers in run["seen"].items():
        sizes = [size if size else float("nan") for size in numbers["step_size"]]  # 0: it did not move
        known = layer in weights
        colour = colormaps["viridis"](weights.index(layer) / max(1, len(weights) - 1)) if known else "#C8C8C8"
        label = layer.removesuffix(".weight") if known else None
        panel.plot(steps[: len(sizes)], sizes, color=colour, label=label, linewidth=1.2, zorder=2 if known else 1)


PICTURES = {
    "set-adam": step_ranges,
    "aida": step_ranges,
    "lambc": bounds,
    "xgrad": predictions,
    "curvature": curvature,
    "precision": loss_curves,
}
