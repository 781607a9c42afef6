"""How an optimizer is named on the command line: `[clip+][xgrad+][groups+][package.]Name[:flag…][(key=value, …)]`.

`LAMB(max_grad_norm=None)` is layerfused's, `torch.AdamW:fused` is `torch.optim.AdamW(…, fused=True)`,
`pytorch_optimizer.Lamb` any importable class, `clip+X` puts `clip_grad_norm_(params, 1.0)` before X's step,
`xgrad+X` is `layerfused.XGrad` around X, and `groups+X` has a group for each tensor, whose lr is set before each step.
"""

import ast
import importlib
import re
from dataclasses import dataclass, field

import layerfused

FORM = re.compile(
    r"(?P<clip>clip\+)?(?P<xgrad>xgrad\+)?(?P<groups>groups\+)?(?P<path>[A-Za-z_][\w.]*)(?P<flags>(:\w+)*)(\((?P<arguments>.*)\))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Spec:
    """One parsed name; `text` is what the user wrote and what rows and plots show."""

    text: str
    package: str
    name: str
    flags: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    clip: bool = False
    xgrad: bool = False
    groups: bool = False

    @property
    def engine(self):
        """What does the work in an optimizer that is not ours, which alone can tell its engines."""
        return ":".join((self.package.partition(".")[0], *self.flags))


def split(text):
    """Cuts a list at its commas, but not at those inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (not quote) * ((c in "([{") - (c in ")]}"))
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def _options(text, arguments):
    """The keyword arguments, literals only: a bench's command line must not run code."""
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("positional argument")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"optimizer {text!r}: arguments must be key=literal, …, got ({arguments})") from error


def parse(text):
    """A `Spec` from its text; raises ValueError where the text has another form."""
    match = FORM.fullmatch(text.strip())
    if match is None:
        form = "[clip+][xgrad+][groups+][package.]Name[:flag][(key=value, …)]"
        raise ValueError(f"optimizer {text!r} is not of the form {form}")
    package, _, name = match["path"].rpartition(".")
    package = {"": "layerfused", "torch": "torch.optim"}.get(package, package)
    flags = tuple(match["flags"].split(":")[1:])
    options = dict.fromkeys(flags, True) | _options(text, match["arguments"] or "")
    prefixes = {prefix: bool(match[prefix]) for prefix in ("clip", "xgrad", "groups")}
    return Spec(text.strip(), package, name, flags, options, **prefixes)


def build(spec, params):
    """The optimizer over params; ImportError where the package is absent, ValueError where it has no such class."""
    package = importlib.import_module(spec.package)
    if not hasattr(package, spec.name):
        raise ValueError(f"{spec.package} has no optimizer {spec.name!r}")
    groups = [{"params": [p]} for p in params] if spec.groups else params
    opt = getattr(package, spec.name)(groups, **spec.options)
    return layerfused.XGrad(opt) if spec.xgrad else opt
