"""A timm recipe in plain torch: lr decay by depth, warm-up and cosine, EMA, bf16 autocast, and a resumed run.

Each parameter is a group with an lr of its own here. The step, LAMB's clip by the norm of all gradients in it, is one
native call still.
"""

import io
import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import layerfused as lf


def depth_groups(model, lr, decay=0.75):
    for group in lf.param_groups(model, weight_decay=0.02):
        for name, p in group["params"]:
            yield {**group, "params": [(name, p)], "lr": lr * decay ** (len(model) - 1 - int(name.split(".")[0]))}


def train(steps, file=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 5), nn.GELU(), nn.Flatten(), nn.LayerNorm(576), nn.Linear(576, 2))
    opt = lf.LAMB(depth_groups(model, lr=0.02), max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min((t + 1) / 8, (1 + math.cos(math.pi * t / 60)) / 2))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    parts, losses = dict(model=model, opt=opt, schedule=schedule, ema=ema), []
    for name, state in torch.load(file).items() if file else ():
        parts[name].load_state_dict(state)
    for step in range(schedule.last_epoch, steps):
        images = torch.randn(64, 1, 10, 10, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), (images[:, 0, 2, 7] > 0).long())  # one pixel's sign
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        ema.update_parameters(model)
        losses.append(loss.item())
    return parts, losses


whole, losses = train(60)
file = io.BytesIO()
torch.save({name: part.state_dict() for name, part in train(30)[0].items()}, file)
file.seek(0)
resumed, _ = train(60, file)
opt = whole["opt"]
print("groups", len(opt.param_groups), "engines", opt.engines, "native calls a step", opt.traffic()["launches"])
print("loss", losses[0], "->", losses[-1])
print("the same resumed", all(map(torch.equal, whole["ema"].parameters(), resumed["ema"].parameters())))
