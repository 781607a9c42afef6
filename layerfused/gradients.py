"""Checks of gradients, shared by the engines."""

import torch


def check_gradient(p: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, if an optimizer can use it.

    Raises:
        ValueError, TypeError: naming what is wrong with it and the remedy.
    """
    g = p.grad
    if g.layout != torch.strided:
        raise ValueError(
            f"gradient with layout {g.layout} is not supported: use sparse=False in the embedding or g.to_dense()"
        )
    if not g.is_floating_point():
        raise TypeError(f"gradient of dtype {g.dtype} is not supported: a real floating-point type is needed")
    if g.device != p.device:
        raise ValueError(f"gradient on {g.device} for a parameter on {p.device}: both must be on one device")
    if g.shape != p.shape:
        raise ValueError(
            f"gradient of shape {tuple(g.shape)} for a parameter of shape {tuple(p.shape)}: run backward again"
        )
    if g.numel() and not g.untyped_storage().nbytes():
        raise ValueError(f"gradient of shape {tuple(g.shape)} has no storage (resized to 0?): run backward again")
    return g
