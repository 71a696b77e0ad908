"""Labels that a person corrected, on their way into a data set: which posts they change, what is
told of the others, and that no post changes its split.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import pytest

from emotion_train import cli
from emotion_train.data.index import Index
from emotion_train.data.targets import Target
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.floors import posts
from emotion_train.preparation.corrections import read_corrections, spelled_labels
from emotion_train.preparation.steps import PrepareResult, prepare
from emotion_train.storage.open import open_store

LABELS = ("anger", "fear", "joy")
HEADS = ("id", "text", "label", "suggested", "probability", "corrected")


def source(folder: Path, rows: int = 90) -> Path:
    """Posts of three labels; the tenth begins with a sign that a spreadsheet would obey."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "posts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "text", "label"])
        for row in range(rows):
            writer.writerow([f"k{row}", f"{'=' if row == 10 else ''}post number {row}", LABELS[row % 3]])
    return folder / "posts.csv"


def corrections(
    folder: Path, *rows: tuple[str, ...], heads: tuple[str, ...] = HEADS, comma: str = ","
) -> Path:
    path = folder / "mislabelled.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=comma).writerows([heads, *rows])
    return path


def row(number: int, label: str, corrected: str, text: str | None = None) -> tuple[str, ...]:
    return (f"k{number}", text or f"post number {number}", label, "", "0.9", corrected)


def made(tmp_path: Path, name: str, path: Path | None = None, **options: Any) -> PrepareResult:
    given = {"id_column": "key", **options}
    corrected = {} if path is None else {"corrections": str(path)}
    return prepare(str(source(tmp_path / "source")), str(tmp_path / name), **given, **corrected)


def by_id(result: PrepareResult) -> dict[str, tuple[str, Target]]:
    """Split and target of each post."""
    store, index = open_store(result.url), result.index
    return {
        key: (split, target) for split in index.splits for key, _, target in posts(store, index.split(split))
    }


def names(index: Index, target: Target) -> list[str]:
    return [index.labels[label] for label, _ in target]


def test_corrected_posts_get_their_label_and_keep_their_split(tmp_path: Path) -> None:
    path = corrections(
        tmp_path,
        row(0, "anger", "fear"),
        row(4, "fear", "joy", "POST  number 4"),  # found as equal texts are
        row(10, "fear", "anger", "'=post number 10"),  # as a spreadsheet was kept from computing it
        row(7, "fear", ""),  # nobody wrote anything
    )
    before, after = made(tmp_path, "before"), made(tmp_path, "after", path)
    assert after.corrected is not None
    assert (after.corrected.applied, after.corrected.unmatched) == (3, [])
    assert after.corrected.lines() == ["corrections 3 labels corrected by mislabelled.csv; 1 left blank"]
    plain, corrected = by_id(before), by_id(after)
    assert {key: split for key, (split, _) in plain.items()} == {
        key: split for key, (split, _) in corrected.items()
    }
    changed = {key for key in plain if plain[key][1] != corrected[key][1]}
    assert {key: names(after.index, corrected[key][1]) for key in changed} == {
        "k0": ["fear"],
        "k4": ["joy"],
        "k10": ["anger"],
    }
    assert after.index.source["corrections_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert after.index.source["corrections_applied"] == 3
    assert "corrections_sha256" not in before.index.source


def test_what_fits_no_post_is_told_with_its_row(tmp_path: Path) -> None:
    path = corrections(
        tmp_path,
        row(0, "anger", "fear"),
        row(1, "joy", "anger"),  # is fear
        row(2, "anger", "joy"),  # is joy already
        row(500, "anger", "joy"),
        row(0, "anger", "fear", "post number O"),
    )
    found = made(tmp_path, "data", path).corrected
    assert found is not None
    assert (found.applied, found.already, found.other, found.unmatched) == (1, 1, [3], [5, 6])
    assert found.lines() == [
        "corrections 1 label corrected by mislabelled.csv; 1 row has its correction already; 1 has"
        " another label now (row 3); 2 fit no post (rows 5, 6)"
    ]


def test_without_texts_posts_are_found_by_id(tmp_path: Path) -> None:
    path = corrections(
        tmp_path,
        ("anger", "fear", "k0"),
        ("fear", "joy", "k999"),
        heads=("label", "corrected", "id"),
        comma=";",
    )
    result = made(tmp_path, "data", path)
    assert result.corrected is not None
    assert (result.corrected.applied, result.corrected.unmatched) == (1, [3])
    assert names(result.index, by_id(result)["k0"][1]) == ["fear"]


def test_the_same_corrections_give_the_same_bytes(tmp_path: Path) -> None:
    path = corrections(tmp_path, row(0, "anger", "fear"))
    first = made(tmp_path, "one", path)
    assert made(tmp_path, "two", path).index == first.index
    again = made(tmp_path, "one", path)
    assert (again.created, again.index) == (False, first.index)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [row(0, "anger", "fear"), row(0, "anger", "joy", "Post number 0")],
            r"'Post number 0' twice and differently: anger to fear in row 2, anger to joy in row 3",
        ),
        ([row(0, "anger", "fera")], r"to 'fera' in row 2, which is no label .* anger, fear, joy\."),
    ],
)
def test_contradictions_and_unknown_labels_are_refused(
    tmp_path: Path, rows: list[tuple[str, ...]], says: str
) -> None:
    with pytest.raises(WrongRequest, match=says):
        made(tmp_path, "data", corrections(tmp_path, *rows))
    assert not (tmp_path / "data" / "index.json").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text,label\na,joy\n", "'text', 'label'; it needs label, corrected"),
        (b"label,corrected\njoy,fear\n", "and text or id"),
        (b"", "none; it needs"),
        (b"text,label,corrected\n\xff,joy,fear\n", "not UTF-8"),
        (b'text,label,corrected\n"a" b,joy,fear\n', "not a CSV"),
    ],
)
def test_another_file_is_refused_in_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(WrongRequest, match=says):
        read_corrections(path)
    with pytest.raises(WrongRequest, match="cannot be read"):
        read_corrections(tmp_path / "nowhere.csv")


def several(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "posts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "text", "label"])
        for number in range(90):
            labels = [LABELS[number % 3], *([LABELS[(number + 1) % 3]] if number % 5 == 0 else [])]
            writer.writerow([f"k{number}", f"post number {number}", "|".join(labels)])
    return folder / "posts.csv"


def test_several_labels_are_corrected_as_sets(tmp_path: Path) -> None:
    path = corrections(
        tmp_path,
        row(0, "anger|fear", "fear"),
        row(5, "anger|joy", "anger|joy|fear"),  # in any order
        row(1, "fear", '["joy", "anger"]'),
        row(3, "anger", "[]"),
    )
    given = {"id_column": "key", "targets": "several", "corrections": str(path)}
    with pytest.raises(WrongRequest, match=r"all labels from 'post number 3' in row 5; type --allow-none"):
        prepare(str(several(tmp_path / "source")), str(tmp_path / "data"), **given)
    result = prepare(str(several(tmp_path / "source")), str(tmp_path / "data"), allow_none=True, **given)
    found = by_id(result)
    assert result.corrected is not None
    assert result.corrected.applied == 4
    assert {key: names(result.index, found[key][1]) for key in ("k0", "k1", "k3", "k5")} == {
        "k0": ["fear"],
        "k1": ["anger", "joy"],
        "k3": [],
        "k5": ["anger", "fear", "joy"],
    }


def test_labels_in_a_cell_are_read_as_they_are_written() -> None:
    assert spelled_labels(["joy"], False) == "joy"
    assert spelled_labels(["joy", "anger"], True) == "joy|anger"
    assert spelled_labels(["a|b", "c"], True) == '["a|b", "c"]'
    assert spelled_labels([], True) == "[]"


def test_the_verb_tells_of_corrections_and_refuses_them_for_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corrections(tmp_path, row(0, "anger", "fear"))
    words = [str(source(tmp_path / "source")), str(tmp_path / "data"), "--corrections", str(path)]
    assert cli.main(["prepare", *words]) == 0
    assert "corrections 1 label corrected by mislabelled.csv" in capsys.readouterr().out
    assert cli.main(["prepare", *words, "--targets", "shares"]) == 2
    assert "--corrections is for one label a post or several" in capsys.readouterr().err
