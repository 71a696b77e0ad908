"""Posts with HTML entities, broken encodings and line breaks are counted by row; entities become
characters where a person asks for it.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.cli import main
from emotion_train.data import text_notes
from emotion_train.data.index import read_index
from emotion_train.preparation.steps import prepare
from emotion_train.storage.open import open_store
from tests.emotion_train.test_prepare import all_posts, contents, refusal, some_rows, write_csv

ENTITIES = ["&amp;", "&lt;3", "it&#39;s", "&#x1F600;", "&nbsp;", "a&NotEqualTilde;b", "&copy; me", "&#0;"]
NO_ENTITIES = ["R&D", "&", "a & b; c", "&foo;", "AT&T;", "?a=1&copy=2", "&#;", "&#x;", "&amp", "& amp;"]
# languages whose letters have one to four bytes
LANGUAGES = """
café déjà où naïve garçon cœur Übung Größe schön Österreich Straße mañana ¿qué? corazón não irmã São
łódź dziękuję świat žluťoučký čeština řeka şeker İstanbul привет Москва αγάπη Ελλάδα שלום مرحبا
こんにちは 你好 사랑 😀 ❤️ don’t “so” 5€ 20°C £5 – … → ✅ ½ «oui» naïve—oui
"""
# capital letters before punctuation, which look like broken text to a simple rule
SHOUTED = """
CAFÉ… «CAFÉ» AMANHÃ… IRMÃ” IRMÃ SÃO Å² Å” passé…” É’ voilà…» ÅÄÖ Älg Ünï… «ok» ROMÂ ÊTRE AÑO…
ESPAÑA” „SCHÖ“ ÖÖ. Ð ×2 ±5 µm §5 ¡Olé! Đà
"""
WORDS, MEANT = (words.split() for words in (LANGUAGES, SHOUTED))


def found(texts: list[str], kind: str) -> list[str]:
    rows = text_notes.rows(pa.array(texts, pa.string())).get(kind, [])
    return [texts[row] for row in rows]


def misread(text: str, codec: str) -> str:
    """The text as UTF-8 that was read in another encoding; bytes that it lacks as Latin-1, as
    browsers do.
    """
    return "".join(bytes([byte]).decode(codec, "ignore") or chr(byte) for byte in text.encode())


def test_only_real_entities_are_found() -> None:
    assert found([*NO_ENTITIES, *ENTITIES, *NO_ENTITIES], "html_entities") == ENTITIES
    assert [text_notes.unescaped(text) for text in NO_ENTITIES] == NO_ENTITIES
    for text in ENTITIES:
        assert text_notes.unescaped(text) == html.unescape(text) != text
    assert text_notes.unescaped("&amp;lt; &amp;amp;") == "&lt; &amp;"  # once


@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
def test_text_that_was_read_in_another_encoding_is_found(codec: str) -> None:
    broken = [f"so {misread(word, codec)} it is" for word in WORDS]
    broken += [misread("It’s", codec), misread("\ufeffx", codec), misread("\ufffd", codec)]
    assert found(broken, "mojibake") == broken


def test_text_in_any_language_is_not_taken_for_broken() -> None:
    assert found([*WORDS, *MEANT, " ".join(WORDS), " ".join(MEANT)], "mojibake") == []


@given(st.lists(st.text("ab\n\r\u2028&;é&amp;" + "Ã©â€™", max_size=8), max_size=20), st.integers(0, 5))
def test_rows_are_those_of_a_search_in_each_text(texts: list[str], offset: int) -> None:
    whole = pa.array(texts, pa.string())
    part, left = whole.slice(offset), texts[offset:]
    rows = text_notes.rows(part)
    breaks = [i for i, text in enumerate(left) if "\n" in text or "\r" in text]
    entities = [i for i, text in enumerate(left) if "&amp;" in text]
    assert list(rows.get("line_breaks", [])) == breaks
    assert list(rows.get("html_entities", [])) == entities
    assert set(rows.get("mojibake", [])) >= {
        i for i, text in enumerate(left) if "Ã©" in text or "â€™" in text
    }


def noisy(folder: Path) -> Path:
    rows = [*some_rows(40), *((f"noisy {i} &amp; &lt;{i}&gt;", "joy") for i in range(3))]
    rows += [("two\nlines", "joy"), ("three\r\n\nlines &#39;", "anger"), ("donâ€™t", "joy")]
    return write_csv(folder / "posts.csv", rows)


def test_the_summary_notes_how_many_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(noisy(tmp_path)), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    head, noted = out.split("\n\n")[0].split("\nnoted\n")
    assert "46 posts read" in head
    lines = [re.split(r"  +", line.strip()) for line in noted.splitlines()]
    assert [(words.split(" (")[0], count) for words, count, *_ in lines] == [
        ("texts with line breaks", "2"),
        ("texts with HTML entities such as &amp;", "4"),
        ("texts with UTF-8 that was read as Latin-1", "1"),
    ]
    assert lines[1][2] == "posts.csv:42, posts.csv:43, posts.csv:44, posts.csv:46"
    index = read_index(open_store(str(tmp_path / "out")))
    assert {kind: index.source[kind] for kind in ("line_breaks", "html_entities", "mojibake")} == {
        "line_breaks": 2,
        "html_entities": 4,
        "mojibake": 1,
    }
    assert ("noisy 1 &amp; &lt;1&gt;", "joy") in {
        post[1:] for post in all_posts(open_store(str(tmp_path / "out")))
    }


def test_entities_become_characters_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = noisy(tmp_path)
    assert main(["prepare", str(source), str(tmp_path / "out"), "--unescape-html"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"mended\n  HTML entities, made characters +4  posts.csv:42", out)
    assert "such as &amp;" not in out
    texts = {text for _, text, _ in all_posts(open_store(str(tmp_path / "out")))}
    assert {"noisy 1 & <1>", "three\r\n\nlines '", "donâ€™t"} <= texts
    again = write_csv(tmp_path / "plain.csv", some_rows(40))
    prepare(again, str(tmp_path / "one"), unescape_html=True)
    prepare(again, str(tmp_path / "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_entities_stand_for_is_cleaned_like_other_text(tmp_path: Path) -> None:
    rows: list[Any] = [
        *some_rows(40),
        ("bell &#8; &#155; here", "joy"),
        ("Same &amp; text", "joy"),
        ("same & text", "joy"),
    ]
    source = write_csv(tmp_path / "posts.csv", [*rows, ("&nbsp;&#32;", "joy"), ("&amp;" * 30, "anger")])
    text = refusal(source, tmp_path / "out", unescape_html=True, max_chars=100)
    assert "no text  1  posts.csv:45" in text
    assert "too long" not in text
    result = prepare(source, str(tmp_path / "out"), unescape_html=True, max_chars=100, on_bad="drop")
    texts = {text for _, text, _ in all_posts(open_store(str(tmp_path / "out")))}
    assert {"bell  › here", "&" * 30} <= texts
    assert result.index.source["html_unescaped"] == 4
    assert result.index.source["repeated"] == 1


def test_notes_are_of_posts_that_are_kept(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"good {i}", "label": "ab"[i % 2]}) for i in range(20)]
    source = tmp_path / "posts.jsonl"
    source.write_text(
        "\n".join([*good, '{"text": "x\\ny &amp; Ã©", "label": ""}', '{"text": "x\\nz", "label": "a"}'])
    )
    index = prepare(source, str(tmp_path / "out"), on_bad="drop").index
    assert index.source["line_breaks"] == 1
    assert "html_entities" not in index.source
    assert "mojibake" not in index.source
