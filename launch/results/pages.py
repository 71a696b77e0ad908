"""The table of runs, the page of one run, and the same page while the run trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from emotion_train.console import Terminal, counted
from emotion_train.errors import StorageError
from emotion_train.progress import LINE_EVERY_S, rough
from emotion_train.runs.log import Entry
from emotion_train.storage.store import Store
from launch.gpus import kind_of
from launch.results.history import RunFacts, facts_of, follow, list_runs, progress_line, story

WIDE = 160  # columns of a table that goes to a file or a pipe
_LINES_WATCHED = 20


def a_console() -> Console:
    """A console as wide as the terminal, or wide where there is none."""
    return Terminal(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)


def print_whole(console: Console, table: Table) -> None:
    """Print a table without cutting a cell: on a narrow terminal its lines wrap."""
    needed = console.measure(table, options=console.options.update(max_width=10 * WIDE)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def print_runs(store: Store, console: Console) -> None:
    now = datetime.now(UTC)
    rows = list_runs(store, now)
    if not rows:
        is_run = any(store.list("log/"))
        advice = f", which is a run itself; type emotion-launch show {store.url}" if is_run else ""
        console.print(f"no runs at {store.url}{advice}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("run", "left"),
        ("state", "left"),
        ("step", "right"),
        ("macro-F1", "right"),
        ("on", "left"),
        ("base", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name in ("run", "state"))  # type: ignore[arg-type]
    table.add_column("GPU")
    for name in ("age", "newest", "hours", "$ so far"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, now))
    print_whole(console, table)


def _cells(row: RunFacts, now: datetime) -> list[str]:
    return [
        row.run_id,
        _state(row),
        _step(row),
        f"{row.macro_f1:.3f}" if row.macro_f1 is not None else "-",
        row.split or "-",
        (row.base or "-").rstrip("/").rpartition("/")[2],
        _short(row.gpu),
        _age(row.started, now),
        _age(row.updated, now),
        f"{row.hours:.1f}" if row.hours is not None else "-",
        _dollars(row),
    ]


def _state(row: RunFacts) -> str:
    return f"{row.state} (smoke)" if row.smoke else row.state


def _dollars(row: RunFacts) -> str:
    """Dollars over all starts, after `>` where a start has no known price."""
    if row.usd is None:
        return "-"
    return f"{'> ' if row.unpriced else ''}{row.usd:.2f}"


def _short(gpu: str | None) -> str:
    """`2 x H100` for `2 x NVIDIA H100 80GB HBM3`."""
    if gpu is None:
        return "-"
    count, times, device = gpu.rpartition(" x ")
    kind = kind_of(device)
    return f"{count}{times}{kind.name if kind is not None else device}"


def _step(row: RunFacts) -> str:
    if row.step is None:
        return "-"
    return f"{row.step:,}" + (f" of {row.steps:,}" if row.steps is not None else "")


def _age(then: datetime | None, now: datetime) -> str:
    return "-" if then is None else rough(max(0.0, (now - then).total_seconds()))


def page(
    store: Store, run_id: str, entries: Sequence[Entry], now: datetime, lines: int | None = None
) -> RenderableType:
    """The page of a run: a few facts, then its story, of which only the newest `lines` where that
    is given.
    """
    facts = facts_of(run_id, entries, now)
    head = Table.grid(padding=(0, 2))
    training = progress_line(entries, now) if facts.state == "training" else None
    checkpoints = sum(entry.kind == "checkpoint" for entry in entries)
    written = "entry" if len(entries) == 1 else "entries"
    for name, value in (
        ("run", f"{store.url}/{run_id}"),
        ("state", f"{_state(facts)}, newest entry {_age(facts.updated, now)} old"),
        ("step", _step(facts)),
        *([("progress", training.partition(": ")[2])] if training is not None else []),
        ("macro-F1", f"{facts.macro_f1:.4f} on {facts.split}" if facts.macro_f1 is not None else "-"),
        ("base", _base(facts)),
        ("GPU", facts.gpu or "-"),
        ("held", f"{facts.hours:.2f} hours in {counted(facts.starts, 'start')}"),
        ("so far", _spent(facts)),
        ("log", f"{len(entries):,} {written}, {counted(checkpoints, 'checkpoint')}"),
    ):
        head.add_row(Text(name, style="bold"), Text(value))
    told = story(entries)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("entry", justify="right")
    table.add_column("step", justify="right")
    table.add_column("")
    for entry, words in told if lines is None else told[-lines:]:
        table.add_row(entry.time_utc[:19].replace("T", " "), str(entry.seq), f"{entry.step:,}", Text(words))
    return Group(head, "", table)


def _base(facts: RunFacts) -> str:
    base = facts.base or "-"
    return base if facts.layers is None else f"{base}, model.layers={facts.layers}"


def _spent(facts: RunFacts) -> str:
    """Dollars over all starts, and how many starts have no known price."""
    if facts.usd is None:
        return "- (the price of its machines is not known; report.usd_per_hour=N gives one)"
    less = f", without {facts.unpriced} of {facts.starts} starts that have no price" if facts.unpriced else ""
    return f"${facts.usd:.2f} over {counted(facts.starts, 'start')}{less}"


def show(store: Store, run_id: str, console: Console) -> None:
    """Print the page of a run. Raises `WrongRequest` when there is no such run."""
    entries = next(follow(store, run_id, 0.0))
    if isinstance(entries, StorageError):
        raise entries
    console.print(page(store, run_id, entries, datetime.now(UTC)))


def watch(
    store: Store, run_id: str, every_s: float, console: Console, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show the page and renew it until the run is published; without a terminal, print a line for
    each new entry and every 30 s the trainer's own line.
    """
    entries: list[Entry] = []
    trouble = ""
    if not console.is_terminal:
        _print_as_it_comes(store, run_id, every_s, console, sleep)
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:
        for new in follow(store, run_id, every_s, sleep):
            if isinstance(new, StorageError):
                trouble = f"asked again in {every_s:g} s: {new}"
            else:
                entries, trouble = entries + new, ""
            if entries:
                now = datetime.now(UTC)
                live.update(
                    Group(page(store, run_id, entries, now, _LINES_WATCHED), Text(trouble, style="yellow")),
                    refresh=True,
                )


def _print_as_it_comes(
    store: Store,
    run_id: str,
    every_s: float,
    console: Console,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    entries: list[Entry] = []
    told: str | None = None
    last = clock() - LINE_EVERY_S
    for new in follow(store, run_id, every_s, sleep):
        if isinstance(new, StorageError):
            console.print(f"asked again in {every_s:g} s: {new}")
            continue
        entries += new
        for entry, words in story(entries):
            if entry in new:
                console.print(
                    f"{entry.time_utc[:19].replace('T', ' ')}  {entry.seq:>6}  step {entry.step:>7,}  {words}"
                )
        if clock() - last >= LINE_EVERY_S:
            last = clock()
            if (line := progress_line(entries, datetime.now(UTC))) is not None and line != told:
                console.print(line)
                told = line
