"""Products of the Hessian with a direction, by a second evaluation of the model or through the graph of the first."""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from .reference_engine import gather, scatter


def checked_closures(closure) -> list[Callable]:
    closures = [closure] if callable(closure) else list(closure) if isinstance(closure, (list, tuple)) else []
    if not closures or not all(map(callable, closures)):
        raise TypeError(
            f"step() needs a closure that returns the loss, or a sequence of them, got {closure!r}: "
            "opt.step(lambda: loss_of(model(x), y))"
        )
    return closures


def check_left_over(params: list, left: dict) -> None:
    """Raises ValueError if there are gradients that the last step has not left: of them no curvature is known."""
    for p in params:
        g, (mine, version) = p.grad, left.get(p, (None, 0))
        if g is None or (g is mine and g._version == version):
            continue
        if bool(g.count_nonzero()):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has a gradient already, whose curvature cannot be found: call "
                "zero_grad() before step(closure), and pass micro-batches as a sequence of closures"
            )


def keep_part(parts: dict, gradients: dict, spans: list) -> None:
    """Copies one layer's part of the gradients; `spans` are pairs of a parameter and the stretch of it."""
    for p, span in spans:
        if gradients[p] is not None:
            if p not in parts:
                parts[p] = torch.zeros_like(p, requires_grad=False)
            scatter([span], gather([span], [gradients[p]], p.dtype), [parts[p]])


@contextmanager
def kept_buffers():
    """Leaves the buffers of every module that is called inside as they were, whoever's it is."""
    kept, seen = [], set()

    def keep(module, _):
        for each in module.modules() if module not in seen else ():
            if each not in seen:
                seen.add(each)
                kept.extend((each, name, b, b.detach().clone()) for name, b in each._buffers.items() if b is not None)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer.copy_(value)  # a module may also have put another one in its place


class Randomness:
    """The states of the random number generators that a model on these devices draws from."""

    def __init__(self, devices: set):
        self._modules = [(torch.get_device_module(d), d) for d in devices if d.type != "cpu"]
        self._states = [torch.get_rng_state(), *(module.get_rng_state(d) for module, d in self._modules)]

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        for (module, device), state in zip(self._modules, self._states[1:], strict=True):
            module.set_rng_state(state, device)


class Product:
    """The first evaluation of the model, and what it takes to undo the second.

    Attributes:
        base: how much of the first gradient is in what `along` gives: 1 for a second gradient, 0 for a product.
        moves: whether the parameters are moved for it.
    """

    base, moves = 1.0, True

    def __init__(self, params: list, closures: list):
        self._params, self._own_params, self._closures = params, set(params), closures
        self._before = [p.grad for p in params]

    def first(self) -> torch.Tensor:
        """The loss; its gradients are in `p.grad`. If that fails they are what they were."""
        self._clear()
        self._random = Randomness({p.device for p in self._params})
        try:
            loss = self._evaluate()
        except BaseException:
            self._put(self._before)
            raise
        self._after = Randomness({p.device for p in self._params})
        self._gradients = [self._own(p.grad) for p in self._params]
        return loss

    def put_back(self) -> None:
        """Leaves the first gradients."""
        self._put(self._gradients)

    def _put(self, gradients: list) -> None:
        for p, g in zip(self._params, gradients, strict=True):
            p.grad = g

    def _clear(self) -> None:
        self._put([None] * len(self._params))

    @staticmethod
    def _own(g: torch.Tensor | None) -> torch.Tensor | None:
        """A gradient that the next backward() does not write over: DDP's may be views of its buckets."""
        dense = g is not None and g.layout == torch.strided
        shared = dense and g.untyped_storage().nbytes() > g.nbytes
        return g.clone() if shared else g

    def _look(self) -> list:
        return [(id(p.grad), 0 if p.grad is None else p.grad._version) for p in self._params]

    def _loss_of(self, closure: Callable) -> torch.Tensor:
        before = self._look()
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"the closure must return the loss as a tensor, got {loss!r}")
        if loss.numel() != 1:
            raise ValueError(f"the closure must return one number, got a tensor of shape {tuple(loss.shape)}")
        if self._look() != before:
            raise ValueError("the closure called backward(): it must only return the loss, step() calls it")
        if not loss.requires_grad:
            raise ValueError("the closure's loss has no graph: compute it with grad enabled, and do not detach it")
        return loss


class FiniteDifference(Product):
    """Two ordinary gradients, the second a little further along: under DDP too, and for any kernel."""

    def _evaluate(self, again: bool = False) -> torch.Tensor:
        total = 0
        for closure in self._closures:
            loss = self._loss_of(closure)
            # not backward(inputs=...): DDP waits for the gradients of all parameters, whoever's they are
            others = [p for p in leaves(loss) if p not in self._own_params] if again else []
            kept = [self._own(p.grad) for p in others]
            for p in others:
                p.grad = None
            try:
                loss.backward()
            finally:
                for p, g in zip(others, kept, strict=True):
                    p.grad = g
            total = total + loss.detach().reshape(())
        return total

    @contextmanager
    def along(self, optimizer, launches: list):
        def gradients_at() -> list:
            optimizer.predict_along(launches, None)
            self._clear()
            self._random.restore()
            torch.clear_autocast_cache()  # it holds the weights of the first evaluation
            try:
                with kept_buffers():
                    self._evaluate(again=True)
            finally:
                torch.clear_autocast_cache()
                self._after.restore()
            gradients = [p.grad for p in self._params]
            self.put_back()
            return gradients

        yield gradients_at


def in_group() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class DoubleBackward(Product):
    """The gradient of the gradient: exact, for models whose kernels have a second derivative, on one process."""

    base, moves = 0.0, False

    def __init__(self, params: list, closures: list):
        super().__init__(params, closures)
        if in_group():
            raise RuntimeError(
                "product='double-backward' leaves gradients unreduced in a process group: "
                "use product='finite-difference'"
            )

    def _evaluate(self) -> torch.Tensor:
        self._wanted = [p for p in self._params if p.requires_grad]
        with torch.enable_grad():
            loss = sum(self._loss_of(closure).reshape(()) for closure in self._closures)
            graph = torch.autograd.grad(loss, self._wanted, create_graph=True, allow_unused=True)
        check_twice([g for g in graph if g is not None and g.requires_grad])
        self._graph = dict(zip(self._wanted, graph, strict=True))
        for p, g in self._graph.items():
            p.grad = None if g is None else g.detach()
        return loss.detach()

    @contextmanager
    def along(self, optimizer, launches: list):
        found = {p: g for p, g in self._graph.items() if g is not None}

        def gradients_at() -> list:
            ways = [torch.zeros_like(p, requires_grad=False) for p in self._params]
            optimizer.predict_along(launches, ways)
            way_of = dict(zip(self._params, ways, strict=True))
            curved = [p for p, g in found.items() if g.requires_grad]
            products = self._differentiate([found[p] for p in curved], list(found), [way_of[p] for p in curved])
            given = dict(zip(found, products, strict=True))
            zeros = (torch.zeros_like(p, requires_grad=False) for p in found)
            given = {p: zero if given[p] is None else given[p] for p, zero in zip(found, zeros, strict=True)}
            return [given.get(p) for p in self._params]

        try:
            yield gradients_at
        finally:
            for launch in launches:
                launch.lead(None, 0.0)

    @staticmethod
    def _differentiate(gradients: list, params: list, ways: list) -> tuple:
        if not gradients:  # the loss is linear
            return (None,) * len(params)
        try:
            return torch.autograd.grad(gradients, params, ways, allow_unused=True, retain_graph=True)
        except (RuntimeError, NotImplementedError) as error:
            if "derivative" not in str(error) and "differentiable" not in str(error):
                raise
            raise RuntimeError(NO_SECOND.format(error)) from error


ENDS = ("torch::autograd::Error", "torch::autograd::NotImplemented", "torch::autograd::DelayedError")
NO_SECOND = "a function of the model has no second derivative ({}): use product='finite-difference'"


def check_twice(gradients: list) -> None:
    """Raises RuntimeError if the graph of gradients ends in a function that autograd would pass over in silence."""
    for node in nodes_behind(gradients):
        if node.name() in ENDS:
            raise RuntimeError(NO_SECOND.format(node.name()))


def nodes_behind(tensors: list) -> set:
    """All nodes of the graph that tensors were made by."""
    waiting, seen = [x.grad_fn for x in tensors], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return seen


def leaves(loss: torch.Tensor) -> set:
    """The tensors that a backward pass gives gradients."""
    return {node.variable for node in nodes_behind([loss]) if hasattr(node, "variable")}
