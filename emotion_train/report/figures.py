"""Every number of the report, computed once from counts and predictions that must agree.

One paired bootstrap compares the model with each floor; the verdict follows from the interval of
the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from emotion_train.config import ReportSection
from emotion_train.data.lengths import Cut
from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.floors import MAJORITY, TFIDF, majority_floor
from emotion_train.evaluation.metrics import (
    ClassCounts,
    bootstrap_macro_f1,
    expected_calibration_error,
    log_loss,
    paired_bootstrap_macro_f1,
    wilson_f1,
)
from emotion_train.evaluation.predictions import (
    AnyPredictions,
    Predictions,
    SetPredictions,
    join_predictions,
)
from emotion_train.evaluation.shares import ShareScores, share_scores
from emotion_train.evaluation.thresholds import HALF
from emotion_train.report.advice import next_steps, worth_trying
from emotion_train.report.agreement import require_agreement
from emotion_train.report.chances import gate_figures, temperature_figures
from emotion_train.report.posts import Chosen, Texts
from emotion_train.report.schema import (
    AnyFigures,
    Dataset,
    Distance,
    Evaluation,
    Floor,
    Identity,
    LabelFigures,
    LossPoint,
    OldPosts,
    ReliabilityBin,
    Report,
    SetFloor,
    Speed,
    SplitFigures,
    Verdict,
)
from emotion_train.report.set_figures import figures_by_label, set_figures
from emotion_train.report.slices import slices
from emotion_train.report.units import signed

if TYPE_CHECKING:
    from emotion_train.data.index import Index
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.temperature import BeforeAndAfter

FEW_ROWS = 10
NO_TEXTS: Texts = MappingProxyType({})
NO_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType({})
POOR_CALIBRATION = 0.1


@dataclass(frozen=True, eq=False)
class SplitResult:
    """An evaluated split: the counts summed over ranks, the joined predictions, and the TF-IDF
    floor's predictions for the same ids in any order.
    """

    counts: NDArray[np.int64]
    predictions: Predictions
    tfidf: Predictions | None = None

    @property
    def targets(self) -> TargetKind:
        return "one" if self.predictions.shares_NC is None else "shares"

    @property
    def label_counts(self) -> list[int] | list[float]:
        """Posts that have each label, or the sums of its shares in them."""
        if self.predictions.shares_NC is not None:
            sums: list[float] = self.predictions.shares_NC.sum(axis=0, dtype=np.float64).tolist()
            return sums
        counts: list[int] = self.counts.sum(axis=1).tolist()
        return counts

    def take(self, rows: Sequence[int]) -> SplitResult:
        """The result on some of its posts."""
        taken = self.predictions.take(rows)
        return SplitResult(taken.counts(), taken, _aligned(self.tfidf, taken.ids))


@dataclass(frozen=True, eq=False)
class SetResult:
    """An evaluated split whose posts have several labels: `counts_3C` with all thresholds at 0.5,
    summed over ranks, and the joined predictions with the reported answers. Other posts chose their
    `thresholds`, one for each label (None: 0.5); with `folds`, the posts of the other folds chose
    them for each post.
    """

    counts: NDArray[np.int64]
    predictions: SetPredictions
    tfidf: SetPredictions | None = None
    thresholds: Sequence[float] | None = None
    folds: int | None = None
    targets: TargetKind = "several"

    @property
    def label_counts(self) -> list[int]:
        """Posts that have each label."""
        counts: list[int] = self.counts[1].tolist()
        return counts

    def take(self, rows: Sequence[int]) -> SetResult:
        """The result on some of its posts."""
        taken = self.predictions.take(rows)
        counts_3C = taken.answered(taken.prob_NC >= HALF).counts()
        return replace(self, counts=counts_3C, predictions=taken, tfidf=_aligned(self.tfidf, taken.ids))


AnyResult = SplitResult | SetResult


def decided(
    counts: NDArray[np.int64],
    predictions: AnyPredictions,
    tfidf: AnyPredictions | None,
    decision: Decision,
    chose: bool = False,
) -> AnyResult:
    """The result of a split whose posts the decision answers. Where these posts `chose` its
    thresholds, each post is answered by the thresholds that the other folds chose. `counts` are for
    thresholds at 0.5.
    """
    if isinstance(predictions, Predictions):
        assert not isinstance(tfidf, SetPredictions)
        return SplitResult(counts, predictions, tfidf)
    assert not isinstance(tfidf, Predictions)
    answered = (
        decision.held_out(predictions)
        if chose
        else predictions.answered(decision.answers(predictions.prob_NC))
    )
    return SetResult(counts, answered, tfidf, decision.thresholds, decision.folds if chose else None)


_P = TypeVar("_P", bound=AnyPredictions)


def _aligned(floor: _P | None, ids: Sequence[str]) -> _P | None:
    """A floor's predictions for these posts, a part of its own."""
    if floor is None:
        return None
    row_of = {post_id: row for row, post_id in enumerate(floor.ids)}
    return cast(_P, floor.take([row_of[post_id] for post_id in ids]))


@dataclass(frozen=True)
class Measured:
    """Clock and counters of a run. `computed_tokens` counts padding too; `posts` counts a post once
    an epoch.

    `train_seconds` holds the `stall_seconds` of all `saves`; `upload_seconds` ran beside it.
    """

    posts: int
    real_tokens: int
    computed_tokens: int
    train_seconds: float
    evaluation_seconds: float
    wall_seconds: float
    peak_memory_bytes: int
    memory_kind: Literal["GPU", "RSS"]
    saves: int = 0
    stall_seconds: float = 0.0
    upload_seconds: float = 0.0
    labelling_posts_per_second: float | None = None


def dataset_facts(index: Index, scored: Mapping[str, AnyResult]) -> Dataset:
    """The index's facts about the posts. Where data.limit left only estimates of label counts, the
    counts of the `scored` splits come from their posts.
    """
    estimated = index.targets_of("train") != "one" and index.whole is not index
    counted = {name: tuple(result.label_counts) for name, result in scored.items()} if estimated else {}
    return Dataset(
        rows={name: split.rows for name, split in index.splits.items()},
        label_counts={name: split.label_counts for name, split in index.splits.items()} | counted,
        cleaning=index.source,
    )


def build_report(
    *,
    labels: Sequence[str],
    splits: Mapping[str, AnyResult],
    history: Sequence[Evaluation],
    best_step: int | None,
    dataset: Dataset,
    measured: Measured,
    identity: Identity,
    settings: ReportSection,
    seed: int,
    cuts: Mapping[str, Cut] | None = None,
    decision: Decision | None = None,
    tempered: Mapping[str, BeforeAndAfter] | None = None,
    remarks: Sequence[str] = (),
    losses: Sequence[LossPoint] = (),
    chosen: Chosen | None = None,
    texts: Texts = NO_TEXTS,
    slice_values: Mapping[str, Mapping[str, str]] = NO_VALUES,
    old_posts: OldPosts | None = None,
) -> Report:
    """The whole report. `decision` answered the posts of the splits, and `tempered` holds each
    split's probabilities before and after its temperature. `remarks` are the trainer's own
    warnings, appended to the report's; `chosen` are the posts to show, with `texts`; `slice_values`
    are the headline split's kept columns (`report.slices.slices`); `old_posts` are the figures on
    the parent adapter's posts.

    Raises `Inconsistent` when counts, predictions and the data set's label counts contradict each
    other.
    """
    figures = {
        name: split_figures(name, result, labels, dataset.label_counts, settings.bootstrap_samples, seed)
        for name, result in splits.items()
    }
    headline = headline_of(splits)
    cuts = dict(cuts or {})
    predictions = {name: result.predictions for name, result in splits.items()}
    chosen = chosen or Chosen.of(splits, headline, settings.examples)
    train_counts = dataset.label_counts.get("train", ())
    advice = next_steps(figures[headline], history, identity.config, train_counts)
    # one split is enough here; the table has the others
    much_cut = [f"{_cut_words(name, cut, dataset)}." for name, cut in cuts.items() if cut.is_much][:1]
    mistakes = chosen.mistakes(splits, labels, texts)
    mislabelled = chosen.mislabelled(splits, labels, texts)
    return Report(
        verdict=verdict(headline, figures[headline]).model_copy(update={"advice": advice}),
        warnings=(*_warnings(headline, figures[headline], dataset, settings), *much_cut, *remarks),
        targets=next(iter(splits.values())).targets,
        labels=tuple(labels),
        headline=headline,
        splits=figures,
        history=tuple(history),
        best_step=best_step,
        dataset=dataset,
        cuts=cuts,
        temperature=None if decision is None else temperature_figures(decision, predictions, tempered or {}),
        gates=() if decision is None else gate_figures(decision, predictions),
        speed=_speed(measured, settings.usd_per_hour),
        identity=identity,
        losses=tuple(losses),
        mistakes=mistakes,
        mislabelled=mislabelled,
        slices=slices(predictions[headline], slice_values, settings.bootstrap_samples, seed),
        old_posts=old_posts,
        try_next=advice
        or worth_trying(
            figures[headline],
            mistakes,
            mislabelled,
            cuts,
            history,
            best_step,
            dict(zip(labels, train_counts, strict=False)),
        ),
    )


def headline_of(splits: Iterable[str]) -> str:
    """The split whose figures are quoted: test, else validation."""
    names = list(splits)
    return "test" if "test" in names else names[0]


def split_figures(
    name: str,
    result: AnyResult,
    labels: Sequence[str],
    label_counts: Mapping[str, Sequence[float]],
    samples: int,
    seed: int,
) -> AnyFigures:
    """All figures of one split. `label_counts` maps train, and the split itself where known, to the
    posts of each label, or to sums of shares.

    Raises `Inconsistent` when counts, predictions and label counts contradict each other.
    """
    require_agreement(name, result, len(labels), label_counts.get(name))
    floor = None if result.tfidf is None else join_predictions([result.tfidf], result.predictions.ids)
    if isinstance(result, SetResult):
        assert floor is None or isinstance(floor, SetPredictions)
        return set_figures(
            result.predictions,
            labels,
            train_counts=label_counts["train"],
            thresholds=result.thresholds,
            folds=result.folds,
            tfidf=floor,
            samples=samples,
            seed=seed,
        )
    predictions, classes, counts = result.predictions, len(labels), ClassCounts(result.counts)
    interval = bootstrap_macro_f1(predictions.truth_N, predictions.predicted_N, classes, samples, seed)
    calibration = expected_calibration_error(predictions.prob_NC, predictions.truth_N)
    shares = _of_shares(predictions, label_counts["train"])
    floors = {MAJORITY: majority_floor(label_counts["train"], counts.rows)}
    if floor is not None:
        assert isinstance(floor, Predictions)
        floors[TFIDF] = floor.predicted_N
    return SplitFigures(
        rows=counts.rows,
        macro_f1=counts.macro_f1,
        macro_f1_low=interval.low,
        macro_f1_high=interval.high,
        weighted_f1=counts.weighted_f1,
        accuracy=counts.accuracy,
        labels_without_support=counts.labels_without_support,
        log_loss=log_loss(predictions.prob_NC, predictions.truth_N) if shares is None else shares.log_loss,
        calibration_error=calibration.error,
        reliability=tuple(ReliabilityBin(**one._asdict()) for one in calibration.bins),
        per_label=_per_label(labels, counts),
        confusion=tuple(tuple(row) for row in counts.counts_CC.tolist()),
        floors=tuple(
            _floor(floor, predictions, floor_N, classes, samples, seed) for floor, floor_N in floors.items()
        ),
        distance=None if shares is None else _distance(shares),
    )


def _of_shares(predictions: Predictions, train_sums: Sequence[float]) -> ShareScores | None:
    """None where the posts have one label."""
    if predictions.shares_NC is None:
        return None
    return share_scores(predictions.shares_NC, predictions.prob_NC, train_sums)


def _distance(scores: ShareScores) -> Distance:
    return Distance(**{name: value for name, value in scores._asdict().items() if name != "log_loss"})


def _per_label(labels: Sequence[str], counts: ClassCounts) -> tuple[LabelFigures, ...]:
    low_C, high_C = wilson_f1(counts.correct_C, counts.support_C, counts.predicted_C)
    columns = {
        "support": counts.support_C,
        "predicted": counts.predicted_C,
        "precision": counts.precision_C,
        "recall": counts.recall_C,
        "f1": counts.f1_C,
        "f1_low": low_C,
        "f1_high": high_C,
    }
    return figures_by_label(LabelFigures, labels, columns)


def _floor(
    name: str, predictions: Predictions, floor_N: NDArray[np.int32], classes: int, samples: int, seed: int
) -> Floor:
    counts = ClassCounts.of(predictions.truth_N, floor_N, classes)
    paired = paired_bootstrap_macro_f1(
        predictions.truth_N, predictions.predicted_N, floor_N, classes, samples, seed
    )
    return Floor(
        name=name,
        macro_f1=counts.macro_f1,
        weighted_f1=counts.weighted_f1,
        accuracy=counts.accuracy,
        difference=paired.difference,
        difference_low=paired.low,
        difference_high=paired.high,
    )


def _speed(measured: Measured, usd_per_hour: float | None) -> Speed:
    seconds = measured.train_seconds
    return Speed(
        **{name: value for name, value in asdict(measured).items() if name in Speed.model_fields},
        padding_share=1 - measured.real_tokens / measured.computed_tokens if measured.computed_tokens else 0,
        posts_per_second=measured.posts / seconds if seconds else 0,
        tokens_per_second=measured.real_tokens / seconds if seconds else 0,
        usd_per_hour=usd_per_hour,
        usd=None if usd_per_hour is None else measured.wall_seconds / 3600 * usd_per_hour,
    )


AnyFloor = Floor | SetFloor


def strongest(floors: Sequence[AnyFloor]) -> AnyFloor:
    return max(floors, key=lambda floor: floor.macro_f1)


def decisive(floors: Sequence[AnyFloor]) -> AnyFloor:
    """The floor that decides the verdict: the strongest that is not beaten for certain, else the
    strongest.
    """
    return strongest([floor for floor in floors if floor.outcome != "beaten"] or floors)


def verdict(name: str, split: AnyFigures, which: str = "") -> Verdict:
    """The verdict by the interval of the difference to the decisive floor; `which` says which posts
    were scored where it is not all.
    """
    floor = decisive(split.floors)
    figure = (
        f"Macro-F1 {split.macro_f1:.3f} ({split.macro_f1_low:.3f} to {split.macro_f1_high:.3f}) on"
        f" {split.rows:,} {name} posts{which}"
    )
    against = f"{floor.name} floor of {floor.macro_f1:.3f}"
    interval = f"95 % interval {signed(floor.difference_low)} to {signed(floor.difference_high)}"
    says = {
        "beaten": f"{figure} beats the {against} by {floor.difference:.3f} ({interval}).",
        "open": (
            f"{figure} cannot be told apart from the {against}: difference {signed(floor.difference)}"
            f" ({interval})."
        ),
        "not beaten": (
            f"{figure} does not beat the {against}: it is worse by {-floor.difference:.3f} ({interval})."
        ),
    }
    return Verdict(outcome=floor.outcome, sentence=says[floor.outcome])


def _warnings(name: str, split: AnyFigures, dataset: Dataset, settings: ReportSection) -> list[str]:
    """The objections of a careful reader."""
    warnings = []
    if name != "test":
        warnings.append(
            f"There is no test split: the {name} split gave these figures and also chose the checkpoint, so"
            " they flatter the model."
        )
    for floor in split.floors:
        if floor.outcome == "not beaten":
            warnings.append(
                f"The model does not beat the {floor.name} floor on macro-F1 ({split.macro_f1:.3f} against"
                f" {floor.macro_f1:.3f})."
            )
        elif floor.outcome == "open":
            warnings.append(
                f"The difference in macro-F1 to the {floor.name} floor may be chance: its 95 % interval"
                " holds 0."
            )
    if not any(floor.name == TFIDF for floor in split.floors):
        warnings.append(
            "There is no TF-IDF floor to compare with:"
            f" {_why_no_tfidf(dataset.rows.get('train', 0), settings.floor_max_rows)}."
        )
    return warnings + label_warnings(name, split)


def label_warnings(name: str, split: AnyFigures) -> list[str]:
    """The warnings about single labels and about the probabilities of a split or file `name`."""
    warnings = []
    absent = [one.label for one in split.per_label if not one.support]
    if absent:
        warnings.append(f"Labels without a {name} post, which count 0 in macro-F1: {', '.join(absent)}.")
    few = [f"{one.label} ({one.support})" for one in split.per_label if 0 < one.support < FEW_ROWS]
    if few:
        warnings.append(
            f"Labels with fewer than {FEW_ROWS} {name} posts, whose F1 is mostly chance: {', '.join(few)}."
        )
    silent = [one.label for one in split.per_label if one.support and not one.predicted]
    if silent:
        warnings.append(f"Labels the model never predicts: {', '.join(silent)}.")
    if split.calibration_error > POOR_CALIBRATION:
        confident, right = (_mean_of_bins(split, name) for name in ("confidence", "accuracy"))
        direction = "high" if confident > right else "low"
        warnings.append(
            f"Probabilities are too {direction} (calibration error {split.calibration_error:.2f}): use them"
            " to rank, not as chances."
        )
    return warnings


def cut_sentences(report: Report) -> list[str]:
    """A sentence for each split whose cut posts were counted."""
    return [f"{_cut_words(name, cut, report.dataset)}." for name, cut in report.cuts.items()]


def _cut_words(name: str, cut: Cut, dataset: Dataset) -> str:
    posts = "training posts" if name == "train" else f"{name} posts"
    return cut.words(posts if cut.posts == dataset.rows.get(name) else f"{posts} looked at")


def _why_no_tfidf(train_rows: int, floor_max_rows: int) -> str:
    if not floor_max_rows:
        return "report.floor_max_rows is 0"
    if train_rows > floor_max_rows:
        return f"{train_rows:,} training posts are more than report.floor_max_rows={floor_max_rows}"
    return "it was not fitted"


def _mean_of_bins(split: AnyFigures, field: str) -> float:
    filled = [one for one in split.reliability if one.rows]
    return float(sum(one.rows * getattr(one, field) for one in filled) / sum(one.rows for one in filled))
