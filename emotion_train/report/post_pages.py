"""The report's sections on single posts: the model's surest mistakes, and the posts that look
mislabelled.

Texts are strangers' words: they are escaped, and control characters are spelled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from emotion_train.console import counted, shown
from emotion_train.report.html_parts import section
from emotion_train.report.posts import MISLABELLED
from emotion_train.report.schema import Example, Mistakes, Report
from emotion_train.report.units import percent


def mistakes_section(report: Report) -> str:
    """The most frequent pairs of labels with the surest mistakes; empty where no text is shown."""
    pairs = [pair for pair in report.mistakes if pair.examples]
    if not pairs:
        return ""
    several = report.targets == "several"
    support = {one.label: one.support for one in report.splits[report.headline].per_label}
    parts = [
        f"<div><h3>{escape(pair_words(pair))} <small>{escape(_how_many(pair, support))}</small></h3>"
        + _posts((one.text, _answered(one, several)) for one in pair.examples)
        + "</div>"
        for pair in pairs
    ]
    words = (
        f"<p>{escape(report.headline.capitalize())} posts by true label and answer, most frequent pair"
        " first; each pair shows the mistakes that the model was surest of, with its probability.</p>"
    )
    return section("Most confident mistakes", words + f'<div class="pairs">{"".join(parts)}</div>')


def mislabelled_section(report: Report) -> str:
    """The posts that look mislabelled, and how to mend them; empty where labels are not doubted."""
    found = report.mislabelled
    if found is None:
        return ""
    title = "Posts that look mislabelled"
    if not found.posts:
        return section(title, f"<p>None of the {found.of:,} held-out posts looks mislabelled.</p>")
    words = (
        f"<p>On {found.posts:,} of {found.of:,} held-out posts ({percent(found.posts / found.of)}) the model,"
        " which did not learn from them, is surer of other labels than it usually is where those are right"
        " (confident learning). Many are its own mistakes; the first ones are worth a look. All are in"
        f" <code>{MISLABELLED}</code> beside this report: write the right label into the column"
        f" <code>corrected</code> and type <code>emotion-train prepare … --corrections {MISLABELLED}</code>."
        "</p>"
    )
    shown_posts = _posts(
        (
            one.text,
            f"{one.split}: has {_listed(one.labels)}; the model suggests {_listed(one.suggested)}",
        )
        for one in found.examples
    )
    return section(title, words + (shown_posts if found.examples else ""))


def pair_words(pair: Mistakes) -> str:
    """`anger → annoyance`, or the label that was only missed or only added."""
    if pair.missed is None:
        return f"{pair.added} added"
    return f"{pair.missed} missed" if pair.added is None else f"{pair.missed} → {pair.added}"


def _how_many(pair: Mistakes, support: dict[str, int]) -> str:
    posts = counted(pair.posts, "post")
    if pair.missed is None or not support.get(pair.missed):
        return posts
    return f"{posts}, {percent(pair.posts / support[pair.missed])} of those with {pair.missed}"


def _answered(one: Example, several: bool) -> str:
    if not several:
        return f"{one.answer[0]} {one.probability:.2f}"
    return f"has {_listed(one.labels)}; answered {_listed(one.answer)} {one.probability:.2f}"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "none"


def _posts(posts: Iterable[tuple[str, str]]) -> str:
    """A list of texts, each with its remark."""
    items = "".join(f"<li>{escape(shown(text))}<small>{escape(said)}</small></li>" for text, said in posts)
    return f'<ul class="posts">{items}</ul>'
