"""The tensors of a staged base, on their device, fetched ahead of use in many ranged reads at once.

Pieces of some MiB are read in the order of the model by 32 threads, each into a buffer of its own
(page-locked for a GPU), verified there and copied to the device while the next ones are on their
way and the GPU quantises: host memory holds 32 pieces, 0.5 GiB, of any base, beside those that were
read ahead before there was a device (`BaseAhead`), which are copied into the same buffers. Hashing
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
from typing import Any

import torch

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
        self._ahead: deque[tuple[int, int, torch.Tensor, Future[None]]] = deque()
        for _ in range(count):
            self._ask(
                torch.empty(staged.index.piece_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            )

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
            buffer_B = self._piece(number, (start + filled) // size)
            first = (start + filled) % size
            count = min(size - first, len(target_B) - filled)
            target_B[filled : filled + count].copy_(buffer_B[first : first + count], non_blocking=True)
            filled += count

    def _piece(self, number: int, place: int) -> torch.Tensor:
        while True:
            ahead_number, ahead_place, buffer_B, reading = self._ahead[0]
            while not wait([reading], _LOOK_EVERY_S).done:
                self._meanwhile()
            reading.result()
            if (ahead_number, ahead_place) == (number, place):
                return buffer_B
            self._ahead.popleft()
            self._ask(buffer_B)

    def _ask(self, buffer_B: torch.Tensor) -> None:
        """Start to read the next piece into the buffer, once the copies from it are done."""
        if not self._todo:
            return
        copied: Any = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(self._device))
        number, place = self._todo.popleft()
        self._ahead.append(
            (number, place, buffer_B, self._pool.submit(self._read, number, place, buffer_B, copied))
        )

    def _read(self, number: int, place: int, buffer_B: torch.Tensor, copied: Any) -> None:
        """The bytes of a piece, read ahead or now, with patience."""
        if copied is not None:
            copied.synchronize()
        piece_B = buffer_B.numpy()[: self._index.piece_size((number, place))]
        if (ahead_B := self._staged.taken_ahead((number, place))) is not None:
            piece_B[:] = ahead_B
            return
        if self._closed.is_set():  # nobody wants it any more
            return
        until_it_answers(
            lambda: self._staged.read_piece((number, place), piece_B.data),
            Patience(self._patience_s),
            self._closed.wait,
            self._tell,
        )

    def _tell(self, error: StorageError) -> None:
        if self._telling.may_tell():
            log.warning("The run waits for its base: %s", error)
