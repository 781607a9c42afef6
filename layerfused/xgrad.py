"""XGrad: forward and backward at the weights that the optimizer is about to reach."""

import warnings
import weakref
from contextlib import contextmanager

import torch

from .bases import base_of
from .compiled import outside_of_graphs
from .model_hooks import attach
from .reports import names_of


class XGrad(torch.optim.Optimizer):
    """Weight prediction (XGrad, arXiv 2305.18240; 2302.00195) around an optimizer.

    Forward and backward run at `p - steps * lr * delta`, `delta` being the direction of the last step and `lr` the one
    in force. `step()` puts the true weights back, steps, and predicts anew; for the optimizers of this package that is
    the step's own launch, one word more an element. Before the first step nothing is predicted.

    delta [code]: SGD's buffer; Adam's and AdamW's ic1*m / (sqrt(ic2*v) + eps), without the decay. [ours]: of any other
    rule the direction of its own update without the decay (LAMB: with the trust ratio). The authors' code predicts
    nothing after zero_grad(set_to_none=True); here the states count, not the gradients.

    `param_groups`, `state` and `defaults` are the wrapped optimizer's, so that schedulers, GradScaler and hooks may be
    attached to either. What is not found here (`engines`, `layer_stats()`, …) is asked of it.

    The parameters hold predicted weights from the first step on, and true ones after `eval()` until `train()` and
    inside of `with xg.true_weights():`, where they may also be changed. Evaluate, save, average and load there. Writes
    by others while predicted weights are live are an error at the next call, seen by the tensors' version counters and
    addresses; those through `.data` cannot be seen.

    A prediction is refreshed (one launch of four words an element) when lr or a beta has moved since: with `model=`
    before a forward pass in training mode, without it in `zero_grad()` and `train()`. So without `model=` a scheduler
    that steps between `zero_grad()` and the forward pass leaves the old lr's prediction, and after `load_state_dict()`
    one of the two calls is needed.

    With `model=` its `state_dict()` puts the true weights back, and says so once; weights loaded into it are true.

    Args:
        optimizer: one of this package, without `differentiable` and, if SGD, with momentum; or torch.optim's SGD (with
            momentum), Adam or AdamW without amsgrad, for which a step takes a dozen launches more and two copies.
        steps: steps ahead, an int >= 1.
        model: the module whose forward pass is to see fresh predictions: one that is called, so of a LightningModule,
            whose `training_step()` is called instead, the network inside. A copy of it, and an unpickled one, is on
            its own.

    Memory: one copy of the parameters, made at the first step and no part of `state_dict()`.

    Raises:
        ValueError, TypeError: for steps below 1 and for an optimizer that cannot be wrapped.
    """

    def __init__(self, optimizer, steps: int = 1, *, model: torch.nn.Module | None = None):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an int >= 1, got {steps!r}")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__} {model!r}")
        if isinstance(optimizer, XGrad):
            raise TypeError("the optimizer is an XGrad already: wrap the one inside (xg.optimizer) with other steps")
        base = base_of(optimizer)
        other = getattr(optimizer, "_xgrad", lambda: None)()
        if other is not None and other._predicted:
            raise ValueError("the parameters hold predictions of another XGrad: use that one, or call its eval() first")
        super().__setstate__({"optimizer": optimizer, "steps": steps, "_base": base})  # the hooks, no groups of its own
        self._inside, self._predicted, self._warned, self._made_for, self._seen = 0, False, False, None, []
        self.training, self._begun, self._has_model = True, base.has_stepped(), model is not None
        self._follow()
        if model is not None:
            attach(self, model)

    @property
    def _predicted(self) -> bool:
        """Whether the parameters hold predictions."""
        return self._base.lead.live

    @_predicted.setter
    def _predicted(self, live: bool) -> None:
        self._base.lead.live = live

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def __getattr__(self, name: str):
        if name.startswith("_") or name == "optimizer":  # what GradScaler and torch look for is this class's own affair
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"XGrad({self.optimizer!r}, steps={self.steps})"

    # The step

    @outside_of_graphs
    def step(self, closure=None, **options):
        """Takes one step from the true weights, and leaves predicted ones (after `eval()` true ones) behind.

        Args:
            closure: evaluates the model again, at the predicted weights, and returns the loss.
            options: what the wrapped optimizer's step takes beside.

        Returns:
            What `closure` returned, else None.

        Raises:
            RuntimeError: if somebody else has written the parameters; nothing is changed then.
        """
        return self.optimizer.step(closure, **options)

    def _follow(self) -> None:
        """Hangs itself around the wrapped optimizer's steps, whoever calls for them, and around its loading."""
        me = self.optimizer._xgrad = weakref.ref(self)
        weakref.finalize(self, self._base.let_go).atexit = False

        def mine(optimizer):
            return me() if optimizer._xgrad is me else None  # another one may have taken over

        @outside_of_graphs
        def before_step(optimizer, args, options):
            return mine(optimizer) and mine(optimizer)._before_step(args, options)

        @outside_of_graphs
        def after_step(optimizer, *_):
            return mine(optimizer) and mine(optimizer)._after_step()

        self.optimizer.register_step_pre_hook(before_step)
        self.optimizer.register_step_post_hook(after_step)
        self.optimizer.register_load_state_dict_post_hook(lambda o: mine(o) and mine(o)._after_loading())

    def _before_step(self, args: tuple, options: dict) -> tuple:
        optimizer, closure = args[0], args[1] if len(args) > 1 else options.get("closure")  # as torch calls its hooks
        if closure is not None:  # at the predicted weights, which may be gone when the optimizer would call it
            with torch.enable_grad():
                loss = closure()
            args = (optimizer, lambda: loss, *args[2:])
            options = {key: x for key, x in options.items() if key != "closure"}
        self._check()
        self._ahead = self.steps if self._wanted() else 0
        with torch.no_grad():
            self._predicted = self._base.prepare(self._ahead, self._predicted)
        return args, options

    @torch.no_grad()
    def _after_step(self) -> None:
        self._base.complete(self._ahead)
        before, was_predicted, first = self._made_for, self._predicted, not self._begun
        self._predicted, self._begun = self._ahead > 0, True
        self._note()
        same = first or (was_predicted and before == self._made_for and not self._base.shares_layers())
        if not same and not self._base.reached_all():
            self._made_for = None  # who was left out holds true weights, or a prediction made for other numbers

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; without `model=` it also refreshes predictions whose lr has moved.

        Raises:
            RuntimeError: if somebody else has written the parameters.
        """
        self.optimizer.zero_grad(set_to_none=set_to_none)
        if not self._has_model:
            self._refresh()

    def add_param_group(self, group: dict) -> None:
        """Adds a group to the wrapped optimizer. Its parameters hold true weights until their first step.

        Raises:
            ValueError, TypeError: as the wrapped optimizer does, and for a group that cannot be predicted.
        """
        self._check()
        self._base.add_param_group(group)

    # Which weights are in the parameters

    def eval(self) -> None:
        """Puts the true weights into the parameters, until `train()`."""
        self._restore()
        self.training = False

    def train(self, mode: bool = True) -> None:
        """Puts predicted weights into the parameters (after `eval()`), and refreshes them; train(False) is eval()."""
        if not mode:
            return self.eval()
        self.training = True
        self._refresh()

    @contextmanager
    def true_weights(self):
        """True weights in the parameters for a block, in which they may be changed."""
        self._restore()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._refresh()

    def accept(self) -> None:
        """Takes what the parameters hold for the true weights, whoever wrote it."""
        self._predicted = False

    def _wanted(self) -> bool:
        return self.training and not self._inside

    @torch.no_grad()
    def _refresh(self) -> None:
        """Predicts, if predictions are wanted and not there, or made for other hyper-parameters."""
        if not self._wanted() or not self._begun or (self._predicted and self._made_for == self._in_force()):
            return
        self._check()
        self._base.predict(self.steps, self._predicted)
        self._predicted = True
        self._note()

    @torch.no_grad()
    def _restore(self) -> None:
        if self._predicted:
            self._check()
            self._base.restore()
            self._predicted = False

    def _in_force(self) -> list:
        """What predictions are made for; a tensor counts as another one when it was written."""
        rows = ([group.get(key) for key in self._base.keys(group)] for group in self.param_groups)
        rows = [[(id(x), x._version) if isinstance(x, torch.Tensor) else x for x in row] for row in rows]
        return [self.steps, *rows]

    def _note(self) -> None:
        self._made_for = self._in_force()
        self._seen = [(p, p._version, p.data_ptr()) for p in self._base.params()]

    def _check(self) -> None:
        """Raises RuntimeError if the parameters are not as they were left with predicted weights in them."""
        if not self._predicted:
            return
        for number, (p, version, address) in enumerate(self._seen):
            if p._version != version or p.data_ptr() != address:
                raise RuntimeError(
                    f"parameter {names_of(self.param_groups)[number]!r} of shape {tuple(p.shape)} was changed while it "
                    "held predicted weights: change weights inside of `with xg.true_weights():` (or after xg.eval()). "
                    "To go on from what the parameters hold now, call xg.accept()"
                )

    def _put_back(self) -> None:
        """Puts the true weights back for the model's own state_dict()."""
        if not self._predicted:
            return
        self._restore()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the model held predicted weights when its state_dict() was taken: the true weights were put back, and "
                "the next training forward pass predicts again. `with xg.true_weights():` around it says the same "
                "without this warning",
                stacklevel=4,
            )

    # Saving and loading

    def state_dict(self) -> dict:
        """The wrapped optimizer's state_dict, with what predictions need beside under "xgrad"."""
        return {**self.optimizer.state_dict(), "xgrad": {"steps": self.steps, **self._base.kept()}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what `state_dict()` gave, or the wrapped optimizer's own. The parameters hold true weights then.

        Raises:
            ValueError: as the wrapped optimizer does; everything is then as it was.
        """
        own = dict(state_dict.get("xgrad", {}))
        was_predicted = self._predicted
        self._restore()
        try:
            self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "xgrad"})
        except BaseException:
            if was_predicted:
                self._refresh()
            raise
        self.steps = own.pop("steps", self.steps)
        self._base.keep(own)

    def _after_loading(self) -> None:
        self._begun, self._made_for = self._base.has_stepped(), None

    def register_state_dict_pre_hook(self, hook, prepend=False):
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook, prepend=False):
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook, prepend=False):
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook, prepend=False):
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict:
        own = {key: self.__dict__[key] for key in ("optimizer", "steps", "training", "_begun")}
        return {**own, "kept": self._base.kept(), "copies": self._base.lead.copies if self._predicted else {}}

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        kept, copies = state.pop("kept"), state.pop("copies")
        base = base_of(state["optimizer"])
        super().__setstate__({**state, "_base": base})
        base.lead.copies.update(copies)
        base.lead.live = bool(copies)
        base.keep(kept)
        self._inside, self._warned, self._has_model = 0, False, False
        self._note()
        self._made_for = None
        self._follow()
