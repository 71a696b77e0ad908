"""A list of names is read as it was meant, or refused by line number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.data.labels_file import names_in, read_names
from emotion_train.errors import WrongRequest


def read(folder: Path, content: bytes | str) -> tuple[str, ...]:
    file = folder / "labels.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_names(file)


@pytest.mark.parametrize(
    "content",
    [
        "anger\njoy\nsadness\n",
        "\ufeffanger\r\njoy\r\nsadness",
        "anger\r\rjoy\rsadness\r",
        "\n  anger \n\n\u200bjoy\u00a0\n\t\nsadness\n\n",
        "0\tanger\n1\tjoy\n2\tsadness\n",
        "2\tsadness\n\n0 \t anger\n01\t\tjoy\n",
        "0  anger\n1   joy\n2  sadness",
        "\ufeff0\tanger\n1\tjoy\n2\tsadness\n",
    ],
)
def test_names_come_in_the_order_of_their_lines_or_ids(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == ("anger", "joy", "sadness")


@pytest.mark.parametrize(
    "names",
    [
        ("very sad", "a,b"),
        ("1", "2", "3"),
        ("1.0", "2.0"),
        ("1 star", "2 stars", "3 stars"),
        ("#happy", "#sad"),
        ("a\u2028b", "c"),
    ],
)
def test_names_that_only_look_like_something_else_are_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert read(tmp_path, "\n".join(names)) == names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("0\tanger\njoy\n", r"line 2 \('joy'\) has no id, tab and name"),
        ("anger\n\n1\tjoy\n", r"line 1 \('anger'\) has no id"),
        ("id\tlabel\n0\tanger\n1\tjoy", r"line 1 \('id\\tlabel'\) has no id"),
        ("0\tanger\n2\tjoy\n", "has no id 1; ids of 2 labels are 0 to 1"),
        ("1\tanger\n2\tjoy\n", "has no id 0"),
        ("0\tanger\n00\tjoy\n", r"line 2 .* has id 0, as line 1 already has"),
        (f"0\tanger\n{'9' * 5000}\tjoy\n", "has no id 1"),
        (f"{'7' * 5000}\tanger\n{'7' * 5000}\tjoy\n", r"line 2 .* has id 7+, as line 1 already has"),
        ("0,anger\n1,joy\n", "line 1 is '0,anger', which may be an id and a name; write a tab"),
        ("id,label\n0,anger\n1,joy\n", "line 2 is '0,anger'"),
        ("0: anger\n1: joy\n", "line 1 is '0: anger'"),
        ("1. anger\n2. joy\n", "line 1 is '1. anger'"),
        ("0 anger\n1 joy\n", "line 1 is '0 anger'"),
        ("0\t❤\t_red_heart_\n1\t😂\tjoy", r"line 1 .* has a tab or another control character"),
        ("anger\t0\njoy\t1\n", r"line 1 \('anger\\t0'\) has a tab"),
        ("anger\njo\x1fy\n", r"line 2 .* control character"),
        ("# all labels\nanger\njoy\n", r"line 1 \('# all labels'\) is a comment"),
        ("anger\njoy\n#\n", r"line 3 \('#'\) is a comment"),
        ("// mine\nanger\njoy\n", "line 1 .* is a comment"),
        ("anger\njoy\n\n joy\u200b\n", r"line 4 \('joy'\) names 'joy', as line 2 already does"),
        ('{"0": "anger",\n"1": "joy"}', "line 1 .* begins JSON"),
        ('["anger", "joy"]\nx', "line 1 .* begins JSON"),
        ("anger\n" + "x" * 201, "line 2 .* has more than 200 characters"),
        ("", "has 0 of the at least two labels needed"),
        ("\ufeff\n", "has 0 of the at least two labels needed"),
        ("anger", "has 1 of the at least two labels needed"),
        ("anger\njoy".encode("utf-16"), "is UTF-16; type `iconv -f UTF-16 -t UTF-8"),
        ("anger\njoy".encode("utf-16-le"), "is UTF-16LE; type `iconv -f UTF-16LE -t UTF-8"),
        ("anger\njoy".encode("utf-16-be"), "is UTF-16BE; type `iconv -f UTF-16BE -t UTF-8"),
        ("anger\njoy".encode("utf-32"), "is UTF-32; type `iconv -f UTF-32 -t UTF-8"),
        (
            "joy\r\n\r\npeur\r\ngêne\r\n".encode("latin-1"),
            "is not UTF-8 at line 4; type `iconv -f WINDOWS-1252",
        ),
        (b"x\n" * (2 << 20) + b"y", "is larger than 4 MiB"),
    ],
)
def test_what_is_no_list_of_names_is_refused_by_its_line(
    tmp_path: Path, content: bytes | str, words: str
) -> None:
    with pytest.raises(WrongRequest) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert re.search(words, message)
    assert message.startswith(f"--labels-file {tmp_path / 'labels.txt'}")
    assert "\n" not in message
    assert len(message) < 500 + len(str(tmp_path)) * 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(WrongRequest, match="cannot be read"):
            read_names(place)


@given(st.binary(max_size=60) | st.text("01,;\t :.#\n\r\ufeff[{ab\u200b", max_size=30).map(str.encode))
def test_any_bytes_are_names_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        names = read(tmp_path_factory.getbasetemp(), content)
    except WrongRequest:
        return
    assert len(set(names)) == len(names) >= 2
    assert all(name in content.decode("utf-8-sig") for name in names)


def test_names_between_commas_are_trimmed() -> None:
    assert names_in(" anger, joy\u200b,,x") == ("anger", "joy", "", "x")
