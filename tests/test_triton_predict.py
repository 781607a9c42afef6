"""Weight prediction on the Triton engine."""

from device_predict import *  # noqa: F403
from triton_cases import MARKS, Triton

ENGINE, pytestmark = Triton, MARKS
