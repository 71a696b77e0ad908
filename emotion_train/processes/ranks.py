"""Communication between the ranks of a run. With one process, every call returns its argument.

It uses CPU (gloo) groups of its own, in step order, so that it never waits for the compute stream
of a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntFlag
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from emotion_train.errors import EmotionTrainError, LostContact

T = TypeVar("T")


_CONTACT_EVERY_S = 1.0


@dataclass
class _Contact:
    """The state of this rank in a block of `Ranks.in_contact`."""

    done: bool = False
    failed: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class Signal(IntFlag):
    """The messages of a rank to all others between two steps."""

    NONE = 0
    SAVE = 1  # rank 0's clock: a checkpoint is due
    REBALANCE = 2  # a preemption notice without an end: the machine may be taken
    STOP = 4  # the machine will be taken, or SIGTERM came
    LEAVE = 8  # SIGINT came
    FENCED = 16  # rank 0's saver met another writer
    FAILED = 32  # rank 0's saver met a defect


class Ranks:
    """The processes of this run: `rank` 0 to `world_size` - 1. Make one per process, after the
    process group exists.

    A rank waits up to `timeout_s` seconds for another one, for example for rank 0 while it fits the
    floor. After that, or when another rank has ended, every call raises `LostContact`.
    """

    def __init__(self, timeout_s: float = 3600) -> None:
        self.timeout_s = timeout_s
        self._many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self._many else 0
        self.world_size = dist.get_world_size() if self._many else 1
        # Gloo pairs calls only by their order, so concurrent callers have a group each: the threads
        # of the two loaders (training posts are packed while validation posts are scored), the main
        # thread, the signals on their way, and the thread of `in_contact`.
        (
            self._training_group,
            self._scoring_group,
            self._main_group,
            self._signal_group,
            self._contact_group,
        ) = (
            [dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) for _ in range(5)]
            if self._many
            else [None] * 5
        )
        self._on_its_way: tuple[dist.Work, torch.Tensor] | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, packs: int, weight_sum: float, stop: bool) -> tuple[int, float, bool]:
        """The maximum number of packs, the sum of weights, and whether any rank stops; called by
        the training loader's thread.
        """
        return self._agree(packs, weight_sum, stop, self._training_group)

    def agree_in_scoring(self, packs: int, weight_sum: float, stop: bool) -> tuple[int, float, bool]:
        """`agree` for the thread of a scoring loader; only one scoring loader runs at a time."""
        return self._agree(packs, weight_sum, stop, self._scoring_group)

    def _agree(
        self, packs: int, weight_sum: float, stop: bool, group: dist.ProcessGroup | None
    ) -> tuple[int, float, bool]:
        if not self._many:
            return packs, weight_sum, stop
        sent = torch.zeros(self.world_size, 3, dtype=torch.float64)
        sent[self.rank] = torch.tensor([packs, weight_sum, stop], dtype=torch.float64)
        with self._in_contact():
            dist.all_reduce(sent, group=group)
        return int(sent[:, 0].max()), float(sent[:, 1].sum()), bool(sent[:, 2].any())

    def exchange(self, own: Signal) -> Signal:
        """The signals that any rank gave in the previous call, the same on all ranks; with one
        process, those given now.

        The answer comes one call late so that no rank waits for it: the small all-reduce runs
        during the step. Called once per step.
        """
        if not self._many:
            return own
        arrived = self._arrived()
        given = torch.tensor([own], dtype=torch.int32)
        with self._in_contact():
            self._on_its_way = (
                dist.all_reduce(given, dist.ReduceOp.BOR, group=self._signal_group, async_op=True),
                given,
            )
        return arrived

    def exchange_now(self, own: Signal) -> Signal:
        """The signals as by `exchange`, and those given in this call; waits for all ranks."""
        return self.exchange(own) | self._arrived()

    def _arrived(self) -> Signal:
        if self._on_its_way is None:
            return Signal.NONE
        work, given = self._on_its_way
        with self._in_contact():
            work.wait()
        self._on_its_way = None
        return Signal(int(given))

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The element-wise sum over the ranks, in float64."""
        total = torch.from_numpy(np.array(values, np.float64))
        if self._many:
            with self._in_contact():
                dist.all_reduce(total, group=self._main_group)
        return total.numpy()

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if not self._many:
            return value
        box = [value]
        with self._in_contact():
            dist.broadcast_object_list(box, src=0, group=self._main_group)
        return box[0]

    def only_on_main(self, action: Callable[[], T]) -> T | None:
        """The result of `action` on rank 0, None elsewhere; its `EmotionTrainError` is raised on
        every rank.
        """
        value: T | None = None
        failure: EmotionTrainError | None = None
        if self.is_main:
            try:
                value = action()
            except EmotionTrainError as error:
                failure = error
        if (failure := self.from_main(failure)) is not None:
            raise failure
        return value

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0's result of `action`, on every rank; its errors as in `only_on_main`."""
        return cast(T, self.from_main(self.only_on_main(action)))

    def bytes_from_main(self, data: bytes | memoryview) -> memoryview:
        """Rank 0's bytes, on every rank; fit for gigabytes, without a pickle. A buffer that can be
        written to is not copied.
        """
        size = self.from_main(len(data))
        if not self._many or not size:
            return memoryview(data)
        view = memoryview(data) if self.is_main else memoryview(bytearray(size))
        whole = memoryview(bytearray(view)) if view.readonly else view
        with self._in_contact():
            dist.broadcast(torch.frombuffer(whole, dtype=torch.uint8), src=0, group=self._main_group)
        return whole

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order on rank 0, an empty list elsewhere."""
        if not self._many:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.is_main else None
        with self._in_contact():
            dist.gather_object(value, box, dst=0, group=self._main_group)
        return box or []

    @contextmanager
    def in_contact(self) -> Iterator[None]:
        """A block that every rank enters and that may take one rank much longer than another. A
        rank that has ended it waits here for the others, however long that takes.

        A thread of each rank tells the others once a second that it is alive. Raises `LostContact`
        when one is not. A rank on which the block fails leaves at once.
        """
        if not self._many:
            yield
            return
        own, failures = _Contact(), list[Exception]()
        thread = threading.Thread(
            target=self._keep_contact, args=(own, failures), name="contact", daemon=True
        )
        thread.start()
        try:
            yield
            own.done = True
        finally:
            own.failed = not own.done
            own.ended.set()
            thread.join()
        if failures:
            raise failures[0]

    def _keep_contact(self, own: _Contact, failures: list[Exception]) -> None:
        try:
            while True:
                own.ended.wait(_CONTACT_EVERY_S)
                sent = torch.tensor([own.done, own.failed], dtype=torch.int32)
                with self._in_contact():
                    dist.all_reduce(sent, group=self._contact_group)
                if int(sent[1]) or int(sent[0]) == self.world_size:
                    return
        except LostContact as error:
            failures.append(error)

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's time-outs and closed connections differ only in text
            raise LostContact(lost_contact(self.rank, self.timeout_s, error)) from error


def lost_contact(rank: int, timeout_s: float, error: Exception) -> str:
    """The message of a rank that lost contact with the others."""
    return (
        f"Rank {rank} lost contact with the other processes: one of them ended (the first message above says"
        f" why, or the machine is gone) or did not answer for {timeout_s:g} s (distributed.timeout_s). The"
        " same command with the same run.id resumes from the last checkpoint."
        f" ({' '.join(str(error).split())[:200]})"
    )


def is_about_contact(error: BaseException) -> bool:
    """Whether a collective of PyTorch failed because of another process, not of a defect here."""
    message = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in message for sign in ("gloo", "NCCL", "Connection closed by peer")
    )
