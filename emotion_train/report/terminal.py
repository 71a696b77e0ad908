"""The report in a terminal: the verdict first, then the figures that a person would ask for
next.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from emotion_train.report.advice import next_steps
from emotion_train.report.chances import chance_sentences
from emotion_train.report.notes import notes
from emotion_train.report.old_posts import old_sentence
from emotion_train.report.plain import plain_sentence
from emotion_train.report.schema import WORDS, AnyFigures, Report, Scorecard
from emotion_train.report.scorecard import headline, of_the_training
from emotion_train.report.units import dollars, duration, memory, percent, rate, saving, signed

_STYLES = {
    "beaten": ("green", "✓"),
    "open": ("yellow", "≈"),
    "not beaten": ("red", "✗"),
    "doubtful": ("yellow", "?"),
}
_BAR = 16
_ROOM = 100  # columns that a table of several labels needs with bars


def print_report(report: Report, console: Console) -> None:
    split = report.splits[report.headline]
    console.print(Text(plain_sentence(split)))
    _print_verdict(report.verdict.outcome, report.verdict.sentence, report.verdict.advice, console)
    parts: tuple[RenderableType, ...] = (
        _floors(split),
        _per_label(split, console.width),
        *map(Text, notes(report.headline, split)),
        *map(Text, chance_sentences(report.temperature, report.gates, report.headline)),
        _facts(report, split),
    )
    _print_indented(parts, console)
    if report.old_posts is not None and report.identity.parent is not None:
        console.print(Text(old_sentence(report.identity.parent, report.old_posts)))
    _print_warnings(report.warnings, console)
    if report.try_next is not None and report.try_next != report.verdict.advice:
        console.print(Text(f"→ {report.try_next}"))


def print_scorecard(card: Scorecard, console: Console) -> None:
    split = card.figures
    if card.members:
        names = ", ".join(one.name for one in card.members)
        console.print(Text(f"{len(card.members)} adapters together: {names}"))
    _print_verdict(*headline(card), next_steps(split), console)
    if (told := of_the_training(card)) is not None:
        clean = card.trained_on is not None and not card.trained_on.posts
        mark = Text("  ") if clean else Text("! ", "yellow")
        console.print(mark + told)
        console.print()
    parts: tuple[RenderableType, ...] = (
        _floors(split),
        _per_label(split, console.width),
        *map(Text, notes(card.name, split)),
        *map(Text, chance_sentences(card.temperature, card.gates, card.name)),
        Text(_also(split), "dim"),
    )
    _print_indented(parts, console)
    _print_warnings(card.warnings, console)


def _print_verdict(outcome: str, sentence: str, advice: str | None, console: Console) -> None:
    style, mark = _STYLES[outcome]
    console.print(Text.assemble((f"{mark} ", f"bold {style}"), (sentence, "bold")))
    if advice is not None:
        console.print(Text.assemble(("→ ", style), advice))
    console.print()


def _print_indented(parts: Sequence[RenderableType], console: Console) -> None:
    """Print the parts with a margin, wrapped at the console's width: rich cuts off what it indents
    and may not wrap.
    """
    for part in parts:
        console.print(Padding(part, (0, 0, 1, 2)), soft_wrap=False)


def _print_warnings(warnings: Sequence[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text.assemble(("! ", "yellow"), warning))


def _floors(split: AnyFigures) -> Table:
    table = _table("macro-F1", right=("", "95 % interval", "model ahead by", "95 % interval"))
    table.add_row(
        "this model",
        Text(f"{split.macro_f1:.3f}", "bold"),
        _span(f"{split.macro_f1_low:.3f}", f"{split.macro_f1_high:.3f}"),
        "",
        "",
    )
    for floor in split.floors:
        interval = _span(signed(floor.difference_low), signed(floor.difference_high))
        table.add_row(floor.name, f"{floor.macro_f1:.3f}", "", signed(floor.difference), interval)
    return table


def _per_label(split: AnyFigures, width: int) -> Table:
    also = [WORDS[field] for field in split.per_label[0].also]
    table = _table("label", right=("posts", "precision", "recall", "F1", *also))
    if bars := not also or width >= _ROOM:  # else they would shorten labels and figures
        table.add_column("")
    for one in sorted(split.per_label, key=lambda one: -one.support):
        bar = Text("█" * round(one.f1 * _BAR), "cyan")
        table.add_row(
            Text(one.label),
            f"{one.support:,}",
            f"{one.precision:.2f}",
            f"{one.recall:.2f}",
            f"{one.f1:.2f}",
            *(f"{value:.2f}" for value in one.also.values()),
            *([bar] if bars else []),
        )
    return table


def _also(split: AnyFigures) -> str:
    figures = split.also | split.of_probabilities
    return ", ".join(f"{WORDS[field]} {value:.3f}" for field, value in figures.items())


def _facts(report: Report, split: AnyFigures) -> Table:
    speed = report.speed
    held = "on the fullest GPU" if speed.memory_kind == "GPU" else "resident"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("also", _also(split))
    table.add_row(
        "speed",
        f"{rate(speed.posts_per_second)} posts/s, {rate(speed.tokens_per_second)} tokens/s,"
        f" {percent(speed.padding_share)} padding",
    )
    table.add_row(
        "time",
        f"{duration(speed.train_seconds)} training, {duration(speed.evaluation_seconds)} evaluation,"
        f" {duration(speed.wall_seconds)} in all",
    )
    table.add_row(
        "checkpoints", saving(speed.saves, speed.stall_seconds, speed.train_seconds, speed.upload_seconds)
    )
    table.add_row("memory", f"{memory(speed.peak_memory_bytes)} {held}")
    for name, cut in report.cuts.items():
        lost = f"{cut.lost_words} of their tokens"
        what = f"{cut.share_words} of the {name} posts, {lost}" if cut.cut_posts else f"no {name} post"
        table.add_row("cut", f"{what}, at {cut.max_length} tokens; {cut.advice()}")
    if speed.usd is not None and speed.usd_per_hour is not None:
        table.add_row("cost", f"{dollars(speed.usd)} at {dollars(speed.usd_per_hour)} an hour")
    return table


def _table(first: str, right: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _span(low: str, high: str) -> str:
    return f"{low} to {high}"
