"""Writes the tensors of an export into safetensors files of a store, one block of rows at a time.

Each file is laid out before its first number is known, built in a temporary file, named after its
sha256, created and read back while the next one is built. The price is two of these files on the
disk of TMPDIR, 1 GiB each or as large as the largest tensor. Since the name follows from the bytes,
a second export into the same place finds the files of a killed one and overwrites nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch

from emotion_train.errors import DISK_FULL, StorageError
from emotion_train.exporting.merge import AnyMerge, MergedTensor
from emotion_train.model.load import Tell
from emotion_train.storage.store import Store

INDEX = "model.safetensors.index.json"
_KEY = re.compile(r"model-\d{5}-of-\d{5}-[0-9a-f]{12}\.safetensors")
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}  # by safetensors

Formats = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class WeightFile:
    """A completely stored file of the export, and the tensors in it."""

    key: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...]
    tensor_bytes: int


def write_weights(merge: AnyMerge, store: Store, shard_bytes: int, tell: Tell) -> list[WeightFile]:
    """Write every tensor and read it back; returns the files. Raises `StorageError` for a store
    that fails or holds other bytes than were written, and for a full disk.
    """
    formats = merge.formats
    batches = list(_batches(formats, shard_bytes))
    tensors = merge.tensors()
    done = 0
    waiting: deque[Future[WeightFile]] = deque()
    written: list[WeightFile] = []
    with (
        TemporaryDirectory(prefix="emotion-train-export-") as folder,
        closing(tensors),
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            for number, names in enumerate(batches, 1):
                path = Path(folder, str(number))
                own = {name: formats[name] for name in names}
                sha256 = _build(path, own, islice(tensors, len(names)))
                key = f"model-{number:05}-of-{len(batches):05}-{sha256[:12]}.safetensors"
                waiting.append(pool.submit(_put, store, key, path, sha256, own))
                if len(waiting) > 1:
                    written.append(waiting.popleft().result())
                done += len(names)
                tell(done, len(formats))
            written += [one.result() for one in waiting]
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise StorageError(
                f"The disk of {folder} is full; set TMPDIR to a folder with room for two files of"
                f" {shard_bytes / 2**30:.1f} GiB or of the largest tensor."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return written


def index_of(written: list[WeightFile]) -> bytes:
    """The safetensors index of the files, with the size and sha256 of each."""
    content: dict[str, Any] = {
        "metadata": {
            "total_size": sum(one.tensor_bytes for one in written),
            "files": {one.key: {"bytes": one.bytes, "sha256": one.sha256} for one in written},
        },
        "weight_map": {name: one.key for one in written for name in one.tensors},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def is_weight_file(key: str) -> bool:
    """Whether an object has the name of one of these files."""
    return _KEY.fullmatch(key) is not None


def _batches(formats: Formats, shard_bytes: int) -> Iterator[list[str]]:
    """The tensors of each file; a file ends with the tensor that fills it."""
    batch, size = list[str](), 0
    for name, (shape, dtype) in formats.items():
        batch.append(name)
        size += prod(shape) * dtype.itemsize
        if size >= shard_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes(formats: Formats) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in formats.values())


def _header(formats: Formats) -> bytes:
    """First bytes of a safetensors file of these tensors, one after the other.
    https://github.com/huggingface/safetensors#format
    """
    at, header = 0, dict[str, Any]({"__metadata__": {"format": "pt"}})
    for name, (shape, dtype) in formats.items():
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (at, end)}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _build(path: Path, formats: Formats, tensors: Iterator[MergedTensor]) -> str:
    """Write one file; returns its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        _add(file, digest, _header(formats))
        for (name, (shape, dtype)), tensor in zip(formats.items(), tensors, strict=True):
            assert (tensor.name, tensor.shape, tensor.dtype) == (name, shape, dtype)
            rows = 0
            for block in tensor.blocks:
                _add(file, digest, block.contiguous().view(-1).view(torch.uint8).numpy().data)
                rows += len(block)
            assert rows == shape[0], f"{name} has {rows} of {shape[0]} rows"
    return digest.hexdigest()


def _add(file: IO[bytes], digest: Any, data: bytes | memoryview) -> None:
    file.write(data)
    digest.update(data)


def _put(store: Store, key: str, path: Path, sha256: str, formats: Formats) -> WeightFile:
    size = path.stat().st_size
    store.create(key, path)
    if not store.holds(key, path):
        raise StorageError(
            f"{store.url_of(key)} does not hold what was written; does another program write there? Export"
            " again into an empty place."
        )
    path.unlink()
    return WeightFile(key, size, sha256, tuple(formats), _bytes(formats))
