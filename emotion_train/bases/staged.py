"""A staged base: a text-only checkpoint in a bucket or folder, and a base.json that lists every
object with its place, size and checksum.

`base.json` is written last and created only once, so its presence means that every object it names
is whole. Each object of weights has pieces of some MiB, each with a sha256: a piece is fetched at
once and verified alone. The index of a 24B base is 1 MB of JSON, read once by each process that
needs the base's configuration, its tokenizer or its weights.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from emotion_train.bases.depth import is_read
from emotion_train.bases.pieces_ahead import PiecesAhead, Place, Put
from emotion_train.config import Precision
from emotion_train.edges.paths import typed_path
from emotion_train.errors import ObjectChanged, ObjectNotFound, WrongRequest
from emotion_train.storage.document import FrozenModel, Manifest, read_manifest
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.store import Store

BASE_KEY = "base.json"
# written first and deleted last: objects beside it are this program's own
UNFINISHED_KEY = "unfinished.json"
SCHEMA: Literal["emotion-train/base/1"] = "emotion-train/base/1"
ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1}  # of safetensors' names of types


class StagedObject(FrozenModel):
    """One object; `pieces` are the sha256 of its consecutive pieces."""

    key: str
    bytes: int = Field(gt=0)
    etag: str | None = Field(description="None on a folder, which has none.")
    sha256: str
    pieces: tuple[str, ...]


class StagedPart(FrozenModel):
    """One tensor of a safetensors file: the checkpoint's tensor itself (no suffix), or a part of
    its 4-bit codes.
    """

    suffix: str
    dtype: Literal["BF16", "F32", "U8"]
    shape: tuple[int, ...]
    start: int = Field(ge=0, description="Byte of the object.")

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


class StagedTensor(FrozenModel):
    """One tensor of the classifier; its parts are neighbours in one object."""

    name: str
    source: str = Field(description="Its name in the checkpoint that was staged.")
    shape: tuple[int, ...] = Field(description="Before quantisation.")
    object: int = Field(ge=0, description="Position in `shards`.")
    parts: tuple[StagedPart, ...] = Field(min_length=1)


class StagedIndex(Manifest):
    schema_version: Literal["emotion-train/base/1"] = SCHEMA
    source: str = Field(description="Hub id, folder or URL of the checkpoint that was staged.")
    precision: Literal["bf16", "nf4"]
    rounded: bool = Field(description="Whether bfloat16 is coarser than what the source held.")
    quantised_on: str | None = Field(
        description=(
            "Device of nf4: the mean of its scales may differ in a last bit between devices; None for bf16."
        )
    )
    architecture: str
    source_layers: int | None = Field(
        None, description="Blocks of the source, where only its first ones were staged; None: all were."
    )
    parameters: int
    shape_sha256: str
    weights_sha256: str
    piece_bytes: int = Field(gt=0)
    shards: tuple[StagedObject, ...] = Field(min_length=1, description="Safetensors files of the weights.")
    files: tuple[StagedObject, ...] = Field(description="Configuration, tokenizer, safetensors index.")
    tensors: tuple[StagedTensor, ...]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _adds_up(self) -> StagedIndex:
        for one in (*self.shards, *self.files):
            if len(one.pieces) != -(-one.bytes // self.piece_bytes):
                raise ValueError(f"{one.key} does not have a sum for each piece")
        places = [
            (tensor.object, part.start, part.start + part.bytes)
            for tensor in self.tensors
            for part in tensor.parts
        ]
        for number, _, end in places:
            if number >= len(self.shards) or end > self.shards[number].bytes:
                raise ValueError("a tensor lies outside of the listed objects")
        if any(
            one[0] > other[0] or (one[0] == other[0] and one[2] > other[1]) for one, other in pairwise(places)
        ):
            raise ValueError("the tensors are not in the order of their bytes")
        return self

    def content(self) -> dict[str, Any]:
        """The content to write; as in earlier versions, a whole base's has no `source_layers`."""
        whole = {"source_layers"} if self.source_layers is None else set()
        return self.model_dump(mode="json", exclude=whole)

    def tensors_read(self, layers: int | None) -> tuple[StagedTensor, ...]:
        """The tensors of the first `layers` blocks, and those of no block; None means all."""
        return tuple(tensor for tensor in self.tensors if is_read(tensor.name, layers))

    def shards_read(self, layers: int | None) -> list[int]:
        """The positions of the objects that hold the tensors of `tensors_read`."""
        if layers is None:
            return list(range(len(self.shards)))
        return sorted({tensor.object for tensor in self.tensors_read(layers)})

    def places(self, tensors: Sequence[StagedTensor] | None) -> list[Place]:
        """The pieces that hold parts of these tensors, in the order of bytes; None means all."""
        if tensors is None:
            return [
                (number, place)
                for number, stored in enumerate(self.shards)
                for place in range(len(stored.pieces))
            ]
        size = self.piece_bytes
        return sorted(
            {
                (tensor.object, place)
                for tensor in tensors
                for part in tensor.parts
                for place in range(part.start // size, -(-(part.start + part.bytes) // size))
            }
        )

    def piece_size(self, piece: Place) -> int:
        """The bytes of a piece; an object's last piece may be smaller."""
        number, place = piece
        return min(self.piece_bytes, self.shards[number].bytes - place * self.piece_bytes)

    def bytes_read(self, layers: int | None) -> int:
        """The bytes of the tensors of `tensors_read`."""
        return sum(part.bytes for tensor in self.tensors_read(layers) for part in tensor.parts)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.shards)


def read_staged_index(store: Store) -> StagedIndex | None:
    """The index at this place; None where there is none. Raises `WrongRequest` for a damaged index
    or an unknown schema.
    """
    try:
        return read_manifest(
            StagedIndex,
            store,
            BASE_KEY,
            other_schema="Stage the base again.",
            damaged="Stage the base again elsewhere.",
        )
    except ObjectNotFound:
        return None


class StagedBase:
    """A staged base to read. Its small files are fetched into a temporary folder, which is removed
    with this object.
    """

    def __init__(self, store: Store, index: StagedIndex) -> None:
        self.store = store
        self.index = index
        self._folder: Path | None = None
        self._lock = threading.Lock()  # of that folder
        self._ahead: PiecesAhead | None = None

    @property
    def lasting_name(self) -> str:
        return (
            str(typed_path(self.store.url).resolve())
            if isinstance(self.store, FolderStore)
            else self.store.url
        )

    def path(self, file: str) -> Path | None:
        """A local copy of a small file, verified; None where the base has no such file."""
        described = next((one for one in self.index.files if one.key == file), None)
        if described is None:
            return None
        with self._lock:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="emotion-train-base-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            target = self._folder / file
            if not target.exists():
                target.write_bytes(self.store.read_verified(file, self._verify(file, described.sha256)))
        return target

    def read_piece(self, piece: Place, buffer: memoryview) -> None:
        """Fill the buffer, which has the piece's size, with the piece's verified bytes.

        Raises as `Store.read`, and `WrongRequest` when they are no longer those of the index.
        """
        number, place = piece
        stored = self.index.shards[number]

        def verify(data: memoryview) -> None:
            if hashlib.sha256(data).hexdigest() != stored.pieces[place]:
                raise changed(self.store, stored.key)

        def read(etag: str | None) -> None:
            start = place * self.index.piece_bytes
            self.store.read_into_verified(stored.key, buffer, verify, start=start, if_match=etag)

        try:
            read(stored.etag)
        except ObjectChanged:  # written again, or copied elsewhere: its bytes decide
            read(None)

    def read_ahead(self, layers: int | None, room_bytes: int) -> None:
        """Begin to read the pieces that `layers` blocks need, as many as fit in `room_bytes`."""
        places = self.index.places(None if layers is None else self.index.tensors_read(layers))
        fitting = places[: max(0, room_bytes) // self.index.piece_bytes]
        self._ahead = PiecesAhead(fitting, self.index.piece_size, self.read_piece)

    def move_ahead(self, put: Put) -> None:
        """Move what is read ahead as `PiecesAhead.move` does."""
        if self._ahead is not None:
            self._ahead.move(put)

    def taken_ahead(self, piece: Place) -> Any:
        """The piece as by `PiecesAhead.take`; None where nothing is read ahead."""
        return None if self._ahead is None else self._ahead.take(piece)

    def read_no_more(self) -> None:
        """Drop pieces that were read ahead and not taken."""
        if self._ahead is not None:
            self._ahead.close()

    def _verify(self, key: str, sha256: str) -> Callable[[bytes], bytes]:
        def verify(raw: bytes) -> bytes:
            if hashlib.sha256(raw).hexdigest() != sha256:
                raise changed(self.store, key)
            return raw

        return verify

    def refuse_other_precision(self, precision: Precision) -> None:
        """Raises `WrongRequest` when the staged numbers do not fit a run of this precision."""
        index, url = self.index, self.store.url
        if index.precision == "nf4" and precision != "nf4":
            raise WrongRequest(
                f"The base {url} was staged as nf4, which cannot be turned back, and model.precision is"
                f" {precision}; type model.precision=nf4, or stage it for every precision: emotion-train"
                f" stage-base {index.source} ANOTHER_URL"
            )
        if index.rounded and precision == "fp32":
            raise WrongRequest(
                f"The base {url} was rounded to bfloat16 when it was staged and model.precision is fp32; type"
                f" model.precision=bf16, or model.base={index.source}."
            )

    def missing(self, layers: int | None = None) -> list[str]:
        """The keys of objects that `layers` blocks need and that are missing, or have another size
        than the index says.
        """
        stored = {info.key: info.size for info in self.store.list()}
        needed = [self.index.shards[number] for number in self.index.shards_read(layers)]
        return [
            one.key
            for one in (*needed, *self.index.files)
            if stored.get(one.key) != one.bytes and not self._has(one)
        ]

    def _has(self, described: StagedObject) -> bool:
        """Whether the object, by a request of its own, has the size that the index says."""
        info = self.store.find(described.key)
        return info is not None and info.size == described.bytes


def open_staged(store: Store) -> StagedBase:
    """The staged base at this place. Raises `WrongRequest` when there is none, or its staging was
    not finished.
    """
    index = read_staged_index(store)
    if index is None:
        raise WrongRequest(
            f"There is no staged base at {store.url}: {BASE_KEY} is missing (it is written last). Type"
            f" emotion-train stage-base BASE {store.url}, where BASE is a hub id or a checkpoint's folder."
        )
    return StagedBase(store, index)


def changed(store: Store, key: str) -> WrongRequest:
    return WrongRequest(
        f"{store.url_of(key)} is not what {BASE_KEY} describes: the base was changed or damaged after it was"
        " staged. Stage it again into an empty folder or prefix."
    )
