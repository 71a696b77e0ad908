"""Finds mistakes before a machine is paid for: in config, data set, labels, output, credentials,
base model, GPU and packages.

Every check is made, also when an earlier one has failed, and gives one line. The checks read the
index, the first posts and the small files of the base, and write and delete one probe; a data set
of 10 million posts takes some 20 s.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from emotion_train.config import Config, load_config, require_trackers
from emotion_train.data.index import Index, limited, read_index
from emotion_train.edges.bounded import Unreadable, yaml_file
from emotion_train.errors import EmotionTrainError, StorageError, WrongRequest
from emotion_train.runs.log import read_log, require_conditional_writes, run_ids, summary
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.check.base import check_base, look_at_base
from launch.check.credentials import check_credentials
from launch.check.dataset import (
    Doubt,
    check_data,
    check_labels,
    check_lengths,
    check_objects,
    check_overlap,
)
from launch.check.machine import (
    Target,
    check_disk,
    check_machine,
    check_memory,
    check_precision,
    processes_on_cpu,
    target_of,
)
from launch.check.parent import check_parent
from launch.gpus import kind_of
from launch.plan.choices import Choice, best_settings, spot_of
from launch.plan.faster import larger_steps, larger_steps_words
from launch.plan.prices import Offer
from launch.plan.spot import Spot
from launch.run.choice import requested_file
from launch.run.topology import Gpu
from launch.workload import Work, refuse_unfused_fp8, shape_of_base, work_of

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.trainable import TrainableBase


@dataclass(frozen=True)
class Check:
    """One question's answer. A `doubtful` finding is a warning: a run may start all the same."""

    name: str
    ok: bool
    finding: str
    doubtful: bool = False


def check_all(
    path: str | None,
    overrides: Sequence[str],
    gpus: Sequence[Gpu],
    accelerate_config: str | None,
    *,
    wanted_gpus: str | None = None,
    hours: float | None = None,
) -> Iterator[Check]:
    """One finding per check, as soon as it is made. Where one setting of the config is wrong, the
    others are still checked.
    """
    try:
        config = load_config(path, overrides)
    except WrongRequest as error:
        names = "; ".join(str(error).split("\n  - ")[1:]) or str(error)
        yield Check("config", False, names)
        partial = _what_is_right(path, overrides)
        if partial is None:
            return
        config = partial
    else:
        where = f"{path} and " if path is not None else ""
        yield Check("config", True, f"{where}{len(overrides)} values, sha256 {config.sha256()[:12]}")
    yield from run_checks(config, gpus, accelerate_config, wanted_gpus=wanted_gpus, hours=hours)


def _what_is_right(path: str | None, overrides: Sequence[str]) -> Config | None:
    """The config without the sections that are wrong; None where data or output is not named."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            document = yaml_file(Path(path))
        except (OSError, Unreadable):
            document = None
        values = document if isinstance(document, dict) else {}
    words = [
        f"{section}.{field}={value}"
        for section, fields in values.items()
        if isinstance(fields, Mapping)
        for field, value in fields.items()
        if isinstance(value, str | int | float)
    ]
    right: list[str] = []
    needed = [word for word in (*words, *overrides) if word.startswith(("data.url=", "run.output_url="))]
    try:
        load_config(None, needed)
    except WrongRequest:
        return None
    for word in (*words, *overrides):
        try:
            load_config(None, [*needed, *right, word])
        except WrongRequest:
            continue
        right.append(word)
    return load_config(None, [*needed, *right])


def run_checks(
    config: Config,
    gpus: Sequence[Gpu],
    accelerate_config: str | None,
    *,
    wanted_gpus: str | None = None,
    hours: float | None = None,
) -> Iterator[Check]:
    """One finding per check, as soon as it is made.

    `wanted_gpus` names a machine other than this one; `hours` is how long the run will take (None:
    the plan's estimate, where there is one).
    """

    @cache
    def data() -> Store:
        return open_store(config.data.url)

    @cache
    def index() -> Index:
        return limited(read_index(data()), config.data.limit)

    @cache
    def tokenizer() -> PostTokenizer:
        from emotion_train.data.tokenization import PostTokenizer

        return PostTokenizer.load(config.model.base, config.data.max_length)

    @cache
    def base() -> TrainableBase:
        return look_at_base(config, tokenizer)

    @cache
    def planned() -> _Planned | None:
        return _planned(config, index(), data(), target_of(wanted_gpus, gpus))

    questions: list[tuple[str, Callable[[], str | Doubt]]] = [
        ("data set", lambda: check_data(config, index())),
        ("objects", lambda: check_objects(data(), index())),
        ("labels", lambda: check_labels(config, index(), data())),
        ("overlap", lambda: check_overlap(data(), index())),
        ("output", lambda: _output(config)),
        (
            "credentials",
            lambda: check_credentials(config, lambda: hours or _hours(planned())),
        ),
        ("base model", lambda: check_base(base)),
        *(
            [("adapter", lambda: check_parent(config, index(), tokenizer))]
            if config.model.adapter is not None
            else []
        ),
        ("lengths", lambda: check_lengths(config, index(), data(), tokenizer)),
        (
            "memory",
            lambda: check_memory(
                config,
                target_of(wanted_gpus, gpus),
                index,
                processes_on_cpu(wanted_gpus, gpus, accelerate_config),
            ),
        ),
        *([("steps", lambda: _steps(config, planned()))] if _is_planned_for(wanted_gpus, gpus) else []),
        ("precision", lambda: check_precision(config, wanted_gpus, gpus, accelerate_config)),
        ("trackers", lambda: _trackers(config)),
    ]
    if wanted_gpus is None:
        questions += [
            ("machine", lambda: check_machine(config, gpus, accelerate_config)),
            ("disk", lambda: check_disk(base)),
        ]
    elif accelerate_config is not None:
        questions.append(("machine", lambda: f"{requested_file(accelerate_config).stem}: asked for"))
    for name, question in questions:
        yield _ask(name, question)


def _ask(name: str, question: Callable[[], str | Doubt]) -> Check:
    try:
        answer = question()
        if isinstance(answer, Doubt):
            return Check(name, True, answer.words, doubtful=True)
        return Check(name, True, answer)
    except EmotionTrainError as error:
        return Check(name, False, str(error))


# --- the output ---


def _output(config: Config) -> str:
    store = open_store(config.run.output_url)
    if config.run.kernels_url is not None:
        open_store(config.run.kernels_url)
    run_id = config.run.id
    require_conditional_writes(store, run_id or f"check-{secrets.token_hex(4)}", allow_unfenced=False)
    names = run_ids(store)
    words = (
        f"writable, keeps what was created, {len(names)} run{'' if len(names) == 1 else 's'} at"
        f" {config.run.output_url}"
    )
    if run_id in names:
        facts = summary(read_log(store, run_id))
        goes_on = (
            "would be printed, not trained again"
            if facts["state"] == "published"
            else "would resume from there"
        )
        words += f"; {run_id} is {facts['state']} at step {facts['step']} and {goes_on}"
    return words


class _Planned(NamedTuple):
    """What `emotion-launch plan` estimates for this config on one machine."""

    shape: Shape
    work: Work
    choice: Choice


def _is_planned_for(wanted_gpus: str | None, gpus: Sequence[Gpu]) -> bool:
    """Whether the machine has GPUs of a kind that plans are made for."""
    try:
        target = target_of(wanted_gpus, gpus)
    except WrongRequest:  # said by the check of the memory
        return False
    return target is not None and kind_of(target.name) is not None


def _hours(planned: _Planned | None) -> float | None:
    return None if planned is None else planned.choice.spot_hours or planned.choice.hours


def _planned(config: Config, index: Index, store: Store, target: Target | None) -> _Planned | None:
    """The plan for the machine; None where its GPU is not in the table, the base cannot be read, or
    does not fit.
    """
    kind = None if target is None else kind_of(target.name)
    if kind is None or target is None:
        return None
    try:
        shape = shape_of_base(config.model.base, config.model.layers)
        if config.model.precision == "fp8":
            refuse_unfused_fp8(config, shape, "model.precision=")
        work = work_of(config, index, store, None)
    except (WrongRequest, StorageError):  # said by the checks of base and precision
        return None
    found = best_settings(
        config, shape, work, kind, target.gpus, Offer(), spot_of(config, Spot()), config.model.precision
    )
    return _Planned(shape, work, found) if isinstance(found, Choice) else None


def _steps(config: Config, planned: _Planned | None) -> str:
    """The speed of the steps, and what larger steps would gain."""
    if planned is None:
        return f"{config.train.global_batch_size} posts each"
    shape, work, best = planned
    larger = larger_steps(config, shape, work, best, spot_of(config, Spot()))
    if larger is None:
        return f"{work.global_batch_size} posts each, {best.posts_per_second:,.0f} posts/s on {best.name}"
    return larger_steps_words(work, best, larger)


# --- the trackers ---


def _trackers(config: Config) -> str:
    require_trackers(config)
    return ", ".join(config.run.trackers) or "none"
