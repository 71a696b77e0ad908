"""An index is believed only where it agrees with itself, with its digest and with the posts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion_train.cli import main
from emotion_train.data.index import FEATURES, FIRST, SCHEMA, Index, limited, read_index
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import Target, largest
from emotion_train.edges.bounded import MAX_DEPTH
from emotion_train.errors import WrongRequest
from emotion_train.preparation.steps import prepare
from emotion_train.storage.document import digest_of
from emotion_train.storage.folder import FolderStore
from tests.helpers.tiny_runs import write_posts

Document = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    prepare(str(write_posts(folder / "source")), str(folder / "data"), rows_per_group=32)
    return folder / "data"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> FolderStore:
    """A copy of the data set whose index a test may edit; the objects are the same files."""
    shutil.copytree(made, tmp_path / "data", copy_function=os.link)
    return FolderStore(tmp_path / "data")


def edited(store: FolderStore, edit: Callable[[Document], object], schema: str = SCHEMA) -> FolderStore:
    """The store after an edit by somebody who computes the digest anew, or writes the schema that
    has none.
    """
    document = json.loads(store.read("index.json"))
    edit(document)
    document["schema_version"] = schema
    document["digest"] = digest_of(document)
    if schema == FIRST:
        del document["digest"], document["requires"]
    store.write("index.json", json.dumps(document).encode())
    return store


def group(document: Document) -> Document:
    found: Document = document["splits"]["train"]["row_groups"][0]
    return found


def test_the_digest_is_the_sha256_of_the_rest(made: Path) -> None:
    document = json.loads((made / "index.json").read_bytes())
    digest = document.pop("digest")
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert (document["schema_version"], document["requires"]) == ("emotion-train/index/2", [])


def test_an_index_in_another_layout_is_the_same(made: Path, store: FolderStore) -> None:
    document = json.loads(store.read("index.json"))
    store.write("index.json", json.dumps(document, indent=3).encode())
    assert read_index(store) == read_index(FolderStore(made))


def shift(counts: list[int]) -> None:
    counts[0], counts[1] = counts[0] - 1, counts[1] + 1


EDITS: dict[str, Callable[[Document], object]] = {
    "swapped labels": lambda index: index["labels"].reverse(),
    "seed": lambda index: index.update(seed=7),
    "counts of a split": lambda index: shift(index["splits"]["train"]["label_counts"]),
    "words on the source": lambda index: index["source"].update(name="other.csv"),
    "a version": lambda index: index["versions"].update(pyarrow="0"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_by_hand_is_seen_by_the_digest(
    edit: Callable[[Document], object], store: FolderStore
) -> None:
    document = json.loads(store.read("index.json"))
    edit(document)
    store.write("index.json", json.dumps(document).encode())
    with pytest.raises(
        WrongRequest, match=r"damaged or was edited \(its digest is not that of its content\)"
    ):
        read_index(store)


UNSOUND: dict[str, Callable[[Document], object]] = {
    "two labels alike": lambda index: index.update(labels=["calm", "calm", "rage", "awe"]),
    "an empty label": lambda index: index["labels"].__setitem__(0, ""),
    "a blank label": lambda index: index["labels"].__setitem__(0, " \u200b".strip("\u200b")),
    "a label of 100,000 characters": lambda index: index["labels"].__setitem__(0, "x" * 100_000),
    "one label more": lambda index: index["labels"].append("one more"),
    "one label less": lambda index: index["labels"].pop(),
    "shifted counts of a split": lambda index: shift(index["splits"]["train"]["label_counts"]),
    "counts of a split of another length": lambda index: index["splits"]["train"]["label_counts"].append(0),
    "short counts of a row group": lambda index: group(index)["label_counts"].pop(),
    "shifted counts of a row group": lambda index: shift(group(index)["label_counts"]),
    "a negative count": lambda index: group(index).update(label_counts=[-1, 33, 0, 0]),
    "negative rows": lambda index: group(index).update(rows=-32),
    "more rows": lambda index: group(index).update(rows=group(index)["rows"] + 1),
    "another ordinal": lambda index: group(index).update(ordinal=9),
    "a length beyond memory": lambda index: group(index).update(length=10**15),
    "a length beyond the object": lambda index: group(index).update(length=10**6),
    "a row group over another": lambda index: group(index).update(start=group(index)["start"] + 1),
    "an object that is not there": lambda index: group(index).update(object=3),
    "a negative seed": lambda index: index.update(seed=-1),
    "a sum that is none": lambda index: group(index).update(sha256="x"),
    "an unknown field": lambda index: index.update(more=1),
    "an unknown split": lambda index: index["splits"].update(dev=index["splits"]["test"]),
    "lanes": lambda index: index["splits"]["train"].update(lanes=64),
}


@pytest.mark.parametrize("schema", [FIRST, SCHEMA], ids=["1", "2"])
@pytest.mark.parametrize("edit", UNSOUND.values(), ids=UNSOUND)
def test_what_does_not_add_up_is_refused_without_the_digest_too(
    edit: Callable[[Document], object], schema: str, store: FolderStore
) -> None:
    with pytest.raises(WrongRequest, match="is damaged or was edited"):
        read_index(edited(store, edit, schema))


RAW = {
    "deep": b"[" * 100_000,
    "deep in a field": b'{"labels":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
    "5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "half a character": b'{"labels": ["\\ud800", "b"]}',
    "not UTF-8": b'{"labels": ["\xff"]}',
    "a key twice": b'{"seed": 1, "seed": 2}',
    "NaN": b'{"seed": NaN}',
    "no object": b"[1]",
    "nothing": b"",
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_what_is_no_document_within_bounds_ends_in_a_sentence(
    raw: bytes, store: FolderStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write("index.json", raw)
    words = [f"data.url={store.url}", f"run.output_url={tmp_path / 'runs'}"]
    assert main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert "index.json is damaged or was edited (" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("character", ["\0", "\n", "\u2028"])
def test_a_label_with_a_control_character_is_refused_where_it_is_prepared_and_read(
    character: str, store: FolderStore, tmp_path: Path
) -> None:
    name = f"ca{character}lm"
    with pytest.raises(WrongRequest, match="a label has a control character"):
        read_index(edited(store, lambda index: index["labels"].__setitem__(0, name)))
    source = tmp_path / "posts.csv"
    source.write_text(
        "text,label\n" + "".join(f'post {n},"{name if n % 2 else "glee"}"\n' for n in range(40)),
        encoding="utf-8",
        newline="",
    )
    if character != "\0":  # which the reader of CSV refuses by itself
        with pytest.raises(WrongRequest, match="holds a control character"):
            prepare(str(source), str(tmp_path / "out"))


def test_an_unknown_feature_is_refused_by_name_and_version(store: FolderStore) -> None:
    assert "soft-labels" not in FEATURES

    def later(index: Document) -> None:
        index.update(requires=["soft-labels"], a_later_field=1)
        index["versions"]["emotion_train"] = "0.9.1"

    with pytest.raises(WrongRequest, match=r"requires 'soft-labels'.*pip install 'emotion-train>=0\.9\.1'"):
        read_index(edited(store, later))


def test_the_first_schema_keeps_its_bytes(store: FolderStore) -> None:
    index = read_index(edited(store, lambda index: None, FIRST))
    assert not {"digest", "requires"} & json.loads(index.to_bytes()).keys()
    assert Index.model_validate_json(index.to_bytes()) == index


# --- compared with the posts ---


def moved(index: Document) -> None:
    """One post of the first label becomes one of the second: in a row group and in its split, so
    that all sums are right.
    """
    shift(group(index)["label_counts"])
    shift(index["splits"]["train"]["label_counts"])


@pytest.mark.parametrize("schema", [FIRST, SCHEMA], ids=["1", "2"])
def test_label_counts_are_compared_with_the_posts_when_they_are_first_read(
    schema: str, store: FolderStore
) -> None:
    split = read_index(edited(store, moved, schema)).split("train")
    with RowGroupReader(store, split) as reader:
        for number in range(1, len(split.row_groups)):
            assert len(reader.rows(number).ids) == split.row_groups[number].rows
        with pytest.raises(WrongRequest, match=r"the index says \d+ posts of label 0, and there are \d+"):
            reader.rows(0)


def test_rows_are_compared_before_anything_is_unpacked(store: FolderStore) -> None:
    def one_more(index: Document) -> None:
        split = index["splits"]["train"]
        group(index)["rows"] += 1
        group(index)["label_counts"][0] += 1
        split["rows"] += 1
        split["label_counts"][0] += 1

    split = read_index(edited(store, one_more)).split("train")
    with (
        RowGroupReader(store, split) as reader,
        pytest.raises(WrongRequest, match="the index says 28 posts, and there are 27"),
    ):
        reader.rows(0)


# --- data.limit ---


@pytest.mark.parametrize("rows", [4, 5, 17, 40, 107])
def test_a_limited_split_has_so_many_posts_in_the_shares_of_its_labels(store: FolderStore, rows: int) -> None:
    index = read_index(store)
    kept, train = limited(index, rows).split("train"), index.split("train")
    assert kept.rows == sum(kept.label_counts) == sum(kept.row_counts) == rows
    for have, of in zip(kept.label_counts, train.label_counts, strict=True):
        assert 1 <= have <= of
        assert abs(have - rows * of / train.rows) <= 1 + (rows < 17)
    assert kept.lanes == len(kept.row_groups) <= len(train.row_groups)
    assert limited(index, rows).sha256() == index.sha256()
    assert limited(index, rows).whole is index
    assert limited(index, rows) == limited(read_index(store), rows)


def test_the_posts_of_a_limited_split_are_the_first_of_each_label(store: FolderStore) -> None:
    index = read_index(store)
    few, whole = limited(index, 20).split("train"), index.split("train")

    def posts(split: Any) -> list[tuple[str, str | None, Target | None, float, str]]:
        with RowGroupReader(store, split) as reader:
            return [
                post
                for group in range(len(split.row_groups))
                for post in zip(*reader.rows(group), strict=True)
            ]

    left, expected = list(few.label_counts), []
    for post in posts(whole):
        assert post[2] is not None
        label = largest(post[2])
        if left[label]:
            left[label] -= 1
            expected.append(post)
    assert posts(few) == expected
    assert len(expected) == 20


def test_a_limit_that_leaves_a_label_without_a_post_is_refused_and_a_large_one_changes_nothing(
    store: FolderStore,
) -> None:
    index = read_index(store)
    with pytest.raises(WrongRequest, match=r"data\.limit is 3 and the data set has 4 labels.*give 4 or more"):
        limited(index, 3)
    assert limited(index, None) is index
    assert limited(index, 10**6).splits == index.splits
    held_out = limited(index, 30).splits["test"]
    assert held_out.rows == 30
