"""Gradients that are released: every parameter's step in its hook leaves the bits of ordinary training.

Left out: GPUs (the CUDA engine built for the host has a case in test_cuda_host.py), FSDP2 (sharded parameters are
refused).
"""

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from conduct import (
    ENGINES,
    assert_same,
    copies,
    each_case,
    each_engine,
    give,
    make,
    parameters,
    refused,
    same_bits,
    snapshot,
)
from torch import nn

import layerfused as lf
from layerfused import release

STEPS = 3


def backward(params, seed, skip=()):
    """Gives the gradients that `give` gives, by autograd."""
    wanted = copies(params)
    give(wanted, seed)
    terms = [(p * q.grad).sum() for p, q in zip(params, wanted, strict=True)]
    sum(term for i, term in enumerate(terms) if i not in skip).backward()


def train(opt, params, seeds=range(STEPS), skip=()):
    for seed in seeds:
        backward(params, seed, skip)
        opt.step()
        opt.zero_grad()


def pair(build, *shapes, dtype=torch.float32):
    """Two optimizers over equal parameters, the second's gradients released, and what ends that."""
    params = parameters(*shapes, dtype=dtype)
    twins = copies(params)
    opt, twin = build(params), build(twins)
    return opt, params, twin, twins, twin.release_gradients()


def assert_equal(opt, params, twin, twins):
    assert_same(snapshot(twin, twins), snapshot(opt, params))
    assert twin.layer_stats() == opt.layer_stats()


def lamb(params, **more):
    return lf.LAMB(params, max_grad_norm=None, **more)


# The bits of ordinary training


@each_engine
@each_case
def test_every_rule(case, backend):
    opt, params, twin, twins, _ = pair(lambda params: make(case, params, backend=backend))
    for seed in range(STEPS):
        train(opt, params, [seed])
        backward(twins, seed)
        assert all(p.grad is None for p in twins)
        done = snapshot(twin, twins)
        twin.step()  # has nothing to do
        assert_same(snapshot(twin, twins), done)
        assert all(twin.state[p]["step"] == seed + 1 for p in twins)
    assert_equal(opt, params, twin, twins)


@pytest.mark.parametrize("layer", ["slices", 2, (1, 3)])
@pytest.mark.parametrize("cls", [lamb, lf.NovoGrad, lf.AdamNorm])
def test_layers_within_a_tensor(cls, layer):
    opt, params, twin, twins, _ = pair(lambda params: cls([{"params": params, "layer": layer}]), (4, 3), (4, 2, 2))
    train(opt, params), train(twin, twins)
    assert_equal(opt, params, twin, twins)


@each_engine
def test_groups_and_schedules(backend):
    """Each group its own numbers, one of its lr a tensor; a whole group as layer, where it is one tensor."""

    def build(params):
        groups = [{"params": params[:2], "lr": 0.1, "adapt": False}, {"params": [params[2]], "layer": "group"}]
        return lamb([*groups, {"params": params[3:], "lr": torch.tensor(0.2), "maximize": True}], backend=backend)

    opt, params, twin, twins, _ = pair(build)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (opt, twin)]
    for seed in range(STEPS):
        for one, its, scheduler in zip((opt, twin), (params, twins), schedulers, strict=True):
            train(one, its, [seed])
            scheduler.step()
    assert twin.param_groups[0]["lr"] == 0.1 * 0.5**STEPS
    assert_equal(opt, params, twin, twins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    opt, params, twin, twins, _ = pair(lamb, (7, 5), (0,), (), dtype=dtype)
    train(opt, params), train(twin, twins)
    assert_equal(opt, params, twin, twins)


class Net(nn.Module):
    """Embedding and output share a weight; `unused` gets no gradient, `frozen` requires none."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.out.weight = self.embedding.weight
        self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(6, 6).requires_grad_(False)

    def forward(self, words):
        return self.out(self.frozen(torch.tanh(self.inner(self.embedding(words)))))


def run(net, opt, steps):
    for step in steps:
        words = torch.randint(11, (5, 3), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(net(words).flatten(0, 1), words.flatten()).backward()
        opt.step()
        opt.zero_grad()


def test_a_model_with_tied_unused_and_frozen_parameters():
    torch.manual_seed(0)
    nets = [Net()]
    nets.append(copy.deepcopy(nets[0]))
    opt, twin = (lf.AdamW(net.parameters(), lr=0.01) for net in nets)
    twin.release_gradients()
    for one, net in zip((opt, twin), nets, strict=True):
        run(net, one, range(3))
        net.frozen.requires_grad_(True)
        run(net, one, range(3, 6))
    assert_equal(opt, list(nets[0].parameters()), twin, list(nets[1].parameters()))
    assert [int(twin.state[p]["step"]) for p in nets[1].parameters()] == [6, 6, 6, 6, 0, 0, 3, 3]
    backward([nets[1].frozen.weight], 0)
    assert nets[1].frozen.weight.grad is None, "what requires a gradient by now is released, too"


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_gradients_of_another_layout_are_copied():
    opt, params, twin, twins, _ = pair(lamb, (6, 4))
    for one, (p,) in ((opt, params), (twin, twins)):
        p.grad = torch.zeros(4, 6).t()  # accumulated into, in its own layout
        backward([p], 0)
        one.step()
    assert_equal(opt, params, twin, twins)


# What is gained, and who else may look


@each_engine
def test_one_gradient_lives_at_a_time(backend):
    params, seen = parameters((8, 8), (8, 8), (3,), (8, 8)), []
    for p in params:  # hooks run in the order in which they came
        p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(p.grad is not None for p in params)))
    opt = lamb(params, backend=backend)
    opt.release_gradients()
    train(opt, params)
    assert seen == [1] * len(params) * STEPS


def test_nothing_holds_a_released_gradient():
    (p,), seen = parameters((3,)), []
    p.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    opt = lamb([p])
    opt.release_gradients()
    backward([p], 0)
    assert seen[0]() is None


def test_steps_are_seen_by_autograd_and_by_hooks_of_step():
    (p,) = parameters((3,))
    opt, calls = lamb([p]), []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.release_gradients()
    before = p._version
    loss = (p * p.detach()).sum() + (p * 2).square().sum()
    loss.backward(retain_graph=True)
    assert p._version > before and not calls
    opt.step()
    assert calls == ["before", "after"]
    with refused(RuntimeError, "modified by an inplace operation"):
        loss.backward()


@each_engine
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_the_gradients(backend):
    """With create_graph hooks run with autograd at work, which must not see the step."""
    opt, params, twin, twins, _ = pair(lambda params: lamb(params, backend=backend))
    for one, its in ((opt, params), (twin, twins)):
        sum(p.square().sum() for p in its).backward(create_graph=True)
        one.step()
    assert all(p.grad is None and p.is_leaf for p in twins)
    assert_equal(opt, params, twin, twins)


def test_threads_step_one_after_the_other(monkeypatch):
    opt, params, twin, twins, _ = pair(lamb, (3,), (4,))
    inside, seen, rows = [], [], twin._rows

    def slow(launch):
        inside.append(launch)
        seen.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return rows(launch)

    monkeypatch.setattr(twin, "_rows", slow)
    threads = [threading.Thread(target=backward, args=([p], 0)) for p in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [1, 1]
    for p in params:
        backward([p], 0)
    opt.step()
    assert_equal(opt, params, twin, twins)


def test_gradients_given_by_hand_wait_for_step():
    opt, params, twin, twins, _ = pair(lamb)
    for one, its in ((opt, params), (twin, twins)):
        give(its, 0)
        its[1].grad = None
        one.step()
        one.zero_grad()
        backward(its, 1)
        one.step()
        one.zero_grad()
        give(its, 2)
        one.step()
    assert_equal(opt, params, twin, twins)


@each_engine
def test_a_gradient_that_another_hook_took(backend):
    params = parameters((3,), (4,))
    params[0].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    opt = lamb(params, backend=backend)
    opt.release_gradients()
    train(opt, params)
    assert [int(opt.state[p]["step"]) for p in params] == [0, STEPS]


def test_two_backward_passes_are_two_steps():
    opt, params, twin, twins, _ = pair(lamb)
    train(opt, params, [0, 1])
    backward(twins, 0), backward(twins, 1)
    twin.step()
    assert_equal(opt, params, twin, twins)


# Changes while gradients are released


@each_engine
def test_a_group_that_is_added(backend):
    opt, params, twin, twins, _ = pair(lambda params: lamb(params[:2], backend=backend))
    for one, its in ((opt, params), (twin, twins)):
        train(one, its[:2], [0])
        one.add_param_group({"params": its[2:], "lr": 0.1})
        train(one, its, [1])
    assert_equal(opt, params, twin, twins)
    backward(twins, 2)
    assert all(p.grad is None for p in twins)


def test_a_group_that_cannot_be_released_is_not_added():
    opt, params, twin, twins, _ = pair(lambda params: lamb(params[:2]))
    with refused(ValueError, "layer='group'", "layer='tensor'"):
        twin.add_param_group({"params": twins[2:], "layer": "group"})
    train(opt, params[:2]), train(twin, twins[:2])
    assert_equal(opt, params[:2], twin, twins[:2])


@pytest.mark.parametrize("index", [0, 3])
def test_parameters_taken_out_by_hand(index):
    """The last one's hook comes first."""
    opt, params, twin, twins, _ = pair(lamb)
    for one, its in ((opt, params), (twin, twins)):
        train(one, its, [0])
        del one.param_groups[0]["params"][index]
        train(one, its, [1])
    assert_equal(opt, params, twin, twins)
    backward(twins, 2)
    assert [p.grad is None for p in twins] == [i != index for i in range(4)]


def test_saving_and_loading():
    opt, params, twin, twins, _ = pair(lamb)
    train(opt, params), train(twin, twins)
    saved = twin.state_dict()
    assert repr(saved) == repr(opt.state_dict())
    others = copies(twins)
    other = lamb(others)
    other.release_gradients()
    backward(others, 7)
    other.load_state_dict(saved)
    for p, q in zip(others, params, strict=True):
        p.data = q.detach().clone()
    train(opt, params), train(other, others)
    assert_equal(opt, params, other, others)


@pytest.mark.parametrize("move", [lambda x: x.share_memory_(), lambda x: setattr(x, "data", x.data.clone())])
def test_memory_that_moves(move):
    opt, params, twin, twins, _ = pair(lamb)
    train(opt, params, [0]), train(twin, twins, [0])
    for p in twins:
        move(p), move(twin.state[p]["exp_avg"]), move(twin.state[p]["step"])
    train(opt, params, [1]), train(twin, twins, [1])
    assert_equal(opt, params, twin, twins)


@each_engine
def test_a_state_that_is_replaced_in_the_midst_of_a_pass(backend):
    """Before each parameter's step, and so after the other's."""
    opt, params, twin, twins, _ = pair(lambda params: lamb(params, backend=backend), (3, 2), (5,))
    for one, its in ((opt, params), (twin, twins)):
        train(one, its, [0])
        for p in twins if one is twin else ():
            p.register_hook(lambda _, s=twin.state[p]: s.update(exp_avg=s["exp_avg"].clone()))
        train(one, its, [1])
    assert_equal(opt, params, twin, twins)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_keeps_its_gradients(copied):
    opt, params, twin, twins, _ = pair(lamb)
    train(opt, params), train(twin, twins)
    other, others = copied((twin, twins))
    backward(others, 0)
    assert all(p.grad is not None for p in others)
    other.step()
    train(opt, params, [0]), train(twin, twins, [0])
    assert_equal(opt, params, other, others)
    assert_equal(opt, params, twin, twins)


# The end


@each_engine
def test_removing(backend):
    opt, params, twin, twins, handle = pair(lambda params: lamb(params, backend=backend))
    train(opt, params), train(twin, twins)
    assert twin.traffic()["launches"] == len(twins) * (backend == "auto")
    stats = twin.layer_stats()
    elementwise = [twin.state[p]["exp_avg"] for p in twins]
    handle.remove()
    handle.remove()
    assert twin.layer_stats() == stats and twin.traffic()["launches"] == (backend == "auto")
    assert all(twin.state[p]["exp_avg"] is x for p, x in zip(twins, elementwise, strict=True))
    backward(twins, 0)
    assert all(p.grad is not None for p in twins)
    twin.step(lambda: None)  # a closure is nothing to refuse any more
    train(opt, params, [0])
    assert_equal(opt, params, twin, twins)
    again = twin.release_gradients()
    handle.remove()  # is another's no longer
    twin.zero_grad()
    train(opt, params, [1])
    backward(twins, 1)
    assert all(p.grad is None for p in twins) and twin._released is again
    assert_equal(opt, params, twin, twins)


def test_an_optimizer_that_is_gone_steps_nothing():
    params = parameters()
    opt = lamb(params)
    handle = opt.release_gradients()
    before, gone = copies(params), weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    backward(params, 0)
    assert all(same_bits(p, q) and p.grad is not None for p, q in zip(params, before, strict=True))
    handle.remove()


def test_hooks_do_not_keep_parameters_alive():
    (p,) = parameters((3,))
    opt = lamb([p])
    opt.release_gradients()
    backward([p], 0)
    gone = weakref.ref(p)
    del p, opt
    gc.collect()
    assert gone() is None


# What is refused

WORDS = {  # what is built -> words of the error
    "clipped": (lambda p: lf.LAMB(p), "LAMB", "max_grad_norm=1.0", "max_grad_norm=None"),
    "a layer of several": (lambda p: lamb([{"params": p, "layer": "group"}]), "layer='group'", "4 tensors", "'tensor'"),
    "differentiable": (lambda p: lf.AdamW(p, differentiable=True), "differentiable=True"),
    "curvature": (lambda p: lf.CurvatureSGD(p), "CurvatureSGD", "evaluates the model itself"),
    "wrapped": (lambda p: lf.XGrad(lamb(p)), "XGrad", "after a whole step"),
}


@pytest.mark.parametrize("what", WORDS)
def test_refused(what):
    build, *words = WORDS[what]
    params = parameters()
    opt = build(params)
    with refused(ValueError, "release gradients", *words):
        opt.release_gradients()
    backward(params, 0)
    assert all(p.grad is not None for p in params)


def test_groups_that_are_wrong_anyway():
    params = parameters((4, 3))
    opt = lamb(params)
    opt.param_groups[0]["layer"] = 3
    with refused(ValueError, "layer=3"):
        opt.release_gradients()
    opt.param_groups[0]["layer"] = 2
    backward(params, 0)
    opt.step()
    assert params[0].grad is not None and opt._released is None


def test_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr(release, "is_traceable_wrapper_subclass", lambda p: True)
    with refused(ValueError, "Parameter parameters", "ranks"):
        lamb(parameters()).release_gradients()


def test_twice_and_around_it():
    opt, params, twin, twins, _ = pair(lamb)
    with refused(ValueError, "released already", "remove()"):
        twin.release_gradients()
    with refused(ValueError, "XGrad", "remove()"):
        lf.XGrad(twin)
    train(opt, params), train(twin, twins)
    assert_equal(opt, params, twin, twins)


def test_a_layer_of_the_whole_group_without_layerwise_factor():
    """AdamW has no layers, whatever its groups say."""
    opt, params, twin, twins, _ = pair(lambda params: lf.AdamW([{"params": params, "layer": "group"}]))
    train(opt, params), train(twin, twins)
    assert_equal(opt, params, twin, twins)


def test_clipping_that_is_switched_on():
    params = parameters()
    opt = lamb(params)
    opt.release_gradients()
    backward(params, 0)
    before = snapshot(opt, params)
    opt.defaults["max_grad_norm"] = 1.0
    with refused(ValueError, "max_grad_norm=1.0"):
        backward(params, 0)
    assert_same(snapshot(opt, params), before)


def test_a_closure_steps_in_its_backward_pass():
    params, twins = parameters(), parameters()
    opt, twin = lamb(params), lamb(twins)
    twin.release_gradients()
    for n in range(2):
        opt.zero_grad()
        opt.step(lambda n=n: backward(params, n))
        twin.step(lambda n=n: backward(twins, n))
    assert_equal(opt, params, twin, twins)


def test_steps_that_come_too_late():
    params = parameters()
    opt = lamb(params)
    opt.release_gradients()
    before = snapshot(opt, params)
    with refused(ValueError, "grad_norm", "step"):
        opt.step(grad_norm=1.0)
    assert_same(snapshot(opt, params), before)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(p.sum() for p in params)).backward()
    with refused(AssertionError, "No inf checks"):  # torch's own
        scaler.step(opt)
    opt.found_inf = torch.zeros(())  # as GradScaler does where the optimizer unscales
    with refused(ValueError, "GradScaler"):
        opt.step()


@pytest.mark.parametrize("backend", ENGINES)
def test_a_gradient_that_cannot_be_used(backend):
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = lamb(embedding.parameters(), backend=backend)
    opt.release_gradients()
    before = snapshot(opt, [embedding.weight])
    for _ in range(2):
        with refused(ValueError, "sparse=False"):
            embedding(torch.tensor([1, 2])).sum().backward()
        embedding.weight.grad = None
    assert_same(snapshot(opt, [embedding.weight]), before)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("view", [False, True])
def test_distributed_data_parallel_is_found_out(view):
    """One process is enough: DDP brings gradients back after every backward pass."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), gradient_as_bucket_view=view)
        opt = lf.AdamW(net.named_parameters())
        opt.release_gradients()
        net(torch.ones(1, 3)).sum().backward()
        with refused(RuntimeError, "'module.", "DistributedDataParallel"):
            opt.step()
    finally:
        dist.destroy_process_group()
