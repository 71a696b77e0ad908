"""The end of a run on several labels: what is published is what the report counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emotion_train import api, cli
from emotion_train.data.labels import MAX_LABELS
from emotion_train.data.targets import TargetKind
from emotion_train.edges.bounded import tensors_in
from emotion_train.evaluation import temperature
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.floors import PRIOR, TFIDF
from emotion_train.evaluation.metrics import Difference
from emotion_train.evaluation.predictions import (
    SetPredictions,
    any_predictions_from_parquet,
    predictions_key,
    texts_from_parquet,
)
from emotion_train.evaluation.sets import SetCounts
from emotion_train.evaluation.temperature import Tempered
from emotion_train.model.facts import FACTS, WEIGHTS
from emotion_train.report.schema import Report, SetFigures
from emotion_train.runs.checkpoint import best_adapter
from emotion_train.runs.log import final_entry, read_log, read_part
from emotion_train.runs.published import download
from emotion_train.storage.open import open_store
from tests.helpers.other_targets import tiny_folder
from tests.helpers.target_data import having, write_targets
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_words


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_thousand_labels_go_through_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TargetKind
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    causal_checkpoint(tmp_path / "base", "llama")
    labels = [f"label {number:03}" for number in range(MAX_LABELS)]
    assert len(labels) == 1000
    other = 7 if kind == "several" else 1
    splits = {
        split: [
            (f"post {number} of {split}", having(*sorted({number % 1000, number * other % 1000})))
            for number in range(posts)
        ]
        for split, posts in (("train", 2000), ("validation", 1000), ("test", 1000))
    }
    write_targets(str(tmp_path / "data"), kind, splits, tmp_path, labels)
    words = tiny_words(tmp_path, "train.epochs=1", "train.global_batch_size=500", "report.floor_max_rows=1")
    assert cli.main(["train", *words]) == 0
    pages = list((tmp_path / "runs").rglob("report.html"))
    assert pages
    assert max(path.stat().st_size for path in pages) < 3_000_000


def test_a_run_on_several_labels_publishes_its_decision_and_the_answers_that_its_report_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(temperature, "temper", chosen := Chosen())
    folder = tiny_folder(tmp_path, "several")
    # data.limit leaves estimates of label counts, which the scored posts must not be held against
    assert (
        cli.main(["train", *tiny_words(folder, "data.limit=40", "train.epochs=1", "report.texts=true")]) == 0
    )
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
    require_the_temperature_is_in_the_head(folder, report, decision, files, chosen)


class Chosen:
    """Takes the place of `temper`, and remembers what it was shown."""

    numbers = (2.0, 1.0, 0.5, 1.25)

    def __call__(self, predictions: SetPredictions) -> Tempered:
        self.seen = predictions
        held_out_NC = temperature.divided(predictions.prob_NC, self.numbers, "several")
        return Tempered(self.numbers, Difference(0.1, 0.05, 0.15), held_out_NC)


def require_the_temperature_is_in_the_head(
    folder: Path, report: Report, decision: Decision, files: dict[str, bytes], chosen: Chosen
) -> None:
    assert decision.temperature == chosen.numbers
    store = open_store(str(folder / "runs"))
    best = best_adapter(store, "tiny", read_log(store, "tiny"), print)
    assert best is not None
    trained, published = tensors_in(best[1]), tensors_in(files[f"adapter/{WEIGHTS}"])
    for name, tensor in trained.items():
        divisor = torch.tensor(chosen.numbers)[:, None] if name.endswith("score.weight") else 1
        assert torch.equal(published[name], tensor / divisor), name
    by_split = {name: any_predictions_from_parquet(files[predictions_key(name)]) for name in report.splits}
    validation, test = by_split["validation"], by_split["test"]
    assert isinstance(validation, SetPredictions)
    # thresholds are those of what is published, whose head gave these probabilities
    assert decision.thresholds == Decision.of(validation, report.labels).thresholds
    np.testing.assert_allclose(
        validation.prob_NC, chosen(chosen.seen).held_out_NC[np.argsort(chosen.seen.ids)], atol=1e-6
    )
    download(f"{folder / 'runs'}/tiny", folder / "pulled")
    classifier = api.load_adapter(folder / "pulled", device="cpu")
    texts = texts_from_parquet(files[predictions_key("test")])
    assert texts is not None
    words = [texts[post_id] for post_id in test.ids]
    np.testing.assert_allclose(classifier.probabilities(words), test.prob_NC, atol=1e-6)
    raw = [list(one.probabilities.values()) for one in classifier.predict(words, raw=True)]
    np.testing.assert_allclose(decision.raw(test.prob_NC), raw, atol=1e-6)
    assert np.abs(test.prob_NC - raw).max() > 0.01
    figures = report.temperature
    assert figures is not None
    assert (figures.temperature, figures.gain, figures.gain_low) == (chosen.numbers, 0.1, 0.05)
    for name, prob_NC in (("validation", chosen.seen.prob_NC), ("test", np.array(raw))):
        truth_NC = (chosen.seen if name == "validation" else test).truth
        before, after = figures.splits[name].before, figures.splits[name].after
        assert before.log_loss == pytest.approx(
            temperature.losses(prob_NC, truth_NC.astype(float), "several").mean(), rel=1e-4
        )
        assert before != after
    assert figures.splits["test"].after.calibration_error == report.splits["test"].calibration_error
    gates = [(gate.label, gate.precision, gate.threshold) for gate in decision.gates]
    assert [(gate.label, gate.precision, gate.threshold) for gate in report.gates] == gates
    assert [gate[:2] for gate in gates[:5]] == [*((None, p) for p in (0.8, 0.9, 0.95, 0.99)), ("awe", 0.8)]
