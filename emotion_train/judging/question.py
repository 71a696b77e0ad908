"""The question that `evaluate` answers: which adapters, on which posts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from emotion_train.evaluation.adapter import AdapterChoice


@dataclass(frozen=True)
class Question:
    """The posts to score: a split of the data set at `data`, or the labelled posts of `file`, read
    by the rules of `prepare`. `out` is a folder or URL for scorecard and predictions; `run_url` and
    `training_data` say what the adapter was trained on.
    """

    chosen: AdapterChoice
    data: str | None = None
    split: str = "test"
    file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    label_columns: tuple[str, ...] | None = None  # in place of label_column
    allow_none: bool = False
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"
    max_chars: int = 20_000
    unescape_html: bool = False
    out: str | None = None
    with_texts: bool = False
    run_url: str | None = None
    training_data: str | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Question:
        from emotion_train.data.labels_file import names_in

        names = [name for name in cls.__dataclass_fields__ if name not in ("chosen", "label_columns")]
        columns = None if arguments.label_columns is None else names_in(arguments.label_columns)
        return cls(
            AdapterChoice.of(arguments),
            label_columns=columns,
            **{name: getattr(arguments, name) for name in names},
        )
