"""Several GPUs with NCCL do what one does; the same comparisons as on CPUs in
test_engines.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from emotion_train.training.engines import Kind
from tests.emotion_train.training.test_engines import ENGINES, agree_to_rounding, compare, move
from tests.helpers.many_processes import Crew
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_config

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} GPUs are here, and two are needed"),
]
HERE: tuple[Kind, ...] = tuple(
    engine for engine in ENGINES if find_spec("deepspeed") or not engine.startswith("DeepSpeed")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpus")
    tiny_config(folder)
    causal_checkpoint(
        folder / "wide", "llama", hidden_size=256, head_dim=64, intermediate_size=512, initializer_range=0.05
    )
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Crew]:
    with Crew(folder, 2, on_cpu=False) as crew:
        yield crew


@pytest.mark.skipif(HERE != ENGINES, reason="deepspeed is not installed: type pip install deepspeed ninja")
def test_deepspeed_is_here_so_that_every_engine_is_compared() -> None:
    assert HERE == ENGINES


def test_every_engine_takes_the_step_of_the_whole_batch_with_nccl(folder: Path, two: Crew) -> None:
    compare(folder, two, HERE, device="cuda")


@pytest.mark.skipif(GPUS < 4, reason="needs four GPUs")
def test_four_gpus_take_the_step_of_the_whole_batch_too(folder: Path) -> None:
    with Crew(folder, 4, on_cpu=False) as crew:
        compare(folder, crew, HERE, device="cuda")


def test_a_run_moves_between_engines_and_numbers_of_gpus(folder: Path, two: Crew) -> None:
    move(folder, two, HERE, device="cuda")


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_a_base_that_rounds_is_trained_alike_by_every_engine(folder: Path, two: Crew, precision: str) -> None:
    agree_to_rounding(folder, two, HERE, precision, f"model.base={folder / 'wide'}", device="cuda")


def test_fp8_with_ddp_is_trained_as_on_one_gpu(folder: Path, two: Crew) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 units")
    agree_to_rounding(folder, two, ["DDP"], "fp8", f"model.base={folder / 'wide'}", device="cuda")
