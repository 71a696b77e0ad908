"""A comparison in a terminal: the verdicts, then the figures behind them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emotion_train.report.units import dollars, duration, rate, signed
from launch.results.comparison import Comparison, Flip, Versus
from launch.results.comparison_words import (
    flips_words,
    how_counted,
    interval_words,
    p_words,
    seed_words,
    verdict,
    what_it_takes,
)
from launch.results.pages import print_whole

_STYLES = {"better": ("green", "✓"), "open": ("yellow", "≈"), "worse": ("red", "✗")}
_FLIPS = 3  # texts of each kind; the page has more
_TEXT = 90


def print_comparison(comparison: Comparison, console: Console) -> None:
    for versus in comparison.versus:
        style, mark = _STYLES[versus.outcome]
        console.print(Text.assemble((f"{mark} ", f"bold {style}"), (verdict(comparison, versus), "bold")))
    if not comparison.versus:
        console.print(Text(f"{comparison.groups[0].name}: one config, nothing to compare it with.", "bold"))
    console.print()
    print_whole(console, _groups(comparison))
    console.print()
    for versus in comparison.versus:
        _print_versus(comparison, versus, console)
    for spread in comparison.seeds:
        console.print(Text(f"seeds of {seed_words(spread)}"))
    for kind, rows in comparison.differences.items():
        if rows:
            heads = (f"differs in {kind}", *(group.name for group in comparison.groups))
            print_whole(console, _table(heads, [(row.name, *row.values) for row in rows], right=False))
            console.print()
    for line in how_counted(comparison):
        console.print(Text(line, "dim"))
    for remark in comparison.remarks:
        console.print(Text.assemble(("! ", "yellow"), remark))


def _groups(comparison: Comparison) -> Table:
    first = comparison.groups[0].scores
    differences = {versus.group: versus for versus in comparison.versus}
    rows = []
    for place, group in enumerate(comparison.groups):
        versus = differences.get(place)
        rows.append(
            (
                group.name,
                f"{group.macro_f1:.3f}",
                signed(versus.macro_f1.difference) if versus else "",
                interval_words(versus) if versus else "",
                p_words(versus.p) if versus else "",
                *(f"{score:.3f}" for score in (*group.scores.also.values(), *group.scores.losses.values())),
                "-" if group.posts_per_second is None else rate(group.posts_per_second),
                "-" if group.seconds is None else duration(group.seconds),
                "-" if group.usd is None else dollars(group.usd),
            )
        )
    heads = (
        f"{comparison.rows:,} {comparison.split} posts",
        "macro-F1",
        "difference",
        "95 % interval",
        "p",
        *first.also,
        *first.losses,
        "posts/s",
        "training",
        "cost of a run",
    )
    return _table(heads, rows)


def _print_versus(comparison: Comparison, versus: Versus, console: Console) -> None:
    first, second = comparison.groups[0].name, comparison.groups[versus.group].name
    console.print(Text(f"{second} against {first}", "bold"))
    rows = [
        (
            one.label,
            f"{one.support:,}",
            f"{one.first:.2f}",
            f"{one.second:.2f}",
            signed(one.paired.difference),
            f"{signed(one.paired.low)} to {signed(one.paired.high)}",
            p_words(one.p),
        )
        for one in sorted(versus.labels, key=lambda one: -one.support)
    ]
    heads = ("label", "posts", "F1 before", "F1 now", "difference", "95 % interval", "p")
    print_whole(console, _table(heads, rows))
    console.print(Text(flips_words(comparison, versus)))
    for kind, flips in (("lost", versus.flips.lost), ("won", versus.flips.won)):
        for flip in flips[:_FLIPS]:
            console.print(Text(f"  {kind}: {_flip(flip)}", "dim"))
    console.print(Text(what_it_takes(comparison, versus)))
    console.print()


def _flip(flip: Flip) -> str:
    text = flip.text or f"post {flip.post_id}"
    text = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
    return f"{flip.truth}, {flip.first} → {flip.second}: {text}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if right and place else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
