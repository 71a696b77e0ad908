"""Labels that a person would doubt get a line that says which, how many posts, and what to type."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.cli import main
from emotion_train.data.index import read_index
from emotion_train.data.label_doubts import alike, doubts
from emotion_train.data.labels import trimmed
from emotion_train.storage.open import open_store
from tests.emotion_train.test_prepare import some_rows, write_csv


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Joy", "joy"),
        ("\u00e9mu", "e\u0301mu"),
        ("STRASSE", "straße"),
        ("ｊｏｙ", "joy"),
        ("1", "1.0"),
        ("1", "01"),
        ("1e0", "+1"),
        ("100", "1e2"),
        ("-0", "0.0"),
        ("0.50", ".5"),
        ("१", "1"),
        ("²", "2"),
        ("'1'", "1"),
        ("9" * 190, "0" + "9" * 190),
        ('"joy"', "joy"),
        ("“joy”", "'joy'"),
        ("«joy»", "joy"),
        ("joy.", "joy"),
        ("joy!!", "joy"),
        ("'joy.'", "joy"),
        ("喜び。", "喜び"),
        ("very sad", "very  sad"),
        ("very sad", "very\u00a0sad"),
        ("very sad", "verysad"),
        ("jo\u200by", "joy"),
        ("jo\u00ady", "joy"),
        ("j\u043ey", "joy"),
        ("❤\ufe0f", "❤"),
        ("joy\u3164", "joy"),
    ],
)
def test_labels_that_only_a_machine_tells_apart_are_alike(one: str, other: str) -> None:
    assert alike([one, "fear", other]) == [sorted([one, other])]
    (line,) = doubts([one, "fear", other], [3, 3, 3], given=True)
    shown = line.removeprefix("alike       ").split(" are 2 labels")[0].split(" and ")
    assert len(set(shown)) == 2  # a person sees the difference
    assert line.isprintable()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("joy", "toy"),
        ("1", "10"),
        ("1", "-1"),
        ("0.1", "1"),
        ("?", "!"),
        ("émotion", "emotion"),
        ("😀", "😃"),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e007f", "🏴\U000e0067\U000e0062\U000e0073\U000e007f"),
        ("1" * 190, "1" * 189 + "2"),
    ],
)
def test_labels_that_a_person_tells_apart_are_not_alike(one: str, other: str) -> None:
    assert alike([one, other]) == []


SOME_LABELS = (st.text(max_size=12) | st.text("01-.eE+'\" ²१\u200b", max_size=6)).map(trimmed).filter(bool)


@given(st.lists(SOME_LABELS, unique=True, max_size=8))
def test_any_labels_get_lines_and_stand_in_one_group_at_most(labels: list[str]) -> None:
    lines = doubts(labels, [1] * len(labels), given=False)
    assert all("\n" not in line for line in lines)
    grouped = [name for group in alike(labels) for name in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= set(labels)


@given(st.integers(-(10**30), 10**30), st.sampled_from(["{}.0", "{}.", "{}e0", "'{}'", " {}", "{}.000"]))
def test_equal_numbers_are_alike_and_others_are_not(value: int, form: str) -> None:
    spelled = form.format(value)
    assert alike([str(value), spelled])
    assert not alike([str(value + 1), spelled])


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


def test_many_that_are_alike_are_cut_short() -> None:
    (line,) = doubts([f"{'0' * i}1" for i in range(9)], [1] * 9, given=True)
    assert line.startswith("alike       '00000000", 0)
    assert "and 4 more are 9 labels" in line


@pytest.mark.parametrize(
    "word", ["NA", "N/A", "nan", "NaN", "null", "None", "#N/A", "<NA>", "-", "?", "NULL"]
)
def test_a_word_for_missing_is_said_with_its_posts_and_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    names = ("anger", "very good", word)
    rows = [(text, names[at % 3]) for at, (text, _) in enumerate(some_rows(60))]
    source = write_csv(tmp_path / "posts.csv", rows)
    assert main(["prepare", str(source), str(tmp_path / "one")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert f"{word!r} is a label of 20 posts" in line
    typed = shlex.split(line.split("prepare it elsewhere with ")[1])
    assert main(["prepare", str(source), str(tmp_path / "two"), *typed]) == 0
    out = capsys.readouterr().out
    assert "\nmissing" not in out
    assert read_index(open_store(str(tmp_path / "two"))).labels == ("anger", "very good")
    assert "unknown label  20  posts.csv:4" in out


def test_minus_one_is_said_to_mark_posts_without_a_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(text, at % 12 - 1) for at, (text, _) in enumerate(some_rows(240))]
    source = write_csv(tmp_path / "posts.csv", rows)
    assert main(["prepare", str(source), str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    assert read_index(open_store(str(tmp_path / "one"))).labels == tuple(map(str, range(-1, 11)))
    (line,) = [line for line in out.splitlines() if line.startswith("unlabelled")]
    assert "'-1' is a label of 20 posts" in line
    typed = shlex.split(line.split("prepare it elsewhere with ")[1])
    assert main(["prepare", str(source), str(tmp_path / "two"), *typed]) == 0
    assert read_index(open_store(str(tmp_path / "two"))).labels == tuple(map(str, range(11)))
    named = ["--labels", ",".join(f"l{i}" for i in range(11))]
    capsys.readouterr()
    assert main(["prepare", str(source), str(tmp_path / "three"), *named]) == 2
    assert "'-1' 20 times, which marks posts without a label" in capsys.readouterr().err


def test_what_is_left_when_the_doubtful_are_gone_must_still_be_labels() -> None:
    assert doubts(["joy", "nan"], [9, 1], given=False)[0].endswith(
        "that there is none; if so, mend the source"
    )
    long = [f"label {i:03}" for i in range(100)]
    for names in (["a,b", "c"], long):
        assert "--labels-file FILE" in doubts([*names, "nan"], [1] * (len(names) + 1), given=False)[0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            ("0", "1", "2"),
            "the labels are numbers (0, 1, 2); if they have names, prepare it elsewhere with --labels",
        ),
        (("0.0", "1.0"), "prepare it elsewhere with --labels"),
        (("-1", "0", "1"), "prepare it elsewhere with --labels"),
        (("1", "2", "3", "4", "5", "6"), "(1, 2, … 6); if they have names, write them into the source"),
        (("-1.5", "0.5"), "write them into the source"),
        (("0", "1", "nan"), "the labels are numbers (0, 1)"),
        (("0", "1", "joy"), ""),
        (("nan", "None"), ""),
        (("²", "३"), ""),
    ],
)
def test_numbers_without_names_get_a_hint(labels: tuple[str, ...], words: str) -> None:
    lines = [line for line in doubts(labels, [1] * len(labels), given=False) if line.startswith("numbers")]
    assert len(lines) == bool(words)
    assert words in "".join(lines)
    assert not [line for line in doubts(labels, [1] * len(labels), given=True) if "alike" not in line]
