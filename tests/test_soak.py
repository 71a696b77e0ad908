"""The soak of benchmarks/, made small: no kill tears, loses or forks a run, and without create-only
writes the same soak finds the harm.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"
VIOLATIONS = ("torn", "acknowledged but lost or changed", "forks", "endings that are not in the contract")


def soak(*words: str) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """The rows of its table."""
    done = subprocess.run(
        [sys.executable, SOAK, *words], capture_output=True, text=True, check=False, timeout=600
    )
    return dict(re.findall(r"^\| (.+) \| (.+) \|$", done.stdout, re.M)), done


@pytest.mark.slow
def test_writers_that_are_killed_stopped_and_doubled_lose_tear_and_fork_nothing() -> None:
    rows, done = soak("--kills", "36", "--seed", "3")
    assert [rows.get(name) for name in VIOLATIONS] == ["0"] * 4, done.stdout + done.stderr
    assert done.returncode == 0
    assert int(rows["writers killed (SIGKILL)"]) >= 36
    for name in (
        "zombies (SIGSTOP, successor, SIGCONT)",
        "pairs started at once",
        "server killed",
        "runs",
        "acknowledged entries compared",
    ):
        assert int(rows[name]) >= 1, name


@pytest.mark.slow
def test_the_same_soak_finds_the_harm_when_entries_are_not_create_only() -> None:
    rows, done = soak("--kills", "12", "--seed", "3", "--unconditional")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(rows["acknowledged but lost or changed"]) >= 1
    assert int(rows["forks"]) >= 1
