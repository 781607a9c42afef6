"""Curvature step sizes on the Triton engine."""

from device_curvature import *  # noqa: F403
from triton_cases import MARKS, Triton

ENGINE, pytestmark = Triton, MARKS
