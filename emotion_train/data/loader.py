"""The packed micro-batches of each step, made ahead of use by one background thread.

The trainer owns the cursor and passes (epoch, step) in; the loader never remembers its position. In
training, each rank reads a whole step, takes its share by the posts' lengths in characters, so that
no rank waits long for another, and tokenises only that share. In scoring, each rank takes a slice,
so that the packs are the same as in a single process. The ranks agree on two numbers per step: the
packs that each must run, and the step's sum of weights.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from emotion_train.data.order import EpochOrder, Order
from emotion_train.data.packing import Pack, deal, empty_pack, pack
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import Target, TargetKind, dense, is_target, loss_weights, masked

_STEPS_AHEAD = 4  # packed steps that wait in memory
_READ_AHEAD = 16  # most steps whose row groups are being fetched
_WAIT_S = 0.2
_STOP_WAIT_S = 30.0
_CHARACTERS = 4  # per token of English
_LEAST_SLICE = 32  # posts that are worth a thread
_MOST_ENCODERS = 4  # threads that tokenise; one alone makes twice what a recorded 135M model eats on an H100


class Encoder(Protocol):
    """The part of a tokenizer that the loader uses."""

    pad_id: int
    max_length: int

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]: ...


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one step. `weight_sum` and `examples` count the whole step over all
    ranks.
    """

    epoch: int
    step: int
    packs: list[Pack]
    ids: list[str]
    targets_NC: npt.NDArray[np.float64]
    examples: int
    weight_sum: float
    real_tokens: int
    bad_rows: int


class _Places(NamedTuple):
    """The places of a step's posts: (row group, row inside it) for each, and all row groups."""

    rows: list[tuple[int, int]]
    groups: set[int]

    @classmethod
    def of(cls, order: EpochOrder, positions: range) -> _Places:
        groups_P, rows_P = order.locate(positions)
        groups = groups_P.tolist()
        return cls(list(zip(groups, rows_P.tolist(), strict=True)), set(groups))


Agree = Callable[[int, float, bool], tuple[int, float, bool]]


def alone(packs: int, weight_sum: float, stop: bool) -> tuple[int, float, bool]:
    """The agreement of a single process."""
    return packs, weight_sum, stop


class Loader:
    """Makes `StepBatch`es of one split for one rank; a context manager that ends the reader's
    threads.

    `weights_C` is the loss weight of each class and `targets` the kind of label targets; `threads`
    tokenise a step. `known_SC` says which labels each source of posts knows; without it, all know
    all. With `in_slices`, each rank takes its slice of neighbouring posts: steps that are
    `world_size` times as large then make, over all ranks, the packs of a single process. `agree`
    returns the maximum number of packs, the sum of weights and whether any rank stops; the
    background thread calls it once per step, in step order. Ranks that leave an epoch early leave
    it at the same step: otherwise one rank would wait for ever for another's agreement, or pair it
    with a later step's.
    """

    def __init__(
        self,
        reader: RowGroupReader,
        order: Order,
        encoder: Encoder,
        weights_C: npt.NDArray[np.float64],
        *,
        global_batch_size: int,
        tokens_per_microbatch: int,
        fill_multiple: int = 1,
        rank: int = 0,
        world_size: int = 1,
        in_slices: bool = False,
        agree: Agree = alone,
        threads: int = 1,
        targets: TargetKind = "one",
        known_SC: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self._reader = reader
        self._order = order
        self._encoder = encoder
        self.weights_C = weights_C
        self._global_batch_size = global_batch_size
        self._tokens_per_microbatch = tokens_per_microbatch
        self._fill_multiple = fill_multiple
        self._rank = rank
        self._world_size = world_size
        self._in_slices = in_slices
        self._agree = agree
        self._threads = threads
        self.targets: TargetKind = targets
        self._known_SC = known_SC
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps(self._global_batch_size)

    def steps(self, epoch: int, first_step: int = 0) -> Generator[StepBatch, None, None]:
        """The steps of an epoch from `first_step` on, in order. Raises the background thread's
        errors.
        """
        ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=_STEPS_AHEAD)
        stop = threading.Event()

        def put(item: StepBatch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=_WAIT_S)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for batch in self._make(epoch, first_step, stop.is_set):
                    put(batch)
                put(None)
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join(_STOP_WAIT_S)  # another rank may be gone, and its agreement would never come

    def _make(self, epoch: int, first_step: int, stopping: Callable[[], bool]) -> Iterator[StepBatch]:
        """Steps in order until the ranks agree to stop.

        Row groups are asked for ahead until they fill half of the reader's capacity.

        The reader drops the row group that was used least recently. Between a row group's request
        and its use come the earlier steps' row groups and their requests: two halves of the
        capacity, so the reader still has it. Only row groups where one lane ends and another begins
        are fetched twice.
        """
        order = self._order.epoch(epoch)
        steps = range(first_step, self.steps_per_epoch)
        upcoming = (_Places.of(order, self._positions(step)) for step in steps)
        following = next(upcoming, None)
        asked: deque[_Places] = deque()  # of this step and of those after it
        uses: Counter[int] = Counter()  # number of these steps that use each row group
        for step in steps:
            while following is not None and len(asked) <= _READ_AHEAD:
                self._reader.make_room(2 * max(len(following.groups), self._order.lanes))
                if asked and len(uses.keys() | following.groups) > self._reader.capacity // 2:
                    break
                self._reader.ask(sorted(following.groups))
                asked.append(following)
                uses.update(following.groups)
                following = next(upcoming, None)
            batch = self._step(epoch, step, asked[0], stopping)
            if batch is None:
                return
            yield batch
            uses.subtract(asked.popleft().groups)
            uses = +uses  # without those at 0

    def _encode(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """The tokens of texts, by several threads: tokenizers release Python's lock meanwhile."""
        size = max(_LEAST_SLICE, -(-len(texts) // self._threads))
        slices = [texts[at : at + size] for at in range(0, len(texts), size)]
        if len(slices) < 2:
            return self._encoder.encode(texts) if texts else []
        return [tokens for some in self._pool.map(self._encoder.encode, slices) for tokens in some]

    def _positions(self, step: int) -> range:
        """The positions of a step that this rank reads."""
        positions = self._order.positions(step, self._global_batch_size)
        if not self._in_slices:
            return positions
        size = -(-self._global_batch_size // self._world_size)
        return positions[self._rank * size :][:size]

    def _own(self, texts: list[Any]) -> list[int]:
        """This rank's slots of a step with these texts. Every rank computes the same deal. Each
        post counts one extra token, its BOS.
        """
        most = self._encoder.max_length * _CHARACTERS
        lengths = [
            min(len(text) + _CHARACTERS, most) if isinstance(text, str) else _CHARACTERS for text in texts
        ]
        return deal(lengths, self._world_size)[self._rank]

    def _knows(self, source: int, target: Target) -> bool:
        """Whether the source exists and knows all labels of its post."""
        if self._known_SC is None:
            return True
        return source < len(self._known_SC) and all(self._known_SC[source, label] for label, _ in target)

    def _step(self, epoch: int, step: int, places: _Places, stopping: Callable[[], bool]) -> StepBatch | None:
        ids: list[str] = []
        texts: list[str] = []
        targets: list[Target] = []
        weights: list[float] = []
        numbers: list[int] = []
        known: list[int] = []
        bad_rows = 0
        rows_of = {group: self._reader.rows(group) for group in places.groups}
        classes = len(self.weights_C)
        own = places.rows
        if self._world_size > 1 and not self._in_slices:
            own = [
                places.rows[slot]
                for slot in self._own([rows_of[group].texts[row] for group, row in places.rows])
            ]
        for group, row in own:
            rows = rows_of[group]
            text: Any = rows.texts[row]
            target: Any = rows.targets[row]
            good = _is_text(text) and is_target(target, self.targets, classes)
            good = good and self._knows(rows.known[row], target)
            bad_rows += not good
            ids.append(rows.ids[row])
            texts.append(text if good else "")
            targets.append(target if good else ())
            weights.append(rows.weights[row] if good else 0.0)
            known.append(rows.known[row] if good else 0)
            numbers.append(int(self._order.first_posts[group]) + row)
        targets_NC = dense(targets, classes)
        weight_N = np.asarray(weights, np.float64)
        known_NC = None if self._known_SC is None else self._known_SC[np.asarray(known, np.int64)]
        weights_NC = loss_weights(targets_NC, self.targets, self.weights_C, weight_N, known_NC)
        if known_NC is not None:
            targets_NC = masked(targets_NC, known_NC)
        packs = pack(
            self._encode(texts),
            targets_NC,
            weights_NC,
            self._tokens_per_microbatch,
            self._encoder.pad_id,
            self._fill_multiple,
            numbers,
        )
        count, weight_sum, stop = self._agree(len(packs), float(weights_NC.sum(axis=1).sum()), stopping())
        if stop:
            return None
        packs += [empty_pack(self._encoder.pad_id, classes, self._fill_multiple)] * (count - len(packs))
        return StepBatch(
            epoch=epoch,
            step=step,
            packs=packs,
            ids=ids,
            targets_NC=targets_NC,
            examples=len(self._order.positions(step, self._global_batch_size)),
            weight_sum=weight_sum,
            real_tokens=sum(row.real_tokens for row in packs if row.slots_N[0] >= 0),
            bad_rows=bad_rows,
        )


def encoder_threads() -> int:
    """The number of threads that tokenise in this process: half of its share of the machine's
    cores, from 1 to 4.
    """
    share_of_cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_ENCODERS, share_of_cores // 2))


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
