"""Every value of the label column is read as the label that it means, or refused."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emotion_train.cli import main
from emotion_train.data.cleaning import REFUSED, Cleaner, Findings, Rules
from emotion_train.data.index import read_index
from emotion_train.data.labels import MAX_LABEL_CHARS, LabelNames, number, trimmed
from emotion_train.preparation.steps import prepare
from emotion_train.sources.posts import SEVERAL, Batch
from emotion_train.storage.open import open_store
from tests.emotion_train.test_prepare import LABELS, all_posts, contents, refusal, some_rows, write_csv


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


# What a value means, by itself

NONE, UNKNOWN, SEVERAL_, OBJECT, TOO_LONG = -1, -2, -3, -4, -5
STARS = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("given", "of_source", "value", "code"),
    [
        (("zeal", "awe"), None, "1", 1),
        (("zeal", "awe"), None, "1.0", 1),
        (("zeal", "awe"), None, "01", 1),
        (("zeal", "awe"), None, "0e5", 0),
        (("zeal", "awe"), None, "-0", 0),
        (("zeal", "awe"), None, "2", UNKNOWN),
        (("zeal", "awe"), None, "-1", UNKNOWN),
        (("zeal", "awe"), None, "0.5", UNKNOWN),
        (("zeal", "awe"), None, "[1]", 1),
        (("zeal", "awe"), None, "0,1", SEVERAL_),
        # a name that is a number makes numbers names: no star is counted as another
        (STARS, None, "1", 0),
        (STARS, None, "1.0", 0),
        (STARS, None, "5.00", 4),
        (STARS, None, "0", UNKNOWN),
        (STARS, None, "6", UNKNOWN),
        (("1", "0"), None, "0", 1),
        (("joy", "7"), None, "0", UNKNOWN),
        (("joy", "7"), None, "7.0", 1),
        (("1", "1.0", "x"), None, "1.0", 1),
        (("1", "1.0", "x"), None, "01", UNKNOWN),
        (("1", "1.0", "x"), None, "2", UNKNOWN),
        # names of the source are no positions: its readers have made names of ids
        (None, ("0", "1", "10", "11", "2"), "10", 2),
        (None, ("0", "1", "10", "11", "2"), "2", 4),
        (None, ("0", "1", "10", "11", "2"), "3", UNKNOWN),
        (None, ("anger", "joy"), "1", UNKNOWN),
        (None, ("anger", "joy"), "joy", 1),
        (("joy", "anger"), ("anger", "joy"), "joy", 0),
        (("joy", "anger"), ("anger", "joy", "fear"), "fear", UNKNOWN),
        # names of earlier data sets that would be trimmed today stay apart
        (("joy", "joy\u200b"), None, "joy", 0),
        (("joy", "joy\u200b"), None, "joy\u200b", 1),
        (("joy ", "anger"), None, "joy", 0),
        (("x" * 300, "joy"), None, "x" * 300, 0),
    ],
)
def test_ids_are_positions_among_given_names_unless_numbers_are_names(
    given: tuple[str, ...] | None, of_source: tuple[str, ...] | None, value: str, code: int
) -> None:
    names = LabelNames(given, of_source)
    assert names.code(value) == code
    assert names.in_order() == (given or of_source)
    assert names.fixed


@pytest.mark.parametrize("given", [None, ("zeal", "awe"), STARS])
@pytest.mark.parametrize(
    "value",
    [
        "9" * 5000,
        "1" + "0" * 400,
        "1e999",
        "-1e-999",
        "1e99999999999999999999",
        "²",
        "१",
        "٣",
        "①",
        "Ⅳ",
        "1_000",
        "0x1",
        "inf",
        "NaN",
        "." * 150,
        "[" * 90 + "1" + "]" * 90,
        "[" * 5000 + "]" * 5000,
        "['" * 40 + "awe" + "']" * 40,
        "{" * 5000,
        "a," * 5000,
        "\ud800",
        "\U0010ffff",
        "\x00",
        SEVERAL,
        SEVERAL * 5000,
        "[1 2",
        "[,]",
        "[]",
        "[[]]",
    ],
)
def test_no_value_ends_in_a_traceback(given: tuple[str, ...] | None, value: str) -> None:
    names = LabelNames(given, None)
    code = names.code(value)
    assert code == names.code(value)
    assert TOO_LONG <= code < max(1, len(given or ()))
    assert len(names.settle()) == len(names.codes)
    assert len(names.in_order()) == len(names.codes)
    assert "\n" not in names.advice(value)


def test_a_label_has_a_greatest_length() -> None:
    names = LabelNames(None, None)
    assert names.code("x" * MAX_LABEL_CHARS) == 0
    assert names.code(f"  {'y' * MAX_LABEL_CHARS}\u200b") == 1
    assert names.code("x" * (MAX_LABEL_CHARS + 1)) == TOO_LONG
    assert names.code("free text, with commas " * 20) == TOO_LONG
    assert names.code(SEVERAL.join("abc" * 100)) == SEVERAL_
    assert names.code(str([f"label {i}" for i in range(40)])) == SEVERAL_
    many = tuple(f"label {i}" for i in range(40))
    assert LabelNames(many, None).code(",".join(many)) == SEVERAL_
    assert LabelNames(many, None).code(",".join([*many, "other"])) == TOO_LONG


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "-1", "-10", "0"], ["-10", "-1", "0", "9", "10"]),
        (["10.0", "2.0", "1.5", "-0.5"], ["-0.5", "1.5", "2.0", "10.0"]),
        (["1e3", "999", "01", "1"], ["01", "1", "999", "1e3"]),
        (["9" * 190, "1" + "0" * 190, "2"], ["2", "9" * 190, "1" + "0" * 190]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["²", "1"], ["1", "²"]),
    ],
)
def test_numbers_are_in_the_order_of_numbers_where_all_are(names: list[str], order: list[str]) -> None:
    labels = LabelNames(None, None)
    for name in names:
        labels.code(name)
    assert labels.in_order() == tuple(order)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_a_number_has_the_value_that_python_reads(value: float) -> None:
    read = number(repr(value))
    assert read is not None
    assert type(value)(read) == value


INVISIBLE = [chr(code) for code in (0xFEFF, 0x200B, 0x200C, 0x200D, 0x2060, 0xAD, 0x200E, 0x200F, 0x202A)]
INVISIBLE += [
    chr(code) for code in (0x202E, 0x2066, 0x2069, 0x61C, 0x180E, 0x3164, 0x2800, 0, 0x7F, 0x1B, 0x86)
]
SPACES = [" ", "\t", "\n", "\u00a0", "\u2003", "\u3000", "\u202f", "\u2028", "\u2029", "\u1680", "\x0b"]


def cleaned(values: list[str], labels: LabelNames) -> tuple[Any, Findings]:
    """Clean rows and findings of posts with these labels, all with a good text."""
    findings = Findings(["posts"])
    rows = np.arange(1, len(values) + 1)
    texts = pa.array([f"post {i}".encode() for i in rows], pa.binary())
    raw = pa.array([value.encode("utf-8", "surrogatepass") for value in values], pa.binary())
    batch = Batch(0, rows, texts, raw, None, None)
    return Cleaner(Rules(max_chars=100, seed=0), labels, findings).clean(batch, "train"), findings


@pytest.mark.parametrize("around", [*INVISIBLE, *SPACES])
def test_what_nobody_sees_around_a_label_is_cut_off_and_counted(around: str) -> None:
    labels = LabelNames(None, None)
    values = ["joy", f"{around}joy", f"joy{around}", f"{around * 3}joy {around}", "very joy", around, ""]
    rows, findings = cleaned(values, labels)
    assert rows.column("label").to_pylist() == [0, 0, 0, 0, 1]
    kind = "label_spaces" if around in SPACES else "label_invisible"
    assert findings.counts == {kind: 3, "no_label": 2}


def test_the_summary_says_which_were_spaces_and_which_nobody_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("joy", "\ufeffjoy", "joy\u200b", " joy", "anger", "anger\u00ad")
    rows = [(text, names[at % 6]) for at, (text, _) in enumerate(some_rows(60))]
    assert main(["prepare", str(write_csv(tmp_path / "posts.csv", rows)), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n  spaces around the label, cut off +10  posts.csv:5", out)
    assert re.search(r"\n  invisible characters around the label, cut off +30  posts.csv:3", out)
    assert read_index(open_store(str(tmp_path / "out"))).labels == ("anger", "joy")


def test_marks_with_ink_are_not_cut_off() -> None:
    england, scotland = (
        "🏴\U000e0067\U000e0062" + end + "\U000e007f" for end in ("\U000e0065", "\U000e0073")
    )
    for name in (england, scotland, "❤\ufe0f", "joy!", "\u06ddx", "e\u0301", "👨\u200d👩"):
        assert trimmed(name) == name
    assert trimmed(f"a{SEVERAL}b") == f"a{SEVERAL}b"
    assert trimmed(f"{SEVERAL}a") == f"{SEVERAL}a"


ends = st.text(st.sampled_from([*INVISIBLE, *SPACES]), max_size=3)
bare = (
    st.text(max_size=12)
    | st.text("01.-+eE²१_", max_size=6)
    | st.sampled_from(
        [
            "joy",
            "Joy",
            "nan",
            "[joy]",
            "joy,anger",
            "['joy' 'anger']",
            "{1}",
            f"a{SEVERAL}b",
            "x" * 201,
            "-1",
            "[[1]]",
        ]
    )
)
values = st.builds("{}{}{}".format, ends, bare, ends)
name_lists = st.none() | st.lists(
    bare.filter(lambda name: trimmed(name) == name != ""), min_size=2, unique=True
).map(tuple)


@given(st.lists(values, max_size=30), name_lists, name_lists)
@example(["1", "1.0", "0"], ("1", "2"), None)
def test_each_post_is_kept_under_its_label_or_counted_once(
    values: list[str], given: tuple[str, ...] | None, of_source: tuple[str, ...] | None
) -> None:
    labels = LabelNames(given, of_source)
    rows, findings = cleaned(values, labels)
    final_C = labels.settle()
    assert len(rows) + sum(findings.counts[kind] for kind in REFUSED) == len(values)
    name_of = {code: name for name, code in labels.codes.items()}
    assert sorted(name_of) == list(range(len(name_of)))
    kept = {
        place: final_C[code]
        for place, code in zip(*(rows.column(c).to_pylist() for c in ("place", "label")), strict=True)
    }
    for place, value in enumerate(values, start=1):
        if kept.get(place, -1) < 0:
            continue
        name, meant = name_of[kept[place]], stripped(value).strip("[]'\" ")
        same = stripped(name).strip("[]'\" ") == meant
        if not given and not of_source:
            assert same
        else:  # or a number: of the same value, or the name's place
            assert same or float(meant) in (
                labels.codes[name],
                float(name) if number(name) is not None else -1,
            )


def stripped(value: str) -> str:
    """Without what has no ink at its ends, by Unicode's categories and `str.strip`."""
    gone = "".join(
        one
        for one in value
        if (unicodedata.category(one) in ("Cc", "Cf", "Zs", "Zl", "Zp") or one in "\u2800\u3164")
        and one != SEVERAL
    )
    return value.strip(gone or " ")


@given(st.lists(values, max_size=30))
def test_values_that_differ_are_never_one_label(values: list[str]) -> None:
    labels = LabelNames(None, None)
    plain = [value for value in values if not stripped(value).startswith("[")]
    codes = [labels.code(value) for value in plain]
    for one, code in zip(plain, codes, strict=True):
        for other, other_code in zip(plain, codes, strict=True):
            if code >= 0 and other_code >= 0:
                assert (code == other_code) == (stripped(one) == stripped(other))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("a", "a\u200b"), "--labels names 'a' twice"),
        (("a", "\u200b", "b"), "--labels has no name at place 2"),
        (("a",), "--labels must name at least two labels"),
        (("a", "x" * 201), "--labels names a label of 201 characters, and 200 are the most"),
        (("a", f"b{SEVERAL}c"), "--labels has a control character in a name"),
    ],
)
def test_names_that_cannot_be_all_labels_are_refused(
    tmp_path: Path, labels: tuple[str, ...], words: str
) -> None:
    assert words in refusal(write_csv(tmp_path / "posts.csv", some_rows(20)), tmp_path / "out", labels=labels)


def test_what_is_wrong_with_an_unknown_value_is_said(tmp_path: Path) -> None:
    rows = [*some_rows(30), ("a", "7"), ("b", "-1"), ("c", "N/A"), ("d", " jooy"), ("e", "jooy\u200b")]
    text = refusal(write_csv(tmp_path / "posts.csv", rows), tmp_path / "out", labels=tuple(LABELS))
    assert "'7' 1 time, and ids go from 0 to 2" in text
    assert "'-1' 1 time, which marks posts without a label in data sets of the Hugging Face hub" in text
    assert "'N/A' 1 time, which usually means that there is none" in text
    assert "'jooy' 2 times, did you mean 'joy'?" in text


def test_a_long_label_is_refused_by_its_row(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", [*some_rows(20), ("a", "9" * 5000), ("b", "word " * 50)])
    text = refusal(source, tmp_path / "out")
    assert "label of more than 200 characters  2  posts.csv:22, posts.csv:23" in text
    assert len(text) < 1000
    assert prepare(source, str(tmp_path / "out"), on_bad="drop").index.source["label_too_long"] == 2
