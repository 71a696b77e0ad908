"""`emotion-launch distil --as-jobs` by real managed jobs: killed while the teachers train, and
typed again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emotion_train.config import example_config
from emotion_train.data.index import read_index
from emotion_train.runs.log import read_log, run_ids
from emotion_train.storage.open import open_store
from tests.helpers.launcher import PATIENCE_S, WORDS, Launcher
from tests.helpers.slurm_site import ROOT, SKY_ENV

pytestmark = pytest.mark.cloud
BUCKET = "s3://distilled"
TEACHERS = ["taught-fold-0-of-2-seed-42", "taught-fold-1-of-2-seed-42"]


def test_teachers_and_student_are_jobs_and_none_is_started_twice_although_the_command_is_killed(
    launcher: Launcher, tmp_path: Path
) -> None:
    keys = launcher.s3.env()
    launcher.s3.create_bucket(BUCKET.removeprefix("s3://"))
    secrets = " ".join(
        f"--secret {name}={keys[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    )
    values = [word for word in WORDS if not word.startswith("run.")]
    line = [sys.executable, "-m", "launch.cli", "distil", "--as-jobs", "--folds", "2", "--seeds", "1"]
    line += ["--gpus", "H200:1", "--yes", "--config", str(example_config().relative_to(ROOT))]
    line += ["--sky", f"--infra slurm --no-use-spot --env DEVICE=cpu {secrets}", "--to", f"{BUCKET}/made"]
    line += [f"data.url={launcher.posts_url}", f"run.output_url={BUCKET}/runs", "run.id=taught"]
    line += [f"model.base={launcher.base}", *values, "train.epochs=1"]
    environment = {**launcher.site.sky_environment, **keys, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{SKY_ENV / 'bin'}:{environment['PATH']}"
    printed = tmp_path / "killed.log"
    with printed.open("wb") as file:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    runs = open_store(f"{BUCKET}/runs")
    until = time.monotonic() + PATIENCE_S
    while not any(read_log(runs, one) for one in TEACHERS):
        assert time.monotonic() < until, printed.read_text(errors="replace")[-6000:]
        assert process.poll() is None, printed.read_text(errors="replace")[-6000:]
        time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert f"the student: {BUCKET}/runs/taught" in done.stdout
    assert run_ids(runs) == ["taught", *TEACHERS]
    for one in ("taught", *TEACHERS):
        kinds = [entry.kind for entry in read_log(runs, one)]
        assert (kinds.count("claim"), kinds[-1]) == (1, "final"), (one, kinds)
    soft = read_index(open_store(f"{BUCKET}/made/soft-2-folds-seeds-42-own-0.3"))
    assert soft.trained_targets == "shares"
