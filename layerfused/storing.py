"""How numbers are stored by the words of `precision`: csrc/storage.h and csrc/philox.h in torch, bit for bit."""

import torch

MULTIPLIERS, KEYS, WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def join(p: torch.Tensor, rest: torch.Tensor, way: str) -> torch.Tensor:
    """The float32 numbers that a parameter and its rest stand for."""
    if way == "master":
        return rest
    if way == "kahan":
        return p.float() + rest.float()
    return ((p.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split(x: torch.Tensor, dtype: torch.dtype, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter of 16 bits and its rest, of float32 numbers.

    Of "remainder" the parameter is rounded with ties away from zero: 16 bits cannot tell which way a tie to even went.
    """
    if way == "master":
        return x.to(dtype), x
    if way == "kahan":
        p = x.to(dtype)
        lost = x - p.float()
        return p, lost.where(lost.isfinite() & x.isfinite(), 0.0).to(dtype)
    bits = x.view(torch.int32)
    high = torch.where(x.isnan(), (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = bits.where(~x.isnan(), 0)
    return low_half(high).view(torch.bfloat16), low_half(low)


def low_half(bits: torch.Tensor) -> torch.Tensor:
    """The lower 16 bits of int32, as int16."""
    return ((bits & 0xFFFF) ^ 0x8000).sub(0x8000).to(torch.int16)


def begin_anew(p: torch.Tensor, rest: torch.Tensor, way: str) -> None:
    """What of a rest does not belong to its parameter becomes that of one just rounded: somebody else wrote `p`."""
    if way == "kahan":  # up to half a distance: a tie may round to the other side, a little less than it does not
        kept = (p.float() + (1 - torch.finfo(p.dtype).eps / 4) * rest.float()).to(p.dtype) == p
    else:
        kept = split(join(p, rest, way), p.dtype, way)[0] == p
    rest.copy_(rest.where(kept, p.to(rest.dtype) if way == "master" else 0))


def stochastic(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """Float32 numbers in bfloat16 or float16, up or down by 16 random bits each."""
    bits = x.view(torch.int32).long() & WORD
    if dtype == torch.bfloat16:
        rounded = (bits + noise) >> 16
    else:
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + (noise >> 3) >> 13).clamp(max=0x7C00)
        shift = 126 - (magnitude >> 23)  # bits of the significand under 2^-24
        significand = ((magnitude & 0x7FFFFF) | 0x800000) << 16  # in units of the noise's last bit at shift 16
        subnormal = (significand + (noise << shift.clamp(0, 31)) >> shift.clamp(0, 31) >> 16).where(shift <= 31, 0)
        rounded = normal.where(magnitude >= 113 << 23, subnormal) | (bits >> 16 & 0x8000)
    return low_half(rounded.int()).view(dtype).where(x.isfinite(), x.to(dtype))


def noise_of(p: torch.Tensor, seed: int, place: int, t: int) -> torch.Tensor:
    """16 random bits for each element of a tensor, shaped like it: a function of where it lies in memory and of t."""
    blocks = -(-p.numel() // 8)
    draws = philox((torch.arange(blocks, device=p.device), place >> 32, place, t), (seed, seed >> 32))
    halves = torch.stack([word >> shift & 0xFFFF for word in draws for shift in (0, 16)], dim=1).reshape(-1)
    order = sorted(range(p.ndim), key=p.stride, reverse=True)  # of the dimensions in memory
    there = halves[: p.numel()].reshape([p.shape[k] for k in order])
    return there.permute([order.index(k) for k in range(p.ndim)])


def philox(counter: tuple, key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11) on int64 tensors: four words of 32 bits for each first word of `counter`."""
    a, b, c, d = (torch.as_tensor(word, device=counter[0].device).expand_as(counter[0]) & WORD for word in counter)
    for number in range(10):
        low, high = (k + number * step & WORD for k, step in zip(key, KEYS, strict=True))
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # modulo 2^64: the sign bit is a bit like any other
        a, b, c, d = (second >> 32) & WORD ^ b ^ low, second & WORD, (first >> 32) & WORD ^ d ^ high, first & WORD
    return [a, b, c, d]
