"""`sky/label.yaml` by real managed jobs on two nodes of the local Slurm site, and `srun --ntasks`:
each post once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emotion_train.storage.open import open_store
from tests.helpers.labelling_jobs import labelled, write_lines
from tests.helpers.launcher import OUTPUT_URL, TASK, Launcher, published_run
from tests.helpers.slurm_site import ROOT

pytestmark = pytest.mark.cloud
LABEL = ROOT / "sky" / "label.yaml"
POSTS, PATIENCE_S = 400, 900


@pytest.fixture(scope="module")
def run_url(launcher: Launcher) -> str:
    """A run that is trained on the site."""
    words = launcher.words("train.epochs=1", "preemption.notices=none")
    try:
        printed = launcher.site.sky("launch", "-c", "trained", str(TASK), *words)
    finally:
        launcher.site.sky("down", "-y", "trained", check=False)
    return f"{OUTPUT_URL}/{published_run(printed)}"


@pytest.fixture
def source(tmp_path: Path) -> str:
    store = open_store("s3://cloud/to-label")
    store.write("posts.jsonl", write_lines(tmp_path / "posts.jsonl", POSTS).read_bytes())
    return store.url


def rows_of(out_url: str) -> list[int]:
    return sorted(row["row"] for row in labelled(open_store(out_url)))


def test_two_managed_jobs_label_each_post_once(launcher: Launcher, run_url: str, source: str) -> None:
    out_url = "s3://cloud/labels/jobs"
    words = launcher.words(
        SOURCE=source, OUT_URL=out_url, RUN_URL=run_url, OPTIONS="--unit-posts 40 --notices none"
    )
    jobs = [launcher.start_managed(name, *words, task=LABEL) for name in ("label-1", "label-2")]
    assert [job.wait_for_end() for job in jobs] == ["SUCCEEDED"] * 2
    assert rows_of(out_url) == list(range(1, POSTS + 1))


def test_srun_starts_a_worker_a_task(launcher: Launcher, run_url: str, source: str) -> None:
    out_url = "s3://cloud/labels/srun"
    project = launcher.site.shared / "label-project"
    for name in ("emotion_train", "launch"):
        shutil.copytree(ROOT / name, project / name)
    line = ["srun", "--nodes=2", "--ntasks=2", f"--chdir={project}", sys.executable, "-m", "emotion_train"]
    line += ["label", source, out_url, "--adapter", run_url, "--device", "cpu", "--unit-posts", "40"]
    done = subprocess.run(
        [*line, "--notices", "none"],
        cwd=project,
        env={**os.environ, **launcher.s3.env(), "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count(f"labelled {POSTS} posts in 10 parts") == 2
    assert rows_of(out_url) == list(range(1, POSTS + 1))
