"""The CUDA engine, built for the host: weight prediction."""

from cuda_cases import Cuda
from device_predict import *  # noqa: F403

ENGINE = Cuda
