"""The training loss by step: means of equal numbers of steps, few points, the same however often
the run was stopped; and the validation loss beside it, against PyTorch's.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.held_out_loss import loss_and_weight
from emotion_train.evaluation.predictions import Predictions, SetPredictions
from emotion_train.runs.checkpoint import Progress
from emotion_train.training import curve


def taken(losses: list[float], stops: tuple[int, ...] = ()) -> Progress:
    """The progress after these steps, of a run that was stopped after some of them."""
    progress = Progress()
    for step, loss in enumerate(losses, 1):
        progress.step = step
        curve.take(progress, step, loss)
        if step in stops:
            progress = Progress(**asdict(progress))
    return progress


@pytest.mark.parametrize("steps", [1, 100, 255, 256, 257, 5000])
def test_points_are_means_of_equally_many_steps(steps: int) -> None:
    losses = np.random.default_rng(steps).random(steps).tolist()
    progress = taken(losses)
    found, every = curve.points(progress), progress.curve_every
    assert len(found) <= curve.MOST_POINTS
    assert steps < curve.MOST_POINTS or len(found) >= curve.MOST_POINTS // 2
    for number, (step, mean) in enumerate(found):
        assert step == min((number + 1) * every, steps)
        assert mean == pytest.approx(np.mean(losses[number * every : step]))


def test_a_run_that_was_stopped_has_the_same_points() -> None:
    losses = np.random.default_rng(1).random(1500).tolist()
    assert asdict(taken(losses, (1, 100, 255, 256, 700, 1024))) == asdict(taken(losses))


def test_an_earlier_checkpoint_begins_its_curve_where_it_resumes() -> None:
    progress = Progress(step=40)
    curve.take(progress, 41, 2.0)
    assert curve.points(progress) == [(41, 2.0)]


@pytest.mark.parametrize("kind", ["one", "several", "shares"])
def test_the_validation_loss_is_that_of_the_training_whatever_the_ranks(kind: TargetKind) -> None:
    import torch

    from emotion_train.data.targets import loss_weights
    from emotion_train.model.loss import probabilities, weighted_loss_sum

    draw = np.random.default_rng(0)
    logits_NC, weights_C = draw.normal(size=(40, 4)).astype(np.float32), np.array([0.5, 1.0, 2.0, 0.7])
    targets_NC: Any = draw.dirichlet(np.ones(4), 40)
    if kind == "one":
        targets_NC = np.eye(4)[targets_NC.argmax(axis=1)]
    if kind == "several":
        targets_NC = (targets_NC > 0.3).astype(float)
    weights_NC = loss_weights(targets_NC, kind, weights_C, np.ones(40))
    logits, targets = torch.tensor(logits_NC), torch.tensor(targets_NC, dtype=torch.float32)
    expected = weighted_loss_sum(logits, targets, torch.tensor(weights_NC), kind) / weights_NC.sum()
    prob_NC = probabilities(logits, kind).numpy()
    ids = [str(row) for row in range(40)]
    model = (
        SetPredictions.of(ids, targets_NC, prob_NC)
        if kind == "several"
        else Predictions.of(
            ids, targets_NC.argmax(axis=1), prob_NC, shares_NC=targets_NC if kind == "shares" else None
        )
    )
    loss, weight = loss_and_weight(model, weights_C)
    assert loss / weight == pytest.approx(float(expected), rel=1e-5)
    order = draw.permutation(40).tolist()
    parts = [loss_and_weight(model.take(order[rank::3]), weights_C) for rank in range(3)]
    assert np.sum(parts, axis=0).tolist() == [loss, weight]


def test_a_probability_of_0_has_a_loss_that_is_a_number() -> None:
    sure = Predictions.of(["a"], [0], [[0.0, 1.0]])
    assert np.isfinite(loss_and_weight(sure, np.ones(2))).all()
    sets = SetPredictions.of(["a"], [[True, False]], [[0.0, 1.0]])
    assert np.isfinite(loss_and_weight(sets, np.ones(2))).all()
