"""The model's predictions for every post of a split: `predictions_<split>.parquet`, and how the
ranks' parts become one file.

A post that has one label, or shares of labels, is answered with one label: `Predictions`. A post
that has several labels is answered with a set of labels: `SetPredictions`.

All rows are held in memory: a million posts with 28 labels take 112 MB of probabilities. Ids travel
as strings, so that the file can be joined with the user's own table.

Letters: N posts, C labels.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.metrics import confusion

# probabilities are float32: closer than this, two labels are tied and either may be the prediction
_TIE = 1e-5


def placed(x_NC: NDArray[Any], places_C: ArrayLike, classes: int) -> NDArray[Any]:
    """The columns of a table at their places among `classes` columns; the other columns are 0."""
    of_all = np.zeros((len(x_NC), classes), x_NC.dtype)
    of_all[:, np.asarray(places_C)] = x_NC
    return of_all


class Inconsistent(RuntimeError):
    """Figures that must be equal are not: a defect of this program, not of the request, so it ends
    with a traceback.
    """


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row a post. Where posts are labelled with shares, `shares_NC` holds them, and the truth
    is the label of the largest share.

    Raises `Inconsistent` when lengths differ, or a prediction is not the label of the highest
    probability.
    """

    ids: tuple[str, ...]
    truth_N: NDArray[np.int32]
    predicted_N: NDArray[np.int32]
    prob_NC: NDArray[np.float32]
    shares_NC: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.shares_NC is not None and self.shares_NC.shape != self.prob_NC.shape:
            raise Inconsistent(
                f"shares of shape {self.shares_NC.shape} and probabilities of {self.prob_NC.shape}"
            )
        rows = len(self.ids)
        if self.prob_NC.ndim != 2 or not rows == len(self.truth_N) == len(self.predicted_N) == len(
            self.prob_NC
        ):
            raise Inconsistent(
                f"{rows} ids, {len(self.truth_N)} labels, {len(self.predicted_N)} predictions, probabilities"
                f" of shape {self.prob_NC.shape}"
            )
        if not rows:
            return
        highest_N = self.prob_NC.max(axis=1)
        wrong_N = ~(self.prob_NC[np.arange(rows), self.predicted_N] >= highest_N - _TIE)  # also true for NaN
        wrong_N |= ~(np.abs(self.prob_NC.sum(axis=1, dtype=np.float64) - 1) < 1e-3)
        if wrong_N.any():
            first = int(wrong_N.argmax())
            raise Inconsistent(
                f"{int(wrong_N.sum())} of {rows} posts have probabilities that do not add up to 1 or do not"
                f" fit their prediction; the first is {self.ids[first]!r}, predicted"
                f" {int(self.predicted_N[first])}, probabilities {self.prob_NC[first].tolist()}"
            )

    @classmethod
    def of(
        cls,
        ids: Iterable[str],
        truth_N: ArrayLike,
        prob_NC: ArrayLike,
        predicted_N: ArrayLike | None = None,
        shares_NC: ArrayLike | None = None,
    ) -> Predictions:
        """From anything array-like; `predicted_N` None takes the label of the highest
        probability.
        """
        prob_NC = np.asarray(prob_NC, dtype=np.float32)
        predicted_N = prob_NC.argmax(axis=1) if predicted_N is None else predicted_N
        return cls(
            tuple(ids),
            np.asarray(truth_N, dtype=np.int32),
            np.asarray(predicted_N, dtype=np.int32),
            prob_NC,
            None if shares_NC is None else np.asarray(shares_NC, dtype=np.float32),
        )

    def take(self, rows: Sequence[int]) -> Predictions:
        picked = np.asarray(rows, dtype=np.int64)
        return Predictions(
            tuple(self.ids[row] for row in rows),
            self.truth_N[picked],
            self.predicted_N[picked],
            self.prob_NC[picked],
            None if self.shares_NC is None else self.shares_NC[picked],
        )

    @staticmethod
    def joined(parts: Sequence[Predictions]) -> Predictions:
        """The rows of all parts; either all parts have shares or none has."""
        shares = [part.shares_NC for part in parts if part.shares_NC is not None]
        return Predictions(
            tuple(post_id for part in parts for post_id in part.ids),
            np.concatenate([part.truth_N for part in parts]),
            np.concatenate([part.predicted_N for part in parts]),
            np.concatenate([part.prob_NC for part in parts]),
            np.concatenate(shares) if shares else None,
        )

    def relabelled(self, places_C: ArrayLike, classes: int) -> Predictions:
        """The same rows with label c at place `places_C[c]` of `classes` labels; the other places
        have probability 0.
        """
        places_C = np.asarray(places_C, dtype=np.int32)
        return Predictions(
            self.ids,
            places_C[self.truth_N],
            places_C[self.predicted_N],
            placed(self.prob_NC, places_C, classes),
            None if self.shares_NC is None else placed(self.shares_NC, places_C, classes),
        )

    @property
    def targets(self) -> TargetKind:
        """What the posts are labelled with."""
        return "one" if self.shares_NC is None else "shares"

    @property
    def truth(self) -> NDArray[np.int32]:
        """`truth_N`, by the name that both kinds of predictions share."""
        return self.truth_N

    @property
    def predicted(self) -> NDArray[np.int32]:
        return self.predicted_N

    def counts(self) -> NDArray[np.int64]:
        """The confusion matrix, `counts_CC`."""
        return confusion(self.truth_N, self.predicted_N, self.prob_NC.shape[1])


@dataclass(frozen=True, eq=False)
class SetPredictions:
    """One row a post, which has any of the labels and is answered with any of them. Raises
    `Inconsistent` when shapes differ or a probability does not lie between 0 and 1.
    """

    ids: tuple[str, ...]
    truth_NC: NDArray[np.bool_]
    predicted_NC: NDArray[np.bool_]
    prob_NC: NDArray[np.float32]

    def __post_init__(self) -> None:
        shapes = {self.truth_NC.shape, self.predicted_NC.shape, self.prob_NC.shape}
        if self.prob_NC.ndim != 2 or len(shapes) > 1 or len(self.prob_NC) != len(self.ids):
            raise Inconsistent(f"{len(self.ids)} ids and labels, answers, probabilities of shapes {shapes}")
        if not ((self.prob_NC >= 0) & (self.prob_NC <= 1)).all():  # also for NaN
            raise Inconsistent("a probability does not lie between 0 and 1")

    @classmethod
    def of(
        cls, ids: Iterable[str], truth_NC: ArrayLike, prob_NC: ArrayLike, thresholds: ArrayLike = 0.5
    ) -> SetPredictions:
        """From anything array-like: a post is answered with the labels whose probability reaches
        their threshold, one number or `thresholds_C`.
        """
        prob_NC = np.asarray(prob_NC, dtype=np.float32)
        answers_NC = prob_NC >= np.asarray(thresholds, np.float32)
        return cls(tuple(ids), np.asarray(truth_NC).astype(bool), answers_NC, prob_NC)

    def answered(self, predicted_NC: NDArray[np.bool_]) -> SetPredictions:
        """The same posts with other answers."""
        return SetPredictions(self.ids, self.truth_NC, predicted_NC, self.prob_NC)

    def take(self, rows: Sequence[int]) -> SetPredictions:
        picked = np.asarray(rows, dtype=np.int64)
        return SetPredictions(
            tuple(self.ids[row] for row in rows),
            self.truth_NC[picked],
            self.predicted_NC[picked],
            self.prob_NC[picked],
        )

    @staticmethod
    def joined(parts: Sequence[SetPredictions]) -> SetPredictions:
        """The rows of all parts."""
        return SetPredictions(
            tuple(post_id for part in parts for post_id in part.ids),
            np.concatenate([part.truth_NC for part in parts]),
            np.concatenate([part.predicted_NC for part in parts]),
            np.concatenate([part.prob_NC for part in parts]),
        )

    def relabelled(self, places_C: ArrayLike, classes: int) -> SetPredictions:
        """The same rows with other label ids, as `Predictions.relabelled` gives them."""
        columns = (
            placed(x_NC, places_C, classes) for x_NC in (self.truth_NC, self.predicted_NC, self.prob_NC)
        )
        return SetPredictions(self.ids, *columns)

    @property
    def targets(self) -> TargetKind:
        return "several"

    @property
    def truth(self) -> NDArray[np.bool_]:
        """`truth_NC`."""
        return self.truth_NC

    @property
    def predicted(self) -> NDArray[np.bool_]:
        return self.predicted_NC

    def counts(self) -> NDArray[np.int64]:
        """`counts_3C`: by label the posts that have it and were answered with it, that have it, and
        that were answered with it.
        """
        both_NC = self.truth_NC & self.predicted_NC
        return np.stack([x_NC.sum(axis=0) for x_NC in (both_NC, self.truth_NC, self.predicted_NC)]).astype(
            np.int64
        )


AnyPredictions = Predictions | SetPredictions
P = TypeVar("P", bound=AnyPredictions)


def predictions_key(split: str) -> str:
    return f"predictions_{split}.parquet"


def join_predictions(parts: Iterable[P], expected: int | Sequence[str]) -> P:
    """One table with exactly one row a post, in the order of the expected ids, or sorted by id when
    only their number is known.

    The result never depends on the number of parts. Raises `Inconsistent` with the first ids that
    are there twice, missing, or unknown.
    """
    filled = [part for part in parts if part.ids]
    if not filled:
        raise Inconsistent("no rank has handed in a prediction")
    if len({part.prob_NC.shape[1] for part in filled}) > 1:
        raise Inconsistent(f"the parts have {sorted({part.prob_NC.shape[1] for part in filled})} labels")
    whole = cast(P, filled[0].joined(filled))  # type: ignore[arg-type]
    row_of = {post_id: row for row, post_id in enumerate(whole.ids)}
    wanted = sorted(row_of) if isinstance(expected, int) else expected
    rows = expected if isinstance(expected, int) else len(expected)
    problems = []
    if len(row_of) < len(whole.ids):
        problems.append(
            _some(
                "there more than once",
                [post_id for post_id, count in Counter(whole.ids).items() if count > 1],
            )
        )
    missing = [post_id for post_id in wanted if post_id not in row_of]
    if missing:
        problems.append(_some("missing", missing))
    if not isinstance(expected, int) and (unknown := row_of.keys() - set(expected)):
        problems.append(_some("not of this split", sorted(unknown)))
    if problems or len(row_of) != rows:
        problems.insert(0, f"{len(whole.ids)} predictions of {len(row_of)} posts for {rows} posts")
        raise Inconsistent("; ".join(problems))
    return cast(P, whole.take([row_of[post_id] for post_id in wanted]))


def predictions_to_parquet(
    predictions: AnyPredictions, labels: Sequence[str], texts: Mapping[str, str] | None = None
) -> bytes:
    """Parquet, zstd: id string, label int32, predicted int32, probabilities list<float32>, then the
    names of both labels, the shares list<float32> where the posts have them, and the text where
    `texts` gives it by id.

    Where posts have several labels: id, labels list<int32>, predicted list<int32>, probabilities,
    and the lists of their names. The same rows give the same bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"id": pa.array(predictions.ids, pa.string())}
    if isinstance(predictions, SetPredictions):
        columns["labels"] = _listed(predictions.truth_NC)
        columns["predicted"] = _listed(predictions.predicted_NC)
        columns["probabilities"] = _lists(predictions.prob_NC)
        columns["label_names"] = _listed(predictions.truth_NC, labels)
        columns["predicted_names"] = _listed(predictions.predicted_NC, labels)
    else:
        columns["label"] = pa.array(predictions.truth_N, pa.int32())
        columns["predicted"] = pa.array(predictions.predicted_N, pa.int32())
        columns["probabilities"] = _lists(predictions.prob_NC)
        columns["label_name"] = _named(predictions.truth_N, labels)
        columns["predicted_name"] = _named(predictions.predicted_N, labels)
        if predictions.shares_NC is not None:
            columns["shares"] = _lists(predictions.shares_NC)
    table = pa.table(columns)
    if texts is not None:
        table = table.append_column("text", pa.array([texts[post] for post in predictions.ids], pa.string()))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def predictions_from_parquet(raw: bytes) -> Predictions:
    """The predictions that `predictions_to_parquet` wrote, with one label for each answer. Raises
    `Inconsistent` where `any_predictions_from_parquet` does, and for posts with several labels.
    """
    found = any_predictions_from_parquet(raw)
    if not isinstance(found, Predictions):
        raise Inconsistent("the posts of a predictions file have several labels")
    return found


def any_predictions_from_parquet(raw: bytes) -> AnyPredictions:
    """The predictions that `predictions_to_parquet` wrote. Raises `Inconsistent` when the rows
    differ in their number of probabilities.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(raw))
    wanted = ("id", "label", "labels", "predicted", "probabilities", "shares")
    table = file.read(columns=[name for name in wanted if name in file.schema_arrow.names]).combine_chunks()
    ids, prob_NC = tuple(table["id"].to_pylist()), _matrix(table["probabilities"])
    if "labels" in table.column_names:
        truth_NC, predicted_NC = (_members(table[name], prob_NC.shape[1]) for name in ("labels", "predicted"))
        return SetPredictions(ids, truth_NC, predicted_NC, prob_NC)
    return Predictions(
        ids,
        table["label"].to_numpy().astype(np.int32),
        table["predicted"].to_numpy().astype(np.int32),
        prob_NC,
        _matrix(table["shares"]) if "shares" in table.column_names else None,
    )


def _lists(x_NC: NDArray[np.float32]) -> Any:
    """A column of lists, one a row."""
    import pyarrow as pa

    rows, classes = x_NC.shape
    flat = pa.array(np.ascontiguousarray(x_NC, dtype=np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * classes, pa.int32()), flat)


def _matrix(column: Any) -> NDArray[np.float32]:
    """The lists of a column as rows; raises `Inconsistent` where their lengths differ."""
    lists = column.combine_chunks()
    widths = set(lists.value_lengths().to_pylist())
    if len(widths) > 1:
        raise Inconsistent(
            f"the rows of a predictions file have {sorted(widths)} probabilities; every row has one a label"
        )
    flat: NDArray[np.float32] = lists.flatten().to_numpy().astype(np.float32)
    return flat.reshape(len(lists), -1 if widths else 0)


def _listed(is_in_NC: NDArray[np.bool_], names: Sequence[str] | None = None) -> Any:
    """A column of the labels that each row has, by id or by name."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(is_in_NC.sum(axis=1))])
    ids = pa.array(np.nonzero(is_in_NC)[1].astype(np.int32))
    values = ids if names is None else pa.array(names, pa.string()).take(ids)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)


def _members(column: Any, classes: int) -> NDArray[np.bool_]:
    """The inverse of `_listed` by id."""
    lists = column.combine_chunks()
    labels = lists.flatten()
    if lists.null_count or labels.null_count:
        raise Inconsistent("a row of a predictions file has no labels, not even an empty list")
    label_P = labels.to_numpy()
    if ((label_P < 0) | (label_P >= classes)).any():
        raise Inconsistent(f"a predictions file has labels outside 0 … {classes - 1}")
    is_in_NC = np.zeros((len(lists), classes), bool)
    is_in_NC[np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy()), label_P] = True
    return is_in_NC


def texts_from_parquet(raw: bytes) -> dict[str, str] | None:
    """The texts of a predictions file by id; None where the file holds none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(raw))
    if "text" not in file.schema_arrow.names:
        return None
    table = file.read(columns=["id", "text"])
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def _named(label_N: NDArray[np.int32], labels: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.array(labels, pa.string()).take(pa.array(label_N))


def _some(what: str, ids: Sequence[str]) -> str:
    return (
        f"{len(ids)} {what}: {', '.join(repr(post_id) for post_id in ids[:5])}{', …' if len(ids) > 5 else ''}"
    )
