"""The soaks of benchmarks/, made small: no kill tears, loses or forks a run, or breaks a data set;
without create-only writes the same soaks find the harm.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"
PREPARE_SOAK = SOAK.with_name("prepare_soak.py")
FRONT_DOOR_SOAK = SOAK.with_name("front_door_soak.py")
LABEL_SOAK = SOAK.with_name("label_soak.py")
VIOLATIONS = ("torn", "acknowledged but lost or changed", "forks", "endings that are not in the contract")


def soak(
    *words: str, page: Path = SOAK, timeout_s: float = 600
) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """The rows of its table."""
    done = subprocess.run(
        [sys.executable, page, *words], capture_output=True, text=True, check=False, timeout=timeout_s
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


@pytest.mark.slow
def test_prepares_that_are_killed_doubled_and_in_each_other_s_way_leave_whole_data_sets() -> None:
    rows, done = soak("--places", "3", "--seed", "1", page=PREPARE_SOAK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows["looks at data sets that were not whole"] == "0"
    assert rows["endings that are not in the contract"] == "0"
    assert int(rows["of these killed (SIGKILL)"]) >= 2
    assert int(rows["objects deleted by the soak"]) >= 1


@pytest.mark.slow
def test_the_same_soak_finds_broken_data_sets_when_objects_are_overwritten() -> None:
    rows, done = soak("--places", "2", "--overwriting", page=PREPARE_SOAK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(rows["looks at data sets that were not whole"]) >= 1


@pytest.mark.slow
def test_the_command_that_a_person_types_keeps_its_word_whatever_happens_to_it() -> None:
    words = ("--disturbances", "24", "--seed", "1")
    rows, done = soak(*words, page=FRONT_DOOR_SOAK, timeout_s=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(rows["disturbances"]) >= 24
    names = (
        "torn",
        "forks",
        "steps trained on other posts than the order's",
        "endings that are not in the contract",
    )
    assert [rows[name] for name in names] == ["0"] * 4
    assert rows["results that differ from the undisturbed run's"] == "0"
    assert rows["processes left 15 s after their launcher"] == "0"
    here = rows["starts of `emotion-launch run` / of these one process becomes the trainer"]
    assert int(here.partition(" / ")[2]) >= 1
    assert "1-processes" in rows["runs"]
    assert "2-processes" in rows["runs"]


@pytest.mark.slow
def test_workers_that_are_killed_stopped_and_cut_off_label_each_post_once() -> None:
    words = ("--kills", "24", "--workers", "4", "--posts", "1000")
    rows, done = soak(*words, "--seed", "2", page=LABEL_SOAK, timeout_s=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(rows["SIGKILL"]) >= 24
    for name in ("posts without a label", "posts twice", "parts written again"):
        assert rows[name] == "0"


@pytest.mark.slow
def test_the_same_soak_finds_parts_that_are_written_again_when_they_are_not_create_only() -> None:
    words = ("--kills", "24", "--workers", "4", "--posts", "1000", "--unconditional")
    rows, done = soak(*words, "--seed", "2", page=LABEL_SOAK, timeout_s=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(rows["parts written again"]) >= 1
