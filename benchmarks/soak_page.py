"""What the soaks have in common: where a log is not one line, and the table that they print."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from emotion_train.processes.machine import device_name, versions
from emotion_train.runs.log import Entry


def broken_line(log: Sequence[Entry]) -> list[str]:
    """Where a log is not one line: an entry of a fenced writer, a step done again after it was
    committed, two ends.
    """
    found = []
    owner: Entry | None = None
    newest = (-1, False)
    for entry in log:
        if entry.kind == "claim":
            owner = entry
        if owner is None or (entry.incarnation, entry.nonce) != (owner.seq, owner.nonce):
            found.append(
                f"entry {entry.seq} is of writer {entry.incarnation}, and {owner.seq if owner else 'nobody'}"
                " had the run"
            )
        if entry.kind == "checkpoint":
            place = (entry.step, "macro_f1" in entry.metrics)  # a state may be saved before it is scored
            if place <= newest:
                found.append(f"entry {entry.seq} commits step {entry.step} after step {newest[0]}")
            newest = place
        if entry.kind == "final" and entry is not log[-1]:
            found.append(f"entry {entry.seq + 1} comes after the final one")
    return found


def markdown(rows: Mapping[str, object], seconds: float) -> str:
    """A table of two columns, and below it how long it took, where, when and with what."""
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            "| | |",
            "|---|--:|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            f"{seconds / 60:.1f} minutes; {device_name('cpu')}; {datetime.now(UTC):%Y-%m-%d}; {used}",
        ]
    )


def tell(violations: Mapping[str, Sequence[str]]) -> list[str]:
    """All of them in words; the first twenty are printed."""
    found = [f"{name}: {words}" for name, all_words in violations.items() for words in all_words]
    for line in found[:20]:
        print(line, file=sys.stderr)
    return found
