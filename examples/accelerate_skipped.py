"""Accelerate and LAMB: where the GradScaler skips a step, so does the schedule.

Accelerate takes a step as skipped where GradScaler did not call `step()`. Ours by default leave it that choice; torch's
fused optimizers make it in their own kernel (`_step_supports_amp_scaling`), so that Accelerate sees no skip and the
schedule runs on. Without a scaler LAMB itself skips a step whose norm is not finite: `skipped_steps` counts it, and
Accelerate does not know. It makes a scaler for fp16 on GPUs alone: here one for the CPU takes that place, with a scale
at which float32 overflows. Step 7 meets infinite data.
"""

import torch
from accelerate import Accelerator

import layerfused as lf

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def train(optimizer, lr, scale=None, **options):
    torch.manual_seed(0)
    model, accelerator, skipped, losses = torch.nn.Linear(16, 16), Accelerator(cpu=True), [], []
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    opt = optimizer(lf.param_groups(model), lr=lr, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=40)
    model, opt, schedule = accelerator.prepare(model, opt, schedule)
    for step in range(40):
        x = X * torch.inf if step == 7 else X
        loss = (model(x) - X.flip(1)).square().sum(1).mean()
        accelerator.backward(loss)
        losses.append(loss.item())
        opt.step()
        schedule.step()
        opt.zero_grad()
        skipped += [step] if accelerator.optimizer_step_was_skipped else []
    steps, scheduled = int(opt.state[model.weight]["step"]), schedule.scheduler.last_epoch
    print(f"Accelerate saw skipped {skipped}, steps {steps}, schedule {scheduled}, loss {losses[0]:.2f} -> {loss:.2f}")
    return opt.optimizer


train(torch.optim.AdamW, lr=0.05, scale=2.0**127, fused=True)
opt = train(lf.LAMB, lr=0.2, scale=2.0**127)
print("engines", opt.engines, "native calls a step", opt.traffic()["launches"])
opt = train(lf.LAMB, lr=0.2)
print("without a scaler LAMB skipped", opt.skipped_steps.item())
