"""Cuts the text part of a checkpoint into the objects of a staged base: whole safetensors files,
their tensors in the order of reading.

The files are laid out here and not by the safetensors library, which sorts tensors by type and
name: a reader takes the bytes as they come, with all that belongs to one layer side by side.
Objects are hashed, written and read back by four threads while the next tensors are read and
quantised.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from emotion_train.bases.staged import StagedObject, StagedPart, StagedTensor
from emotion_train.errors import WrongRequest
from emotion_train.model.load import BaseConfig, Fingerprint, Tell, open_checkpoint, skeleton, stream
from emotion_train.model.precision import Codes4bit, linear_4bit
from emotion_train.model.staged_weights import DTYPES, PACKED_STATE, staged_tensors
from emotion_train.storage.store import Store

StagedPrecision = Literal["bf16", "nf4"]
_WRITERS = 4
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ObjectWriter:
    """Writes objects and reads them back. `store` None: nothing is written, and the objects are
    only described.
    """

    def __init__(self, store: Store | None, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._store = store

    def put(self, key: str, data: bytes) -> StagedObject:
        """Write and read back, unless the same bytes are stored already."""
        view, size = memoryview(data), self.piece_bytes
        pieces = tuple(
            hashlib.sha256(view[start : start + size]).hexdigest() for start in range(0, len(data), size)
        )
        described = StagedObject(
            key=key, bytes=len(data), etag=None, sha256=hashlib.sha256(data).hexdigest(), pieces=pieces
        )
        if self._store is None:
            return described
        if (standing := self._standing(self._store, described)) is not None:
            return standing
        self._store.write(key, data)
        written = self._standing(self._store, described)
        if written is None:
            raise WrongRequest(
                f"{self._store.url_of(key)} does not hold what was written; does another program write there?"
                " Stage again."
            )
        return written

    def _standing(self, store: Store, described: StagedObject) -> StagedObject | None:
        """The object with its ETag when the store holds exactly these bytes, else None."""
        info = store.find(described.key)
        if info is None or info.size != described.bytes:
            return None
        buffer = memoryview(bytearray(min(self.piece_bytes, described.bytes)))
        for place, digest in enumerate(described.pieces):
            start = place * self.piece_bytes
            view = buffer[: min(self.piece_bytes, described.bytes - start)]
            try:
                store.read_into_verified(
                    described.key, view, partial(_verify, digest), start=start, if_match=info.etag
                )
            except _OtherBytes:
                return None
        return described.model_copy(update={"etag": info.etag})


class _OtherBytes(ValueError):
    pass


def _verify(sha256: str, data: memoryview) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _OtherBytes


@dataclass
class StagedWeights:
    """The objects and tensors of one pass over the source."""

    shards: list[StagedObject] = field(default_factory=list)
    tensors: list[StagedTensor] = field(default_factory=list)
    rounded: bool = False
    weights_sha256: str = ""


class _Stored(NamedTuple):
    """One tensor of the classifier and what is stored of it, by suffix, on the host."""

    name: str
    shape: tuple[int, ...]
    parts: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def stage_weights(
    found: BaseConfig,
    precision: StagedPrecision,
    device: torch.device,
    writer: ObjectWriter,
    shard_bytes: int,
    tell: Tell,
) -> StagedWeights:
    """Store every text tensor of the source; nf4 is made on `device`. An object ends with the
    tensor that fills `shard_bytes`.
    """
    model = skeleton(found.text, 2)
    sources, tensors = _source(found, model)
    made, fingerprint, working = (
        StagedWeights(),
        Fingerprint(found),
        deque[Future[tuple[StagedObject, list[StagedTensor]]]](),
    )
    staged = found.files.staged
    made.rounded = staged is not None and staged.index.rounded

    def stored() -> Iterator[_Stored]:
        for number, (name, tensor) in enumerate(tensors, 1):
            fingerprint.add(name, tensor)
            made.rounded = made.rounded or _loses_bits(tensor)
            is_linear = name.endswith(".weight") and isinstance(
                model.get_submodule(name.rpartition(".")[0]), nn.Linear
            )
            yield _Stored(name, tuple(tensor.shape), _parts(tensor, precision == "nf4" and is_linear, device))
            tell(number, len(sources))

    def collect() -> None:
        described, its_tensors = working.popleft().result()
        made.shards.append(described)
        made.tensors += its_tensors

    def finish(number: int, batch: list[_Stored]) -> tuple[StagedObject, list[StagedTensor]]:
        header, its_tensors = _layout(batch, number, sources)
        arrays = (
            tensor.view(-1).view(torch.uint8).numpy().data for one in batch for tensor in one.parts.values()
        )
        return writer.put(f"model-{number + 1:05}.safetensors", b"".join([header, *arrays])), its_tensors

    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            for number, batch in enumerate(_batches(stored(), shard_bytes)):
                working.append(pool.submit(finish, number, batch))
                if len(working) > _WRITERS:
                    collect()
            while working:
                collect()
        finally:
            pool.shutdown(cancel_futures=True)
    made.weights_sha256 = fingerprint.hexdigest()
    return made


def _source(found: BaseConfig, model: nn.Module) -> tuple[dict[str, str], Iterator[tuple[str, torch.Tensor]]]:
    """Names in the source by the classifier's names, and the tensors."""
    staged = found.files.staged
    if staged is None:
        weights = open_checkpoint(found, model)
        return weights.sources, stream(weights)

    read = staged.index.tensors_read(found.layers)
    wanted = None if found.layers is None else read

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in staged_tensors(staged, torch.device("cpu"), wanted=wanted):
            assert isinstance(tensor, torch.Tensor)  # staged as bf16: nf4 is refused as a source
            yield name, tensor

    return {tensor.name: tensor.source for tensor in read}, tensors()


def _batches(stored: Iterator[_Stored], shard_bytes: int) -> Iterator[list[_Stored]]:
    batch: list[_Stored] = []
    for one in stored:
        batch.append(one)
        if sum(each.bytes for each in batch) >= shard_bytes:
            yield batch
            batch = []
    if batch:
        yield batch


def _loses_bits(tensor: torch.Tensor) -> bool:
    return tensor.dtype != torch.bfloat16 and not torch.equal(
        tensor.to(torch.bfloat16).to(tensor.dtype), tensor
    )


def _parts(tensor: torch.Tensor, quantised: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Wide types first and the JSON filled up with spaces, so that every tensor of a file starts at
    a multiple of its type's size.
    """
    if not quantised:
        return {"": tensor.to(torch.bfloat16).contiguous()}
    made = Codes4bit.of(linear_4bit(tensor.to(device), None, device))
    state = {suffix: part.cpu().contiguous() for suffix, part in sorted(made.state.items())}
    packed = state.pop(PACKED_STATE)
    wide = {suffix: part for suffix, part in state.items() if part.dtype == torch.float32}
    parts = wide | {"": made.codes.cpu().contiguous()} | state
    spaces = -(sum(part.nbytes for part in parts.values()) + len(packed)) % 8
    return parts | {PACKED_STATE: torch.cat([packed, torch.full((spaces,), ord(" "), dtype=torch.uint8)])}


def _layout(batch: list[_Stored], number: int, sources: dict[str, str]) -> tuple[bytes, list[StagedTensor]]:
    """First bytes of the safetensors file, and where its tensors lie.
    https://github.com/huggingface/safetensors#format
    """
    at, header, parts = 0, dict[str, Any]({"__metadata__": {"format": "pt"}}), dict[str, list[StagedPart]]()
    for one in batch:
        for suffix, tensor in one.parts.items():
            part = StagedPart(suffix=suffix, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape), start=at)
            header[one.name + suffix] = {
                "dtype": part.dtype,
                "shape": part.shape,
                "data_offsets": (at, at + part.bytes),
            }
            parts.setdefault(one.name, []).append(part)
            at += part.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    return raw, [
        StagedTensor(
            name=one.name,
            source=sources[one.name],
            shape=one.shape,
            object=number,
            parts=tuple(part.model_copy(update={"start": part.start + len(raw)}) for part in parts[one.name]),
        )
        for one in batch
    ]
