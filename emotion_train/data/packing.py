"""Posts of one step laid end to end into rows of at most `tokens_per_microbatch` tokens.

Makes as few rows as the tokens need, of about equal lengths: a short last row would cost a GPU
nearly as much as a full one, since either reads all weights. Deterministic, O(N log N).

Letters: T tokens of a pack, N its posts, C labels.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
GPU_FILL = 128  # tokens; a GPU's matrix units are fastest with multiples of it


@dataclass(frozen=True)
class Pack:
    """The input of one forward pass. Attention must stay inside each segment between neighbouring
    `boundaries_S`.

    `targets_NC` are the labels' shares in each post (`UNKNOWN_SHARE` for labels that its source
    does not know), and `weights_NC` the weights of their losses, both as in `data/targets.py`.
    `slots_N` are the posts' places in the step, `posts_N` their numbers in the split. Filling
    tokens, if any, form one last segment that belongs to no post.
    """

    tokens_T: Ints
    positions_T: Ints
    boundaries_S: Ints
    last_tokens_N: Ints
    targets_NC: npt.NDArray[np.float32]
    weights_NC: npt.NDArray[np.float32]
    slots_N: Ints
    posts_N: Ints
    real_tokens: int

    @property
    def places(self) -> npt.NDArray[np.int32]:
        """The post's number and the position in it of each token, modulo 2^32, of shape [T, 2];
        filling tokens have the post -1.
        """
        posts_S = np.append(self.posts_N, -1)[: len(self.boundaries_S) - 1]
        posts_T = np.repeat(posts_S, np.diff(self.boundaries_S))
        return np.stack([posts_T, self.positions_T], 1).astype(np.uint32).view(np.int32)


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums do not exceed `capacity`; each index once, each
    group ascending.

    The longest goes first, into the emptiest of the fewest possible groups (Graham 1969: sums
    differ by at most one length). Where a group overflows, as with lengths near the capacity, each
    goes into the fullest group with room. Raises `ValueError` when a length exceeds the capacity.
    """
    if (longest := max(lengths, default=0)) > capacity:
        raise ValueError(f"a post of {longest} tokens does not fit a micro-batch of {capacity}")
    groups = deal(lengths, -(-sum(lengths) // capacity))
    if any(sum(lengths[index] for index in group) > capacity for group in groups):
        return _best_fit(lengths, capacity)
    return groups


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of `lengths` in `hands` groups, each ascending, whose sums differ by at most one
    length.
    """
    groups: list[list[int]] = [[] for _ in range(hands)]
    filled = [(0, group) for group in range(hands)]  # (tokens, group), a heap
    for index in _longest_first(lengths):
        tokens, group = filled[0]
        groups[group].append(index)
        heapreplace(filled, (tokens + lengths[index], group))
    return [sorted(group) for group in groups]


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, group), sorted
    for index in _longest_first(lengths):
        at = bisect_left(room, (lengths[index], -1))
        free, group = room.pop(at) if at < len(room) else (capacity, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        insort(room, (free - lengths[index], group))
    return [sorted(group) for group in groups]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def pack(
    posts: Sequence[npt.NDArray[np.int32]],
    targets_NC: Floats,
    weights_NC: Floats,
    capacity: int,
    pad_id: int,
    fill_multiple: int = 1,
    numbers: Sequence[int] | None = None,
) -> list[Pack]:
    """Packs that hold every post exactly once, filled with `pad_id` up to a multiple of
    `fill_multiple` tokens. `numbers` are the posts' numbers in their split; by default, their
    places in `posts`.
    """
    numbers = range(len(posts)) if numbers is None else numbers
    return [
        _lay_out(
            [posts[i] for i in group],
            targets_NC[group],
            weights_NC[group],
            group,
            [numbers[i] for i in group],
            pad_id,
            fill_multiple,
        )
        for group in bins([len(post) for post in posts], capacity)
    ]


def empty_pack(bos_or_pad_id: int, classes: int, fill_multiple: int = 1) -> Pack:
    """A pack of one token without weight, with which a rank that has run out of posts still takes
    part in the step.
    """
    post = np.asarray([bos_or_pad_id], np.int32)
    nothing_NC = np.zeros((1, classes))
    return _lay_out([post], nothing_NC, nothing_NC, [-1], [-1], bos_or_pad_id, fill_multiple)


def _lay_out(
    posts: Sequence[npt.NDArray[np.int32]],
    targets_NC: Floats,
    weights_NC: Floats,
    slots: Sequence[int],
    numbers: Sequence[int],
    pad_id: int,
    fill_multiple: int,
) -> Pack:
    lengths = [len(post) for post in posts]
    real_tokens = sum(lengths)
    filling = -real_tokens % fill_multiple
    segments = [*lengths, filling] if filling else lengths
    ends_N = np.cumsum(lengths, dtype=np.int64)
    return Pack(
        tokens_T=np.concatenate([*posts, np.full(filling, pad_id)]).astype(np.int64),
        positions_T=np.concatenate([np.arange(length) for length in segments]),
        boundaries_S=np.concatenate([[0], np.cumsum(segments)]).astype(np.int64),
        last_tokens_N=ends_N - 1,
        targets_NC=targets_NC.astype(np.float32),
        weights_NC=weights_NC.astype(np.float32),
        slots_N=np.asarray(slots, np.int64),
        posts_N=np.asarray(numbers, np.int64),
        real_tokens=real_tokens,
    )
