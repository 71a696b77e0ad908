"""The exponential mean of adapter and head over the steps, which is scored and published instead of
the last step's weights (`train.ema`).

After update t it is the mean of the weights after the updates 1 … t, where each older one counts
the decay times the next: Adam's exponential mean with its correction for the start (Kingma and Ba
2015), so that the weights before the first update have no part in it. Every rank computes the mean
of the weights that its engine holds. It costs 4 bytes for each trained number, and one pass over
them a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from emotion_train.training.engines import Engine


class WeightAverage:
    """The mean of the weights that `engine` trains; with a decay of 0 there is no mean, and no
    method changes anything. All methods are called on all ranks.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._mean: dict[str, torch.Tensor] = {}
        self._exists = False  # after the first update
        self._applied = False
        if decay:
            with engine.pieces() as own:
                self._mean = {name: torch.zeros_like(piece) for name, piece in own.items()}

    def take(self, updates: int) -> None:
        """Add the weights after so many updates to the mean."""
        if not self._decay:
            return
        share = (1 - self._decay) / (1 - self._decay**updates)
        with self._engine.pieces() as own, torch.no_grad():
            torch._foreach_lerp_(list(self._mean.values()), [own[name] for name in self._mean], share)
        self._exists = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the mean within the block, and its own weights after it, to the bit."""
        if not self._exists:
            yield
            return
        self._exchange()
        self._applied = True
        try:
            yield
        finally:
            self._exchange()
            self._applied = False

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model has its own weights within the block, also inside of `applied`."""
        if not self._applied:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def whole(self) -> dict[str, torch.Tensor]:
        """A copy of the mean, whole, under the names of a PEFT file; empty where there is none."""
        if not self._exists:
            return {}
        self._exchange()
        copied = {name: tensor.clone() for name, tensor in self._engine.adapter().items()}
        self._exchange()
        return copied

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put a whole mean in place of the present one; the model has it afterwards."""
        if not self._decay or not state:
            return
        self._engine.load_adapter(state)
        with self._engine.pieces() as own, torch.no_grad():
            for name, mean in self._mean.items():
                mean.copy_(own[name])
        self._exists = True

    def _exchange(self) -> None:
        with self._engine.pieces(modified=True) as own, torch.no_grad():
            for name, mean in self._mean.items():
                weights = own[name].clone()
                own[name].copy_(mean)
                mean.copy_(weights)
