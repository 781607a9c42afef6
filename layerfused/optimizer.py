"""The base of every optimizer here: a torch.optim.Optimizer whose step is one launch per device and variant."""

from operator import itemgetter

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import compiled, state_dicts
from ._cpu import same
from .backends import launch_of
from .build import exchanges, find_parts, members
from .checks import RANGES, check_group, check_range
from .parts import is_spread
from .plan import Phase
from .release import Release, check
from .reports import by_name
from .rows import Rows
from .rule import Rule
from .scaling import scaling_of
from .step import Step
from .table import Table, check_overlap
from .traffic import traffic

# What the tables depend on.
STRUCTURE = ("adapt", "layer", "backend", "differentiable", "foreach", "fused", "precision", "seed")


class Optimizer(torch.optim.Optimizer):
    """An optimizer given by its `Rule`; subclasses name the rule and its defaults.

    Args:
        params: parameters, named parameters, or groups of either. A group may set every hyper-parameter for itself,
            and two keys that say what a layer is:
            `adapt` (bool, default True): False leaves the layer-wise factor out (None: where the rule allows it);
            `layer` (default "tensor"): each tensor is a layer; "slices": each index of dimension 0 is one (stacked
            experts); an int: that many equal blocks of dimension 0; a tuple: blocks of so many rows (fused QKV);
            "group": all tensors of the group are one layer, and they count steps together [ours].
        defaults: the rule's own hyper-parameters.
        maximize: ascend instead of descend.
        differentiable: let autograd see the step (reference engine).
        max_grad_norm: clip the gradients of all groups together to this norm, > 0; None: no clipping. A norm that is
            not finite turns the step into one that changes nothing and is counted in `skipped_steps`.
        amp_scaling: let torch.amp.GradScaler's scale and its verdict on the gradients into the step, instead of a pass
            over them before and a wait for the host after; a step with a gradient that is not finite changes nothing,
            counts in `skipped_steps` and not in `step`.
        norm_group: the process group over which that norm is summed, where each rank holds parameters of its own
            (ZeRO-1, pipeline stages); all of its ranks step together, those without parameters too. Not saved. Without
            it each rank clips by the norm of what it holds (DTensors always count whole).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; `engines` tells what serves.
        foreach, fused: taken for tools that pass them; fused=False or foreach=True choose the reference.
        capturable: taken for tools that pass it, and changes nothing: steps of the CUDA and Triton engines can be
            captured in a CUDA graph with either value. A number that is a tensor on the device is read there by every
            replay, so fill it, and do not exchange it; a plain one stays what it was in the capture.
        precision: how 16-bit parameters keep what their type cannot hold, a word or None (rounded to nearest; states in
            float32), and a group's key: "master" (steps are taken on float32 weights, `state["master"]`, of which the
            parameter is the rounded copy), "remainder" (bfloat16: the same numbers as "master", of which
            `state["remainder"]` has the lower 16 bits, int16; gloo and NCCL do not gather that type, so save sharded
            states as they lie, without `full_state_dict`), "kahan" (`state["compensation"]` is what rounding left over,
            in the parameter's type), "stochastic" (up or down at random, unbiased; nothing is kept). "bf16-states",
            alone or in a pair with one of them, makes elementwise states bfloat16, the second rounded stochastically.
            What is kept follows a parameter that somebody else has written, but for writes through `.data`.
        seed: what random rounding is drawn by, beside parameter, element and step; in [0, 2**53), and a group's key.

    Raises:
        ValueError, TypeError: for a hyper-parameter out of range, parameters that overlap in memory or occur twice,
            and a backend that cannot serve.

    A rule of one's own is a subclass that sets `rule` and passes its defaults, as the optimizers of this package do.
    """

    rule: Rule
    takes_precision = True
    positive_eps = False  # True where eps stands inside of the root alone: eps=0 would divide by zero
    spreads = True  # whether parameters may be DTensors
    _warned = False
    _released: Release | None = None  # while gradients are released every parameter has a launch of its own

    def __init__(
        self,
        params,
        defaults: dict,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str = "auto",
        max_grad_norm: float | None = None,
        norm_group=None,
        amp_scaling: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        precision: str | tuple[str, ...] | None = None,
        seed: int = 0,
    ):
        common = dict(maximize=maximize, differentiable=differentiable, backend=backend, adapt=True, layer="tensor")
        common |= dict(foreach=foreach, fused=fused, capturable=capturable, precision=precision, seed=seed)
        check_group({**defaults, **common}, self.positive_eps)
        if max_grad_norm is not None:
            check_range("max_grad_norm", max_grad_norm, *RANGES["max_grad_norm"])
        if norm_group is not None and max_grad_norm is None:
            raise ValueError("norm_group needs max_grad_norm: there is no norm to sum")
        self._launches, self._tables, self._lead, self._number = None, [], None, compiled.number_of(self)
        self.norm_group = norm_group
        super().__init__(params, {**defaults, **common})
        self.defaults |= {"max_grad_norm": max_grad_norm, "amp_scaling": amp_scaling}
        self._build(agree=True)

    _step_supports_amp_scaling = property(lambda self: self.defaults["amp_scaling"])  # what GradScaler looks for

    # Groups and states

    def rule_of(self, group: dict) -> Rule:
        """The rule that serves a group: options that change what is stored choose between variants."""
        return self.rule

    def state_names(self, rule: Rule) -> tuple[str, ...]:
        """The keys of the `state` of a parameter that a rule serves."""
        return rule.entries

    def tag_of(self, group: dict) -> str:
        """What a group's states mean: belief in the gradient gives states of the same names another meaning."""
        constants = (name for name in ("belief", "decoupled") if getattr(self, name, False))
        return "_".join((self.rule_of(group).name, *constants))

    def add_param_group(self, group: dict) -> None:
        """Adds a group of parameters, with its own hyper-parameters where the group sets them.

        Raises:
            ValueError, TypeError: as the constructor does; the optimizer is then as it was.
        """
        for key in ("max_grad_norm", "norm_group", "amp_scaling") if isinstance(group, dict) else ():
            if key in group:  # ZeroRedundancyOptimizer puts all that it is given into groups, and those into its state
                raise ValueError(
                    f"{key} is the whole optimizer's: pass it to the constructor, not to a group (of "
                    f"ZeroRedundancyOptimizer: functools.partial({type(self).__name__}, {key}=...))"
                )
        before, built = len(self.param_groups), self._launches is not None
        super().add_param_group(group)
        try:
            self._check_group(self.param_groups[-1])
            if built:
                self._build(agree=True)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _check_group(self, group: dict) -> None:
        group.pop("max_grad_norm", None), group.pop("amp_scaling", None)
        check_group(group, self.positive_eps)
        rule = self.rule_of(group)
        if group["adapt"] is None:
            group["adapt"] = rule.needs_adapt
        if len({id(p) for p in group["params"]}) < len(group["params"]):
            raise ValueError("a parameter occurs twice in a group: pass each parameter once")
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(
                    f"parameter of dtype {p.dtype} and shape {tuple(p.shape)}: a real floating-point type is needed"
                )
            if is_traceable_wrapper_subclass(p) and not (is_spread(p) and self.spreads):
                raise TypeError(f"{type(self).__name__} does not take parameters that are a {type(p).__name__}")
            if p.layout != torch.strided:
                raise ValueError(f"parameter with layout {p.layout} is not supported: use a dense one")

    def _build(self, agree: bool = False) -> None:
        """Makes tables and launches, the states that are missing, and drops those of parameters that left.

        Everything is checked before `state` is touched.

        Args:
            agree: compare with the other ranks what they hold; only where all of them come at once.
        """
        self._launches, self._rows_of, self._groups = None, {}, list(self.param_groups)
        if self._released:
            check(self)
        reports = self._reports()
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._parts = parts = find_parts(self, agree)
        self._spreads = bool(parts.of)
        check_overlap([parts.here(p) for p in self._params])
        entries = {p: dict(self.state.get(p, {})) for p in self._params}
        taken = parts.taken(entries)
        tables = []
        for (engine, _, rule, _, share, _), lists in members(self, taken).items():
            groups = [self.param_groups[number] for number in lists]
            table = Table(rule, groups, list(lists.values()), parts)
            table.adopt(taken)
            table.recall({parts.here(p): report for p, report in reports.items() if p in entries})
            tables.append((engine, share, table))
        parts.put(taken, entries)
        self._keep(entries)
        parts.watch(self.state)
        self._states = {parts.here(p): taken[parts.here(p)] if p in parts.of else own for p, own in self.state.items()}
        self._tables = [table for *_, table in tables]
        self._launches = [launch_of(engine)(table, self._states) for engine, _, table in tables]
        self._exchanges = exchanges(parts, zip(self._launches, (share for _, share, _ in tables), strict=True))
        if self._lead:
            self._lead.guide(self._launches)
        self._entries, self._structure = list(self.state.values()), self._look()
        device = self._params[0].device if self._params else None
        norms = [launch.norm for launch in self._launches]
        last = getattr(self, "grad_norm", None)
        self.grad_norm = norms[0] if len(norms) == 1 else torch.zeros((), dtype=torch.float64, device=device)
        if last is not None:
            self.grad_norm.copy_(last)
        if not hasattr(self, "skipped_steps"):
            self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        if self._released:
            self._released.follow()

    def _keep(self, entries: dict) -> None:
        """Puts checked entries into `state`, whose dicts stay the objects they were."""
        for p in [p for p in self.state if p not in entries]:
            del self.state[p]
        for p, own in entries.items():
            self.state[p].clear()
            self.state[p].update(own)

    def _reports(self) -> dict:
        """What was last reported of each parameter's layers, float64 [layers, reports] on the host."""
        found = {}
        for table in self._tables:
            report = table.report.cpu()
            params = map(self._parts.param, table.params)
            found.update((p, report[numbers]) for p, numbers in zip(params, table.layers_of(), strict=True))
        return found

    def _look(self) -> list:
        return [*map(itemgetter(*STRUCTURE), self.param_groups), *map(self.rule_of, self.param_groups)]

    def _current(self) -> list:
        """The launches, built anew if groups, parameters or states were exchanged."""
        if (
            self._launches is None
            or not same(self.param_groups, self._groups)
            or not same([p for group in self.param_groups for p in group["params"]], self._params)
            or not same(list(self.state.values()), self._entries)
            or self._look() != self._structure
            or self._parts.changed()
        ):
            self._build()
        return self._launches

    # The step

    def step(self, closure=None, *, grad_norm: torch.Tensor | float | None = None):
        """Takes one step. In code under torch.compile it is one operator, which looks up all numbers when it runs.

        With sharded parameters, or a `norm_group`, all ranks step together: where one does not, or raises, the others
        wait until their group's timeout. Ranks have to agree in which parameters have gradients.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_norm: the norm to clip by, where the gradients at hand are only a part (pipeline, expert or ZeRO
                ranks); a number or a 0-dim tensor, >= 0. It needs `max_grad_norm`.

        Returns:
            What `closure` returned, else None.

        Raises:
            ValueError, TypeError: for gradients that cannot be used. Parameters and states are then untouched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            compiled.step(self, grad_norm)
        else:
            self._step(grad_norm)
        return loss

    def _step(self, grad_norm: torch.Tensor | float | None) -> None:
        launches, max_norm = self._read(), self.defaults["max_grad_norm"] or 0.0
        if max_norm:
            check_range("max_grad_norm", max_norm, *RANGES["max_grad_norm"])
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            Step(self, launches, max_norm, scaling_of(self)).take(grad_norm)
        self._parts.release()

    def _read(self) -> list:
        """Launches that have read and checked every address."""
        launches = self._current()
        try:
            self._parts.read()
            if not all([launch.read() for launch in launches]):  # shapes, types, devices or states changed
                self._build()
                self._parts.read()
                launches = self._launches
                if not all([launch.read() for launch in launches]):
                    raise RuntimeError("parameters change while the optimizer reads them: step() needs them at rest")
            elif any(launch.moved for launch in launches):
                check_overlap([self._parts.here(p) for p in self._params])
        except BaseException:
            self._launches = None  # what was wrong must be looked at again
            raise
        for launch in launches:
            launch.table.check_rests()
        return [launch for launch in launches if launch.spread or launch.absent < len(launch.table.params)]

    def _predict(self) -> None:
        """Writes predicted weights where `self._lead` says, for all parameters, from what lies in memory."""
        self._read()
        for launch in self._launches:
            launch.run(Phase.PREDICT, self._rows(launch), 0.0)
            torch.autograd.graph.increment_version(launch.table.params)

    def _rows(self, launch) -> list[tuple]:
        """A row per group of the launch's table: the gradient's sign, then what the rule's row holds."""
        if launch not in self._rows_of:
            table = launch.table
            self._rows_of[launch] = Rows(table, table.step.device if launch.live else None)
        return self._rows_of[launch].read(self)

    def release_gradients(self) -> Release:
        """Steps each parameter inside of `backward()`, as soon as its gradient is there, and lets that go.

        What is gained is memory: gradients of one or two parameters exist at a time. The numbers are those of ordinary
        training, bit for bit. `step()` is still to be called after `backward()`, for schedulers and hooks; it steps
        what was given a gradient by hand, and nothing else. An error in `backward()` leaves the parameters before it
        stepped. A copy of the optimizer, and an unpickled one, keeps its gradients.

        Every backward pass is a step: gradients cannot be accumulated over several (a parameter that segments of
        reentrant checkpointing share gets a step from each), clipped or scaled (GradScaler). DistributedDataParallel
        reduces gradients after these steps; `step()` raises when it finds out.

        Returns:
            A handle, whose `remove()` ends it.

        Raises:
            ValueError: where a step needs more than one parameter's gradient (max_grad_norm, layer="group" over several
                tensors), the gradients afterwards (differentiable=True, XGrad) or the model (curvature), for sharded
                parameters, and if gradients are released already.
        """
        if self._released:
            raise ValueError("gradients are released already: remove() that handle first")
        self._current()  # what is wrong without releasing is told before anything changes
        self._released = Release(self)
        self._build()
        return self._released

    # What it tells

    @property
    def engines(self) -> dict[str, int]:
        """How many tensors each engine serves."""
        counts = {}
        for launch in self._current():
            counts[launch.engine] = counts.get(launch.engine, 0) + len(launch.table.params)
        return counts

    def layer_stats(self) -> dict[str, dict]:
        """What the rule saw of each layer in the last step (norms, ratios, angles; see the rule's docstring).

        Returns:
            Per parameter a dict from name to float, or to a list of floats where the parameter is cut into layers.
            Keys are the parameters' names if the optimizer was built from named parameters, else "group.index".
        """
        self._current()
        return by_name(self.param_groups, self._tables, self._parts.here)

    def traffic(self) -> dict[str, int]:
        """Bytes that one step moves when every parameter has a gradient, by the plan's own count, and its launches.

        Returns:
            "compulsory": every operand read once and written once, and the gradients once more where they are
            clipped by their global norm, which has to be known first; "requested": what the sweeps ask for (what of it
            is found in a cache is the machine's affair); "launches": native calls.
        """
        counts = [
            traffic(launch.table, self._states, bool(self.defaults["max_grad_norm"]), launch.on_chip, launch.leads)
            for launch in self._current()
        ]
        totals = {key: sum(count[key] for count in counts) for key in ("compulsory", "requested")}
        return {**totals, "launches": sum(launch.engine != "reference" for launch in self._launches)}

    def workspace_bytes(self) -> int:
        """Bytes held beside parameters, gradients and states."""
        own = sum(launch.workspace_bytes() for launch in self._current())
        return own + (self._lead.nbytes if self._lead else 0)

    # Saving and loading

    def state_dict(self) -> dict:
        """torch's state_dict, with the name of each group's rule."""
        self._current()
        return state_dicts.tagged(super().state_dict(), [self.tag_of(group) for group in self.param_groups])

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what `state_dict()` of this class gave, or torch.optim's SGD, Adam or AdamW for ours.

        States keep the type they were saved with and go to their parameter's device. Group keys that are not ours
        (as `amsgrad`) are dropped, those of learning-rate schedulers kept.

        Raises:
            ValueError: for a state_dict of another optimizer, other shapes or another `precision`; the optimizer is
                then as it was.
        """
        state_dicts.load(self, state_dict)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "grad_norm": self.grad_norm.detach(), "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._launches, self._tables, self._lead, self._number = None, [], None, compiled.number_of(self)
        self.norm_group, self._spreads = None, any(map(is_spread, self._params))
