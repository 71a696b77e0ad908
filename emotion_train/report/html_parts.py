"""The pieces of HTML pages: sections, tables, lists of facts, and the page around them.

All text is escaped here; a content security policy forbids scripts, fonts and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from emotion_train.report.stylesheet import STYLESHEET


def page(title: str, sections: Iterable[str]) -> str:
    """The whole page; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport"'
        ' content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light'
        ' dark">\n<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        f" 'unsafe-inline'\">\n<title>{escape(title)}</title>\n<style>{STYLESHEET}</style>\n</head>\n"
        + "<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def figure(plot: str, caption: str) -> str:
    return f'<figure><div class="wide">{plot}</div><figcaption>{escape(caption)}</figcaption></figure>'


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="facts">'
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        + "</dl>"
    )


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: int = 1,
    total: bool = False,
    prose: int | None = None,
) -> str:
    """A table whose first `words` columns are text and the others numbers; the first column heads
    its row. Column `prose` holds sentences, which wrap. On a narrow screen a row of more than three
    columns becomes a list with the heads beside the values.
    """

    def css(column: int) -> str:
        return ' class="word prose"' if column == prose else " class=word" if column < words else ""

    def said(column: int) -> str:
        return f' data-head="{escape(heads[column])}"'

    classes = " ".join([*(["total"] if total else []), *(["stack"] if len(heads) > 3 else [])])
    head = "".join(f'<th scope="col"{css(i)}>{escape(name)}</th>' for i, name in enumerate(heads))
    body = "".join(
        f'<tr><th scope="row"{css(0)}{"" if words else said(0)}>{escape(first)}</th>'
        + "".join(f"<td{css(i)}{said(i)}>{escape(value)}</td>" for i, value in enumerate(rest, 1))
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table class="{classes}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
