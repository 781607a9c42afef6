"""The Triton engine's bits. What programs do that run at once is in test_triton_schedules.py."""

from device_bits import *  # noqa: F403
from triton_cases import MARKS, Triton

ENGINE, pytestmark = Triton, MARKS
