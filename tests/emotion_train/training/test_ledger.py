"""The figures of a run's steps: which steps a reported loss is the mean of, and which is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emotion_train.errors import Diverged
from emotion_train.processes.ranks import Ranks
from emotion_train.training.ledger import Ledger

BATCH: Any = SimpleNamespace(examples=4, real_tokens=40, packs=[], bad_rows=0)


class Told:
    """A ledger of one process on a CPU, and what it told `on_loss`; the rate after a step is its
    number.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, float]] = []
        self.ledger = Ledger(Ranks(), torch.device("cpu"), float, lambda *told: self.calls.append(told))

    def take(self, *losses: float) -> None:
        for loss in losses:
            self.ledger.take(BATCH, torch.tensor(loss))


def test_a_reported_loss_is_that_of_the_steps_since_the_last_report_or_save() -> None:
    told = Told()
    told.take(9.0)
    told.ledger.log()
    told.take(1.0)
    told.ledger.add_up()  # as a save or an evaluation does, at any step
    told.take(2.0, 6.0)
    told.ledger.log()
    told.ledger.add_up()
    assert told.calls == [(1, 9.0, 1.0), (4, 4.0, 4.0)]
    assert told.ledger.progress.loss_sum == 18.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_step_whose_loss_is_no_number_is_named_with_its_rate(number: float) -> None:
    told = Told()
    told.take(1.0, 2.0)
    told.ledger.log()
    told.take(3.0, 4.0, number, 5.0)
    told.ledger.log()
    with pytest.raises(Diverged, match=rf"^The loss is {number} at step 5 with learning rate 4; "):
        told.ledger.add_up()
    assert told.ledger.progress.loss_steps == 4
