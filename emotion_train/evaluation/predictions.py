"""What the model said about every post of a split: `predictions_<split>.parquet`, and how the
ranks' parts become one such file.

All rows are held in memory: a million posts with 28 labels take 112 MB of probabilities. Ids travel
as strings, so that the file can be joined with the user's own table.

Letters: N posts, C labels.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# probabilities are float32: closer than this, two labels are tied and either may be the prediction
_TIE = 1e-5


class Inconsistent(RuntimeError):
    """Figures that must be equal are not: a defect of this program, not of the request, so it ends
    with a traceback.
    """


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row a post. Raises `Inconsistent` when lengths differ, or a prediction is not the label
    of the highest probability.
    """

    ids: tuple[str, ...]
    truth_N: NDArray[np.int32]
    predicted_N: NDArray[np.int32]
    prob_NC: NDArray[np.float32]

    def __post_init__(self) -> None:
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
        cls, ids: Iterable[str], truth_N: ArrayLike, prob_NC: ArrayLike, predicted_N: ArrayLike | None = None
    ) -> Predictions:
        """From anything array-like; `predicted_N` None takes the label of the highest
        probability.
        """
        prob_NC = np.asarray(prob_NC, dtype=np.float32)
        predicted_N = prob_NC.argmax(axis=1) if predicted_N is None else predicted_N
        return cls(
            tuple(ids), np.asarray(truth_N, dtype=np.int32), np.asarray(predicted_N, dtype=np.int32), prob_NC
        )

    def take(self, rows: Sequence[int]) -> Predictions:
        picked = np.asarray(rows, dtype=np.int64)
        return Predictions(
            tuple(self.ids[row] for row in rows),
            self.truth_N[picked],
            self.predicted_N[picked],
            self.prob_NC[picked],
        )


def predictions_key(split: str) -> str:
    return f"predictions_{split}.parquet"


def join_predictions(parts: Iterable[Predictions], expected: int | Sequence[str]) -> Predictions:
    """One table with exactly one row a post, in the order of the expected ids, or sorted by id when
    only their number is known.

    Either way the result does not depend on how many parts there were. Raises `Inconsistent` with
    the first ids that are there twice, missing, or unknown.
    """
    filled = [part for part in parts if part.ids]
    if not filled:
        raise Inconsistent("no rank has handed in a prediction")
    if len({part.prob_NC.shape[1] for part in filled}) > 1:
        raise Inconsistent(f"the parts have {sorted({part.prob_NC.shape[1] for part in filled})} labels")
    whole = Predictions(
        tuple(post_id for part in filled for post_id in part.ids),
        np.concatenate([part.truth_N for part in filled]),
        np.concatenate([part.predicted_N for part in filled]),
        np.concatenate([part.prob_NC for part in filled]),
    )
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
    return whole.take([row_of[post_id] for post_id in wanted])


def predictions_to_parquet(
    predictions: Predictions, labels: Sequence[str], texts: Mapping[str, str] | None = None
) -> bytes:
    """Parquet, zstd: id string, label int32, predicted int32, probabilities list<float32>, then the
    names of both labels, and the text where `texts` gives it by id. The same rows give the same
    bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, classes = predictions.prob_NC.shape
    flat = pa.array(np.ascontiguousarray(predictions.prob_NC, dtype=np.float32).reshape(-1))
    table = pa.table(
        {
            "id": pa.array(predictions.ids, pa.string()),
            "label": pa.array(predictions.truth_N, pa.int32()),
            "predicted": pa.array(predictions.predicted_N, pa.int32()),
            "probabilities": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1) * classes, pa.int32()), flat
            ),
            "label_name": _named(predictions.truth_N, labels),
            "predicted_name": _named(predictions.predicted_N, labels),
        }
    )
    if texts is not None:
        table = table.append_column("text", pa.array([texts[post] for post in predictions.ids], pa.string()))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def predictions_from_parquet(raw: bytes) -> Predictions:
    """What `predictions_to_parquet` wrote. Raises `Inconsistent` when the rows differ in their
    number of probabilities.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(
        pa.BufferReader(raw), columns=["id", "label", "predicted", "probabilities"]
    ).combine_chunks()
    lists = table["probabilities"].combine_chunks()
    widths = set(lists.value_lengths().to_pylist())
    if len(widths) > 1:
        raise Inconsistent(
            f"the rows of a predictions file have {sorted(widths)} probabilities; every row has one a label"
        )
    return Predictions(
        tuple(table["id"].to_pylist()),
        table["label"].to_numpy().astype(np.int32),
        table["predicted"].to_numpy().astype(np.int32),
        lists.flatten().to_numpy().astype(np.float32).reshape(table.num_rows, -1 if widths else 0),
    )


def texts_from_parquet(raw: bytes) -> dict[str, str] | None:
    """The texts of a predictions file by id; None where they were not asked for."""
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
