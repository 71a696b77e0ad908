"""The report's sections for posts with several labels: labels that are missed and added, and labels
that occur together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from emotion_train.report.html_parts import figure, section, table
from emotion_train.report.plots import MOST_PLOTTED, pairs_plot
from emotion_train.report.schema import SetFigures, SetLabelFigures
from emotion_train.report.units import percent

_LISTED = 12


def mistaken_section(split: SetFigures) -> str:
    """The section on labels that are missed where others are added."""
    title = "Confusions: labels missed where others are added"
    if not split.mistaken:
        return section(title, "<p>No post misses a label and gets another.</p>")
    missed = {one.label: one.support - round(one.recall * one.support) for one in split.per_label}
    plot = _plot(
        split,
        {(one.missed, one.added): one.posts for one in split.mistaken},
        missed,
        ("missed", "added"),
        "Posts that miss one label and get another",
    )
    caption = (
        "Posts whose true label (row) was missed, by a wrong label that they were answered with (column);"
        " stronger colour, larger share of the posts that miss the row's label."
    )
    rows = [
        (one.missed, one.added, f"{one.posts:,}", percent(one.posts / missed[one.missed]))
        for one in split.mistaken[:_LISTED]
    ]
    heads = ("missed", "added", "posts", "of those that miss it")
    return section(title, figure(plot, caption) + table(heads, rows, words=2))


def together_section(split: SetFigures) -> str:
    """The section on labels that posts have together, and are answered with together."""
    title = "Labels that occur together"
    if not split.together:
        return section(title, "<p>No post has two labels, and none was answered with two.</p>")
    support = {one.label: one.support for one in split.per_label}
    pairs = {(one.first, one.second): one.posts for one in split.together}
    plot = _plot(
        split,
        pairs | {(second, first): posts for (first, second), posts in pairs.items()},
        support,
        ("label", "other label"),
        "Posts that have two labels",
    )
    caption = (
        "Posts that have both labels; stronger colour, larger share of the posts that have the row's label."
    )
    rows = [
        (one.first, one.second, f"{one.posts:,}", f"{one.answered:,}") for one in split.together[:_LISTED]
    ]
    heads = ("label", "other label", "posts have both", "answered with both")
    return section(title, figure(plot, caption) + table(heads, rows, words=2))


def _plot(
    split: SetFigures,
    posts: Mapping[tuple[str, str], int],
    of: Mapping[str, int],
    axes: tuple[str, str],
    words: str,
) -> str:
    shown = _most_frequent(split.per_label)
    counts = [[posts.get((row, column), 0) for column in shown] for row in shown]
    return pairs_plot(
        shown,
        counts,
        [of[label] for label in shown],
        axes,
        f"{words}; the most frequent pairs are listed below",
    )


def _most_frequent(per_label: Sequence[SetLabelFigures]) -> list[str]:
    ordered: Iterable[SetLabelFigures] = sorted(per_label, key=lambda one: -one.support)
    return [one.label for one in ordered][:MOST_PLOTTED]
