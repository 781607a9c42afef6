"""Real data small enough for two cores: scikit-learn's 8 x 8 digits, a convolutional network, an autoencoder."""

from collections import OrderedDict

import torch
from torch import nn

from .training import Data, Split, Task, entropy

CLASSES = 10


def load(seed=0):
    """The 1,797 digits in 1,077 / 360 / 360, each class in the same proportion everywhere."""
    from sklearn.datasets import load_digits  # here: the bench's other commands do without scikit-learn
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)
    return Data(*(_split(*part) for part in ((x, y), (x_val, y_val), (x_test, y_test))))


def in_bfloat16(task):
    """The same task with images, weights and gradients in bfloat16; losses in float32."""
    data = Data(*(Split(part.x.bfloat16(), part.y) for part in task.data))
    network, loss = lambda seed: task.network(seed).bfloat16(), lambda found, y: task.loss(found.float(), y)
    return task._replace(data=data, network=network, loss=loss, sample=data.train)


def _split(x, y):
    return Split(torch.tensor(x, dtype=torch.float32).div_(8).sub_(1).view(-1, 1, 8, 8), torch.tensor(y))  # 0 to 16


def network(seed=0, width=8):
    """Four convolutions with GroupNorm and a classifier, 17 thousand parameters in 14 tensors; same seed, same weights.

    GroupNorm has no running means, so what is evaluated is what was trained, from the first step on. Pooling rather
    than strides: the backward of one strided convolution took 3 ms of the step's 12 (one thread, batch 512).
    """
    torch.manual_seed(seed)
    channels = [1, width, 2 * width, 4 * width, 4 * width]
    layers = OrderedDict()
    for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False), 1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{i}"] = nn.GroupNorm(4, after)
        layers[f"relu{i}"] = nn.ReLU()
        if i <= 2:  # 8 x 8 images end as 2 x 2
            layers[f"pool{i}"] = nn.AvgPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(4 * channels[-1], CLASSES)
    return nn.Sequential(layers)


def autoencoder(seed=0):
    """64 pixels to 8 numbers and back by way of 128 and 32, tanh between: 26 thousand parameters in 12 tensors."""
    torch.manual_seed(seed)
    sizes = (64, 128, 32, 8, 32, 128, 64)
    layers = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        layers[f"linear{i}"] = nn.Linear(before, after)
        layers[f"tanh{i}"] = nn.Tanh()
    del layers[f"tanh{i}"]
    return nn.Sequential(layers)


def classification(everything=False):
    """Which digit is it? With `everything` all 1,797 are trained on and none is left to be judged by."""
    data = load()
    if everything:
        whole = Split(*(torch.cat(parts) for parts in zip(*data, strict=True)))
        data = Data(whole, None, None)
    return Task(data, network, entropy, data.train, "accuracy", facts(data))


def reconstruction():
    """The digit itself out of eight numbers; the loss is the mean over images and pixels."""
    data = Data(*(Split(part.x, part.x.flatten(1)) for part in load()))
    return Task(data, autoencoder, nn.functional.mse_loss, data.train, "loss", facts(data))


def facts(data):
    sizes = {split: len(part.y) for split, part in data._asdict().items() if part}
    return {"source": "sklearn.datasets.load_digits, split with random_state 0", "images": sizes}
