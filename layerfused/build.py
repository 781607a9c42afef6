"""From parameter groups to launches: what lies here, what goes into one launch, and what ranks have to exchange."""

from collections import defaultdict

from .backends import engines_of, launch_of
from .exchange import Exchange, agree
from .parts import Parts
from .precision import check_parameter, rest_of, words_of
from .reports import names_of


def find_parts(optimizer, compare: bool) -> Parts:
    """What lies here of parameters that are spread over ranks.

    Args:
        compare: with what the other ranks hold.
    """
    parts = Parts(optimizer._params, names_of(optimizer.param_groups))
    for group in optimizer.param_groups if parts.of else ():
        rule = optimizer.rule_of(group)
        for p in group["params"]:
            if p in parts.of:
                parts.of[p].states = (*rule.states, rest_of(words_of(group["precision"]), p.dtype))
                parts.of[p].layers = f"rule {rule.name}, layer={group['layer']!r}, adapt={group['adapt']}"
    for mesh in parts.meshes if compare else ():
        agree(mesh, parts.told(mesh))
    return parts


def members(optimizer, taken: dict) -> dict:
    """Of each launch, told apart by what has to be alike in it, a group's number -> its tensors there.

    Args:
        taken: the states by tensor, as engines see them.

    Raises:
        ValueError: for what no engine can serve.
    """
    found, parts = defaultdict(dict), optimizer._parts
    for number, group in enumerate(optimizer.param_groups):
        rule = optimizer.rule_of(group)
        if rule.needs_adapt and not group["adapt"]:
            name = type(optimizer).__name__
            raise ValueError(f"adapt=False leaves nothing of {name}: use adapt=True (or adapt=None)")
        words, params = _words(optimizer, group), [parts.here(p) for p in group["params"]]
        for p, engine in zip(params, engines_of({**group, "params": params}, rule), strict=True):
            share = parts.share(parts.param(p))
            if share and engine == "reference" and rule.layerwise:
                raise ValueError(
                    f"parameter {parts.of[parts.param(p)].name} of {p.dtype} is spread over ranks, and the reference "
                    "engine takes whole layers only: use float32, bfloat16 or float16 and backend='auto'"
                )
            variant = launch_of(engine).variant(p, taken[p], rule, words)
            alone = id(p) if optimizer._released else None
            found[engine, p.device, rule, variant, share, alone].setdefault(number, []).append(p)
        apart = sum(number in lists for lists in found.values()) > 1 or parts.differ(group["params"])
        if group["layer"] == "group" and rule.layerwise and apart:
            raise ValueError(
                "layer='group' needs states of one type on this engine: load them alike, or cast them; and tensors "
                "that are spread over ranks alike: give others a group of their own"
            )
    return found


def _words(optimizer, group: dict) -> tuple[str, ...]:
    """The words of a group's `precision`, fit for its parameters."""
    words = words_of(group["precision"])
    if words and (optimizer._lead or not optimizer.takes_precision or group["differentiable"]):
        what = "XGrad" if optimizer._lead else type(optimizer).__name__
        what = "differentiable=True" if group["differentiable"] else what
        raise ValueError(f"{what} needs precision=None, got {group['precision']!r}")
    for p in group["params"]:
        check_parameter(words, p)
    return words


def exchanges(parts: Parts, shares) -> list[Exchange]:
    """What is to be exchanged over each mesh, given each launch with its `Parts.share`."""
    found, shares = [], list(shares)
    for mesh, dims in parts.meshes.items():
        own = [(launch, share[1]) for launch, share in shares if share and share[0] == mesh]
        for launch, _ in own:
            launch.spread = True
        if dims:
            found.append(Exchange(mesh, dims, own, parts.numbers))
    return found
