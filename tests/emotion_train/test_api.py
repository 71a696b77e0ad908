"""The Python interface: the code of its page runs, prints nothing by itself, raises our errors, and
gives what the verbs give.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from emotion_train import api, cli
from emotion_train.config import Config, load_config
from emotion_train.data.loader import StepBatch
from emotion_train.errors import Preempted, StorageError, WrongRequest
from emotion_train.processes.borrowed import borrowed, is_borrowed
from emotion_train.processes.notices import PreemptionWatch
from emotion_train.runs.log import read_log
from emotion_train.storage.open import open_store
from emotion_train.training.trainer import Trainer
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import SIZES, tiny_words, write_posts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
POSTS = ["tea and rain", "never again", "stars"]
# pages whose printed words are what they are for
PRINTING = {"cli", "prepare", "stage_base", "evaluate", "predict", "demo", "train", "config_reference"}
PRINTING |= {"errors", "console", "command_line", "augment", "benchmark", "export", "label"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's code is typed: posts, and a run config with a base of two layers."""
    folder = tmp_path_factory.mktemp("notebook")
    causal_checkpoint(folder / "base", "llama")
    write_posts(folder / "source")
    rows = [("text", "label")]
    for name in ("train", "validation", "test"):
        with (folder / "source" / f"{name}.csv").open(newline="") as file:
            rows += [(text, label) for text, label in list(csv.reader(file))[1:]]
    with (folder / "posts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    values: dict[str, dict[str, object]] = {}
    for word in tiny_words(folder, "run.output_url=runs", "data.url=data", "run.id=first"):
        name, _, value = word.partition("=")
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = yaml.safe_load(value)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def typed(folder: Path) -> dict[str, object]:
    """The names that the page's code leaves, run in its order; its own `print` leads to `printed`,
    and `others` is what anybody else printed.
    """
    printed: list[object] = []
    names: dict[str, object] = {"print": lambda *words: printed.append(words)}
    others = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(others), redirect_stderr(others):
        patch.chdir(folder)
        for block in blocks("python"):
            exec(compile(block.replace('"auto"', '"cpu"'), "docs/python.md", "exec"), names)
    return {**names, "printed": printed, "others": others.getvalue()}


def test_the_page_s_config_is_one(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(block)
    assert load_config(tmp_path / "run.yaml").train.epochs == 2


def test_the_code_of_the_page_runs(typed: dict[str, object]) -> None:
    run, card = typed["run"], typed["card"]
    assert isinstance(run, api.PublishedRun)
    assert (run.url, run.run_id, run.split) == ("runs/first", "first", "test")
    assert card.figures.macro_f1 == pytest.approx(run.macro_f1)  # type: ignore[attr-defined]
    assert typed["prepared"].index.labels == tuple(sorted(SIZES))  # type: ignore[attr-defined]


def test_nothing_is_printed_unless_asked(
    typed: dict[str, object], folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed["others"] == ""
    assert len(typed["printed"]) == 6  # type: ignore[arg-type]
    monkeypatch.chdir(folder)
    capfd.readouterr()
    for show in (False, True):
        api.train_run("run.yaml", ["train.learning_rate=1e-4"], device="cpu", show=show)
        api.evaluate_adapter("adapter", file="posts.csv", out=f"out-{show}", device="cpu", show=show)
        if not show:
            assert capfd.readouterr() == ("", "")
    told = capfd.readouterr()
    assert "published at step" in told.out
    assert "written: out-True/scorecard.json" in told.out
    assert "fitting the TF-IDF floor" in told.err


def test_predictions_are_those_of_the_verb(
    typed: dict[str, object], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = folder / "adapter"
    capfd.readouterr()
    assert (
        cli.main(["predict", "--adapter", str(adapter), "--device", "cpu", "--format", "jsonl", *POSTS]) == 0
    )
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    found = api.load_adapter(adapter, device="cpu").predict(POSTS)
    assert [one.label for one in found] == [row["label"] for row in rows]
    for one, row in zip(found, rows, strict=True):
        assert one.probabilities == pytest.approx(row["probabilities"], abs=1e-6)


def test_a_run_is_used_by_its_url(
    typed: dict[str, object],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_url, file = f"{folder}/runs/first", folder / "posts.csv"
    capfd.readouterr()
    by_url = api.load_adapter(run_url, device="cpu").predict(POSTS)
    card = api.evaluate_adapter(run_url, file=file, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert by_url == api.load_adapter(folder / "adapter", device="cpu").predict(POSTS)
    other = api.evaluate_adapter(folder / "adapter", file=file, device="cpu")
    assert card.model_dump() == other.model_dump()
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1


def test_an_interrupted_run_resumes_also_in_a_thread(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: dict[str, object]
) -> None:
    """As "interrupt kernel" does; some web servers call from a thread, where no signal comes."""
    words = ["run.id=stopped", f"run.output_url={tmp_path}", "train.epochs=1", f"data.url={folder / 'data'}"]
    config = load_config(folder / "run.yaml", words)
    step = Trainer._step

    def interrupted(self: Trainer, batch: StepBatch) -> None:
        step(self, batch)
        if self.progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(Preempted, match="Step 3 of 10 is saved"):
            api.train_run(config, device="cpu")
    assert signal.getsignal(signal.SIGINT) is before
    found: list[api.PublishedRun] = []
    thread = threading.Thread(target=lambda: found.append(api.train_run(config, device="cpu")))
    thread.start()
    thread.join()
    assert [one.step for one in found] == [10]
    log = read_log(open_store(str(tmp_path)), "stopped")
    assert [entry.step for entry in log if entry.kind == "claim"] == [0, 3]


def test_what_cannot_be_done_is_raised(folder: Path, tmp_path: Path, typed: dict[str, object]) -> None:
    classifier = typed["classifier"]
    assert isinstance(classifier, api.Classifier)
    with pytest.raises(WrongRequest, match="list of texts"):
        classifier.predict("one post")
    with pytest.raises(WrongRequest, match=r"texts\[1\] has no text"):
        classifier.predict(["tea", " \u200b "])
    assert classifier.predict([]) == []
    with pytest.raises(WrongRequest, match="no option on_bat; it has text_column"):
        api.prepare_posts(folder / "posts.csv", tmp_path / "data", on_bat="drop")
    with pytest.raises(WrongRequest, match="did you mean"):
        api.train_run(overrides=["data.urll=x"])
    with pytest.raises(WrongRequest, match="give them to load_config"):
        api.train_run(Config(run={"output_url": "r"}, data={"url": "d"}), ["train.epochs=1"])
    with pytest.raises(WrongRequest, match="no adapter folder"):
        api.load_adapter(tmp_path / "none")
    with pytest.raises(WrongRequest, match="one of --data"):
        api.evaluate_adapter(folder / "adapter")
    with pytest.raises((WrongRequest, StorageError)):
        api.pull_run(f"{tmp_path}/none", tmp_path / "pulled")


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WrongRequest, match="emotion-launch run"):
        api.train_run(overrides=["data.url=d", "run.output_url=o"])


def test_a_borrowed_process_is_never_ended_by_force() -> None:
    with borrowed(), PreemptionWatch("none") as watch:
        assert is_borrowed()
        signal.raise_signal(signal.SIGINT)
        assert watch.notice is not None
        watch._interrupted_at -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not is_borrowed()


def test_pages_that_are_no_verbs_print_by_one_function() -> None:
    for page in sorted((ROOT / "emotion_train").rglob("*.py")):
        if page.stem in PRINTING or "print(" not in (text := page.read_text(encoding="utf-8")):
            continue
        called = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert not [node for node in called if isinstance(node, ast.Name) and node.id == "print"], page


def test_the_readme_leads_to_the_page() -> None:
    assert "(docs/python.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_libraries_that_a_call_loads_print_nothing() -> None:
    code = "from emotion_train import api\nimport bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("option", ["labels", "label_columns", "keep_columns", "header"])
def test_one_text_in_place_of_a_list_is_refused(option: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {option: "a,b"}
    with pytest.raises(WrongRequest, match=rf"{option} is the text 'a,b'; give a list, such as \['a', 'b'\]"):
        api.prepare_posts("posts.csv", tmp_path / "data", **options)
