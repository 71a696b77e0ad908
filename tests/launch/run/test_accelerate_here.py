"""A trainer in the process of `accelerate launch` against the one that accelerate starts itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch

from launch.run.accelerate_here import _complete
from launch.run.choice import CONFIGS, HERE, QUIETLY, accelerate_line, program_file
from launch.run.processes import run_to_end
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import tiny_config, tiny_words

TEXTS = {
    "cpu": "distributed_type: 'NO'\nuse_cpu: true\nmixed_precision: 'no'\n",
    "unquoted": "distributed_type: NO\nuse_cpu: false\nmixed_precision: 'no'\n",
    "half": "distributed_type: 'NO'\nuse_cpu: false\nmixed_precision: bf16\ndebug: true\n",
    "compiled": "distributed_type: 'NO'\nuse_cpu: false\ndynamo_config: {dynamo_backend: EAGER}\n",
}


class Started(Exception):
    """Takes the place of the process that accelerate would start."""


@pytest.fixture(params=["single_gpu_qlora", *TEXTS])
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The words of `accelerate launch`, up to the trainer's own."""
    path = CONFIGS / f"{request.param}.yaml"
    if request.param in TEXTS:
        path = tmp_path / path.name
        path.write_text(f"compute_environment: LOCAL_MACHINE\nnum_machines: 1\n{TEXTS[request.param]}")
    return accelerate_line(path, None, [])[3:]


def test_it_sets_what_accelerate_sets_for_a_process_of_its_own(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    def start(line: list[str], env: dict[str, str], **more: Any) -> None:
        assert line == [sys.executable, "-m", "emotion_train.train"]
        given.append(env)
        raise Started

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["accelerate", *words])
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        with pytest.raises(Started):
            launch.main()
    before = dict(os.environ)
    assert given[0] != before
    monkeypatch.setattr(launch, "simple_launcher", launch.simple_launcher)
    try:
        _complete(words)
        assert dict(os.environ) == given[0]
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_what_is_wrong_with_a_run_is_said_before_torch_is_there(tmp_path: Path) -> None:
    values = [f"data.url={tmp_path / 'none'}", f"run.output_url={tmp_path / 'runs'}", "model.base=nobody/x"]
    line = accelerate_line(CONFIGS / "single_gpu_qlora.yaml", None, values)
    assert line[2] == program_file(HERE)
    done = subprocess.run(
        [*line[:1], "-X", "importtime", *line[1:]], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2
    assert f"emotion-train: There is no prepared data set at {tmp_path / 'none'}" in done.stderr
    assert "| torch" not in done.stderr
    assert "Traceback" not in done.stderr


SEVERAL = "distributed_type: MULTI_GPU\nuse_cpu: true\ngpu_ids: '-1,-1'\n"


@pytest.mark.parametrize(
    ("program", "text", "reason"),
    [
        (
            HERE,
            "distributed_type: 'NO'\nmixed_precision: nonsense\n",
            "Unknown mixed_precision mode: nonsense.",
        ),
        (HERE, "distributed_type: 'NO'\ncolour: blue\n", "had unknown keys (['colour'])"),
        (HERE, "distributed_type: 'NO'\nmixed_precision: 5\n", "AttributeError: 'int' object"),
        (QUIETLY, "distributed_type: 'no'\n", "'no' is not a valid DistributedType"),
        (QUIETLY, f"{SEVERAL}mixed_precision: nonsense\n", "Unknown mixed_precision mode: nonsense."),
    ],
)
def test_a_config_file_that_accelerate_refuses_is_a_wrong_request(
    tmp_path: Path, program: str, text: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(f"compute_environment: LOCAL_MACHINE\nnum_machines: 1\n{text}")
    line = accelerate_line(path, None, tiny_words(tmp_path))
    assert line[2] == program_file(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the launcher gives it
    assert run_to_end(line, environment, 600) == 2  # and nobody is held
    (sentence,) = capfd.readouterr().err.splitlines()
    assert f"Accelerate refuses its config {path} (" in sentence
    assert reason in sentence
    assert sentence.endswith("; mend the file, or give another by --accelerate-config.")
