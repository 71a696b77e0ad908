"""The end of a run on several labels: what is published is what the report counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emotion_train import cli
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.floors import PRIOR, TFIDF
from emotion_train.evaluation.predictions import (
    SetPredictions,
    any_predictions_from_parquet,
    predictions_key,
)
from emotion_train.evaluation.sets import SetCounts
from emotion_train.model.facts import FACTS
from emotion_train.report.schema import Report, SetFigures
from emotion_train.runs.log import final_entry, read_part
from emotion_train.storage.open import open_store
from tests.helpers.other_targets import tiny_folder
from tests.helpers.tiny_runs import tiny_words


def test_a_run_on_several_labels_publishes_its_decision_and_the_answers_that_its_report_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = tiny_folder(tmp_path, "several")
    # data.limit leaves estimates of label counts, which the scored posts must not be held against
    assert cli.main(["train", *tiny_words(folder, "data.limit=40", "train.epochs=1")]) == 0
    store = open_store(str(folder / "runs"))
    entry = final_entry(store, "tiny")
    files = {
        part.key.removeprefix(f"final/{entry.incarnation:08d}/"): read_part(store, "tiny", part)
        for part in entry.parts
    }
    report = Report.model_validate_json(files["report.json"])
    decision = Decision.model_validate_json(files[f"adapter/{DECISION}"])
    assert (report.targets, decision.targets, decision.labels) == ("several", "several", report.labels)
    assert b'"targets": "several"' in files[f"adapter/{FACTS}"]
    answers: dict[str, Callable[[SetPredictions], SetPredictions]] = {
        "validation": decision.held_out,
        "test": lambda test: test.answered(decision.answers(test.prob_NC)),
    }
    for name, figures in report.splits.items():
        predictions = any_predictions_from_parquet(files[predictions_key(name)])
        assert isinstance(predictions, SetPredictions)
        assert isinstance(figures, SetFigures)
        np.testing.assert_array_equal(predictions.predicted_NC, answers[name](predictions).predicted_NC)
        assert report.dataset.label_counts[name] == tuple(predictions.truth_NC.sum(axis=0).tolist())
        assert [floor.name for floor in figures.floors] == [PRIOR, TFIDF]
        assert figures.macro_f1 == SetCounts(predictions.counts()).macro_f1
        assert tuple(one.threshold for one in figures.per_label) == decision.thresholds
    assert entry.metrics["jaccard"] == report.splits["test"].also["jaccard"]
    assert "| split | macro-F1 | 95 % interval | macro-F1 at 0.5 |" in files["adapter/README.md"].decode()
