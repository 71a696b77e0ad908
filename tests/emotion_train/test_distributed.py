"""Two processes do what one does: the same adapter to 1e-5, every post scored once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emotion_train.report.schema import Report
from launch.runs import pull
from tests.emotion_train.tiny_runs import tiny_config, tiny_words


def train(folder: Path, processes: int, *overrides: str) -> tuple[dict[str, torch.Tensor], Report]:
    words = tiny_words(folder, f"run.id=p{processes}", "train.epochs=1", *overrides)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "emotion_train.train"]
    answer = subprocess.run(
        [*launch, *words], capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    adapter = folder / f"adapter{processes}"
    pull(str(folder / "runs" / f"p{processes}"), adapter)
    report = Report.model_validate_json((adapter / "report" / "report.json").read_bytes())
    assert report.identity.world_size == processes
    return load_file(adapter / "adapter_model.safetensors"), report


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_end_with_the_adapter_of_one(tmp_path: Path, processes: int) -> None:
    tiny_config(tmp_path)
    # packs and tails differ between ranks; Adam turns rounding into steps of the learning rate where a gradient is near 0, so it is small
    overrides = ["train.global_batch_size=10", "train.tokens_per_microbatch=200", "train.learning_rate=0.001"]
    alone, one = train(tmp_path, 1, *overrides)
    together, many = train(tmp_path, processes, *overrides)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=0)
    assert many.splits["test"].confusion == one.splits["test"].confusion
    assert (many.speed.posts, many.speed.real_tokens) == (one.speed.posts, one.speed.real_tokens)
    assert many.history[0].train_loss == pytest.approx(one.history[0].train_loss, rel=1e-5)
