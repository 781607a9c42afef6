"""The Triton engine and its rules; `Rule` and the words around it are what a rule of one's own is written in.

Compiled and interpreted with Triton 3.6 to 3.9. With TRITON_INTERPRET=1 in the environment before the first import the
kernels run in Triton's interpreter, on CPU tensors too: slow, for tests.
"""

GET = "torch >= 2.10 for CUDA brings it along, without it pip install 'triton>=3.6,<3.10'"

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed: {GET}") from error

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if VERSION < (3, 6):
    raise ImportError(f"Triton {triton.__version__} is too old, 3.6 or newer is needed: {GET}")

from . import engine, rules, tables  # noqa: E402
from .rule import (  # noqa: E402
    Element,
    G,
    M,
    P,
    Rule,
    Sweep,
    Total,
    V,
    as_left,
    average,
    correction,
    divide,
    double,
    f32,
    power,
    product,
    root,
    widen,
)
from .spec import Spec  # noqa: E402

INTERPRETED = not isinstance(engine.run, triton.JITFunction)
if INTERPRETED and VERSION == (3, 6):
    import numpy

    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        raise ImportError(
            f"Triton {triton.__version__}'s interpreter does not work with NumPy {numpy.__version__}: "
            "pip install 'numpy<2.4', or Triton 3.7"
        )

__all__ = [
    "INTERPRETED", "Element", "G", "M", "P", "Rule", "Sweep", "Total", "V", "as_left", "average", "correction",
    "Spec", "divide", "double", "engine", "f32", "power", "product", "root", "rules", "tables", "widen",
]  # fmt: skip
