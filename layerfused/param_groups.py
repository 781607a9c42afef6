"""Parameter groups as large-batch recipes want them."""

from collections.abc import Sequence

from torch import nn


def param_groups(model: nn.Module, weight_decay: float = 0.01, *, skip: Sequence[str] = ()) -> list[dict]:
    """Splits a model's trainable parameters into matrices and the rest.

    Args:
        model: any module. Frozen parameters are left out, tied ones taken once.
        weight_decay: decay of the first group, >= 0.
        skip: parts of names; parameters whose name contains one of them join the second group.

    Returns:
        Two groups for any optimizer of this package, with named parameters: matrices (two dimensions and more) with
        `weight_decay`, and biases, norms and scalars with weight_decay 0 and `adapt=None`, which is False for the
        rules that allow it and True for those that are nothing without their layer-wise factor (NovoGrad, LAdam,
        LAdaBelief). A group may be empty.

    Raises:
        ValueError: if the model has no trainable parameter.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():  # torch itself names a tied parameter once
        if p.requires_grad:
            small = p.ndim < 2 or any(part in name for part in skip)
            (rest if small else matrices).append((name, p))
    if not matrices and not rest:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "adapt": None},
    ]
    return [group if group["params"] else {**group, "param_names": []} for group in groups]  # torch: all named or none
