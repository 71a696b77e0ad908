"""Every value of the label column is read as the label that it means, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emotion_train.cli import main
from emotion_train.data.preparation import prepare
from emotion_train.storage.open import open_store
from tests.emotion_train.test_prepare import LABELS, all_posts, contents, refusal, some_rows, write_csv


def test_labels_that_a_person_would_take_for_one_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("Joy", "joy", "\u00e9mu", "e\u0301mu", "fear")
    rows = [(text, names[at % 5]) for at, (text, _) in enumerate(some_rows(60))]
    assert main(["prepare", str(write_csv(tmp_path / "a.csv", rows)), str(tmp_path / "my out")]) == 0
    out = capsys.readouterr().out
    assert "'Joy' and 'joy' are 2 labels" in out
    assert r"'e\u0301mu' and " + "'\u00e9mu' are 2 labels" in out
    assert out.count("alike") == 2
    assert f"'data.url={tmp_path / 'my out'}'" in out  # to be pasted into a shell


def test_numbers_and_given_labels_choose_the_ids(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", [(f"p{i}", i % 2) for i in range(20)])
    assert prepare(source, str(tmp_path / "a")).index.labels == ("0", "1")
    assert prepare(source, str(tmp_path / "b"), labels=("zeal", "awe")).index.labels == ("zeal", "awe")
    assert {
        label
        for key, _, label in all_posts(open_store(str(tmp_path / "b")))
        if int(key.split(":")[1]) % 2 == 0
    } == {"zeal"}
    (tmp_path / "labels.txt").write_text("zeal\nawe\n\n")
    assert (
        main(["prepare", str(source), str(tmp_path / "c"), "--labels-file", str(tmp_path / "labels.txt")])
        == 0
    )
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("several", ["joy,anger", "anger ; joy", "joy|anger", "['joy' 'anger']"])
@pytest.mark.parametrize("first", [True, False])
def test_several_labels_in_a_cell_are_no_class(tmp_path: Path, several: str, first: bool) -> None:
    good: list[Any] = [*some_rows(30), ("mixed", "mixed, up"), ("mixed too", "mixed, up")]
    bad = [("both", several), ("both again", several)]
    source = write_csv(tmp_path / "posts.csv", [*bad, *good] if first else [*good, *bad])
    text = refusal(source, tmp_path / "out")
    assert "2 of 34 posts cannot be used" in text
    assert "several labels  2  posts.csv:" + ("2, posts.csv:3" if first else "34, posts.csv:35") in text
    result = prepare(source, str(tmp_path / "out"), multi_label="drop")
    # its parts are no labels, so it is one
    assert result.index.labels == tuple(sorted([*LABELS, "mixed, up"]))
    assert result.index.source["several_labels"] == 2
    assert sorted((text, label) for _, text, label in all_posts(open_store(str(tmp_path / "out")))) == sorted(
        good
    )


def test_numbers_with_several_labels_among_them_stay_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = [(f"p{i}", str(i % 12)) for i in range(120)]
    pairs = [(f"q{i}", f"{i % 12},{(i + 1 + i // 12) % 12}") for i in range(120)]
    source = write_csv(tmp_path / "posts.csv", [*pairs, *rows])
    index = prepare(source, str(tmp_path / "out"), multi_label="drop").index
    assert index.labels == tuple(map(str, range(12)))
    assert index.source["several_labels"] == 120
    assert not index.source.get("repeated")


def test_a_post_with_several_labels_takes_no_text_from_another(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", [("post", "joy,anger"), ("post", "joy"), *some_rows(30)])
    prepare(source, str(tmp_path / "out"), multi_label="drop")
    assert ("posts.csv:3", "post", "joy") in all_posts(open_store(str(tmp_path / "out")))


def test_more_combinations_than_labels_may_be_are_dropped(tmp_path: Path) -> None:
    names = [f"l{i}" for i in range(60)]
    rows = [(f"{a} {b}", f"{a},{b}") for a in names for b in names if a < b]
    rows += [(f"{name} {i}", name) for name in names for i in range(3)]
    source = write_csv(tmp_path / "posts.csv", rows)
    assert prepare(source, str(tmp_path / "out"), multi_label="drop").index.labels == tuple(sorted(names))


def test_an_object_is_no_label(tmp_path: Path) -> None:
    source = tmp_path / "posts.jsonl"
    good = [json.dumps({"text": f"good {i}", "label": "ab"[i % 2]}) for i in range(20)]
    source.write_text(
        "\n".join([*good, '{"text": "x", "label": {"name": "a"}}', '{"text": "y", "label": [{"name": "a"}]}'])
    )
    assert "label that is an object  2  posts.jsonl:21, posts.jsonl:22" in refusal(source, tmp_path / "out")
    assert prepare(source, str(tmp_path / "out"), on_bad="drop").index.labels == ("a", "b")
    cells = write_csv(tmp_path / "posts.csv", [*some_rows(20), ("x", '{"joy": 1}')])
    assert "label that is an object  1  posts.csv:22" in refusal(cells, tmp_path / "no")


def test_a_column_of_free_text_is_no_label(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", [(f"p{i}", f"q{i}") for i in range(1100)])
    assert "more than 1,000 different values" in refusal(source, tmp_path / "out")
