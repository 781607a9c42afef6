"""What only a GPU can show of the Triton engine."""

from device_gpu import *  # noqa: F403
from device_gpu import needs_gpu
from triton_cases import Triton

ENGINE, pytestmark = Triton, needs_gpu
