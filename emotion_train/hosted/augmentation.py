"""The request of `augment`: which data set gets synthetic posts, how many, and of which model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from emotion_train.errors import WrongRequest
from emotion_train.hosted.options import HostedOptions

_MOST_PER_CALL = 50


@dataclass(frozen=True)
class Augmentation:
    """Synthetic posts for the data set at `data_url`, written beside its posts to `new_data_url`;
    or, with `repeat_of`, as many real posts repeated as that data set has synthetic ones.
    """

    data_url: str
    new_data_url: str
    hosted: HostedOptions
    to: str  # median, or a number of posts
    labels: tuple[str, ...] | None  # None: all labels below `to`
    weight: float
    shots: int
    per_call: int
    keep: float
    adapter: str | None  # None: out-of-fold TF-IDF filters
    device: Literal["auto", "cpu"]
    repeat_of: str | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Augmentation:
        names = [name for name in cls.__dataclass_fields__ if name not in ("hosted", "labels")]
        labels = arguments.labels
        return cls(
            hosted=HostedOptions.of(arguments),
            labels=None if labels is None else tuple(one.strip() for one in labels.split(",")),
            **{name: getattr(arguments, name) for name in names},
        )

    def require_sane(self) -> None:
        """Raises `WrongRequest` for options that do not fit together or are out of range."""
        if (self.hosted.llm is None) == (self.repeat_of is None):
            raise WrongRequest("Give one of --llm MODEL@URL and --repeat-of AUGMENTED_URL.")
        if self.hosted.llm is not None and len(self.hosted.llm) > 1:
            raise WrongRequest("Give one --llm: all synthetic posts of a data set are written by one model.")
        if not 0 < self.weight <= 1:
            raise WrongRequest(f"--weight is {self.weight:g}; give more than 0, and 1 at most.")
        if not 0 < self.keep <= 1:
            raise WrongRequest(f"--keep is {self.keep:g}; give a share above 0, and 1 at most.")
        if self.per_call > _MOST_PER_CALL or self.shots > _MOST_PER_CALL:
            raise WrongRequest(f"--per-call and --shots are {_MOST_PER_CALL} at most.")
