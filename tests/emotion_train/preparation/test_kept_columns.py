"""Columns that come along with the posts: through cleaning, choosing among equal texts and
shuffling, and back by id; a reader that does not ask for them sees nothing of them.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from emotion_train.data.index import read_index, require_slices
from emotion_train.data.reader import RowGroupReader, kept_values, texts_of
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.floors import posts
from emotion_train.preparation.steps import prepare
from emotion_train.storage.open import open_store

LABELS = ("anger", "joy")


def source(folder: Path, split: str, rows: int, lang: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "text", "label", lang, "source"])
        for row in range(rows):
            value = ("en", "de", "", " fr\t")[row % 4]
            writer.writerow([f"{split}-{row}", f"{split} {row}", LABELS[row % 2], value, f"source {row % 3}"])


def test_kept_columns_come_back_by_id(tmp_path: Path) -> None:
    """Also one called as a column of the data set's own, and spelled otherwise in another file."""
    source(tmp_path / "source", "train", 40, "Lang")
    source(tmp_path / "source", "validation", 20, "lang")
    given = {"id_column": "key", "rows_per_group": 8}
    url = str(tmp_path / "data")
    index = prepare(str(tmp_path / "source"), url, keep_columns=("lang", "source"), **given).index
    assert index.kept_columns == ("lang", "source")
    assert index.requires == ()
    store = open_store(url)
    split = read_index(store).split("validation")
    found = kept_values(store, split, ["lang", "source"])
    assert found["lang"] == {f"validation-{row}": ("en", "de", "", "fr")[row % 4] for row in range(20)}
    assert found["source"] == {f"validation-{row}": f"source {row % 3}" for row in range(20)}
    with RowGroupReader(store, split) as reader:
        rows = reader.rows(0)
        assert set(rows.kept) == {()}
        assert set(rows.sources) == {""}  # the column of added posts is another one
    plain = prepare(str(tmp_path / "source"), str(tmp_path / "plain"), **given)
    both = [
        list(posts(open_store(one), read_index(open_store(one)).split("train"))) for one in (url, plain.url)
    ]
    assert both[0] == both[1]
    assert plain.index.kept_columns == ()
    assert texts_of(store, split, {"validation-3"}) == {"validation-3": "validation 3"}
    require_slices(index, ["lang"])
    with pytest.raises(WrongRequest, match=r"'country', which is no kept column .* kept lang, source\)"):
        require_slices(index, ["country"])
    with pytest.raises(WrongRequest, match=r"it kept none"):
        require_slices(plain.index, ["lang"])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("country",), r"has no column 'country'.* Type --keep-columns with one"),
        (("lang", "LANG"), "give each column once"),
        (("a,b",), "without a comma"),
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    source(tmp_path / "source", "train", 40, "lang")
    source(tmp_path / "source", "validation", 20, "lang")
    with pytest.raises(WrongRequest, match=says):
        prepare(str(tmp_path / "source"), str(tmp_path / "data"), keep_columns=names)


def test_joined_answers_keep_the_values_of_their_first_row(tmp_path: Path) -> None:
    with (tmp_path / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "text", "label", "who", "lang"])
        for row in range(40):
            for who in "ab":
                writer.writerow([f"k{row}", f"post {row}", LABELS[row % 2], who, f"{who}{row % 2}"])
    index = prepare(
        str(tmp_path / "answers.csv"),
        str(tmp_path / "data"),
        id_column="key",
        targets="several",
        annotations_by="who",
        keep_columns=("lang",),
    ).index
    found = kept_values(open_store(str(tmp_path / "data")), index.split("train"), ["lang"])["lang"]
    assert set(found.values()) == {"a0", "a1"}
