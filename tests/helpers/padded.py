"""Dropout's counters of a right-padded batch, for references that know no packs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emotion_train.data.index import Split
from emotion_train.model.dropout import Counters, key_of


def numbers_of(split: Split, places: Sequence[tuple[int, int]]) -> list[int]:
    """Numbers in the split of the posts at these places, (row group, row inside it) each."""
    return [sum(split.row_counts[:group]) + int(row) for group, row in places]


def padded_counters(
    seed: int, step: int, numbers: Sequence[int], length: int, device: torch.device | str = "cpu"
) -> Counters:
    """The counters of rows of `length` tokens, one for each post."""
    posts_NL = torch.tensor(numbers)[:, None].expand(-1, length)
    places_NL2 = torch.stack([posts_NL, torch.arange(length).expand_as(posts_NL)], 2).int()
    return Counters(torch.tensor(key_of(seed, step), device=device), places_NL2.to(device))
