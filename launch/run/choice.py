"""The `accelerate launch` line for this node of a run, with the reason for the choice.

The order of preference: all of the base on each GPU (DDP), which moves least; then ZeRO-2, which
shards the optimizer; then FSDP2, which shards the base and moves it in every micro-batch. Where the
whole base leaves so little room that its passes would be recomputed, FSDP2 goes first on GPUs that
NVLink joins, if the plan's arithmetic says that it is faster.
Arithmetic over the base's config.json decides what fits (`emotion_train.sizing.fit`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emotion_train.config import Config
from emotion_train.edges.bounded import Unreadable, yaml_file
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.sizing.fit import Fit, Layout, Misfit, Request, fit, layouts
from emotion_train.sizing.memory import GIB
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.storage.patience import StoreRequest
from launch.gpus import kind_of
from launch.plan.speed import Speed, gathers_quickly
from launch.run.topology import Gpu, Topology, read_topology
from launch.workload import config_on, shape_of_base

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
TRAINER = "emotion_train.train"
QUIETLY, HERE = "launch.run.accelerate_quietly", "launch.run.accelerate_here"


@dataclass(frozen=True)
class ProcessLayout:
    config_file: Path
    reason: str
    topology: Topology


def choose(
    found: Sequence[Gpu],
    requested: str | None,
    config: Config,
    environment: Mapping[str, str] = os.environ,
    processes: int | None = None,
) -> ProcessLayout:
    """Accelerate config and layout of a run on these GPUs and on the nodes in the scheduler's
    variables.

    `requested` is a path or a name in accelerate_configs/, `processes` the number on each node.
    Raises `WrongRequest` when the requested file does not exist or contradicts the layout, and for
    a 4-bit base without a GPU unless the CPU is asked for.
    """
    path, topology = asked_for(found, requested, environment, processes)
    if path is not None:
        if topology.nodes > 1 and _starts_one(_settings_of(path)):
            raise WrongRequest(
                f"{path.stem} starts one process (distributed_type: NO) and there are {topology.nodes} nodes;"
                " type --accelerate-config multi_gpu_ddp."
            )
        return ProcessLayout(path, f"asked for; {topology}", topology)
    if topology.on_cpu:
        return _on_cpu(topology, config)
    idle = len(found) - len(topology.gpus)
    name, why = by_memory(topology, config)
    return ProcessLayout(
        CONFIGS / f"{name}.yaml", f"{topology}{f'; {idle} more stay idle' if idle else ''}; {why}", topology
    )


def asked_for(
    found: Sequence[Gpu],
    requested: str | None,
    environment: Mapping[str, str] = os.environ,
    processes: int | None = None,
) -> tuple[Path | None, Topology]:
    """The requested accelerate config and the layout that it allows; raises `WrongRequest` where
    `choose` does.
    """
    path = None if requested is None else requested_file(requested)
    settings = {} if path is None else _settings_of(path)
    # also where GPUs are visible: they are neither counted nor paid for by a run that uses none
    if settings.get("use_cpu") is True:
        environment = {**environment, "DEVICE": "cpu"}
    if path is not None and _starts_one(settings):
        if processes not in (None, 1):
            raise WrongRequest(
                f"{path.stem} starts one process (distributed_type: NO) and --processes is {processes}; leave"
                " --processes out, or type --accelerate-config multi_gpu_ddp."
            )
        processes = 1
    return path, read_topology(list(found), environment, processes)


def requested_file(requested: str) -> Path:
    """The accelerate config at this path, or with this name in accelerate_configs/; raises
    `WrongRequest` for a file that is not one.
    """
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    candidates = (Path(requested), CONFIGS / requested, CONFIGS / f"{requested}.yaml")
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise WrongRequest(
            f"There is no accelerate config {requested!r}; give a YAML file or one of {names}."
        )
    try:
        content = yaml_file(path)
    except (OSError, Unreadable) as error:
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
            f"{path} is not an accelerate config, since it has no distributed_type; give another file or one"
            f" of {names}."
        )
    return path


def _on_cpu(topology: Topology, config: Config) -> ProcessLayout:
    asked = topology.device == "cpu"
    if config.model.precision == "nf4" and not asked:
        raise WrongRequest(
            "No NVIDIA GPU is visible (nvidia-smi) and model.precision is nf4, which a CPU computes slowly;"
            " type --accelerate-config cpu to train all the same, or model.precision=fp32 with a small base."
        )
    reason = "DEVICE=cpu" if asked else "no NVIDIA GPU is visible (nvidia-smi)"
    return ProcessLayout(CONFIGS / "cpu.yaml", f"{reason}; {topology}", topology)


# --- what fits ---


def by_memory(topology: Topology, config: Config) -> tuple[str, str]:
    """The first config file whose memory fits the smallest GPU, and the numbers behind the choice.
    Raises `WrongRequest` when none fits.
    """
    shape = _shape(config)
    if shape is None:
        return _file_of(Layout(topology.world_size)), "the base's memory is not known before the base is read"
    config = config_on(config, kind_of(topology.gpus[0].name))
    recipe = Recipe.of(config, shape)
    smallest = min(gpu.memory_mib for gpu in topology.gpus) << 20
    allowed = layouts(topology.world_size, shape.is_encoder)
    request = Request.of(config, recipe)
    fitting = fit(request, smallest, allowed)
    if isinstance(fitting, Misfit):
        raise WrongRequest(str(fitting))
    return file_and_reason(_without_recomputing(request, smallest, topology, fitting) or fitting)


def _without_recomputing(request: Request, gpu_bytes: int, topology: Topology, found: Fit) -> Fit | None:
    """The setting with the base sharded over GPUs of one machine, where what was found recomputes
    and is slower by the plan's arithmetic; else None.
    """
    kind = kind_of(topology.gpus[0].name)
    is_asked = request.gradient_checkpointing is not None
    if is_asked or not found.setting.gradient_checkpointing or found.layout.sharded == "base":
        return None
    if kind is None or topology.nodes > 1 or not gathers_quickly(kind, request.recipe):
        return None
    kept = replace(request, gradient_checkpointing=False)
    sharded = fit(kept, gpu_bytes, [Layout(topology.world_size, "base")])
    if isinstance(sharded, Misfit):
        return None

    def seconds_a_token(one: Fit) -> float:
        tokens, again = one.setting.tokens, one.setting.gradient_checkpointing
        return Speed(kind, request.recipe, again, one.layout).microbatch_s(tokens) / tokens

    if seconds_a_token(sharded) >= seconds_a_token(found):
        return None
    whole = found.layout.memory(request.recipe, sharded.setting.tokens, False)
    return replace(sharded, passed_over=((found.layout, whole),))


def file_and_reason(found: Fit) -> tuple[str, str]:
    """The config file of the layout that fits, and the numbers behind it."""
    before = "".join(
        f"{_file_of(layout)} would need {memory.total / GIB:.1f} GiB; "
        for layout, memory in found.passed_over
    )
    sharded = "all on each GPU" if found.layout.sharded == "nothing" else f"{found.layout.sharded} sharded"
    name = _file_of(found.layout)
    return name, f"{before}{name} ({sharded}) {found}"


def _file_of(layout: Layout) -> str:
    """The layout's file name in accelerate_configs/, without .yaml."""
    if layout.gpus == 1:
        return "single_gpu_qlora"
    names = {
        "nothing": "multi_gpu_ddp",
        "optimizer": "multi_gpu_deepspeed_zero2",
        "base": "multi_gpu_fsdp2_qlora",
    }
    return names[layout.sharded]


def _shape(config: Config) -> Shape | None:
    try:
        return shape_of_base(config.model.base, config.model.layers)
    except (WrongRequest, StorageError, OSError):
        return None  # the trainer says what is wrong with the base


def ask_for_base(config: Config) -> StoreRequest[object]:
    """The request for the base's shape, which `choose` needs; the base may be in a bucket that does
    not answer yet.
    """
    base = config.model.base
    return StoreRequest(
        "the base", base, lambda: shape_of_base(base, config.model.layers), config.run.start_timeout_s
    )


# --- the line ---


def accelerate_line(
    config_file: Path,
    run_config: str | None,
    overrides: Sequence[str],
    allow_unfenced: bool = False,
    topology: Topology | None = None,
    timeout_s: float | None = None,
    stop_after_step: int | None = None,
) -> list[str]:
    """The argv that starts this node's trainers, one process where no `topology` is given.

    `QUIETLY` is `accelerate launch` of the same environment; together with --quiet it keeps
    tracebacks of the programs in between from following the trainer's own message. `HERE` starts
    no process for a single trainer, and becomes it. Nodes wait `timeout_s` seconds for each other
    to start (None: torchrun's default).
    """
    topology = topology or Topology(())
    program = HERE if topology.world_size == 1 and _is_simple(config_file) else QUIETLY
    line = [sys.executable, "-P", program_file(program), "--quiet", "--config_file", str(config_file)]
    line += _layout(topology, timeout_s)
    line += ["-m", TRAINER]
    line += ["--config", run_config] if run_config else []
    line += ["--allow-unfenced"] if allow_unfenced else []
    line += ["--stop-after-step", str(stop_after_step)] if stop_after_step is not None else []
    return [*line, *overrides]


def program_file(name: str) -> str:
    """The file of `QUIETLY` or `HERE`, which are started by path: `-m` would look in the current
    folder first, or in another package `launch`.
    """
    return str(Path(__file__).with_name(f"{name.rpartition('.')[2]}.py"))


def _is_simple(config_file: Path) -> bool:
    """Whether accelerate starts one process by this file with nothing but variables that are read
    after torch is imported.
    """
    found = _settings_of(config_file)
    return (
        _starts_one(found)
        and found.get("gpu_ids") in (None, "all")
        and not {"mpirun_config", "fp8_config"} & found.keys()
    )


def _starts_one(settings: Mapping[str, object]) -> bool:
    """Whether accelerate starts one process by this file, whatever --num_processes says."""
    kind = settings.get("distributed_type")
    return kind == "NO" or kind is False  # which an unquoted NO is in YAML


def _settings_of(config_file: Path) -> Mapping[str, object]:
    """Empty for a file that accelerate cannot read either; it says what is wrong with the file."""
    try:
        found = yaml_file(config_file)
    except (OSError, Unreadable):
        return {}
    return found if isinstance(found, dict) else {}


def _layout(topology: Topology, timeout_s: float | None) -> list[str]:
    """The options for processes and nodes. On one node rank 0 listens on a free port, so that two
    runs may share a machine.
    """
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
    if words[1:2] == ["-P"] and words[2] in (program_file(QUIETLY), program_file(HERE)):
        words = ["accelerate", "launch", *(word for word in words[3:] if word != "--quiet")]
    return shlex.join(words)
