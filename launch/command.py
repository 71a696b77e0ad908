"""The `accelerate launch` line for this node of a run, with the reason for the choice."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emotion_train.config import Config
from emotion_train.errors import WrongRequest
from launch.topology import Gpu, Topology, read_topology

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
TRAINER = "emotion_train.train"


@dataclass(frozen=True)
class Choice:
    config_file: Path
    reason: str
    topology: Topology


def choose(
    found: Sequence[Gpu],
    requested: str | None,
    config: Config,
    environment: Mapping[str, str] = os.environ,
    processes: int | None = None,
) -> Choice:
    """Accelerate config and layout of a run on these GPUs and on the nodes of the scheduler's variables.

    `requested` is a path or a name in accelerate_configs/, `processes` the number on each node. Raises `WrongRequest` when the requested
    file does not exist or contradicts the layout, and for a 4-bit base without a GPU unless the CPU is asked for.
    """
    path = None if requested is None else _requested(requested)
    if path is not None and path.stem == "cpu":
        environment = {**environment, "DEVICE": "cpu"}
    if path is not None and path.stem == "single_gpu_qlora":
        processes = 1
    topology = read_topology(list(found), environment, processes)
    if path is not None:
        if path.stem == "single_gpu_qlora" and topology.nodes > 1:
            raise WrongRequest(
                f"single_gpu_qlora is for one GPU and there are {topology.nodes} nodes; type --accelerate-config multi_gpu_ddp."
            )
        return Choice(path, f"asked for; {topology}", topology)
    if topology.on_cpu:
        return _on_cpu(topology, config)
    if topology.world_size == 1:
        idle = len(found) - 1
        return Choice(CONFIGS / "single_gpu_qlora.yaml", f"{topology}" + (f"; {idle} more stay idle" if idle else ""), topology)
    return Choice(CONFIGS / "multi_gpu_ddp.yaml", str(topology), topology)


def _requested(requested: str) -> Path:
    for path in (Path(requested), CONFIGS / requested, CONFIGS / f"{requested}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise WrongRequest(f"There is no accelerate config {requested!r}; give a YAML file or one of {names}.")


def _on_cpu(topology: Topology, config: Config) -> Choice:
    asked = topology.device == "cpu"
    if config.model.precision == "nf4" and not asked:
        raise WrongRequest(
            "No NVIDIA GPU is visible (nvidia-smi) and model.precision is nf4, which a CPU computes slowly; type --accelerate-config cpu "
            "to do it all the same, or model.precision=fp32 with a small base."
        )
    reason = "DEVICE=cpu" if asked else "no NVIDIA GPU is visible (nvidia-smi)"
    return Choice(CONFIGS / "cpu.yaml", f"{reason}; {topology}", topology)


def accelerate_line(
    config_file: Path,
    run_config: str | None,
    overrides: Sequence[str],
    allow_unfenced: bool = False,
    topology: Topology | None = None,
    timeout_s: float | None = None,
) -> list[str]:
    """The argv that starts this node's trainers, one process where no `topology` is given.

    `python -m accelerate…` is the `accelerate` command of the same environment. --quiet keeps accelerate's traceback from following the
    trainer's own message. Nodes wait `timeout_s` seconds for each other to start (None: torchrun's own number).
    """
    line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config_file)]
    line += _layout(topology or Topology(()), timeout_s)
    line += ["-m", TRAINER]
    line += ["--config", run_config] if run_config else []
    line += ["--allow-unfenced"] if allow_unfenced else []
    return [*line, *overrides]


def _layout(topology: Topology, timeout_s: float | None) -> list[str]:
    """On one node rank 0 listens on a free port, so that two runs may share a machine."""
    processes = ["--num_processes", str(topology.world_size)]
    if topology.nodes == 1:
        return [*processes, "--main_process_port", "0"]
    return [
        *processes,
        *("--num_machines", str(topology.nodes), "--machine_rank", str(topology.node_rank)),
        *("--main_process_ip", topology.main_address, "--main_process_port", str(topology.main_port)),
        *(("--rdzv_conf", f"timeout={round(timeout_s)}") if timeout_s is not None else ()),
    ]


def printable(argv: Sequence[str]) -> str:
    """The same line as a person would type it."""
    import shlex

    words = list(argv)
    if words[1:3] == ["-m", "accelerate.commands.launch"]:
        words = ["accelerate", "launch", *(word for word in words[3:] if word != "--quiet")]
    return shlex.join(words)
