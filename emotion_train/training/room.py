"""Waits for room on the GPUs, where the start before this one may still hold them: the claim has
fenced it, and it ends within seconds.

Before the claim this start counts the whole memory of its GPUs, after the claim the free memory.
The price where another program keeps a GPU: `WAIT_S` seconds a start, then a smaller micro-batch or
a refusal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from emotion_train.config import Config
from emotion_train.errors import NotStarted, WrongRequest
from emotion_train.processes.machine import memory_of, whole_memory_of
from emotion_train.sizing.fit import least_of
from emotion_train.sizing.memory import GIB, usable_bytes
from emotion_train.training.job import Job, say
from emotion_train.training.microbatch import sizes_of

WAIT_S = 60.0
_LOOK_EVERY_S = 0.5
_NOBODY = GIB  # so much may be missing on a GPU that no other program holds; a start holds more

ReadMemory = Callable[[torch.device], int]


class SettleFor(Protocol):
    """`microbatch.settle` for this run, for GPUs that have what `read` returns."""

    def __call__(self, *, read: ReadMemory) -> Config: ...


def wait_for_room(
    job: Job,
    settle_for: SettleFor,
    read: ReadMemory = memory_of,
    read_whole: ReadMemory = whole_memory_of,
    wait_s: float = WAIT_S,
) -> Job:
    """The job, once its GPUs have room for it, or `wait_s` seconds later with a setting that fits
    the free memory; called on all ranks after the claim. There is no wait without GPUs, nor where
    the requested setting exceeds the whole GPU by the estimate.

    Raises `NotStarted` on all ranks where no setting fits by then. A preemption notice ends the
    wait: what loads the model next answers it.
    """
    if job.accelerator.device.type != "cuda":
        return job
    needed = _needed(job, job.config)
    if needed > usable_bytes(_least(job, read_whole)):
        return job
    began, told = time.monotonic(), False
    while True:
        free = _least(job, read)
        enough = needed <= usable_bytes(free + _NOBODY)
        over = job.ranks.is_main and time.monotonic() - began >= wait_s
        is_over, going = job.ranks.sum(np.array([over, job.interruptions.going()])) > 0
        if going:
            return job
        if enough or is_over:
            return _with_what_is_free(job, settle_for, free, wait_s)
        if job.ranks.is_main and not told:
            told = True
            say(
                f"waiting for the start before this one to leave the GPU, for {wait_s:.0f} s at most:"
                f" {_in_words(needed, free)}"
            )
        time.sleep(_LOOK_EVERY_S)


def _needed(job: Job, config: Config) -> int:
    """Bytes that this setting needs of each GPU, by the estimate."""
    return least_of(*sizes_of(job, config)).memory.total


def _least(job: Job, read: ReadMemory) -> int:
    """The smallest number that `read` gives on any rank, the same on all ranks."""
    return job.ranks.from_main(min(job.ranks.gather(read(job.accelerator.device)), default=0))


def _with_what_is_free(job: Job, settle_for: SettleFor, free: int, wait_s: float) -> Job:
    needed = _needed(job, job.config)
    if needed <= usable_bytes(free):
        return job
    try:
        config = settle_for(read=lambda device: free)
    except WrongRequest:
        raise NotStarted(_too_full(needed, free, wait_s)) from None
    if _needed(job, config) > usable_bytes(free + _NOBODY):  # a number that was asked for stays
        raise NotStarted(_too_full(needed, free, wait_s))
    return replace(job, config=config)


def _too_full(needed: int, free: int, wait_s: float) -> str:
    return (
        f"The run did not start: another program holds the GPU and did not leave it within {wait_s:.0f} s,"
        f" {_in_words(needed, free)}; end what nvidia-smi lists there, then type the same command again."
    )


def _in_words(needed: int, free: int) -> str:
    return f"{needed / GIB:.1f} GiB are needed and {max(0, usable_bytes(free)) / GIB:.1f} GiB are free"
