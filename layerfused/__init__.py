"""Layer-wise optimizers for PyTorch, each step one launch for the whole model."""

import torch  # noqa: F401  first, so that the native engine shares torch's OpenMP runtime

try:
    from . import _cpu  # noqa: F401
except ImportError as error:
    raise ImportError(f"layerfused._cpu is not built ({error}): run `pip install .` with a C++17 compiler") from error

from .adabelief import AdaBelief
from .adam import Adam, AdamW
from .adam3 import AdaM3
from .adanorm import AdaBeliefNorm, AdamNorm
from .aida import Aida
from .curvature import CurvatureAdamW, CurvatureSGD
from .ladam import LAdaBelief, LAdam
from .lamb import LAMB, LAMBC
from .lars import LARS
from .novograd import NovoGrad
from .optimizer import Optimizer
from .param_groups import param_groups
from .rule import Rule
from .setadam import SETAdam
from .sgd import SGD
from .xgrad import XGrad

__all__ = [
    "LAMB", "LAMBC", "LARS", "SGD", "AdaBelief", "AdaBeliefNorm", "AdaM3", "Adam", "AdamNorm", "AdamW", "Aida",
    "CurvatureAdamW", "CurvatureSGD",
    "LAdaBelief", "LAdam", "NovoGrad", "Optimizer", "Rule", "SETAdam", "XGrad", "param_groups",
]  # fmt: skip
__version__ = "0.1.0"
