"""What `precision` says, written from definitions: numbers as float64, neighbours and distances instead of bit tricks.

Philox in Python's integers, straight from the paper; nothing here is shared with the package.
"""

import numpy as np
import torch

DIGITS = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}  # bits of a significand, exponent of the least number
LARGEST = {torch.bfloat16: 2.0**128, torch.float16: 2.0**16}  # what is not finite any more


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC'11, section 3.3): four words."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = b >> 32 ^ x1 ^ k0, b % 2**32, a >> 32 ^ x3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def noise(n, seed, place, t):
    """16 random bits for each of n elements that lie behind one another."""
    found = []
    for block in range(-(-n // 8)):
        words = philox((block, place >> 32, place % 2**32, t), (seed % 2**32, seed >> 32))
        found += [half for word in words for half in (word % 2**16, word >> 16)]
    return np.array(found[:n], dtype=np.float64)


def distances(x, dtype):
    """|x| as a multiple of the distance of neighbours there, and that distance; float64, exact."""
    bits, least = DIGITS[dtype]
    exponent = np.frexp(x)[1] - bits
    unit = np.ldexp(1.0, np.maximum(exponent, least))
    return np.abs(x) / unit, unit


def typed(magnitude, x, dtype):
    """Numbers of the type with the signs of x; too large ones are infinite, and what is not finite stays what it is."""
    found = np.copysign(np.where(magnitude >= LARGEST[dtype], np.inf, magnitude), x)
    return torch.from_numpy(np.where(np.isfinite(x), found, x)).to(dtype)


def float64(x):
    return x.detach().double().numpy()


def stochastic(x, dtype, noise):
    """Up where the way from the lower neighbour, in units of the distance, and noise / 2^16 make one.

    Numbers below 2^-32 become zero in float16: they are less than 2^-8 of a distance.
    """
    x = float64(x)
    with np.errstate(invalid="ignore"):
        multiple, unit = distances(x, dtype)
        lower = np.floor(multiple)
        up = multiple - lower + noise / 2**16 >= 1
        if dtype == torch.float16:
            up &= np.abs(x) >= 2.0**-32
        return typed((lower + up) * unit, x, dtype)


def int32(x):
    return x.contiguous().view(torch.int32).long().numpy()


def remainder(x):
    """bfloat16 with ties away from zero, and what the bits of x are beside it."""
    flat = float64(x)
    with np.errstate(invalid="ignore"):
        multiple, unit = distances(flat, torch.bfloat16)
        high = typed(np.floor(multiple + 0.5) * unit, flat, torch.bfloat16)
    low = int32(x) - int32(high.float())
    return high, torch.from_numpy(np.where(np.isnan(flat), 0, low)).to(torch.int16)


def kahan(x, dtype):
    """The nearest number, and the one nearest to what that is short of."""
    p = x.to(dtype)
    lost = x.double() - p.double()
    return p, torch.where(lost.isfinite(), lost, 0.0).float().to(dtype)


def stored(word, x, dtype, noise=None):
    """A parameter of 16 bits and its rest (None: it has none) for float32 numbers x."""
    if word == "remainder":
        return remainder(x)
    if word == "kahan":
        return kahan(x, dtype)
    if word == "stochastic":
        return stochastic(x, dtype, noise), None
    return x.to(dtype), x.clone() if word == "master" else None


def joined(word, p, rest):
    """The float32 numbers that they stand for."""
    if word == "master":
        return rest.clone()
    if word == "kahan":
        return p.float() + rest.float()
    if word == "remainder":
        bits = (int32(p.float()) + rest.long().numpy()) % 2**32
        return torch.from_numpy(np.atleast_1d(bits).astype(np.uint32).view(np.float32)).view(p.shape)
    return p.float()
