"""Slurm without SkyPilot: `emotion-launch run` under a real `srun` finds its nodes in Slurm's
variables.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launcher import OUTPUT_URL, WORDS, Launcher, adapter, assert_equal
from tests.helpers.slurm_site import ROOT

pytestmark = pytest.mark.cloud
PATIENCE_S = 900


def test_srun_on_two_nodes_trains_what_one_process_trains(launcher: Launcher, tmp_path: Path) -> None:
    project = launcher.site.shared / "project"  # where both nodes see it
    for name in ("emotion_train", "launch", "accelerate_configs"):
        shutil.copytree(ROOT / name, project / name)
    environment = {
        **os.environ,
        **launcher.s3.env(),
        "PYTHONPATH": str(project),
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    values = [
        *WORDS,
        f"model.base={launcher.base}",
        f"data.url={launcher.posts_url}",
        f"run.output_url={OUTPUT_URL}",
    ]
    run = [
        sys.executable,
        "-m",
        "launch.cli",
        "run",
        "--config",
        "emotion_train/configs/demo_cpu.yaml",
        *values,
    ]
    run += ["train.epochs=1", "preemption.notices=none"]
    adapters = []
    for name, srun in (
        ("alone", []),
        ("srun", ["srun", "--nodes=2", "--ntasks-per-node=1", f"--chdir={project}"]),
    ):
        line = [*srun, *run, f"run.id={name}"]
        done = subprocess.run(
            line,
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        assert ("2 nodes" in done.stdout and "(Slurm)" in done.stdout) == bool(srun)
        adapters.append(adapter(name, tmp_path / name))
    one, other = adapters
    assert_equal(one, other, tolerance=1e-5)
