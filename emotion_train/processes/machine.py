"""This machine for reports and plans: device, GPU memory, versions, commit, peak memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emotion_train.sizing.memory import GIB
from emotion_train.storage.document import NOT_INSTALLED, version_of

if TYPE_CHECKING:
    import torch


def device_name(kind: str) -> str:
    """The name of the first GPU, or of the processor."""
    if kind == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


_PACKAGES = (
    "emotion-train",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "numpy",
    "scikit-learn",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect the numbers."""
    known = {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}}
    return {name: version for name, version in known.items() if version != NOT_INSTALLED}


def git_commit() -> str | None:
    """The commit of this program's checkout, with + when files differ from it; None outside a
    checkout.
    """
    here = Path(__file__).parents[1]
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__],
            cwd=here,
            capture_output=True,
            timeout=10,
            check=True,
        )
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed.strip() else "")


def peak_memory(device: torch.device) -> tuple[int, Literal["GPU", "RSS"]]:
    """The peak memory in bytes: of the GPU, or of this process where there is no GPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device), "GPU"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "RSS"


def whole_memory_of(device: torch.device) -> int:
    """All bytes of the GPU's memory, used or not."""
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def memory_of_host() -> int | None:
    """The bytes of memory that this process may take: the machine's, or its container's limit; None
    where the system does not give them.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    return min([total, *_limits_of_container()]) if total > 0 else None


def room_ahead(processes: int) -> int:
    """The bytes of a base that each of this machine's `processes` may hold before its device takes
    them: together a quarter of the free memory; 0 where the system does not give it.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
    return min([free, *_limits_of_container()]) // 4 // max(1, processes)


def gpus_of_machine() -> int:
    """The number of NVIDIA GPUs that the driver lists, used or not; needs no library."""
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def _limits_of_container() -> list[int]:
    """The memory limits of the control groups that hold this process, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        root, name = Path("/sys/fs/cgroup"), "memory.max"
        if controllers:  # version 1 has a tree for each controller
            if "memory" not in controllers.split(","):
                continue
            root, name = root / "memory", "memory.limit_in_bytes"
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(root):
                with suppress(OSError, ValueError):  # "max" is no limit
                    limits.append(int((group / name).read_text(encoding="utf-8")))
    return limits


def memory_of(device: torch.device) -> int:
    """The bytes of the GPU's memory that other programs do not use now."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    # this process's context already takes its part
    return min(total, free + torch.cuda.memory_reserved(device) + GIB // 2)
