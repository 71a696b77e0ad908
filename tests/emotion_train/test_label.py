"""The verb `label` with a real small adapter: what it answers is what `predict` answers, what it
refuses it refuses in one sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emotion_train.cli import main
from emotion_train.errors import Preempted
from emotion_train.evaluation.adapter import AdapterChoice, open_classifier
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.gate import Gate
from emotion_train.labelling import request as request_page
from emotion_train.labelling.job import SUCCESS, read_job
from emotion_train.labelling.leases import Board
from emotion_train.storage.folder import FolderStore
from launch.cli import main as launch
from tests.helpers.labelling_jobs import LABELS, HashScorer, labelled, write_lines
from tests.helpers.tiny_adapter import write_adapter

EARLIER = Path(__file__).parents[1] / "earlier"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base, `one` and `two`, the first with gates; `gated` knows no model."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        write_adapter(folder / name, seed=seed)
    write_adapter(folder / "hash", real=False)
    gates = (Gate(label=None, precision=0.9, threshold=0.4, share=0.5),)
    decision = Decision(targets="one", labels=LABELS, gates=gates)
    (folder / "one" / DECISION).write_bytes(decision.to_bytes())
    return folder


def label(adapters: Path, source: Path, out: Path, *words: str, adapter: str = "one") -> int:
    told = ["--device", "cpu", "--notices", "none", "--unit-posts", "20", *words]
    return main(["label", str(source), str(out), "--adapter", str(adapters / adapter), *told])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("emotion-train: ")
    assert text.endswith(".")
    return text


def test_labels_are_those_of_predict_and_a_finished_job_prints_its_summary(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_lines(tmp_path / "posts.jsonl", 50), tmp_path / "out"
    words = ("--probabilities", "--accept-precision", "0.9", "--columns", "n", "--usd-per-hour", "3.6")
    assert label(adapters, source, out, *words) == 0
    rows = sorted(labelled(FolderStore(out)), key=lambda row: row["row"])
    classifier = open_classifier(AdapterChoice(adapters / "one", device="cpu"))
    prob_NC = classifier.probabilities([f"post {number}" for number in range(50)])
    assert np.abs(np.array([row["probabilities"] for row in rows]) - prob_NC).max() < 1e-6
    assert [row["label"] for row in rows] == [LABELS[place] for place in prob_NC.argmax(axis=1)]
    assert [row["accepted"] for row in rows] == (prob_NC.max(axis=1) >= np.float32(0.4)).tolist()
    first = capsys.readouterr().out
    assert "labelled 50 posts in 3 parts" in first
    assert "accepted: " in first
    before = {info.key: info.modified for info in FolderStore(out).list()}
    assert label(adapters, source, out, *words) == 0
    assert capsys.readouterr().out.splitlines() == first.splitlines()[:-1]  # without this worker's own line
    assert {info.key: info.modified for info in FolderStore(out).list()} == before
    assert launch(["label-status", str(out)]) == 0
    assert "labelled 50 posts" in capsys.readouterr().out


def test_several_adapters_answer_as_those_of_predict_over_a_base_that_is_read_once(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from emotion_train.model import load, lora

    read, load_base = [], load.load_base

    def counted(config: Any, *words: Any, **more: Any) -> Any:
        read.append(config.files.name)
        return load_base(config, *words, **more)

    monkeypatch.setattr(lora, "load_base", counted)
    source, out = write_lines(tmp_path / "posts.jsonl", 10), tmp_path / "out"
    assert label(adapters, source, out, "--adapter", str(adapters / "two"), "--probabilities") == 0
    assert len(read) == 1
    told = capsys.readouterr()
    assert "labelled 10 posts in 1 part, " in told.out
    assert "this worker: 1 part, 10 posts, " in told.out
    assert "10 rows in 1 unit\n" in told.err
    texts = [f"post {number}" for number in range(10)]
    places = [adapters / name for name in ("one", "two")]
    together = open_classifier(AdapterChoice(places[0], more=(places[1],), device="cpu"))
    apart = [open_classifier(AdapterChoice(place, device="cpu")).probabilities(texts) for place in places]
    rows = sorted(labelled(FolderStore(out)), key=lambda row: row["row"])
    found_NC = np.array([row["probabilities"] for row in rows])
    assert np.abs(found_NC - together.probabilities(texts)).max() < 1e-6
    of_logits_NC = np.exp(np.mean(np.log(apart), axis=0))
    assert np.abs(found_NC - of_logits_NC / of_logits_NC.sum(axis=1, keepdims=True)).max() < 1e-5
    assert np.abs(found_NC - np.mean(apart, axis=0)).max() > 1e-5


@pytest.mark.usefixtures("hashed")
def test_several_adapters_continue_no_job_that_averaged_probabilities(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_lines(tmp_path / "posts.jsonl", 10), tmp_path / "out"
    more = ("--adapter", str(adapters / "two"))
    assert label(adapters, source, out, *more) == 0
    job = read_job(FolderStore(out))
    assert job.mean_of == "logits"
    (out / "job.json").write_bytes(job.model_copy(update={"mean_of": "probabilities"}).to_bytes())
    assert b"mean_of" not in (out / "job.json").read_bytes()  # as earlier versions wrote it
    assert label(adapters, source, out, *more) == 2
    assert 'by the mean of the adapters\' "probabilities"' in refusal(capsys)
    assert launch(["label-status", str(out)]) == 0


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_page, "load_scorer", lambda request, folders: HashScorer())


@pytest.mark.usefixtures("hashed")
def test_another_request_against_the_same_job_is_refused_in_a_sentence(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_lines(tmp_path / "posts.jsonl", 50), tmp_path / "out"
    assert label(adapters, source, out, adapter="hash") == 0
    other = write_adapter(tmp_path / "other", real=False)
    (other / "adapter_model.safetensors").write_bytes(b"other")
    for words, name in (
        (("--probabilities",), "--probabilities"),
        (("--columns", "n"), "--columns"),
        (("--precision", "bf16"), "precision"),
        (("--text-column", "body"), "--text-column"),
    ):
        assert label(adapters, source, out, *words, adapter="hash") == 2
        assert name in refusal(capsys)
    assert label(tmp_path, source, out, adapter="other") == 2
    assert "adapters with the sha256" in refusal(capsys)
    for change in ("changed", "new", "gone"):
        folder = tmp_path / change
        folder.mkdir()
        write_lines(folder / "posts.jsonl", 50)
        assert label(adapters, folder, tmp_path / f"out-{change}", adapter="hash") == 0
        if change == "changed":
            write_lines(folder / "posts.jsonl", 51)
        elif change == "new":
            write_lines(folder / "more.jsonl", 5)
        else:
            (folder / "posts.jsonl").rename(folder / "posts-2.jsonl")
        assert label(adapters, folder, tmp_path / f"out-{change}", adapter="hash") == 2
        assert "changed since the job" in refusal(capsys)
    assert label(adapters, source, tmp_path, adapter="hash") == 0  # beside a file is not in it
    assert label(adapters, tmp_path / "new", tmp_path / "new" / "labels", adapter="hash") == 2
    assert "lies in the source" in refusal(capsys)


@pytest.mark.usefixtures("hashed")
def test_a_job_is_done_by_its_own_summary_and_all_of_its_parts(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_lines(tmp_path / "posts.jsonl", 50), tmp_path / "out"
    assert label(adapters, source, out, adapter="hash") == 0
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / SUCCESS, other)
    for again in (
        lambda: label(adapters, source, other, adapter="hash"),
        lambda: launch(["label-status", str(other)]),
    ):
        assert again() == 2
        assert "is the summary of job" in capsys.readouterr().err
    assert not list(other.glob("part-*"))
    (other / SUCCESS).unlink()
    assert label(adapters, source, other, adapter="hash") == 0
    for part, change in (("part-00000001.parquet", Path.unlink), ("part-00000002.parquet", _shorten)):
        kept = (other / part).read_bytes()
        change(other / part)
        capsys.readouterr()
        assert label(adapters, source, other, adapter="hash") == 2
        assert f"{part} is gone, or is not the part" in capsys.readouterr().err
        assert launch(["label-status", str(other)]) == 2
        (other / part).write_bytes(kept)
    assert label(adapters, source, other, adapter="hash") == 0


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.usefixtures("hashed")
@pytest.mark.parametrize(
    ("beside", "table"),
    [
        ("_delta_log/00000000000000000000.json", "Delta Lake"),
        ("de/_delta_log/00000000000000000001.checkpoint.parquet", "Delta Lake"),
        ("metadata/v2.metadata.json", "Iceberg"),
        (".hoodie/hoodie.properties", "Hudi"),
        ("v2.metadata.txt", None),
    ],
)
def test_files_of_a_table_are_told_from_plain_ones(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: str, table: str | None
) -> None:
    source = tmp_path / "posts"
    (source / beside).parent.mkdir(parents=True)
    (source / beside).write_text('{\n"version": 2\n}')
    write_lines(source / "posts.jsonl", 3)
    assert label(adapters, source, tmp_path / "out", adapter="hash") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if " is a table of " in line]
    assert [line.partition(" is a table of ")[2].partition(":")[0] for line in said] == [table] * (
        table is not None
    )
    assert len(labelled(FolderStore(tmp_path / "out"))) == 3


def test_a_worker_says_how_many_of_its_posts_were_cut(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "posts.csv"
    source.write_text("text\nshort\n" + "long " * 60 + "\n")
    assert label(adapters, source, tmp_path / "out") == 0
    assert "1 of 2 posts was cut at the 96 tokens" in capsys.readouterr().err
    source.write_text("text\nshort\n")
    assert label(adapters, source, tmp_path / "next") == 0
    assert "cut at" not in capsys.readouterr().err


def test_a_gate_is_that_of_one_adapter(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "posts.jsonl", 5)
    assert label(adapters, source, tmp_path / "out", "--accept-precision", "0.8") == 2
    assert "0.9" in refusal(capsys)
    words = ("--accept-precision", "0.9", "--adapter", str(adapters / "two"))
    assert label(adapters, source, tmp_path / "out", *words) == 2
    assert "one adapter" in refusal(capsys)
    assert not (tmp_path / "out").exists()


def test_sigterm_among_the_first_imports_ends_with_33_too(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "posts.jsonl", 5), tmp_path / "out"
    program = """
import importlib.abc, os, signal, sys
from emotion_train.cli import main

class Terminates(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "emotion_train.labelling.request":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Terminates())
sys.exit(main(["label", *sys.argv[1:]]))
"""
    words = (str(source), str(out), "--adapter", str(tmp_path / "none"), "--notices", "none")
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == Preempted.exit_code, done.stderr
    assert "0 units left to other workers" in done.stderr
    assert not out.exists()


@pytest.mark.usefixtures("hashed")
def test_sigterm_leaves_the_unit_to_others_and_ends_with_33(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_lines(tmp_path / "posts.jsonl", 60), tmp_path / "out"

    class Slow(HashScorer):
        def start(self, packs, count):  # type: ignore[no-untyped-def]
            time.sleep(0.3)
            return super().start(packs, count)

    def terminate() -> None:
        while not (out / "leases").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(request_page, "load_scorer", lambda request, folders: Slow())
        thread = threading.Thread(target=terminate)
        thread.start()
        assert label(adapters, source, out, adapter="hash") == Preempted.exit_code
        thread.join()
    store = FolderStore(out)
    board = Board.look(store, read_job(store))
    assert board.left
    assert not [unit for unit in board.left if board.is_leased(unit)]
    assert store.find(SUCCESS) is None
    assert label(adapters, source, out, adapter="hash") == 0
    assert sorted(row["row"] for row in labelled(store)) == list(range(1, 61))


@pytest.mark.usefixtures("hashed")
@pytest.mark.parametrize(
    ("report", "why"),
    [
        (None, ""),
        (b"{", "report.json cannot be read ("),
        (b'{"schema_version": "emotion-train/report/9"}', "cannot be read (schema_version: "),
        ((EARLIER / "report_1.json").read_bytes(), "is about other labels"),
    ],
)
def test_a_report_without_shares_is_told_once(
    hashed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: bytes | None, why: str
) -> None:
    """The summary then compares with nothing, which was not said."""
    folder = write_adapter(tmp_path / "adapter", real=False)
    if report is not None:
        (folder / "report").mkdir()
        (folder / "report" / "report.json").write_bytes(report)
    lines = write_lines(tmp_path / "posts.jsonl", 5)
    words = ["--adapter", str(folder), "--notices", "none"]
    assert main(["label", str(lines), str(tmp_path / "out"), *words]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("compared with no earlier shares") == (report is not None)
    assert why in told


def test_what_cannot_be_labelled_is_refused_before_anything_is_written(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    array = tmp_path / "array.jsonl"
    array.write_text(json.dumps([{"text": "a"}]))
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 and no more")
    nothing = tmp_path / "nothing.csv"
    nothing.write_bytes(b"")
    for source, words in (
        (tmp_path / "none.csv", "no file or folder"),
        (empty, "no CSV, JSONL or Parquet"),
        (array, "one JSON array"),
        (torn, "not a whole Parquet file"),
        (nothing, "nothing.csv is empty; give a file with posts"),
    ):
        assert label(adapters, source, out, adapter="hash") == 2
        assert words in refusal(capsys)
    lines = write_lines(tmp_path / "posts.jsonl", 5)
    assert label(adapters, lines, out, "--text-column", "body", adapter="hash") == 2
    assert str(lines) in (said := refusal(capsys))
    assert "no column 'body'" in said
    assert label(adapters, lines, out, "--split", "train", adapter="hash") == 2
    assert not (out / "job.json").exists()
