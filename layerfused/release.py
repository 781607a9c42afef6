"""Steps inside of the backward pass: a parameter's as soon as its gradient is there, which then need not be kept."""

import threading
import weakref

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .plan import Phase
from .reports import names_of


class Release:
    """What `Optimizer.release_gradients()` gives; `remove()` ends it.

    While it lasts every parameter has a launch of its own. The parameters' hooks know of it weakly: they would keep
    each other alive for ever, and an optimizer that is gone steps nothing.
    """

    def __init__(self, optimizer):
        check(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._launches, self._hooks, self._stepped = {}, {}, set()
        self._lock = threading.Lock()  # autograd has a thread for each device, and one look takes in all launches
        self._before = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """From now on gradients are kept, and `step()` steps all of them, as before."""
        self._before.remove()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._released is self:
            optimizer._released = None
            optimizer._build()

    def follow(self) -> None:
        """Takes the launches that the optimizer has built."""
        self._launches = {launch.table.params[0]: launch for launch in self._optimizer()._launches}
        self._hang()

    def _hang(self) -> None:
        step = weakref.WeakMethod(self._hook)
        for p in self._launches:
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(lambda p: step() and step()(p))

    @torch.no_grad()
    def _hook(self, p: torch.Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            with self._lock:
                self._step(optimizer, p)

    def _step(self, optimizer, p: torch.Tensor) -> None:
        """The step of one parameter."""
        if not self._stepped or p in self._stepped:  # the first of a backward pass: look at everything once
            self._stepped.clear()
            check(optimizer)
            optimizer._read()
        if p not in self._launches:  # it was taken out of the groups
            return
        if not self._launches[p].read():
            optimizer._read()
        launch = self._launches[p]
        launch.table.check_rests()
        if launch.run(Phase.STEP & ~Phase.NORM, optimizer._rows(launch), 0.0):
            torch.autograd.graph.increment_version(launch.written())
        launch.table.note_rests()
        p.grad = None
        self._stepped.add(p)

    def _before_step(self, optimizer, args: tuple, options: dict) -> None:
        if options.get("grad_norm") is not None:
            raise ValueError("step(grad_norm=) comes after the gradients are gone: remove() the release first")
        if getattr(optimizer, "found_inf", None) is not None:
            raise ValueError("GradScaler's gradients were stepped with before they were unscaled: train without it")
        back = [p for p in self._stepped if p.grad is not None]
        self._stepped.clear()
        if back:
            name = dict(zip(optimizer._params, names_of(optimizer.param_groups), strict=True)).get(back[0])
            raise RuntimeError(
                f"parameter {name!r} has a gradient again after its step in the backward pass: DistributedDataParallel "
                "reduces gradients later than that, so the ranks have stepped by their own. remove() the release"
            )
        self._hang()  # a parameter may require a gradient by now


def check(optimizer) -> None:
    """Raises ValueError if a parameter cannot be stepped before the others' gradients are there, with the reason."""
    name = type(optimizer).__name__
    if getattr(optimizer, "needs_closure", False):
        raise ValueError(f"{name} cannot release gradients: its step() evaluates the model itself. Use another class")
    if optimizer.defaults["max_grad_norm"]:
        raise ValueError(
            f"{name} cannot release gradients with max_grad_norm={optimizer.defaults['max_grad_norm']}: the norm is "
            "known when all gradients are there. Pass max_grad_norm=None"
        )
    if optimizer.defaults["amp_scaling"]:
        raise ValueError(f"{name} cannot release gradients with amp_scaling=True: GradScaler judges them all together")
    if getattr(optimizer, "_xgrad", lambda: None)() is not None:
        raise ValueError(f"{name} cannot release gradients inside of XGrad, which predicts after a whole step")
    for group in optimizer.param_groups:
        if group["differentiable"]:
            raise ValueError(f"{name} cannot release gradients with differentiable=True, which needs them: use False")
        if group["layer"] == "group" and optimizer.rule_of(group).layerwise and len(group["params"]) > 1:
            raise ValueError(
                f"{name} cannot release gradients with layer='group' over {len(group['params'])} tensors, which step "
                "together: use layer='tensor'"
            )
        for p in group["params"]:
            if is_traceable_wrapper_subclass(p):
                raise ValueError(
                    f"{name} cannot release gradients of {type(p).__name__} parameters: ranks would have to meet at "
                    "each of them, in the order of their own backward passes"
                )
