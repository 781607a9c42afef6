"""The devices that `model` knows, as data: what their sheets say, what others have measured, what is guessed.

Measured numbers are from the result files of the project te42kyfo/gpu-benches: gpu-l2-cache/{h200,h100_pcie,a100_80,
l40}.txt (L2), gpu-latency/{h100_pcie,l40}.txt and cuda-latency/a100_80.txt (pointer chases), cuda-stream/a100_80.txt,
gpu-stream/l40.txt (copies) and gpu-small-kernels/{h200,a100_80}_graph.txt (tiny kernels, reads with writes).
"""

import dataclasses
from dataclasses import dataclass

REGISTERS = 65536  # on each multiprocessor of every device here


@dataclass(frozen=True)
class Gpu:
    """One device; bytes, bytes a second, seconds and Hz.

    Attributes:
        processors: multiprocessors.
        clock: under a load of memory traffic.
        sheet_bandwidth: of DRAM, by the data sheet.
        copy_share: of that which a large copy reaches.
        l2_bytes: by the data sheet.
        l2_share: of that which still serves at full speed when all of it is in use; the rest is lost to copies in
            both halves and to sets that are full before others.
        l2_read, l2_write: bandwidths. Writes follow from kernels that read and write as much.
        l2_s: latency of a hit, mean of the near and the far half. dram_s: of a miss on an idle device.
        atomic_s: of an atomic whose answer is waited for.
        launch_s: from the end of a kernel to the start of the next in the same stream.
    """

    name: str
    processors: int
    clock: float
    sheet_bandwidth: float
    copy_share: float
    l2_bytes: float
    l2_share: float
    l2_read: float
    l2_write: float
    l2_s: float
    dram_s: float
    atomic_s: float
    launch_s: float

    @property
    def bandwidth(self):
        return self.copy_share * self.sheet_bandwidth

    @property
    def l2_capacity(self):
        return self.l2_share * self.l2_bytes


MIB = 2**20
H200 = Gpu(
    "h200",
    processors=132,
    clock=1.755e9,
    sheet_bandwidth=4.8e12,
    copy_share=0.9,  # [estimate] 4.3 TB/s
    l2_bytes=50 * MIB,  # torch reports 60 MB on one machine
    l2_share=0.86,  # 43 MiB: at 44 MB it is 6 % slower, at 48 MB 22 %
    l2_read=9.7e12,
    l2_write=4.6e12,  # [estimate] 33 MB read and written by one kernel in 5.4 µs beside its launch
    l2_s=211e-9,  # 265 and 475 cycles at 1,755 MHz, on an H100
    dram_s=370e-9,  # 650 cycles, likewise
    atomic_s=400e-9,  # [estimate] twice a hit
    launch_s=1.9e-6,  # a tiny kernel every 2.3 µs, less one miss
)
A100 = Gpu(
    "a100",
    processors=108,
    clock=1.41e9,
    sheet_bandwidth=2.039e12,
    copy_share=0.85,  # 1,732 GB/s
    l2_bytes=40 * MIB,
    l2_share=0.7,  # at 28 MB it is 4 % slower, at 31 MB 26 %
    l2_read=5.4e12,
    l2_write=2.9e12,  # [estimate] as on the H200: 21 MB in 5.5 µs
    l2_s=225e-9,  # 211 and 424 cycles
    dram_s=404e-9,  # 570 cycles
    atomic_s=450e-9,  # [estimate]
    launch_s=0.9e-6,  # a tiny kernel every 1.3 µs
)
GPUS = {
    "h200": H200,
    "h100": dataclasses.replace(
        H200,
        name="h100",  # SXM
        sheet_bandwidth=3.35e12,
        copy_share=0.9,  # [estimate]
        l2_share=0.7,  # 36 MB on a PCIe card; the SXM card may be like the H200
        l2_read=8.0e12,  # [estimate] 6.9 on a PCIe card with 114 multiprocessors
        l2_write=4.0e12,  # [estimate]
    ),
    "a100": A100,  # SXM, 80 GB
    "l4": Gpu(
        "l4",
        processors=58,
        clock=1.6e9,  # [estimate] 2.04 GHz is not kept within 72 W
        sheet_bandwidth=0.3e12,
        copy_share=0.9,  # an L40's
        l2_bytes=48 * MIB,
        l2_share=0.95,  # an L40's: 91 of 96 MB
        l2_read=1.4e12,  # [estimate] an L40's 5.2 TB/s by multiprocessors and clock
        l2_write=0.7e12,  # [estimate]
        l2_s=140e-9,  # 277 cycles on an L40, at 2 GHz
        dram_s=310e-9,  # [estimate] 631 cycles on an L40
        atomic_s=280e-9,  # [estimate]
        launch_s=1.5e-6,  # [estimate]
    ),
}


def recognised(name):
    """The device that a driver calls by this name.

    Raises:
        ValueError: for one that the table has not.
    """
    words = name.lower().replace("-", " ").split()
    for key, gpu in GPUS.items():
        if key in words:
            return gpu
    raise ValueError(f"no model of {name!r}: the table has {', '.join(GPUS)}; add the device in bench/gpus.py")


def changed(gpu, changes):
    """The device, or another frozen dataclass of constants, with other numbers, `{field: text}`.

    Raises:
        ValueError: for a field that is not a number of the table.
    """
    numbers = [field.name for field in dataclasses.fields(gpu) if field.name != "name"]
    for name, text in changes.items():
        if name not in numbers or not _positive(text):
            raise ValueError(f"{name}={text} is not FIELD=NUMBER > 0 with a FIELD of {', '.join(numbers)}")
    types = {field.name: field.type for field in dataclasses.fields(gpu)}
    return dataclasses.replace(gpu, **{name: types[name](float(text)) for name, text in changes.items()})


def _positive(text):
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
