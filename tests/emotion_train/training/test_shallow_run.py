"""A run on the first blocks of its base, from its first step to what reads its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from emotion_train import api, cli
from emotion_train.config import load_config
from emotion_train.data.index import read_index
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.predictions import any_predictions_from_parquet, texts_from_parquet
from emotion_train.model.lora import LoadedAdapter
from emotion_train.report.schema import Report
from emotion_train.runs.checkpoint import check_same_question, read_document
from emotion_train.runs.log import read_log
from emotion_train.runs.published import download
from emotion_train.storage.open import open_store
from launch import cli as launch_cli
from tests.helpers.tiny_runs import tiny_config, tiny_words


def test_a_run_on_half_a_base_publishes_resumes_and_answers_at_its_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny_config(tmp_path)
    shallow = ("train.epochs=1", "train.max_steps=3", "report.texts=true", "model.layers=0.5")
    assert cli.main(["train", *tiny_words(tmp_path, *shallow)]) == 0
    store = open_store(str(tmp_path / "runs"))

    # what it published
    download(f"{tmp_path / 'runs'}/tiny", tmp_path / "pulled")
    report = Report.model_validate_json((tmp_path / "pulled" / "report" / "report.json").read_bytes())
    assert (
        "model.layers is 0.5: the first 1 of 2 blocks of the base were read and computed." in report.warnings
    )
    assert report.identity.config["model"]["layers"] == 0.5
    assert ", fp32, model.layers=0.5" in (tmp_path / "pulled" / "report" / "report.html").read_text()
    assert launch_cli.main(["show", f"{tmp_path / 'runs'}/tiny"]) == 0
    assert "model.layers=0.5" in capsys.readouterr().out
    facts = json.loads((tmp_path / "pulled" / "emotion_train.json").read_text())
    assert (facts["layers"], facts["whole_layers"]) == (1, 2)
    assert "the first 1 of 2 blocks of" in (tmp_path / "pulled" / "README.md").read_text()

    # who labels with it reads as many blocks
    raw = (tmp_path / "pulled" / "report" / "predictions_test.parquet").read_bytes()
    test, texts = any_predictions_from_parquet(raw), texts_from_parquet(raw)
    assert texts is not None
    classifier = api.load_adapter(tmp_path / "pulled", device="cpu")
    assert isinstance(classifier.loaded, LoadedAdapter)
    assert len(classifier.loaded.model.layers) == 1
    prob_NC = classifier.probabilities([texts[post_id] for post_id in test.ids])
    np.testing.assert_allclose(prob_NC, test.prob_NC, atol=1e-6)
    words = ["--data", str(tmp_path / "data"), "--split", "test", "--out", str(tmp_path / "card")]
    assert cli.main(["evaluate", "--adapter", str(tmp_path / "pulled"), "--device", "cpu", *words]) == 0
    assert json.loads((tmp_path / "card" / "scorecard.json").read_text())["layers"] == 1

    # and it is no run of another depth
    entry = [entry for entry in read_log(store, "tiny") if entry.kind == "checkpoint"][-1]
    document, index = read_document(store, "tiny", entry), read_index(open_store(str(tmp_path / "data")))
    asked = load_config(None, tiny_words(tmp_path, *shallow))
    assert check_same_question(document, asked, index, entry, "tiny") == []
    for depth in ("null", "2"):
        other = load_config(None, tiny_words(tmp_path, *shallow, f"model.layers={depth}"))
        with pytest.raises(WrongRequest, match=rf"model.layers \(was 0.5, is {other.model.layers}\)\. Give"):
            check_same_question(document, other, index, entry, "tiny")
    # one that was written before there were depths is of a whole base
    del document["config"]["model"]["layers"]
    whole = load_config(None, tiny_words(tmp_path, *shallow, "model.layers=null"))
    assert check_same_question(document, whole, index, entry, "tiny") == []
    with pytest.raises(WrongRequest, match=r"model.layers \(was None, is 0.5\)"):
        check_same_question(document, asked, index, entry, "tiny")
    capsys.readouterr()
