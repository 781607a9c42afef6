"""CUDA launches as parts of an optimizer (device_tables.py). Their host side is in test_cuda_host.py."""

from cuda_cases import Cuda
from device_tables import *  # noqa: F403

ENGINE = Cuda
