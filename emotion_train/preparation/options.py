"""The options of `prepare`, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emotion_train.data.targets import KINDS, WEIGHT, TargetKind, kept_name
from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.data.conflicts import Policy
    from emotion_train.sources.open import Choices
    from emotion_train.sources.posts import Columns


@dataclass(frozen=True)
class Options:
    """The options of `prepare`, with their defaults."""

    text_column: str = "text"
    label_column: str = "label"
    id_column: str | None = None
    labels: tuple[str, ...] | None = None
    targets: TargetKind = "one"
    label_columns: tuple[str, ...] | None = None  # in place of label_column
    allow_none: bool = False
    annotations_by: str | None = None
    weight_column: str | None = None
    multi_label: str | None = None  # None: as on_bad
    on_bad: str = "refuse"
    on_conflict: Policy | None = None  # None: majority, of shares mean
    max_chars: int = 20_000
    unescape_html: bool = False
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 42
    rows_per_group: int = 1024
    rows_per_object: int = 262_144
    memory_mb: int = 512
    format: str | None = None
    subset: str | None = None
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"
    text_file: str | None = None
    label_file: str | None = None
    header: tuple[str, ...] | None = None
    corrections: str | None = None
    keep_columns: tuple[str, ...] = ()
    auxiliary: Literal["drop", "keep"] = "drop"
    auxiliary_sources: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `WrongRequest` for values that are out of range or do not go together."""
        from emotion_train.data.conflicts import POLICIES

        if self.targets not in KINDS:
            raise WrongRequest(f"--targets is {self.targets!r}; type one of {', '.join(KINDS)}.")
        if self.policy not in self.policies:
            raise WrongRequest(
                f"--on-conflict is {self.on_conflict!r}; type one of {', '.join(POLICIES[self.targets])}"
                f"{'' if self.targets == 'one' else f' with --targets {self.targets}'}."
            )
        if self.allow_none and self.targets != "several":
            raise WrongRequest(
                "--allow-none is for posts with several labels; type --targets several with it."
            )
        if self.annotations_by is not None and self.targets == "one":
            raise WrongRequest(
                "--annotations-by joins answers to shares or to several labels; type --targets shares or"
                " --targets several with it (for one label a post --on-conflict majority counts them)."
            )
        if self.label_columns is not None and self.labels is not None:
            raise WrongRequest("--label-columns name the labels; leave --labels and --labels-file out.")
        if self.multi_label is not None and self.targets != "one":
            raise WrongRequest(
                "--multi-label is for one label a post; leave it out, or take --targets several back."
            )
        if self.corrections is not None and self.targets == "shares":
            raise WrongRequest(
                "--corrections is for one label a post or several; leave it out with --targets shares, whose"
                " annotators may all be right."
            )
        self._refuse_unnamed_auxiliary()
        folded = [name.strip().casefold() for name in self.keep_columns]
        if strange := next(
            (
                name
                for name, plain in zip(self.keep_columns, folded, strict=True)
                if not plain or "," in name or folded.count(plain) > 1
            ),
            None,
        ):
            raise WrongRequest(
                f"--keep-columns has {strange!r}; give each column once, by a name without a comma, such as"
                " lang,source."
            )
        fractions = (self.validation_fraction, self.test_fraction)
        for name, fraction in zip(("validation", "test"), fractions, strict=True):
            if not 0 <= fraction < 1:
                raise WrongRequest(
                    f"--{name}-fraction is {fraction:g}; give a share from 0 to below 1, 0.1 for 10 %."
                )
        if sum(fractions) >= 1:
            raise WrongRequest(
                f"--validation-fraction {fractions[0]} and --test-fraction {fractions[1]} leave nothing to"
                " train on; type for example 0.1."
            )
        least = {"max_chars": 1, "rows_per_group": 1, "rows_per_object": 1, "memory_mb": 16, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise WrongRequest(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; the smallest allowed is"
                    f" {smallest}."
                )
        most = {"max_chars": 2**31, "rows_per_group": 2**31, "rows_per_object": 2**40, "memory_mb": 2**24}
        for name, largest in most.items():
            if getattr(self, name) > largest:
                raise WrongRequest(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; the largest allowed is {largest}."
                )
        if self.seed >= 2**63:
            raise WrongRequest(f"--seed is {self.seed}; the largest allowed is {2**63 - 1}.")
        if self.labels is not None:
            from emotion_train.data.labels import require_names

            require_names(self.labels)

    def _refuse_unnamed_auxiliary(self) -> None:
        if self.auxiliary not in ("drop", "keep"):
            raise WrongRequest(f"--auxiliary is {self.auxiliary!r}; type drop or keep.")
        if not self.has_auxiliary:
            return
        option = "--auxiliary keep" if self.auxiliary == "keep" else "--auxiliary-source"
        if self.labels is None:
            raise WrongRequest(
                f"{option} is for posts of other labels than the reported ones; type --labels with the"
                " reported labels, such as --labels anger,joy,neutral, or --labels-file."
            )
        if self.annotations_by is not None:
            raise WrongRequest(
                f"{option} and --annotations-by do not go together, because answers are joined before labels"
                " are checked; leave one of them out."
            )

    @property
    def has_auxiliary(self) -> bool:
        """Whether there may be auxiliary posts, which are trained on and not scored."""
        return self.auxiliary == "keep" or bool(self.auxiliary_sources)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The allowed policies for several rows of a text, the default first."""
        from emotion_train.data.conflicts import BY_DEFAULT, POLICIES

        default = BY_DEFAULT[self.targets]
        return default, *(policy for policy in POLICIES[self.targets] if policy != default)

    @property
    def policy(self) -> Policy:
        """The policy for several rows of a text."""
        return self.policies[0] if self.on_conflict is None else self.on_conflict

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        from emotion_train.sources.posts import Columns

        return Columns(
            self.text_column,
            self.label_column if self.label_columns is None else None,
            self.id_column,
            label_columns=self.label_columns or (),
            weight=self.weight_column,
            annotator=self.annotations_by,
            lists=self.targets != "one",
            kept=self.keep_columns,
            kept_by="--keep-columns",
        )

    @property
    def columns_of_auxiliary(self) -> Columns:
        """The columns to read from an auxiliary source: its posts and labels."""
        from emotion_train.sources.posts import Columns

        return Columns(self.text_column, self.label_column, lists=True)

    @property
    def choices_of_auxiliary(self) -> Choices:
        """How an auxiliary source is read: by the endings of its files."""
        from emotion_train.sources.open import Choices

        return Choices(encoding=self.encoding, quoting=self.quoting)

    @property
    def more_columns(self) -> tuple[str, ...]:
        """The data set's columns that not every data set has, as shards name them."""
        weight = [WEIGHT] if self.weight_column is not None else []
        return (*weight, *map(kept_name, self.keep_columns))
