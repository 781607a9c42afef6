"""Ways of storing on the Triton engine (device_precision.py)."""

from device_precision import *  # noqa: F403
from triton_cases import MARKS, Triton

ENGINE, pytestmark = Triton, MARKS
