"""The content of report.json.

All figures are unrounded; pages round. An unknown field is refused, so a reader of another schema
notices.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from emotion_train.data.lengths import Cut

SCHEMA: Literal["emotion-train/report/1"] = "emotion-train/report/1"
_SHARE_THAT_MATTERS = 0.01


def _none_unless_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelFigures(_Part):
    label: str
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float


class ReliabilityBin(_Part):
    """Posts whose highest probability lies in (low, high]; the means are None for a bin without
    posts.
    """

    low: float
    high: float
    rows: int
    confidence: float | None
    accuracy: float | None


class Floor(_Part):
    """A simple classifier on the same posts. `difference` is the model's macro-F1 minus the
    floor's, with its paired 95 % interval.
    """

    name: str
    macro_f1: float
    weighted_f1: float
    accuracy: float
    difference: float
    difference_low: float
    difference_high: float

    @property
    def outcome(self) -> Literal["beaten", "open", "not beaten"]:
        """open: the interval of the difference holds 0, so chance explains it."""
        if self.difference_low > 0:
            return "beaten"
        return "not beaten" if self.difference_high < 0 else "open"


class SplitFigures(_Part):
    rows: int
    macro_f1: float
    macro_f1_low: float = Field(description="Lower end of the 95 % bootstrap interval.")
    macro_f1_high: float
    weighted_f1: float
    accuracy: float
    labels_without_support: int = Field(
        description="Labels without a post in this split; they count 0 in macro_f1."
    )
    log_loss: float
    calibration_error: float = Field(description="Expected calibration error over `reliability`.")
    reliability: tuple[ReliabilityBin, ...]
    per_label: tuple[LabelFigures, ...] = Field(description="In the order of `Report.labels`.")
    confusion: tuple[tuple[int, ...], ...] = Field(description="Rows are the truth, columns the predictions.")
    floors: tuple[Floor, ...]


class Evaluation(_Part):
    """One evaluation during training; a loss that is not finite becomes None."""

    step: int
    epoch: float
    train_loss: Annotated[float | None, BeforeValidator(_none_unless_finite)]
    macro_f1: float = Field(description="On the validation split.")
    learning_rate: float


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
    peak_memory_bytes: int
    memory_kind: Literal["GPU", "RSS"] = Field(
        description="What memory is meant: that of the fullest GPU, or the resident set on a CPU."
    )
    usd_per_hour: float | None
    usd: float | None


class Identity(_Part):
    """What made this model, so that it can be made again."""

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


class Dataset(_Part):
    rows: dict[str, int]
    label_counts: dict[str, tuple[int, ...]]
    cleaning: dict[str, str | int | float | None] = Field(
        description="The index's account of the source and of what cleaning did."
    )


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


class TrainedOn(_Part):
    """How many of the scored posts have a text that stands in the training split."""

    posts: int
    of: int
    chance: float = Field(description="Largest share of other posts that the look-up takes for such ones.")

    @property
    def share(self) -> float:
        return self.posts / self.of if self.of else 0.0

    @property
    def matters(self) -> bool:
        """More than ten times what the look-up may take for trained on by chance."""
        return self.share > _SHARE_THAT_MATTERS


class Scorecard(_Part):
    """The content of scorecard.json: an adapter on one split or file, apart from any run.

    Cards written before the look-up in the training split existed have none of the fields with
    defaults.
    """

    schema_version: Literal["emotion-train/scorecard/1"] = "emotion-train/scorecard/1"
    source: str
    name: str
    run_id: str | None = Field(description="The run that published the adapter.")
    base: str
    precision: str = Field(description="Number format of the base in this evaluation.")
    labels: tuple[str, ...]
    figures: SplitFigures = Field(
        description="Of the posts that were not trained on; of all where none or all were, or nothing is"
        " known of it."
    )
    trained_on: TrainedOn | None = Field(None, description="None: it could not be looked up.")
    not_looked_up: str | None = Field(None, description="Why `trained_on` is None, and what would help.")
    figures_of_all: SplitFigures | None = Field(
        None, description="Of all posts, where `figures` leaves some out."
    )
    warnings: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


class Report(_Part):
    schema_version: Literal["emotion-train/report/1"] = SCHEMA
    verdict: Verdict
    warnings: tuple[str, ...]
    labels: tuple[str, ...]
    headline: str = Field(description="The split whose figures are quoted: test, else validation.")
    splits: dict[str, SplitFigures]
    history: tuple[Evaluation, ...]
    best_step: int | None
    dataset: Dataset
    cuts: dict[str, Cut] = Field(
        default_factory=dict,
        description=(
            "By split, what data.max_length cuts, counted with the run's tokenizer: of all held-out posts and"
            " of a sample of train. Empty in reports of earlier versions."
        ),
    )
    speed: Speed
    identity: Identity

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()
