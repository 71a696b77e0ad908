"""Whether a text is in a training split: a Bloom filter of the hashes that find equal texts.

It takes 1.8 bytes per post. Its "no" is certain; its "yes" is wrong for at most 1 in 1,000 other
texts. The price: it can be asked about any text, so its holder learns which of their own texts were
trained on. It is therefore stored with the run, and enters a pulled adapter only on request. Making
it takes about 12 s of one core per million posts.

Letters: N posts, 2 halves of a hash, K probes of a post.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.index import Split
from emotion_train.errors import WrongRequest
from emotion_train.storage.store import Store

FILE_NAME = "training-filter.bloom"
MAX_POSTS = 1 << 32
# Bloom 1970: with 10 probes, 14.38 bits per post give 0.1 %; a little more leaves room for chance
FALSE_POSITIVES = 0.001
_PROBES = 10
_BITS_PER_POST = 14.5
_MORE_BITS = 1024  # with few posts, the share of set bits varies too much to keep the bound

# magic, version, posts, sha256 of the data set's index; then the bits; then sha256 of all before it
_HEAD = struct.Struct("<8sIQ32s")
_MAGIC = b"emotrain"
_VERSION = 1
_SUM_BYTES = 32
_KEYS_AT_A_TIME = 1 << 12


class TextFilter:
    """The texts of one split: `contains` is True for each added text, and for at most 0.1 % of
    other texts.

    `posts` is the number of texts that it is made for, `index_sha256` the data set's. The same
    texts give the same bytes in any order.
    """

    def __init__(self, posts: int, index_sha256: str) -> None:
        if not 0 <= posts <= MAX_POSTS:
            raise ValueError(f"a filter of {posts} posts; allowed are 0 to {MAX_POSTS}")
        self.posts = posts
        self.index_sha256 = index_sha256
        self._bits_B = np.zeros(_size(posts), np.uint8)

    def add(self, key_N2: NDArray[np.uint64]) -> None:
        """Add texts by their `text_keys`."""
        for probe_NK in _probes(key_N2, 8 * len(self._bits_B)):
            np.bitwise_or.at(self._bits_B, probe_NK >> 3, _bit_of(probe_NK))

    def contains(self, key_N2: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which texts are in the split, by their `text_keys`."""
        found = [
            (self._bits_B[probe_NK >> 3] & _bit_of(probe_NK)).all(axis=1)
            for probe_NK in _probes(key_N2, 8 * len(self._bits_B))
        ]
        return np.concatenate(found) if found else np.zeros(0, np.bool_)

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(_MAGIC, _VERSION, self.posts, bytes.fromhex(self.index_sha256))
        data = head + self._bits_B.tobytes()
        return data + hashlib.sha256(data).digest()

    @classmethod
    def from_file(cls, path: Path) -> TextFilter:
        """Read a filter from a file, as `from_bytes`. If the file's size differs from the one in
        its head, no more is read.
        """
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            posts = _HEAD.unpack(head)[2] if len(head) == _HEAD.size else 0
            whole = posts <= MAX_POSTS and path.stat().st_size == file_bytes(posts)
            return cls.from_bytes(head + (file.read() if whole else b""), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> TextFilter:
        """The filter that `to_bytes` wrote; `url` names it in messages.

        Raises `WrongRequest` for other or damaged bytes, and for a filter of a later version.
        """
        if len(data) < _HEAD.size or not data.startswith(_MAGIC):
            raise WrongRequest(f"{url} is no training filter; pull it again, or leave it out.")
        _, version, posts, index = _HEAD.unpack_from(data)
        if version != _VERSION:
            raise WrongRequest(
                f"The training filter {url} has version {version}; this program reads version {_VERSION}. Use"
                " the version that wrote the run."
            )
        end = len(data) - _SUM_BYTES
        whole = posts <= MAX_POSTS and end == _HEAD.size + _size(posts)
        if not whole or hashlib.sha256(memoryview(data)[:end]).digest() != data[end:]:
            raise WrongRequest(f"The training filter {url} is damaged; pull it again, or leave it out.")
        read = cls(0, index.hex())
        read.posts = posts
        read._bits_B = np.frombuffer(data, np.uint8, _size(posts), _HEAD.size).copy()
        return read


def file_bytes(posts: int) -> int:
    """The size of a filter's file."""
    return _HEAD.size + _size(posts) + _SUM_BYTES


def keys_of(texts: Iterable[str]) -> NDArray[np.uint64]:
    """`key_N2` of texts, in 5 microseconds each."""
    import pyarrow as pa

    from emotion_train.data.cleaning import text_keys

    key_N2: NDArray[np.uint64] = text_keys(pa.array(list(texts), pa.string()))
    return key_N2


def filter_of_split(
    store: Store,
    split: Split,
    index_sha256: str,
    patience_s: float = 0.0,
    tell: Callable[[int], None] = lambda posts: None,
) -> TextFilter:
    """The filter of all texts of a split, which is read once. `tell` gets the number of posts done.

    A store that does not answer is asked again for `patience_s` seconds.
    """
    from emotion_train.data.reader import RowGroupReader

    made, done = TextFilter(split.rows, index_sha256), 0
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s) as reader:
        for group, described in enumerate(split.row_groups):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            made.add(keys_of(text for text in reader.rows(group).texts if text))
            done += described.rows
            tell(done)
    return made


def _size(posts: int) -> int:
    """Bytes of a filter's bits."""
    return (_MORE_BITS + math.ceil(posts * _BITS_PER_POST / 64) * 64) // 8


def _bit_of(probe_NK: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (probe_NK & 7).astype(np.uint8))


def _probes(key_N2: NDArray[np.uint64], bits: int) -> Iterator[NDArray[np.int64]]:
    """The places of K bits for each key, in chunks of bounded memory: the hash's second half times
    the probe's number, plus its first half, mixed by the finaliser of MurmurHash3.
    """
    number_K = np.arange(_PROBES, dtype=np.uint64)
    for start in range(0, len(key_N2), _KEYS_AT_A_TIME):
        part_N2 = key_N2[start : start + _KEYS_AT_A_TIME]
        mixed_NK = part_N2[:, :1] + part_N2[:, 1:] * number_K
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed_NK ^= mixed_NK >> np.uint64(33)
            mixed_NK *= np.uint64(factor)
        mixed_NK ^= mixed_NK >> np.uint64(33)
        yield (mixed_NK % np.uint64(bits)).astype(np.int64)
