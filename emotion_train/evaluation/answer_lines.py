"""Each labelled post is printed as one line of text, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from emotion_train.console import shown
from emotion_train.model.facts import AdapterFacts
from emotion_train.sources.posts import names_beside

if TYPE_CHECKING:
    from emotion_train.evaluation.scoring import Probabilities
    from emotion_train.evaluation.unlabelled import Post

TOP = 3  # labels of a post in a line of text
_MARK = "accepted"
_MARKS = {None: "", True: "accepted", False: "for a person"}  # in text
_BETWEEN = "|"  # several labels in a cell, as `prepare` reads them


def kept_names(columns: Sequence[str], facts: AdapterFacts, marked: bool = False) -> list[str]:
    """The names in the output for the columns of --columns."""
    own = [*_own_names(facts.targets == "several"), "probabilities", *([_MARK] if marked else [])]
    return names_beside(columns, [*own, *_names_of_labels(facts.labels, facts.targets == "several")])


def _own_names(several: bool) -> list[str]:
    return ["row", "text", _answer_name(several)]


def _names_of_labels(labels: Sequence[str], several: bool) -> list[str]:
    """The columns of the probabilities in a CSV: the labels, those with the name of another column
    behind `label_`.
    """
    return names_beside(labels, [*_own_names(several), _MARK], "label_")


def _answer_name(several: bool) -> str:
    return "labels" if several else "label"


def _csv_line(cells: Iterable[object]) -> str:
    """One row of a CSV, where each cell with a carriage return or a line feed is quoted; before
    Python 3.13 the csv module quotes only its own line terminator.
    """
    row = io.StringIO()
    csv.writer(row, lineterminator="\r\n").writerow(cells)
    return row.getvalue().removesuffix("\r\n") + "\n"


@dataclass(frozen=True)
class Written:
    """Writes a post as a line: its columns `kept`, its text, its answer (one label or `several`)
    and the probabilities of all `labels`. `cell` makes other people's text harmless in a CSV.
    `marked`: the line also says whether the answer is accepted.
    """

    labels: Sequence[str]
    several: bool
    kept: Sequence[str]
    top: int | None
    cell: Callable[[str], str] = str
    marked: bool = False

    def head(self) -> str:
        """The first line of a CSV."""
        named = _names_of_labels(self.labels, self.several)
        kept, labels = (map(self.cell, names) for names in (self.kept, named))
        mark = [_MARK] if self.marked else []
        return _csv_line(["row", *kept, "text", _answer_name(self.several), *mark, *labels])

    def as_csv(
        self, post: Post, prob_C: Probabilities, answer: Sequence[int], accepted: bool | None = None
    ) -> str:
        """The line of a CSV. Several labels share one cell, which is empty where there is none."""
        given = _BETWEEN.join(self.labels[label] for label in answer)
        words = map(self.cell, (*post.kept, post.text, given))
        mark = [] if accepted is None else [str(accepted).lower()]
        return _csv_line([post.row, *words, *mark, *(f"{value:.6f}" for value in prob_C)])

    def as_jsonl(
        self, post: Post, prob_C: Probabilities, answer: Sequence[int], accepted: bool | None = None
    ) -> str:
        given = [self.labels[label] for label in answer]
        printed: dict[str, Any] = {"row": post.row, **dict(zip(self.kept, post.kept, strict=True))}
        printed |= {"text": post.text, _answer_name(self.several): given if self.several else given[0]}
        printed |= {} if accepted is None else {_MARK: accepted}
        printed["probabilities"] = {
            label: round(float(value), 6) for label, value in zip(self.labels, prob_C, strict=True)
        }
        return json.dumps(printed, ensure_ascii=False) + "\n"

    def as_text(
        self, post: Post, prob_C: Probabilities, answer: Sequence[int], accepted: bool | None = None
    ) -> str:
        if self.several:
            told = list(answer)[: self.top]
        else:
            told = (-prob_C).argsort(kind="stable").tolist()[: self.top or TOP]
        given = "  ".join(f"{shown(self.labels[label])} {prob_C[label]:.2f}" for label in told) or "none"
        beside = "  ".join(
            f"{shown(name)}={shown(value)}" for name, value in zip(self.kept, post.kept, strict=True)
        )
        return "  | ".join(filter(None, (_MARKS[accepted], given, beside, shown(post.text)))) + "\n"


def printer(form: str, written: Written, out: IO[str]) -> Any:
    """A function that prints posts with their probabilities and answers."""
    line = {"csv": written.as_csv, "jsonl": written.as_jsonl, "text": written.as_text}[form]
    if form == "csv":
        out.write(written.head())

    def print_batch(
        posts: Sequence[Post],
        prob_NC: Probabilities,
        answers: Sequence[Sequence[int]],
        marks: Sequence[bool | None] = (),
    ) -> None:
        marks = marks or [None] * len(posts)
        for post, prob_C, answer, accepted in zip(posts, prob_NC, answers, marks, strict=True):
            out.write(line(post, prob_C, answer, accepted))
        out.flush()

    return print_batch
