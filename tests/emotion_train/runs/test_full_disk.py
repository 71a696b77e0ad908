"""What happens on a disk that is really full: one of a few hundred KiB, mounted for one process
only.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from emotion_train.runs.log import Writer, upload_part
from emotion_train.storage.open import open_store
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import tiny_config, tiny_words


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where `on_small_disk` mounts it; skips where an ordinary user may mount nothing, not even in
    a namespace.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = on_small_disk(folder, 64, ["true"])
    if tried.returncode != 0:
        pytest.skip(f"no mount in a user namespace here: {tried.stderr.strip()}")
    return folder


def on_small_disk(folder: Path, kib: int, line: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that sees an empty disk of that size at `folder`, then list what it has left
    there on stdout.
    """
    script = (
        f"mount -t tmpfs -o size={kib}k none {shlex.quote(str(folder))} && {shlex.join(line)}; code=$?; ls -A"
        f" {shlex.quote(str(folder))}; exit $code"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    try:
        return subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except FileNotFoundError as error:
        return subprocess.CompletedProcess([], 127, "", str(error))


def test_pulling_onto_a_full_disk_is_one_sentence_and_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "runs"))
    writer = Writer(store, "run", "0" * 64, "0" * 64)
    writer.claim(0, 0)
    names = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    parts = tuple(upload_part(store, "run", f"final/00000000/{name}", bytes(100 << 10)) for name in names)
    writer.append("final", 1, 1, parts)
    line = [sys.executable, "-m", "launch.cli", "pull", f"{store.url}/run", "--to", str(disk / "adapter")]
    done = on_small_disk(disk, 150, line)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("local_is_full", [False, True])
def test_a_run_whose_bucket_is_full_trains_to_its_end_and_says_where_its_states_are(
    disk: Path, tmp_path: Path, local_is_full: bool
) -> None:
    tiny_config(tmp_path)
    local = (disk if local_is_full else tmp_path) / "local"
    words = [
        f"run.output_url={disk / 'runs'}",
        "run.publish_timeout_s=0",
        "checkpoint.every_steps=1",
        f"checkpoint.local_folder={local}",
    ]
    done = on_small_disk(
        disk, 60, [sys.executable, "-m", "emotion_train.train", *tiny_words(tmp_path, *words)]
    )
    assert done.returncode == 1, done.stderr
    assert "NOT SAVED, training continues: The disk is full" in done.stderr
    assert "step 14 of 14" in done.stderr
    assert ("cannot be kept on this machine either" in done.stderr) == local_is_full
    assert bool(list(tmp_path.glob("local/*/tiny/step-00000014-scored.json"))) != local_is_full
    assert "type on this machine: emotion-launch run" in done.stderr.splitlines()[-1]
