"""The `accelerate launch` line for this node of a run, with the reason for the choice.

The order of preference: all of the base on each GPU (DDP), which moves least; then ZeRO-2, which
cuts the optimizer up; then FSDP2, which cuts up the base and moves it in every micro-batch. What
fits is arithmetic over the base's config.json (`emotion_train.sizing.memory`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import yaml

from emotion_train.config import Config
from emotion_train.errors import WrongRequest
from emotion_train.sizing.memory import GIB, WORTHWHILE_TOKENS, MemoryEstimate, estimate, usable_bytes
from emotion_train.sizing.shape import Shape
from launch.run.topology import Gpu, Topology, read_topology
from launch.workload import shape_of_base

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
TRAINER = "emotion_train.train"
QUIETLY = "launch.run.accelerate_quietly"
_LABELS = 28  # the head is a thousandth of the adapter, whatever the number
_ERROR = 1.1  # of the estimate


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
    """Accelerate config and layout of a run on these GPUs and on the nodes of the scheduler's
    variables.

    `requested` is a path or a name in accelerate_configs/, `processes` the number on each node.
    Raises `WrongRequest` when the requested file does not exist or contradicts the layout, and for
    a 4-bit base without a GPU unless the CPU is asked for.
    """
    path, topology = asked_for(found, requested, environment, processes)
    if path is not None:
        if path.stem == "single_gpu_qlora" and topology.nodes > 1:
            raise WrongRequest(
                f"single_gpu_qlora is for one GPU and there are {topology.nodes} nodes; type"
                " --accelerate-config multi_gpu_ddp."
            )
        return Choice(path, f"asked for; {topology}", topology)
    if topology.on_cpu:
        return _on_cpu(topology, config)
    idle = len(found) - len(topology.gpus)
    name, why = by_memory(topology, config)
    return Choice(
        CONFIGS / f"{name}.yaml", f"{topology}{f'; {idle} more stay idle' if idle else ''}; {why}", topology
    )


def asked_for(
    found: Sequence[Gpu],
    requested: str | None,
    environment: Mapping[str, str] = os.environ,
    processes: int | None = None,
) -> tuple[Path | None, Topology]:
    """The requested accelerate config and the layout that it leaves; raises `WrongRequest` as
    `choose`.
    """
    path = None if requested is None else requested_file(requested)
    if path is not None and path.stem == "cpu":
        environment = {**environment, "DEVICE": "cpu"}
    if path is not None and path.stem == "single_gpu_qlora":
        processes = 1
    return path, read_topology(list(found), environment, processes)


def requested_file(requested: str) -> Path:
    """The accelerate config of this path, or of this name in accelerate_configs/; raises
    `WrongRequest` for what is none.
    """
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    candidates = (Path(requested), CONFIGS / requested, CONFIGS / f"{requested}.yaml")
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise WrongRequest(
            f"There is no accelerate config {requested!r}; give a YAML file or one of {names}."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise WrongRequest(
            f"The accelerate config {path} cannot be read ({reason}); give another file or one of {names}."
        ) from None
    if not isinstance(content, dict) or "distributed_type" not in content:
        if isinstance(content, dict) and content.keys() & Config.model_fields.keys():
            raise WrongRequest(
                f"{path} is a run config; type --config {path}, and --accelerate-config with one of {names},"
                " or leave it out."
            )
        raise WrongRequest(
            f"{path} is no accelerate config, as it has no distributed_type; give another file or one of"
            f" {names}."
        )
    return path


def _on_cpu(topology: Topology, config: Config) -> Choice:
    asked = topology.device == "cpu"
    if config.model.precision == "nf4" and not asked:
        raise WrongRequest(
            "No NVIDIA GPU is visible (nvidia-smi) and model.precision is nf4, which a CPU computes slowly;"
            " type --accelerate-config cpu to do it all the same, or model.precision=fp32 with a small base."
        )
    reason = "DEVICE=cpu" if asked else "no NVIDIA GPU is visible (nvidia-smi)"
    return Choice(CONFIGS / "cpu.yaml", f"{reason}; {topology}", topology)


# --- what fits ---


@dataclass(frozen=True)
class _Option:
    """A config file with what it needs of each GPU. `cut`: what is spread over all GPUs."""

    name: str
    cut: str
    memory: MemoryEstimate

    def __str__(self) -> str:
        return f"{self.memory.total / GIB:.1f} GiB"


def by_memory(topology: Topology, config: Config) -> tuple[str, str]:
    """The first config file whose needs fit the smallest GPU, and the numbers behind it. Raises
    `WrongRequest` when none does.
    """
    whole = "single_gpu_qlora" if topology.world_size == 1 else "multi_gpu_ddp"
    options = _options(config, topology.world_size, whole)
    if not options:
        return whole, "what the base needs is not known before it is read"
    usable = usable_bytes(min(gpu.memory_mib for gpu in topology.gpus) << 20)
    room = f"of the {usable / GIB:.1f} GiB usable on each GPU"
    for place, option in enumerate(options):
        if option.memory.total <= usable:
            before = "".join(f"{other.name} would need {other}; " for other in options[:place])
            return option.name, f"{before}{option.name} ({option.cut}) needs {option.memory} {room}"
    least = options[-1]
    if least.memory.total <= _ERROR * usable:
        return (
            least.name,
            f"TIGHT, by the estimate's error: {least.name} ({least.cut}) needs {least.memory} {room}",
        )
    raise WrongRequest(
        f"{config.model.base} in {config.model.precision} does not fit {topology}: {least.name} needs"
        f" {least.memory} {room}. Type {_remedy(config, topology.world_size, whole, usable)}."
    )


def _options(config: Config, world_size: int, whole: str) -> list[_Option]:
    """In the order of preference; empty where the base's shape cannot be read here."""
    shape = _shape(config.model.base)
    if shape is None:
        return []

    def needs(shards: int) -> MemoryEstimate:
        lora, train, auto = config.lora, config.train, config.train.tokens_per_microbatch == "auto"
        # auto: what it may come down to
        tokens = max(WORTHWHILE_TOKENS, config.data.max_length) if auto else train.microbatch_tokens
        again = train.gradient_checkpointing or _may_recompute(config)
        return estimate(
            shape,
            config.model.precision,
            lora.r,
            lora.targets,
            tokens,
            again,
            _LABELS,
            shards,
            lora_dropout=lora.dropout,
            fused=config.model.decoder == "fused",
        )

    one = needs(1)
    options = [_Option(whole, "all on each GPU", one)]
    if world_size > 1:
        options.append(
            _Option(
                "multi_gpu_deepspeed_zero2",
                "optimizer cut",
                replace(one, optimizer=one.optimizer // world_size),
            )
        )
        if config.model.precision != "fp8":  # computed from whole weights
            options.append(_Option("multi_gpu_fsdp2_qlora", "base cut", needs(world_size)))
    return options


def _may_recompute(config: Config) -> bool:
    """Whether the trainer chooses."""
    return (
        config.train.tokens_per_microbatch == "auto"
        and "gradient_checkpointing" not in config.train.model_fields_set
    )


def _shape(base: str) -> Shape | None:
    try:
        return shape_of_base(base)
    except (WrongRequest, OSError):
        return None  # the trainer says what is wrong with the base


def _remedy(config: Config, world_size: int, whole: str, usable: int) -> str:
    """The nearest setting with which it fits: recomputing, then smaller micro-batches, then 4
    bits.
    """
    given = config.train.tokens_per_microbatch
    tokens, less = [given], 0 if given == "auto" else given
    while (less := less // 2) >= max(config.data.max_length, 256):
        tokens.append(less)
    for precision in dict.fromkeys((config.model.precision, "nf4")):
        for again, count in product((config.train.gradient_checkpointing, True), tokens):
            train = config.train.model_copy(
                update={"gradient_checkpointing": again, "tokens_per_microbatch": count}
            )
            changed = config.model_copy(
                update={"train": train, "model": config.model.model_copy(update={"precision": precision})}
            )
            if min(option.memory.total for option in _options(changed, world_size, whole)) <= usable:
                words = [] if precision == config.model.precision else [f"model.precision={precision}"]
                said = again == config.train.gradient_checkpointing or _may_recompute(config)
                words += [] if said else ["train.gradient_checkpointing=true"]
                words += [] if count == given else [f"train.tokens_per_microbatch={count}"]
                return " ".join(words)
    return "a smaller model.base, or take larger or more GPUs"


# --- the line ---


def accelerate_line(
    config_file: Path,
    run_config: str | None,
    overrides: Sequence[str],
    allow_unfenced: bool = False,
    topology: Topology | None = None,
    timeout_s: float | None = None,
) -> list[str]:
    """The argv that starts this node's trainers, one process where no `topology` is given.

    `QUIETLY` is the `accelerate launch` of the same environment; it and --quiet keep tracebacks of
    what stands between from following the trainer's own message. Nodes wait `timeout_s` seconds for
    each other to start (None: torchrun's own number).
    """
    line = [sys.executable, "-m", QUIETLY, "--quiet", "--config_file", str(config_file)]
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
    if words[1:3] == ["-m", QUIETLY]:
        words = ["accelerate", "launch", *(word for word in words[3:] if word != "--quiet")]
    return shlex.join(words)
