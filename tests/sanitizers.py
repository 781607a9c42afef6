"""Programs under a sanitizer whose library the interpreter was not linked with."""

import os
import platform
import shutil
import subprocess

OPTIONS = {"PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}


def run(command, library="", timeout=300, **environment):
    """The finished process; `library` is g++'s libasan.so or libtsan.so, or "" for none."""
    environment = {**os.environ, **OPTIONS, **environment}
    if library:
        found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
        environment["LD_PRELOAD"] = found
        command = [*without_randomised_addresses(), *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def without_randomised_addresses():
    """Where the kernel randomises more bits than the sanitizers' shadow memory allows for, they do not start."""
    prefix = ["setarch", platform.machine(), "-R"]
    works = shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if works else []
