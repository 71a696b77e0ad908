"""The GPUs that a plan compares: memory, speed and links of each, under SkyPilot's names.

`memory_mib` is what nvidia-smi reports, less than the name says. Dense bf16 rates, bandwidths and
fp8 are those of NVIDIA's data sheets (with sparsity they print twice the rate): L4
https://www.nvidia.com/en-us/data-center/l4/, A10G as in
https://aws.amazon.com/ec2/instance-types/g5/ (A10 with 70 of 125 TFLOP/s), L40S
https://www.nvidia.com/en-us/data-center/l40s/, A100 https://www.nvidia.com/en-us/data-center/a100/,
H100 and H200 in their SXM form https://www.nvidia.com/en-us/data-center/h200/, B200 as an eighth of
https://www.nvidia.com/en-us/data-center/dgx-b200/. Only H100 and H200 were measured with this
program: for the others a plan assumes the same fractions of these rates.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class GpuKind:
    """Dense `bf16_flops`, `bytes_per_s` of its memory, multiprocessors; `nvlink`: its machines join
    several by NVLink, else by PCIe.
    """

    name: str
    memory_mib: int
    bf16_flops: float
    bytes_per_s: float
    multiprocessors: int
    fp8: bool
    nvlink: bool

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB


GPU_KINDS = (
    GpuKind("L4", 23_034, 121e12, 300e9, 58, fp8=True, nvlink=False),
    GpuKind("A10G", 23_028, 70e12, 600e9, 72, fp8=False, nvlink=False),
    GpuKind("L40S", 46_068, 362e12, 864e9, 142, fp8=True, nvlink=False),
    GpuKind("A100", 40_960, 312e12, 1555e9, 108, fp8=False, nvlink=True),
    GpuKind("A100-80GB", 81_920, 312e12, 2039e9, 108, fp8=False, nvlink=True),
    GpuKind("H100", 81_559, 989e12, 3350e9, 132, fp8=True, nvlink=True),
    GpuKind("H200", 143_771, 989e12, 4800e9, 132, fp8=True, nvlink=True),
    GpuKind("B200", 183_359, 2250e12, 8000e9, 148, fp8=True, nvlink=True),
)
COUNTS = (1, 2, 4, 8)


def kind_of(device_name: str) -> GpuKind | None:
    """The kind that a driver's name such as `NVIDIA A100-SXM4-80GB` or `NVIDIA H100 80GB HBM3`
    means; None for others.

    >>> kind_of("NVIDIA L40S").name
    'L40S'
    """
    words = device_name.replace("-", " ").split()
    if "A100" in words:
        return _named("A100-80GB" if any("80GB" in word for word in words) else "A100")
    return next((kind for kind in GPU_KINDS if kind.name in words), None)


def _named(name: str) -> GpuKind:
    return next(kind for kind in GPU_KINDS if kind.name == name)
