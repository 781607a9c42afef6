"""What the rows of a study say to its question: sentences with their numbers, and whether they hold."""

import math
import statistics


def claim(text, holds):
    return {"claim": text, "holds": holds}


def by_setting(rows):
    """Rows of each setting by optimizer."""
    found = {}
    for row in rows:
        found.setdefault(row["setting"], {})[row["optimizer"]] = row
    return found.items()


def held_out(row):
    """The result on the test split as text, and as a number that is better if larger.

    It is the accuracy or the loss, whichever the learning rate was chosen by on the validation split.
    """
    mean, std = row["mean"], row["std"]
    if row["criterion"] == "accuracy" and mean["test_accuracy"] is not None:
        return shown(mean["test_accuracy"], std["test_accuracy"], 100, " %"), mean["test_accuracy"]
    if row["criterion"] == "loss" and mean["test_loss"] is not None:
        return "loss " + shown(mean["test_loss"], std["test_loss"]), -mean["test_loss"]
    return "–", -math.inf


def shown(mean, std, factor=1, unit=""):
    """Mean ± standard deviation over the seeds; a dash where a training diverged or nothing is held out."""
    if mean is None:
        return "–"
    digits = 2 if factor == 100 else max(0, 3 - math.floor(math.log10(mean))) if mean > 0 else 3
    return f"{factor * mean:.{digits}f}{unit}" + (f" ± {factor * std:.{digits}f}" if std is not None else "")


def decades(run):
    """Per layer, from the 1st to the 99th percentile of the step sizes, at each recorded step of a training."""
    found = {}
    for layer, seen in run["seen"].items():
        pairs = zip(seen["q01"], seen["q99"], strict=True)
        found[layer] = [math.log10(high / low) if low and high else math.nan for low, high in pairs]
    return found


def deviations(run):
    """Per layer, the standard deviation of the step sizes over their mean."""
    found = {}
    for layer, seen in run["seen"].items():
        pairs = zip(seen["std"], seen["mean"], strict=True)
        found[layer] = [std / mean if std is not None and mean else math.nan for std, mean in pairs]
    return found


def per_layer(measure, row):
    """Mean over training and seeds of `decades` or `deviations`; of no layer where a training diverged at once."""
    found = {}
    for run in row["runs"]:
        for layer, values in measure(run).items():
            found.setdefault(layer, []).extend(values)
    return {layer: statistics.mean(values) for layer, values in found.items()}


def mean_of_layers(measure, row):
    values = per_layer(measure, row).values()
    return statistics.mean(values) if values else None


def answers(rows, compare):
    """The claims of all rows that have rivals, in each setting."""
    found = []
    for setting, contenders in by_setting(rows):
        for row in contenders.values():
            for rival in row["rivals"]:
                found += compare(setting, row, contenders[rival])
    return found


def narrower(setting, ours, other):
    """In every layer, fewer decades of step sizes; and the test split."""
    a, b = per_layer(decades, ours), per_layer(decades, other)
    fewer = sum(layer in b and a[layer] < b[layer] for layer in a)
    names = f"{setting}: {ours['optimizer']}'s step sizes span fewer decades than {other['optimizer']}'s"
    means = " against ".join(number(mean_of_layers(decades, row)) for row in (ours, other))
    found = claim(f"{names}: {means}, in {fewer} of {len(a)} layers", fewer == len(a) > 0)
    return [found, *better(setting, ours, other)]


def better(setting, ours, other):
    """At least as good on the test split, where there is one."""
    (a, ours_is), (b, other_is) = held_out(ours), held_out(other)
    if ours["criterion"] == "training":
        return []
    text = f"{setting}: {ours['optimizer']} is at least as good on the test split as {other['optimizer']}: "
    same = ", number for number" if ours["mean"]["test_loss"] == other["mean"]["test_loss"] is not None else ""
    return [claim(f"{text}{a} against {b}{same}", ours_is >= other_is and ours_is > -math.inf)]


def as_float32(setting, ours, other):
    """From every seed, the final training loss is within 2 % of that of float32 weights, and less than that of others.

    `other` is trained on float32 weights where its name says "master". Seeds are compared one by one, because networks
    that begin elsewhere differ more than that.
    """
    near = "master" in other["optimizer"]
    pairs = [(a["train_loss"], b["train_loss"]) for a, b in zip(ours["runs"], other["runs"], strict=True)]
    known = None not in (ours["mean"]["train_loss"], other["mean"]["train_loss"])
    ratios = [a / b for a, b in pairs] if known else []
    holds = known and all(abs(ratio - 1) <= 0.02 if near else ratio < 1 for ratio in ratios)
    text = f"{setting}: {ours['optimizer']}'s final training loss is from every seed "
    text += f"{'within 2 % of' if near else 'less than'} {other['optimizer']}'s: "
    return [claim(text + (f"× {min(ratios):.3f} to × {max(ratios):.3f}" if known else "one diverged"), holds)]


def bound(row):
    """Percent of layers and recorded steps in which the bound was less than the ratio of norms; the largest ratio."""
    pairs = [
        (unbounded, used)
        for run in row["runs"]
        for seen in run["seen"].values()
        for unbounded, used in zip(seen["unbounded"], seen["used"], strict=True)
        if unbounded is not None and used is not None
    ]
    cut = [used < unbounded * (1 - 1e-4) for unbounded, used in pairs]
    return 100 * statistics.mean(cut) if cut else None, max((unbounded for unbounded, _ in pairs), default=None)


def tuned(setting, ours, other):
    """The bounds are those of the claim under test: a loss of 1.10 times the best, accuracy within one point."""
    a, b = ours["mean"], other["mean"]
    ratio = None if a["train_loss"] is None or not b["train_loss"] else a["train_loss"] / b["train_loss"]
    text = f"{setting}: {ours['optimizer']}'s final training loss is at most 1.10 × that of "
    text += f"{other['optimizer']} at its best lr, {other['lr']:g}: × {number(ratio)}"
    found = [claim(text, ratio is not None and ratio <= 1.1)]
    a, b = a["test_accuracy"], b["test_accuracy"]
    if a is not None and b is not None:
        text = f"{setting}: {ours['optimizer']}'s test accuracy is at most one point less than "
        found.append(claim(f"{text}{other['optimizer']}'s: {100 * (a - b):+.2f} points", a >= b - 0.01))
    return found


def number(value):
    return "–" if value is None else f"{value:.3g}"
