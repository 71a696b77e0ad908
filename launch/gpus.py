"""The GPUs that a plan compares: memory, speed and links of each, under SkyPilot's names.

`memory_mib` is what nvidia-smi reports, less than the name says. Dense bf16 rates with sums in
float32, bandwidths and multiprocessors come from NVIDIA's data sheets (which print twice the rate,
with sparsity):

    L4, L40S, A100      https://www.nvidia.com/en-us/data-center/l4/ and so on
    A10G                https://aws.amazon.com/ec2/instance-types/g5/ (A10 with 70 of 125 TFLOP/s)
    H100, H200          SXM, https://www.nvidia.com/en-us/data-center/h200/
    B200, B300          eighths of https://www.nvidia.com/en-us/data-center/dgx-b200/ and dgx-b300/
    GH200               https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip, 96 GB
    RTX4090, RTX6000-Ada    the white paper of the Ada architecture, appendix A
    RTX5090, RTXPRO6000     the white paper of RTX Blackwell, appendix A; the RTX PRO 6000 with
                        the slowest memory of its editions, the Max-Q's
    A6000               the white paper of GA102, appendix A
    T4                  https://www.nvidia.com/en-us/data-center/tesla-t4/
    V100                https://www.nvidia.com/en-us/data-center/v100/, SXM2

Only H100 and H200 were measured with this program: for the others a plan assumes the same fractions
of these rates. Where a chip has no bfloat16 units, `bf16_flops` is its float32 rate: PyTorch
computes bfloat16 so there (https://github.com/pytorch/pytorch/pull/148322).
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
_BFLOAT16, _FLOAT8 = (8, 0), (8, 9)  # the first compute capability that has them
# PyTorch's default builds are for CUDA 13, which supports nothing older
# (https://github.com/pytorch/pytorch/pull/175253)
FIRST_WITH_KERNELS = (7, 5)


@dataclass(frozen=True)
class GpuKind:
    """Dense `bf16_flops`, `bytes_per_s` of its memory, multiprocessors, compute `capability`;
    `nvlink`: its machines join several by NVLink, else by PCIe. `gb` is the memory that it is sold
    by.

    `also` are names that some clouds' catalogs have for it; `device` is the part of the driver's
    name that identifies it, None for the name itself. `most` is how many one machine has.
    """

    name: str
    gb: int
    memory_mib: int
    bf16_flops: float
    bytes_per_s: float
    multiprocessors: int
    capability: tuple[int, int]
    nvlink: bool = False
    also: tuple[str, ...] = ()
    device: str | None = None
    most: int = 8

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB

    @property
    def bf16(self) -> bool:
        """Whether it has bfloat16 units; without them PyTorch computes in float32, slowly, and the
        fused decoder does not run.
        """
        return self.capability >= _BFLOAT16

    @property
    def fp8(self) -> bool:
        return self.capability >= _FLOAT8

    @property
    def runs(self) -> bool:
        """Whether PyTorch's default build has kernels for it."""
        return self.capability >= FIRST_WITH_KERNELS


GPU_KINDS = (
    GpuKind("L4", 24, 23_034, 121e12, 300e9, 58, (8, 9)),
    GpuKind("A10G", 24, 23_028, 70e12, 600e9, 72, (8, 6)),
    GpuKind("L40S", 48, 46_068, 362e12, 864e9, 142, (8, 9)),
    GpuKind("A100", 40, 40_960, 312e12, 1555e9, 108, (8, 0), nvlink=True),
    GpuKind("A100-80GB", 80, 81_920, 312e12, 2039e9, 108, (8, 0), nvlink=True, also=("A100-80GB-SXM",)),
    GpuKind("H100", 80, 81_559, 989e12, 3350e9, 132, (9, 0), nvlink=True, also=("H100-SXM",)),
    GpuKind("H200", 141, 143_771, 989e12, 4800e9, 132, (9, 0), nvlink=True, also=("H200-SXM",)),
    GpuKind("B200", 180, 183_359, 2250e12, 8000e9, 148, (10, 0), nvlink=True),
    GpuKind("B300", 288, 275_040, 2250e12, 8000e9, 148, (10, 3), nvlink=True),
    GpuKind("GH200", 96, 97_871, 989e12, 4000e9, 132, (9, 0), nvlink=True, most=1),
    GpuKind("RTX4090", 24, 24_564, 165.2e12, 1008e9, 128, (8, 9), device="RTX 4090"),
    GpuKind("RTX5090", 32, 32_607, 209.5e12, 1792e9, 170, (12, 0), device="RTX 5090"),
    GpuKind("A6000", 48, 49_140, 154.8e12, 768e9, 84, (8, 6), also=("RTXA6000", "RTX-A6000")),
    GpuKind(
        "RTX6000-Ada",
        48,
        49_140,
        364.2e12,
        960e9,
        142,
        (8, 9),
        also=("RTX6000Ada", "RTX-6000-Ada"),
        device="RTX 6000 Ada",
    ),
    GpuKind(
        "RTXPRO6000",
        96,
        97_887,
        500e12,
        1597e9,
        188,
        (12, 0),
        also=("RTX-PRO-6000", "RTXPRO6000S", "RTXPRO6000WS"),
        device="RTX PRO 6000",
    ),
    GpuKind("T4", 16, 15_360, 8.1e12, 320e9, 40, (7, 5)),
    GpuKind("V100", 16, 16_160, 15.7e12, 900e9, 80, (7, 0), nvlink=True, also=("V100-32GB",)),
)
# the kinds that a plan compares, and the numbers of GPUs in one machine
PLANNED = tuple(kind for kind in GPU_KINDS if kind.runs)
COUNTS = (1, 2, 4, 8)
_BY_NAME = {name.lower(): kind for kind in GPU_KINDS for name in (kind.name, *kind.also)}
# words in the names of other, smaller chips that begin alike
_OTHERS = {"Laptop", "Mobile", "D"}


def named(name: str) -> GpuKind | None:
    """The kind with this SkyPilot name, in any spelling of the clouds' catalogs; None for others.

    >>> named("RTX-6000-Ada").name
    'RTX6000-Ada'
    """
    return _BY_NAME.get(name.lower())


def kind_of(device_name: str) -> GpuKind | None:
    """The kind that a SkyPilot name or a driver's name (`NVIDIA A100-SXM4-80GB`, `NVIDIA H100 80GB
    HBM3`) means; None for others.

    >>> kind_of("NVIDIA L40S").name
    'L40S'
    """
    if (kind := named(device_name)) is not None:
        return kind
    words = device_name.replace("-", " ").split()
    if _OTHERS & set(words):
        return None
    if "A100" in words:
        return named("A100-80GB" if any("80GB" in word for word in words) else "A100")
    together = f" {' '.join(words)} "
    return next((kind for kind in GPU_KINDS if f" {kind.device or kind.name} " in together), None)
