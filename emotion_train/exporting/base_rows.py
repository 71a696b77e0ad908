"""A base's tensors in blocks of rows, so that no tensor has to be in memory whole.

A checkpoint's file is opened anew for each block of rows, which costs its header each time (40 KiB)
and leaves none of the file mapped. A staged base comes one tensor at a time, because its pieces are
verified in the order of their bytes; 4-bit codes are turned back into numbers here.

Letters: R rows of a block, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emotion_train.bases.headers import names_of_files
from emotion_train.bases.staged import StagedBase, StagedTensor
from emotion_train.edges.hub import in_cache
from emotion_train.model.load import (
    SAMPLED,
    WHOLE,
    BaseConfig,
    Fingerprint,
    Weights,
    in_order,
    open_checkpoint,
    skeleton,
)
from emotion_train.model.precision import Codes4bit, linear_4bit
from emotion_train.model.staged_weights import staged_tensors

BLOCK_VALUES = 8 << 20  # 32 MiB as float32


@dataclass(frozen=True)
class BaseRows:
    """`shapes` are in the order in which `stream` yields the tensors: each once, by the
    classifier's name, as blocks of its rows from the first to the last.

    `weights_sha256` is the one of `BaseInfo`.
    """

    shapes: dict[str, tuple[int, ...]]
    weights_sha256: Callable[[], str]
    stream: Callable[[], Iterator[tuple[str, Iterator[torch.Tensor]]]]


def open_rows(found: BaseConfig) -> BaseRows:
    """The base's tensors; nothing is read yet. Raises `WrongRequest` where they do not fit the
    base's configuration.
    """
    if found.files.staged is not None:
        return _of_staged(found, found.files.staged)
    weights = open_checkpoint(found, skeleton(found.text, 2))
    shapes = {name: weights.shapes[name] for name in in_order(weights.shapes)}

    def stream() -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        for name, shape in shapes.items():
            yield name, _blocks(weights, name, shape)

    return BaseRows(shapes, lambda: _identity(found, weights, shapes), stream)


def known_weights_sha256(found: BaseConfig) -> str | None:
    """The `weights_sha256` of `BaseInfo`, from the few rows that it needs. None where more would
    have to be fetched: for a hub id that is not in the cache, and for a staged base with more
    blocks than are read.
    """
    files = found.files
    if files.staged is not None:
        return files.staged.index.weights_sha256 if found.layers is None else None
    if files.folder is None and files.gguf is None:
        names = names_of_files(files, found.layers)
        if not all(in_cache(files.name, name) for name in names):
            return None
    return open_rows(found).weights_sha256()


def _blocks(weights: Weights, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    for start, stop in spans(shape):
        yield weights.read_rows(name, start, stop)


def spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row of each block, and the row after its last one."""
    inner = 1 if len(shape) < 2 else shape[1]
    height = max(1, BLOCK_VALUES // inner)
    for start in range(0, shape[0], height):
        yield start, min(start + height, shape[0])


def _identity(found: BaseConfig, weights: Weights, shapes: dict[str, tuple[int, ...]]) -> str:
    """The fingerprint that the loader computes, from the few rows that it needs."""
    fingerprint = Fingerprint(found)
    for name, (rows, *_) in shapes.items():
        if name.endswith(SAMPLED):
            # with at most 127 rows the fingerprint takes all
            every = max(1, rows // 64)
            sample = [weights.read_rows(name, row, row + 1) for row in range(0, rows, every)]
            fingerprint.add(name, torch.cat(sample))
        elif name.endswith(WHOLE):
            fingerprint.add(name, weights.read_rows(name, 0, rows))
    return fingerprint.hexdigest()


# --- staged ---


def _of_staged(found: BaseConfig, staged: StagedBase) -> BaseRows:
    read = staged.index.tensors_read(found.layers)
    wanted = None if found.layers is None else read

    def stream() -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        for name, tensor in staged_tensors(staged, torch.device("cpu"), wanted=wanted):
            whole = _turned_back(tensor) if isinstance(tensor, Codes4bit) else tensor
            yield name, (whole[start:stop] for start, stop in spans(tuple(whole.shape)))

    shapes = {tensor.name: tensor.shape for tensor in read}
    if len(read) == len(staged.index.tensors):
        return BaseRows(shapes, lambda: staged.index.weights_sha256, stream)
    return BaseRows(shapes, lambda: _identity_of_staged(found, staged, read), stream)


def _identity_of_staged(found: BaseConfig, staged: StagedBase, read: Sequence[StagedTensor]) -> str:
    """The fingerprint of the blocks that are read; only their norms and the embedding are fetched
    for it.
    """
    fingerprint = Fingerprint(found)
    needed = [tensor for tensor in read if tensor.name.endswith(("norm.weight", "embed_tokens.weight"))]
    for name, tensor in staged_tensors(staged, torch.device("cpu"), wanted=needed):
        fingerprint.add(name, tensor)
    return fingerprint.hexdigest()


def _turned_back(codes: Codes4bit) -> torch.Tensor:
    """The bfloat16 numbers that a training on these codes computed with."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = linear_4bit(codes, None, torch.device("cpu")).weight
    numbers_RI: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return numbers_RI.view(codes.shape)
