"""The decision turns an adapter's probabilities into answers: the label of the highest probability
or, where posts have several labels, every label that reaches its threshold. It also holds the
temperature of the probabilities, and the gates above which an answer can be acted upon.

It is the file decision.json beside an adapter. An adapter of one label without the file answers
with the label of the highest probability.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError, model_validator

from emotion_train.data.targets import TargetKind
from emotion_train.edges.bounded import Unreadable, object_file, phrase
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.gate import Gate, confidence_N, fit_gates
from emotion_train.evaluation.metrics import members
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions
from emotion_train.evaluation.temperature import (
    COLDEST,
    HOTTEST,
    BeforeAndAfter,
    Tempered,
    divided,
    temper,
)
from emotion_train.evaluation.thresholds import FOLDS, HALF, cross_fit, fit_thresholds, macro_f1_of_sets
from emotion_train.model.facts import AdapterFacts
from emotion_train.storage.document import FrozenModel, Manifest

DECISION = "decision.json"
_MAX_BYTES = 16 << 20  # a gate for each label and precision takes 100 bytes


class Gain(FrozenModel):
    """How much a temperature lowers the log loss of validation posts that did not choose it, in
    nats a post, with the paired 95 % interval; less than 0 where it costs.
    """

    difference: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)


class Decision(Manifest):
    """`thresholds`, in the order of the labels, exist only for several labels.

    `folds` is the number of folds of the validation posts that judged them, None where 0.5 for
    every label was kept; `macro_f1` is their score there, out of fold, and `macro_f1_at_half` the
    score of 0.5.

    `temperature` divided the published head's logits: one number, or with several labels one for
    each label; None where it gained nothing, and in adapters of earlier versions.
    `temperature_gain` is its gain out of fold, also where it was not kept.

    `gates` hold the probabilities from which on an answer can be acted upon
    (`emotion_train.evaluation.gate`).
    """

    schema_version: Literal["emotion-train/decision/1"] = "emotion-train/decision/1"
    targets: TargetKind
    labels: tuple[str, ...]
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    folds: int | None = None
    macro_f1: float | None = None
    macro_f1_at_half: float | None = None
    temperature: tuple[Annotated[float, Field(ge=COLDEST, le=HOTTEST)], ...] | None = None
    temperature_gain: Gain | None = None
    gates: tuple[Gate, ...] = ()

    @model_validator(mode="after")
    def _has_a_threshold_a_label(self) -> Decision:
        wanted = len(self.labels) if self.targets == "several" else None
        if wanted != (None if self.thresholds is None else len(self.thresholds)):
            raise ValueError(
                f"targets are {self.targets}, with {len(self.labels)} labels and"
                f" {len(self.thresholds or ())} thresholds"
            )
        return self

    @model_validator(mode="after")
    def _has_temperatures_of_its_targets(self) -> Decision:
        wanted = len(self.labels) if self.targets == "several" else 1
        if self.temperature is not None and len(self.temperature) != wanted:
            raise ValueError(
                f"targets are {self.targets}, with {len(self.labels)} labels and {len(self.temperature)}"
                " temperatures"
            )
        return self

    @model_validator(mode="after")
    def _has_each_gate_once(self) -> Decision:
        known = {None, *self.labels}
        if (stray := next((gate for gate in self.gates if gate.label not in known), None)) is not None:
            raise ValueError(f"a gate is of the label {stray.label!r}, which is none of the labels")
        if len({(gate.label, gate.precision) for gate in self.gates}) < len(self.gates):
            raise ValueError("a gate is there more than once")
        return self

    @classmethod
    def one(cls, labels: Sequence[str], targets: TargetKind = "one") -> Decision:
        """A decision that answers with the label of the highest probability."""
        return cls(targets=targets, labels=tuple(labels))

    @classmethod
    def of(cls, predictions: SetPredictions, labels: Sequence[str]) -> Decision:
        """A decision with the thresholds that these validation posts choose; 0.5 for every label
        where that is no worse on posts that did not choose.
        """
        half = macro_f1_of_sets(predictions.answered(_reaches(predictions.prob_NC, HALF)).counts())
        tuned = macro_f1_of_sets(cross_fit(predictions).counts())
        if tuned <= half:
            thresholds, folds = np.full(len(labels), HALF), None
        else:
            thresholds, folds = fit_thresholds(predictions.truth_NC, predictions.prob_NC), FOLDS
        return cls(
            targets="several",
            labels=tuple(labels),
            # the shortest decimals of the same float32, since probabilities are compared as float32
            thresholds=tuple(float(str(one)) for one in thresholds.astype(np.float32)),
            folds=folds,
            macro_f1=max(tuned, half),
            macro_f1_at_half=half,
        )

    def answers(self, prob_NC: ArrayLike) -> NDArray[np.bool_]:
        """`predicted_NC`: the labels that posts with these probabilities are answered with."""
        prob_NC = np.asarray(prob_NC, np.float32)
        if self.thresholds is not None:
            return _reaches(prob_NC, self.thresholds)
        return members(prob_NC.argmax(axis=1), prob_NC.shape[1])

    def ranked(self, prob_NC: NDArray[np.float32]) -> list[tuple[int, ...]]:
        """The labels that posts with these probabilities are answered with, the likeliest first."""
        return [
            tuple(label for label in (-prob_C).argsort(kind="stable").tolist() if given_C[label])
            for prob_C, given_C in zip(prob_NC, self.answers(prob_NC), strict=True)
        ]

    def accept_above(self, precision: float) -> float:
        """The probability from which on answers are accepted: at least `precision` of such answers
        are right. Raises `WrongRequest` where there is none, and for a precision without a gate.
        """
        over_all = {gate.precision: gate.threshold for gate in self.gates if gate.label is None}
        if not over_all:
            raise WrongRequest(
                "The adapter has no gates, as an earlier version published it or report.gates was empty;"
                " leave --accept-precision out, or train again."
            )
        if precision not in over_all:
            raise WrongRequest(
                f"The adapter has no gate for a precision of {precision:g}; give --accept-precision one of"
                f" {', '.join(f'{one:g}' for one in sorted(over_all))}."
            )
        if (threshold := over_all[precision]) is None:
            reached = [f"{one:g}" for one in sorted(over_all) if over_all[one] is not None]
            instead = f"give --accept-precision one of {', '.join(reached)}" if reached else "no gate is open"
            raise WrongRequest(
                f"No probability of this adapter is enough for a precision of {precision:g} on its validation"
                f" posts; {instead}."
            )
        return threshold

    def confidence(self, prob_NC: ArrayLike) -> NDArray[np.float32]:
        """`confidence_N`, on which gates act: the probability of the answer or, with several
        labels, of the least likely label in it; 0 for an answer without a label.
        """
        prob_NC = np.asarray(prob_NC, np.float32)
        return confidence_N(prob_NC, self.answers(prob_NC))

    def accepted(self, prob_NC: ArrayLike, precision: float) -> NDArray[np.bool_]:
        """`accepted_N`: whether each post's answer can be acted upon. Raises as `accept_above`
        does.
        """
        threshold = np.float32(self.accept_above(precision))
        found_N = self.confidence(prob_NC)
        return (found_N >= threshold) & (found_N > 0)

    def marks(self, prob_NC: ArrayLike, precision: float | None) -> list[bool | None]:
        """`accepted`, or None for each post where no precision is asked for."""
        if precision is None:
            return [None] * len(np.asarray(prob_NC))
        return list(map(bool, self.accepted(prob_NC, precision)))

    def raw(self, prob_NC: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probabilities without the temperature."""
        if self.temperature is None:
            return prob_NC
        return divided(prob_NC, 1 / np.asarray(self.temperature), self.targets)

    def before_and_after(self, predictions: AnyPredictions, chose: bool = False) -> BeforeAndAfter:
        """The probabilities of these posts before and after the temperature; `chose`: these posts
        chose it.
        """
        before_NC = self.raw(predictions.prob_NC)
        if self.temperature is None or not chose:
            return BeforeAndAfter(before_NC, predictions.prob_NC)
        return BeforeAndAfter(before_NC, temper(replace(predictions, prob_NC=before_NC)).held_out_NC)

    def acting(
        self, predictions: AnyPredictions, tempered: Tempered, precisions: Sequence[float]
    ) -> Decision:
        """The same decision with the head's temperature, and with gates for these precisions,
        fitted on validation posts with probabilities at that temperature.
        """
        if isinstance(predictions, SetPredictions):
            predictions = predictions.answered(self.answers(predictions.prob_NC))
        return self.model_copy(
            update={
                "temperature": tempered.temperature,
                "temperature_gain": Gain(**tempered.gain._asdict()),
                "gates": fit_gates(predictions, self.labels, precisions),
            }
        )

    def held_out(self, predictions: SetPredictions) -> SetPredictions:
        """The validation posts, answered as for `macro_f1`: no post by thresholds that it chose."""
        if self.folds is None:
            return predictions.answered(self.answers(predictions.prob_NC))
        return cross_fit(predictions, self.folds)


def _reaches(prob_NC: NDArray[np.float32], thresholds: ArrayLike) -> NDArray[np.bool_]:
    return prob_NC >= np.asarray(thresholds, np.float32)


def read_decision(folder: Path, facts: AdapterFacts) -> Decision:
    """The decision of the adapter in this folder. Raises `WrongRequest` for a damaged file, for a
    file with other labels, and where an adapter of several labels has no file.
    """
    targets: TargetKind = getattr(facts, "targets", "one")  # adapter/1 knows one label only
    path = folder / DECISION
    if not path.is_file():
        if targets == "several":
            raise WrongRequest(
                f"The adapter {folder} answers with several labels and has no {DECISION}, which holds the"
                " thresholds; pull the adapter again."
            )
        return Decision.one(facts.labels, targets)
    try:
        decision = Decision.model_validate(object_file(path, _MAX_BYTES))
    except (Unreadable, OSError, ValidationError) as error:
        raise WrongRequest(f"{path} cannot be read ({phrase(error)}); pull the adapter again.") from None
    if (decision.targets, decision.labels) != (targets, facts.labels):
        raise WrongRequest(
            f"{path} does not belong to the adapter beside it, which has other labels; pull the adapter"
            " again."
        )
    return decision
