"""The resumable state of a run as safetensors and JSON, committed by one log entry.

Adapter, head, optimizer moments and the cursor; the learning rate, the random numbers and the order of posts are functions of the step
and need no saving. At r=16 on q, k, v, o of Mistral Small 3.1 that is 0.22 GiB. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.model.load import BaseInfo
from emotion_train.runlog import Entry, Part, Writer, read_part
from emotion_train.storage import Store

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")

# a run may continue on other machines, with other packing or precision, but not with another question
_FIXED = (
    "data.max_length",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.targets",
    "loss.class_weights",
    "run.seed",
    "train.epochs",
    "train.global_batch_size",
)


@dataclass
class Progress:
    """Where a run is, and what all ranks have seen: `step` counts completed optimizer steps of the whole run.

    `computed_tokens` counts filling too. Counts and seconds are those up to the last
    evaluation; `earlier_wall_seconds` is what the processes before this one held the machine for, until their last commit.
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    bad_rows: int = 0
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    earlier_wall_seconds: float = 0.0
    history: list[dict[str, float | int | None]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """A checkpoint in memory. `optimizer` maps `exp_avg.<parameter>` and `exp_avg_sq.<parameter>` to moments."""

    progress: Progress
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def commit(
    writer: Writer,
    state: State,
    epoch: int,
    config: Config,
    index: Index,
    base: BaseInfo,
    metrics: Mapping[str, float | int | str | None],
) -> Entry:
    """Upload the parts, then commit them by one log entry."""
    folder = f"step-{state.progress.step:08d}"
    document = {
        "progress": asdict(state.progress),
        "config": config.model_dump(mode="json"),
        "labels": list(index.labels),
        "base_weights_sha256": base.weights_sha256,
    }
    parts = (
        writer.upload(f"{folder}/{ADAPTER}", save(_contiguous(state.adapter))),
        writer.upload(f"{folder}/{OPTIMIZER}", save(_contiguous(state.optimizer))),
        writer.upload(f"{folder}/{STATE}", (json.dumps(document) + "\n").encode()),
    )
    return writer.append("checkpoint", epoch, state.progress.step, parts, dict(metrics))


def restore(store: Store, run_id: str, entry: Entry) -> State:
    """The committed state; raises `StorageError` when a part is missing, was replaced or is not what it should be."""
    document = read_state(store, run_id, entry)
    try:
        return State(
            progress=Progress(**document["progress"]),
            adapter=load(read_part(store, run_id, _part(entry, ADAPTER))),
            optimizer=load(read_part(store, run_id, _part(entry, OPTIMIZER))),
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise StorageError(f"The checkpoint {entry.seq:08d} of run {run_id} cannot be read ({error}).") from None


def restore_adapter(store: Store, run_id: str, entry: Entry) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load(read_part(store, run_id, _part(entry, ADAPTER)))
    return tensors


def read_state(store: Store, run_id: str, entry: Entry) -> dict[str, Any]:
    document = json.loads(read_part(store, run_id, _part(entry, STATE)))
    assert isinstance(document, dict)
    return document


def _part(entry: Entry, name: str) -> Part:
    for part in entry.parts:
        if part.key.endswith(f"/{name}"):
            return part
    raise StorageError(f"The checkpoint {entry.seq:08d} names no {name}; it was not written by this program.")


def best(entries: Sequence[Entry]) -> Entry | None:
    """The checkpoint with the highest macro-F1; the earlier one of equals."""
    scored = [entry for entry in entries if entry.kind == "checkpoint" and entry.metrics.get("macro_f1") is not None]
    return max(scored, key=lambda entry: (float(entry.metrics["macro_f1"] or 0), -entry.seq), default=None)


def check_same_question(document: Mapping[str, Any], config: Config, index: Index, entry: Entry, run_id: str) -> list[str]:
    """What is different but may be, one `section.key (was …, is …)` each.

    Raises `WrongRequest` when the run was started for other data, labels or learning values.
    """
    problems = []
    if entry.index_sha256 != index.sha256():
        problems.append("the data set's index")
    if tuple(document["labels"]) != index.labels:
        problems.append("the labels")
    old, new = document["config"], config.model_dump(mode="json")
    different = {
        f"{section}.{key}": f"{section}.{key} (was {old.get(section, {}).get(key)!r}, is {value!r})"
        for section, fields in new.items()
        for key, value in fields.items()
        if old.get(section, {}).get(key) != value
    }
    problems += [words for name, words in different.items() if name in _FIXED]
    if problems:
        raise WrongRequest(
            f"Run {run_id} was started with another request; different now: {'; '.join(problems)}. "
            "Give the old values to continue it, or another run.id to start a new run."
        )
    return list(different.values())


def check_same_base(document: Mapping[str, Any], base: BaseInfo, run_id: str) -> None:
    """Raises `WrongRequest` when the weights of the base are others; where they lie does not matter."""
    if document["base_weights_sha256"] != base.weights_sha256:
        raise WrongRequest(
            f"Run {run_id} was started on another base than {base.name} is now: its weights differ. Give the old model.base to "
            "continue it, or another run.id to start a new run."
        )


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """AdamW's moments by parameter name, in float32 on the CPU; a parameter that never had a gradient has none."""
    moments = {}
    for parameter, name in names.items():
        for key in _MOMENTS:
            if key in optimizer.state[parameter]:
                moments[f"{key}.{name}"] = optimizer.state[parameter][key].detach().cpu()
    return moments


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], moments: Mapping[str, torch.Tensor], step: int
) -> None:
    """Put the moments back; every parameter must find its own."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device if group.get("fused") else "cpu"),
                **{key: moments[f"{key}.{name}"].to(parameter.device, torch.float32).clone() for key in _MOMENTS},
            }


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
