"""What LAMB saw of every layer, in TensorBoard: `tensorboard --logdir runs` draws a curve for each trust ratio.

On a GPU reading `layer_stats()` waits for the device, so it is read every tenth step. The first argument is the folder
for the events, by default runs.
"""

import sys

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import layerfused as lf

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))
opt = lf.LAMB(lf.param_groups(model), lr=0.02)  # named parameters: the curves have their names
x = torch.randn(256, 16)
y = x[:, :4].abs().argmax(dim=1)
with SummaryWriter(sys.argv[1] if len(sys.argv) > 1 else "runs") as writer:
    for step in range(100):
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 10 == 9:
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("grad_norm", opt.grad_norm, step)
            for layer, stats in opt.layer_stats().items():
                for name, value in stats.items():  # param_norm, update_norm, trust_ratio
                    writer.add_scalar(f"{name}/{layer}", value, step)
print("engines", opt.engines, "native calls a step", opt.traffic()["launches"], "events in", writer.log_dir)
for layer, stats in opt.layer_stats().items():
    print(layer, stats["trust_ratio"])
