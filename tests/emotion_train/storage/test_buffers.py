"""Several buffers are one object: read, sought in, hashed and stored as if they were joined."""

from __future__ import annotations

import hashlib
import os
import random

import pytest
import torch
from safetensors.torch import save

from emotion_train.edges.bounded import Unreadable, tensors_in, tensors_to_buffers
from emotion_train.storage import s3 as s3_page
from emotion_train.storage import store as store_page
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.store import Store

PIECES = [os.urandom(size) for size in (1, 0, 7, 4096, 0, 3, 100_000)]
WHOLE = b"".join(PIECES)
TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.float32).reshape(3, 5),
    'a\u00e4"': torch.randn(7),
    "one": torch.tensor(2.0),
    "none": torch.zeros(0, 3),
}


def test_they_are_read_as_if_they_were_joined() -> None:
    content = Buffers([*PIECES[:3], *(memoryview(one) for one in PIECES[3:])])
    assert (len(content), bytes(content)) == (len(WHOLE), WHOLE)
    assert content.sha256() == hashlib.sha256(WHOLE).hexdigest()
    draw = random.Random(3)
    with content.open() as file:
        assert file.read() == WHOLE
        assert file.read(5) == b""
        for _ in range(200):
            place, size = draw.randrange(len(WHOLE) + 9), draw.choice((0, 1, 5, 5000, -1))
            assert file.seek(place) == place
            assert file.read(size) == WHOLE[place : None if size < 0 else place + size]
        assert file.seek(-4, os.SEEK_END) == len(WHOLE) - 4
        assert file.read(2) == WHOLE[-4:-2]
        assert file.seek(-1, os.SEEK_CUR) == len(WHOLE) - 3


@pytest.mark.parametrize("in_pieces", [False, True])
def test_they_are_stored_and_read_back_in_ranges(
    store: Store, monkeypatch: pytest.MonkeyPatch, in_pieces: bool
) -> None:
    monkeypatch.setattr(store_page, "RANGE_BYTES", 1 << 20)
    if in_pieces:
        monkeypatch.setattr(s3_page, "WRITTEN_AT_ONCE", 9 << 20)
    pieces = [os.urandom(3 << 20), os.urandom(6 << 20), os.urandom(1 << 20)]
    whole = b"".join(pieces)
    assert store.write("large", Buffers(pieces)) == store.stat("large")
    assert store.read("large") == whole
    for size in (len(whole) + 1, len(whole), 1 << 20, 5):
        buffer = memoryview(bytearray(size))
        assert store.read_into("large", buffer) == min(size, len(whole))
        assert buffer[: len(whole)] == whole[:size]
    buffer = memoryview(bytearray(2 << 20))
    assert store.read_into("large", buffer, start=9 << 20) == 1 << 20
    assert buffer[: 1 << 20] == pieces[2]


def test_bytes_that_change_on_their_way_are_read_again_in_ranges(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_page, "RANGE_BYTES", 1000)
    whole = os.urandom(4500)
    store.write("large", whole)
    looks = []

    def verify(data: memoryview) -> int:
        looks.append(bytes(data))
        if len(looks) < 3:
            data[2500 + len(looks)] ^= 1  # another bit each time
            raise ValueError("spoiled")
        return len(data)

    buffer = memoryview(bytearray(4501))
    assert store.read_into_verified("large", buffer, verify) == 4500
    assert looks == [whole] * 3


def test_tensors_become_the_bytes_that_the_library_writes_and_share_their_memory() -> None:
    buffers = tensors_to_buffers(TENSORS)
    assert bytes(Buffers(buffers)) == save(TENSORS)
    weight = TENSORS["b.weight"].clone()
    changed = Buffers(tensors_to_buffers({"b.weight": weight}))
    weight[0, 0] = 7
    assert bytes(changed) == save({"b.weight": weight})


def test_tensors_of_a_buffer_are_the_library_s_and_share_its_memory() -> None:
    buffer = bytearray(save(TENSORS, metadata={"format": "pt"}))
    tensors = tensors_in(memoryview(buffer))
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], one) for name, one in TENSORS.items())
    tensors["one"].fill_(5.0)
    assert tensors_in(bytes(buffer))["one"] == 5.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[0,60]", b"[4,60]"),
        (b"[0,60]", b"[0,56]"),
        (b"[60,88]", b"[56,84]"),
        (b"[3,5]", b"[5,5]"),
        (b"[3,5]", b"[-3,-5]"),
        (b'"F32"', b'"F16"'),
        (b"[3,5]", b'"15"'),
    ],
)
def test_a_header_that_does_not_fit_its_buffer_is_refused(old: bytes, new: bytes) -> None:
    whole = save({"a": torch.ones(3, 5), "b": torch.ones(7)})
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(old, new, 1)
    assert header != whole[8 : 8 + length]
    spoiled = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    with pytest.raises(Unreadable):
        tensors_in(memoryview(bytearray(spoiled)))
    with pytest.raises(Unreadable):
        tensors_in(memoryview(bytearray(whole + b"1234")))
