"""decision.json: what it says is what answers, and what does not fit the adapter is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import DECISION, Decision, read_decision
from emotion_train.evaluation.predictions import SetPredictions
from emotion_train.evaluation.thresholds import fit_thresholds, macro_f1_of_sets
from emotion_train.model.facts import AdapterFacts
from tests.helpers.scored_sets import ids, scored

LABELS = ("joy", "anger", "awe", "pride")


def facts(targets: str) -> AdapterFacts:
    """What a decision has to fit of an adapter."""
    return cast(AdapterFacts, SimpleNamespace(targets=targets, labels=LABELS))


def gate(**other: object) -> dict[str, object]:
    return {"label": None, "precision": 0.9, "threshold": 0.75, "share": 0.5} | other


def test_what_is_written_answers_as_what_was_fitted(tmp_path: Path) -> None:
    posts = scored(3000, seed=1)
    decision = Decision.of(posts, LABELS)
    (tmp_path / DECISION).write_bytes(decision.to_bytes())
    read = read_decision(tmp_path, facts("several"))
    assert read == decision
    thresholds_C = fit_thresholds(posts.truth_NC, posts.prob_NC)
    np.testing.assert_array_equal(np.asarray(read.thresholds, np.float32), thresholds_C.astype(np.float32))
    expected = SetPredictions.of(posts.ids, posts.truth_NC, posts.prob_NC, thresholds_C).predicted_NC
    np.testing.assert_array_equal(read.answers(posts.prob_NC), expected)
    # a probability that equals its threshold reaches it, on every machine
    edge_NC = np.array([read.thresholds], np.float32)
    assert read.answers(edge_NC).all()
    assert not read.answers(np.nextafter(edge_NC, np.float32(0))).any()


def test_figures_of_a_decision_are_those_out_of_fold() -> None:
    posts = scored(3000, seed=1)
    decision = Decision.of(posts, LABELS)
    assert decision.folds == 5
    assert decision.macro_f1_at_half == macro_f1_of_sets(posts.counts())
    assert decision.macro_f1 == macro_f1_of_sets(decision.held_out(posts).counts())
    assert decision.macro_f1 > decision.macro_f1_at_half


def test_thresholds_that_gain_nothing_are_not_kept() -> None:
    """The labels are there exactly where 0.5 says so; few posts cannot choose so well."""
    prob_NC = np.random.default_rng(0).random((40, 4))
    posts = SetPredictions.of(ids(40), prob_NC >= 0.5, prob_NC)
    decision = Decision.of(posts, LABELS)
    assert (decision.thresholds, decision.folds, decision.macro_f1) == ((0.5,) * 4, None, 1.0)
    np.testing.assert_array_equal(decision.held_out(posts).predicted_NC, posts.truth_NC)


@pytest.mark.parametrize("targets", ["one", "shares"])
def test_an_adapter_of_one_answer_needs_no_file(tmp_path: Path, targets: str) -> None:
    decision = read_decision(tmp_path, facts(targets))
    assert (decision.targets, decision.thresholds) == (targets, None)
    answers_NC = decision.answers([[0.1, 0.5, 0.2, 0.2], [0.4, 0.1, 0.4, 0.1]])
    assert answers_NC.tolist() == [[False, True, False, False], [True, False, False, False]]


def test_an_adapter_of_several_labels_needs_its_file(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match=r"has no decision\.json"):
        read_decision(tmp_path, facts("several"))


@pytest.mark.parametrize(
    "edit",
    [
        {"labels": ["joy", "anger", "awe", "shame"]},
        {"labels": ["joy"], "thresholds": [0.5]},
        {"targets": "one"},
        {"targets": "one", "thresholds": None},
        {"thresholds": None},
        {"thresholds": [0.5, 0.5, 0.5]},
        {"thresholds": [0.5, 0.5, 0.5, 1.5]},
        {"thresholds": [0.5, 0.5, 0.5, "high"]},
        {"schema_version": "emotion-train/decision/9"},
        {"temperature": 2.0},
        {"temperature": [2.0]},
        {"temperature": [2.0, 1.0, 1.0, 0.0]},
        {"temperature": [2.0, 1.0, 1.0, 1e30]},
        {"temperature": [2.0, 1.0, 1.0, None]},
        {"temperature_gain": {"difference": 0.1, "low": 0.0}},
        {"gates": [gate(label="shame")]},
        {"gates": [gate(), gate()]},
        {"gates": [gate(threshold=None)]},
        {"gates": [gate(threshold=1.5)]},
        {"gates": [gate(share=-0.1)]},
        {"gates": [gate(precision=1.0)]},
        {"gates": [{"label": None, "precision": 0.9}]},
        {"gates": None},
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, edit: dict[str, object]) -> None:
    whole = json.loads(Decision.of(scored(100, seed=1), LABELS).to_bytes())
    (tmp_path / DECISION).write_text(json.dumps(whole | edit))
    with pytest.raises(WrongRequest, match=r"decision\.json .* pull the adapter again"):
        read_decision(tmp_path, facts("several"))


def gated(targets: TargetKind = "one", **other: Any) -> Decision:
    gates = (gate(), gate(precision=0.95, threshold=None, share=None), gate(label="awe", threshold=0.25))
    return Decision.model_validate({"targets": targets, "labels": LABELS, "gates": gates} | other)


def test_a_temperature_and_gates_are_read_as_they_were_written(tmp_path: Path) -> None:
    gain = {"difference": 0.03, "low": 0.02, "high": 0.04}
    decision = gated(temperature=(1.62,), temperature_gain=gain)
    (tmp_path / DECISION).write_bytes(decision.to_bytes())
    assert read_decision(tmp_path, facts("one")) == decision
    several = gated("several", thresholds=(0.5,) * 4, temperature=(1.62, 1.0, 0.8, 20.0))
    (tmp_path / DECISION).write_bytes(several.to_bytes())
    assert read_decision(tmp_path, facts("several")) == several


def test_a_file_of_before_has_neither(tmp_path: Path) -> None:
    (tmp_path / DECISION).write_text(
        '{"schema_version": "emotion-train/decision/1", "targets": "one", "labels": ["joy", "anger", "awe",'
        ' "pride"], "thresholds": null, "folds": null, "macro_f1": null, "macro_f1_at_half": null}'
    )
    assert read_decision(tmp_path, facts("one")) == Decision.one(LABELS)
    with pytest.raises(WrongRequest, match="has no gates, as an earlier version published it"):
        Decision.one(LABELS).accept_above(0.9)


def test_the_threshold_over_all_is_that_of_its_precision() -> None:
    assert gated().accept_above(0.9) == 0.75
    with pytest.raises(WrongRequest, match=r"precision of 0\.95 on its validation posts; .* one of 0\.9\."):
        gated().accept_above(0.95)
    with pytest.raises(WrongRequest, match=r"no gate for a precision of 0\.8; .* one of 0\.9, 0\.95\."):
        gated().accept_above(0.8)
    shut = gated(gates=(gate(threshold=None, share=None),))
    with pytest.raises(WrongRequest, match="no gate is open"):
        shut.accept_above(0.9)


def test_an_answer_is_accepted_from_its_threshold_on() -> None:
    prob_NC = np.array([[0.75, 0.25, 0, 0], [0.1, 0.1, 0.1, 0.7], [0, 0, 0.9, 0.1]], np.float32)
    assert gated().accepted(prob_NC, 0.9).tolist() == [True, False, True]
    prob_NC[0, 0] = np.nextafter(np.float32(0.75), np.float32(0))
    assert gated().accepted(prob_NC, 0.9).tolist() == [False, False, True]


def test_of_several_labels_the_least_likely_one_has_to_reach_the_gate_and_none_is_not_accepted() -> None:
    prob_NC = np.array(
        [[0.9, 0.8, 0.1, 0], [0.9, 0.6, 0, 0], [0.1, 0.1, 0.1, 0.1], [0, 0, 0.3, 0.8]], np.float32
    )
    decision = gated("several", thresholds=(0.5, 0.5, 0.5, 0.5))
    np.testing.assert_allclose(decision.confidence(prob_NC), [0.8, 0.6, 0, 0.8])
    assert decision.accepted(prob_NC, 0.9).tolist() == [True, False, False, True]
    at_nought = gated("several", thresholds=(0.5,) * 4, gates=(gate(threshold=0.0),))
    assert at_nought.accepted(prob_NC, 0.9).tolist() == [True, True, False, True]


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / DECISION).write_bytes(b'{"thresholds": [NaN')
    with pytest.raises(WrongRequest, match=r"cannot be read"):
        read_decision(tmp_path, facts("several"))
