"""From nvidia-smi's listing to the accelerate line."""

from __future__ import annotations

from pathlib import Path

import pytest

from emotion_train.errors import WrongRequest
from launch.command import CONFIGS, accelerate_line, choose, printable
from launch.topology import Gpu, parse, visible

LISTING = "0, GPU-aaaa-1, NVIDIA H200, 143771\n1, GPU-bbbb-2, NVIDIA H200, 143771\n"
TWO = parse(LISTING)


def test_the_listing_is_read() -> None:
    assert TWO[1] == Gpu("1", "GPU-bbbb-2", "NVIDIA H200", 143771)
    assert parse("No devices were found\n") == []


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, ["0", "1"]), ("1,0", ["1", "0"]), ("", []), ("-1", []), ("1,7,0", ["1"]), ("GPU-bbbb", ["1"]), ("0,0", ["0"])],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(choice: str | None, expected: list[str]) -> None:
    assert [gpu.index for gpu in visible(TWO, choice)] == expected


def test_a_machine_without_gpu_takes_the_cpu_config() -> None:
    assert choose([], None, "fp32").config_file.name == "cpu.yaml"
    assert choose(TWO[:1], None, "nf4").config_file.name == "single_gpu_qlora.yaml"
    assert "1 more stay idle" in choose(TWO, None, "nf4").reason


def test_a_4_bit_base_without_a_gpu_is_refused_unless_the_cpu_is_asked_for() -> None:
    with pytest.raises(WrongRequest, match="--accelerate-config cpu"):
        choose([], None, "nf4")
    assert choose([], "cpu", "nf4").config_file.name == "cpu.yaml"


def test_an_unknown_accelerate_config_names_those_there_are() -> None:
    with pytest.raises(WrongRequest, match="cpu, single_gpu_qlora"):
        choose([], "gpu8", "nf4")
    assert choose([], "single_gpu_qlora", "nf4").config_file == CONFIGS / "single_gpu_qlora.yaml"


def test_the_printed_line_is_the_one_a_person_would_type() -> None:
    line = printable(accelerate_line(Path("cpu.yaml"), "run.yaml", ["train.epochs=1", "run.id=a b"]))
    assert line == "accelerate launch --config_file cpu.yaml -m emotion_train.train --config run.yaml train.epochs=1 'run.id=a b'"


def test_accelerate_configs_hold_no_process_count_accumulation_or_clipping() -> None:
    for path in CONFIGS.glob("*.yaml"):
        for word in ("num_processes", "gradient_accumulation", "gradient_clipping"):
            assert word not in path.read_text(), (path, word)
