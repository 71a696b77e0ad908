"""What reaches the trainers of the environment that a launcher is started in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emotion_train.errors import TRACEBACK_VARIABLE, WrongRequest
from emotion_train.processes.imports import past_current_folder
from launch.cli import main
from launch.run.choice import accelerate_line, printable
from launch.run.environment import thread_count, trainer_environment
from launch.run.topology import Gpu, Topology
from tests.helpers.patience import PATIENCE_S

ON_CPU = Topology((), processes_per_node=2)
ON_GPU = Topology((Gpu("0", "GPU-1", "L4", 23_034),))
LEFT = {
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_OFFLOAD_PARAMS": "true",
    "FP8_BACKEND": "TE",
}
RANKS = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "OMPI_COMM_WORLD_SIZE": "8",
    "PMI_SIZE": "8",
}
STAY = {
    "PATH": "/bin",
    "NCCL_DEBUG": "INFO",
    "CUDA_VISIBLE_DEVICES": "0",
    "SKYPILOT_NODE_RANK": "0",
    "HF_TOKEN": "t",
    "MY_RANK": "1",
}


def test_settings_of_another_launcher_are_cleared_and_named() -> None:
    kept, cleared = trainer_environment(ON_GPU, {**LEFT, **RANKS, **STAY})
    assert not kept.keys() & (LEFT.keys() | RANKS.keys())
    assert STAY.items() <= kept.items()
    assert cleared == sorted(LEFT)  # a rank is no setting that somebody meant for this run


def test_the_cpu_is_used_where_it_was_asked_for_and_never_where_a_gpu_would_be_lost() -> None:
    asked = Topology((), device="cpu")
    assert trainer_environment(asked, {})[0]["ACCELERATE_USE_CPU"] == "true"
    kept, cleared = trainer_environment(ON_CPU, {"ACCELERATE_USE_CPU": "True"})
    assert (kept["ACCELERATE_USE_CPU"], cleared) == ("true", [])
    assert "ACCELERATE_USE_CPU" not in trainer_environment(ON_GPU, {"ACCELERATE_USE_CPU": "true"})[0]


@pytest.mark.parametrize(("given", "threads"), [("", None), (" ", None), ("4", 4), (" 4 ", 4), ("4,2", 4)])
def test_threads_are_a_number_or_a_list_of_numbers(given: str, threads: int | None) -> None:
    assert thread_count(given) == threads
    number = trainer_environment(ON_GPU, {"OMP_NUM_THREADS": given})[0].get("OMP_NUM_THREADS")
    assert number == (None if threads is None else str(threads))


@pytest.mark.parametrize("given", ["abc", "0", "-1", "1.5", "4;2", "٣", "99999999"])
def test_threads_that_are_no_number_are_named(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WrongRequest, match="a whole number above 0"):
        thread_count(given)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    words = ["data.url=nowhere", "run.output_url=runs", "--accelerate-config", "cpu"]
    assert main(["run", *words]) == 2
    assert f"OMP_NUM_THREADS is {given!r}" in capsys.readouterr().err


def test_processes_on_the_cpu_share_its_cores() -> None:
    kept = trainer_environment(ON_CPU, {})[0]
    assert kept["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))


def test_who_asks_for_a_traceback_gets_that_of_the_trainers() -> None:
    assert trainer_environment(ON_GPU, {}, show_traceback=True)[0][TRACEBACK_VARIABLE]
    assert TRACEBACK_VARIABLE not in trainer_environment(ON_GPU, {})[0]


def test_an_empty_entry_of_pythonpath_is_not_the_current_folder() -> None:
    found = past_current_folder({"PYTHONPATH": os.pathsep.join(["", "/opt/x", "", "/opt/y"])})
    assert found["PYTHONPATH"].split(os.pathsep)[-2:] == ["/opt/x", "/opt/y"]
    assert "" not in found["PYTHONPATH"].split(os.pathsep)
    assert found["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize(
    "names",
    [
        ["launch.py", "emotion_train/__init__.py"],
        pytest.param(["launch/__init__.py"], marks=pytest.mark.slow),
        pytest.param(["random.py"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_is_in_the_current_folder_is_not_imported(names: list[str], tmp_path: Path) -> None:
    """Nor anything from a folder that an empty entry of PYTHONPATH stands for, nor ROS's launch."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": f"{os.pathsep}{root}"}
    line = accelerate_line(Path("cpu.yaml"), None, [])
    done = subprocess.run(
        [*line[:3], "--help"],
        cwd=tmp_path,
        env={**environment, **past_current_folder(environment)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert "the wrong one" not in done.stderr
    assert "--config_file" in done.stdout, done.stderr
    assert printable(line).startswith("accelerate launch --config_file cpu.yaml")
    assert sys.executable not in printable(line)
