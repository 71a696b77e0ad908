"""The tensors of a staged base, on their device, fetched ahead of use in many ranged reads at once.

Pieces of some MiB are read in the order of the model by 32 threads, each into a buffer of its own
(page-locked for a GPU), verified there and copied to the device while the next ones are on their
way and the GPU quantises: host memory holds 32 pieces, 0.5 GiB, of any base, beside those that were
read ahead (`BaseAhead`), which are copied into the same buffers if they did not reach the device
before (`pieces_on_device.py`), where only their place changes. Hashing
costs a core 0.8 s a GiB, on as many cores as there are. Every process reads the whole base: eight
ranks on a node fetch 8 × 12 GiB of nf4 or 8 × 43 GiB of bf16 from the bucket. Where the engine
shards the base, each process also holds all of it in host memory until it is cut.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, NamedTuple

import torch

from emotion_train.bases.pieces_ahead import Place
from emotion_train.bases.staged import StagedBase, StagedPart, StagedTensor
from emotion_train.errors import StorageError
from emotion_train.model.precision import Codes4bit
from emotion_train.storage.patience import Patience, until_it_answers

log = logging.getLogger(__name__)

PIECES_IN_FLIGHT = 32
_LOOK_EVERY_S = 0.5
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}  # by safetensors' names
# JSON in a tensor: numbers that bitsandbytes reads on the host
PACKED_STATE = ".quant_state.bitsandbytes__nf4"


def staged_tensors(
    staged: StagedBase,
    device: torch.device,
    patience_s: float = 0.0,
    meanwhile: Callable[[], None] = lambda: None,
    wanted: Sequence[StagedTensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor | Codes4bit]]:
    """Every tensor once, or those of the index that are `wanted`, in the order in which it was
    staged; 4-bit ones as codes. No piece is read that holds none of them.

    A store that does not answer is asked again for `patience_s` seconds; `meanwhile` is called
    twice a second while a piece is waited for. Raises `WrongRequest` when stored bytes are no
    longer those of the index.
    """
    with _Pieces(staged, device, patience_s, meanwhile, wanted) as pieces:
        for described in staged.index.tensors if wanted is None else wanted:
            yield described.name, _fetch(described, pieces, device)


def _fetch(described: StagedTensor, pieces: _Pieces, device: torch.device) -> torch.Tensor | Codes4bit:
    parts = {part.suffix: _empty(part, device) for part in described.parts}
    for part in described.parts:
        pieces.fill(described.object, part.start, parts[part.suffix].view(-1).view(torch.uint8))
    whole = parts.pop("")
    return Codes4bit(described.shape, whole, parts) if parts else whole


def _empty(part: StagedPart, device: torch.device) -> torch.Tensor:
    return torch.empty(
        part.shape, dtype=DTYPES[part.dtype], device="cpu" if part.suffix == PACKED_STATE else device
    )


class _Piece(NamedTuple):
    bytes_B: torch.Tensor
    is_buffer: bool  # on the host, to be read into again


class _Pieces:
    """The bytes of the objects one after the other, read ahead; a with statement ends its
    threads.
    """

    def __init__(
        self,
        staged: StagedBase,
        device: torch.device,
        patience_s: float,
        meanwhile: Callable[[], None],
        wanted: Sequence[StagedTensor] | None,
    ) -> None:
        self._staged, self._index, self._device = staged, staged.index, device
        self._patience_s, self._meanwhile = patience_s, meanwhile
        self._closed = threading.Event()
        self._telling = Patience()  # of all pieces together
        self._todo = deque(staged.index.places(wanted))
        count = min(PIECES_IN_FLIGHT, len(self._todo))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="piece")
        self._ahead: deque[tuple[Place, Future[_Piece]]] = deque()
        # buffers to read into, each with the event after which all is copied from it
        self._free: deque[tuple[torch.Tensor, Any]] = deque()
        for _ in range(count):
            self._ask()

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._staged.read_no_more()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def fill(self, number: int, start: int, target_B: torch.Tensor) -> None:
        """Copy the bytes of object `number` from `start` on; call it in the order of the bytes."""
        size, filled = self._index.piece_bytes, 0
        while filled < len(target_B):
            piece_B = self._piece((number, (start + filled) // size))
            first = (start + filled) % size
            count = min(size - first, len(target_B) - filled)
            # what goes back to the host is read there at once
            target_B[filled : filled + count].copy_(
                piece_B[first : first + count], non_blocking=target_B.is_cuda
            )
            filled += count

    def _piece(self, wanted: Place) -> torch.Tensor:
        while True:
            place, reading = self._ahead[0]
            while not wait([reading], _LOOK_EVERY_S).done:
                self._meanwhile()
            piece = reading.result()
            if place == wanted:
                return piece.bytes_B
            self._ahead.popleft()
            if piece.is_buffer:
                copied: Any = None
                if self._device.type == "cuda":
                    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    copied.record(torch.cuda.current_stream(self._device))
                self._free.append((piece.bytes_B, copied))
            self._ask()

    def _ask(self) -> None:
        """Start to read the next piece."""
        if self._todo:
            place = self._todo.popleft()
            self._ahead.append((place, self._pool.submit(self._read, place)))

    def _read(self, place: Place) -> _Piece:
        """The bytes of a piece, read ahead or now, with patience."""
        ahead_B = self._staged.taken_ahead(place)
        if isinstance(ahead_B, torch.Tensor):
            return _Piece(ahead_B, is_buffer=False)
        buffer_B = self._buffer()
        piece_B = buffer_B.numpy()[: self._index.piece_size(place)]
        if ahead_B is not None:
            piece_B[:] = ahead_B
        elif not self._closed.is_set():  # else nobody wants it any more
            until_it_answers(
                lambda: self._staged.read_piece(place, piece_B.data),
                Patience(self._patience_s),
                self._closed.wait,
                self._tell,
            )
        return _Piece(buffer_B, is_buffer=True)

    def _buffer(self) -> torch.Tensor:
        """One that is free, or a new one where all are in use."""
        try:
            buffer_B, copied = self._free.popleft()
        except IndexError:
            pinned = self._device.type == "cuda"
            return torch.empty(self._index.piece_bytes, dtype=torch.uint8, pin_memory=pinned)
        if copied is not None:
            copied.synchronize()
        return buffer_B

    def _tell(self, error: StorageError) -> None:
        if self._telling.may_tell():
            log.warning("The run waits for its base: %s", error)
