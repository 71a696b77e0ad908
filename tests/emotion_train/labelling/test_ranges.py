"""Ranges of a text file, each read alone, give the rows that the whole file gives."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emotion_train.errors import WrongRequest
from emotion_train.labelling.job import Reading
from emotion_train.labelling.planning import find_source, plan_units, with_plan
from emotion_train.labelling.rows import rows_of_unit
from emotion_train.sources.unpacked import HEAD_BYTES

Row = tuple[int, str | None, str | None, str | None]


def rows(path: Path, rows_of_a_unit: int, **reading: object) -> tuple[int, list[Row], int]:
    """Number of units, their rows, blank ones."""
    told = Reading(columns=("n",), **reading)
    source = find_source(str(path), told)
    files, units = plan_units(source, told, rows_of_a_unit)
    found: list[Row] = []
    blank = 0
    for unit in units:
        own = 0
        for some in rows_of_unit(with_plan(source, files), unit, told):
            found += zip(some.numbers, some.texts, some.errors, some.kept[0], strict=True)
            own += len(some)
            blank += some.blank
            own += some.blank
        assert unit.rows in (None, own)
    return len(units), found, blank


def table(posts: list[str], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["n", "Text"])
    writer.writerows([number, post] for number, post in enumerate(posts))
    return out.getvalue().encode()


POSTS = ["a, b", 'she said "no"', "plain", "", "half ½", "x" * 300, '"', "tab\tin it", "last"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "sep"])
def test_ranges_give_the_rows_of_the_whole_file(tmp_path: Path, mark: bytes, ending: str) -> None:
    if ending == "jsonl":
        lines = [json.dumps({"n": number, "Text": post}) for number, post in enumerate(POSTS)]
        content = "\n".join([*lines[:4], "", "[3]", '{"n": 1}', *lines[4:]]).encode()
    else:
        content = (b"sep=,\n" if ending == "sep" else b"") + table(POSTS) + b"\n" + b"too,many,cells\n"
    path = tmp_path / f"posts.{'jsonl' if ending == 'jsonl' else 'csv'}"
    path.write_bytes(mark + content)
    one, whole, blank = rows(path, 1000, text_column="text")
    assert one == 1
    assert [row[1] for row in whole if row[1]] == [post for post in POSTS if post]
    for size in (1, 2, 3, 5):
        units, cut, blank_too = rows(path, size, text_column="text")
        assert units > 1
        assert (cut, blank_too) == (whole, blank)
    packed = tmp_path / f"{path.name}.gz"
    packed.write_bytes(gzip.compress(mark + content))
    units, unpacked, _ = rows(packed, 2, text_column="text")
    assert (units, unpacked) == (1, whole)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", table(["one", "two\nlines", "three"]), {}),  # a cell over two lines
        ("a.csv", b"n,text\n1,a\r2,b\r", {}),  # no line ends in a line feed but the first
        ("a.tsv", b'n\ttext\n1\t"a"\n2\tb\n', {}),  # marks or letters
        ("a.csv", table(["one", "two"]).decode().encode("latin-1"), {"encoding": "latin-1"}),
    ],
)
def test_what_cannot_be_cut_is_one_unit(
    tmp_path: Path, name: str, content: bytes, words: dict[str, object]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows(tmp_path / name, 1, text_column="text", **words)[0] == 1


@pytest.mark.parametrize(
    "first", [{"n": 0, "Text": "x" * (HEAD_BYTES + 9)}, {"N": 0, "text": "a" * HEAD_BYTES}]
)
def test_a_first_line_of_a_megabyte_hides_no_column(tmp_path: Path, first: dict[str, object]) -> None:
    number, text = first
    lines = [first, {number: 1, text: "one"}, {number: 2, text: "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, found, _ = rows(tmp_path / "a.jsonl", 1, text_column="text")
    assert [(row, text, kept) for row, text, _, kept in found] == [
        (1, None, "0"), (2, "one", "1"), (3, "two", "2"),
    ]  # fmt: skip


def test_a_tsv_with_quotes_is_cut_where_it_is_said_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'n\ttext\n1\t"a"\n2\tb\n')
    units, found, _ = rows(path, 1, quoting="none")
    assert (units, [row[1] for row in found]) == (2, ['"a"', "b"])
    units, found, _ = rows(path, 1, quoting="csv")
    assert (units, [row[1] for row in found]) == (2, ["a", "b"])


def test_quotes_that_nothing_explains_are_refused_as_by_prepare(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'n,text\n1,5" pipe\n2,"all of it"\n')
    with pytest.raises(WrongRequest, match="--quoting"):
        rows(path, 1)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    posts=st.lists(st.text(alphabet='ab",\n \r\té', max_size=8), min_size=1, max_size=8),
    size=st.integers(1, 4),
)
def test_any_table_is_cut_or_left_whole(tmp_path: Path, posts: list[str], size: int) -> None:
    path = tmp_path / "posts.csv"
    path.write_bytes(table(posts))
    try:
        _, whole, blank = rows(path, 1000, text_column="text", quoting="csv")
    except WrongRequest:
        return
    assert rows(path, size, text_column="text", quoting="csv")[1:] == (whole, blank)
