"""Each file of accelerate_configs/ started as a person would, as real processes of the CPU: to its
published adapter, or to a signal.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emotion_train import cli as train_cli
from emotion_train.evaluation.predictions import predictions_from_parquet
from emotion_train.report.schema import Report
from emotion_train.runs.published import download
from launch.run.choice import CONFIGS
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import tiny_config, tiny_words
from tests.launch.run.test_processes import (
    checkpoints,
    launched,
    of_rank,
    of_this_run,
    run_words,
    wait_for_checkpoint,
)

FILES = (
    "cpu",
    "multi_gpu_ddp",
    "multi_gpu_deepspeed_zero2",
    "multi_gpu_deepspeed_zero3",
    "multi_gpu_fsdp2_qlora",
)
TOKENS = 200


# packs and tails differ between ranks; Adam turns rounding into steps of the learning rate where a
# gradient is near 0, so it is small
VALUES = [
    "train.epochs=1",
    "train.global_batch_size=10",
    f"train.tokens_per_microbatch={TOKENS}",
    "train.learning_rate=0.001",
]
Result = tuple[dict[str, torch.Tensor], Report]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    tiny_config(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Result:
    """What one process makes of the run: this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert train_cli.main(["train", *tiny_words(folder, "run.id=alone", *VALUES)]) == 0
    return result(folder, "alone", 1)


def result(folder: Path, name: str, processes: int) -> Result:
    """Adapter and report as pulled."""
    download(str(folder / "runs" / name), folder / name)
    report = Report.model_validate_json((folder / name / "report" / "report.json").read_bytes())
    assert report.identity.world_size == processes
    return load_file(folder / name / "adapter_model.safetensors"), report


def compare(folder: Path, config: str, processes: int, alone: Result) -> None:
    """A whole run by `emotion-launch run` against that of one process."""
    name = f"{config}-{processes}"
    with launched(folder, processes, tiny_words(folder, f"run.id={name}", *VALUES), {}, config) as process:
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, out[-4000:]
    assert "Traceback" not in out
    (adapter, one), (together, many) = alone, result(folder, name, processes)
    for key, tensor in adapter.items():
        torch.testing.assert_close(together[key], tensor, atol=1e-5, rtol=0)
    assert many.splits["test"].per_label == one.splits["test"].per_label
    assert (many.speed.posts, many.speed.real_tokens) == (one.speed.posts, one.speed.real_tokens)
    assert many.history[0].train_loss == pytest.approx(one.history[0].train_loss, rel=1e-5)
    assert_read_back_to_the_same_bits(folder, name)


def assert_read_back_to_the_same_bits(folder: Path, name: str) -> None:
    """One process makes of the pulled adapter the probabilities that all ranks together have
    published.
    """
    line = ["evaluate", "--adapter", str(folder / name), "--data", str(folder / "data")]
    line += ["--out", str(folder / f"{name}-again"), "--tokens-per-microbatch", str(TOKENS)]
    assert train_cli.main(line) == 0
    published, again = (
        predictions_from_parquet((where / "predictions_test.parquet").read_bytes())
        for where in (folder / name / "report", folder / f"{name}-again")
    )
    assert again.ids == published.ids
    np.testing.assert_array_equal(again.prob_NC, published.prob_NC)


def test_the_files_are_these() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*FILES, "single_gpu_qlora"}


@pytest.mark.slow  # quicker: test_engines.py has the adapter of several ranks, test_processes.py their start
@pytest.mark.parametrize(
    ("config", "processes"),
    [
        *(("cpu", 2), ("cpu", 3), *((name, 2) for name in FILES[1:])),
        *(("multi_gpu_fsdp2_qlora", 1), ("one_process", 1)),
    ],
)
def test_every_config_ends_with_the_adapter_of_one_process(
    folder: Path, alone: Result, config: str, processes: int
) -> None:
    compare(folder, config, processes, alone)


@pytest.mark.slow
@pytest.mark.parametrize("config", FILES[1:])
def test_a_signal_to_one_rank_alone_saves_the_same_step_on_all_and_another_engine_goes_on(
    tmp_path: Path, config: str
) -> None:
    words = run_words(tmp_path, "preemption.hold_s=0")
    with launched(tmp_path, 2, words, {}, config) as process:
        wait_for_checkpoint(tmp_path, process)
        os.kill(of_rank(tmp_path, 1), signal.SIGTERM)
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 33, out[-4000:]
    saved = checkpoints(tmp_path)
    assert f"Step {saved[-1].step} of" in out
    assert not of_this_run(tmp_path)
    with launched(tmp_path, 1, words, {}) as process:
        wait_for_checkpoint(tmp_path, process, len(saved) + 1)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 33, out[-4000:]
    assert f"resumed at step {saved[-1].step} of" in out
