"""The processes of a run: how many on each machine, which machine this is, and where rank 0
listens.

The answer comes from SkyPilot's variables, else from Slurm's, else from this machine alone;
nvidia-smi lists the GPUs, so that torch need not be imported. A promised GPU that is not visible is
an error: a run that pays for GPUs never falls back to the CPU. The price: the machines must be
alike, each with the same number of processes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from emotion_train.errors import WrongRequest

_TIMEOUT_S = 20
_PORTS = range(20_000, 30_000)  # below those that systems give to outgoing connections

Device = Literal["auto", "cpu"]


@dataclass(frozen=True)
class Gpu:
    index: str
    uuid: str
    name: str
    memory_mib: int


@dataclass(frozen=True)
class Topology:
    """`gpus` are the GPUs of this node's processes, empty on the CPU; `main_address` and
    `main_port` are used with several nodes only.
    """

    gpus: tuple[Gpu, ...]
    processes_per_node: int = 1
    nodes: int = 1
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = 0
    source: str = "this machine"
    device: Device = "auto"

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def on_cpu(self) -> bool:
        return not self.gpus

    def __str__(self) -> str:
        what = (
            f"{self.gpus[0].name} ({self.gpus[0].memory_mib / 1024:.0f} GiB)"
            if self.gpus
            else "process on the CPU"
        )
        each = f"{self.processes_per_node} x {what}"
        if self.nodes == 1:
            return each
        return f"{self.nodes} nodes with {each}, this is node {self.node_rank} ({self.source})"


def read_topology(
    found: list[Gpu], environment: Mapping[str, str] = os.environ, processes: int | None = None
) -> Topology:
    """The processes of this run, from the visible GPUs and the scheduler's variables.

    DEVICE=cpu asks for the CPU on every node; auto, the default, takes the GPUs. `processes` is the
    number on each node (default: one for each GPU, one on the CPU). Raises `WrongRequest` when a
    scheduler promised GPUs that are not visible or its variables contradict each other.
    """
    device = _device(environment)
    nodes = _skypilot(environment) or _slurm(environment) or _Nodes(promised=None, source="this machine")
    gpus = () if device == "cpu" else _promised_gpus(found, nodes)
    count = processes or len(gpus) or 1
    if gpus and count > len(gpus):
        raise WrongRequest(
            f"--processes is {count} and this machine has {len(gpus)} visible GPUs, one for each process;"
            f" type --processes {len(gpus)} or fewer."
        )
    return Topology(
        gpus[:count],
        count,
        nodes.count,
        nodes.rank,
        nodes.main_address,
        nodes.main_port,
        nodes.source,
        device,
    )


@dataclass(frozen=True)
class _Nodes:
    """The nodes that a scheduler names; `promised` GPUs on each, None where it promises none."""

    promised: int | None
    source: str
    count: int = 1
    rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = 0


def _device(environment: Mapping[str, str]) -> Device:
    match environment.get("DEVICE") or "auto":
        case "auto":
            return "auto"
        case "cpu":
            return "cpu"
        case other:
            raise WrongRequest(
                f"The environment variable DEVICE is {other!r}; allowed are auto (the GPUs) and cpu."
            )


def _promised_gpus(found: list[Gpu], nodes: _Nodes) -> tuple[Gpu, ...]:
    if nodes.promised is None:
        return tuple(found)
    if nodes.promised > len(found):
        raise WrongRequest(
            f"{nodes.source} promised {nodes.promised} GPUs on node {nodes.rank} and {len(found)} are visible"
            " (nvidia-smi and CUDA_VISIBLE_DEVICES); look at the driver of that node, or set DEVICE=cpu to"
            " train on the CPU all the same."
        )
    return tuple(found[: nodes.promised])


# --- SkyPilot ---


def _skypilot(environment: Mapping[str, str]) -> _Nodes | None:
    """The nodes by SKYPILOT_NODE_RANK, _NODE_IPS (one a line, in rank order), _NUM_NODES and
    _NUM_GPUS_PER_NODE (0 on the CPU); None without them.
    """
    if "SKYPILOT_NODE_RANK" not in environment:
        return None
    addresses = environment.get("SKYPILOT_NODE_IPS", "").split()
    count = _number(environment, "SKYPILOT_NUM_NODES", len(addresses) or 1)
    rank = _number(environment, "SKYPILOT_NODE_RANK", 0)
    if not 0 <= rank < count or (count > 1 and len(addresses) != count):
        raise WrongRequest(
            f"SkyPilot's variables contradict each other: SKYPILOT_NODE_RANK is {rank}, SKYPILOT_NUM_NODES"
            f" {count}, and SKYPILOT_NODE_IPS has {len(addresses)} addresses; unset them to train on this"
            " machine alone."
        )
    promised = _number(environment, "SKYPILOT_NUM_GPUS_PER_NODE", 0)
    port = _port(environment, environment.get("SKYPILOT_TASK_ID", ""))
    return _Nodes(
        promised,
        "SkyPilot",
        count,
        rank,
        addresses[0] if count > 1 else "127.0.0.1",
        port if count > 1 else 0,
    )


# --- Slurm ---


def _slurm(environment: Mapping[str, str]) -> _Nodes | None:
    """The nodes by the variables of an `srun` step with one task on each node; the batch script of
    a job with one node counts as a step. None without them.

    Where a job asked for no GPUs, Slurm says nothing about them, and the visible ones count.
    """
    if "SLURM_PROCID" not in environment:
        return None
    in_step = "SLURM_STEP_NUM_NODES" in environment or "SLURM_STEP_NODELIST" in environment
    count = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_JOB_NUM_NODES", 1))
    if count > 1 and not in_step:
        raise WrongRequest(
            f"The Slurm job has {count} nodes and this is its batch script, which runs on the first; type"
            " srun --ntasks-per-node=1 emotion-launch run …"
        )
    tasks = _number(
        environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", count) if in_step else 1
    )
    if tasks != count:
        raise WrongRequest(
            f"srun started {tasks} tasks on {count} nodes and the launcher needs one on each, to start the"
            " trainers; type srun --ntasks-per-node=1 emotion-launch run …"
        )
    promised = (
        _number(environment, "SLURM_GPUS_ON_NODE", 0) if environment.get("SLURM_GPUS_ON_NODE") else None
    )
    if count == 1:
        return _Nodes(promised, "Slurm")
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    names = expand_nodelist(listed)
    rank = _number(environment, "SLURM_NODEID", _number(environment, "SLURM_PROCID", 0))
    if len(names) != count or not 0 <= rank < count:
        raise WrongRequest(
            f"Slurm's variables contradict each other: node {rank} of {count}, and the node list {listed!r}"
            f" names {len(names)}; start it with srun --ntasks-per-node=1."
        )
    return _Nodes(
        promised, "Slurm", count, rank, names[0], _port(environment, environment.get("SLURM_JOB_ID", ""))
    )


def expand_nodelist(listed: str) -> list[str]:
    """The host names of Slurm's short form, in its order, as `scontrol show hostnames` gives them.

    >>> expand_nodelist("gpu[08-10,12],login1")
    ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'login1']
    """
    names: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", listed):
        expanded = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", word):
            expanded = [start + end for start in expanded for end in ([text] if text else _numbers(numbers))]
        names += expanded
    return names


def _numbers(ranges: str) -> list[str]:
    """`08-10,12` as 08, 09, 10, 12: leading zeros stay."""
    found: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        found += (
            [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)] if dash else [part]
        )
    return found


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"\d+", text):
        raise WrongRequest(f"The environment variable {name} is {text!r}; a whole number is expected.")
    return int(text)


def _port(environment: Mapping[str, str], job: str) -> int:
    """MASTER_PORT, else a port that is the same on all nodes of a job and rarely the same for
    another job.
    """
    port = _number(environment, "MASTER_PORT", _PORTS[zlib.crc32(job.encode()) % len(_PORTS)])
    if not 0 < port < 65_536:
        raise WrongRequest(
            f"The environment variable MASTER_PORT is {port}; a port from 1 to 65535 is expected, or"
            " unset it."
        )
    return port


# --- this machine ---


def gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The visible NVIDIA GPUs, in CUDA's order; empty without a driver. A GPU hidden by
    CUDA_VISIBLE_DEVICES does not count.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode != 0:
        return []
    return visible(parse(answer.stdout), environment.get("CUDA_VISIBLE_DEVICES"))


def parse(listing: str) -> list[Gpu]:
    """The GPUs of an nvidia-smi CSV listing (index, uuid, name, memory in MiB)."""
    rows = [
        [field.strip() for field in line.split(",")] for line in listing.splitlines() if line.count(",") == 3
    ]
    return [Gpu(index, uuid, name, int(memory)) for index, uuid, name, memory in rows if memory.isdigit()]


def visible(found: list[Gpu], choice: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: indices or UUID prefixes, cut at the first unknown
    one, as CUDA does.
    """
    if choice is None:
        return found
    chosen: list[Gpu] = []
    for word in (word.strip() for word in choice.split(",")):
        match = next(
            (
                gpu
                for gpu in found
                if word and (gpu.index == word or (len(word) > 4 and gpu.uuid.startswith(word)))
            ),
            None,
        )
        if match is None or match in chosen:
            break
        chosen.append(match)
    return chosen
