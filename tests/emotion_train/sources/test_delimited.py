"""Of a CSV or TSV every row is read as it was meant, or the file is refused by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emotion_train.data.cleaning import Cleaner, Findings, Rules
from emotion_train.data.labels import LabelNames
from emotion_train.errors import WrongRequest
from emotion_train.sources.open import Choices, open_source
from emotion_train.sources.posts import Columns

TEXT_AND_LABEL = Columns()
GOOD = [f"good {i},{'joy' if i % 2 else 'anger'}" for i in range(20)]


class Kept(list[tuple[str, ...]]):
    """Text and label of each row that is a post, and what was found on the way."""

    findings: Findings

    def counts(self) -> dict[str, int]:
        return dict(self.findings.counts)


def read(path: Path, content: str | bytes, columns: Columns = TEXT_AND_LABEL, **choices: Any) -> Kept:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    kept = Kept()
    with open_source(str(path), columns, Choices(**choices)) as source:
        kept.findings = Findings(file.name for file in source.files)
        labels = LabelNames(None, source.label_names)
        cleaner = Cleaner(Rules(max_chars=20_000, seed=0), labels, kept.findings)
        batches = [cleaner.clean(batch, None) for batch in source.batches()]
    name = {code: name for name, code in labels.codes.items()}
    for batch in batches:
        texts, codes = batch.column("text").to_pylist(), batch.column("label").to_pylist()
        kept += [(text, name[code]) for text, code in zip(texts, codes, strict=True)]
    return kept


def refusal(path: Path, lines: list[str], **choices: Any) -> str:
    with pytest.raises(WrongRequest) as caught:
        read(path, "\n".join(lines) + "\n", **choices)
    assert str(path) in str(caught.value)
    return str(caught.value)


def tabbed(lines: list[str]) -> str:
    return "\n".join(line.replace(",", "\t") for line in ["text,label", *lines]) + "\n"


# Quotes in a TSV


def test_in_a_tsv_whose_lines_are_rows_quotes_are_letters(tmp_path: Path) -> None:
    lines = [*GOOD, '"I never,joy', *GOOD, 'so "what",anger', '"', '"stop,joy']
    lines.remove('"')
    rows = read(tmp_path / "a.tsv", tabbed(lines))
    assert rows == [tuple(line.split(",")) for line in lines]


@pytest.mark.parametrize("quoted_as", ['"he said ""hi""",joy', '"two\nlines",joy', '"a\ttab",joy'])
def test_a_tsv_of_a_csv_writer_is_unquoted(tmp_path: Path, quoted_as: str) -> None:
    meant = {'"he': 'he said "hi"', '"two': "two\nlines", '"a\t': "a\ttab"}
    rows = read(
        tmp_path / "a.tsv", "text\tlabel\n" + quoted_as.replace('",', '"\t') + "\n" + tabbed(GOOD)[11:]
    )
    assert rows[0] == (next(text for start, text in meant.items() if quoted_as.startswith(start)), "joy")
    assert len(rows) == 21


def test_lines_of_a_quoted_text_with_tabs_make_no_tsv_unquoted(tmp_path: Path) -> None:
    table = 'text\tlabel\n"one\ttab\nand\ta line"\tjoy\n' + tabbed(GOOD)[11:]
    assert read(tmp_path / "a.tsv", table)[0] == ("one\ttab\nand\ta line", "joy")


def test_a_tsv_with_every_cell_quoted_is_unquoted_and_with_some_it_is_not(tmp_path: Path) -> None:
    everywhere = ['"text"\t"label"', '"one"\t"joy"', '"two"\t"anger"']
    assert read(tmp_path / "a.tsv", "\n".join(everywhere)) == [("one", "joy"), ("two", "anger")]
    here_and_there = ["text\tlabel", '"one"\tjoy', "two\tanger"]
    assert read(tmp_path / "a.tsv", "\n".join(here_and_there)) == [('"one"', "joy"), ("two", "anger")]
    assert read(tmp_path / "a.tsv", "\n".join(here_and_there), quoting="csv")[0] == ("one", "joy")


# Quotes in a CSV


def test_a_quote_that_swallows_rows_is_refused_by_line(tmp_path: Path) -> None:
    swallowed = ["text,label", *GOOD[:5], '"I never,joy', *GOOD[5:10], 'said "then",anger', *GOOD[10:]]
    assert "opens in row 7 (line 7) meets another quote in line 13 with letters after it" in refusal(
        tmp_path / "a.csv", swallowed
    )
    swallowed[12] = 'said then",anger'
    text = refusal(tmp_path / "a.csv", swallowed)
    assert "takes in lines that are rows by themselves: row 7 (lines 7 to 13)" in text
    assert "--quoting none" in text
    assert "--quoting csv if these lines belong to the text" in text
    rows = read(tmp_path / "a.csv", "\n".join(swallowed), quoting="csv")
    assert rows[5] == ("I never,joy\n" + "\n".join(GOOD[5:10]) + "\nsaid then", "anger")
    rows = read(tmp_path / "a.csv", "\n".join(swallowed), quoting="none")
    assert rows == [tuple(line.split(",")) for line in swallowed[1:]]


@pytest.mark.parametrize("order", ["text,label", "label,text", "n,text,label", "n,label,text", "text,n"])
def test_a_swallowed_row_is_known_by_its_other_columns(tmp_path: Path, order: str) -> None:
    names = order.split(",")
    columns = Columns(label="label" if "label" in names else None)
    path = tmp_path / "a.csv"

    def line(i: int, text: str) -> str:
        cells = {"text": text, "label": "joy" if i % 2 else "anger", "n": f"{i}"}
        return ",".join(cells[name] for name in names)

    rows = [line(i, f"plain {i}") for i in range(30)]
    stray = [order, *rows[:10], line(10, '"open'), *rows[10:13], line(13, 'shut"'), *rows[14:]]
    with pytest.raises(WrongRequest, match="rows by themselves: row 12"):
        list(_batches(path, stray, columns))
    # the same lines are fine inside of a text that holds no row
    honest = [order, *rows[:10], line(10, '"Dear all,\nthanks, you\nand, all, of, you\nbye"'), *rows[10:]]
    texts = [text for batch in _batches(path, honest, columns) for text in batch.texts.to_pylist()]
    assert b"Dear all,\nthanks, you\nand, all, of, you\nbye" in texts
    assert len(texts) == 31


def _batches(path: Path, lines: list[str], columns: Columns) -> Any:
    path.write_text("\n".join(lines))
    with open_source(str(path), columns) as source:
        return list(source.batches())


def test_a_line_of_a_text_that_is_no_csv_is_no_row(tmp_path: Path) -> None:
    lines = ["text,label", *GOOD, '"one\nand ""so"" two\rthree\nfour",joy']
    assert read(tmp_path / "a.csv", "\n".join(lines))[-1] == ('one\nand "so" two\rthree\nfour', "joy")


def test_texts_with_line_breaks_in_one_column_are_believed(tmp_path: Path) -> None:
    batches = _batches(tmp_path / "a.csv", ["text", '"two\nlines"', "one"], Columns(label=None))
    assert [text for batch in batches for text in batch.texts.to_pylist()] == [b"two\nlines", b"one"]


def test_quotes_that_may_be_marks_or_letters_are_for_the_user_to_tell(tmp_path: Path) -> None:
    lines = ["text,label", *GOOD, 'I said "hi",joy', '"hello",anger']
    text = refusal(tmp_path / "a.csv", lines)
    assert "inside a cell in row 22 and around a whole cell in row 23" in text
    assert read(tmp_path / "a.csv", "\n".join(lines), quoting="csv")[-1] == ("hello", "anger")
    assert read(tmp_path / "a.csv", "\n".join(lines), quoting="none")[-1] == ('"hello"', "anger")
    lines.append('"with, comma",joy')  # which only marks explain
    assert read(tmp_path / "a.csv", "\n".join(lines))[-2] == ("hello", "anger")


def test_an_open_quote_makes_a_file_unreadable(tmp_path: Path) -> None:
    lines = ["text,label", *GOOD, '"open,joy', *GOOD]
    text = refusal(tmp_path / "a.csv", lines)
    assert "the quote that opens in row 22 (line 22) is never closed: it takes in 21 lines" in text


@pytest.mark.parametrize("text", [r"she said \"go\" to me", r"say \"", r"\"well", r"a \", b"])
def test_quotes_escaped_by_backslashes_are_named(tmp_path: Path, text: str) -> None:
    lines = ["text,label", *GOOD, f'"{text}",joy', *GOOD]
    assert 'row 22 escapes quotes by backslashes (\\")' in refusal(tmp_path / "a.csv", lines)


def test_letters_behind_a_closing_quote_are_one_bad_row(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "\n".join(["text,label", *GOOD, '"hi" he said,joy', *GOOD]))
    assert len(rows) == 40
    assert rows.counts() == {"broken_quoting": 1}


def test_a_carriage_return_among_other_line_ends_is_no_line_end(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "text,label\n" + "\n".join([*GOOD, "two\rlines,joy", '"or\rquoted",joy']))
    assert rows[20:] == [("or\rquoted", "joy")]
    assert rows.counts() == {"stray_return": 1, "line_breaks": 1}


# Headers and what stands above or below them


def test_a_header_in_the_middle_is_no_post(tmp_path: Path) -> None:
    table = ["Text, label ", *GOOD]
    rows = read(tmp_path / "a.csv", "\n".join([*table, *table, "text,LABEL"]))
    assert len(rows) == 40
    assert rows.counts() == {"header_again": 2}


@pytest.mark.parametrize(
    ("above", "delimiter"),
    [([""], ","), (["", " ", "# made by hand"], ","), (["sep=;"], ";"), (['"sep=|"', ""], "|")],
)
def test_lines_above_the_header_are_passed_over_and_told(
    tmp_path: Path, above: list[str], delimiter: str
) -> None:
    lines = [line.replace(",", delimiter) for line in ["text,label", *GOOD]]
    rows = read(tmp_path / "a.csv", "\n".join([*above, *lines]))
    assert rows == [tuple(line.split(",")) for line in GOOD]
    (remark,) = rows.findings.remarks
    assert "above the header of a.csv" in remark


def test_a_column_named_like_a_comment_is_a_header(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "#id,text,label\n1,well,joy\n") == [("well", "joy")]


def test_column_names_match_without_regard_to_case_and_likely_ones_are_proposed(tmp_path: Path) -> None:
    assert len(read(tmp_path / "a.csv", "\n".join([" TEXT ,Label", *GOOD]))) == 20
    assert "Type --text-column Tweet, or another of these" in refusal(
        tmp_path / "a.csv", ["Tweet,label", *GOOD]
    )
    assert "Type --label-column emotion, or" in refusal(tmp_path / "a.csv", ["text,emotion", *GOOD])
    assert "'Text' and 'TEXT'; rename" in refusal(tmp_path / "a.csv", ["Text,TEXT,label", "a,b,joy"])


def test_blank_rows_are_counted_and_a_row_with_an_id_alone_is_none(tmp_path: Path) -> None:
    lines = ["n,text,label", "1,a,joy", "", ",,", "  ", "5,,"]
    rows = read(tmp_path / "a.csv", "\n".join(lines))
    assert rows == [("a", "joy")]
    assert rows.counts() == {"blank": 3, "empty_text": 1}


def test_plain_text_is_no_table(tmp_path: Path) -> None:
    assert "plain text without a header row" in refusal(tmp_path / "a.txt", ["what a day", "so, it goes"])


def test_a_file_is_named_that_is_no_text(tmp_path: Path) -> None:
    for content, words in {
        b"PK\x03\x04rest": "zip archive or an Excel workbook",
        b"PAR1rest": "Parquet; type --format parquet",
        "text,label\n".encode("utf-16"): "UTF-16; type --encoding utf-16",
        "text,label\nx,y\n".encode("utf-16-le"): "UTF-16",
    }.items():
        with pytest.raises(WrongRequest, match=words):
            read(tmp_path / "a.csv", content)


def test_a_wrong_encoding_is_named(tmp_path: Path) -> None:
    lines = "\n".join(["text,label", "café,joy", *GOOD])
    assert read(tmp_path / "a.csv", lines.encode("latin-1"), encoding="latin-1")[0] == ("café", "joy")
    assert read(tmp_path / "a.csv", lines.encode("utf-16"), encoding="UTF16")[0] == ("café", "joy")
    with pytest.raises(WrongRequest, match="is not ascii"):
        read(tmp_path / "a.csv", lines, encoding="ascii")
    with pytest.raises(WrongRequest, match="one that Python knows"):
        read(tmp_path / "a.csv", lines, encoding="klingon")
