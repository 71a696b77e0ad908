"""The content of report.json and scorecard.json.

All figures are unrounded; pages round. An unknown field is refused, so that a reader of another
schema notices. Posts that are answered with one label have `SplitFigures`, posts with several
labels `SetFigures`; shared figures have the same names, so that only pages about the difference
need to know the kind. Schema 1 allowed only one label a post, and stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from emotion_train.data.lengths import Cut
from emotion_train.data.targets import TargetKind

SCHEMA: Literal["emotion-train/report/2"] = "emotion-train/report/2"
CARD_SCHEMA: Literal["emotion-train/scorecard/2"] = "emotion-train/scorecard/2"
_SHARE_THAT_MATTERS = 0.01

# what people call the figures
WORDS = {
    "macro_f1_at_half": "macro-F1 at 0.5",
    "weighted_f1": "weighted F1",
    "accuracy": "accuracy",
    "micro_f1": "micro-F1",
    "samples_f1": "samples-F1",
    "jaccard": "Jaccard",
    "exact_match": "exact match",
    "mean_average_precision": "mean AP",
    "mean_kl": "KL divergence",
    "total_variation": "total variation",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
    "average_precision": "AP",
    "threshold": "threshold",
}


def _none_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# a mean of numbers up to 1 may be rounded above it
Score = Annotated[float, Field(ge=0, le=1 + 1e-9)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Scored(_Part):
    """Figures of a model; `also` are those that not every kind has, by field."""

    ALSO: ClassVar[tuple[str, ...]] = ()
    OF_PROBABILITIES: ClassVar[tuple[str, ...]] = ()

    @property
    def also(self) -> dict[str, float]:
        return self._named(self.ALSO)

    @property
    def of_probabilities(self) -> dict[str, float]:
        """The errors of the probabilities, by field."""
        return self._named(self.OF_PROBABILITIES)

    def _named(self, fields: Iterable[str]) -> dict[str, float]:
        return {name: getattr(self, name) for name in fields}


class LabelFigures(_Scored):
    label: str
    support: Count
    predicted: Count
    precision: Score
    recall: Score
    f1: Score
    f1_low: Score | None = Field(
        None, description="Lower end of Wilson's 95 % interval; None in reports of earlier versions."
    )
    f1_high: Score | None = None

    @model_validator(mode="after")
    def _has_both_ends(self) -> LabelFigures:
        if (self.f1_low is None) != (self.f1_high is None):
            raise ValueError(f"the interval of {self.label[:40]!r} has one end")
        return self


class SetLabelFigures(LabelFigures):
    """One of several labels."""

    ALSO = ("average_precision", "threshold", "calibration_error")

    average_precision: Score = Field(description="0 for a label without a post.")
    threshold: Score = Field(description="The probability from which on a post is answered with the label.")
    calibration_error: float


class ReliabilityBin(_Part):
    """Posts whose highest probability lies in (low, high]; the means are None for a bin without
    posts. Where posts have several labels each counts once a label.
    """

    low: float
    high: float
    rows: int
    confidence: float | None
    accuracy: float | None


class _AnyFloor(_Scored):
    """A simple classifier on the same posts. `difference` is the model's macro-F1 minus the
    floor's, with its paired 95 % interval.
    """

    name: str
    macro_f1: Score
    difference: float
    difference_low: float
    difference_high: float

    @property
    def outcome(self) -> Literal["beaten", "open", "not beaten"]:
        """Whether the model beats the floor; open where the interval of the difference holds 0, so
        chance may explain it.
        """
        if self.difference_low > 0:
            return "beaten"
        return "not beaten" if self.difference_high < 0 else "open"


class Floor(_AnyFloor):
    ALSO = ("weighted_f1", "accuracy")

    weighted_f1: float
    accuracy: float


class SetFloor(_AnyFloor):
    """A floor that answers with several labels."""

    ALSO = ("micro_f1", "samples_f1", "jaccard", "exact_match")

    micro_f1: float
    samples_f1: float
    jaccard: float
    exact_match: float


class _Figures(_Scored):
    """The figures that all kinds of targets share."""

    rows: Count
    macro_f1: Score
    macro_f1_low: Score = Field(description="Lower end of the 95 % bootstrap interval.")
    macro_f1_high: Score
    labels_without_support: Count = Field(
        description="Labels without a post in this split; they count 0 in macro_f1."
    )
    calibration_error: float = Field(description="Expected calibration error over `reliability`.")
    reliability: tuple[ReliabilityBin, ...]


class Distance(_Part):
    """How far probabilities are from the labels' shares, as means over the posts. KL divergences
    are in nats, total variation is from 0 to 1; 0 is no distance. `…_of_prior` are the distances of
    the training split's shares, given to every post.
    """

    mean_kl: float
    mean_kl_of_prior: float
    total_variation: float
    total_variation_of_prior: float


class SplitFigures(_Figures):
    """Figures of posts that are answered with one label; where they have shares, the truth is the
    label of the largest one.
    """

    ALSO = ("weighted_f1", "accuracy")
    OF_PROBABILITIES = ("log_loss", "calibration_error")

    weighted_f1: float
    accuracy: float
    log_loss: float = Field(description="In nats, of the true label, or of all labels by their shares.")
    per_label: tuple[LabelFigures, ...] = Field(description="In the order of `Report.labels`.")
    confusion: tuple[tuple[Count, ...], ...] = Field(
        description="Rows are the truth, columns the predictions."
    )
    floors: tuple[Floor, ...]
    distance: Distance | None = Field(None, description="From the posts' shares, where they have such.")

    @property
    def also(self) -> dict[str, float]:
        distance = {} if self.distance is None else self.distance.model_dump()
        return super().also | {name: distance[name] for name in ("mean_kl", "total_variation") if distance}


class Mistaken(_Part):
    """Posts that have the label `missed` and were answered with `added` instead: `missed` is not
    among their answers, `added` not among their labels.
    """

    missed: str
    added: str
    posts: Count


class Together(_Part):
    """Two labels, the posts that have both, and those that were answered with both."""

    first: str
    second: str
    posts: Count
    answered: Count


class SetFigures(_Figures):
    """Figures of posts that have several labels and are answered with those whose probability
    reaches their threshold.
    """

    ALSO = (
        "macro_f1_at_half",
        "micro_f1",
        "samples_f1",
        "jaccard",
        "exact_match",
        "mean_average_precision",
    )
    OF_PROBABILITIES = ("calibration_error",)

    folds: int | None = Field(
        description=(
            "Number of folds, where each post was answered by thresholds that the other folds' posts chose;"
            " None: by the thresholds of `per_label`, which other posts chose."
        )
    )
    macro_f1_at_half: float = Field(description="The same with 0.5 as the threshold of every label.")
    gain_low: float = Field(description="Lower end of the 95 % interval of macro_f1 minus macro_f1_at_half.")
    gain_high: float
    micro_f1: float
    samples_f1: float = Field(description="Mean over the posts of the F1 of their labels.")
    jaccard: float = Field(description="Mean over the posts of labels in common to labels in either.")
    exact_match: float
    mean_average_precision: float
    without_label: int = Field(description="Posts that have no label.")
    without_answer: int = Field(description="Posts that were answered with no label.")
    per_label: tuple[SetLabelFigures, ...] = Field(description="In the order of `Report.labels`.")
    mistaken: tuple[Mistaken, ...] = Field(description="Most frequent first, at most 1,000.")
    together: tuple[Together, ...] = Field(description="Most frequent first, at most 1,000.")
    floors: tuple[SetFloor, ...]

    @model_validator(mode="after")
    def _pairs_are_of_posts_that_there_are(self) -> SetFigures:
        support = {one.label: one.support for one in self.per_label}
        missed = {one.label: one.support - round(one.recall * one.support) for one in self.per_label}
        for pair in self.mistaken:
            if pair.added not in support or not 0 < pair.posts <= missed.get(pair.missed, 0):
                raise ValueError(f"mistaken has posts that do not miss {pair.missed[:40]!r}")
        for both in self.together:
            if both.posts > min(support.get(both.first, -1), support.get(both.second, -1)):
                raise ValueError(f"together has posts that do not have {both.first[:40]!r}")
        return self


class ProbabilityFigures(_Part):
    """How far probabilities are off. The log loss of several labels is the mean over posts and
    labels.
    """

    log_loss: float = Field(description="In nats.")
    calibration_error: float


class BeforeAndAfter(_Part):
    """Figures without and with the head's temperature; for posts that chose the temperature, with
    the one that the other folds' posts chose.
    """

    before: ProbabilityFigures
    after: ProbabilityFigures


class TemperatureFigures(_Part):
    """The divisor of the published head's logits, and its effect. `gain` is how much it lowers the
    log loss of validation posts that did not choose it, also where it was not kept.
    """

    temperature: tuple[float, ...] | None = Field(
        description="One number, or with several labels one for each; None where nothing was gained."
    )
    gain: float
    gain_low: float = Field(description="Lower end of the paired 95 % interval.")
    gain_high: float
    splits: dict[str, BeforeAndAfter] = Field(
        description="The figures by split, or by the name of a scorecard."
    )


class GateCheck(_Part):
    """`answers` are all posts, or for the gate of a label the posts that are answered with it;
    `accepted` are those at or above the threshold, and `right` those of them that are right.
    """

    answers: int
    accepted: int
    right: int


class GateFigures(_Part):
    """A gate of decision.json, checked on the posts of each split."""

    label: str | None = Field(description="None: over all labels.")
    precision: float
    threshold: float | None = Field(description="None: no probability is enough.")
    checks: dict[str, GateCheck] = Field(
        description="The accepted and right answers, by split; empty without a threshold."
    )


def _shape_of(figures: Any) -> Literal["one answer", "several"]:
    has = figures if isinstance(figures, dict) else getattr(type(figures), "model_fields", ())
    return "several" if "micro_f1" in has else "one answer"


AnyFigures = Annotated[
    Annotated[SplitFigures, Tag("one answer")] | Annotated[SetFigures, Tag("several")],
    Discriminator(_shape_of),
]


def _require_targets(version: str, targets: TargetKind, figures: Iterable[AnyFigures]) -> None:
    """Raises `ValueError` for figures of other targets, and for targets other than "one" in the
    first schema.
    """
    if version.endswith("/1") and targets != "one":
        raise ValueError(f"{version} knows no targets {targets!r}")
    if any(isinstance(one, SetFigures) != (targets == "several") for one in figures):
        raise ValueError(f"figures are not those of targets {targets!r}")


def _require_labels(labels: Sequence[str], figures: Iterable[AnyFigures]) -> None:
    """Raises `ValueError` for figures of other labels than these."""
    for one in figures:
        if [label.label for label in one.per_label] != list(labels):
            raise ValueError("per_label names other labels than the document")
        if isinstance(one, SplitFigures) and {len(labels)} != {len(one.confusion), *map(len, one.confusion)}:
            raise ValueError(f"the confusion is not one of {len(labels)} labels")


class Evaluation(_Part):
    """One evaluation during training; a loss that is not finite becomes None."""

    step: int
    epoch: float
    train_loss: Annotated[float | None, BeforeValidator(_none_unless_finite)]
    macro_f1: float = Field(description="On the validation split.")
    learning_rate: float
    validation_loss: Annotated[float | None, BeforeValidator(_none_unless_finite)] = Field(
        None,
        description=(
            "Mean loss of the validation posts, weighted by class as that of training is; None in reports of"
            " earlier versions."
        ),
    )


class LossPoint(_Part):
    """Mean training loss of the steps after the point before, up to `step`."""

    step: int
    loss: float


class Speed(_Part):
    posts: int = Field(description="Posts trained on, counted once an epoch.")
    real_tokens: int
    padding_share: float = Field(description="Share of the computed tokens that belong to no post.")
    train_seconds: float
    evaluation_seconds: float
    wall_seconds: float = Field(description="Time for which the machines were held.")
    saves: int = Field(0, description="Checkpoints of the run.")
    stall_seconds: float = Field(
        0.0,
        description="Part of train_seconds in which training waited for a checkpoint's copy to host memory.",
    )
    upload_seconds: float = Field(
        0.0, description="Time for which checkpoints were uploaded beside the training."
    )
    posts_per_second: float
    tokens_per_second: float
    labelling_posts_per_second: float | None = Field(
        None, description="Held-out posts a second when they were scored for this report, by all processes."
    )
    peak_memory_bytes: int
    memory_kind: Literal["GPU", "RSS"] = Field(
        description="Kind of peak_memory_bytes: of the fullest GPU, or the resident set on a CPU."
    )
    usd_per_hour: float | None
    usd: float | None


class Parent(_Part):
    """The published adapter from which a run trained on."""

    name: str = Field(description="The run that published it, else the name of its folder.")
    weights_sha256: str = Field(description="sha256 of its file of weights.")
    index_sha256: str | None = Field(
        description="sha256 of the index of the data set that it was trained on."
    )
    labels: tuple[str, ...]
    new_labels: tuple[str, ...]
    dropped_labels: tuple[str, ...]


class Identity(_Part):
    """The facts needed to make this model again."""

    run_id: str
    config: dict[str, Any]
    config_sha256: str
    index_sha256: str
    data_url: str
    base: str
    precision: str
    versions: dict[str, str]
    git_commit: str | None
    device: str
    world_size: int
    started_utc: AwareDatetime
    ended_utc: AwareDatetime
    parent: Parent | None = Field(None, description="The adapter from which it trained on, if any.")


class OldLabel(_Part):
    """A label of the parent on the parent's held-out posts."""

    label: str
    support: int
    f1_before: float
    f1: float
    difference_low: float
    difference_high: float


class OldPosts(_Part):
    """The parent's held-out posts, answered by the published parent and by the run."""

    split: str
    rows: int
    macro_f1_before: float = Field(description="Macro-F1 of the parent, over its labels.")
    macro_f1: float
    difference: float
    difference_low: float = Field(description="Lower end of the paired 95 % interval.")
    difference_high: float
    gained: int = Field(description="Posts that the parent answered wrongly and the run rightly.")
    forgotten: int = Field(description="Posts that the parent answered rightly and the run wrongly.")
    p: float = Field(description="McNemar's, of gained and forgotten.")
    per_label: tuple[OldLabel, ...]


class Dataset(_Part):
    rows: dict[str, int]
    label_counts: dict[str, tuple[int | float, ...]] = Field(
        description="Posts that have each label, or the sums of its shares in them."
    )
    cleaning: dict[str, str | int | float | None] = Field(
        description="The index's account of the source and of what cleaning did."
    )

    @model_validator(mode="after")
    def _counts_the_labels_of_each_split(self) -> Dataset:
        if self.rows.keys() != self.label_counts.keys():
            raise ValueError("rows and label_counts are of other splits")
        return self


class Verdict(_Part):
    """`sentence` about macro-F1 on the headline split against its strongest floor."""

    outcome: Literal["beaten", "open", "not beaten"]
    sentence: str
    advice: str | None = Field(
        None,
        description=(
            "What to try next; None for a model that beats its floors, and in reports of earlier versions."
        ),
    )


class Example(_Part):
    """A held-out post with the labels that it has and those that it was answered with. A long text
    is cut.
    """

    id: str
    text: str
    labels: tuple[str, ...]
    answer: tuple[str, ...]
    probability: float = Field(description="How sure the model was of its answer.")


class Mistakes(_Part):
    """Posts of the headline split that have label `missed` and were answered with `added`, with the
    surest examples. Where posts have several labels, one of the two may be None.
    """

    missed: str | None
    added: str | None
    posts: int
    examples: tuple[Example, ...]


class Doubted(_Part):
    """A held-out post whose labels look wrong, with those that the model suggests."""

    split: str
    id: str
    text: str
    labels: tuple[str, ...]
    suggested: tuple[str, ...]
    score: float = Field(description="Low where the labels are doubtful.")


class Mislabelled(_Part):
    """Held-out posts that look mislabelled by confident learning, the most doubtful first; all of
    them are in mislabelled.csv.
    """

    of: int = Field(description="Held-out posts that were looked at.")
    posts: int = Field(description="Those among them that look mislabelled.")
    examples: tuple[Doubted, ...]


class SliceFigures(_Part):
    """Posts of the headline split with one value of a column; `value` is None for all further
    values together. Macro-F1 is over the labels that these posts have.
    """

    value: str | None
    values: int = Field(1, description="How many values these posts have.")
    rows: int
    labels: int = Field(description="Labels that these posts have.")
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float


class Slices(_Part):
    column: str
    values: tuple[SliceFigures, ...] = Field(description="Most posts first, the rest last.")


class TrainedOn(_Part):
    """How many of the scored posts have a text of the training split."""

    posts: int
    of: int
    chance: float = Field(description="Largest share of other posts that the look-up takes for these.")

    @property
    def share(self) -> float:
        return self.posts / self.of if self.of else 0.0

    @property
    def matters(self) -> bool:
        """Whether more than 1 % of the posts were trained on, far above what chance may find."""
        return self.share > _SHARE_THAT_MATTERS


class Member(_Part):
    """One of several adapters that answer together."""

    name: str = Field(description="The run that published it, else the name of its folder.")
    weights_sha256: str = Field(description="sha256 of its file of weights.")


class Scorecard(_Part):
    """The content of scorecard.json: an adapter on one split or file, apart from any run.

    Cards written before the look-up in the training split existed have none of the fields with
    defaults.
    """

    schema_version: Literal["emotion-train/scorecard/1", "emotion-train/scorecard/2"] = CARD_SCHEMA
    targets: TargetKind = "one"
    source: str
    name: str
    run_id: str | None = Field(
        description="The run that published the adapter; with several adapters, the first one's."
    )
    members: tuple[Member, ...] = Field(
        (), description="The adapters whose logits are averaged, where there are several."
    )
    base: str
    layers: int | None = Field(None, description="First blocks of the base that were read; None: all.")
    precision: str = Field(description="Number format of the base in this evaluation.")
    labels: tuple[str, ...]
    figures: AnyFigures = Field(
        description="Figures of the posts that were not trained on; of all posts where none or all were, or"
        " where that is not known."
    )
    trained_on: TrainedOn | None = Field(None, description="None: it could not be looked up.")
    not_looked_up: str | None = Field(None, description="Why `trained_on` is None, and what would help.")
    figures_of_all: AnyFigures | None = Field(
        None, description="Figures of all posts, where `figures` leaves some out."
    )
    temperature: TemperatureFigures | None = Field(
        None, description="On the posts of `figures`. None for adapters that were published without the fit."
    )
    gates: tuple[GateFigures, ...] = Field((), description="On the posts of `figures`.")
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_its_targets(self) -> Scorecard:
        figures = [one for one in (self.figures, self.figures_of_all) if one is not None]
        _require_targets(self.schema_version, self.targets, figures)
        _require_labels(self.labels, figures)
        return self

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


class Report(_Part):
    schema_version: Literal["emotion-train/report/1", "emotion-train/report/2"] = SCHEMA
    targets: TargetKind = Field("one", description="What the posts are labelled with.")
    verdict: Verdict
    warnings: tuple[str, ...]
    labels: tuple[str, ...]
    headline: str = Field(description="The split whose figures are quoted: test, else validation.")
    splits: dict[str, AnyFigures]
    history: tuple[Evaluation, ...]
    best_step: int | None
    dataset: Dataset
    cuts: dict[str, Cut] = Field(
        default_factory=dict,
        description=(
            "Posts and tokens that data.max_length cuts, by split, counted with the run's tokenizer: all"
            " held-out posts and a sample of train. Empty in reports of earlier versions."
        ),
    )
    temperature: TemperatureFigures | None = Field(None, description="None in reports of earlier versions.")
    gates: tuple[GateFigures, ...] = Field(
        (), description="Over all and by label, at the precisions of report.gates."
    )
    speed: Speed
    identity: Identity
    losses: tuple[LossPoint, ...] = Field(
        (), description="The training loss by step, at most 256 points. Empty in earlier reports, as is:"
    )
    mistakes: tuple[Mistakes, ...] = Field(
        (), description="The most frequent mistakes, with texts unless report.examples is 0."
    )
    mislabelled: Mislabelled | None = None
    slices: tuple[Slices, ...] = ()
    old_posts: OldPosts | None = Field(
        None, description="On the posts of report.old_data, the data set of the parent adapter."
    )
    try_next: str | None = Field(
        None, description="The last sentence: what to try next, whatever the verdict."
    )

    @model_validator(mode="after")
    def _fits_its_targets(self) -> Report:
        _require_targets(self.schema_version, self.targets, self.splits.values())
        _require_labels(self.labels, self.splits.values())
        if self.headline not in self.splits:
            raise ValueError(f"the headline is of {self.headline[:40]!r}, which was not scored")
        if any(len(counts) != len(self.labels) for counts in self.dataset.label_counts.values()):
            raise ValueError("label_counts has not one number for each label")
        return self

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()
