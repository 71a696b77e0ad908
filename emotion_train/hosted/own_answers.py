"""Our own adapter's answers on the posts of a benchmark, its speed and its dollars: as a run
published them, or measured here.

A measurement is stored once, beside the hosted models' answers, so that the same command gives the
same figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emotion_train.config import POSTS_PER_SCORING_STEP
from emotion_train.edges.bounded import Unreadable, object_file, object_in, parquet_errors, require_footer
from emotion_train.errors import AlreadyExists, WrongRequest
from emotion_train.evaluation.predictions import (
    Inconsistent,
    Predictions,
    any_predictions_from_parquet,
    predictions_key,
)
from emotion_train.hosted.answers import digest_of, read_or_none
from emotion_train.hosted.rows import Rows
from emotion_train.storage.document import Manifest, file_sha256
from emotion_train.storage.store import Store

_TIMED_ALONE = 30  # posts, one after the other
_MAX_BYTES = 4 << 30


class OwnAnswers(Manifest):
    """The labels of each post by number, in the order of the posts, with speed and dollars where
    known. `speed` says during what `posts_per_second` was measured, on `devices` devices named
    `device`; `usd_per_hour` is the price of all of them together.
    """

    schema_version: Literal["emotion-train/own-answers/1"] = "emotion-train/own-answers/1"
    name: str
    labels: tuple[tuple[int, ...], ...]
    posts_per_second: float | None = None
    speed: Literal["labelling", "training"] = "labelling"
    p50_s: float | None = None
    p95_s: float | None = None
    device: str | None = None
    devices: int = 1
    training_usd: float | None = None
    usd_per_hour: float | None = None

    def answers(self, classes: int) -> NDArray[np.bool_]:
        """`is_in_NC`: whether each post has each label."""
        is_in_NC = np.zeros((len(self.labels), classes), bool)
        for row, labels in enumerate(self.labels):
            is_in_NC[row, list(labels)] = True
        return is_in_NC


@dataclass(frozen=True)
class _Published:
    """Predictions of a split and the report beside them."""

    url: str
    predictions: Any
    report: dict[str, Any]

    def fact(self, *names: str) -> Any:
        return _fact(self.report, *names)


def own_of_run(run_url: str, rows: Rows) -> OwnAnswers:
    """The answers that a run published for these posts. Raises `WrongRequest` for a run that is not
    published, or was scored on other posts or labels.
    """
    published = _published(run_url, rows.split)
    labels = published.fact("labels")
    if not isinstance(labels, list) or set(labels) != set(rows.labels):
        raise WrongRequest(
            f"{run_url} has other labels than {rows.data_url}; give the data set that it was trained on."
        )
    place_C = np.array([rows.labels.index(label) for label in labels])
    predicted = published.predictions
    row_of = {post_id: row for row, post_id in enumerate(predicted.ids)}
    missing = [post_id for post_id in rows.ids if post_id not in row_of]
    if missing:
        raise WrongRequest(
            f"{run_url} was not scored on {len(missing):,} of these {len(rows.ids):,} posts, for example"
            f" {missing[0]!r}; give the data set that it was trained on, or --adapter."
        )
    truth: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]
    chosen = predicted.take([row_of[post_id] for post_id in rows.ids])
    if isinstance(chosen, Predictions):
        truth = [(int(place_C[label]),) for label in chosen.truth_N]
        answers = [(int(place_C[label]),) for label in chosen.predicted_N]
    else:
        truth, answers = (_lists(x_NC, place_C) for x_NC in (chosen.truth_NC, chosen.predicted_NC))
    if truth != rows.truth:
        raise WrongRequest(
            f"{run_url} was scored on posts with the same ids and other labels; give the data set that it was"
            " trained on."
        )
    labelling, training = (
        published.fact("speed", name) for name in ("labelling_posts_per_second", "posts_per_second")
    )
    return OwnAnswers(
        name=str(published.fact("identity", "run_id") or run_url),
        labels=tuple(answers),
        posts_per_second=labelling or training or None,
        speed="labelling" if labelling else "training",
        device=published.fact("identity", "device"),
        devices=published.fact("identity", "world_size") or 1,
        training_usd=published.fact("speed", "usd"),
        usd_per_hour=published.fact("speed", "usd_per_hour"),
    )


def _lists(is_in_NC: NDArray[np.bool_], place_C: NDArray[np.int64]) -> list[tuple[int, ...]]:
    return [tuple(sorted(place_C[np.flatnonzero(row_C)].tolist())) for row_C in is_in_NC]


def _published(run_url: str, split: str) -> _Published:
    from emotion_train.runs.log import final_entry, read_part
    from emotion_train.runs.published import REPORT, split_run_url
    from emotion_train.storage.open import open_store

    output_url, run_id = split_run_url(run_url)
    store = open_store(output_url)
    entry = final_entry(store, run_id)
    parts = {part.key.removeprefix(f"final/{entry.incarnation:08d}/"): part for part in entry.parts}
    key = predictions_key(split)
    if key not in parts or REPORT not in parts:
        raise WrongRequest(
            f"{run_url} published no {key}; give a --split that it was scored on, or --adapter, which is"
            " scored here."
        )
    try:
        raw = read_part(store, run_id, parts[key])
        require_footer(raw[-8:], len(raw))
        with parquet_errors():
            predictions = any_predictions_from_parquet(raw)
        report = object_in(read_part(store, run_id, parts[REPORT]))
    except (Unreadable, Inconsistent) as error:
        raise WrongRequest(f"The published files of {run_url} cannot be read ({error}).") from None
    return _Published(run_url, predictions, report)


def own_of_adapter(chosen: Any, rows: Rows, store: Store) -> OwnAnswers:
    """The answers of an `AdapterChoice`'s adapter, read back where stored, else measured here by
    the same clock as the hosted models. Raises as `open_classifier`, and `WrongRequest` for other
    labels.
    """
    from dataclasses import replace

    from emotion_train.model.facts import read_facts
    from emotion_train.runs.adapter_cache import find_adapter

    folder = find_adapter(str(chosen.adapter)).folder
    facts = read_facts(folder)
    if set(facts.labels) != set(rows.labels):
        raise WrongRequest(f"The adapter {chosen.adapter} has other labels than {rows.data_url}.")
    weights = file_sha256(folder / facts.weights_file)
    key = f"own/{digest_of(weights, chosen.precision, rows.split, rows.ids)}.json"
    if (stored := read_or_none(OwnAnswers, store, key)) is not None:
        return stored
    made = _score(replace(chosen, adapter=folder), facts, rows)
    try:
        store.create(key, made.to_bytes())
    except AlreadyExists:  # another process measured too, and its figures count
        return read_or_none(OwnAnswers, store, key) or made
    return made


def _score(chosen: Any, facts: Any, rows: Rows) -> OwnAnswers:
    from emotion_train.evaluation.adapter import open_classifier
    from emotion_train.evaluation.decision import read_decision
    from emotion_train.evaluation.scoring import probabilities_of
    from emotion_train.processes.machine import device_name
    from emotion_train.progress import ProgressLine

    decision = read_decision(chosen.adapter, facts)
    classifier = open_classifier(chosen)
    model = classifier.loaded.model

    def answers(texts: Sequence[str]) -> NDArray[np.bool_]:
        prob_NC = probabilities_of(
            model,
            classifier.tokenizer,
            texts,
            classifier.capacity,
            model.device,
            len(facts.labels),
            rows.kind,
        )
        return decision.answers(prob_NC)

    place_C = np.array([rows.labels.index(label) for label in facts.labels])
    alone = []
    for text in (rows.texts[0], *rows.texts[:_TIMED_ALONE]):
        began = time.perf_counter()
        answers([text])
        alone.append(time.perf_counter() - began)
    given: list[tuple[int, ...]] = []
    began = time.perf_counter()
    with ProgressLine("scoring", len(rows.texts), "posts") as line:
        for start in range(0, len(rows.texts), POSTS_PER_SCORING_STEP):
            given += _lists(answers(rows.texts[start : start + POSTS_PER_SCORING_STEP]), place_C)
            line.update(len(given))
    seconds = time.perf_counter() - began
    p50, p95 = np.percentile(alone[1:], [50, 95]).tolist()  # the first one warms up
    report, device = _report_beside(Path(chosen.adapter)), device_name(model.device.type)
    return OwnAnswers(
        name=facts.run_id or "adapter",
        labels=tuple(given),
        posts_per_second=len(given) / seconds,
        p50_s=p50,
        p95_s=p95,
        device=device,
        training_usd=_fact(report, "speed", "usd"),
        usd_per_hour=_price_of(report, device),
    )


def _price_of(report: dict[str, Any], device: str) -> float | None:
    """The price of one such device an hour, if the training used that device at a known price."""
    price, devices = _fact(report, "speed", "usd_per_hour"), _fact(report, "identity", "world_size")
    if price is None or not devices or _fact(report, "identity", "device") != device:
        return None
    return float(price / devices)


def _report_beside(folder: Path) -> dict[str, Any]:
    """The report that was pulled with an adapter; empty where there is none."""
    try:
        return object_file(folder / "report" / "report.json")
    except (OSError, Unreadable):
        return {}


def _fact(report: dict[str, Any], *names: str) -> Any:
    """A value of a report; None where the report's version lacks it."""
    value: Any = report
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
