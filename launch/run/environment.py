"""The environment of accelerate and of the trainers, without the variables of another launcher and
without imports from the current folder.

Where its config is silent, accelerate takes dozens of settings from variables, also a rank or a
world size that another launcher has left. Here the accelerate config and the topology decide, so
those variables are cleared, and their names are printed. The price: a setting of accelerate that no
config file can hold cannot be given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from emotion_train.errors import TRACEBACK_VARIABLE, WrongRequest
from emotion_train.processes.imports import past_current_folder
from launch.run.topology import Topology

THREADS = "OMP_NUM_THREADS"
_USE_CPU = "ACCELERATE_USE_CPU"
_SETTINGS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FP8_")
_RANKS = re.compile(
    "RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_(NAME|RANK|WORLD_SIZE)"
    "|MASTER_ADDR|MASTER_PORT|CROSS_RANK|TORCHELASTIC_.*|PMI_(RANK|SIZE|LOCAL_RANK|LOCAL_SIZE)"
    "|(OMPI|MV2)_COMM_WORLD_.*|MPI_LOCALN?RANK(S|ID)?"
)
_TRUE = ("true", "1", "yes")


def trainer_environment(
    topology: Topology, environment: Mapping[str, str] = os.environ, *, show_traceback: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The variables of the trainers, and the names of accelerate's settings that were cleared.

    Raises `WrongRequest` where `OMP_NUM_THREADS` is not a number.
    """
    kept = {name: value for name, value in environment.items() if not _is_foreign(name)}
    # ACCELERATE_USE_CPU costs no GPU where none is visible
    if topology.device == "cpu" or (topology.on_cpu and environment.get(_USE_CPU, "").lower() in _TRUE):
        kept[_USE_CPU] = "true"
    cleared = sorted(
        name
        for name in environment
        if name.startswith(_SETTINGS) and environment[name].lower() != kept.get(name)
    )
    threads = thread_count(kept.pop(THREADS, ""))
    if threads is None and topology.on_cpu:  # accelerate would take the physical cores, with a warning
        threads = max(1, (os.cpu_count() or 1) // topology.processes_per_node)
    if threads is not None:
        kept[THREADS] = str(threads)
    if show_traceback:
        kept[TRACEBACK_VARIABLE] = "1"
    return {**kept, **past_current_folder(kept)}, cleared


def thread_count(given: str) -> int | None:
    """The threads of a process by `OMP_NUM_THREADS`; a list, one number for each level of nesting,
    counts by its first. None where it is empty. Raises `WrongRequest` for anything but a number
    above 0.
    """
    first = given.partition(",")[0].strip()
    if not given.strip():
        return None
    if not re.fullmatch("[0-9]{1,6}", first) or int(first) == 0:
        raise WrongRequest(
            f"The environment variable {THREADS} is {given!r}; a whole number above 0 is expected, the"
            f" threads of each process on the CPU. Type unset {THREADS} to let the launcher choose."
        )
    return int(first)


def _is_foreign(name: str) -> bool:
    return name.startswith(_SETTINGS) or _RANKS.fullmatch(name) is not None
