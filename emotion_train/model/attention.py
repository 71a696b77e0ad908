"""Attention that stays inside each post of a pack: causal, or of an encoder in both directions.

On CUDA one varlen kernel runs over all posts; on a CPU, and for float32, one exact
scaled-dot-product call per post, which is both the reference and the fastest way there (43 posts/s
against 12 padded, one thread). No mask is ever built. It is registered with transformers under the
name `ATTENTION`; the segments travel as keyword arguments through the stock model, so gradient
checkpointing replays them.

Without segments a batch is taken as right-padded: causal attention alone, since no token of a post
comes after its padding. An encoder's rows always have segments. A window of an encoder reaches as
far forward as back.

Letters: T tokens of a pack, S segments, B rows, L tokens of a row, H query heads, K key/value
heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "emotion_train_segments"

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # builds of PyTorch without it: every device takes the exact path
    varlen_attn = None  # type: ignore[assignment]
# from PyTorch 2.12
HAS_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Segments:
    """Where the posts of a pack begin and end: they cover its T tokens without a gap, filling
    tokens being segments of their own.

    `cu_lengths` are the S+1 boundaries as int32 on the device; `max_length` is a Python number of
    the host, because reading it from the device would stall every layer.
    """

    lengths: tuple[int, ...]
    cu_lengths: torch.Tensor
    max_length: int

    @classmethod
    def of(cls, boundaries_S: Sequence[int], device: torch.device | str) -> Segments:
        """Segments between neighbouring boundaries, the first of which is 0 and the last T."""
        boundaries = [int(boundary) for boundary in boundaries_S]
        lengths = tuple(after - before for before, after in pairwise(boundaries))
        if boundaries[0] != 0 or min(lengths) <= 0:
            raise ValueError(f"boundaries must rise from 0, got {boundaries[:8]}")
        return cls(lengths, on_device(np.asarray(boundaries, np.int32), torch.device(device)), max(lengths))

    @classmethod
    def recorded(cls, cu_lengths: torch.Tensor, max_length: int) -> Segments:
        """Segments of at most `max_length` tokens whose boundaries only the device reads, so that a
        recorded graph may be given others. The last ones may be empty. On a CPU, which records
        nothing, they have `lengths` all the same.
        """
        lengths = () if cu_lengths.is_cuda else tuple(cu_lengths.diff().tolist())
        return cls(lengths, cu_lengths, max_length)

    def as_kwargs(self, fused: bool) -> dict[str, Any]:
        """Keyword arguments for the model."""
        if fused:
            return {"cu_seq_lens_q": self.cu_lengths, "max_length_q": self.max_length}
        return {"segment_lengths": self.lengths}


def sight(lengths_S: npt.ArrayLike, window: int | None) -> npt.NDArray[np.int32]:
    """For each token the first that it sees and the one after the last that sees it: two rows of T,
    for a causal window in each post.
    """
    lengths_S = np.asarray(lengths_S)
    ends_S = np.cumsum(lengths_S)
    from_T, until_T = np.repeat(ends_S - lengths_S, lengths_S), np.repeat(ends_S, lengths_S)
    if window is not None:
        at_T = np.arange(len(from_T))
        from_T, until_T = np.maximum(from_T, at_T - window + 1), np.minimum(until_T, at_T + window)
    return np.stack([from_T, until_T]).astype(np.int32)


def on_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of the array on `device`; through pinned memory to a GPU, so that the host does not
    wait for what the GPU still has to do.
    """
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU that computes in bfloat16: Ampere (sm_80) or newer, which the
    varlen kernel asks for, too.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def is_fused(device: torch.device, compute: torch.dtype) -> bool:
    """Whether the varlen kernel serves this device and number format."""
    return varlen_attn is not None and has_bfloat16(device) and compute in (torch.bfloat16, torch.float16)


def segment_attention(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    segment_lengths: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: returns the output of shape BLHD and no weights. Posts
    never need a mask or dropout. The module says whether it is causal.
    """
    causal = getattr(module, "is_causal", True)
    if cu_seq_lens_q is not None:
        out_THD = _fused(
            query_BHLD[0],
            key_BKLD[0],
            value_BKLD[0],
            cu_seq_lens_q,
            max_length_q,
            scaling,
            sliding_window,
            causal,
        )
        return out_THD.unsqueeze(0), None
    if segment_lengths is None:
        assert causal, "what an encoder reads must come as segments: padding would be seen"
        return _exact(query_BHLD, key_BKLD, value_BKLD, scaling, sliding_window).transpose(1, 2), None
    lengths = list(segment_lengths)
    pieces = [
        _exact(query, key, value, scaling, sliding_window, causal)
        for query, key, value in zip(
            torch.split(query_BHLD, lengths, dim=2),
            torch.split(key_BKLD, lengths, dim=2),
            torch.split(value_BKLD, lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _fused(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    cu_lengths: torch.Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """The output of shape THD."""
    query, key, value = (x.transpose(0, 1) for x in (query_HTD, key_KTD, value_KTD))
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if HAS_GQA:
            grouped = {"enable_gqa": True}
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    back = -1 if sliding_window is None or sliding_window > max_length else sliding_window - 1
    out_THD = varlen_attn(
        query,
        key,
        value,
        cu_lengths,
        cu_lengths,
        max_length,
        max_length,
        scale=scaling,
        window_size=(back, 0 if causal else back),
        **grouped,
    )
    assert isinstance(out_THD, torch.Tensor)  # no auxiliary output was asked for
    return out_THD


def _exact(
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """The output of shape BHLD."""
    length = query_BHLD.shape[2]
    mask = None
    if sliding_window is not None and length > sliding_window:
        position_L = torch.arange(length, device=query_BHLD.device)
        distance_LL = position_L[:, None] - position_L[None, :]
        mask = distance_LL.abs() < sliding_window
        mask = mask & (distance_LL >= 0) if causal else mask
    grouped = query_BHLD.shape[1] != key_BKLD.shape[1]
    return scaled_dot_product_attention(
        query_BHLD,
        key_BKLD,
        value_BKLD,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scaling,
        enable_gqa=grouped,
    )


# no mask function goes with it, so transformers builds no mask
AttentionInterface.register(ATTENTION, segment_attention)
