"""The launcher as a person meets it: quick, torch-free, exit code 2 for a wrong request."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emotion_train.errors import EXIT_CODES
from launch.cli import main
from tests.helpers.patience import PATIENCE_S


def test_help_imports_neither_torch_nor_transformers_nor_boto3() -> None:
    code = (
        "import sys\nfrom launch.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "import launch.check.checks, launch.results.pull, launch.run.topology, launch.run.choice\n"
        "unwanted = ('torch', 'transformers', 'boto3', 'pyarrow', 'obstore')\n"
        "print('loaded', [m for m in unwanted if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("loaded []\n")
    assert "34  fenced" in answer.stdout


def test_help_and_docs_tell_the_same_exit_codes() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md"
    told = re.findall(r"^\| (\d+) \| (\w+)", page.read_text(encoding="utf-8").partition("## ")[0], re.M)
    assert told == re.findall(r"^  (\d+) +(\w+)", EXIT_CODES, re.M)
    assert [code for code, _ in told] == ["0", "1", "2", "33", "34"]


def test_dry_run_prints_the_line_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.url=nowhere", "run.output_url=runs"]
    assert main(["run", "--dry-run", "--accelerate-config", "cpu", *words]) == 0
    assert "accelerate launch --config_file" in capsys.readouterr().out


def test_a_run_starts_although_nobody_reads_its_line(tmp_path: Path) -> None:
    """And does not end with 0, which would say that it is published."""
    words = [f"data.url={tmp_path / 'nowhere'}", f"run.output_url={tmp_path}", "--accelerate-config", "cpu"]
    line = [sys.executable, "-m", "launch.cli", "run", *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "There is no prepared data set" in process.stderr.read()
        assert process.wait(PATIENCE_S) == 2


def test_a_typo_ends_in_exit_code_2_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "data.url=nowhere", "run.output_url=runs", "train.epoch=1"]) == 2
    assert "did you mean train.epochs?" in capsys.readouterr().err


def test_check_finds_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        f"data.url={tmp_path}",
        f"run.output_url={tmp_path / 'runs'}",
        f"model.base={tmp_path / 'model.gguf'}",
    ]
    assert main(["check", *words]) == 2
    out = capsys.readouterr().out
    assert out.count(f"There is no prepared data set at {tmp_path}") == 1
    assert "wrong labels      for the reason given at data set" in out
    assert "0 runs at" in out
    assert "model.gguf" in out


def test_no_runs_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert f"no runs at {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["nowhere", "s3://bucket", "s3://"])
def test_a_url_without_run_id_is_refused(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", url, "--to", str(tmp_path / "adapter")]) == 2
    assert "OUTPUT_URL/RUN_ID" in capsys.readouterr().err


def test_values_may_stand_before_between_and_after_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "run",
                "data.url=nowhere",
                "--dry-run",
                "run.output_url=runs",
                "--accelerate-config",
                "cpu",
                "train.epochs=2",
            ]
        )
        == 0
    )
    assert "data.url=nowhere run.output_url=runs train.epochs=2" in capsys.readouterr().out


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--dry-run", "data.url=nowhere", "--colour=red"])
    assert ended.value.code == 2
    assert "run has no option --colour" in capsys.readouterr().err
