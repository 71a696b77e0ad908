"""Tables of posts that mean something, and writers of other houses that put them into files.

A table is made first, from cells with all that breaks readers; a writer that is not ours writes it
(Python's csv, pandas, pyarrow, json), or the rules of Spark or of a person do. What is read back
must be the table, or the file must be refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from emotion_train.data.cleaning import REFUSED, Cleaner, Findings, Rules
from emotion_train.data.labels import LabelNames
from emotion_train.errors import WrongRequest
from emotion_train.sources.open import Choices, open_source
from emotion_train.sources.posts import Columns

TABLES_IN_TESTS = 800  # with fixed seeds; benchmarks/tables.py takes as many as it is told
Row = tuple[str, str]
LABELS = ("anger", "joy", "très triste", "no one's")
_WORDS = ("I", "came", "joy", "text", "so what", "10", "naïve", "🙂", "NA", "#tag", "a=b", "-", "label")
_MARKS = (
    '"',
    '""',
    "'",
    ",",
    ";",
    "\t",
    "|",
    "\n",
    "\r\n",
    "\r",
    "\0",
    "\\",
    '\\"',
    " ",
    "  ",
    "\x1b",
    "\u2028",
    "\x85",
)


class Table(NamedTuple):
    """Rows of text and label, and the characters that its cells were made of."""

    rows: list[Row]
    marks: tuple[str, ...]

    def holds(self, *marks: str) -> bool:
        return any(mark in cell for row in self.rows for cell in row for mark in marks)


class Written(NamedTuple):
    """A file, and how `prepare` has to be told to read it. `faithful` is whether the writer keeps
    to the rules of its format, so that refusing the file would be a defect.
    """

    path: Path
    options: dict[str, Any]
    faithful: bool


def some_table(draw: random.Random) -> Table:
    """Between 1 and 30 rows, most of whose cells hold some of up to four marks."""
    marks = tuple(draw.sample(_MARKS, draw.randrange(5)))
    labels = draw.sample(LABELS, draw.randrange(2, 5))
    rows = [(_text(draw, marks), draw.choice(labels)) for _ in range(draw.randrange(1, 31))]
    return Table([(text, label) for text, label in rows if text.strip(_BLANK)] or [("alone", "joy")], marks)


_BLANK = " \t\r\n\0\x1b\x85\u2028"


def _text(draw: random.Random, marks: tuple[str, ...]) -> str:
    pieces = []
    for _ in range(draw.randrange(1, 7)):
        pieces.append(draw.choice(_WORDS))
        if marks and draw.random() < 0.4:
            pieces.append(draw.choice(marks))
        elif draw.random() < 0.7:
            pieces.append(" ")
    if marks and draw.random() < 0.2:
        pieces.insert(0, draw.choice(marks))
    return "".join(pieces)


def _packed(path: Path, content: str, draw: random.Random) -> tuple[Path, dict[str, Any]]:
    """The text in one of the encodings that can spell it, gzipped now and then."""
    encodings = [
        name for name in ("utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16") if _spells(name, content)
    ]
    encoding = draw.choice(["utf-8", "utf-8", *encodings])
    raw = content.encode(encoding)
    if draw.random() < 0.1:
        path, raw = path.with_name(path.name + ".gz"), gzip.compress(raw, 1)
    path.write_bytes(raw)
    return path, {} if encoding.startswith("utf-8") else {"encoding": encoding}


def _spells(encoding: str, content: str) -> bool:
    try:
        return content.encode(encoding).decode(encoding) == content
    except UnicodeError:
        return False


def by_csv(table: Table, folder: Path, draw: random.Random) -> Written:
    delimiter = draw.choice(",,;\t|")
    quoting: Any = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    end = draw.choice(["\r\n", "\n"])
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(
        [("text", "label"), *table.rows]
    )
    path, options = _packed(folder / f"posts.{'tsv' if delimiter == chr(9) else 'csv'}", out.getvalue(), draw)
    # before Python 3.13 the module leaves a carriage return bare when lines end otherwise
    bare = table.holds("\r") and end == "\n"
    return Written(path, options, not bare and not _lines_like_rows(table, delimiter))


def by_pandas(table: Table, folder: Path, draw: random.Random) -> Written:
    import pandas

    frame = pandas.DataFrame(table.rows, columns=["text", "label"])
    if draw.random() < 0.2:
        path = folder / "posts.jsonl"
        frame.to_json(path, orient="records", lines=True, force_ascii=draw.random() < 0.5)
        return Written(path, {}, True)
    delimiter = draw.choice(",\t")
    text = frame.to_csv(
        index=draw.random() < 0.3, sep=delimiter, quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    )
    path, options = _packed(folder / f"posts.{'tsv' if delimiter == chr(9) else 'csv'}", text, draw)
    return Written(path, options, not table.holds("\r") and not _lines_like_rows(table, delimiter))


def by_pyarrow(table: Table, folder: Path, draw: random.Random) -> Written:
    columns = pa.table(
        {"text": [text for text, _ in table.rows], "label": [label for _, label in table.rows]}
    )
    if draw.random() < 0.4:
        if draw.random() < 0.5:
            columns = columns.set_column(0, "text", columns["text"].dictionary_encode())
        pq.write_table(columns, folder / "posts.parquet", row_group_size=draw.randrange(1, 40))
        return Written(folder / "posts.parquet", {}, True)
    style = draw.choice(["needed", "all_valid"])
    pyarrow.csv.write_csv(
        columns, folder / "posts.csv", pyarrow.csv.WriteOptions(quoting_style=style, include_header=True)
    )
    return Written(folder / "posts.csv", {}, not _lines_like_rows(table, ","))


def _lines_like_rows(table: Table, delimiter: str) -> bool:
    """Whether a line of a text of several lines looks like a row: a label of the table, or a word
    of the same make, behind a delimiter. What follows from such a file nobody can tell.
    """
    labels = {label for _, label in table.rows}
    ends = [
        line.split(delimiter)[1].strip('"')
        for text, _ in table.rows
        if "\n" in text or "\r" in text
        for line in re.split(r"[\r\n]", text)
        if line.count(delimiter) == 1
    ]
    return any(end.strip() in labels or re.fullmatch(r"\w+", end) for end in ends)


def by_datasets(table: Table, folder: Path, draw: random.Random) -> Written:
    """Ids with their names in the schema, the names in any order."""
    names = draw.sample(LABELS, len(LABELS))
    columns = pa.table(
        {"text": [text for text, _ in table.rows], "label": [names.index(label) for _, label in table.rows]}
    )
    described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    columns = columns.replace_schema_metadata({"huggingface": json.dumps(described)})
    if draw.random() < 0.5:
        pq.write_table(columns, folder / "posts.parquet")
        return Written(folder / "posts.parquet", {}, True)
    with pa.OSFile(str(folder / "posts.arrow"), "wb") as file, pa.ipc.new_stream(file, columns.schema) as out:
        out.write_table(columns)
    return Written(folder / "posts.arrow", {}, True)


def by_json(table: Table, folder: Path, draw: random.Random) -> Written:
    ascii_only = draw.random() < 0.5
    lines = [
        json.dumps({"label": label, "text": text}, ensure_ascii=ascii_only) for text, label in table.rows
    ]
    path, options = _packed(folder / "posts.jsonl", draw.choice(["\n", "\r\n"]).join(lines), draw)
    return Written(path, options, True)


def by_spark(table: Table, folder: Path, draw: random.Random) -> Written:
    """Spark's rules: quotes are escaped by backslashes, and cells are quoted where they hold the
    delimiter, a quote or a line end. Its writer trims cells, so it gets trimmed ones.
    """
    rows = [(text.strip(), label) for text, label in table.rows]
    everything = draw.random() < 0.5
    lines = [",".join(_in_spark(cell, everything) for cell in row) for row in [("text", "label"), *rows]]
    path, options = _packed(folder / "posts.csv", "".join(line + "\n" for line in lines), draw)
    return Written(path, options, not table.holds('"', "\\", "\r", "\n"))


def _in_spark(cell: str, everything: bool) -> str:
    if everything or re.search(r'[,"\n\r]', cell):
        return '"' + cell.replace('"', '\\"') + '"'
    return cell


def by_hand(table: Table, folder: Path, draw: random.Random) -> Written:
    """Cells joined by tabs or commas and nothing else; who does so has no line ends in them."""
    if table.holds("\n"):
        return by_csv(table, folder, draw)
    delimiter = draw.choice("\t\t,")
    path, options = _packed(
        folder / f"posts.{'tsv' if delimiter == chr(9) else 'csv'}",
        "".join(delimiter.join(row) + "\n" for row in [("text", "label"), *table.rows]),
        draw,
    )
    return Written(path, options, not table.holds('"', delimiter, "\n", "\r"))


WRITERS: tuple[Callable[[Table, Path, random.Random], Written], ...] = (
    by_csv,
    by_csv,
    by_pandas,
    by_pyarrow,
    by_datasets,
    by_json,
    by_spark,
    by_hand,
)


def meant(table: Table, writer: Callable[..., Any]) -> list[Row]:
    """The table as a data set holds it: control characters but tab and line ends are spaces."""
    trimmed = [(text.strip() if writer is by_spark else text, label) for text, label in table.rows]
    return [(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", " ", text), label) for text, label in trimmed]


def check_table(
    table: Table, writer: Callable[..., Written], folder: Path, draw: random.Random, name: str
) -> str:
    """Write the table, read it back, and return "kept" or "refused".

    Asserts that what is kept is what was meant, in order; that a file which keeps to its format is
    not refused; and that every row is accounted for.
    """
    written, rows = writer(table, folder, draw), meant(table, writer)
    words = f"{name}, {writer.__name__}, {written.path.name} {written.options}"
    try:
        kept, findings, rows_read = read(written)
    except WrongRequest as refusal:
        if written.faithful:
            raise AssertionError(f"{words}: refused, {refusal}") from refusal
        return "refused"
    refused = sum(findings.counts[kind] for kind in REFUSED)
    assert len(kept) + refused == rows_read, f"{words}: {len(kept)} kept, {refused} refused of {rows_read}"
    if not refused and writer is by_hand and _as_csv(kept, written) == _content(written):
        return "kept"  # nobody can tell that it was not a CSV writer
    if not refused:
        assert kept == rows, f"{words}: {[row for row in kept if row not in rows][:3]} was not meant"
        return "kept"
    assert not written.faithful, f"{words}: {findings.lines(REFUSED)}"
    # who leaves the bad rows out keeps none that was not meant
    assert Counter(kept) <= Counter(rows), f"{words}: {Counter(kept) - Counter(rows)} was not meant"
    return "refused"


def _content(written: Written) -> str:
    raw = written.path.read_bytes()
    raw = gzip.decompress(raw) if written.path.suffix == ".gz" else raw
    return raw.decode(written.options.get("encoding", "utf-8-sig")).removeprefix("\ufeff")


def _as_csv(rows: list[Row], written: Written) -> str:
    """What Python's csv would have written of these rows."""
    out = io.StringIO(newline="")
    delimiter = "\t" if ".tsv" in written.path.name else ","
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([("text", "label"), *rows])
    return out.getvalue()


def read(written: Written) -> tuple[list[Row], Findings, int]:
    """Texts and labels as `prepare` would keep them before it looks for texts that are the same."""
    with open_source(str(written.path), Columns(), Choices(**written.options)) as source:
        findings = Findings(file.name for file in source.files)
        labels = LabelNames(None, source.label_names)
        cleaner = Cleaner(Rules(max_chars=20_000, seed=0), labels, findings)
        batches = [cleaner.clean(batch, None) for batch in source.batches()]
    name = {code: name for name, code in labels.codes.items()}
    columns = [(batch.column("text").to_pylist(), batch.column("label").to_pylist()) for batch in batches]
    rows = [(text, name[label]) for texts, codes in columns for text, label in zip(texts, codes, strict=True)]
    return rows, findings, cleaner.rows_read
