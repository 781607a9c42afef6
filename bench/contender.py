"""An optimizer as it takes part in a bench: over shared parameters, with states of its own."""

import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import device as devices
from . import spec as specs
from . import timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parameters(shapes, dtype, device):
    """Random parameters with fixed random gradients of global norm about 1, so that clipping hardly changes them."""
    generator = torch.Generator(device).manual_seed(0)
    elements = max(1, sum(torch.Size(shape).numel() for shape in shapes))
    params = []
    for shape in shapes:
        p, g = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        params.append(with_gradient(p.mul_(0.02), g.mul_(elements**-0.5)))
    return params


def with_gradient(p, g):
    p = torch.nn.Parameter(p)
    p.grad = g
    return p


class _OperatorCount(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Contender:
    """A built optimizer and the parameters it steps.

    Attributes:
        first_step_s: wall time of the first step, until the device is done.
        allocated_bytes: what building and the first steps have allocated; None where nobody counts it.
    """

    spec: specs.Spec
    params: list
    opt: torch.optim.Optimizer
    first_step_s: float | None = None
    allocated_bytes: int | None = None

    @classmethod
    def build(cls, spec, params):
        """Builds the optimizer and takes two steps: torch's make their states, Triton's compile in the first."""
        device = devices.on(params[0].device.type)
        if spec.xgrad:  # keeps the true weights for itself: others must not write these
            params = [with_gradient(p.detach().clone(), p.grad) for p in params]
        before = device.allocated()
        contender = cls(spec, params, specs.build(spec, params))
        device.synchronize()
        start = time.perf_counter()
        contender.step()
        device.synchronize()
        contender.first_step_s = time.perf_counter() - start
        contender.step()
        device.synchronize()
        contender.allocated_bytes = None if before is None else device.allocated() - before
        return contender

    @property
    def device(self):
        return devices.on(self.params[0].device.type)

    def step(self):
        if self.spec.clip:
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        if self.spec.groups:
            for group in self.opt.param_groups:  # as a scheduler does; to another object of the same value
                group["lr"] = 1.0 * group["lr"]
        self.opt.step()

    @property
    def ours(self):
        return hasattr(self.opt, "traffic")

    @property
    def engine(self):
        return ",".join(self.opt.engines) if self.ours else self.spec.engine

    def traffic(self):
        """Compulsory and requested bytes and native calls of a step; None where nobody has counted."""
        if self.ours and not self.spec.clip:
            plan = self.opt.traffic()
            counts = plan["compulsory"], plan["requested"], plan["launches"]
        elif self.ours:
            counts = None, None, None  # the plan does not know what clip_grad_norm_ does
        else:
            counts = self._known_bytes(), None, self._operator_calls()
        return dict(zip(("compulsory_bytes", "requested_bytes", "native_calls"), counts, strict=True))

    def _known_bytes(self):
        """What torch's own SGD and Adam must move at least: their states have the parameters' type."""
        if self.spec.package != "torch.optim" or self.opt.defaults.get("amsgrad"):
            return None
        sgd = 5 if self.opt.defaults.get("momentum") else 3
        words = {"Adam": 7, "AdamW": 7, "SGD": sgd}.get(self.spec.name)
        return words and (words + self.spec.clip) * sum(p.nbytes for p in self.params)

    def _operator_calls(self):
        with _OperatorCount() as count:
            self.step()
        return count.calls

    def host_us(self):
        """Host time of a step in µs. Where step() waits for its work, of one whose tensors have one element each."""
        if self.device.returns_early:
            return 1e6 * timing.host_seconds(self.step, self.device)
        few = parameters([(1,)] * len(self.params), self.params[0].dtype, self.device.name)
        return 1e6 * timing.host_seconds(Contender.build(self.spec, few).step, self.device)

    def memory(self):
        """Bytes the algorithm needs (parameters, gradients, states), held beside them (ours only), and as counted."""
        tensors = [p for p in self.params] + [p.grad for p in self.params]
        tensors += [s for state in self.opt.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        held = self.opt.workspace_bytes() if self.ours else None
        counted = {"allocated_bytes": self.allocated_bytes, "peak_bytes": self.device.peak_bytes(self.step)}
        return {"needed_bytes": sum(storages.values()), "workspace_bytes": held} | counted
