"""Whether several models were scored on the same posts, and the posts' texts where they can be
read.

Equal ids are not enough: two data sets may give the same ids to different posts. So prepared data
sets are compared by the sha256 of the split's objects, and where these differ by their posts
(another training split moves the same posts to other places). A remark names each data set that
cannot be read any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.index import Index, Split, read_index
from emotion_train.data.targets import WORDS
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.evaluation.floors import posts
from emotion_train.evaluation.metrics import alike_N
from emotion_train.evaluation.predictions import AnyPredictions, Predictions
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.results.scored import Scored, labels_in_order

_NAMED = 3  # models in a remark
_SHARES_OFF = 1e-6  # the rounding of float32, by which two tables may differ


@dataclass(frozen=True)
class OpenData:
    """The prepared data set of a scored split, as it is now."""

    store: Store
    index: Index

    def objects(self, split: str) -> tuple[str, ...] | None:
        """The sha256 of every byte of a split, piece by piece; None where there is no such
        split.
        """
        found = self.index.stored_splits.get(split)
        return None if found is None else _sums(found)


def _sums(split: Split) -> tuple[str, ...]:
    footers = (described.footer_sha256 for described in split.objects)
    return (*footers, *(group.sha256 for group in split.row_groups))


@dataclass(frozen=True, eq=False)
class SamePosts:
    """Predictions of all models in one order of posts and labels; `truth` is `truth_N` or, where a
    post may have several labels, `truth_NC`. `remarks` say what could not be compared; `texts` come
    from the predictions.
    """

    labels: tuple[str, ...]
    ids: tuple[str, ...]
    truth: NDArray[np.int32] | NDArray[np.bool_]
    predictions: tuple[AnyPredictions, ...]
    remarks: tuple[str, ...]
    texts: Mapping[str, str]


def open_data(scored: Scored) -> OpenData | str:
    """The data set that was scored, or why it cannot be read any more."""
    if scored.data_url is None:
        return f"{scored.name} was scored on a file"
    try:
        store = open_store(scored.data_url)
        index = read_index(store)
    except (WrongRequest, StorageError) as error:
        return str(error).rstrip(".")
    if scored.index_sha256 not in (None, index.sha256()):
        return f"{scored.data_url} is no longer the data set that {scored.name} was trained on"
    return OpenData(store, index)


def align(scored: Sequence[Scored], data: Sequence[OpenData | str]) -> SamePosts:
    """One order for all. Raises `WrongRequest` when targets, labels, ids, true labels, texts or the
    objects of the split are not the same.
    """
    first = scored[0]
    labels, ids = first.labels, first.predictions.ids
    aligned = []
    for one in scored:
        _refuse_other_targets(first, one)
        _refuse_other_labels(first, one)
        _refuse_other_ids(first, one)
        own = labels_in_order(one, labels)
        row_of = {post_id: row for row, post_id in enumerate(own.ids)}
        aligned.append(own.take([row_of[post_id] for post_id in ids]))
        _refuse_other_truth(first, one, aligned[0], aligned[-1])
    not_compared: dict[str, list[str]] = {}
    for other, there in zip(scored[1:], data[1:], strict=True):
        if (why := _same_texts(first, data[0], other, there)) is not None:
            not_compared.setdefault(why, []).append(other.name)
    remarks = tuple(_not_looked_up(first, others, why) for why, others in not_compared.items())
    texts = {key: text for one in scored for key, text in (one.texts or {}).items()}
    return SamePosts(labels, ids, aligned[0].truth, tuple(aligned), remarks, texts)


def _not_looked_up(first: Scored, others: Sequence[str], why: str) -> str:
    named = ", ".join([*others[:_NAMED], *(["…"] if len(others) > _NAMED else [])])
    return (
        f"{first.name} and {named} have the same ids and labels; whether their texts are the same is not"
        f" known: {why}."
    )


def _refuse_other_targets(first: Scored, other: Scored) -> None:
    here, there = first.predictions.targets, other.predictions.targets
    if here != there:
        raise WrongRequest(
            f"{first.name} was scored on posts that have {WORDS[here]} and {other.name} on posts that have"
            f" {WORDS[there]}, so their figures cannot be compared; compare runs on one data set."
        )


def _refuse_other_labels(first: Scored, other: Scored) -> None:
    if set(first.labels) != set(other.labels):
        only = sorted(set(first.labels) ^ set(other.labels))
        raise WrongRequest(
            f"{first.name} and {other.name} have different labels ({', '.join(only[:5])} in one of them"
            " only); compare runs on one data set."
        )


def _refuse_other_ids(first: Scored, other: Scored) -> None:
    here, there = set(first.predictions.ids), set(other.predictions.ids)
    if here != there:
        example = min(here ^ there)
        raise WrongRequest(
            f"{first.name} and {other.name} were scored on different posts: {len(here - there):,} ids are"
            f" only in the first and {len(there - here):,} only in the second, such as {example!r}; score"
            " both on one split (emotion-train evaluate --adapter … --data … --out …) and compare the"
            " scorecards."
        )


def _refuse_other_truth(first: Scored, other: Scored, here: AnyPredictions, there: AnyPredictions) -> None:
    differs_N = ~alike_N(here.truth, there.truth)
    if isinstance(here, Predictions) and isinstance(there, Predictions):
        differs_N |= _have_other_shares(here, there)
    if differs_N.any():
        row = int(differs_N.argmax())
        raise WrongRequest(
            f"{int(differs_N.sum()):,} of {len(here.ids):,} posts have another true label in {other.name}"
            f" than in {first.name}, such as {here.ids[row]!r}: {_true(here, row, first.labels)} and"
            f" {_true(there, row, first.labels)}. Compare runs that were scored on the same labels."
        )


def _have_other_shares(here: Predictions, there: Predictions) -> NDArray[np.bool_]:
    if here.shares_NC is None or there.shares_NC is None:
        return np.zeros(len(here.ids), bool)
    return np.asarray(np.abs(here.shares_NC - there.shares_NC).max(axis=1) > _SHARES_OFF)


def _true(predictions: AnyPredictions, row: int, labels: Sequence[str]) -> str:
    """The labels of a post, in quotes, with their shares where it has shares."""
    if isinstance(predictions, Predictions) and predictions.shares_NC is not None:
        shares = zip(labels, predictions.shares_NC[row].tolist(), strict=True)
        return ", ".join(f"{label!r} {share:.2f}" for label, share in shares if share)
    return repr(answer_words(predictions.truth[row], labels))


def answer_words(answer: NDArray[Any] | int, labels: Sequence[str]) -> str:
    """The name of a label id, or the names of a row of several labels, "none" for an empty row."""
    if np.ndim(answer) == 0:
        return labels[int(answer)]
    return ", ".join(labels[label] for label in np.flatnonzero(answer)) or "none"


def _same_texts(first: Scored, here: OpenData | str, other: Scored, there: OpenData | str) -> str | None:
    """None where the posts are known to be the same, else why they could not be compared; raises
    `WrongRequest` where they differ.
    """
    if first.index_sha256 is not None and first.index_sha256 == other.index_sha256:
        return None
    if isinstance(here, OpenData) and isinstance(there, OpenData):
        if here.objects(first.split) != there.objects(other.split):
            _refuse_other_posts(first, here, other, there)
        return None
    if first.texts is not None and other.texts is not None:
        _refuse_other_texts(first, first.texts, other, other.texts)
        return None
    return here if isinstance(here, str) else there if isinstance(there, str) else ""


def _refuse_other_posts(first: Scored, here: OpenData, other: Scored, there: OpenData) -> None:
    """Reads the posts of two splits with different objects; raises `WrongRequest` where their texts
    differ.
    """
    try:
        held = [
            {key: text for key, text, _ in posts(data.store, data.index.split(one.split))}
            for one, data in ((first, here), (other, there))
        ]
    except (WrongRequest, StorageError) as error:
        raise WrongRequest(
            f"The objects of {first.split!r} in {first.data_url} and {other.data_url} differ in sha256, and"
            f" their posts cannot be read: {error}"
        ) from None
    _refuse_other_texts(first, held[0], other, held[1])


def _refuse_other_texts(
    first: Scored, here: Mapping[str, str], other: Scored, there: Mapping[str, str]
) -> None:
    differ = sorted(key for key in first.predictions.ids if here.get(key) != there.get(key))
    if differ:
        raise WrongRequest(
            f"{len(differ):,} of {len(first.predictions.ids):,} posts have another text in {other.name}"
            f" than in {first.name}, such as {differ[0]!r}: the two were scored on different posts with the"
            " same ids. Score both on one data set."
        )


def texts_of(
    wanted: Collection[str], same: SamePosts, split: str, data: Sequence[OpenData | str]
) -> tuple[dict[str, str], str | None]:
    """Texts of the posts `wanted`, from the predictions, else from the first data set that can be
    read; and the reason where there are none.
    """
    if not wanted or all(key in same.texts for key in wanted):
        return {key: same.texts[key] for key in wanted}, None
    reason = "no predictions hold texts"
    for one in data:
        if isinstance(one, str):
            reason = one
            continue
        try:
            stored = posts(one.store, one.index.split(split))
            return {key: text for key, text, _ in stored if key in wanted}, None
        except (WrongRequest, StorageError) as error:
            reason = str(error).rstrip(".")
    return {}, reason
