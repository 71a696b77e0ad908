"""What the version before schema emotion-train/index/2 wrote trains, resumes, is pulled and
predicts.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from emotion_train import cli
from emotion_train.data.index import read_index
from emotion_train.data.reader import RowGroupReader
from emotion_train.evaluation.decision import DECISION
from emotion_train.evaluation.predictions import predictions_from_parquet
from emotion_train.runs.log import final_entry, read_log
from emotion_train.storage.open import open_store
from launch import cli as launch
from launch.results.history import list_runs
from tests.earlier.make import ARCHIVE, STOPPED_AT, words

HEAD = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def test_the_data_set_is_read_and_keeps_its_name(folder: Path) -> None:
    raw = (folder / "data" / "index.json").read_bytes()
    assert b'"schema_version":"emotion-train/index/1"' in raw
    index = read_index(open_store(str(folder / "data")))
    assert index.to_bytes() == raw
    log = read_log(open_store(str(folder / "runs")), "stopped")
    assert {entry.index_sha256 for entry in log} == {index.sha256()} == {hashlib.sha256(raw).hexdigest()}


def test_its_stopped_run_resumes_and_ends_as_the_whole_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert cli.main(["train", *words(folder, "stopped"), "loss.class_weights=balanced"]) == 0
    assert f"resumed at step {STOPPED_AT} of 14" in capsys.readouterr().err
    store = open_store(str(folder / "runs"))
    adapters = [
        folder / "runs" / run / f"final/{final_entry(store, run).incarnation:08d}/adapter"
        for run in ("stopped", "whole")
    ]
    ours, theirs = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    # a run that is published today has its temperature in the head
    temperature = json.loads((adapters[0] / DECISION).read_bytes())["temperature"] or [1.0]
    ours[HEAD] *= temperature[0]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-3, err_msg=name)


def test_its_published_run_is_listed_pulled_and_predicts_the_same(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(folder / "runs"))
    whole = next(run for run in list_runs(store) if run.run_id == "whole")
    assert (whole.state, whole.step) == ("published", 14)
    assert launch.main(["pull", f"{folder / 'runs'}/whole", "--to", str(tmp_path / "adapter")]) == 0
    stored = predictions_from_parquet(
        (tmp_path / "adapter" / "report" / "predictions_test.parquet").read_bytes()
    )
    data = open_store(str(folder / "data"))
    split = read_index(data).split("test")
    with RowGroupReader(data, split) as reader:
        groups = [reader.rows(group) for group in range(len(split.row_groups))]
    text_of = {post: str(text) for rows in groups for post, text in zip(rows.ids, rows.texts, strict=True)}
    assert len(text_of) == split.rows
    posts = [text_of[post] for post in stored.ids]
    printed = io.StringIO()
    with redirect_stdout(printed):
        form = ["--base", str(folder / "base"), "--format", "jsonl"]
        assert cli.main(["predict", "--adapter", str(tmp_path / "adapter"), *form, *posts]) == 0
    answers = [json.loads(line) for line in printed.getvalue().splitlines()]
    labels = list(answers[0]["probabilities"])
    assert [labels.index(answer["label"]) for answer in answers] == stored.predicted_N.tolist()
    ours_NC = np.array([list(answer["probabilities"].values()) for answer in answers])
    np.testing.assert_allclose(ours_NC, stored.prob_NC, rtol=0, atol=1e-3)
