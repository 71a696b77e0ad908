"""All figures of a comparison, computed once from predictions on the same posts; the pages round
them.

Every other group is compared with the first. Each p is corrected for all comparisons, and each
label's p for all labels of its comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.comparison import (
    McNemar,
    Outcome,
    Paired,
    Resampled,
    Spread,
    holm,
    judged,
    mcnemar,
    paired_difference,
    posts_to_show,
    resampled_f1,
    seeds_to_show,
    smallest_shown,
)
from emotion_train.evaluation.metrics import alike_N
from launch.results.differences import Group, Row, by_config, differences, one_each, seeds_of_one_config
from launch.results.same_posts import OpenData, SamePosts, align, answer_words, texts_of
from launch.results.scored import Scored
from launch.results.scores import Scores, mean_of, scores_of

SAMPLES = 2000
SEED = 42  # as run.seed's default


@dataclass(frozen=True)
class GroupFigures:
    """The means over a group's runs, None where a figure is not known. `usd` and `seconds` are for
    one run.
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    scores: Scores
    usd: float | None
    seconds: float | None
    posts_per_second: float | None
    tokens_per_second: float | None
    device: str | None

    @property
    def macro_f1(self) -> float:
        return self.scores.macro_f1


class LabelDifference(NamedTuple):
    """One label's F1 in the two groups; `p` is corrected for all labels of the comparison."""

    label: str
    support: int
    first: float
    second: float
    paired: Paired
    p: float

    @property
    def outcome(self) -> Outcome:
        return judged(self.paired, self.p)


class Flip(NamedTuple):
    """A post that two groups answer differently, with each group's probability of its true label.
    Where a post may have several labels, this is the mean probability of the true answer over the
    labels that only one group gives.
    """

    post_id: str
    truth: str
    first: str
    second: str
    first_probability: float
    second_probability: float
    text: str | None


@dataclass(frozen=True)
class Flips:
    """Posts that only the first (`lost`) or only the second (`won`) got right, and posts that both
    got wrong in different ways (`other`), each with the largest change of the true label's
    probability first. Where a post may have several labels, an answer is right when it gives all of
    them and no other.
    """

    lost: tuple[Flip, ...]
    won: tuple[Flip, ...]
    other: tuple[Flip, ...]

    @property
    def total(self) -> int:
        return len(self.lost) + len(self.won) + len(self.other)


@dataclass(frozen=True)
class Versus:
    """One group against the first. `p` is `macro_f1.p` corrected for all comparisons. The
    difference would show with `seeds` of each config, or on `posts` with the present number of
    seeds.
    """

    group: int
    macro_f1: Paired
    p: float
    spread: Spread
    seeds: int | None
    posts: int | None
    labels: tuple[LabelDifference, ...]
    mcnemar: McNemar
    flips: Flips

    @property
    def outcome(self) -> Outcome:
        return judged(self.macro_f1, self.p)


@dataclass(frozen=True)
class SeedSpread:
    """Macro-F1 of one config's seeds, and the smallest difference to another config that as many
    seeds of each would show, on an unlimited number of posts.
    """

    name: str
    scores: tuple[float, ...]
    mean: float
    deviation: float
    smallest_shown: float


@dataclass(frozen=True)
class Comparison:
    targets: TargetKind
    split: str
    rows: int
    groups: tuple[GroupFigures, ...]
    versus: tuple[Versus, ...]
    seeds: tuple[SeedSpread, ...]
    differences: dict[str, list[Row]]
    remarks: tuple[str, ...]
    grouped: bool

    @property
    def worse(self) -> tuple[str, ...]:
        """Names of the groups that are worse than the first beyond chance."""
        return tuple(self.groups[one.group].name for one in self.versus if one.outcome == "worse")


def compare(
    scored: Sequence[Scored],
    data: Sequence[OpenData | str],
    *,
    group_by_config: bool = False,
    samples: int = SAMPLES,
) -> Comparison:
    """The comparison of all groups with the first. Raises `WrongRequest` where targets, posts,
    labels or texts are not the same, and where `by_config` does.
    """
    groups = by_config(scored) if group_by_config else one_each(scored)
    same = align(scored, data)
    predicted = [one.predicted for one in same.predictions]
    resampled = resampled_f1(same.truth, predicted, len(same.labels), samples, SEED)
    pooled = [_pooled(same, group) for group in groups]
    flips = [_flips(same, pooled[0], other) for other in pooled[1:]]
    texts, without = texts_of({post for one in flips for post in one.ids}, same, scored[0].split, data)
    paired = [_paired(resampled, same, groups[0], group) for group in groups[1:]]
    corrected = holm(macro.p for macro, _, _ in paired)
    versus = tuple(
        Versus(
            group=place,
            macro_f1=macro,
            p=p,
            spread=spread,
            seeds=seeds_to_show(macro.difference, spread),
            posts=posts_to_show(
                macro.difference, spread, len(groups[0].runs), len(group.runs), len(same.ids)
            ),
            labels=labels,
            mcnemar=mcnemar(same.truth, pooled[0].answer, pooled[place].answer),
            flips=flipped.with_texts(texts),
        )
        for place, (group, (macro, spread, labels), p, flipped) in enumerate(
            zip(groups[1:], paired, corrected, flips, strict=True), start=1
        )
    )
    remarks = [*same.remarks, *_remarks(scored)]
    if without is not None and any(one.ids for one in flips):
        remarks.append(f"The texts of the posts cannot be shown: {without}.")
    return Comparison(
        targets=same.predictions[0].targets,
        split=scored[0].split,
        rows=len(same.ids),
        groups=tuple(_figures(scored, same, group) for group in groups),
        versus=versus,
        seeds=tuple(_seed_spread(resampled, group) for group in seeds_of_one_config(scored)),
        differences=differences(scored, groups, data),
        remarks=tuple(remarks),
        grouped=group_by_config,
    )


# --- figures ---


def _figures(scored: Sequence[Scored], same: SamePosts, group: Group) -> GroupFigures:
    predictions = [same.predictions[run] for run in group.runs]
    reports = [scored[run].report for run in group.runs]
    speeds = [report.speed for report in reports if report is not None]
    devices = dict.fromkeys(
        f"{report.identity.world_size} × {report.identity.device}" for report in reports if report is not None
    )
    prices = [speed.usd for speed in speeds if speed.usd is not None]
    return GroupFigures(
        name=group.name,
        runs=tuple(scored[run].name for run in group.runs),
        seeds=tuple(scored[run].seed for run in group.runs),
        scores=mean_of([scores_of(one) for one in predictions]),
        usd=_mean(prices) if prices and len(prices) == len(group.runs) else None,
        seconds=_mean([speed.train_seconds for speed in speeds]) if speeds else None,
        posts_per_second=_mean([speed.posts_per_second for speed in speeds]) if speeds else None,
        tokens_per_second=_mean([speed.tokens_per_second for speed in speeds]) if speeds else None,
        device=", ".join(devices) or None,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _paired(
    resampled: Resampled, same: SamePosts, first: Group, second: Group
) -> tuple[Paired, Spread, tuple[LabelDifference, ...]]:
    answers_R = np.stack([same.predictions[run].predicted for run in (*first.runs, *second.runs)])
    macro, spread = paired_difference(
        resampled.f1_RC.mean(axis=1),
        resampled.f1_SRC.mean(axis=2),
        first.runs,
        second.runs,
        _different(answers_R),
        SEED,
    )
    several = same.predictions[0].targets == "several"
    by_label = [
        paired_difference(
            resampled.f1_RC[:, label],
            resampled.f1_SRC[:, :, label],
            first.runs,
            second.runs,
            _different(_have(answers_R, label, several)),
            SEED,
        )[0]
        for label in range(len(same.labels))
    ]
    corrected = holm(one.p for one in by_label)
    labels = tuple(
        LabelDifference(
            name,
            int(_have(same.truth, label, several).sum()),
            float(resampled.f1_RC[list(first.runs), label].mean()),
            float(resampled.f1_RC[list(second.runs), label].mean()),
            by_label[label],
            corrected[label],
        )
        for label, name in enumerate(same.labels)
    )
    return macro, spread, labels


def _have(answers: NDArray[Any], label: int, several: bool) -> NDArray[np.bool_]:
    """Whether each post is answered with this label."""
    return np.asarray(answers[..., label] if several else answers == label)


def _different(answers_R: NDArray[Any]) -> int:
    """How many posts the runs do not all answer alike."""
    return int((~np.all([alike_N(one, answers_R[0]) for one in answers_R], axis=0)).sum())


def _seed_spread(resampled: Resampled, group: Group) -> SeedSpread:
    scores = resampled.f1_RC[list(group.runs)].mean(axis=1)
    variance = float(scores.var(ddof=1))
    return SeedSpread(
        name=group.name,
        scores=tuple(scores.tolist()),
        mean=float(scores.mean()),
        deviation=variance**0.5,
        smallest_shown=smallest_shown(variance, len(scores)),
    )


def _remarks(scored: Sequence[Scored]) -> list[str]:
    remarks = []
    if scored[0].split == "validation":
        remarks.append("The validation posts also chose each run's checkpoint, so they flatter all of them.")
    for one in scored:
        trained_on = getattr(one.document, "trained_on", None)
        if trained_on is not None and trained_on.posts:
            remarks.append(
                f"{trained_on.posts:,} of the {trained_on.of:,} posts are in the training split of"
                f" {one.name}: its score on them is too good."
            )
    return remarks


# --- posts that flipped ---


class _Pooled(NamedTuple):
    """The answer of a group as one model: over several runs, the label of the highest mean
    probability or, where a post may have several labels, those that at least half of the runs give.
    """

    answer: NDArray[Any]
    prob_NC: NDArray[np.float64]


def _pooled(same: SamePosts, group: Group) -> _Pooled:
    predictions = [same.predictions[run] for run in group.runs]
    prob_NC = np.stack([one.prob_NC for one in predictions]).mean(axis=0, dtype=np.float64)
    if len(predictions) == 1:
        return _Pooled(predictions[0].predicted, prob_NC)
    if predictions[0].targets == "several":
        return _Pooled(np.mean([one.predicted for one in predictions], axis=0) >= 0.5, prob_NC)
    return _Pooled(prob_NC.argmax(axis=1).astype(np.int32), prob_NC)


def _of_truth(same: SamePosts, pooled: _Pooled, other: _Pooled) -> NDArray[np.float64]:
    """Each post's probability that `Flip` shows; with several labels, 0 where the answers do not
    differ.
    """
    if same.truth.ndim == 1:
        return np.asarray(pooled.prob_NC[np.arange(len(same.ids)), same.truth])
    differs_NC = pooled.answer != other.answer
    right_NC = np.where(same.truth, pooled.prob_NC, 1 - pooled.prob_NC)
    return np.asarray((right_NC * differs_NC).sum(axis=1) / np.maximum(1, differs_NC.sum(axis=1)))


@dataclass(frozen=True, eq=False)
class _FlippedRows:
    """Numbers of the posts that flipped, in the order in which they are shown."""

    same: SamePosts
    first: _Pooled
    second: _Pooled
    of_truth: tuple[NDArray[np.float64], NDArray[np.float64]]
    rows: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

    @property
    def ids(self) -> list[str]:
        return [self.same.ids[row] for rows_N in self.rows for row in rows_N]

    def with_texts(self, texts: dict[str, str]) -> Flips:
        labels, same = self.same.labels, self.same
        return Flips(
            *(
                tuple(
                    Flip(
                        same.ids[row],
                        answer_words(same.truth[row], labels),
                        answer_words(self.first.answer[row], labels),
                        answer_words(self.second.answer[row], labels),
                        float(self.of_truth[0][row]),
                        float(self.of_truth[1][row]),
                        texts.get(same.ids[row]),
                    )
                    for row in rows_N
                )
                for rows_N in self.rows
            )
        )


def _flips(same: SamePosts, first: _Pooled, second: _Pooled) -> _FlippedRows:
    first_right_N, second_right_N = alike_N(first.answer, same.truth), alike_N(second.answer, same.truth)
    of_truth = _of_truth(same, first, second), _of_truth(same, second, first)
    change_N = of_truth[1] - of_truth[0]

    def ordered(chosen_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        rows_N = np.flatnonzero(chosen_N)
        return rows_N[np.argsort(-np.abs(change_N[rows_N]), kind="stable")]

    neither_N = ~first_right_N & ~second_right_N & ~alike_N(first.answer, second.answer)
    return _FlippedRows(
        same,
        first,
        second,
        of_truth,
        (
            ordered(first_right_N & ~second_right_N),
            ordered(~first_right_N & second_right_N),
            ordered(neither_N),
        ),
    )
