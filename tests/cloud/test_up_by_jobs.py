"""`emotion-launch up` by a real `sky jobs launch`: killed while the try-out runs and while the job
trains, and typed again.
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
from emotion_train.runs.log import read_log, run_ids
from emotion_train.storage.open import open_store
from tests.helpers.launcher import PATIENCE_S, WORDS, Launcher
from tests.helpers.slurm_site import ROOT, SKY_ENV
from tests.helpers.tiny_runs import write_posts

pytestmark = pytest.mark.cloud


def test_posts_become_a_checkpoint_although_the_command_is_killed(launcher: Launcher, tmp_path: Path) -> None:
    keys = launcher.s3.env()
    launcher.s3.create_bucket("posts-to-endpoint")
    secrets = " ".join(
        f"--secret {name}={keys[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    )
    values = [word for word in WORDS if not word.startswith("run.")]
    line = [sys.executable, "-m", "launch.cli", "up", str(write_posts(tmp_path / "posts"))]
    line += [
        "--bucket",
        "s3://posts-to-endpoint",
        "--gpus",
        "H200:1",
        "--yes",
        "--config",
        str(example_config().relative_to(ROOT)),
    ]
    line += [
        "--sky",
        f"--infra slurm --no-use-spot --env DEVICE=cpu {secrets}",
        "--folder",
        str(tmp_path / "here"),
    ]
    line += ["run.id=emotions", f"model.base={launcher.base}", *values, "train.epochs=2"]
    environment = {**launcher.site.sky_environment, **keys, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{SKY_ENV / 'bin'}:{environment['PATH']}"
    for run_id in ("emotions-smoke", "emotions"):
        printed = tmp_path / f"{run_id}.log"
        with printed.open("wb") as file:
            process = subprocess.Popen(
                line, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        _until_claimed(run_id, process, printed)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "is alive; following it" in done.stdout
    runs = open_store("s3://posts-to-endpoint/emotions/runs")
    assert run_ids(runs) == ["emotions", "emotions-smoke"]
    assert len([entry for entry in read_log(runs, "emotions") if entry.kind == "claim"]) == 1
    assert open_store("s3://posts-to-endpoint/emotions/exported/emotions").find(
        "model.safetensors.index.json"
    )
    assert (tmp_path / "here" / "adapter" / "report" / "report.html").exists()


def _until_claimed(run_id: str, process: subprocess.Popen[bytes], printed: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    store = open_store("s3://posts-to-endpoint/emotions/runs")
    while not read_log(store, run_id):
        assert time.monotonic() < until, printed.read_text(errors="replace")[-6000:]
        assert process.poll() is None, printed.read_text(errors="replace")[-6000:]
        time.sleep(2)
