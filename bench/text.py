"""A character model of text that every Python has: the sources of its own standard library."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .training import Data, Split, Task, entropy

WINDOW = 32  # characters that the network sees of a place in the text
BYTES = {"train": 2**19, "validation": 2**16, "test": 2**16}
PLACES = {"validation": 3, "test": 7}  # of each eight files in alphabetical order; the other six are trained on
SAMPLE = 512  # windows of the training split, evenly spread, whose loss is the training loss


class Part(NamedTuple):
    """The text of one split and the files that it is from, the last one cut off."""

    text: bytes
    files: list[str]


def sources():
    """Public modules (no packages) of the standard library in alphabetical order; _sysconfigdata is the machine's."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))


def part(split, size):
    """The split's files one after the other, until there are `size` bytes."""
    text, files = b"", []
    for k, path in enumerate(sources()):
        if len(text) < size and split == next((name for name, at in PLACES.items() if k % 8 == at), "train"):
            text += path.read_bytes()
            files.append(path.name)
    return Part(text[:size], files)


def windows(text, symbols):
    """Non-overlapping windows and, as labels, what follows each character; bytes not in `symbols` are all one."""
    number = torch.zeros(256, dtype=torch.long)
    number[torch.tensor(symbols)] = torch.arange(1, len(symbols) + 1)
    codes = number[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]
    usable = (len(codes) - 1) // WINDOW * WINDOW
    return Split(codes[:usable].view(-1, WINDOW), codes[1 : usable + 1].view(-1, WINDOW))


class Network(nn.Module):
    """An embedding, a recurrent layer of gated units and a classifier: 28 thousand parameters in 7 tensors."""

    def __init__(self, symbols, width=64):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width // 2)
        self.gru = nn.GRU(width // 2, width, batch_first=True)
        self.linear = nn.Linear(width, symbols)

    def forward(self, x):
        return self.linear(self.gru(self.embedding(x))[0])


def modelling(share=1):
    """Which character comes next? `share` makes all three splits that much smaller."""
    parts = {split: part(split, size // share) for split, size in BYTES.items()}
    symbols = sorted(set(parts["train"].text))
    data = Data(**{split: windows(found.text, symbols) for split, found in parts.items()})

    def network(seed):
        torch.manual_seed(seed)
        return Network(len(symbols) + 1)

    every = max(1, len(data.train.y) // SAMPLE)
    sample = Split(*(tensor[::every] for tensor in data.train))
    return Task(data, network, entropy, sample, "loss", facts(parts, symbols))


def facts(parts, symbols):
    """Which files, how much of them, and a sum by which another Python's library is told apart."""
    found = {"source": "public modules of Python's standard library", "symbols": len(symbols) + 1, "window": WINDOW}
    for split, (text, files) in parts.items():
        found[split] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "files": files}
    return found
