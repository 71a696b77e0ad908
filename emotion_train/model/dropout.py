"""Dropout whose mask is a function of what it masks: (seed, step, post, position in the post,
product, channel). So a step drops the same numbers in any packing and on any number of ranks, and a
backward pass or a recomputation finds the mask again without keeping it.

The bits are those of Philox4x32-7 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as
easy as 1, 2, 3", SC'11), of which 7 rounds pass all of BigCrush. Its key is a hash of (seed, step),
its counter (post, position, lane, product). Only integers are computed and compared with a
threshold, so that a CPU and Triton's kernels draw the same masks to the bit.

The price: both passes draw, by PyTorch's integer operations on a CPU and on a GPU without bfloat16;
on one core that takes three times as long as PyTorch's own dropout, which draws once and keeps the
mask. The share dropped is rounded to 1/65,536, numbers of posts count modulo 2^32, and layers with
one input, as queries, keys and values, share its mask.

Letters: T tokens, C channels, K lanes, N posts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from emotion_train.bases.qwen3_5 import with_counterparts
from emotion_train.data.order import counter_hash
from emotion_train.data.packing import Pack
from emotion_train.model.attention import has_bfloat16, on_device
from emotion_train.sizing.shape import STACKS

ROUNDS = 7
# Channels that neighbouring lanes serve. A lane's 128 bits serve eight channels, one of each of
# eight neighbouring runs, by 16 bits each.
RUN = 128
_STREAM = 2  # of the counter hash
_BITS, _HALF = 0xFFFF_FFFF, 0xFFFF
_MULTIPLIERS = 0xD251_1F53, 0xCD9E_8D57
_WEYL = 0x9E37_79B9, 0xBB67_AE85
_PRODUCTS = tuple(with_counterparts(stack) for stack in STACKS)
_WORDS_AT_ONCE = 2**15  # numbers of a step of the arithmetic, which then stay in a core's cache


@dataclass(frozen=True)
class Counters:
    """What the masks of a pack are drawn from, on its device: `key`, an int64 without axes; and
    `places`, int32, the number of its post in the split and the position in it of each token.

    `places` has the axes of the token ids and one of 2.
    """

    key: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, pack: Pack, key: int, device: torch.device) -> Counters:
        """The counters of a pack, with `places` of shape [T, 2]; `key` comes from `key_of`."""
        return cls(on_device(np.array(key, np.int64), device), on_device(pack.places, device))

    def at(self, tokens_N: torch.Tensor) -> Counters:
        """The counters of these tokens alone."""
        return Counters(self.key, self.places[tokens_N])


def key_of(seed: int, step: int) -> int:
    """64 bits, as a signed number, for the update after `step` completed ones of a run."""
    return int(counter_hash(seed, _STREAM, step).view(np.int64)[0])


def share(p: float) -> tuple[int, float]:
    """The least 16 bits that are kept, and what the kept numbers are multiplied by."""
    least = round(p * 2**16)
    return least, 2**16 / (2**16 - least)


def philox(
    key: torch.Tensor, counter: tuple[torch.Tensor, ...], rounds: int = ROUNDS
) -> tuple[torch.Tensor, ...]:
    """Philox4x32: four words of 32 random bits, broadcast, for four words of a counter. All are
    int64 from 0 to 2^32 - 1, but for the key of 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _BITS, (key >> 32) & _BITS
    for _ in range(rounds):
        # modulo 2^64, of which the upper word is read without its sign
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((b >> 32) & _BITS) ^ c1 ^ k0, ((a >> 32) & _BITS) ^ c3 ^ k1
        c1, c3 = b & _BITS, a & _BITS
        k0, k1 = (k0 + _WEYL[0]) & _BITS, (k1 + _WEYL[1]) & _BITS
    return c0, c1, c2, c3


def kept(counters: Counters, number: int, channels: int, p: float) -> torch.Tensor:
    """Which inputs of product `number` stay, of shape [T, C], for `places` of shape [T, 2]."""
    chunks = -(-channels // (8 * RUN))
    width, runs = min(RUN, channels), min(8, -(-channels // RUN))
    device, least = counters.places.device, share(p)[0]
    lanes_K = torch.arange(chunks * RUN, device=device).view(chunks, RUN)[:, :width].reshape(-1)
    posts_T1, positions_T1 = (counters.places.long() & _BITS).unbind(1)
    words = philox(
        counters.key, (posts_T1[:, None], positions_T1[:, None], lanes_K, torch.tensor(number, device=device))
    )
    halves = [(words[run // 2] >> 16 * (run % 2)) & _HALF for run in range(runs)]
    of_runs = [(half >= least).view(-1, chunks, 1, width) for half in halves]
    return torch.cat(of_runs, 2).view(len(posts_T1), -1)[:, :channels]


def dropped(x: torch.Tensor, p: float, counters: Counters, number: int) -> torch.Tensor:
    """x, whose last axis is the channels, with a share p of its entries at 0 and the rest divided
    by 1 - p; by Triton's kernel on a GPU that has bfloat16.
    """
    x_TC, places_T2 = x.reshape(-1, x.shape[-1]), counters.places.view(-1, 2)
    if has_bfloat16(x.device):
        from emotion_train.model import kernels

        out_TC = kernels.dropout(x_TC.contiguous(), p, Counters(counters.key, places_T2), number)
        return out_TC.view(x.shape)
    return _dropped_in_parts(x_TC, p, Counters(counters.key, places_T2), number).view(x.shape)


def _dropped_in_parts(x_TC: torch.Tensor, p: float, counters: Counters, number: int) -> torch.Tensor:
    channels, scale = x_TC.shape[1], share(p)[1]
    out_TC = torch.empty_like(x_TC, memory_format=torch.contiguous_format)
    rows = len(x_TC) if x_TC.is_cuda else max(1, 8 * _WORDS_AT_ONCE // channels)
    for first in range(0, len(x_TC), rows):
        part = slice(first, first + rows)
        kept_TC = kept(Counters(counters.key, counters.places[part]), number, channels, p)
        out_TC[part] = torch.where(kept_TC, x_TC[part].float() * scale, 0.0)
    return out_TC


class _Dropped(torch.autograd.Function):
    """`dropped`, which is its own gradient: nothing is saved but where the tokens are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, counters: Counters, number: int) -> torch.Tensor:
        ctx.given = p, counters, number
        return dropped(x, p, counters, number)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return dropped(dy, *ctx.given), None, None, None


class Current:
    """The counters of the pack that a model computes, for its dropout modules, which get tensors
    only.
    """

    def __init__(self) -> None:
        self._counters: Counters | None = None

    def counters(self) -> Counters:
        return required(self._counters)

    @contextmanager
    def of(self, counters: Counters | None) -> Iterator[None]:
        """Within the block the modules draw by these."""
        before, self._counters = self._counters, counters
        try:
            yield
        finally:
            self._counters = before

    def around_checkpoints(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: what is recomputed draws by the counters of its first
        pass.
        """
        return nullcontext(), self.of(self._counters)


def required(counters: Counters | None) -> Counters:
    """The counters. Raises `ValueError` where there are none: a mask that is the same in each step
    would be no dropout.
    """
    if counters is None:
        raise ValueError("a model with dropout was called in training without the counters of its posts")
    return counters


class PostDropout(nn.Module):
    """Dropout before the adapter of one layer, in place of `nn.Dropout`; none in evaluation."""

    def __init__(self, p: float, number: int, current: Current) -> None:
        super().__init__()
        self.p = p
        self.number = number
        self.current = current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        draw: Callable[..., torch.Tensor] = _Dropped.apply
        return draw(x, self.p, self.current.counters(), self.number)

    def extra_repr(self) -> str:
        return f"p={self.p}, number={self.number}"


def product_number(layer: str) -> int:
    """A number for each product of the decoder, by the name of one of its layers: 4 times the block
    plus its place in `STACKS`, where a delta net's layers have that of their counterparts. Raises
    `ValueError` for another name.

    >>> product_number("base_model.model.model.layers.2.self_attn.k_proj"), product_number(
    ...     "layers.2.mlp.down_proj"
    ... )
    (8, 11)
    """
    found = re.search(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?(\w+)$", layer)
    places = [place for place, stack in enumerate(_PRODUCTS) if found and found[2] in stack]
    if found is None or not places:
        raise ValueError(f"{layer} is no adapted layer of a decoder block")
    return len(STACKS) * int(found[1]) + places[0]


def current_of(network: nn.Module) -> Current:
    """What all dropout modules of a network read; a new one where it has none."""
    return next((one.current for one in network.modules() if isinstance(one, PostDropout)), Current())
