"""torch.compile around models, steps and whole training steps: the bits of eager steps, one graph, no recompilation.

Most graphs are run by aot_eager, whose graphs have no side effects: operators step in copies, which is where values
could be lost. Inductor comes last, for it compiles C++. Left out: graphs on a GPU, mode="reduce-overhead".
"""

import copy
import gc
import logging
from contextlib import contextmanager

import pytest
import torch
from conduct import assert_exact, each_case, give, make, parameters, refused, same_bits
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import ExponentialLR

import layerfused as lf
from layerfused import compiled

STEPS = 3


@pytest.fixture(autouse=True)
def fresh(caplog):
    """Nothing of other tests in Dynamo's caches, and an error where something would be compiled a second time."""
    caplog.set_level(logging.ERROR, "torch")  # it warns that profiling is left out of graphs
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@contextmanager
def may_compile_again():
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield


def graphs():
    return counters["stats"]["unique_graphs"]


def breaks():
    """What broke graphs, in torch's words: the first line of each reason."""
    return {reason.splitlines()[0] for reason in counters["graph_break"]}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs(t):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(t))


def loss_of(model, x):
    return model(x).square().sum()


def backward(model, t):
    model.zero_grad()
    loss_of(model, inputs(t)).backward()


def halve(opt, t):
    for group in opt.param_groups:
        group["lr"] = 0.1 * 0.5**t


def trained(body, made, between=halve, gradients=backward, backend=None, steps=STEPS, **options):
    """The model after steps of `body(model, optimizer, input)`, which is compiled for a backend or else runs as it is,
    what it returned, and the optimizer."""
    model = network()
    opt, seen = made(model), []

    def run(x):
        return body(model, opt, x)

    if backend:
        run = torch.compile(run, backend=backend, **{"fullgraph": True, **options})
    for t in range(steps):
        gradients(model, t)
        between(opt, t)
        result = run(inputs(t))
        seen += [p.detach().clone() for p in model.parameters()]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen += [result.detach().clone()] if isinstance(result, torch.Tensor) else []
    return seen, opt, model


def same_as_eager(body, made, backend="aot_eager", between=halve, gradients=backward, **options):
    eager, _, model = trained(body, made, between, gradients)
    found, opt, own = trained(body, made, between, gradients, backend, **options)
    assert len(found) == len(eager) and all(map(same_bits, found, eager))
    assert [p.grad is None for p in own.parameters()] == [p.grad is None for p in model.parameters()]
    return opt


def lamb(model, **more):
    return lf.LAMB(model.parameters(), lr=0.1, **more)


def adamw(model, **more):
    return lf.AdamW(model.parameters(), lr=0.1, **more)


def step(model, opt, x):
    opt.step()


# The step alone


@each_case
def test_a_step_is_one_graph_whatever_lr(case):
    same_as_eager(step, lambda model: make(case, model.parameters()), "eager")
    assert graphs() == 1 and not breaks()


ENGINES = {
    "cpu": {},
    "reference": {"backend": "reference"},
    "clip": {"max_grad_norm": 0.5},
    "skip": {"max_grad_norm": 1e-3},
    "groups": {"layer": "group"},
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_and_options(name):
    options = dict(ENGINES[name])
    layer = options.pop("layer", "tensor")

    def made(model):
        return lf.LAMB([{"params": model.parameters(), "layer": layer}], **options)

    def between(opt, t):
        halve(opt, t)
        if name == "skip" and t == 1:
            opt.param_groups[0]["params"][0].grad[0, 0] = float("inf")

    opt = same_as_eager(step, made, between=between)
    assert opt.skipped_steps == (name == "skip") and graphs() == 1


def scheduled(opt):
    opt.scheduler = ExponentialLR(opt, 0.5)
    return opt


def follow(opt, t):
    opt.scheduler.step() if t else None


NUMBERS = {  # name -> (how lr comes to the optimizer, what changes between two steps)
    "a tensor filled": (
        lambda m: lf.AdamW(m.parameters(), lr=torch.tensor(0.1)),
        lambda o, t: o.param_groups[0]["lr"].fill_(0.1 / (1 + t)),
    ),
    "a tensor exchanged": (
        lambda m: lf.AdamW(m.parameters(), lr=torch.tensor(0.1)),
        lambda o, t: o.param_groups[0].update(lr=torch.tensor(0.1 / (1 + t))),
    ),
    "a number, then a tensor": (adamw, lambda o, t: o.param_groups[0].update(lr=(0.1, torch.tensor(0.2), 3)[t])),
    "betas and decay": (adamw, lambda o, t: o.param_groups[0].update(betas=(0.5 + t / 10, 0.9), weight_decay=0.1 * t)),
    "ascent": (lamb, lambda o, t: o.param_groups[0].update(maximize=t == 1)),
    "momentum that goes": (
        lambda m: lf.SGD(m.parameters(), lr=0.1, momentum=0.9),
        lambda o, t: o.param_groups[0].update(momentum=0.9 * (t != 1)),
    ),
    "states loaded": (lamb, lambda o, t: o.load_state_dict(copy.deepcopy(o.state_dict()))),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_no_part_of_the_graph(name):
    same_as_eager(step, NUMBERS[name][0], "eager", between=NUMBERS[name][1])
    assert graphs() == 1 and not breaks()


def test_a_scheduler():
    """It puts a function in the place of `opt.step` that Dynamo skips by its name: a break that is torch's own."""
    same_as_eager(step, lambda m: scheduled(lamb(m)), between=follow, fullgraph=False)
    assert graphs() == 1 and breaks() <= {"Attempted to call function marked as skipped"}


def test_gradients_that_come_and_go():
    def between(opt, t):
        if t != 1:
            opt.param_groups[0]["params"][1].grad = None

    with may_compile_again():
        opt = same_as_eager(step, lamb, between=between)
    p, q = opt.param_groups[0]["params"][:2]
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (3, 1) and graphs() == 2


def test_a_group_more():
    def between(opt, t):
        if t == 1:
            opt.add_param_group({"params": parameters((3,)), "lr": 0.5})
        if t:
            give(opt.param_groups[1]["params"], t)

    with may_compile_again():
        opt = same_as_eager(step, lamb, between=between)
    assert graphs() == 2 and opt.state[opt.param_groups[1]["params"][0]]["step"] == 2


def test_the_given_norm():
    for given in (lambda x: 7.0, lambda x: x.abs().sum()):
        same_as_eager(lambda m, o, x, given=given: o.step(grad_norm=given(x)), lamb)
        assert graphs() == 1
        torch._dynamo.reset()
        counters.clear()
    with refused(ValueError, "grad_norm", "max_grad_norm"):
        trained(lambda m, o, x: o.step(grad_norm=x.sum()), adamw, backend="aot_eager")


# Other things in the graph


def scaled_parameters(model, opt, x):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    opt.step()


def looked_before(model, opt, x):
    old, weight = [p.detach().clone() for p in model.parameters()], model[0].weight.detach()
    before = weight * 3
    opt.step()
    return before + old[0] + weight


def clipped(model, opt, x):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()


def exchanged_gradients(model, opt, x):
    for p in model.parameters():
        p.grad = p.grad * 0.3
    opt.step()


def twice(model, opt, x):
    opt.step()
    opt.step()


def forward_behind(model, opt, x):
    opt.step()
    return model(x).sum()


def forward_before(model, opt, x):
    result = model(x).sum()
    opt.step()
    return result


AROUND = [scaled_parameters, looked_before, clipped, exchanged_gradients, twice, forward_behind, forward_before]


@pytest.mark.parametrize("body", AROUND)
def test_what_else_is_in_the_graph(body):
    same_as_eager(body, lamb)
    assert graphs() == 1 and not breaks()


def flattened(model):
    """Parameters that are views of one storage: AOTAutograd gives the graph that storage instead."""
    flat, begin = torch.cat([p.detach().flatten() for p in model.parameters()]), 0
    for layer in (model[0], model[2]):
        for name in ("weight", "bias"):
            p = getattr(layer, name)
            setattr(layer, name, nn.Parameter(flat[begin : begin + p.numel()].view(p.shape)))
            begin += p.numel()
    return lamb(model)


def transposed(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return lamb(model)


def gapped(model):
    model[0].weight = nn.Parameter(torch.stack([model[0].weight.detach()] * 2, 2)[..., 0])
    return lamb(model)


@pytest.mark.parametrize("made", [flattened, transposed, gapped])
def test_how_parameters_lie(made):
    same_as_eager(step, made)
    assert graphs() == 1


def test_two_optimizers():
    def made(model):
        opt = lf.AdamW(model[0].parameters())
        opt.other = lf.LARS(model[2].parameters(), lr=0.1)
        return opt

    def both(model, opt, x):
        opt.step()
        opt.other.step()

    same_as_eager(both, made)
    assert graphs() == 1


# Training


def whole(model, opt, x):
    opt.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    opt.step()
    return loss.detach()


def with_closure(model, opt, x):
    def closure():
        opt.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    return opt.step(closure).detach()


TORCHS_OWN = {"Unsupported Tensor.backward() call", "Attempted to inline function marked as skipped"}  # zero_grad


@pytest.mark.parametrize("body", [whole, with_closure])
def test_a_whole_training_step(body):
    with may_compile_again():  # the first zero_grad finds no gradients
        same_as_eager(body, lamb, gradients=lambda m, t: None, fullgraph=False)
    assert breaks() <= TORCHS_OWN


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch does not trace backward()"
)
def test_a_whole_training_step_in_one_graph():
    def body(model, opt, x):
        loss = loss_of(model, x)
        loss.backward()
        opt.step()
        return loss.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        same_as_eager(body, lamb, gradients=lambda m, t: m.zero_grad())
    assert graphs() == 1 and not breaks()


def test_grad_scaler():
    """Its own work is not traced."""

    def made(model):
        opt = lamb(model)
        opt.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        opt.scaler.scale(torch.ones(()))
        return opt

    def body(model, opt, x):
        opt.scaler.step(opt)
        opt.scaler.update()

    with may_compile_again():
        same_as_eager(body, made, fullgraph=False)


def test_with_inductor():
    """A compiled model under an eager step, then the whole step compiled; its arithmetic in the model is its own."""
    rounds = {}
    for kind in ("eager", "model", "step"):
        torch._dynamo.reset()
        model = network()
        opt = lamb(model)
        forward = torch.compile(model, fullgraph=True) if kind == "model" else model
        update = torch.compile(whole) if kind == "step" else whole
        with may_compile_again():
            for t in range(STEPS):
                halve(opt, t)
                update(forward, opt, inputs(t))
        rounds[kind] = [p.detach() for p in model.parameters()]
    for kind in ("model", "step"):
        for p, exact, start in zip(rounds[kind], rounds["eager"], network().parameters(), strict=True):
            assert_exact(p, exact, start)


# What stays outside of graphs, and errors


def test_what_evaluates_or_moves_the_model_itself_runs_between_graphs():
    def curvature(model, opt, x):
        return opt.step(lambda: loss_of(model, x))

    same_as_eager(step, lambda m: lf.XGrad(adamw(m)), fullgraph=False)
    assert breaks() == {"Attempted to call function marked as skipped"}
    torch._dynamo.reset()
    with may_compile_again():
        made = lambda m: lf.CurvatureSGD(m.parameters())  # noqa: E731
        same_as_eager(curvature, made, gradients=lambda m, t: None, fullgraph=False)


def test_a_differentiable_step():
    """Autograd sees it, so it cannot be one operator."""
    found = []
    for backend in (None, "aot_eager"):
        (start,) = parameters((3,))
        p = start * 2
        opt = lf.Adam([start], lr=0.1, differentiable=True)
        opt.param_groups[0]["params"][0] = p
        p.retain_grad()
        p.grad = torch.ones(3)
        update = torch.compile(opt.step, backend=backend) if backend else opt.step
        update()
        p.sum().backward()
        found.append((p.detach(), start.grad))
    assert all(map(same_bits, *found))


def test_an_error_leaves_everything_as_it_was():
    model = network()
    opt = lamb(model)
    backward(model, 0)
    update = torch.compile(opt.step, backend="aot_eager", fullgraph=True)
    update()
    before = [p.detach().clone() for p in model.parameters()]
    own = [(p.data_ptr(), p.grad) for p in model.parameters()]
    opt.param_groups[0]["lr"] = -1.0
    with refused(ValueError, "lr", "-1.0"):
        update()
    assert all(map(same_bits, model.parameters(), before))
    assert all(p.data_ptr() == at and p.grad is g for p, (at, g) in zip(model.parameters(), own, strict=True))
    opt.param_groups[0]["lr"] = 0.1
    update()
    assert not same_bits(model[0].weight, before[0]) and graphs() == 1
    assert torch.is_grad_enabled()  # torch's backend "eager" forgets that where an operator raises


# The operator


def test_the_operator_keeps_what_its_schema_says():
    model = network()
    opt = lamb(model)
    backward(model, 0)
    params = [p.detach().clone() for p in model.parameters()]
    grads = [None, *(p.grad for p in list(model.parameters())[1:])]
    torch.library.opcheck(torch.ops.layerfused.step.default, (params, grads, torch.tensor(2.0), opt._number))


def test_versions_are_counted():
    """So that a backward through weights which a compiled step has changed since is an error, as with an eager one."""
    model = network()
    opt = lamb(model)
    backward(model, 0)
    loss = loss_of(model, inputs(1))
    torch.compile(opt.step, backend="aot_eager", fullgraph=True)()
    with refused(RuntimeError, "modified by an inplace operation"):
        loss.backward()


def test_a_copy_is_an_optimizer_of_its_own():
    model = network()
    opt = lamb(model)
    backward(model, 0)
    twin = copy.deepcopy(opt)
    for p, q in zip(twin.param_groups[0]["params"], model.parameters(), strict=True):
        p.grad = q.grad.clone()
    torch.compile(twin.step, backend="eager", fullgraph=True)()
    assert [float(entries["step"]) for entries in opt.state.values()] == [0.0] * 4
    opt.step()
    assert all(map(same_bits, twin.param_groups[0]["params"], model.parameters()))


def test_graphs_keep_no_optimizer_alive():
    model = network()
    opt = lamb(model)
    number = opt._number
    backward(model, 0)
    torch.compile(lambda own: own.step(), backend="eager", fullgraph=True)(opt)
    assert compiled.OPTIMIZERS[number] is opt
    del opt
    gc.collect()
    assert number not in compiled.OPTIMIZERS
