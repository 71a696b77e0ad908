"""The figures of probabilities to act on: the effect of the temperature, and the answers that the
gates accept, on posts with known labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emotion_train.evaluation.gate import answers_of
from emotion_train.evaluation.metrics import calibration, expected_calibration_error
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions
from emotion_train.evaluation.temperature import BeforeAndAfter as Probabilities
from emotion_train.evaluation.temperature import losses, targets_of
from emotion_train.report.schema import (
    BeforeAndAfter,
    GateCheck,
    GateFigures,
    ProbabilityFigures,
    TemperatureFigures,
)
from emotion_train.report.units import percent, signed

if TYPE_CHECKING:
    from emotion_train.evaluation.decision import Decision


def temperature_figures(
    decision: Decision, splits: Mapping[str, AnyPredictions], tempered: Mapping[str, Probabilities]
) -> TemperatureFigures | None:
    """The figures of each split before and after the temperature; None where no temperature was
    looked for.
    """
    gain = decision.temperature_gain
    if gain is None:
        return None
    return TemperatureFigures(
        temperature=decision.temperature,
        gain=gain.difference,
        gain_low=gain.low,
        gain_high=gain.high,
        splits={
            name: BeforeAndAfter(
                before=_figures(predictions, tempered[name].before_NC),
                after=_figures(predictions, tempered[name].after_NC),
            )
            for name, predictions in splits.items()
        },
    )


def gate_figures(decision: Decision, splits: Mapping[str, AnyPredictions]) -> tuple[GateFigures, ...]:
    """The gates, checked on posts that are answered by the decision."""
    splits = {
        name: one.answered(decision.answers(one.prob_NC)) if isinstance(one, SetPredictions) else one
        for name, one in splits.items()
    }
    found = []
    for gate in decision.gates:
        label = None if gate.label is None else decision.labels.index(gate.label)
        checks: dict[str, GateCheck] = {}
        if gate.threshold is not None:
            checks = {name: _check(one, label, gate.threshold) for name, one in splits.items()}
        found.append(
            GateFigures(label=gate.label, precision=gate.precision, threshold=gate.threshold, checks=checks)
        )
    return tuple(found)


def _check(predictions: AnyPredictions, label: int | None, threshold: float) -> GateCheck:
    answers = answers_of(predictions, label)
    accepted, right = answers.above(threshold)
    asked = len(predictions.ids) if label is None else len(answers.right_N)
    return GateCheck(answers=asked, accepted=accepted, right=right)


def chance_sentences(
    temperature: TemperatureFigures | None, gates: Sequence[GateFigures], name: str
) -> list[str]:
    """The sentences on the temperature, and on the gates over all labels on the posts of `name`;
    one for all gates that nothing reaches.
    """
    sentences = [] if temperature is None else [temperature_words(temperature)]
    over_all = [gate for gate in gates if gate.label is None]
    sentences += [gate_words(gate, name) for gate in over_all if gate.threshold is not None]
    closed = [gate.precision for gate in over_all if gate.threshold is None]
    return sentences + ([_closed_words(closed)] if closed else [])


def temperature_words(figures: TemperatureFigures) -> str:
    interval = f"95 % interval {signed(figures.gain_low)} to {signed(figures.gain_high)}"
    if figures.temperature is None:
        return (
            "The head has no temperature: one would lower the log loss of validation posts that did not"
            f" choose it by {signed(figures.gain)} ({interval}), which is no gain beyond chance."
        )
    used = [one for one in figures.temperature if one != 1]
    which = (
        f"The temperature is {used[0]:g}: the head's logits are divided by it"
        if len(figures.temperature) == 1
        else f"{len(used)} of {len(figures.temperature)} labels have a temperature, {min(used):g} to"
        f" {max(used):g}, by which their logits are divided"
    )
    return (
        f"{which}. It lowers the log loss of validation posts that did not choose it by {figures.gain:.3f}"
        f" ({interval})."
    )


def gate_words(gate: GateFigures, name: str) -> str:
    """The sentence on a gate over all labels: the share of a split's posts that it accepts, and how
    many of these are right.
    """
    if gate.threshold is None:
        return _closed_words([gate.precision])
    wanted = f"{100 * gate.precision:g} %"
    said = f"Right at least {wanted} of the time: answers from p = {gate.threshold:g} on"
    check = gate.checks.get(name)
    if check is None or not check.accepted:
        return f"{said}, which no {name} post reaches."
    return (
        f"{said}. They are {percent(check.accepted / check.answers)} of the {name} posts, and"
        f" {percent(check.right / check.accepted)} of them are right; a person checks the rest."
    )


def _closed_words(precisions: Sequence[float]) -> str:
    """
    >>> _closed_words([0.8, 0.9, 0.95])
    'No probability is enough for answers that are right 80, 90 or 95 % of the time.'
    """
    *others, last = (f"{100 * one:g}" for one in precisions)
    wanted = f"{', '.join(others)} or {last}" if others else last
    return f"No probability is enough for answers that are right {wanted} % of the time."


def _figures(predictions: AnyPredictions, prob_NC: NDArray[np.float32]) -> ProbabilityFigures:
    loss_NK = losses(prob_NC, targets_of(predictions), predictions.targets)
    if isinstance(predictions, SetPredictions):
        found = calibration(prob_NC.T.astype(np.float64).reshape(-1), predictions.truth_NC.T.reshape(-1))
    else:
        found = expected_calibration_error(prob_NC, predictions.truth_N)
    return ProbabilityFigures(log_loss=float(loss_NK.mean()), calibration_error=found.error)
