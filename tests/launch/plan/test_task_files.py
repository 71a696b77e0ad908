"""The SkyPilot files: what they ask for, and what their shell lines do. tests/cloud gives them to
SkyPilot itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from emotion_train.config import load_config
from emotion_train.errors import Preempted
from emotion_train.label import add_arguments, request_of
from launch.plan.task_file import TEMPLATE

SKY = Path(__file__).parents[3] / "sky"
TASKS = sorted({*SKY.glob("*.yaml")} - {SKY / "serve.yaml"})  # test_serve_task.py has that one
RECORDER = """#!/bin/bash
env -0 > "$RECORD.env"
printf '%s\\n' "$0" "$@" >> "$RECORD.words"
"""


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def tool(path: Path, text: str = RECORDER) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run_lines(lines: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As SkyPilot does: a bash of its own, in the folder of the project."""
    return subprocess.run(["bash", "-c", lines], cwd=folder, env=environment, capture_output=True, text=True)


def variables(task: dict[str, Any], **given: str) -> dict[str, str]:
    """What SkyPilot sets: each env and secret of the file, and those that are given."""
    named = {**task["envs"], **task["secrets"]}
    return {
        "PATH": os.environ["PATH"],
        **{name: "" if value is None else str(value) for name, value in named.items()},
        **given,
    }


def test_the_folder_holds_task_files_only() -> None:
    assert [path.name for path in TASKS] == ["evaluate.yaml", "label.yaml", "train.yaml"]
    # an __init__.py would shadow SkyPilot
    assert {path.name for path in SKY.iterdir()} == {
        "Dockerfile",
        "evaluate.yaml",
        "label.yaml",
        "serve.yaml",
        "train.yaml",
    }


def test_the_package_s_task_is_the_repository_s() -> None:
    assert TEMPLATE.read_bytes() == (SKY / "train.yaml").read_bytes()
    assert TEMPLATE.parent == SKY.parent / "launch" / "plan"


def test_the_image_is_made_by_the_lines_of_the_setup_block() -> None:
    image = (SKY / "Dockerfile").read_text(encoding="utf-8")
    lines = image.split("RUN <<'SETUP' bash\n")[1].split("SETUP\n")[0]
    assert lines == read(SKY / "train.yaml")["setup"]
    assert "WORKDIR /opt/emotion-train\n" in image  # where these lines look for it
    uv = re.search(r"astral-sh/uv:([\d.]+)", image)
    assert uv is not None
    assert f"uv=={uv[1]}" in (SKY.parent / "Makefile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", image, re.MULTILINE)
    named = {name for words in copied for name in words.split()}
    assert {name for name in named if not (SKY.parent / name).exists()} == set()
    read_by_setup = {"requirements.lock", "pyproject.toml", "Makefile"}
    assert named >= {*read_by_setup, "README.md", "LICENSE", "emotion_train", "launch", "accelerate_configs"}


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_spot_comes_first_and_only_a_preempted_run_is_started_again(path: Path) -> None:
    task = read(path)
    spots = [candidate["use_spot"] for candidate in task["resources"]["ordered"]]
    assert spots == sorted(spots, reverse=True)
    assert set(spots) == {True, False}
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [Preempted.exit_code]
    assert recovery["max_restarts_on_errors"] == 0


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_no_secret_has_a_value_and_what_has_to_be_given_has_none(path: Path) -> None:
    task = read(path)
    assert set(task["secrets"].values()) == {""}
    required = {
        "train": {"DATA_URL", "OUTPUT_URL"},
        "evaluate": {"DATA_URL", "RUN_URL"},
        "label": {"SOURCE", "OUT_URL", "RUN_URL"},
    }[path.stem]
    assert {name for name, value in task["envs"].items() if value is None} == required
    assert not [name for name in task["envs"] if "KEY" in name or "TOKEN" in name or "SECRET" in name]


def test_all_files_set_up_the_same_packages_and_take_the_same_keys() -> None:
    train = read(SKY / "train.yaml")
    for other in (read(SKY / "evaluate.yaml"), read(SKY / "label.yaml")):
        assert train["setup"] == other["setup"]
        assert set(other["secrets"]) <= set(train["secrets"])
        assert train["resources"]["job_recovery"] == other["resources"]["job_recovery"]


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_empty_variables_are_unset_before_the_program_starts_and_others_arrive(
    path: Path, tmp_path: Path
) -> None:
    task = read(path)
    optional = {name for name, value in {**task["envs"], **task["secrets"]}.items() if value == ""} - {
        "OVERRIDES",
        "OUT",
        "PRECISION",
        "OPTIONS",
    }
    for program in ("emotion-launch", "emotion-train"):
        tool(tmp_path / ".venv" / "bin" / program)
    record = tmp_path / "record"
    for given in ({}, {name: f"value of {name}" for name in optional}):
        environment = variables(
            task,
            RECORD=str(record),
            DEVICE="cpu",
            DATA_URL="s3://d",
            OUTPUT_URL="s3://o",
            RUN_URL="s3://o/r",
            SOURCE="s3://p",
            OUT_URL="s3://l",
            **given,
        )
        done = run_lines(task["run"], tmp_path, environment)
        assert done.returncode == 0, done.stderr
        seen = dict(
            entry.split("=", 1) for entry in (tmp_path / "record.env").read_text().split("\0") if entry
        )
        assert {name for name in optional if name in seen} == set(given)
        assert {name: seen[name] for name in given} == given


def test_the_run_line_is_one_that_the_launcher_understands(tmp_path: Path) -> None:
    task, record = read(SKY / "train.yaml"), tmp_path / "record"
    tool(tmp_path / ".venv" / "bin" / "emotion-launch")
    words = "train.epochs=2 lora.targets=[q_proj,v_proj] loss.class_weights=0.25"
    environment = variables(
        task, RECORD=str(record), DATA_URL="s3://d/with space", OUTPUT_URL="s3://o", OVERRIDES=words
    )
    assert run_lines(task["run"], tmp_path, environment).returncode == 0
    program, verb, option, config, *values = (tmp_path / "record.words").read_text().splitlines()
    assert (Path(program).name, verb, option) == ("emotion-launch", "run", "--config")
    found = load_config(SKY.parent / config, values)
    assert (found.data.url, found.run.output_url) == ("s3://d/with space", "s3://o")
    assert (found.train.epochs, found.lora.targets, found.loss.class_weights) == (
        2,
        ("q_proj", "v_proj"),
        0.25,
    )
    assert found.run.id is None  # so that it is SKYPILOT_TASK_ID


@pytest.mark.parametrize(("given", "more"), [("", []), ("1", ["--smoke"])])
def test_a_task_is_tried_out_by_an_env(given: str, more: list[str], tmp_path: Path) -> None:
    task = read(SKY / "train.yaml")
    tool(tmp_path / ".venv" / "bin" / "emotion-launch")
    environment = variables(task, RECORD=str(tmp_path / "record"), DATA_URL="d", OUTPUT_URL="o", SMOKE=given)
    assert run_lines(task["run"], tmp_path, environment).returncode == 0
    words = (tmp_path / "record.words").read_text().splitlines()[1:]
    assert words[: 2 + len(more)] == ["run", *more, "--config"]


@pytest.mark.parametrize(("given", "tokens"), [("", "auto"), ("train.tokens_per_microbatch=512", 512)])
def test_every_gpu_takes_what_fits_it_unless_a_number_is_given(
    given: str, tokens: int | str, tmp_path: Path
) -> None:
    task = read(SKY / "train.yaml")
    tool(tmp_path / ".venv" / "bin" / "emotion-launch")
    environment = variables(
        task, RECORD=str(tmp_path / "record"), DATA_URL="d", OUTPUT_URL="o", OVERRIDES=given
    )
    assert run_lines(task["run"], tmp_path, environment).returncode == 0
    config, *values = (tmp_path / "record.words").read_text().splitlines()[3:]
    assert load_config(SKY.parent / config, values).train.tokens_per_microbatch == tokens


@pytest.mark.parametrize(
    ("given", "more"),
    [({}, []), ({"PRECISION": "nf4", "OUT": "s3://a b"}, ["--precision", "nf4", "--out", "s3://a b"])],
)
def test_an_evaluation_takes_precision_and_target_where_they_are_given(
    given: dict[str, str], more: list[str], tmp_path: Path
) -> None:
    for program in ("emotion-launch", "emotion-train"):
        tool(tmp_path / ".venv" / "bin" / program)
    needed = {
        "RECORD": str(tmp_path / "record"),
        "DEVICE": "cpu",
        "DATA_URL": "s3://d",
        "RUN_URL": "s3://o/r",
    }
    task = read(SKY / "evaluate.yaml")
    assert run_lines(task["run"], tmp_path, variables(task, **needed, **given)).returncode == 0
    words = (tmp_path / "record.words").read_text().splitlines()
    scoring = words[words.index("evaluate") :]
    assert scoring == [
        "evaluate",
        "--adapter",
        scoring[2],
        "--device",
        "cpu",
        "--data",
        "s3://d",
        "--split",
        "test",
        *more,
    ]


def test_a_label_task_is_one_worker_with_the_options_that_are_given(tmp_path: Path) -> None:
    tool(tmp_path / ".venv" / "bin" / "emotion-train")
    given = {"SOURCE": "s3://a b", "OUT_URL": "s3://l", "RUN_URL": "s3://o/r", "DEVICE": "cpu"}
    more = {"OPTIONS": "--columns id --accept-precision 0.95", "PRECISION": "nf4", "USD_PER_HOUR": "2.5"}
    task = read(SKY / "label.yaml")
    environment = variables(task, RECORD=str(tmp_path / "record"), **given, **more)
    assert run_lines(task["run"], tmp_path, environment).returncode == 0
    words = (tmp_path / "record.words").read_text().splitlines()[1:]
    assert words[:6] == ["label", "s3://a b", "s3://l", "--adapter", "s3://o/r", "--device"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    request = request_of(parser.parse_args(words[1:]))
    assert (request.source, request.adapters) == ("s3://a b", ("s3://o/r",))
    assert (request.reading.columns, request.accept_precision) == (("id",), 0.95)
    assert (request.loading.precision, request.usd_per_hour) == ("nf4", 2.5)


def test_a_pool_is_the_task_without_its_last_line() -> None:
    text = (SKY / "label.yaml").read_text()
    pool = yaml.safe_load(text[: text.index("\nrun:")] + "\npool: {workers: 8}\n")
    assert pool["pool"] == {"workers": 8}
    assert pool["setup"] == read(SKY / "train.yaml")["setup"]
    assert "run" not in pool


def test_gpus_that_are_promised_and_not_seen_stop_an_evaluation(tmp_path: Path) -> None:
    task = read(SKY / "evaluate.yaml")
    tool(tmp_path / "bin" / "nvidia-smi", "#!/bin/bash\nexit 9\n")
    environment = variables(task, RUN_URL="s3://o/r", DATA_URL="s3://d", SKYPILOT_NUM_GPUS_PER_NODE="1")
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    done = run_lines(task["run"], tmp_path, environment)
    assert done.returncode == 2
    assert "DEVICE=cpu" in done.stdout


def test_setup_installs_once_and_again_when_the_lock_changes(tmp_path: Path) -> None:
    task = read(SKY / "train.yaml")
    for name in ("requirements.lock", "pyproject.toml", "Makefile"):
        (tmp_path / name).write_text((SKY.parent / name).read_text())
    tool(
        tmp_path / "home" / ".local" / "bin" / "uv",
        RECORDER + '[ "$1" = venv ] && mkdir -p .venv\n[ -z "$BROKEN" ]\n',
    )
    environment = variables(task, RECORD=str(tmp_path / "record"), HOME=str(tmp_path / "home"))
    calls = tmp_path / "record.words"

    def setup(**more: str) -> int:
        calls.unlink(missing_ok=True)
        return run_lines(task["setup"], tmp_path, {**environment, **more}).returncode

    assert setup(BROKEN="yes") != 0  # a set-up that broke off is no set-up
    assert setup() == 0
    words = calls.read_text().split()
    assert "torch==2.13.0" in words
    assert "requirements.lock" in words
    assert setup() == 0
    assert not calls.exists()
    (tmp_path / "requirements.lock").write_text("changed")
    assert setup() == 0
    assert calls.exists()


def test_a_folder_without_a_clone_is_set_up_by_its_wheel(tmp_path: Path) -> None:
    task = read(SKY / "train.yaml")
    tool(tmp_path / "home" / ".local" / "bin" / "uv", RECORDER + '[ "$1" != venv ] || mkdir -p .venv\n')
    environment = variables(task, RECORD=str(tmp_path / "record"), HOME=str(tmp_path / "home"))
    project = tmp_path / "mine"
    project.mkdir()
    nothing = run_lines(task["setup"], project, environment)
    assert nothing.returncode != 0
    assert "emotion_train-*.whl" in nothing.stderr
    for version in ("0.1.0", "0.2.0"):
        (project / f"emotion_train-{version}-py3-none-any.whl").write_text(version)
        assert run_lines(task["setup"], project, environment).returncode == 0
        installed = (tmp_path / "record.words").read_text().splitlines()[-1]
        assert installed == f"./emotion_train-{version}-py3-none-any.whl[deepspeed,gguf,gpu,trackers]"
    calls = (tmp_path / "record.words").read_text()
    assert run_lines(task["setup"], project, environment).returncode == 0  # only a look at its stamp
    assert (tmp_path / "record.words").read_text() == calls


def test_a_config_of_the_package_needs_no_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(SKY / "train.yaml")["envs"]["CONFIG"]
    monkeypatch.chdir(tmp_path)
    words = ["data.url=d", "run.output_url=o"]
    assert load_config(config, words) == load_config(SKY.parent / config, words)
    own = tmp_path / config
    own.parent.mkdir(parents=True)
    own.write_text("train: {epochs: 9}")
    assert load_config(config, words).train.epochs == 9  # a person's own wins
