"""Chooses the held-out posts that a report shows: the model's surest mistakes, by pairs of mistaken
labels, and the posts that look mislabelled.

Predictions alone choose them, so only the texts of the chosen posts are read from the data set
again. The order of the ids breaks ties: the same predictions choose the same posts.

Letters: N posts, C labels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emotion_train.edges.spreadsheet import harmless
from emotion_train.evaluation.mislabelled import doubts
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions
from emotion_train.preparation.corrections import COLUMNS, spelled_labels
from emotion_train.report.schema import Doubted, Example, Mislabelled, Mistakes

if TYPE_CHECKING:
    from emotion_train.report.figures import AnyResult

MISLABELLED = "mislabelled.csv"
Texts = Mapping[str, Mapping[str, str]]  # by split and id
_MOST_PAIRS = 12
_MOST_DOUBTED = 10_000  # rows of the CSV, which a person reads
_DOUBTED_FOR_EACH = 4  # posts on the page for each example of a pair
_LONGEST = 1000  # characters of a text in the report


class Pair(NamedTuple):
    """A true label, the label answered in its place, the number of such posts, and the rows of the
    surest mistakes with the model's certainty.
    """

    missed: int | None
    added: int | None
    posts: int
    rows: list[tuple[int, float]]


class Doubt(NamedTuple):
    """A post that looks mislabelled, by its split and its row there."""

    split: str
    row: int
    suggested: tuple[int, ...]
    score: float


class Chosen(NamedTuple):
    """The chosen posts of a report; `doubted` of the `looked_at` posts look mislabelled."""

    headline: str
    pairs: tuple[Pair, ...]
    doubts: tuple[Doubt, ...]
    doubted: int
    looked_at: int
    examples: int

    @classmethod
    def of(cls, splits: Mapping[str, AnyResult], headline: str, examples: int) -> Chosen:
        """The posts to show, with up to `examples` for each pair; with 0 none is shown, and no text
        is read.
        """
        predictions = {name: result.predictions for name, result in splits.items()}
        found, doubted = _doubts(predictions)
        looked_at = sum(len(one.ids) for one in predictions.values())
        pairs = _pairs(predictions[headline], examples)
        return cls(headline, pairs, found, doubted, looked_at, examples)

    def wanted(self, splits: Mapping[str, AnyResult]) -> dict[str, set[str]]:
        """The ids, by split, of the posts whose texts the report needs; none where it shows no
        texts.
        """
        rows: dict[str, set[int]] = {name: set() for name in splits}
        if self.examples:
            rows[self.headline] |= {row for pair in self.pairs for row, _ in pair.rows}
            for doubt in self.doubts:
                rows[doubt.split].add(doubt.row)
        return {name: {splits[name].predictions.ids[row] for row in found} for name, found in rows.items()}

    def mistakes(
        self, splits: Mapping[str, AnyResult], labels: Sequence[str], texts: Texts
    ) -> tuple[Mistakes, ...]:
        predictions = splits[self.headline].predictions
        known = texts.get(self.headline, {})
        return tuple(
            Mistakes(
                missed=None if pair.missed is None else labels[pair.missed],
                added=None if pair.added is None else labels[pair.added],
                posts=pair.posts,
                examples=tuple(
                    Example(
                        id=(post := predictions.ids[row]),
                        text=_cut(known[post]),
                        labels=_names(_truth(predictions, row), labels),
                        answer=_names(_answer(predictions, row), labels),
                        probability=sure,
                    )
                    for row, sure in pair.rows
                    if predictions.ids[row] in known
                ),
            )
            for pair in self.pairs
        )

    def mislabelled(
        self, splits: Mapping[str, AnyResult], labels: Sequence[str], texts: Texts
    ) -> Mislabelled | None:
        """The posts that look mislabelled; None for shares, which are not doubted."""
        if not _doubtable(splits):
            return None
        shown = [
            Doubted(
                split=doubt.split,
                id=(post := predictions.ids[doubt.row]),
                text=_cut(texts[doubt.split][post]),
                labels=_names(_truth(predictions, doubt.row), labels),
                suggested=_names(doubt.suggested, labels),
                score=doubt.score,
            )
            for doubt in self.doubts[: _DOUBTED_FOR_EACH * self.examples]
            for predictions in [splits[doubt.split].predictions]
            if predictions.ids[doubt.row] in texts.get(doubt.split, {})
        ]
        return Mislabelled(of=self.looked_at, posts=self.doubted, examples=tuple(shown))

    def to_csv(self, splits: Mapping[str, AnyResult], labels: Sequence[str], texts: Texts) -> bytes | None:
        """The posts that look mislabelled as a CSV for `emotion-train prepare --corrections`, which
        reads the column `corrected` that a person fills in; None for shares. Cells that a
        spreadsheet would compute begin with an apostrophe; where the report shows no texts, there
        is no column of texts.
        """
        if not _doubtable(splits):
            return None
        columns = [name for name in COLUMNS if name != "text" or self.examples]
        page = io.StringIO()
        rows = csv.DictWriter(page, columns, extrasaction="ignore", lineterminator="\r\n")
        rows.writeheader()
        for doubt in self.doubts:
            predictions = splits[doubt.split].predictions
            post = predictions.ids[doubt.row]
            own, other = _truth(predictions, doubt.row), doubt.suggested
            cells = {
                "id": post,
                "text": texts.get(doubt.split, {}).get(post, ""),
                "label": spelled_labels(_names(own, labels), self._several(splits)),
                "suggested": spelled_labels(_names(other, labels), self._several(splits)),
                "probability": f"{_fit(predictions, doubt):.4f}",
                "corrected": "",
            }
            rows.writerow({name: harmless(cell) for name, cell in cells.items()})
        return page.getvalue().encode()

    @staticmethod
    def _several(splits: Mapping[str, AnyResult]) -> bool:
        return any(isinstance(result.predictions, SetPredictions) for result in splits.values())


def _doubtable(splits: Mapping[str, AnyResult]) -> bool:
    return all(result.targets != "shares" for result in splits.values())


def _doubts(predictions: Mapping[str, AnyPredictions]) -> tuple[tuple[Doubt, ...], int]:
    """The doubts of all splits together, so that rare labels are judged by more posts; and how many
    there are.
    """
    places = [(name, row) for name, one in predictions.items() for row in range(len(one.ids))]
    parts = list(predictions.values())
    found = doubts(parts[0].joined(parts))  # type: ignore[arg-type]
    listed = zip(found.rows_D.tolist(), found.suggested_DC, found.score_D.tolist(), strict=True)
    chosen = tuple(
        Doubt(places[place][0], places[place][1], tuple(np.flatnonzero(suggested_C).tolist()), score)
        for (place, suggested_C, score), _ in zip(listed, range(_MOST_DOUBTED), strict=False)
    )
    return chosen, len(found.rows_D)


def _fit(predictions: AnyPredictions, doubt: Doubt) -> float:
    """The model's probability of its suggestion. With several labels, this is the smallest over the
    labels that it would add and the absence of those that it would remove.
    """
    prob_C = predictions.prob_NC[doubt.row]
    if not isinstance(predictions, SetPredictions):
        return float(prob_C[doubt.suggested[0]])
    own, other = set(_truth(predictions, doubt.row)), set(doubt.suggested)
    return float(
        min([*(prob_C[label] for label in other - own), *(1 - prob_C[label] for label in own - other)])
    )


def _pairs(predictions: AnyPredictions, examples: int) -> tuple[Pair, ...]:
    """The pairs with most posts, ties in the order of the labels, with their surest mistakes."""
    if isinstance(predictions, SetPredictions):
        found = _pairs_of_sets(predictions)
    else:
        rows = np.flatnonzero(predictions.truth_N != predictions.predicted_N)
        truth_M, answer_M = predictions.truth_N[rows], predictions.predicted_N[rows]
        sure_M = predictions.prob_NC[rows, answer_M]
        found = {}
        for row, missed, added, sure in zip(
            rows.tolist(), truth_M.tolist(), answer_M.tolist(), sure_M.tolist(), strict=True
        ):
            found.setdefault((missed, added), []).append((row, sure))
    most = sorted(found.items(), key=lambda item: (-len(item[1]), *(_order(label) for label in item[0])))
    return tuple(
        Pair(missed, added, len(rows), sorted(rows, key=lambda one: (-one[1], one[0]))[:examples])
        for (missed, added), rows in most[:_MOST_PAIRS]
    )


_Found = dict[tuple[int | None, int | None], list[tuple[int, float]]]


def _pairs_of_sets(predictions: SetPredictions) -> _Found:
    """Each label that a post misses, paired with each that was added; None in place of a label
    where there is only one kind. The certainty is the smaller of the two halves'.
    """
    missed_NC = predictions.truth_NC & ~predictions.predicted_NC
    added_NC = predictions.predicted_NC & ~predictions.truth_NC
    found: _Found = {}
    for row in np.flatnonzero((missed_NC | added_NC).any(axis=1)).tolist():
        prob_C = predictions.prob_NC[row].tolist()
        lost: list[int | None] = [*np.flatnonzero(missed_NC[row]).tolist()] or [None]
        gained: list[int | None] = [*np.flatnonzero(added_NC[row]).tolist()] or [None]
        for missed in lost:
            for added in gained:
                sure = min(
                    1.0 if missed is None else 1 - prob_C[missed], 1.0 if added is None else prob_C[added]
                )
                found.setdefault((missed, added), []).append((row, sure))
    return found


def _order(label: int | None) -> int:
    return -1 if label is None else label


def _truth(predictions: AnyPredictions, row: int) -> tuple[int, ...]:
    return _labels_at(predictions.truth, row)


def _answer(predictions: AnyPredictions, row: int) -> tuple[int, ...]:
    return _labels_at(predictions.predicted, row)


def _labels_at(answers: NDArray[np.int32] | NDArray[np.bool_], row: int) -> tuple[int, ...]:
    if answers.ndim == 1:
        return (int(answers[row]),)
    return tuple(np.flatnonzero(answers[row]).tolist())


def _names(ids: Sequence[int], labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(labels[label] for label in ids)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
