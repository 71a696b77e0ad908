"""All figures of a benchmark, computed only from stored answers: the same answers give the same
bytes.

A post without a readable answer counts as answered with no label: wrong, and kept in every pair.

Letters: N posts, P answered posts, C labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from emotion_train.evaluation.comparison import Outcome, Paired, holm, judged, paired_difference, resampled_f1
from emotion_train.evaluation.metrics import FEWEST_DIFFERENT, alike_N, bootstrap_macro_f1
from emotion_train.hosted.answers import OUTCOMES, Answer
from emotion_train.hosted.own_answers import OwnAnswers
from emotion_train.hosted.prices import usd_of
from emotion_train.hosted.prompts import labels_in
from emotion_train.hosted.rows import Rows
from emotion_train.report.units import dollars, rate, round_up, signed
from emotion_train.storage.document import FrozenModel, Manifest

SAMPLES = 2000
SEED = 42
NO_LABEL = "no answer"  # the last column of a confusion, which is no class

AGREEMENT = (
    "Macro-F1 is agreement with these annotators. A low macro-F1 says that a model labels differently,"
    " not that people would prefer the annotators' labels."
)
SEEN = (
    "A hosted model may have seen a public data set in its training, test posts too; this benchmark cannot"
    " tell."
)
NETWORK = "Latencies of hosted models include the network and their queues; the adapter's own do not."
VALIDATION = "The validation posts also chose the adapter's checkpoint, so they flatter the adapter."


class Difference(FrozenModel):
    """A model's macro-F1 minus the adapter's, paired, with its 95 % interval. `p` is corrected for
    the number of models in the benchmark.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def outcome(self) -> Outcome:
        return judged(Paired(self.value, self.low, self.high, self.p), self.p)


class Money(FrozenModel):
    """Dollars per million tokens, for all requests, and per million posts. `estimated` counts the
    answers of unknown cost, which count with the most that they can have cost.
    """

    usd_in: float
    usd_out: float
    source: str
    usd: float
    usd_per_million_posts: float
    estimated: int


class Speed(FrozenModel):
    """The speed of answers that needed one attempt, with `concurrency` requests under way on
    average.
    """

    first_attempts: int
    p50_s: float
    p95_s: float
    concurrency: float
    posts_per_second: float


class SystemFigures(FrozenModel):
    """One classifier's figures on the posts; `host` is set for a hosted model.

    `answered_macro_f1` covers only the posts that it answered with labels; None where it answered
    all or none.
    """

    name: str
    host: str | None = None
    returned_models: tuple[str, ...] = ()
    macro_f1: float
    low: float
    high: float
    accuracy: float
    difference: Difference | None = None
    outcomes: dict[str, int] = Field(default_factory=dict)
    lost: int = 0
    answered: int
    answered_macro_f1: float | None = None
    answered_low: float | None = None
    answered_high: float | None = None
    f1_by_label: tuple[float, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    form: dict[str, Any] | None = None
    money: Money | None = None
    speed: Speed | None = None


class Benchmark(Manifest):
    """The content of benchmark.json."""

    schema_version: Literal["emotion-train/benchmark/1"] = "emotion-train/benchmark/1"
    data_url: str
    index_sha256: str
    split: str
    rows: int
    of: int
    labels: tuple[str, ...]
    targets: str
    shots: int
    seed: int
    prompt_sha256: str
    own: SystemFigures
    own_facts: dict[str, Any]
    hosted: tuple[SystemFigures, ...]
    floors: tuple[SystemFigures, ...]
    sentences: tuple[str, ...]


def read_answers(
    answers: Sequence[Answer | None], rows: Rows
) -> tuple[NDArray[np.bool_], list[str], NDArray[np.bool_]]:
    """`predicted_NC`, the outcome of each post, and which posts were answered with labels. A None
    among `answers` is a request that was lost with its process.
    """
    predicted_NC = np.zeros((len(answers), len(rows.labels)), bool)
    outcomes = []
    for row, answer in enumerate(answers):
        outcome: str = "failed" if answer is None else answer.outcome
        if answer is not None and outcome == "answered":
            labels = labels_in(answer.text, rows.labels, rows.kind)
            if labels is None:
                outcome = "unparseable"
            else:
                predicted_NC[row, sorted(labels)] = True
        outcomes.append(outcome)
    return predicted_NC, outcomes, np.array([outcome == "answered" for outcome in outcomes])


def system(
    name: str,
    rows: Rows,
    predicted_NC: NDArray[np.bool_],
    answered_N: NDArray[np.bool_] | None = None,
    **facts: Any,
) -> SystemFigures:
    """The figures of one classifier; unanswered posts count as wrong."""
    truth_NC, classes = rows.truth_NC, len(rows.labels)
    resampled = resampled_f1(truth_NC, [predicted_NC], classes, 1, SEED)
    interval = bootstrap_macro_f1(truth_NC, predicted_NC, classes, SAMPLES, SEED)
    right_N = alike_N(truth_NC, predicted_NC) & (True if answered_N is None else answered_N)
    of_answered: dict[str, Any] = {}
    if answered_N is not None and answered_N.any() and not answered_N.all():
        truth_PC, predicted_PC = truth_NC[answered_N], predicted_NC[answered_N]
        low, high = bootstrap_macro_f1(truth_PC, predicted_PC, classes, SAMPLES, SEED)
        f1_C = resampled_f1(truth_PC, [predicted_PC], classes, 1, SEED).f1_RC[0]
        of_answered = {
            "answered_macro_f1": float(f1_C.mean()),
            "answered_low": low,
            "answered_high": high,
        }
    return SystemFigures(
        name=name,
        macro_f1=float(resampled.f1_RC[0].mean()),
        low=interval.low,
        high=interval.high,
        accuracy=float(right_N.mean()),
        answered=len(rows.ids) if answered_N is None else int(answered_N.sum()),
        f1_by_label=tuple(resampled.f1_RC[0].tolist()),
        confusion=None if rows.kind == "several" else _confusion(rows, predicted_NC),
        **of_answered,
        **facts,
    )


def _confusion(rows: Rows, predicted_NC: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """Counts of posts: a row for each true label, a column for each answer, the last for none."""
    classes = len(rows.labels)
    column_N = np.where(predicted_NC.any(axis=1), predicted_NC.argmax(axis=1), classes)
    counts = np.zeros((classes, classes + 1), np.int64)
    np.add.at(counts, (np.array([labels[0] for labels in rows.truth]), column_N), 1)
    return tuple(tuple(row) for row in counts.tolist())


def differences(
    rows: Rows, own_NC: NDArray[np.bool_], hosted: Sequence[NDArray[np.bool_]]
) -> list[Difference]:
    """Each hosted model's macro-F1 minus our own's, on the same resamples of the posts."""
    if not hosted:
        return []
    everyone = [own_NC, *hosted]
    resampled = resampled_f1(rows.truth_NC, everyone, len(rows.labels), SAMPLES, SEED)
    paired = [
        paired_difference(
            resampled.f1_RC.mean(axis=1),
            resampled.f1_SRC.mean(axis=2),
            [0],
            [place],
            int((~alike_N(own_NC, other_NC)).sum()),
            SEED,
        )[0]
        for place, other_NC in enumerate(hosted, start=1)
    ]
    corrected = holm(pair.p for pair in paired)
    return [
        Difference(value=pair.difference, low=pair.low, high=pair.high, p=p)
        for pair, p in zip(paired, corrected, strict=True)
    ]


def outcomes_of(outcomes: Sequence[str]) -> dict[str, int]:
    counts = Counter(outcomes)
    return {name: counts[name] for name in OUTCOMES}


def speed_of(answers: Sequence[Answer | None]) -> Speed | None:
    """The speed of answers that needed one attempt; None where there are none."""
    first = [
        answer
        for answer in answers
        if answer is not None and answer.attempts == 1 and answer.latency_s is not None
    ]
    if not first:
        return None
    latencies = np.array([answer.latency_s for answer in first], np.float64)
    concurrency = float(np.mean([answer.concurrency for answer in first]))
    p50, p95 = np.percentile(latencies, [50, 95]).tolist()
    mean = float(latencies.mean())
    return Speed(
        first_attempts=len(first),
        p50_s=p50,
        p95_s=p95,
        concurrency=concurrency,
        posts_per_second=concurrency / mean if mean else 0.0,
    )


def money_of(answers: Sequence[Answer | None], nano: int, price: Any) -> Money:
    """The dollars of these answers. `nano` is all spending on them, lost requests included."""
    return Money(
        usd_in=price.usd_in,
        usd_out=price.usd_out,
        source=price.source,
        usd=usd_of(nano),
        usd_per_million_posts=usd_of(nano) / max(1, len(answers)) * 1e6,
        estimated=sum(answer is None or answer.estimated for answer in answers),
    )


def own_usd_per_million(own: OwnAnswers) -> float | None:
    """Dollars per million posts, by the measured speed and the machine's price; None where either
    is unknown.
    """
    if own.usd_per_hour is None or not own.posts_per_second:
        return None
    return own.usd_per_hour / 3600 / own.posts_per_second * 1e6


def sentences_of(rows: Rows, own: OwnAnswers, hosted: Sequence[SystemFigures]) -> list[str]:
    """The sentences that explain the table, verdicts first."""
    sentences = [_verdict(model) for model in hosted]
    sentences += [sentence for model in hosted if (sentence := _break_even(own, model)) is not None]
    sentences += [AGREEMENT, SEEN, NETWORK]
    if rows.split == "validation":
        sentences.append(VALIDATION)
    if len(rows.ids) < rows.of:
        sentences.append(f"{len(rows.ids):,} of {rows.of:,} posts were asked, with each label in its share.")
    sentences += _own_words(own)
    if own.posts_per_second and own.speed == "training":
        sentences.append(
            "The adapter's posts/s are those of its training, which also computes gradients: it labels"
            " faster, and for fewer dollars, than this table shows; --adapter measures it."
        )
    sentences += [
        f"{model.lost:,} requests to {model.name} were under way when their process was killed. They may have"
        " been paid for, count as failed with the most that they can have cost, and are asked again only by"
        " --ask-again."
        for model in hosted
        if model.lost
    ]
    return sentences


def _own_words(own: OwnAnswers) -> list[str]:
    """Where the adapter's speed was measured, and the source of its dollars."""
    if not own.posts_per_second:
        return []
    where = "an unknown device" if own.device is None else own.device
    many = f"{own.devices} x " if own.devices > 1 else ""
    measured = (
        f"The adapter's {rate(own.posts_per_second)} posts/s are those of its {own.speed} on {many}{where}"
    )
    if own.usd_per_hour is None:
        return [f"{measured}; its dollars are unknown: type --usd-per-hour with the price of that machine."]
    return [f"{measured}; its dollars are those of that machine at {dollars(own.usd_per_hour)} an hour."]


def _verdict(model: SystemFigures) -> str:
    assert model.difference is not None
    difference = model.difference
    interval = f"{signed(difference.low)} to {signed(difference.high)}"
    tested = (
        f"macro-F1 {signed(difference.value)}, 95 % interval {interval},"
        f" p {'< 0.001' if difference.p < 0.001 else f'= {difference.p:.3f}'}"
    )
    if difference.outcome == "open":
        return f"No difference can be shown between {model.name} and the adapter ({tested})."
    return f"{model.name} is {difference.outcome} than the adapter ({tested})."


def _break_even(own: OwnAnswers, model: SystemFigures) -> str | None:
    """How many posts pay for the training of the adapter, where all prices are known."""
    a_million = own_usd_per_million(own)
    if model.money is None or a_million is None or own.training_usd is None:
        return None
    theirs = model.money.usd_per_million_posts
    prices = f"{dollars(a_million)} a million posts against {dollars(theirs)} of {model.name}"
    if theirs <= a_million:
        return f"The adapter never pays for its training of {dollars(own.training_usd)}: {prices}."
    volume = own.training_usd / (theirs - a_million) * 1e6
    return (
        f"The adapter pays for its training of {dollars(own.training_usd)} after {round_up(volume):,} posts:"
        f" {prices}."
    )


def expected_interval(rows: Rows, own_NC: NDArray[np.bool_]) -> str:
    """A line that says how wide an interval these posts give, by our own adapter's answers."""
    low, high = bootstrap_macro_f1(rows.truth_NC, own_NC, len(rows.labels), SAMPLES, SEED)
    few = f"; with fewer than {FEWEST_DIFFERENT} posts answered differently, no difference can be shown"
    return (
        f"{len(rows.ids):,} of {rows.of:,} posts of {rows.split}: the adapter's macro-F1 has an interval of"
        f" ±{(high - low) / 2:.3f} on them{few}"
    )


def facts_of(own: OwnAnswers) -> Mapping[str, Any]:
    """The adapter's facts in benchmark.json, apart from its scores."""
    content = own.model_dump(mode="json", exclude={"labels", "schema_version"})
    return content | {"usd_per_million_posts": own_usd_per_million(own)}
