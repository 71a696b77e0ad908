"""The filter of a training split finds each of its texts, takes few others for them, and is refused
when its bytes are not whole.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion_train.data.index import read_index
from emotion_train.data.text_filter import (
    FALSE_POSITIVES,
    FILE_NAME,
    MAX_POSTS,
    TextFilter,
    file_bytes,
    filter_of_split,
    keys_of,
)
from emotion_train.errors import WrongRequest
from emotion_train.preparation.steps import prepare
from emotion_train.storage.open import open_store
from tests.helpers.tiny_runs import write_posts

INDEX = "ab" * 32
MASK = (1 << 64) - 1


def filter_of(texts: list[str]) -> TextFilter:
    made = TextFilter(len(texts), INDEX)
    made.add(keys_of(texts))
    return made


@pytest.mark.parametrize("posts", [1, 30, 70, 500, 3000, 60_000])
def test_every_text_is_found_and_at_most_one_in_a_thousand_others(posts: int) -> None:
    draw = np.random.default_rng(posts)
    trained_N2 = draw.integers(0, 1 << 64, (posts, 2), np.uint64)
    made = TextFilter(posts, INDEX)
    for part_N2 in np.array_split(trained_N2, 3):
        made.add(part_N2)
    assert made.contains(trained_N2).all()
    others_N2 = draw.integers(0, 1 << 64, (400_000, 2), np.uint64)
    assert made.contains(others_N2).mean() <= FALSE_POSITIVES
    assert file_bytes(posts) == len(made.to_bytes())


def test_many_unseen_texts_are_not_found() -> None:
    """Texts as people write them, of which most differ in one word or digit from a trained one."""
    trained = [f"post {n} about tea & rain" for n in range(0, 80_000, 2)]
    made = filter_of(trained)
    found_N = made.contains(keys_of(f"post {n} about tea & rain" for n in range(80_000)))
    assert found_N[::2].all()
    assert 0 < found_N[1::2].mean() <= FALSE_POSITIVES
    assert len(made.to_bytes()) < 1.83 * len(trained)


def test_a_text_is_found_in_every_form_that_counts_as_the_same() -> None:
    made = filter_of(["What a\tlovely  Mess", "stra\u00dfe"])
    found_N = made.contains(
        keys_of(["what a lovely mess ", "STRASSE", "what a lovely mess!", "\uff37hat a lovely mess"])
    )
    assert found_N.tolist() == [True, True, False, True]


@settings(max_examples=15)
@given(st.lists(st.text(min_size=1), max_size=40), st.randoms(use_true_random=False))
def test_the_same_texts_in_any_order_give_the_same_bytes(texts: list[str], draw: object) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    other = sorted(texts, key=lambda text: draw.random())  # type: ignore[attr-defined]
    made, again = filter_of(texts), TextFilter(len(texts), INDEX)
    for text in [*other, *other[:3]]:
        again.add(keys_of([text]))
    assert made.to_bytes() == again.to_bytes()
    read = TextFilter.from_bytes(made.to_bytes(), "here")
    assert (read.posts, read.index_sha256, read.to_bytes()) == (len(texts), INDEX, made.to_bytes())
    assert read.contains(keys_of(texts)).all()


def test_the_bits_are_those_that_plain_integers_give() -> None:
    """Another program must find the same bits in a file that this one wrote."""
    key_N2 = np.random.default_rng(0).integers(0, 1 << 64, (50, 2), np.uint64)
    made = TextFilter(50, INDEX)
    made.add(key_N2)
    data = made.to_bytes()
    bits = 1024 + -(-50 * 29 // 2 // 64) * 64
    expected = [0] * (bits // 8)
    for first, second in key_N2.tolist():
        for number in range(10):
            mixed = (first + second * number) & MASK
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                mixed = ((mixed ^ mixed >> 33) * factor) & MASK
            place = (mixed ^ mixed >> 33) % bits
            expected[place // 8] |= 1 << place % 8
    assert data[52:-32] == bytes(expected)
    assert struct.unpack("<8sIQ", data[:20]) == (b"emotrain", 1, 50)


def test_damaged_bytes_are_one_sentence() -> None:
    data = filter_of(["one", "two"]).to_bytes()
    for place in (12, 19, 21, 52, 60, 150, len(data) - 1):
        raw = bytearray(data)
        raw[place] ^= 16
        with pytest.raises(WrongRequest, match=r"^The training filter there is damaged; pull it again, or"):
            TextFilter.from_bytes(bytes(raw), "there")
    for cut in (data[:-1], data + b"x", data[:52], data[:84]):
        with pytest.raises(WrongRequest, match="is damaged"):
            TextFilter.from_bytes(cut, "there")
    for other in (b"", b"emotrain", b"PAR1" + data[4:], b"\x80\x04" + data):
        with pytest.raises(WrongRequest, match="there is no training filter"):
            TextFilter.from_bytes(other, "there")


def test_a_count_that_the_bytes_do_not_bear_out_takes_no_memory() -> None:
    data = filter_of(["one"]).to_bytes()
    for posts in (0, 1 << 31, MAX_POSTS, MAX_POSTS + 1, MASK):
        with pytest.raises(WrongRequest, match="is damaged"):
            TextFilter.from_bytes(data[:12] + struct.pack("<Q", posts) + data[20:], "there")
    with pytest.raises(ValueError, match="allowed are 0 to"):
        TextFilter(MAX_POSTS + 1, INDEX)


@pytest.mark.parametrize("size", [52, 53, 211, 213, 1 << 40])
def test_a_file_of_another_size_than_its_head_says_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(filter_of(["one", "two"]).to_bytes())
    assert TextFilter.from_file(path).contains(keys_of(["One", "three"])).tolist() == [True, False]
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(WrongRequest, match=f"The training filter {path} is damaged"):
        TextFilter.from_file(path)


def test_a_later_version_is_named() -> None:
    data = filter_of(["one"]).to_bytes()
    with pytest.raises(WrongRequest, match="has version 2; this program reads version 1"):
        TextFilter.from_bytes(data[:8] + struct.pack("<I", 2) + data[12:], "there")


def test_the_filter_of_a_split_has_its_texts_and_no_others(tmp_path: Path) -> None:
    prepare(str(write_posts(tmp_path / "source")), str(tmp_path / "data"))
    store = open_store(str(tmp_path / "data"))
    index, told = read_index(store), list[int]()
    made = filter_of_split(store, index.split("train"), index.sha256(), tell=told.append)
    assert (made.posts, made.index_sha256) == (index.split("train").rows, index.sha256())
    assert told[-1] == made.posts
    for split, inside in (("train", True), ("validation", False), ("test", False)):
        lines = (tmp_path / "source" / f"{split}.csv").read_text().splitlines()[1:]
        found_N = made.contains(keys_of(line.rpartition(",")[0] for line in lines))
        assert (found_N == inside).all()
