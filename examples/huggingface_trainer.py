"""Hugging Face's Trainer and LAMB: a small Llama made from its config, and a run resumed from a checkpoint.

`params` takes the place of the Trainer's own groups, which leave biases and norms their trust ratio. The Trainer
measures and scales the gradients itself, even with `max_grad_norm=0`, so LAMB's own clip, one pass more, is off here;
LAMB's default, 1.0, would skip steps whose norm is not finite.
"""

from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import layerfused as lf

SIZES = dict(vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
STARTS, STRIDES = torch.arange(64)[:, None], 1 + torch.arange(64)[:, None] % 7
DATA = [{"input_ids": line, "labels": line} for line in (STARTS + STRIDES * torch.arange(16)) % 11]
SCHEDULE = dict(max_steps=40, warmup_steps=4, lr_scheduler_type="cosine", logging_steps=10, save_steps=20)
QUIET = dict(use_cpu=True, dataloader_pin_memory=False, report_to="none", disable_tqdm=True)


def train(folder, checkpoint=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None))
    args = TrainingArguments(folder, per_device_train_batch_size=16, **SCHEDULE, **QUIET)
    options = {"params": lf.param_groups(model, weight_decay=0.01), "lr": 0.1, "max_grad_norm": None}
    trainer = Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=(lf.LAMB, options))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


with TemporaryDirectory() as folder:
    whole, resumed = train(folder), train(folder, f"{folder}/checkpoint-20")
opt = whole.optimizer.optimizer  # Accelerate wraps ours
losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
print("engines", opt.engines, "native calls a step", opt.traffic()["launches"])
print("loss", losses[0], "->", losses[-1])
print("the same resumed", all(map(torch.equal, whole.model.parameters(), resumed.model.parameters())))
