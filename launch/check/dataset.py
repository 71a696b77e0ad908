"""Checks of the data set: its objects, labels and lengths, and posts that are in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emotion_train.config import Config
from emotion_train.console import counted
from emotion_train.data.index import Index, Split, require_slices, require_trainable
from emotion_train.data.lengths import Cut, Lengths, estimated
from emotion_train.data.objects import look_at_objects
from emotion_train.data.targets import WORDS
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.storage.store import Store
from launch.workload import lengths_by

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer

_BYTES_READ_AGAIN = 256 << 20  # at most, of objects whose ETag proves nothing
_HELD_OUT_LOOKED_AT = 50_000
_TRAIN_LOOKED_AT = 200_000
_TARGETS_LOOKED_AT = 20_000
_NAMES_SHOWN = 4
_FEW_POSTS = 5


@dataclass(frozen=True)
class Doubt:
    """A finding that a person should read; the run may start all the same."""

    words: str


def check_data(config: Config, index: Index) -> str:
    rows = ", ".join(f"{name} {split.rows:,}" for name, split in index.stored_splits.items())
    index.split("train")
    index.split("validation")
    targets = "" if index.targets == "one" else f" ({WORDS[index.targets]} a post)"
    weighted = ", posts have weights" if index.weighted else ""
    return f"{rows} posts, {len(index.labels)} labels{targets}{weighted}, {config.data.url}"


def check_objects(store: Store, index: Index) -> str:
    """The finding on the objects: every one exists with its size. Where an ETag proves nothing,
    objects are compared by sha256, up to a bound.
    """
    looked = look_at_objects(store, index, _BYTES_READ_AGAIN)
    problems = [*(f"{key} is missing" for key in looked.missing), *looked.damaged.values()]
    if problems:
        more = f", and {len(problems) - _NAMES_SHOWN} more" if len(problems) > _NAMES_SHOWN else ""
        remedy = "type the `emotion-train prepare` again that made it, which writes what is missing"
        if looked.damaged:
            remedy = f"delete what is damaged and {remedy}"
        raise WrongRequest(
            f"The data set at {store.url} is not whole: {', '.join(problems[:_NAMES_SHOWN])}{more}; {remedy},"
            " or copy all of it."
        )
    objects = [described for split in index.stored_splits.values() for described in split.objects]
    total = sum(described.bytes for described in objects)
    finding = f"{counted(len(objects), 'object')} of {total / 1e6:,.1f} MB, all there"
    if looked.by_etag == len(objects):
        return f"{finding}, unchanged by their ETags"
    return f"{finding}; {looked.by_sha256} compared by sha256" + (
        f", {looked.by_size} by size alone" if looked.by_size else ""
    )


def check_labels(config: Config, index: Index, store: Store) -> str | Doubt:
    """The finding on the labels: each one has posts to learn from and to be scored on. Where a post
    may have several labels, some posts are read to count those without any, and a label that every
    post of a split has is doubtful.
    """
    require_trainable(index, config.loss.weighted_labels)
    require_slices(index, config.report.slices)
    train = index.split("train")
    rarest, most = min(train.label_counts), max(train.label_counts)
    remarks = [
        f"largest class {most / rarest:,.{1 if most < 10 * rarest else 0}f} times the smallest"
        f" ({rarest:,.{0 if isinstance(rarest, int) else 1}f} posts)"
    ]
    if index.targets == "several":
        remarks.append(_without_label(store, train))
    for name, split in index.splits.items():
        empty = [label for label, count in zip(index.labels, split.label_counts, strict=True) if count == 0]
        if name != "train" and split.rows and empty:
            raise WrongRequest(
                f"No {name} post has the label {_some(empty)}, which counts 0 in macro-F1 whatever the model"
                f" does; prepare the data with more {name} posts, or without"
                f" {'it' if len(empty) == 1 else 'them'}."
            )
        if name != "train" and split.rows:
            few = [
                label
                for label, count in zip(index.labels, split.label_counts, strict=True)
                if count < _FEW_POSTS
            ]
            remarks += [f"{name} has fewer than {_FEW_POSTS} posts of {_some(few)}"] if few else []
    always = [words for name, split in index.splits.items() if (words := _never_varies(index, name, split))]
    return Doubt("; ".join([*always, *remarks])) if always else "; ".join(remarks)


def _without_label(store: Store, split: Split) -> str:
    """How many of the first posts have no label; the data set is shuffled as a whole, so any posts
    will do.
    """
    from emotion_train.data.reader import RowGroupReader

    looked_at = without = 0
    with RowGroupReader(store, split, capacity=4) as reader:
        for group in range(len(split.row_groups)):
            targets = reader.rows(group).targets
            looked_at += len(targets)
            without += sum(not target for target in targets)
            if looked_at >= _TARGETS_LOOKED_AT:
                break
    which = "training posts" if looked_at == split.rows else "training posts looked at"
    return f"{without:,} of {looked_at:,} {which} have no label"


def _never_varies(index: Index, name: str, split: Split) -> str | None:
    """The warning about labels that every post of a split has: nothing can be learned of them, nor
    scored. None where there are none.
    """
    always = [
        label
        for label, count in zip(index.labels, split.label_counts, strict=True)
        if split.rows and count == split.rows
    ]
    if not always:
        return None
    them = "it" if len(always) == 1 else "them"
    tells = "nothing is learned of" if name == "train" else "no score tells anything of"
    return f"every {name} post has the label {_some(always)}, so that {tells} {them}: prepare without {them}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (
        f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    )


def check_lengths(
    config: Config, index: Index, store: Store, load: Callable[[], PostTokenizer]
) -> str | Doubt:
    """How much data.max_length cuts of the training posts: of a sample, counted by the base's
    tokenizer, or of all, estimated from the index where `load` finds no tokenizer.
    """
    train, most = index.training, config.data.max_length
    try:
        tokenizer = load()
    except EmotionTrainError:  # said by the check of the base
        by_index = estimated(index.source)
        if by_index is None:
            return Doubt("the base's tokenizer cannot be read, so the posts' lengths were not looked at")
        cut = Cut.of(by_index, most)
        words = f"without the base's tokenizer, {cut.words('training posts', estimated=True)}"
    else:
        cut = Cut.of(Lengths.of(lengths_by(tokenizer, train, store)), most)
        words = cut.words("training posts" if cut.posts == train.rows else "training posts looked at")
    return Doubt(words) if cut.is_much else words


def check_overlap(store: Store, index: Index) -> str:
    """The finding on the splits: no text of the training split, normalised as `prepare` does, is in
    another split too. The reader raises where the posts' labels are not those that the index
    counts.
    """
    trained, looked_at = _text_hashes(store, index.training, _TRAIN_LOOKED_AT)
    for name, split in index.splits.items():
        if name == "train" or split.rows == 0:
            continue
        held_out, _ = _text_hashes(store, split, _HELD_OUT_LOOKED_AT)
        if both := len(trained.keys() & held_out.keys()):
            example = held_out[next(iter(sorted(trained.keys() & held_out.keys())))]
            are = "is" if both == 1 else "are"
            raise WrongRequest(
                f"{counted(both, 'text')} {are} in train and in {name}, among them {example[:60]!r}, so"
                " that its score would be too good; prepare the data again, which keeps a text out of two"
                " splits."
            )
    total = index.training.rows
    return (
        f"no text in two splits ({'all' if looked_at == total else f'{looked_at:,} of'} {total:,} training"
        " posts), and their labels are those that the index counts"
    )


def _text_hashes(store: Store, split: Split, most: int) -> tuple[dict[bytes, str], int]:
    """The beginning of each text by the hash of its normal form, and how many posts were read: all
    row groups up to about `most` posts.
    """
    from emotion_train.data.cleaning import normalised
    from emotion_train.data.reader import RowGroupReader

    beginnings: dict[bytes, str] = {}
    looked_at = 0
    with RowGroupReader(store, split, capacity=4) as reader:
        groups = range(len(split.row_groups))
        for place, group in enumerate(groups):
            reader.ask(groups[place : place + 3])
            rows = [text for text in reader.rows(group).texts if text]
            beginnings |= {
                hashlib.blake2b(normalised(text).encode("utf-8", "replace"), digest_size=16).digest(): text[
                    :80
                ]
                for text in rows
            }
            looked_at += split.row_groups[group].rows
            if looked_at >= most:
                break
    return beginnings, looked_at
