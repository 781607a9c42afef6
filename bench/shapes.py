"""The true parameter shapes of well-known models, by name, in the order the models register them.

Every list holds `(parameter name, shape)`; tied parameters stand once. Sources: torchvision's `resnet50`,
transformers' `BertModel` (bert-base-uncased, bert-large-uncased) and `GPT2LMHeadModel` (gpt2), Meta's Llama-3-8B
configuration.
"""

import json
import math
from pathlib import Path


def _norm(name, width):
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _linear(name, out_width, in_width):
    return [(f"{name}.weight", (out_width, in_width)), (f"{name}.bias", (out_width,))]


def _bottleneck(name, in_width, width, downsample):
    """One ResNet bottleneck: 1×1, 3×3, 1×1 convolutions without bias, a batch norm behind each."""
    convolutions = [(width, in_width, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
    shapes = []
    for i, shape in enumerate(convolutions, 1):
        shapes += [(f"{name}.conv{i}.weight", shape), *_norm(f"{name}.bn{i}", shape[0])]
    if downsample:
        shapes.append((f"{name}.downsample.0.weight", (4 * width, in_width, 1, 1)))
        shapes += _norm(f"{name}.downsample.1", 4 * width)
    return shapes


def resnet50():
    """ResNet-50 for ImageNet: 161 tensors, 25,557,032 elements (running statistics are buffers, not parameters)."""
    shapes = [("conv1.weight", (64, 3, 7, 7)), *_norm("bn1", 64)]
    in_width = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            shapes += _bottleneck(f"layer{stage}.{block}", in_width, width, downsample=block == 0)
            in_width = 4 * width
    return shapes + _linear("fc", 1000, 2048)


def _bert(layers, h):
    """BERT uncased with pooler, without the masked-language head."""
    inner = 4 * h
    shapes = [("embeddings.word_embeddings.weight", (30522, h)), ("embeddings.position_embeddings.weight", (512, h))]
    shapes += [("embeddings.token_type_embeddings.weight", (2, h)), *_norm("embeddings.LayerNorm", h)]
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes += _linear(f"{layer}.attention.self.{part}", h, h)
        shapes += _linear(f"{layer}.attention.output.dense", h, h) + _norm(f"{layer}.attention.output.LayerNorm", h)
        shapes += _linear(f"{layer}.intermediate.dense", inner, h)
        shapes += _linear(f"{layer}.output.dense", h, inner) + _norm(f"{layer}.output.LayerNorm", h)
    return shapes + _linear("pooler.dense", h, h)


def bert_base():
    """BERT-base: 199 tensors, 109,482,240 elements."""
    return _bert(12, 768)


def bert_large():
    """BERT-large: 391 tensors, 335,141,888 elements."""
    return _bert(24, 1024)


def _conv1d(name, in_width, out_width):
    """GPT-2 keeps its linear weights transposed: (in, out)."""
    return [(f"{name}.weight", (in_width, out_width)), (f"{name}.bias", (out_width,))]


def gpt2():
    """GPT-2 small, the output head tied to the embedding and counted once: 148 tensors, 124,439,808 elements."""
    h = 768
    shapes = [("transformer.wte.weight", (50257, h)), ("transformer.wpe.weight", (1024, h))]
    for i in range(12):
        layer = f"transformer.h.{i}"
        shapes += _norm(f"{layer}.ln_1", h) + _conv1d(f"{layer}.attn.c_attn", h, 3 * h)
        shapes += _conv1d(f"{layer}.attn.c_proj", h, h) + _norm(f"{layer}.ln_2", h)
        shapes += _conv1d(f"{layer}.mlp.c_fc", h, 4 * h) + _conv1d(f"{layer}.mlp.c_proj", 4 * h, h)
    return shapes + _norm("transformer.ln_f", h)


def many_small():
    """No model: 400 × {[256], [256], [256, 256]}, 1,200 tensors, where the calls cost more than the arithmetic."""
    shapes = []
    for i in range(400):
        shapes += [*_norm(f"blocks.{i}.norm", 256), (f"blocks.{i}.linear.weight", (256, 256))]
    return shapes


def tiny():
    """No model: 300 tensors of 16 elements; the step is all host time."""
    return [(f"vectors.{i}", (16,)) for i in range(300)]


def many_groups():
    """No model: 465 tensors of 16 elements, for `groups+X`, as layer-wise learning rates make them."""
    return [(f"vectors.{i}", (16,)) for i in range(465)]


def llama_8b_slice():
    """4 of the 32 decoder layers of Llama-3-8B, no embedding, final norm or head: 36 tensors, 872,448,000 elements."""
    h, kv, inner = 4096, 1024, 14336
    shapes = []
    for i in range(4):
        layer = f"model.layers.{i}"
        for part, rows in {"q": h, "k": kv, "v": kv, "o": h}.items():
            shapes.append((f"{layer}.self_attn.{part}_proj.weight", (rows, h)))
        for part, shape in {"gate": (inner, h), "up": (inner, h), "down": (h, inner)}.items():
            shapes.append((f"{layer}.mlp.{part}_proj.weight", shape))
        shapes += [(f"{layer}.{norm}.weight", (h,)) for norm in ("input_layernorm", "post_attention_layernorm")]
    return shapes


MODELS = {
    "resnet50": resnet50,
    "bert-base": bert_base,
    "bert-large": bert_large,
    "gpt2": gpt2,
    "many-small": many_small,
    "tiny": tiny,
    "many-groups": many_groups,
    "llama-8b-slice": llama_8b_slice,
}


def _entry(index, entry):
    """`[name, shape]` or a bare shape; a bare one is named by its place in the file."""
    name, shape = entry if len(entry) == 2 and isinstance(entry[0], str) else (f"tensor.{index}", entry)
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape of {name} must be a list of sizes >= 0, got {shape}")
    return name, tuple(shape)


def sharded(shapes, ranks):
    """What lies on the first of so many ranks, as FSDP cuts: dimension 0 is divided, rounding up."""
    return [(name, (-(-shape[0] // ranks), *shape[1:]) if shape else shape) for name, shape in shapes]


def load(name):
    """The shapes of a model by name, or of a JSON file holding a list of `[name, shape]` or of shapes.

    `NAME:RANKS` is what lies on the first of so many ranks.
    """
    whole, _, ranks = name.rpartition(":")
    if whole and ranks.isdecimal() and int(ranks):
        return sharded(load(whole), int(ranks))
    if name in MODELS:
        return MODELS[name]()
    if not name.endswith(".json"):
        raise ValueError(f"unknown shapes {name!r}: give one of {', '.join(MODELS)} or a FILE.json")
    return [_entry(i, entry) for i, entry in enumerate(json.loads(Path(name).read_text()))]


def elements(shapes):
    """The number of elements in all tensors of a list of shapes."""
    return sum(math.prod(shape) for _, shape in shapes)
