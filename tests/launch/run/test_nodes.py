"""Two nodes on one machine, each with the launcher as a scheduler starts it: one comes late, dies,
hangs, or does not come at all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emotion_train.report.schema import Report
from emotion_train.runs.published import download
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import tiny_config, tiny_words
from tests.launch.run.test_processes import all_of_it_ends, checkpoints, is_trainer, of_this_run

pytestmark = pytest.mark.slow


@contextmanager
def node(folder: Path, rank: int, words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """`emotion-launch run` with the variables that SkyPilot sets on one of two CPU nodes; both have
    this machine's address.
    """
    environment = {
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
        "SKYPILOT_TASK_ID": f"sky-{folder.name}",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-m", "launch.cli", "run", *words]
    both = {**os.environ, **environment}
    with (
        (folder / f"node-{rank}.log").open("w") as out,
        subprocess.Popen(
            line, env=both, stdout=out, stderr=out, text=True, start_new_session=True
        ) as process,
        all_of_it_ends(process, folder),
    ):
        yield process


def words_of(folder: Path, *more: str) -> list[str]:
    tiny_config(folder)
    values = ["train.global_batch_size=10", "train.tokens_per_microbatch=200", "train.learning_rate=0.001"]
    return tiny_words(folder, *values, "preemption.notices=none", "preemption.hold_s=0", *more)


def said(folder: Path, rank: int) -> str:
    return (folder / f"node-{rank}.log").read_text()


def trainer_of(folder: Path, rank: int) -> int:
    """The process id of a node's trainer."""
    name = f"SKYPILOT_NODE_RANK={rank}".encode()
    return next(
        one
        for one in of_this_run(folder)
        if is_trainer(one) and name in Path(f"/proc/{one}/environ").read_bytes().split(b"\0")
    )


def wait_for_checkpoint(folder: Path, *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not checkpoints(folder):
        assert all(process.poll() is None for process in processes), said(folder, 0)[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def adapter_of(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], Report]:
    download(str(folder / "runs" / name), folder / f"adapter-{name}")
    report = Report.model_validate_json((folder / f"adapter-{name}" / "report" / "report.json").read_bytes())
    return load_file(folder / f"adapter-{name}" / "adapter_model.safetensors"), report


def test_two_nodes_end_with_the_adapter_of_one_process_when_one_comes_late(tmp_path: Path) -> None:
    words = words_of(tmp_path, "train.epochs=1")
    with ExitStack() as stack:
        first = stack.enter_context(node(tmp_path, 0, words))
        time.sleep(6)
        second = stack.enter_context(node(tmp_path, 1, words))
        assert (first.wait(PATIENCE_S), second.wait(PATIENCE_S)) == (0, 0), said(tmp_path, 0)[-3000:]
    together, report = adapter_of(tmp_path, "tiny")
    assert report.identity.world_size == 2
    alone = [sys.executable, "-m", "launch.cli", "run", "--accelerate-config", "cpu", *words, "run.id=alone"]
    subprocess.run(alone, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, tensor in adapter_of(tmp_path, "alone")[0].items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=0)


def test_a_killed_node_ends_the_job_with_a_clear_message_and_the_job_goes_on_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    words = words_of(tmp_path, "train.epochs=30")
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(tmp_path, rank, words)) for rank in (0, 1)]
        wait_for_checkpoint(tmp_path, *nodes)
        os.kill(trainer_of(tmp_path, 1), signal.SIGKILL)
        assert [process.wait(PATIENCE_S) for process in nodes] == [1, 1]
        assert "Rank 0 lost contact with the other processes" in said(tmp_path, 0)
        assert "Traceback" not in said(tmp_path, 0)
        assert "without a message" in said(tmp_path, 1)
    step = checkpoints(tmp_path)[-1].step
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(tmp_path, rank, words)) for rank in (0, 1)]
        assert [process.wait(PATIENCE_S) for process in nodes] == [0, 0], said(tmp_path, 0)[-3000:]
        assert f"resumed at step {step} of " in said(tmp_path, 0)


def test_a_node_that_hangs_ends_the_job_after_the_time_out_that_the_config_names(tmp_path: Path) -> None:
    words = words_of(tmp_path, "train.epochs=1000", "distributed.timeout_s=15")
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(tmp_path, rank, words)) for rank in (0, 1)]
        wait_for_checkpoint(tmp_path, *nodes)
        os.kill(trainer_of(tmp_path, 1), signal.SIGSTOP)
        began = time.monotonic()
        assert nodes[0].wait(PATIENCE_S) == 1
        assert time.monotonic() - began > 10
        assert "did not answer for 15 s (distributed.timeout_s)" in said(tmp_path, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_does_not_come_ends_the_job_after_the_time_out(tmp_path: Path, rank: int) -> None:
    with node(tmp_path, rank, words_of(tmp_path, "distributed.timeout_s=10")) as process:
        assert process.wait(PATIENCE_S) == 1
    assert "each waits distributed.timeout_s seconds for the others" in said(tmp_path, rank)
