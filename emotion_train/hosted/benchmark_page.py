"""A benchmark in the terminal and as one HTML page: the table, its conclusions, F1 by label."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emotion_train.hosted.figures import NO_LABEL, Benchmark, SystemFigures
from emotion_train.report.html_parts import bullets, fact_list, page, section, table
from emotion_train.report.units import dollars, rate, signed

HEADS = (
    "model",
    "macro-F1",
    "95 % interval",
    "to the adapter",
    "95 % interval",
    "refused",
    "filtered",
    "cut",
    "unparseable",
    "failed",
    "$",
    "$ per 1M posts",
    "p50 s",
    "p95 s",
    "posts/s",
)
_PARTS = (range(1, 5), range(5, 10), range(10, 15))  # columns that a terminal has room for at once


def cells(benchmark: Benchmark) -> Iterator[list[str]]:
    """One row per classifier; a hosted model with posts unanswered has a second row, for those that
    it answered.
    """
    facts = benchmark.own_facts
    a_million = facts.get("usd_per_million_posts")
    yield [
        *_scores(f"adapter {benchmark.own.name}", benchmark.own),
        *[""] * 6,
        "" if a_million is None else dollars(a_million),
        *("" if facts.get(name) is None else f"{facts[name]:.3f}" for name in ("p50_s", "p95_s")),
        "" if not facts.get("posts_per_second") else rate(facts["posts_per_second"]),
    ]
    for model in benchmark.hosted:
        yield _hosted_row(model)
        if model.answered_macro_f1 is not None:
            yield [
                f"  of {model.answered:,} that it answered",
                f"{model.answered_macro_f1:.3f}",
                f"{model.answered_low:.3f} to {model.answered_high:.3f}",
                *[""] * 12,
            ]
    for floor in benchmark.floors:
        yield [*_scores(f"floor: {floor.name}", floor), *[""] * 10]


def _scores(name: str, figures: SystemFigures) -> list[str]:
    versus = ["", ""]
    if (apart := figures.difference) is not None:
        versus = [signed(apart.value), f"{signed(apart.low)} to {signed(apart.high)}"]
    return [name, f"{figures.macro_f1:.3f}", f"{figures.low:.3f} to {figures.high:.3f}", *versus]


def _hosted_row(model: SystemFigures) -> list[str]:
    counts = [
        f"{model.outcomes.get(name, 0):,}" for name in ("refused", "filtered", "cut", "unparseable", "failed")
    ]
    money = ["", ""]
    if model.money is not None:
        money = [dollars(model.money.usd), dollars(model.money.usd_per_million_posts)]
    speed = ["", "", ""]
    if model.speed is not None:
        speed = [
            f"{model.speed.p50_s:.2f}",
            f"{model.speed.p95_s:.2f}",
            f"{rate(model.speed.posts_per_second)} at {model.speed.concurrency:.0f}",
        ]
    return [*_scores(model.name, model), *counts, *money, *speed]


def title_of(benchmark: Benchmark) -> str:
    some = "" if benchmark.rows == benchmark.of else f" of {benchmark.of:,}"
    return f"{benchmark.rows:,}{some} posts of {benchmark.split}, {benchmark.data_url}"


def print_benchmark(benchmark: Benchmark, console: Console) -> None:
    console.print(Text(title_of(benchmark), "bold"))
    rows = list(cells(benchmark))
    for columns in _PARTS:
        shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        shown.add_column(HEADS[0], overflow="fold")
        for place in columns:
            shown.add_column(HEADS[place], justify="right", no_wrap=True)
        for row in rows:
            if any(row[place] for place in columns):
                shown.add_row(Text(row[0]), *(Text(row[place]) for place in columns))
        console.print(shown)
        console.print()
    for sentence in benchmark.sentences:
        console.print(Text(f"- {sentence}"))


def render_html(benchmark: Benchmark) -> str:
    """The whole page; its parts escape text from outside."""
    everyone = (benchmark.own, *benchmark.hosted, *benchmark.floors)
    by_label = table(
        ("label", *(one.name for one in everyone)),
        (
            (label, *(f"{one.f1_by_label[place]:.3f}" for one in everyone))
            for place, label in enumerate(benchmark.labels)
        ),
    )
    facts = [
        ("data set", benchmark.data_url),
        ("split", f"{benchmark.split}, {benchmark.rows:,} of {benchmark.of:,} posts"),
        ("targets", benchmark.targets),
        ("examples of each label", str(benchmark.shots)),
        ("seed", str(benchmark.seed)),
        ("sha256 of the prompts", benchmark.prompt_sha256),
        *(
            (f"{one.name} answered as", ", ".join(one.returned_models) or "unknown")
            for one in benchmark.hosted
        ),
        *((f"{one.name} takes", _form_words(one)) for one in benchmark.hosted if one.form),
    ]
    confusions = [
        section(
            f"Confusion of {one.name}",
            table(
                ("truth", *benchmark.labels, NO_LABEL),
                (
                    (label, *(f"{count:,}" for count in row))
                    for label, row in zip(benchmark.labels, one.confusion, strict=True)
                ),
            ),
        )
        for one in benchmark.hosted
        if one.confusion is not None
    ]
    return page(
        f"Benchmark: {title_of(benchmark)}",
        [
            f"<h1>{'Hosted models against the adapter'}</h1>",
            section("Scores", table(HEADS, cells(benchmark))),
            section("What this says", bullets(benchmark.sentences)),
            section("F1 by label", by_label),
            *confusions,
            section("Facts", fact_list(facts)),
        ],
    )


def _form_words(one: SystemFigures) -> str:
    form = one.form or {}
    lacks = [name for name in ("temperature", "seed") if not form.get(name)]
    without = f", no {' and no '.join(lacks)}" if lacks else ""
    return f"response_format {form.get('response_format')}, {form.get('max_tokens')}{without}"
