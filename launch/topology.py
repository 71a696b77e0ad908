"""Which GPUs this machine offers, asked of nvidia-smi so that torch need not be imported.

A GPU hidden by CUDA_VISIBLE_DEVICES does not count.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_TIMEOUT_S = 20


@dataclass(frozen=True)
class Gpu:
    index: str
    uuid: str
    name: str
    memory_mib: int


def gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The visible NVIDIA GPUs, in CUDA's order; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode != 0:
        return []
    return visible(parse(answer.stdout), environment.get("CUDA_VISIBLE_DEVICES"))


def parse(listing: str) -> list[Gpu]:
    """The GPUs of an nvidia-smi CSV listing (index, uuid, name, memory in MiB)."""
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines() if line.count(",") == 3]
    return [Gpu(index, uuid, name, int(memory)) for index, uuid, name, memory in rows if memory.isdigit()]


def visible(found: list[Gpu], choice: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: indices or UUID prefixes, cut at the first unknown one, as CUDA does."""
    if choice is None:
        return found
    chosen: list[Gpu] = []
    for word in (word.strip() for word in choice.split(",")):
        match = next((gpu for gpu in found if word and (gpu.index == word or (len(word) > 4 and gpu.uuid.startswith(word)))), None)
        if match is None or match in chosen:
            break
        chosen.append(match)
    return chosen
