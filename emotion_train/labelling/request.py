"""A request to label, in the order of time: adapter, source, job, and one worker of the job.

The model is loaded only once the job is known to be the one asked for, with posts left to label.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from emotion_train.console import counted
from emotion_train.edges.bounded import Unreadable, object_file, phrase
from emotion_train.edges.paths import typed_path
from emotion_train.errors import NotStarted, Preempted, StorageError, WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, base_ahead, open_classifier
from emotion_train.evaluation.decision import DECISION, Decision, read_decision
from emotion_train.evaluation.members import averaged, facts_together
from emotion_train.labelling.job import (
    AdapterIdentity,
    Job,
    Reading,
    Unit,
    create_job,
    find_job,
    refuse_other_request,
    require_create_only,
)
from emotion_train.labelling.planning import FoundSource, find_source, plan_units, with_plan
from emotion_train.labelling.summary import Success, find_success
from emotion_train.labelling.worker import About, Pace, Stopped, Worker
from emotion_train.model.facts import AdapterFacts
from emotion_train.processes.notices import PreemptionWatch, hold_seconds
from emotion_train.report.schema import Report
from emotion_train.runs.adapter_cache import find_adapter
from emotion_train.runs.published import REPORT
from emotion_train.sources.open import not_read
from emotion_train.storage.document import file_sha256, version_of
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.patience import Patience, until_it_answers
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from emotion_train.labelling.scorer import Scorer

T = TypeVar("T")
_MOST_REPORT_BYTES = 64 << 20
_LOOK_EVERY_S = 0.5

_NOT_COMPARED = "so the labels are compared with no earlier shares; pull the adapter again"


@dataclass(frozen=True)
class Request:
    """What to label with which adapters, and how. An existing job's unit size and lease replace
    `unit_posts` and `lease_s`.
    """

    source: str
    out_url: str
    adapters: tuple[str, ...]
    loading: AdapterChoice = field(default_factory=lambda: AdapterChoice(""))
    reading: Reading = field(default_factory=Reading)
    probabilities: bool = False
    accept_precision: float | None = None
    on_bad: Literal["row", "stop"] = "row"
    unit_posts: int = 50_000
    lease_s: float = 600.0
    usd_per_hour: float | None = None
    hold_s: float | None = None
    patience_s: float = 3600.0


@dataclass(frozen=True)
class Labelled:
    """The summary of a job, and this worker's share; `pace` is None where the job was done
    before. `remark` is a sentence on the worker's posts that were cut.
    """

    success: Success
    pace: Pace | None = None
    busy_s: float = 0.0
    remark: str | None = None


@dataclass(frozen=True)
class _Adapters:
    """Adapters that answer together."""

    folders: tuple[Path, ...]
    facts: AdapterFacts
    decision: Decision
    identities: tuple[AdapterIdentity, ...]


def label(
    request: Request,
    watch: PreemptionWatch,
    tell: Callable[[str], None],
    make_scorer: Callable[[Request, Sequence[Path]], Scorer] | None = None,
) -> Labelled:
    """Label until the job is done, together with any other workers.

    Raises `WrongRequest` where `out_url` holds another job, `NotStarted` and `StorageError` for a
    store that does not answer, and `Preempted` once units are left to others. `make_scorer` loads
    the model; tests replace it.
    """
    _refuse_wrong(request)

    def stopping() -> bool:
        notice = watch.notice
        return notice is not None and notice.kind != "rebalance"

    try:
        return _label(request, tell, stopping, make_scorer or load_scorer)
    except Stopped as stopped:
        left = int(stopped.args[0]) if stopped.args else 0
        left_units = f"{counted(left, 'unit')} left to other workers."
        notice = watch.notice
        tell(f"{notice.words if notice is not None else 'Told to end'}: {left_units}")
        _hold(watch, hold_seconds(request.hold_s, os.environ))
        raise Preempted(f"{left_units} The same command labels what is left.") from None


def _refuse_wrong(request: Request) -> None:
    source, out = (open_store(url).url.rstrip("/") for url in (request.source, request.out_url))
    stores = [open_store(url) for url in (request.source, request.out_url)]
    if all(isinstance(store, FolderStore) for store in stores):
        source, out = (str(store.root.resolve()) for store in stores if isinstance(store, FolderStore))
    if f"{out}/".startswith(f"{source}/"):
        raise WrongRequest(
            f"OUT_URL {request.out_url} lies in the source {request.source}: its parts would be read as"
            " posts; give another."
        )


def _label(
    request: Request,
    tell: Callable[[str], None],
    stopping: Callable[[], bool],
    make_scorer: Callable[[Request, Sequence[Path]], Scorer],
) -> Labelled:
    if stopping():
        raise Stopped(0)
    store = open_store(request.out_url)

    def patient(what: str, action: Callable[[], T]) -> T:
        return _at_start(what, store.url, action, request.patience_s, stopping, tell)

    adapters = patient("the adapter", lambda: _adapters(request))
    source = patient("the source", lambda: find_source(request.source, request.reading))
    for line in not_read(source.passed_over):
        tell(line)
    if source.table is not None:
        tell(
            f"{request.source} is a table of {source.table}: its files may also hold posts that the table has"
            " deleted or written anew; to label the table's own, write them as plain Parquet first"
        )
    job = patient("the job", lambda: _job(request, store, source, adapters, tell))
    success = patient("the job", lambda: find_success(store, job))
    if success is not None:
        return Labelled(success)
    patient("the store", lambda: require_create_only(store))
    scorer = make_scorer(request, adapters.folders)
    if stopping():
        raise Stopped(0)
    about = About(_own_name(), _device_name(scorer.device), request.usd_per_hour)
    worker = Worker(
        store,
        job,
        with_plan(source, job.files),
        scorer,
        adapters.decision,
        about,
        stopping=stopping,
        on_bad_stop=request.on_bad == "stop",
        patience_s=request.patience_s,
        tell=tell,
    )
    try:
        success = worker.run()
    except Stopped:
        raise Stopped(worker.left) from None
    return Labelled(success, worker.pace, scorer.busy_s, scorer.remark())


def _at_start(
    what: str,
    url: str,
    action: Callable[[], T],
    patience_s: float,
    stopping: Callable[[], bool],
    tell: Callable[[str], None],
) -> T:
    """What `action` returns, tried again while a store does not answer."""
    telling = Patience()

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not stopping():
            time.sleep(min(_LOOK_EVERY_S, left))
        return stopping()

    def waits(error: StorageError) -> None:
        if telling.may_tell():
            tell(f"WAITING for {what} at {url}: {error}")

    try:
        return until_it_answers(action, Patience(patience_s), wait, waits)
    except StorageError as error:
        if error.transient and stopping():
            raise Stopped(0) from error
        if error.transient:
            raise NotStarted(
                f"Nothing was labelled: {what} was waited for {patience_s:g} s (--patience-s). {error}"
            ) from error
        raise


def _hold(watch: PreemptionWatch, seconds: float) -> None:
    """Wait to be killed. SkyPilot takes a job that ends before its machine for a failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (notice := watch.notice) is not None:
        if notice.kind == "sigint":
            return
        time.sleep(min(_LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))


# --- the adapters ---


def _adapters(request: Request) -> _Adapters:
    """The adapters, pulled and read. Raises `WrongRequest` where they cannot answer together."""
    folders = tuple(find_adapter(name).folder for name in request.adapters)
    facts = facts_together(folders, request.adapters)
    decisions = [read_decision(folder, own) for folder, own in zip(folders, facts, strict=True)]
    identities = tuple(
        _identity(name, folder, own)
        for name, folder, own in zip(request.adapters, folders, facts, strict=True)
    )
    return _Adapters(folders, facts[0], averaged(decisions), identities)


def _identity(name: str, folder: Path, facts: AdapterFacts) -> AdapterIdentity:
    decision = folder / DECISION
    return AdapterIdentity(
        name=name.rstrip("/").rpartition("/")[2],
        weights_sha256=file_sha256(folder / facts.weights_file),
        base=facts.base,
        base_weights_sha256=facts.base_weights_sha256,
        tokenizer_sha256=facts.tokenizer_sha256,
        max_length=facts.max_length,
        decision_sha256=file_sha256(decision) if decision.is_file() else None,
    )


def load_scorer(request: Request, folders: Sequence[Path]) -> Scorer:
    """The adapters on this process's device. Tasks of one Slurm node take one GPU each."""
    first, *more = folders
    loading = replace(request.loading, adapter=first, more=tuple(more))
    with base_ahead(loading) as ahead:
        import torch

        if request.loading.device == "auto" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("SLURM_LOCALID", "0")) % torch.cuda.device_count())
        classifier = open_classifier(loading, ahead)

        from emotion_train.labelling.scorer import AdapterScorer  # behind the base, which it does not need

        return AdapterScorer(classifier)


def _own_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


def _device_name(device: str) -> str:
    from emotion_train.processes.machine import device_name

    kind = device.partition(":")[0]
    return device_name(kind) if kind in ("cpu", "cuda") else device


# --- the job ---


def _job(
    request: Request, store: Store, source: FoundSource, adapters: _Adapters, tell: Callable[[str], None]
) -> Job:
    """The job at OUT_URL, planned and created where there is none. Raises `WrongRequest` where it
    is not the one asked for.
    """
    asked = _asked(request, source, adapters, tell)
    job = find_job(store)
    if job is None:
        tell(f"planning: {counted(len(source.files), 'file')} at {request.source}")
        files, units = plan_units(source, request.reading, request.unit_posts)
        job = create_job(store, asked.model_copy(update={"files": files, "units": units}))
    refuse_other_request(job, asked, request.source, store.url)
    rows = "" if job.rows is None else f"{counted(job.rows, 'row')} in "
    tell(f"job {job.id} at {store.url}: {rows}{counted(len(job.units), 'unit')}")
    return job


def _asked(request: Request, source: FoundSource, adapters: _Adapters, tell: Callable[[str], None]) -> Job:
    """The job that is asked for, without its plan."""
    training, held_out, posts = shares_of_report(adapters.folders[0], adapters.facts.labels, tell)
    return Job(
        id=secrets.token_hex(8),
        source=str(typed_path(request.source)) if "://" not in request.source else request.source,
        kind=source.kind,
        index_sha256=source.index_sha256,
        files=source.files,
        units=(Unit(file=0),),
        reading=request.reading,
        adapters=adapters.identities,
        precision=request.loading.precision or adapters.facts.precision,
        targets=adapters.facts.targets,
        labels=adapters.facts.labels,
        mean_of="logits" if len(adapters.folders) > 1 else "probabilities",
        probabilities=request.probabilities,
        accept_precision=request.accept_precision,
        accept_above=_accept_above(request, adapters),
        training=training,
        held_out=held_out,
        held_out_posts=posts,
        lease_seconds=request.lease_s,
        versions={"emotion_train": version_of("emotion-train")},
    )


def _accept_above(request: Request, adapters: _Adapters) -> float | None:
    """The gate for --accept-precision; raises `WrongRequest` where the adapter has none."""
    if request.accept_precision is None:
        return None
    if len(adapters.folders) > 1:
        raise WrongRequest(
            "--accept-precision uses the gate of one adapter. Several are given, and their mean has no"
            " measured gate; leave it out, or give one --adapter."
        )
    return adapters.decision.accept_above(request.accept_precision)


def shares_of_report(
    folder: Path, labels: Sequence[str], tell: Callable[[str], None]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, int]:
    """Each label's share of the training posts, its share of the answers to held-out posts, and the
    number of held-out posts, by the adapter's report; None, None and 0 without one that fits, and
    then a line says so where there is one.
    """
    path = folder / "report" / REPORT
    try:
        report = Report.model_validate(object_file(path, _MOST_REPORT_BYTES))
    except FileNotFoundError:
        return None, None, 0
    except (OSError, Unreadable, ValueError) as error:
        tell(f"{path} cannot be read ({phrase(error)}), {_NOT_COMPARED}")
        return None, None, 0
    if tuple(report.labels) != tuple(labels):
        tell(f"{path} is about other labels, {_NOT_COMPARED}")
        return None, None, 0
    counts = report.dataset.label_counts.get("train")
    posts = report.dataset.rows.get("train", 0)
    figures = report.splits[report.headline]
    return (
        tuple(count / posts for count in counts) if counts is not None and posts else None,
        tuple(label.predicted / figures.rows for label in figures.per_label) if figures.rows else None,
        figures.rows,
    )
