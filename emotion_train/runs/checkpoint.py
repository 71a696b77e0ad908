"""The resumable state of a run as safetensors and JSON, committed by one log entry.

It holds the trained weights (adapter and head, or a whole encoder), optimizer moments and the
cursor. The learning rate, the random numbers and the order of posts are functions of the step and
need no saving. At r=16 on q, k, v, o of Mistral Small 3.1 it takes 0.22 GiB; for a whole encoder,
12 bytes per weight. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError, field_validator

from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.edges.bounded import Unreadable, object_in, phrase, tensors_in, tensors_to_buffers
from emotion_train.errors import Damaged, ObjectNotFound, WrongRequest
from emotion_train.model.load import BaseInfo
from emotion_train.model.lora import peft_name
from emotion_train.report.schema import Evaluation, LossPoint, Parent
from emotion_train.runs.log import Entry, Part, Writer, read_large_part, read_part
from emotion_train.runs.question import same_question
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.store import Store

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
AVERAGE = "average.safetensors"  # the average of adapter and head, where train.ema asks for it
EVENTS = "run.tfevents"  # TensorBoard's events up to the step, where there are any
MOMENTS = ("exp_avg", "exp_avg_sq")
T = TypeVar("T")


@dataclass
class Progress:
    """The position of a run, and its counts over all ranks: `step` counts completed optimizer steps
    of the whole run.

    `computed_tokens` includes filling. Counts and seconds go up to the last save;
    `earlier_wall_seconds` is the time for which earlier processes held the machine, until their
    last commit. `loss_sum` adds the losses of the `loss_steps` steps since the last evaluation, one
    by one, so that it does not depend on when the run was saved. `train_seconds` includes the
    `stall_seconds` in which training waited for the copies of its `saves`, and the
    `warm_up_seconds` of each start's first step, which builds kernels. `upload_seconds` ran in
    parallel. `curve` and the fields after it are the training loss by step (`training/curve.py`).
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    bad_rows: int = 0
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    earlier_wall_seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    saves: int = 0
    stall_seconds: float = 0.0
    upload_seconds: float = 0.0
    warm_up_examples: int = 0
    warm_up_seconds: float = 0.0
    history: list[dict[str, float | int | None]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    curve_every: int = 1
    curve_sum: float = 0.0
    curve_steps: int = 0


@dataclass(frozen=True)
class State:
    """A checkpoint in memory. `optimizer` maps `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`
    to moments; `events` are TensorBoard's so far. `average`, unless empty, is scored and published
    in place of `adapter`.
    """

    progress: Progress
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    events: bytes = b""
    average: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """The identity of a run, kept in every checkpoint so that it is not resumed as another run."""

    config: Config
    index: Index
    base: BaseInfo
    parent: Parent | None = None  # the adapter that training started from


@dataclass(frozen=True)
class Snapshot:
    """A state on its way to the log. `epoch` is the epoch of the next step; `metrics` has macro_f1
    when the state was evaluated.
    """

    state: State
    epoch: int
    question: Question
    metrics: Mapping[str, float | int | str | None]

    @property
    def step(self) -> int:
        return self.state.progress.step

    @property
    def macro_f1(self) -> float | None:
        score = self.metrics.get("macro_f1")
        return None if score is None else float(score)

    @property
    def name(self) -> str:
        """The folder of the parts. A state with a score has another name than one of the same step
        without, so that no committed part is ever overwritten with other bytes.
        """
        return f"step-{self.step:08d}" + ("" if self.macro_f1 is None else "-scored")

    def files(self) -> Iterator[tuple[str, bytes | Buffers]]:
        """The name and content of each part, whose tensors are not copied."""
        yield ADAPTER, Buffers(tensors_to_buffers(self.state.adapter))
        yield OPTIMIZER, Buffers(tensors_to_buffers(self.state.optimizer))
        if self.state.average:
            yield AVERAGE, Buffers(tensors_to_buffers(self.state.average))
        if self.state.events:
            yield EVENTS, self.state.events
        document = {
            "progress": asdict(self.state.progress),
            "config": self.question.config.model_dump(mode="json"),
            "labels": list(self.question.index.labels),
            "base_weights_sha256": self.question.base.weights_sha256,
        }
        if self.question.parent is not None:
            document["parent"] = self.question.parent.model_dump(mode="json")
        yield STATE, (json.dumps(document) + "\n").encode()


def commit(writer: Writer, snapshot: Snapshot) -> Entry:
    """Upload the parts, then commit them by one log entry."""
    parts = tuple(writer.upload(f"{snapshot.name}/{name}", data) for name, data in snapshot.files())
    return writer.append("checkpoint", snapshot.epoch, snapshot.step, parts, dict(snapshot.metrics))


def host_copy(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A float32 copy in host memory. From a GPU, all tensors are copied at once into pinned memory,
    which PyTorch keeps for the next copy.
    """
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    copies = {
        name: (
            torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda).copy_(
                tensor, non_blocking=True
            )
        )
        for name, tensor in tensors.items()
    }
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and verified, with the bytes of its parts by name. The tensors of
    its states share the memory of parts that are in a buffer.
    """

    entry: Entry
    files: dict[str, memoryview]

    @property
    def document(self) -> dict[str, Any]:
        return _document(bytes(self.files[STATE]))

    @property
    def events(self) -> bytes:
        """TensorBoard's events up to this step."""
        return bytes(self.files.get(EVENTS, b""))

    def state(self) -> State:
        """The state in the parts. Raises `Damaged` unless they are float32 tensors without NaN and
        infinity, with both moments of each parameter and the entry's step.
        """
        try:
            progress = Progress(**self.document["progress"])
            if progress.step != self.entry.step:
                raise Unreadable(f"{STATE} says step {progress.step}")
            adapter, optimizer = tensors_in(self.files[ADAPTER]), tensors_in(self.files[OPTIMIZER])
            if optimizer or progress.step:  # before the first update there are none
                _refuse_other_moments(adapter, optimizer)
            average = tensors_in(self.files[AVERAGE]) if AVERAGE in self.files else {}
            shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (adapter, average)]
            if average and shapes[0] != shapes[1]:
                raise Unreadable(f"{AVERAGE} is of other parameters than {ADAPTER}")
            return State(progress, adapter, optimizer, self.events, average)
        except (Unreadable, KeyError, TypeError) as error:
            raise Damaged(f"The checkpoint of step {self.entry.step} cannot be read ({error}).") from None


def _refuse_other_moments(adapter: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]) -> None:
    """Raises `Unreadable` unless there are both moments of each parameter, in its shape."""
    moments = {}
    for name, tensor in optimizer.items():
        key, _, own = name.partition(".")
        moments[f"{key}.{peft_name(own)}"] = tensor
    wanted = {f"{key}.{name}": tensor.shape for name, tensor in adapter.items() for key in MOMENTS}
    if lacking := sorted(wanted.keys() - moments.keys()):
        raise Unreadable(f"{OPTIMIZER} lacks {lacking[0]}")
    if len(optimizer) != len(wanted):
        raise Unreadable(f"{OPTIMIZER} has moments that belong to no parameter")
    for name, tensor in moments.items():
        if tensor.shape != wanted[name]:
            raise Unreadable(f"{name} has the shape {list(tensor.shape)}, not {list(wanted[name])}")
        if name.startswith(f"{MOMENTS[1]}.") and bool((tensor < 0).any()):
            raise Unreadable(f"{name} holds a negative number")


def read_saved(store: Store, run_id: str, entry: Entry) -> Saved:
    """The checkpoint of an entry; raises `ObjectNotFound` when a part is missing, and `Damaged`
    when a part was replaced or cannot be read.
    """
    names = [ADAPTER, OPTIMIZER, STATE]
    names += [name for name in (EVENTS, AVERAGE) if _has(entry, name)]
    saved = Saved(entry, {name: read_large_part(store, run_id, _part(entry, name)) for name in names})
    saved.state()
    return saved


def newest(
    entries: Sequence[Entry], read: Callable[[Entry], T], tell: Callable[[str], None] = lambda message: None
) -> T | None:
    """The result of `read` for the newest checkpoint that verifies; None when there is no
    checkpoint. `tell` gets a message for each that is damaged or lost.

    Raises `WrongRequest` when none verifies, and `StorageError` when the store does not answer,
    refuses, or gives other bytes each time, which says nothing about the parts.
    """
    return _first_good([entry for entry in reversed(entries) if entry.kind == "checkpoint"], read, tell)


def best_adapter(
    store: Store, run_id: str, entries: Sequence[Entry], tell: Callable[[str], None]
) -> tuple[Entry, memoryview] | None:
    """The entry and adapter file of the checkpoint with the highest macro-F1 that verifies; on a
    tie, the earlier one. If it has an average, which was scored, the average is the adapter.
    """
    scored = [
        entry for entry in entries if entry.kind == "checkpoint" and entry.metrics.get("macro_f1") is not None
    ]
    scored.sort(key=lambda entry: (-float(entry.metrics["macro_f1"] or 0), entry.seq))

    def read(entry: Entry) -> tuple[Entry, memoryview]:
        data = read_large_part(store, run_id, _part(entry, AVERAGE if _has(entry, AVERAGE) else ADAPTER))
        try:
            tensors_in(data)
        except Unreadable as error:
            raise Damaged(f"The adapter of step {entry.step} cannot be read ({error}).") from None
        return entry, data

    return _first_good(scored, read, tell)


def _first_good(
    entries: Sequence[Entry], read: Callable[[Entry], T], tell: Callable[[str], None]
) -> T | None:
    for entry in entries:
        try:
            return read(entry)
        except (Damaged, ObjectNotFound) as error:
            tell(
                f"Checkpoint {entry.seq:08d} of step {entry.step} does not verify and was passed over:"
                f" {error}"
            )
    if entries:
        raise WrongRequest(
            f"None of the {len(entries)} checkpoints of this run verifies; put their objects back, or start a"
            " new run with another run.id."
        )
    return None


def read_document(store: Store, run_id: str, entry: Entry) -> dict[str, Any]:
    """The state.json of a checkpoint: the run's position and identity."""
    return _document(read_part(store, run_id, _part(entry, STATE)))


class _Document(BaseModel):
    """The required content of a checkpoint's state.json."""

    progress: Progress
    config: dict[str, dict[str, Any]]
    labels: list[str]
    base_weights_sha256: str
    parent: Parent | None = None

    @field_validator("progress")
    @classmethod
    def _counts(cls, progress: Progress) -> Progress:
        for name, value in asdict(progress).items():
            if not isinstance(value, list) and not (math.isfinite(value) and 0 <= value < 2**63):
                raise ValueError(f"{name} is {value}")
        for one in progress.history:
            Evaluation.model_validate(one)
        for point in progress.curve:
            step, loss = point
            LossPoint.model_validate({"step": step, "loss": loss})
        return progress


def _document(data: bytes) -> dict[str, Any]:
    try:
        # an evaluation may have a loss that is no number
        document = object_in(data, finite=False)
        _Document.model_validate(document)
    except (Unreadable, ValidationError) as error:
        raise Damaged(f"A checkpoint's {STATE} is not what this program writes ({phrase(error)}).") from None
    return document


def _has(entry: Entry, name: str) -> bool:
    return any(part.key.endswith(f"/{name}") for part in entry.parts)


def _part(entry: Entry, name: str) -> Part:
    for part in entry.parts:
        if part.key.endswith(f"/{name}"):
            return part
    raise Damaged(f"The checkpoint {entry.seq:08d} names no {name}; it was not written by this program.")


def check_same_question(
    document: Mapping[str, Any], config: Config, index: Index, entry: Entry, run_id: str
) -> list[str]:
    """The settings that differ and may, each as `section.key (was …, is …)`.

    Raises `WrongRequest` when the run was started for other data, labels or learning values.
    """
    problems = []
    if entry.index_sha256 != index.sha256():
        problems.append("the data set's index")
    if tuple(document["labels"]) != index.labels:
        problems.append("the labels")
    return same_question(run_id, document["config"], parent_of(document), config, problems)


def parent_of(document: Mapping[str, Any]) -> Parent | None:
    """The adapter that the run's training started from; None where it started from none."""
    stored = document.get("parent")
    return None if stored is None else Parent.model_validate(stored)


def check_same_base(document: Mapping[str, Any], base: BaseInfo, run_id: str) -> None:
    """Raises `WrongRequest` when the base has other weights; their place does not matter."""
    if document["base_weights_sha256"] != base.weights_sha256:
        raise WrongRequest(
            f"Run {run_id} was started on another base than {base.name} is now: its weights differ. Give the"
            " old model.base to continue it, or another run.id to start a new run."
        )
