"""What finding step sizes from curvature costs, in units of the model's own forward and backward pass.

Contenders take turns: forward and backward alone, then a whole step with each product. What is beyond one is the cost.
"""

import json
from pathlib import Path

import torch
from torch import nn

import layerfused as lf

from . import device as devices
from . import digits, machine, timing
from .report import aligned

OPTIMIZERS = ("CurvatureSGD", "CurvatureAdamW")
PRODUCTS = ("finite-difference", "double-backward")
BATCH = 512


def mlp():
    """Three layers, 300 thousand parameters."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, digits.CLASSES)]
    return nn.Sequential(nn.Flatten(), *layers)


MODELS = {"mlp": mlp, "conv": digits.network}


def add_arguments(parser):
    add = parser.add_argument
    add("--repeats", type=int, default=30, metavar="N", help="rounds, at least (default: 30)")
    add("--seconds", type=float, default=5, metavar="S", help="wall time of each model's rounds (default: 5)")
    add("--json", type=Path, metavar="OUT.json")


def calls(build, batch):
    """Forward and backward of a model, and steps of every optimizer with every product, each on a model of its own."""
    x, y = batch

    def loss(model):
        return nn.functional.cross_entropy(model(x), y)

    def forward_backward(model=build()):  # noqa: B008  one model for all calls
        model.zero_grad()
        loss(model).backward()

    found = {("", ""): forward_backward}
    for name in OPTIMIZERS:
        for product in PRODUCTS:
            model = build()
            opt = getattr(lf, name)(model.parameters(), product=product)
            found[name, product] = lambda model=model, opt=opt: opt.step(lambda: loss(model))
    return found


def row(model, args, batch):
    """Medians in ms and what a step costs beyond one forward and backward, in units of it."""
    contenders = calls(MODELS[model], batch)
    for call in contenders.values():
        call()
    samples = timing.interleave(list(contenders.values()), args.repeats, args.seconds)
    medians = {key: timing.summary(taken)["median_ms"] for key, taken in zip(contenders, samples, strict=True)}
    alone = medians.pop(("", ""))
    steps = [
        {"optimizer": name, "product": product, "step_ms": ms, "extra": ms / alone - 1}
        for (name, product), ms in medians.items()
    ]
    facts = {"model": model, "batch": len(batch[1]), "rounds": len(samples[0])}
    return facts | {"forward_backward_ms": alone, "steps": steps}


def run(args):
    data = digits.load().train
    rows = [row(model, args, (data.x[:BATCH], data.y[:BATCH])) for model in MODELS]
    document = machine.origin("cost", args, devices.on("cpu"), OPTIMIZERS) | {"rows": rows}
    lines = [["model", "optimizer", "product", "forward-backward ms", "step ms", "extra forward-backwards"]]
    for one in rows:
        for step in one["steps"]:
            numbers = one["forward_backward_ms"], step["step_ms"], step["extra"]
            lines.append([one["model"], step["optimizer"], step["product"], *(f"{x:.2f}" for x in numbers)])
    print(aligned(lines))
    print(f"batch {BATCH} of digits, {torch.get_num_threads()} threads; not measured: larger models, GPUs")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
