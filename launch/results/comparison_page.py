"""A comparison as one HTML file in the report's style: no script, no font, no request to anywhere.

It holds texts of posts where they can be read, at most 200 for each kind of flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from emotion_train.report.html_parts import bullets, fact_list, figure, page, section, table
from emotion_train.report.plots import differences_plot
from emotion_train.report.units import dollars, duration, rate, signed
from launch.results.comparison import Comparison, Flip, GroupFigures, Versus
from launch.results.comparison_words import (
    flips_words,
    how_counted,
    interval_words,
    p_words,
    runs_words,
    seed_words,
    verdict,
    what_it_takes,
)

_MARKS = {"better": ("good", "✓"), "open": ("open", "≈"), "worse": ("bad", "✗")}
_MOST_FLIPS = 200
_MOST_CHARACTERS = 600  # of a text


def render_html(comparison: Comparison) -> str:
    """The whole page. The same comparison gives the same text."""
    names = [group.name for group in comparison.groups]
    sections = [_head(comparison), section("Scores", _scores(comparison))]
    for versus in comparison.versus:
        title = f"{names[versus.group]} against {names[0]}"
        sections.append(section(f"Label by label: {title}", _labels(versus)))
        sections.append(section(f"Posts that flipped: {title}", _flips(comparison, versus)))
    sections += [
        section("Calibration", _calibration(comparison)),
        section("Cost and speed", _cost(comparison.groups)),
        section("Seeds", _seeds(comparison)) if comparison.seeds or comparison.versus else "",
        section("What differs", _differences(comparison)),
        section("How it was counted", bullets([*how_counted(comparison), *comparison.remarks])),
    ]
    return page(f"Comparison of {', '.join(names)}", sections)


def _head(comparison: Comparison) -> str:
    lines = []
    for versus in comparison.versus:
        css, mark = _MARKS[versus.outcome]
        lines.append(
            f'<h1 class="{css}"><span aria-hidden="true">{mark}</span>'
            f" {escape(verdict(comparison, versus))}</h1>"
        )
    if not lines:
        only = f"{comparison.groups[0].name}: one config, nothing to compare it with."
        lines.append(f'<h1 class="open"><span aria-hidden="true">≈</span> {escape(only)}</h1>')
    return (
        f"<header>\n<p class=run>Emotion classifiers compared on the same <b>{comparison.rows:,}"
        f" {escape(comparison.split)} posts</b></p>\n" + "\n".join(lines) + "\n</header>"
    )


def _scores(comparison: Comparison) -> str:
    versus_of = {versus.group: versus for versus in comparison.versus}
    rows = []
    for place, group in enumerate(comparison.groups):
        versus = versus_of.get(place)
        rows.append(
            (
                group.name,
                f"{group.macro_f1:.3f}",
                signed(versus.macro_f1.difference) if versus else "",
                interval_words(versus) if versus else "",
                p_words(versus.p) if versus else "",
                *(f"{score:.3f}" for score in group.scores.also.values()),
            )
        )
    also = comparison.groups[0].scores.also
    heads = ("model", "macro-F1", "difference", "95 % interval", "p", *also)
    plot = ""
    if comparison.versus:
        first = comparison.groups[0].name
        bars = [(comparison.groups[one.group].name, one.macro_f1) for one in comparison.versus]
        plot = figure(
            differences_plot([(name, paired.difference, paired.low, paired.high) for name, paired in bars]),
            f"Macro-F1 minus the macro-F1 of {first}, with its 95 % interval; where the interval holds 0, no"
            " difference can be shown.",
        )
    return plot + table(heads, rows)


def _labels(versus: Versus) -> str:
    rows = [
        (
            one.label,
            f"{one.support:,}",
            f"{one.first:.3f}",
            f"{one.second:.3f}",
            signed(one.paired.difference),
            f"{signed(one.paired.low)} to {signed(one.paired.high)}",
            p_words(one.p),
            "" if one.outcome == "open" else one.outcome,
        )
        for one in sorted(versus.labels, key=lambda one: -one.support)
    ]
    heads = ("label", "posts", "F1 before", "F1 now", "difference", "95 % interval", "p", "beyond chance")
    return table(heads, rows)


def _flips(comparison: Comparison, versus: Versus) -> str:
    flips = versus.flips
    parts = [f"<p>{escape(flips_words(comparison, versus))}</p>"]
    for title, some in (
        ("Right before, wrong now", flips.lost),
        ("Wrong before, right now", flips.won),
        ("Wrong in another way", flips.other),
    ):
        if some:
            parts.append(f"<h3>{title}: {len(some):,}</h3>{_flipped(some)}")
            if len(some) > _MOST_FLIPS:
                parts.append(f"<p>The {_MOST_FLIPS} with the largest change are shown.</p>")
    return "".join(parts)


def _flipped(flips: Sequence[Flip]) -> str:
    rows = [
        (
            _cut(flip.text) if flip.text is not None else f"post {flip.post_id}",
            flip.truth,
            flip.first,
            flip.second,
            f"{flip.first_probability:.2f}",
            f"{flip.second_probability:.2f}",
        )
        for flip in flips[:_MOST_FLIPS]
    ]
    heads = ("post", "truth", "before", "now", "its probability before", "now")
    return table(heads, rows, words=4, prose=0)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _calibration(comparison: Comparison) -> str:
    rows = []
    for group in comparison.groups:
        scores = group.scores
        figures = (*scores.losses.values(), scores.confidence, scores.came_true)
        rows.append((group.name, *(f"{figure:.3f}" for figure in figures)))
    what, came_true = (
        ("a label", "share of posts that have it")
        if comparison.targets == "several"
        else ("the predicted label", "accuracy")
    )
    heads = ("model", *comparison.groups[0].scores.losses, "mean probability", came_true)
    return (
        f"<p>Probabilities can be trusted where the mean probability of {what} is near the {came_true}, and"
        f" the calibration error is small.</p>{table(heads, rows)}"
    )


def _cost(groups: Sequence[GroupFigures]) -> str:
    rows = [
        (
            group.name,
            group.device or "–",
            "–" if group.seconds is None else duration(group.seconds),
            "–" if group.posts_per_second is None else rate(group.posts_per_second),
            "–" if group.tokens_per_second is None else rate(group.tokens_per_second),
            "–" if group.usd is None else dollars(group.usd),
        )
        for group in groups
    ]
    heads = ("model", "device", "training", "posts/s", "tokens/s", "cost of a run")
    return table(heads, rows, words=2)


def _seeds(comparison: Comparison) -> str:
    lines = [what_it_takes(comparison, versus) for versus in comparison.versus]
    names = [f"{comparison.groups[one.group].name}: " for one in comparison.versus]
    named = [f"{name}{line}" if len(lines) > 1 else line for name, line in zip(names, lines, strict=True)]
    return bullets([*named, *(f"{seed_words(spread)}." for spread in comparison.seeds)])


def _differences(comparison: Comparison) -> str:
    heads = ("", *(group.name for group in comparison.groups))
    parts = [fact_list((group.name, runs_words(group)) for group in comparison.groups)]
    for kind, rows in comparison.differences.items():
        if rows:
            cells = [(row.name, *row.values) for row in rows]
            parts.append(f"<h3>{kind.capitalize()}</h3>{table(heads, cells, words=len(heads))}")
        else:
            parts.append(f"<h3>{kind.capitalize()}</h3><p>Nothing that is known.</p>")
    return "".join(parts)
