"""Packing: every post once, never over capacity, near the lower bound."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.data.packing import bins, empty_pack, pack

lengths_and_capacity = st.integers(4, 64).flatmap(
    lambda cap: st.tuples(st.lists(st.integers(1, cap), max_size=60), st.just(cap))
)


@given(lengths_and_capacity)
def test_every_post_is_in_one_bin_that_it_fits(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    groups = bins(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= capacity for group in groups)


@given(lengths_and_capacity)
def test_no_two_bins_could_be_one(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    totals = sorted(sum(lengths[i] for i in group) for group in bins(lengths, capacity))
    assert all(first + second > capacity for first, second in pairwise(totals))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=200), st.integers(64, 128))
def test_posts_far_shorter_than_a_bin_fill_the_fewest_evenly(lengths: list[int], capacity: int) -> None:
    totals = [sum(lengths[i] for i in group) for group in bins(lengths, capacity)]
    if sum(lengths) <= len(totals) * (capacity - 8):  # else the last posts may need a bin more
        assert len(totals) == -(-sum(lengths) // capacity)
        assert max(totals) - min(totals) <= max(lengths)


@given(lengths_and_capacity, st.sampled_from([1, 8, 16]))
def test_a_pack_holds_its_posts_unchanged(case: tuple[list[int], int], fill: int) -> None:
    lengths, capacity = case
    posts = [np.arange(length, dtype=np.int32) + 100 * i for i, length in enumerate(lengths)]
    packs = pack(
        posts,
        np.arange(2 * len(posts), dtype=np.float64).reshape(-1, 2),
        -0.5 * np.arange(2 * len(posts), dtype=np.float64).reshape(-1, 2),
        capacity,
        pad_id=-7,
        fill_multiple=fill,
    )
    seen = []
    for one in packs:
        assert len(one.tokens_T) % fill == 0
        assert len(one.tokens_T) == len(one.positions_T) == one.boundaries_S[-1]
        for n, slot in enumerate(one.slots_N.tolist()):
            start, end = one.boundaries_S[n], one.boundaries_S[n + 1]
            np.testing.assert_array_equal(one.tokens_T[start:end], posts[slot])
            np.testing.assert_array_equal(one.positions_T[start:end], np.arange(lengths[slot]))
            assert one.last_tokens_N[n] == end - 1
            assert one.targets_NC[n].tolist() == [2 * slot, 2 * slot + 1]
            assert one.weights_NC[n].tolist() == [-slot, -slot - 0.5]
            seen.append(slot)
        assert (one.tokens_T[one.real_tokens :] == -7).all()
        assert len(one.boundaries_S) == len(one.slots_N) + 1 + (one.real_tokens < len(one.tokens_T))
    assert sorted(seen) == list(range(len(posts)))


def test_a_post_larger_than_a_microbatch_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit a micro-batch of 8"):
        bins([3, 9], 8)


@given(lengths_and_capacity, st.sampled_from([1, 8, 16]))
def test_each_token_knows_its_post_and_its_position_in_it(case: tuple[list[int], int], fill: int) -> None:
    lengths, capacity = case
    posts = [np.arange(length, dtype=np.int32) for length in lengths]  # each token is its position
    numbers = [2**31 - 2 + 7 * place for place in range(len(posts))]
    nothing = np.zeros((len(posts), 2))
    for one in pack(posts, nothing, nothing, capacity, 0, fill, numbers):
        assert one.places.dtype == np.int32
        posts_T, positions_T = one.places.view(np.uint32).astype(np.int64).T
        assert one.posts_N.tolist() == [numbers[slot] for slot in one.slots_N]
        expected = [numbers[slot] for slot in one.slots_N for _ in posts[slot]]
        assert posts_T.tolist() == expected + [2**32 - 1] * (len(one.tokens_T) - one.real_tokens)
        np.testing.assert_array_equal(positions_T[: one.real_tokens], one.tokens_T[: one.real_tokens])


def test_an_empty_pack_weighs_nothing() -> None:
    one = empty_pack(11, classes=3, fill_multiple=8)
    assert one.weights_NC.tolist() == [[0.0] * 3]
    assert one.slots_N.tolist() == [-1]
    assert len(one.tokens_T) == 8
