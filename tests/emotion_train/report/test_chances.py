"""What the report says of a temperature and of gates: numbers by another way, pages that show them,
and nothing where there are none.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import log_loss

from emotion_train.evaluation.decision import Decision
from emotion_train.evaluation.metrics import expected_calibration_error
from emotion_train.evaluation.predictions import Predictions, SetPredictions
from emotion_train.evaluation.temperature import BeforeAndAfter, divided, temper
from emotion_train.report.chances import chance_sentences, gate_figures, temperature_figures
from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report, Scorecard
from emotion_train.report.scorecard import Seen, build_scorecard
from emotion_train.report.terminal import print_scorecard
from tests.emotion_train.report.test_report import HOSTILE, parsed, predictions, printed, report, result
from tests.helpers.scored_sets import scored

LABELS = ["joy", HOSTILE, "awe", "calm", "fear"]
PRECISIONS = (0.8, 0.95, 0.999)
Made = tuple[Report, Decision, dict[str, Predictions], dict[str, BeforeAndAfter]]


def too_sure(seed: int) -> Predictions:
    """Predictions whose logits are 2.5 times what they should be: those of normal numbers of which
    one lies `skill` higher are `skill` times the numbers.
    """
    numbers = predictions(1500, skill=2.5, seed=seed)
    return replace(numbers, prob_NC=divided(numbers.prob_NC, 1 / (2.5 * 2.5), "one"))


def of_scikit_learn(truth_N: NDArray[np.int32], prob_NC: NDArray[np.float32]) -> float:
    sums_N1 = prob_NC.sum(axis=1, keepdims=True, dtype=float)
    return float(log_loss(truth_N, prob_NC / sums_N1, labels=range(5)))


@pytest.fixture(scope="module")
def made() -> Made:
    raw = {"validation": too_sure(1), "test": too_sure(2)}
    tempered = temper(raw["validation"])
    assert tempered.temperature is not None
    published = {
        name: replace(one, prob_NC=divided(one.prob_NC, tempered.temperature, "one"))
        for name, one in raw.items()
    }
    decision = Decision.one(LABELS).acting(published["validation"], tempered, PRECISIONS)
    changed = {
        "validation": BeforeAndAfter(raw["validation"].prob_NC, tempered.held_out_NC),
        "test": decision.before_and_after(published["test"]),
    }
    plain = report({name: result(one) for name, one in published.items()}, list(LABELS))
    assert (plain.temperature, plain.gates) == (None, ())
    found = plain.model_copy(
        update={
            "temperature": temperature_figures(decision, published, changed),
            "gates": gate_figures(decision, published),
        }
    )
    return Report.model_validate_json(found.to_bytes()), decision, raw, changed


def test_log_loss_and_calibration_before_and_after_are_those_of_the_probabilities(made: Made) -> None:
    written, decision, raw, changed = made
    figures = written.temperature
    assert figures is not None
    assert figures.temperature == decision.temperature == pytest.approx((2.5,), rel=0.15)
    for name, one in raw.items():
        split = figures.splits[name]
        for part, prob_NC in ((split.before, one.prob_NC), (split.after, changed[name].after_NC)):
            assert part.log_loss == pytest.approx(of_scikit_learn(one.truth_N, prob_NC), rel=1e-4)
            assert part.calibration_error == pytest.approx(
                expected_calibration_error(prob_NC, one.truth_N).error, abs=1e-4
            )
        assert split.after.log_loss < split.before.log_loss - 0.05
        assert split.after.calibration_error < split.before.calibration_error
    gain = figures.splits["validation"].before.log_loss - figures.splits["validation"].after.log_loss
    assert figures.gain == pytest.approx(gain)


def test_gates_are_held_against_the_posts_of_each_split(made: Made) -> None:
    written, decision, raw, _ = made
    test = raw["test"]
    published_NC = divided(test.prob_NC, decision.temperature or 1, "one")
    assert len(written.gates) == 6 * len(PRECISIONS)
    opened = 0
    for gate in written.gates:
        if gate.threshold is None:
            assert gate.checks == {}
            continue
        opened += 1
        asked_N = np.ones(1500, bool)
        if gate.label is not None:
            asked_N = test.predicted_N == LABELS.index(gate.label)
        accepted_N = asked_N & (published_NC.max(axis=1) >= np.float32(gate.threshold))
        check = gate.checks["test"]
        right_N = accepted_N & (test.predicted_N == test.truth_N)
        assert (check.answers, check.accepted, check.right) == (
            asked_N.sum(),
            accepted_N.sum(),
            right_N.sum(),
        )
    assert opened > 4
    over_all = written.gates[0]
    recorded = next(gate for gate in decision.gates if gate.label is None)
    assert over_all.checks["validation"].accepted / 1500 == recorded.share


def test_pages_and_terminal_show_both(made: Made) -> None:
    written = made[0]
    page = render_html(written)
    parsed(page)
    for words in (
        "Probabilities before and after the temperature",
        "validation, out of fold",
        "Which answers to accept",
        "no probability",
        f"p = {written.gates[0].threshold:g}",
    ):
        assert words in page
    assert HOSTILE not in page
    shown = printed(written, width=300)
    for sentence in chance_sentences(written.temperature, written.gates, "test"):
        assert sentence in shown
    check = written.gates[0].checks["test"]
    assert f"They are {100 * check.accepted / check.answers:.1f} % of the test posts" in shown
    assert "No probability is enough for answers that are right 99.9 % of the time." in shown


def test_reports_without_them_say_nothing_of_them() -> None:
    plain = report({"test": result(predictions(200))})
    page = render_html(plain)
    assert "before and after the temperature" not in page
    assert "Which answers to accept" not in page
    assert "temperature" not in printed(plain)


def test_a_scorecard_takes_posts_that_chose_the_temperature_out_of_fold(made: Made) -> None:
    _, decision, raw, changed = made
    published = replace(
        raw["validation"], prob_NC=divided(raw["validation"].prob_NC, decision.temperature or 1, "one")
    )

    def card(chose: bool) -> Scorecard:
        return build_scorecard(
            result(published),
            name="validation",
            labels=LABELS,
            train_counts=None,
            seen=Seen(),
            remarks=(),
            samples=100,
            seed=1,
            decision=decision,
            chose=chose,
            source="data",
            run_id="tiny",
            base="some/base",
            precision="nf4",
        )

    own, other = card(True), card(False)
    truth_N = published.truth_N
    for one, prob_NC in ((own, changed["validation"].after_NC), (other, published.prob_NC)):
        assert one.temperature is not None
        after = one.temperature.splits["validation"].after
        assert after.log_loss == pytest.approx(of_scikit_learn(truth_N, prob_NC), rel=1e-4)
        assert Scorecard.model_validate_json(one.to_bytes()) == one
    assert own.temperature != other.temperature
    out = io.StringIO()
    print_scorecard(own, Console(file=out, width=300, highlight=False))
    assert "It lowers the log loss of validation posts that did not choose it by" in out.getvalue()
    assert "Right at least 80 % of the time: answers from p = " in out.getvalue()
    out = io.StringIO()  # as `evaluate` prints on a narrow terminal: indented sentences wrap
    print_scorecard(own, Console(file=out, width=50, highlight=False, soft_wrap=True))
    shown = " ".join(out.getvalue().split())
    sentences = chance_sentences(own.temperature, own.gates, "validation")
    assert len(sentences) > 1
    for sentence in sentences:
        assert sentence in shown


def test_of_several_labels_each_has_its_temperature_and_answers_are_right_without_a_wrong_label() -> None:
    posts = scored(3000, 1, knows=3.5)
    labels = ("joy", "anger", "awe", "calm")
    tempered = temper(posts)
    assert tempered.temperature is not None
    published = replace(posts, prob_NC=divided(posts.prob_NC, tempered.temperature, "several"))
    decision = Decision.of(published, labels).acting(published, tempered, (0.3, 0.5))
    answered = published.answered(decision.answers(published.prob_NC))
    # answers out of fold are counted elsewhere: gates are about those of the decision
    silent = SetPredictions(posts.ids, posts.truth_NC, np.zeros_like(posts.truth_NC), published.prob_NC)
    gates = gate_figures(decision, {"test": silent})
    assert gates == gate_figures(decision, {"test": answered})
    opened = [gate for gate in gates if gate.label is None and gate.threshold is not None]
    assert opened
    for gate in opened:
        sure_N = np.where(answered.predicted_NC, answered.prob_NC, 2).min(axis=1)
        accepted_N = (sure_N <= 1) & (sure_N >= np.float32(gate.threshold))
        right_N = accepted_N & ~(answered.predicted_NC & ~answered.truth_NC).any(axis=1)
        check = gate.checks["test"]
        assert (check.answers, check.accepted, check.right) == (3000, accepted_N.sum(), right_N.sum())
    figures = temperature_figures(decision, {"test": answered}, {"test": decision.before_and_after(answered)})
    assert figures is not None
    truth_NC, before = posts.truth_NC, figures.splits["test"].before
    expected = np.mean([log_loss(truth_NC[:, one], posts.prob_NC[:, one].astype(float)) for one in range(4)])
    assert before.log_loss == pytest.approx(expected, rel=1e-3)
    (sentence, *_) = chance_sentences(figures, gates, "test")
    assert "of 4 labels have a temperature" in sentence
