"""The CUDA engine, built for the host: curvature step sizes."""

from cuda_cases import Cuda
from device_curvature import *  # noqa: F403

ENGINE = Cuda
