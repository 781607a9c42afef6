"""What a group says a layer is, on the Triton engine."""

from device_layers import *  # noqa: F403
from triton_cases import MARKS, Triton

ENGINE, pytestmark = Triton, MARKS
