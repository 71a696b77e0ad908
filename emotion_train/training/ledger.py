"""The figures of a run as its steps are taken: losses, tokens, seconds.

Only this page waits for the GPU. The loss of a step stays there, is copied to the host beside the
next steps, and is read one log interval later. The price: a loss that is no number is noticed up to
one interval late.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from emotion_train.data.loader import StepBatch
from emotion_train.errors import Diverged
from emotion_train.processes.ranks import Ranks
from emotion_train.runs.checkpoint import Progress
from emotion_train.training import curve


@dataclass(frozen=True)
class _Stretch:
    """This rank's figures of some steps whose losses are on their way from the GPU; `losses` is
    valid once the event `there` has come.
    """

    step: int  # the last one
    counts: npt.NDArray[np.float64]  # real tokens, computed tokens and bad rows
    losses: torch.Tensor
    there: torch.cuda.Event | None
    for_log: bool


class Ledger:
    """Keeps `progress`, which a checkpoint saves. `rate_after` is the schedule.

    `on_loss` gets for each call of `log` its step, the mean loss of the steps since the last call
    of `log` or `add_up`, and the rate of the next step. A save begins a new mean because a run that
    resumes from it knows no earlier loss.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        rate_after: Callable[[int], float],
        on_loss: Callable[[int, float, float], None],
    ) -> None:
        self.progress = Progress()
        self.losses: list[torch.Tensor] = []  # this rank's, of the steps that were not handed over
        self._ranks = ranks
        self._device = device
        self._rate_after = rate_after
        self._on_loss = on_loss
        self._own = np.zeros(3)  # this rank's real tokens, computed tokens and bad rows of the same steps
        self._on_their_way: deque[_Stretch] = deque()
        # when the training that `train_seconds` does not have yet began; None while it pauses
        self._clock: float | None = None
        self._cold = True  # no step was taken in this process

    def start_clock(self) -> None:
        self._clock = time.perf_counter()

    def stop_clock(self) -> None:
        """The time until the clock is started again does not count as training."""
        self._clock = None

    def take(self, batch: StepBatch, loss: torch.Tensor) -> None:
        """Note one step; `loss` is this rank's share of the step's mean, on the GPU."""
        self.losses.append(loss)
        self.progress.step += 1
        self.progress.examples += batch.examples
        self._own += (batch.real_tokens, sum(len(pack.tokens_T) for pack in batch.packs), batch.bad_rows)
        if self._cold and self._clock is not None:
            self._cold = False
            synchronize(self._device)
            self.progress.warm_up_examples += batch.examples
            self.progress.warm_up_seconds += time.perf_counter() - self._clock

    def log(self) -> None:
        """Report the steps before the last call, so that nothing waits for the GPU."""
        self._hand_over(for_log=True)
        self.add_up(all_but=1)

    def add_up(self, all_but: int = 0) -> list[float]:
        """Add the figures of all ranks to `progress`, without the newest `all_but` stretches;
        called on all ranks.

        Returns the losses of those steps. Raises `Diverged` when one of them is no number.
        """
        arrived: list[float] = []
        if not all_but:
            self._hand_over(for_log=False)
        while len(self._on_their_way) > all_but:
            arrived += self._arrive(self._on_their_way.popleft())
        if not all_but and self._clock is not None:
            synchronize(self._device)
            now = time.perf_counter()
            self.progress.train_seconds += now - self._clock
            self._clock = now
        return arrived

    def _hand_over(self, for_log: bool) -> None:
        """Send the figures of the steps since the last call on their way."""
        if not self.losses:
            return
        losses, there = torch.stack(self.losses).double(), None
        if losses.is_cuda:
            losses = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True).copy_(
                losses, non_blocking=True
            )
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        self._on_their_way.append(_Stretch(self.progress.step, self._own.copy(), losses, there, for_log))
        self._own[:] = 0
        self.losses.clear()

    def _arrive(self, stretch: _Stretch) -> list[float]:
        if stretch.there is not None:
            stretch.there.synchronize()
        (tokens, computed, bad), all_losses = np.split(
            self._ranks.sum(np.concatenate([stretch.counts, stretch.losses.numpy()])), [3]
        )
        self.progress.tokens += int(tokens)
        self.progress.computed_tokens += int(computed)
        self.progress.bad_rows += int(bad)
        losses: list[float] = all_losses.tolist()
        for step, loss in enumerate(losses, stretch.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise Diverged(
                    f"The loss is {loss} at step {step} with learning rate {self._rate_after(step - 1):.3g};"
                    " checkpoints until then are kept. Start a new run with a lower train.learning_rate."
                )
            self.progress.loss_sum += loss
            self.progress.loss_steps += 1
            curve.take(self.progress, step, loss)
        if stretch.for_log:
            mean = sum(losses) / len(losses)
            self._on_loss(stretch.step, mean, self._rate_after(stretch.step))
        return losses


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
