"""Lightning and LAMB with bf16 autocast: clipping in the step's own native call, and a run resumed from a checkpoint.

Lightning refuses `gradient_clip_val` where an optimizer says that it unscales gradients itself, as torch's fused ones
do (`_step_supports_amp_scaling`; with bf16, too, where nothing is scaled). Ours by default do not say so: it works, and
`max_grad_norm`, in LAMB 1.0 unless told otherwise, does the same in fewer passes over the gradients. For
`layer_stats()` in a module ask `self.optimizers(use_pl_optimizer=False)`, not Lightning's wrapper. Curvature optimizers
need manual optimization.
"""

from functools import partial
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from torch import nn

import layerfused as lf

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
X = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
BATCHES = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X.sin()), batch_size=32)


class Regression(pl.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.net, self.optimizer = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), optimizer

    def training_step(self, batch, index):
        loss = (self.net(batch[0]) - batch[1]).square().sum(1).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        opt = self.optimizer(lf.param_groups(self.net), lr=0.02)
        return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=8)]


def fit(epochs, optimizer, clip=None, checkpoint=None):
    torch.manual_seed(0)
    trainer = pl.Trainer(accelerator="cpu", precision="bf16-mixed", max_epochs=epochs, gradient_clip_val=clip, **QUIET)
    trainer.fit(Regression(optimizer), BATCHES, ckpt_path=checkpoint)
    return trainer, trainer.callback_metrics["loss"].item()


with TemporaryDirectory() as folder:
    half, first = fit(4, lf.LAMB)
    half.save_checkpoint(f"{folder}/half.ckpt")
    resumed, _ = fit(8, lf.LAMB, checkpoint=f"{folder}/half.ckpt")
whole, last = fit(8, lf.LAMB)
opt = whole.optimizers[0]
print("engines", opt.engines, "native calls a step", opt.traffic()["launches"])
by_lightning = fit(8, partial(lf.LAMB, max_grad_norm=None), clip=1.0)[1]
print("loss", first, "->", last, "clipped by Lightning", by_lightning)
print("the same resumed", all(map(torch.equal, whole.model.parameters(), resumed.model.parameters())))
try:
    fit(1, partial(torch.optim.AdamW, fused=True), clip=1.0)
except RuntimeError as error:
    print("torch's fused AdamW:", error)
