"""The plan against an NVIDIA GPU: four blocks of the real width take the memory that is planned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY_PLAN = Path(__file__).parents[3] / "benchmarks" / "memory_plan.py"


@pytest.mark.gpu
def test_the_planned_memory_is_within_10_percent_of_what_is_taken() -> None:
    done = subprocess.run(
        [sys.executable, MEMORY_PLAN, "--only", "4"], capture_output=True, text=True, check=False, timeout=600
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith(("| nf4", "| bf16", "| fp8"))
    ]
    assert len(rows) >= 7, done.stdout + done.stderr
    assert all(abs(float(row[8].rstrip("%"))) < 10 for row in rows), done.stdout
