"""The `accelerate launch` line for this machine, with the reason for the choice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emotion_train.errors import WrongRequest
from launch.topology import Gpu

CONFIGS = Path(__file__).resolve().parent.parent / "accelerate_configs"
TRAINER = "emotion_train.train"


@dataclass(frozen=True)
class Choice:
    config_file: Path
    reason: str


def choose(gpus: Sequence[Gpu], requested: str | None, precision: str) -> Choice:
    """The accelerate config for these GPUs, or the requested one (a path or a name in accelerate_configs/).

    Raises `WrongRequest` when the requested file does not exist, and for a 4-bit base without a GPU unless the CPU is asked for.
    """
    if requested is not None:
        candidates = [Path(requested), CONFIGS / requested, CONFIGS / f"{requested}.yaml"]
        for path in candidates:
            if path.is_file():
                return Choice(path, "asked for")
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise WrongRequest(f"There is no accelerate config {requested!r}; give a YAML file or one of {names}.")
    if not gpus and precision == "nf4":
        raise WrongRequest(
            "No NVIDIA GPU is visible (nvidia-smi) and model.precision is nf4, which a CPU computes slowly; type --accelerate-config cpu "
            "to do it all the same, or model.precision=fp32 with a small base."
        )
    if not gpus:
        return Choice(CONFIGS / "cpu.yaml", "no NVIDIA GPU is visible (nvidia-smi)")
    first = gpus[0]
    extra = f"; {len(gpus) - 1} more stay idle" if len(gpus) > 1 else ""
    return Choice(CONFIGS / "single_gpu_qlora.yaml", f"one {first.name} with {first.memory_mib / 1024:.0f} GiB{extra}")


def accelerate_line(config_file: Path, run_config: str | None, overrides: Sequence[str], allow_unfenced: bool = False) -> list[str]:
    """The argv that starts the trainer; `python -m accelerate…` is the `accelerate` command of the same environment.

    --quiet keeps accelerate's traceback from following the trainer's own message.
    """
    line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config_file), "-m", TRAINER]
    line += ["--config", run_config] if run_config else []
    line += ["--allow-unfenced"] if allow_unfenced else []
    return [*line, *overrides]


def printable(argv: Sequence[str]) -> str:
    """The same line as a person would type it."""
    import shlex

    words = list(argv)
    if words[1:3] == ["-m", "accelerate.commands.launch"]:
        words = ["accelerate", "launch", *(word for word in words[3:] if word != "--quiet")]
    return shlex.join(words)
