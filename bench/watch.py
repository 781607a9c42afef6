"""What can be seen of an optimizer during a training, layer by layer: of each a few numbers."""

import torch

import layerfused as lf


def _adam(group, state, stats, ic2):
    return (ic2 * state["exp_avg_sq"]).sqrt() + group["eps"]


def _adabelief(group, state, stats, ic2):
    return (ic2 * state["exp_avg_var"]).sqrt() + group["eps"]


def _aida(group, state, stats, ic2):
    return (ic2 * state["exp_avg_var"]).sqrt()


def _setadam(group, state, stats, ic2):
    w = (ic2 * stats["cos"] ** 2 * state["exp_avg_sq"] + group["eps"]).sqrt()
    return w - group["tau"] * stats["minimum"]


DENOMINATORS = {lf.Adam: _adam, lf.AdaBelief: _adabelief, lf.Aida: _aida, lf.SETAdam: _setadam}


def named(opt):
    """Name, group and tensor of each parameter."""
    return [(n, g, p) for g in opt.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]


def step_sizes(opt):
    """By what the last step multiplied lr and the bias corrected average of each layer's gradients."""
    denominator, stats, found = DENOMINATORS[type(opt)], opt.layer_stats(), {}
    for name, group, p in named(opt):
        state = opt.state[p]
        ic2 = 1 / (1 - group["betas"][1] ** int(state["step"]))
        found[name] = 1 / denominator(group, state, stats.get(name), ic2)
    return found


def ranges(opt):
    """How the step sizes of the elements of each matrix are spread; the 8 to 32 elements of a vector have no 1 %."""
    found = {}
    for name, sizes in step_sizes(opt).items():
        if sizes.ndim < 2:
            continue
        low, middle, high = sizes.flatten().quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        found[name] = {"q01": low, "median": middle, "q99": high, "mean": sizes.mean().item()}
        found[name]["std"] = sizes.std(correction=0).item()
    return found


def trust_ratios(opt):
    """The ratio of norms of each adapted layer, and what the bounds left of it."""
    found, stats = {}, opt.layer_stats()
    for name in (name for name, group, _ in named(opt) if group["adapt"]):
        seen = stats[name]
        p, u = seen["param_norm"], seen["update_norm"]
        found[name] = {"unbounded": p / u if p > 0 and u > 0 else 1.0, "used": seen["trust_ratio"]}
    return found


def chosen_steps(opt):
    """The step size that a curvature optimizer found for each layer; nothing of the others."""
    stats = getattr(opt, "layer_stats", dict)()
    return {name: {"step_size": seen["step_size"]} for name, seen in stats.items()}
