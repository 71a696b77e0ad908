"""What works on Windows and macOS, and the sentence for what does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emotion_train import cli
from emotion_train.config import LoraSection
from emotion_train.data.index import read_index
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.load import read_config
from emotion_train.model.lora import build_classifier, save_adapter
from emotion_train.processes import systems
from emotion_train.processes.systems import require_system
from emotion_train.storage.open import open_store
from launch import cli as launch_cli
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import SIZES, write_posts

ROOT = Path(__file__).parents[3]


def without_linux(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own, whose pages find no module or name of Unix."""
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.hidden_linux", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_posts_are_prepared_without_unix(tmp_path: Path) -> None:
    done = without_linux(tmp_path, "prepare", str(write_posts(tmp_path / "source")), "data")
    assert done.returncode == 0, done.stderr
    assert read_index(open_store(str(tmp_path / "data"))).labels == tuple(sorted(SIZES))


@pytest.mark.slow
def test_posts_are_labelled_without_unix(tmp_path: Path) -> None:
    base = read_config(str(causal_checkpoint(tmp_path / "base", "llama")))
    model, info = build_classifier(base, "fp32", 2, LoraSection(r=2), 0, torch.device("cpu"))
    tokenizer = PostTokenizer.load(base.files, 32)
    facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=LoraSection(r=2), labels=["glee", "rage"])
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer, facts=facts)
    done = without_linux(tmp_path, "predict", "--adapter", "adapter", "--format", "jsonl", "tea", "stars")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["tea", "stars"]
    assert "torch._inductor.compile_fx" not in done.stderr  # two seconds, and nothing is compiled


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("import fcntl", "No module named 'fcntl' on Windows"),
        ("import signal\nsignal.SIGHUP", "no attribute 'SIGHUP' on Windows"),
        ("from os import getuid", "cannot import name 'getuid'"),
        ("open('/proc/self/status')", "/proc/self/status does not exist on Windows"),
        ("from pathlib import Path\nPath('/proc/self/status').read_text()", "does not exist on Windows"),
    ],
)
def test_what_is_hidden_would_be_missed(tmp_path: Path, line: str, problem: str) -> None:
    """The two tests above can fail: a page that uses these does."""
    page = f"exec({line!r}, {{'__name__': 'emotion_train.x'}})"
    script = f"from tests.helpers.hidden_linux import hide\nhide()\n{page}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert problem in done.stderr


@pytest.mark.parametrize("verb", ["train", "demo", "run"])
def test_training_on_windows_is_refused_in_a_sentence(verb: str) -> None:
    with pytest.raises(WrongRequest, match=rf"^{verb} does not work on Windows, .*wsl --install"):
        require_system(verb, "win32")


@pytest.mark.parametrize("verb", ["prepare", "predict", "evaluate", "stage-base", "plan", "pull", None])
@pytest.mark.parametrize("system", ["win32", "darwin", "linux"])
def test_what_works_is_not_talked_about(
    verb: str | None, system: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert require_system(verb, system) == 0
    assert require_system("train", "linux") == 0
    assert capfd.readouterr() == ("", "")


def test_macos_is_told_that_its_cpu_trains(capfd: pytest.CaptureFixture[str]) -> None:
    assert require_system("run", "darwin") == 0
    told = capfd.readouterr().err
    assert told.startswith("on macOS training runs on the CPU")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("program", "words"), [("train", ["train", "--config", "x"]), ("launch", ["run", "--config", "x"])]
)
def test_the_programs_end_with_2_before_anything_begins(
    program: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = systems.require_system
    monkeypatch.setattr(systems, "require_system", lambda verb: refused(verb, "win32"))
    monkeypatch.setattr(cli, "require_system", lambda verb: refused(verb, "win32"))
    assert {"train": cli.main, "launch": launch_cli.main}[program](words) == 2
    assert "does not work on Windows" in capfd.readouterr().err
