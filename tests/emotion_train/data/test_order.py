"""The order of examples: exactly once, and pinned for all time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.data.order import Order, counter_hash


@st.composite
def orders(draw: st.DrawFn) -> Order:
    row_counts = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=30)))
    return Order(row_counts, draw(st.integers(1, len(row_counts))), draw(st.integers(0, 2**63 - 1)))


def read(order: Order, epoch: int, positions: range) -> list[tuple[int, int]]:
    groups, rows = order.epoch(epoch).locate(positions)
    return list(zip(groups.tolist(), rows.tolist(), strict=True))


@given(orders(), st.integers(1, 200), st.integers(0, 5))
def test_every_row_comes_exactly_once_an_epoch(order: Order, batch: int, epoch: int) -> None:
    seen = [
        item
        for step in range(order.steps(batch))
        for item in read(order, epoch, order.positions(step, batch))
    ]
    assert sorted(seen) == [
        (group, row) for group, count in enumerate(order.row_counts) for row in range(count)
    ]


@given(orders(), st.integers(1, 50))
def test_an_order_made_again_at_a_cursor_continues_the_old_one(order: Order, batch: int) -> None:
    whole = [read(order, 1, order.positions(step, batch)) for step in range(order.steps(batch))]
    again = Order(order.row_counts, order.lanes, order.seed)
    half = order.steps(batch) // 2
    assert [
        read(again, 1, again.positions(step, batch)) for step in range(half, again.steps(batch))
    ] == whole[half:]


def test_lanes_are_equal_slices_of_the_virtual_row_axis() -> None:
    order = Order((5, 3, 4), 2, seed=7)
    epoch = order.epoch(0)
    axis = [int(group) for group in epoch.groups_G for _ in range(order.row_counts[group])]
    groups, _ = epoch.locate(range(12))
    assert groups[0::2].tolist() == axis[:6]
    assert groups[1::2].tolist() == axis[6:]


def test_epochs_and_seeds_differ() -> None:
    orders_seen = {
        tuple(read(Order((50, 50), 2, seed), epoch, range(100))) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len(orders_seen) == 4


def test_positions_of_rows_are_close_to_uniform_over_seeds() -> None:
    """Row 0 of row group 0 lands in each quarter of the epoch about equally often (binomial, 5
    sigma).
    """
    quarters = np.zeros(4)
    for seed in range(800):
        quarters[read(Order((10, 10, 10, 10), 2, seed), 0, range(40)).index((0, 0)) // 10] += 1
    assert abs(quarters - 200).max() < 5 * np.sqrt(800 * 0.25 * 0.75)


def test_hashes_are_pinned() -> None:
    """SplitMix64 of 0 is published as 0xE220A8397B1DCDAF; the others hold the order of running runs
    in place.
    """
    assert int(counter_hash(0)[0]) == 0xE220A8397B1DCDAF
    assert counter_hash(42, 0, 1, 3, np.arange(3)).tolist() == GOLDEN_HASHES


def test_order_is_pinned() -> None:
    assert read(Order((4, 3, 5, 2), 3, 42), 0, range(14)) == GOLDEN_ORDER


def test_lanes_without_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="lanes"):
        Order((3,), 2, 0)


GOLDEN_HASHES = [4157300834747965350, 12108850162836320817, 17054809347662116380]
GOLDEN_ORDER = [
    (2, 2),
    (3, 0),
    (0, 2),
    (2, 1),
    (3, 1),
    (0, 0),
    (2, 4),
    (1, 2),
    (0, 1),
    (2, 0),
    (1, 0),
    (0, 3),
    (2, 3),
    (1, 1),
]
