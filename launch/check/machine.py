"""Checks of the machine that will train: memory, processes, precision, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.processes.machine import memory_of_host
from emotion_train.sizing.fit import Misfit, Request, fit, layouts
from emotion_train.sizing.host import require_host_memory
from emotion_train.sizing.memory import GIB
from emotion_train.sizing.recipe import Recipe
from launch.gpus import FIRST_WITH_KERNELS, MIB, PLANNED, kind_of, named
from launch.run.choice import asked_for, choose, file_and_reason
from launch.run.topology import Gpu
from launch.workload import config_on, refuse_unfused_fp8, shape_of_base

if TYPE_CHECKING:
    from emotion_train.model.trainable import TrainableBase

_NEEDED_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Target:
    """The machine that will train, with `gpus` GPUs of `memory_mib` each. `here`: it is this
    machine.
    """

    name: str
    memory_mib: int
    gpus: int
    here: bool


def target_of(words: str | None, gpus: Sequence[Gpu]) -> Target | None:
    """`H100:8` as SkyPilot writes it, else this machine's GPUs, else None. Raises `WrongRequest`
    for a GPU that is not in the table.
    """
    if words is None:
        return Target(gpus[0].name, min(gpu.memory_mib for gpu in gpus), len(gpus), True) if gpus else None
    name, colon, count = words.partition(":")
    kind = named(name)
    if kind is None or (colon and not (count.isdecimal() and int(count) > 0)):
        raise WrongRequest(
            f"--gpus is {words!r}; give NAME or NAME:COUNT with one of"
            f" {', '.join(one.name for one in PLANNED)}."
        )
    return Target(kind.name, kind.memory_mib, int(count or 1), False)


def check_memory(
    config: Config, target: Target | None, index: Callable[[], Index], on_cpu: int | None = None
) -> str:
    """The finding on the memory: precision and micro-batch fit the GPU, or the base is sharded over
    several, or this machine's memory is enough for the `on_cpu` processes on its CPU. Raises
    `WrongRequest` with the nearest settings that fit.
    """
    if on_cpu is not None:
        return _of_cpu(config, len(index().labels), on_cpu)
    if target is None:
        return (
            "no NVIDIA GPU is visible here; --gpus H100:1 checks for another machine, emotion-launch plan"
            " compares all"
        )
    config = config_on(config, kind_of(target.name))
    shape = shape_of_base(config.model.base, config.model.layers)
    recipe = Recipe.of(config, shape, len(index().labels))
    available, allowed = target.memory_mib * MIB, layouts(target.gpus, shape.is_encoder)
    fitting = fit(Request.of(config, recipe), available, allowed)
    if isinstance(fitting, Misfit):
        raise WrongRequest(str(fitting))
    if fitting.layout.sharded == "nothing":
        return f"fits {target.name} with {available / GIB:.1f} GiB: {fitting}"
    name, why = file_and_reason(fitting)
    return f"{name}: {why}"


def processes_on_cpu(
    wanted_gpus: str | None, gpus: Sequence[Gpu], accelerate_config: str | None
) -> int | None:
    """How many processes would train on this machine's CPU; None where GPUs or another machine
    train.
    """
    if wanted_gpus is not None:
        return None
    topology = asked_for(gpus, accelerate_config)[1]
    return topology.processes_per_node if topology.on_cpu else None


def _of_cpu(config: Config, labels: int, processes: int) -> str:
    other = "--gpus H100:1 checks for another machine, emotion-launch plan compares all"
    if (host_bytes := memory_of_host()) is None:
        return f"on the CPU, whose memory this system does not tell; {other}"
    recipe = Recipe.of(config, shape_of_base(config.model.base, config.model.layers), labels)
    least = require_host_memory(config.model.base, recipe, config.data.max_length, processes, host_bytes)
    times = f"{processes} processes on the CPU need" if processes > 1 else "on the CPU, needs"
    return f"{times} at least {least} of the {host_bytes / GIB:.1f} GiB of this machine; {other}"


def check_machine(config: Config, gpus: Sequence[Gpu], accelerate_config: str | None) -> str:
    choice = choose(gpus, accelerate_config, config)
    return f"{choice.config_file.stem}: {choice.reason}"


def check_precision(
    config: Config, wanted_gpus: str | None, gpus: Sequence[Gpu], accelerate_config: str | None
) -> str:
    """The finding on the precision: machine and base can compute it, and its package is
    installed.
    """
    precision, here = config.model.precision, wanted_gpus is None
    if precision == "nf4" and here and find_spec("bitsandbytes") is None:
        raise WrongRequest(
            "model.precision is nf4 and the package bitsandbytes is missing; type pip install"
            " 'emotion-train[gpu]' or model.precision=bf16."
        )
    on_cpu = here and asked_for(gpus, accelerate_config)[1].on_cpu
    if wanted_gpus == "":  # which names no GPU, and is refused as such
        target_of(wanted_gpus, gpus)
    where = wanted_gpus or ("the CPU" if on_cpu else gpus[0].name)
    kind = kind_of(where.partition(":")[0])
    if kind is not None and not kind.runs:
        raise WrongRequest(
            f"PyTorch's default builds have kernels from compute capability"
            f" {'.'.join(map(str, FIRST_WITH_KERNELS))} on and {kind.name} has"
            f" {'.'.join(map(str, kind.capability))}; take one of {', '.join(one.name for one in PLANNED)}."
        )
    if precision == "fp8":
        target = None if on_cpu else target_of(wanted_gpus, gpus)
        if target is None or (kind is not None and not kind.fp8):
            raise WrongRequest(
                f"model.precision is fp8 and {'the CPU' if target is None else target.name} has no float8"
                f" units; take one of {', '.join(one.name for one in PLANNED if one.fp8)}, or type"
                " model.precision=bf16, or nf4 for a quarter of its memory."
            )
        refuse_unfused_fp8(config, shape_of_base(config.model.base), "model.precision=")
    if kind is not None and not kind.bf16 and precision != "fp32":
        return f"{precision} on {where}, which has no bfloat16 units: PyTorch computes it in float32, slowly"
    return f"{precision} on {where}"


def check_disk(look: Callable[[], TrainableBase]) -> str:
    """The finding on the disk: room for temporary files, and in the hub's cache for the base's
    weights.
    """
    import tempfile

    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_DISK_BYTES:
        raise WrongRequest(
            f"{folder} has {free / 2**30:.1f} GiB free and 2 GiB are needed; free some or set TMPDIR to a"
            " larger disk."
        )
    return f"{free / 2**30:.0f} GiB free in {folder}{_room_in_cache(look)}"


def _room_in_cache(look: Callable[[], TrainableBase]) -> str:
    try:
        needed = look().bytes_to_download
    except EmotionTrainError:  # said by the check of the base
        return ""
    if not needed:
        return ""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    words = f"{needed / GIB:.1f} GiB of the base's weights go to the hub's cache {cache}, where"
    if free < needed:
        raise WrongRequest(
            f"{words} {free / GIB:.1f} GiB are free; free some, set HF_HOME to a folder on a larger disk, or"
            " give the URL of emotion-train stage-base."
        )
    return f"; {words} {free / GIB:.0f} GiB are free"
