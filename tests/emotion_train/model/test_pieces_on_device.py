"""A base whose pieces went to the device before the model was made is the base that is read when it
is needed: the same bits, each piece read once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotion_train.bases.ahead import BaseAhead
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import StagedBase
from emotion_train.config import Precision
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model import pieces_on_device
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import read_config
from emotion_train.model.lora import build_classifier
from emotion_train.model.pieces_on_device import PiecesOnDevice, bring_to, gpu_of_process
from emotion_train.model.staged_copy import stage
from emotion_train.processes.machine import memory_of, whole_memory_of
from emotion_train.sizing.memory import GIB
from tests.emotion_train.model.test_lora import LORA
from tests.emotion_train.model.test_on_gpu import SHAPE, packed_gradients
from tests.emotion_train.model.test_read_ahead import ALL, PIECE, Reads, wait_until
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Precision]:
    """Bases of several objects whose tensors begin and end anywhere in pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    causal_checkpoint(folder / "base", "mistral")
    where = str(folder / "staged")
    stage(str(folder / "base"), where, request.param, "cpu", shard_bytes=60_000, piece_bytes=PIECE)
    return where, request.param


class Moved:
    """Puts pieces on the CPU as on a device, and notes them; `before` is called with each."""

    def __init__(self, before: Callable[[int], Any] = lambda count: None) -> None:
        self.count = 0
        self._before = before
        self._lock = threading.Lock()

    def put_for(self, staged: StagedBase) -> Any:
        on_device = PiecesOnDevice(staged.index, CPU)

        def put(place: Any, piece_B: Any) -> torch.Tensor:
            with self._lock:
                self.count += 1
                count = self.count
            self._before(count)
            return on_device.put(place, piece_B)

        return put


def model_of(base: str | BaseFiles, precision: Precision, device: str = "cpu") -> EmotionClassifier:
    return build_classifier(read_config(base), precision, 3, LORA, 1, device)[0]


def bits(model: EmotionClassifier) -> dict[str, bytes]:
    """All tensors of the model, those of 4-bit weights among them."""
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors[f"{name}.absmax"], tensors[f"{name}.nested"] = state.absmax, state.state2.absmax
            tensors[f"{name}.code"], tensors[f"{name}.offset"] = state.code, state.offset
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def pieces_of(ahead: BaseAhead) -> int:
    index = ahead.files().staged.index  # type: ignore[union-attr]
    return len(index.places(None))


@pytest.mark.parametrize("room", [0, 3, None])
@pytest.mark.parametrize("when", ["before it is read", "when it is read"])
def test_a_model_of_pieces_that_were_moved_is_the_same(
    staged: tuple[str, Precision], monkeypatch: pytest.MonkeyPatch, room: int | None, when: str
) -> None:
    url, precision = staged
    plain = bits(model_of(url, precision))
    reads, moved = Reads(monkeypatch), Moved()
    with BaseAhead(url, None, ALL if room is None else room * PIECE + 1) as ahead:
        there = pieces_of(ahead) if room is None else room
        if when == "when it is read":
            wait_until(lambda: len(reads.of_pieces) == there)
        ahead.move(moved.put_for)
        wait_until(lambda: len(reads.of_pieces) == there)
        model = model_of(ahead.files(), precision)
        assert bits(model) == plain
        assert len(reads.of_pieces) == pieces_of(ahead) == len(set(reads.of_pieces))
    assert moved.count <= there


def test_all_pieces_go_to_the_device_and_leave_memory(staged: tuple[str, Precision]) -> None:
    url, moved = staged[0], Moved()
    with BaseAhead(url, None, ALL) as ahead:
        ahead.move(moved.put_for)
        wait_until(lambda: moved.count == pieces_of(ahead))
        files = ahead.files().staged
        assert files is not None
        taken = [files.taken_ahead(place) for place in files.index.places(None)]
    assert {type(piece) for piece in taken} == {torch.Tensor}
    whole = b"".join(piece.numpy().tobytes() for piece in taken)
    assert whole == b"".join(Path(url, one.key).read_bytes() for one in files.index.shards)


def test_an_object_on_the_device_is_gone_with_its_last_piece(staged: tuple[str, Precision]) -> None:
    files = BaseFiles.find(staged[0]).staged
    assert files is not None
    on_device = PiecesOnDevice(files.index, CPU)
    for place in files.index.places(None):
        on_device.put(place, np.zeros(files.index.piece_size(place), np.uint8))
    assert not on_device._objects


@pytest.mark.parametrize("good", [0, 3])
def test_where_the_device_has_no_room_pieces_wait_in_memory(
    staged: tuple[str, Precision], monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    url, precision = staged
    plain = bits(model_of(url, precision))

    def full(count: int) -> None:
        if count > good:
            raise torch.OutOfMemoryError

    reads, moved = Reads(monkeypatch), Moved(full)
    with BaseAhead(url, None, ALL) as ahead:
        wait_until(lambda: len(reads.of_pieces) == pieces_of(ahead))
        ahead.move(moved.put_for)
        assert bits(model_of(ahead.files(), precision)) == plain
        assert len(reads.of_pieces) == pieces_of(ahead)


def test_a_device_that_cannot_be_asked_changes_nothing(staged: tuple[str, Precision]) -> None:
    asked = threading.Event()

    def broken(staged: StagedBase) -> Any:
        asked.set()
        raise RuntimeError("CUDA driver initialization failed")

    url, precision = staged
    with BaseAhead(url, None, ALL) as ahead:
        ahead.move(broken)
        assert asked.wait(PATIENCE_S)
        assert bits(model_of(ahead.files(), precision)) == bits(model_of(url, precision))


def test_a_changed_byte_is_refused_in_the_same_words(staged: tuple[str, Precision], tmp_path: Path) -> None:
    url, precision = staged
    for path in Path(url).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = min(tmp_path.glob("model-*"))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(WrongRequest) as plain:
        model_of(str(tmp_path), precision)
    with BaseAhead(str(tmp_path), None, ALL) as ahead:
        ahead.move(Moved().put_for)
        with pytest.raises(WrongRequest) as moved:
            model_of(ahead.files(), precision)
    assert str(moved.value) == str(plain.value)


def test_a_start_that_ends_while_pieces_move_waits_for_nobody(staged: tuple[str, Precision]) -> None:
    released = threading.Event()
    moved = Moved(lambda count: released.wait(PATIENCE_S))
    before = set(threading.enumerate())
    with BaseAhead(staged[0], None, ALL) as ahead:
        ahead.move(moved.put_for)
        wait_until(lambda: moved.count > 0)
        files = ahead.files().staged
        assert files is not None
        threading.Timer(0.1, files.read_no_more).start()
        assert files.taken_ahead(files.index.places(None)[0]) is None
    begun = moved.count
    released.set()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert moved.count == begun


def test_a_base_that_is_not_there_is_refused_by_who_asks_for_it(tmp_path: Path) -> None:
    with BaseAhead(str(tmp_path / "nothing"), None, ALL) as ahead:
        ahead.move(Moved().put_for)
        with pytest.raises(WrongRequest) as refused:
            ahead.files()
    assert "does not exist" in str(refused.value)


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [
        ({}, "cuda:0"),
        ({"LOCAL_RANK": "3", "ACCELERATE_USE_CPU": "false"}, "cuda:3"),
        ({"LOCAL_RANK": "3", "ACCELERATE_USE_CPU": "true"}, "cpu"),
        ({"LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "true"}, "cpu"),
        ({"LOCAL_RANK": "1", "ACCELERATE_USE_DEEPSPEED": "true"}, "cpu"),
    ],
)
def test_pieces_go_to_the_gpu_that_the_process_gets_and_holds_the_base_on(
    environment: dict[str, str], gpu: str
) -> None:
    assert gpu_of_process(environment) == torch.device(gpu)


@pytest.mark.parametrize(
    ("precision", "used_gib", "base_gib", "moves"),
    [
        ("as staged", 0.6, 12, True),
        ("as staged", 2.0, 12, False),  # another program's
        ("as staged", 0.6, 61, False),  # no room for the base and what comes beside it
        ("other", 0.6, 12, False),
    ],
)
def test_only_an_unused_gpu_with_room_is_filled(
    staged: tuple[str, Precision],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    used_gib: float,
    base_gib: int,
    moves: bool,
) -> None:
    """The process's context takes half a GiB of its GPU."""
    url, own = staged
    other: Precision = "bf16" if own == "nf4" else "nf4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pieces_on_device, "whole_memory_of", lambda device: 80 * GIB)
    free = int((80 - used_gib + 0.5) * GIB)
    monkeypatch.setattr(pieces_on_device, "memory_of", lambda device: free)
    monkeypatch.setattr(type(BaseFiles.find(url).staged.index), "bytes", base_gib * GIB)  # type: ignore[union-attr]
    asked: list[Any] = []

    class Ahead(BaseAhead):
        def move(self, put_for: Any) -> None:
            asked.append(put_for(BaseFiles.find(url).staged))

    bring_to(Ahead(url, None, ALL), torch.device("cuda:0"), own if precision == "as staged" else other)
    assert [put is not None for put in asked] == [moves]


@pytest.mark.parametrize("initialized", [True, False])
def test_the_gpu_is_the_current_one_of_the_thread_that_asks(
    staged: tuple[str, Precision], monkeypatch: pytest.MonkeyPatch, initialized: bool
) -> None:
    """Several Slurm tasks on a machine have a GPU each."""
    asked: list[torch.device] = []
    own = threading.current_thread()

    def whole(device: torch.device) -> int:
        asked.append(device)
        return 90 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2 * (threading.current_thread() is own))
    monkeypatch.setattr(pieces_on_device, "memory_of", lambda device: 80 * GIB)
    monkeypatch.setattr(pieces_on_device, "whole_memory_of", whole)
    url, precision = staged
    with BaseAhead(url, None, ALL) as ahead:
        bring_to(ahead, torch.device("cuda"), precision)
        wait_until(lambda: asked)
    assert asked == [torch.device("cuda", 2 if initialized else 0)]


def test_on_a_cpu_pieces_stay_in_memory(staged: tuple[str, Precision]) -> None:
    url, precision = staged
    with BaseAhead(url, None, ALL) as ahead:
        bring_to(ahead, CPU, precision)
        files = ahead.files().staged
        assert files is not None
        assert {type(files.taken_ahead(place)) for place in files.index.places(None)} == {np.ndarray}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["nf4", "bf16", "fp8"])
def test_weights_adapters_and_losses_on_a_gpu_are_those_of_a_start_that_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 units")
    if whole_memory_of(torch.device("cuda")) - memory_of(torch.device("cuda")) > GIB:
        pytest.skip("another program uses the GPU, which pieces are then not moved to")
    base, url = str(causal_checkpoint(tmp_path / "base", **SHAPE)), str(tmp_path / "staged")
    stage(base, url, "nf4" if precision == "nf4" else "bf16", "cuda", shard_bytes=400_000, piece_bytes=PIECE)
    tokenizer = PostTokenizer.load(base, 128)
    found = []
    for moves in (False, True):
        with BaseAhead(url, None, ALL) as ahead:
            moved: list[torch.Tensor] = []
            real = PiecesOnDevice.put

            def put(self: Any, *given: Any, moved: Any = moved, real: Any = real) -> Any:
                moved.append(real(self, *given))
                return moved[-1]

            with monkeypatch.context() as patch:
                patch.setattr(PiecesOnDevice, "put", put)
                if moves:
                    bring_to(ahead, torch.device("cuda"), precision)
                    wait_until(lambda moved=moved, ahead=ahead: len(moved) == pieces_of(ahead))
                model = model_of(ahead.files(), precision, "cuda").train()
        assert {piece.device.type for piece in moved} == ({"cuda"} if moves else set())
        before = bits(model)
        model.fuse()
        assert model.decoder is not None
        losses = [packed_gradients(model, tokenizer, 4096) for _ in range(2)]
        found.append((before, losses))
        moved.clear()
    (plain, plain_losses), (there, losses) = found
    assert plain == there
    for (one, gradients), (other, again) in zip(plain_losses, losses, strict=True):
        assert one == other
        assert all(torch.equal(gradients[name], again[name]) for name in gradients)
