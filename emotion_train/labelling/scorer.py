"""Probabilities of posts by the packed decoder. While the GPU computes a batch, the host lays out
the next batch and fetches the one before.

Letters: N posts, C labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from emotion_train.data.loader import encoder_threads
from emotion_train.data.packing import Pack, pack
from emotion_train.evaluation.adapter import Classifier
from emotion_train.evaluation.scoring import evaluating, fill_multiple, forward_pack, require_numbers
from emotion_train.model.loss import probabilities

Probabilities = npt.NDArray[np.float32]
_LEAST_SLICE = 64  # posts that are worth a thread


class Pending(Protocol):
    """Probabilities on their way."""

    def result(self) -> Probabilities: ...


class Scorer(Protocol):
    """What a worker calls of a model. `packs` and `start` are called from different threads."""

    device: str

    def packs(self, texts: Sequence[str]) -> list[Pack]: ...

    def start(self, packs: Sequence[Pack], count: int) -> Pending: ...

    @property
    def busy_s(self) -> float:
        """Seconds for which the device computed the batches fetched so far."""
        ...

    def remark(self) -> str | None:
        """A sentence on the posts that were cut at the adapter's length; None where none was."""
        ...


class AdapterScorer:
    """An adapter, or several that answer together over one base, as in `evaluate` and `predict`."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._device = classifier.loaded.model.device
        self._threads = encoder_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="encode")
        self._busy_s = 0.0
        self.device = str(self._device)

    @property
    def busy_s(self) -> float:
        return self._busy_s

    def remark(self) -> str | None:
        return self._classifier.remark()

    def packs(self, texts: Sequence[str]) -> list[Pack]:
        """The posts' packs, tokenised by several threads."""
        if not texts:
            return []
        size = max(_LEAST_SLICE, -(-len(texts) // self._threads))
        slices = [texts[at : at + size] for at in range(0, len(texts), size)]
        tokens = [ids for some in self._pool.map(self._classifier.tokenizer.encode, slices) for ids in some]
        nothing_NC = np.zeros((len(texts), len(self._classifier.labels)))
        return pack(
            tokens,
            nothing_NC,
            nothing_NC,
            self._classifier.capacity,
            self._classifier.tokenizer.pad_id,
            fill_multiple(self._device),
        )

    def start(self, packs: Sequence[Pack], count: int) -> Pending:
        """Begin to compute `count` posts; on a GPU it returns before they are computed."""
        slots_N = np.concatenate([row.slots_N for row in packs]) if packs else np.zeros(0, np.int64)
        running = _OnDevice(self, slots_N, count, len(self._classifier.labels), self._device)
        with running:
            running.take([self._probabilities(row) for row in packs])
        return running

    def _probabilities(self, row: Pack) -> torch.Tensor:
        model = self._classifier.loaded.model
        with evaluating(model):
            return probabilities(forward_pack(model, row, self._device), self._classifier.targets)

    def add_busy(self, seconds: float) -> None:
        """Count time for which the device computed."""
        self._busy_s += seconds


class _OnDevice:
    """Probabilities that a device computes. Their copy to the host is queued at once, so `result`
    waits for this batch and not for the ones after it.
    """

    def __init__(
        self, scorer: AdapterScorer, slots_N: Any, count: int, classes: int, device: torch.device
    ) -> None:
        self._scorer = scorer
        self._slots_N = slots_N
        self._shape = (count, classes)
        self._on_gpu = device.type == "cuda"
        self._host: torch.Tensor | None = None

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        if self._on_gpu:
            event: Any = torch.cuda.Event
            self._from, self._to = event(enable_timing=True), event(enable_timing=True)
            self._from.record()

    def __exit__(self, *exc: object) -> None:
        if self._on_gpu:
            self._to.record()
        else:
            self._scorer.add_busy(time.perf_counter() - self._began)

    def take(self, of_packs: Sequence[torch.Tensor]) -> None:
        """Queue the copy of the packs' probabilities to the host."""
        if of_packs:
            prob_NC = torch.cat(list(of_packs)).float()
            self._host = torch.empty(prob_NC.shape, pin_memory=self._on_gpu)
            self._host.copy_(prob_NC, non_blocking=self._on_gpu)

    def result(self) -> Probabilities:
        prob_NC = np.zeros(self._shape, np.float32)
        if self._on_gpu:
            self._to.synchronize()
            self._scorer.add_busy(self._from.elapsed_time(self._to) / 1000)
        if self._host is not None:
            prob_NC[self._slots_N] = self._host.numpy()
        require_numbers(prob_NC)
        return prob_NC
