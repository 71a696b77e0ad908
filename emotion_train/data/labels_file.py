"""Names of labels as a person gives them: a list with commas, or a file with one name per line.

    anger               0	anger
    joy         or      1	joy
    neutral             2	neutral

Ids, in any order, come before a tab or at least two spaces. Any other form that a file could have
by mistake is refused with its line number, since a name that is read wrong is trained wrong.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path
from typing import NamedTuple

from emotion_train.data.labels import MAX_LABEL_CHARS, trimmed
from emotion_train.errors import WrongRequest

_MAX_BYTES = 4 << 20
_ONE_A_LINE = "give a UTF-8 text file with one label a line"
_ID_AND_NAME = re.compile(r"([0-9]+)(?: *\t\s*| {2,})(\S.*)")
# An id and a name with another separator, as CSV, YAML and people write them
_OTHER_MARK = re.compile(r"([0-9]+)(?:\s*[,;:=|]\s*|[.)]\s+| )(\S.*)")
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class _Line(NamedTuple):
    number: int
    words: str  # trimmed, never empty


def names_in(words: str) -> tuple[str, ...]:
    """The names of `--labels`: anger,joy,neutral."""
    return tuple(trimmed(word) for word in words.split(","))


def read_names(file: Path) -> tuple[str, ...]:
    """The names of `--labels-file`, in the order of their ids where the file has ids.

    Raises `WrongRequest`, with the line, where the file is not a list of names.
    """
    lines = _lines(file, _decoded(file))
    if len(lines) < 2:
        raise WrongRequest(
            f"--labels-file {file} has {len(lines)} of the at least two labels needed; {_ONE_A_LINE}."
        )
    _refuse_other_forms(file, lines)
    with_id = [(line, match) for line in lines if (match := _ID_AND_NAME.fullmatch(line.words))]
    if with_id and len(with_id) < len(lines):
        without = next(line for line in lines if not _ID_AND_NAME.fullmatch(line.words))
        raise _refused(file, without, "has no id, tab and name, as other lines have")
    if with_id:
        lines = _by_id(file, [(_Line(line.number, match[2]), match[1]) for line, match in with_id])
    _refuse_names(file, lines)
    return tuple(line.words for line in lines)


def _decoded(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise WrongRequest(f"--labels-file {file} cannot be read ({error}); {_ONE_A_LINE}.") from None
    if len(raw) > _MAX_BYTES:
        raise WrongRequest(
            f"--labels-file {file} is larger than {_MAX_BYTES >> 20} MiB, too large for names of labels;"
            f" {_ONE_A_LINE}."
        )
    marked = next((name for mark, name in _ENCODINGS.items() if raw.startswith(mark)), None)
    if marked or b"\x00" in raw:
        encoding = marked or ("UTF-16BE" if raw[:1] == b"\x00" else "UTF-16LE")
        raise _other_encoding(file, f"is {encoding}", encoding)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
        raise _other_encoding(file, f"is not UTF-8 at line {line}", "WINDOWS-1252") from None


def _other_encoding(file: Path, what: str, encoding: str) -> WrongRequest:
    return WrongRequest(
        f"--labels-file {file} {what}; type `iconv -f {encoding} -t UTF-8 {shlex.quote(str(file))} >"
        " labels.txt` and give labels.txt."
    )


def _lines(file: Path, text: str) -> list[_Line]:
    """The lines that are not blank, numbered from 1 as in editors."""
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return [_Line(number, words) for number, line in numbered if (words := trimmed(line))]


def _refuse_other_forms(file: Path, lines: list[_Line]) -> None:
    """Raises `WrongRequest` for JSON, comments, and ids with another separator than a tab."""
    if lines[0].words[0] in "{[":
        raise _refused(file, lines[0], "begins JSON")
    for line in lines:
        if re.match(r"#(?:[#!\s]|$)|//", line.words):
            raise _refused(file, line, "is a comment, which would become a label")
    marked = [match for line in lines if (match := _OTHER_MARK.fullmatch(line.words))]
    ids = {match[1].lstrip("0") or "0" for match in marked}
    # "1 star" to "5 stars" may be names; the numbers 0 to n-1 are ids
    punctuated = len(marked) >= len(lines) - 1 and not any(match[0][len(match[1])] == " " for match in marked)
    if punctuated or (len(marked) == len(lines) and ids == set(map(str, range(len(lines))))):
        line = next(line for line in lines if _OTHER_MARK.fullmatch(line.words))
        raise WrongRequest(
            f"--labels-file {file}: line {line.number} is {_shown(line)}, which may be an id and a name;"
            " write a tab between them, or leave the numbers out. Names that begin so can be given by"
            " --labels."
        )


def _by_id(file: Path, lines: list[tuple[_Line, str]]) -> list[_Line]:
    """The lines in the order of their ids, which must be 0 to n-1."""
    line_of: dict[str, _Line] = {}
    for line, spelled in lines:
        key = spelled.lstrip("0") or "0"  # never made an int: it may have thousands of digits
        if key in line_of:
            raise _refused(file, line, f"has id {key[:20]}, as line {line_of[key].number} already has")
        line_of[key] = line
    missing = next((str(i) for i in range(len(lines)) if str(i) not in line_of), None)
    if missing is not None:
        raise WrongRequest(
            f"--labels-file {file} has no id {missing}; ids of {len(lines)} labels are 0 to"
            f" {len(lines) - 1}, each once. Number them so, or leave the ids out."
        )
    return [line_of[str(i)] for i in range(len(lines))]


def _refuse_names(file: Path, lines: list[_Line]) -> None:
    first: dict[str, int] = {}
    for line in lines:
        if any(unicodedata.category(character) == "Cc" for character in line.words):
            raise _refused(file, line, "has a tab or another control character in its name")
        if len(line.words) > MAX_LABEL_CHARS:
            raise _refused(file, line, f"has more than {MAX_LABEL_CHARS} characters")
        if line.words in first:
            raise _refused(file, line, f"names {line.words!r}, as line {first[line.words]} already does")
        first[line.words] = line.number


def _refused(file: Path, line: _Line, why: str) -> WrongRequest:
    return WrongRequest(f"--labels-file {file}: line {line.number} ({_shown(line)}) {why}; {_ONE_A_LINE}.")


def _shown(line: _Line) -> str:
    return repr(line.words if len(line.words) <= 40 else f"{line.words[:40]}…")
