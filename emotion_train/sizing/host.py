"""Decides whether a base fits the memory of a machine that trains on its CPU.

Arithmetic over the base's shape, as for a GPU: the memory of a step of one post, the least that
training needs. A machine with more may still be too small for the other programs on it.
"""

from __future__ import annotations

from dataclasses import replace

from emotion_train.bases.packaged import SMALL_MODEL
from emotion_train.config import Precision
from emotion_train.errors import WrongRequest
from emotion_train.sizing.memory import GIB, MemoryEstimate, estimate
from emotion_train.sizing.recipe import Recipe

_SMALLER: tuple[Precision, ...] = ("bf16", "nf4")  # smaller than fp32, the faster on a CPU first


def least_of_host(recipe: Recipe, max_length: int) -> MemoryEstimate:
    """Bytes of one process on a CPU while it learns from one post of `max_length` tokens."""
    return estimate(replace(recipe, decoder="stock"), max_length, gradient_checkpointing=True)


def require_host_memory(
    base: str, recipe: Recipe, max_length: int, processes: int, host_bytes: int
) -> MemoryEstimate:
    """The least memory of each process on the machine. Raises `WrongRequest` where all processes
    together need more than `host_bytes`.
    """
    least = least_of_host(recipe, max_length)
    if processes * least.total <= host_bytes:
        return least
    each = f"{processes} times " if processes > 1 else ""
    raise WrongRequest(
        f"The base {base} in {recipe.precision} on a CPU needs {each}at least {least}, and this machine has"
        f" {host_bytes / GIB:.1f} GiB of memory; type {_remedy(recipe, max_length, processes, host_bytes)}."
    )


def _remedy(recipe: Recipe, max_length: int, processes: int, host_bytes: int) -> str:
    small = f"model.base={SMALL_MODEL}, or train on a GPU: emotion-launch plan compares them"
    before = least_of_host(recipe, max_length).total
    for precision in _SMALLER:
        total = least_of_host(replace(recipe, precision=precision), max_length).total
        if total < before and processes * total <= host_bytes:
            return f"model.precision={precision}, {small}"
    return small
