"""Loading and saving: our own layout, which is torch's where the quantities are torch's."""

from collections import OrderedDict
from copy import deepcopy

import torch

from .checks import check_group
from .precision import rest_of, words_of

SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")  # keys they keep in groups
TORCH = ("sgd", "sgd_plain", "adam", "adam_decoupled")  # rules whose state_dicts come from torch.optim, too
KEPT = (*SCHEDULERS, "param_names")


def tagged(state_dict: dict, rules: list[str]) -> dict:
    """Names each group's rule, so that a state_dict cannot be loaded into another optimizer with like-named states."""
    for group, rule in zip(state_dict["param_groups"], rules, strict=True):
        group["rule"] = rule
    return state_dict


def load(optimizer, state_dict: dict) -> None:
    """Checks a whole state_dict, then puts it into the optimizer, or leaves that as it was."""
    state_dict = dict(state_dict)  # hooks may exchange its parts
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state_dict has groups of {sizes[0]} parameters, the optimizer has {sizes[1]}")
    new_groups = [_merged(optimizer, mine, theirs) for mine, theirs in zip(groups, saved, strict=True)]
    entries = {}
    for group, theirs in zip(new_groups, saved, strict=True):
        rule = optimizer.rule_of(group)
        tag = optimizer.tag_of(group)
        check_origin(theirs, tag)
        for p, index in zip(group["params"], theirs["params"], strict=True):
            saved_state = state_dict["state"].get(index, {})
            rest = rest_of(words_of(group["precision"]), p.dtype)
            names = (*optimizer.state_names(rule), *([rest] if rest else []))
            entries[p] = _entries(rule, names, p, saved_state)
    _exchange(optimizer, new_groups, entries)
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def check_origin(group: dict, tag: str) -> None:
    """Raises ValueError unless a saved group is of this rule, or torch.optim's own of the same mathematics."""
    saved = group.get("rule")
    if saved is None and tag in TORCH:
        decoupled = group.get("decoupled_weight_decay", "decoupled" in tag)
        saved = tag if tag.startswith("sgd") else "adam_decoupled" if decoupled else "adam"
    if saved != tag:
        raise ValueError(f"the state_dict is of rule {saved or 'unknown'!r}, this optimizer's is {tag!r}")


def check_precision(mine: dict, theirs: dict) -> None:
    """Raises ValueError unless a saved group kept its numbers as ours does."""
    saved, own = theirs.get("precision"), mine["precision"]
    if words_of(saved) != words_of(own):
        raise ValueError(
            f"the state_dict was saved with precision={saved!r}, this group has {own!r}: give it {saved!r}"
        )


def _merged(optimizer, mine: dict, theirs: dict) -> dict:
    if theirs.get("amsgrad"):
        raise ValueError("the state_dict was saved with amsgrad=True, which has no counterpart here")
    check_precision(mine, theirs)
    kept = {key: value for key, value in theirs.items() if (key in mine or key in KEPT) and key != "params"}
    kept = deepcopy(kept)  # an lr that is a tensor must not be shared with another optimizer
    if isinstance(kept.get("betas"), list):
        kept["betas"] = tuple(kept["betas"])
    group = {**mine, **kept}
    check_group(group, optimizer.positive_eps)
    return group


def _entries(rule, names: tuple, p: torch.Tensor, saved: dict) -> dict:
    """A parameter's entries, copied to its device in the types they were saved in."""
    saved = {name: value for name, value in saved.items() if value is not None}
    if "momentum_buffer" in saved and "step" not in saved:
        saved["step"] = torch.ones(())  # torch's SGD does not count: a buffer means that steps were taken
    if not set(saved) - {"step"}:
        saved.setdefault("step", torch.zeros(()))
        missing = set(rule.states) if float(saved["step"]) else set()
    else:
        missing = set(names) - set(saved)
    foreign = set(saved) - set(names)
    if missing or foreign:
        raise ValueError(
            f"the state_dict is of another optimizer: rule {rule.name!r} keeps {', '.join(names)}, "
            f"the state_dict has {', '.join(sorted(saved)) or 'nothing'}"
        )
    for name in rule.states:
        if name in saved and not torch.is_tensor(saved[name]):
            raise ValueError(f"state {name!r} must be a tensor, got {saved[name]!r}")
        if name in saved and saved[name].shape != p.shape:
            raise ValueError(f"state {name!r} has shape {tuple(saved[name].shape)}, its parameter has {tuple(p.shape)}")
    return {name: torch.as_tensor(value).detach().to(p.device, copy=True) for name, value in saved.items()}


def _exchange(optimizer, groups: list[dict], entries: dict) -> None:
    old_groups = [dict(group) for group in optimizer.param_groups]
    old_state = OrderedDict((p, dict(own)) for p, own in optimizer.state.items())
    try:
        for mine, new in zip(optimizer.param_groups, groups, strict=True):
            mine.update(new)
        optimizer._keep(entries)
        optimizer._tables = []  # what they report is of another state
        optimizer._build()
    except BaseException:
        for mine, old in zip(optimizer.param_groups, old_groups, strict=True):
            mine.clear()
            mine.update(old)
        optimizer._keep(old_state)
        raise
