"""Triton kernels of the fused decoder: what lies between two matrix products, each one pass over
memory.

The attention reads a pack as it lies: 64 queries at a time against the keys from the first of their
posts on, so short posts cost what they weigh, and query heads share their key head without copies.
(The stock varlen kernel takes a post at a time in tiles of 128, which for posts of 18 tokens is
mostly padding.) Sums are float32, results bfloat16 unless a line says otherwise, and there are no
atomics: the same input gives the same bits.

Letters: T tokens, H hidden size, F intermediate size, Q query heads, K key/value heads, D head
dimension, W = (Q + 2 K) D, I any width.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from emotion_train.model.dropout import ROUNDS, RUN, Counters, share

# of the attention's forward pass; the fastest on an H100 for posts of some 20 tokens, as are the
# backward pass's 32
_TILE = 64
_TILE_BACK = 32
_LOG2_E = tl.constexpr(1.4426950408889634)
_FP8_MAX = tl.constexpr(448.0)  # of e4m3


def _block(size: int) -> dict[str, Any]:
    block = triton.next_power_of_2(size)
    return {"block": block, "num_warps": min(16, max(1, block // 512))}


# --- fp8 ---


@triton.jit
def _store_scale(scale, top):
    """The scale of a row with these largest sizes; returns what its numbers are multiplied by."""
    largest = tl.maximum(tl.max(top), 1e-12)
    tl.store(scale, largest / _FP8_MAX)
    return _FP8_MAX / largest


@triton.jit
def _load_float(place, at, size, whole: tl.constexpr):
    values = tl.load(place + at) if whole else tl.load(place + at, at < size, 0.0)
    return values.to(tl.float32)


@triton.jit
def _store_fp8(place, at, size, values, whole: tl.constexpr):
    if whole:
        tl.store(place + at, values.to(tl.float8e4nv))
    else:
        tl.store(place + at, values.to(tl.float8e4nv), at < size)


class Fp8(NamedTuple):
    """A matrix in float8 (e4m3) with one float32 scale a row: codes_TI * scales_T1."""

    codes_TI: torch.Tensor
    scales_T1: torch.Tensor

    @classmethod
    def empty(cls, rows: int, size: int, device: torch.device) -> Fp8:
        codes = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=device)
        return cls(codes, torch.empty(rows, 1, dtype=torch.float32, device=device))


def _turns(size: int, blocks: int, *, block: int, a_thread: int, held: int) -> dict[str, Any]:
    """How a row of so many columns is read, `blocks` blocks a turn: at most `block` columns each,
    `a_thread` of them by each thread. The turns over the first `held` columns keep what they read
    in registers; what lies beyond is read twice.
    """
    block = min(block, triton.next_power_of_2(triton.cdiv(size, blocks)))
    return {
        "block": block,
        "held": triton.cdiv(min(size, held), blocks * block),
        "whole": size % (blocks * block) == 0,
        "num_warps": max(1, block // (32 * a_thread)),
    }


@triton.jit
def _quantize_rows(x, out, scales, size, block: tl.constexpr, held: tl.constexpr, whole: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * size
    out += row * size
    at = tl.arange(0, block)
    top = tl.zeros((block,), tl.float32)
    values = ()
    for n in tl.static_range(held):
        value = _load_float(x, at + n * block, size, whole)
        top = tl.maximum(top, tl.abs(value))
        values += (value,)
    for n in range(held * block, size, block):
        top = tl.maximum(top, tl.abs(_load_float(x, at + n, size, whole)))
    inverse = _store_scale(scales + row, top)
    for n in range(held * block, size, block):
        _store_fp8(out, at + n, size, _load_float(x, at + n, size, whole) * inverse, whole)
    for n in tl.static_range(held):
        _store_fp8(out, at + n * block, size, values[n] * inverse, whole)


def quantize_rows(x_TI: torch.Tensor) -> Fp8:
    """x in float8."""
    rows, size = x_TI.shape
    out = Fp8.empty(rows, size, x_TI.device)
    _quantize_rows[(rows,)](x_TI, *out, size, **_turns(size, 1, block=1024, a_thread=8, held=8192))
    return out


# --- norms ---


@triton.jit
def _add_rms_norm(
    h, m, weight, out_h, out_y, scales, out_rstd, size, eps, has_m: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < size
    x = tl.load(h + row * size + at, inside, 0.0).to(tl.float32)
    if has_m:
        x += tl.load(m + row * size + at, inside, 0.0).to(tl.float32)
        x = x.to(tl.bfloat16).to(tl.float32)
        tl.store(out_h + row * size + at, x.to(tl.bfloat16), inside)
    rstd = tl.rsqrt(tl.sum(x * x) / size + eps)
    scale = tl.load(weight + at, inside, 0.0).to(tl.float32)
    y = ((x * rstd).to(tl.bfloat16).to(tl.float32) * scale).to(tl.bfloat16)
    if scales is not None:
        inverse = _store_scale(scales + row, tl.abs(y.to(tl.float32)))
        tl.store(out_y + row * size + at, (y.to(tl.float32) * inverse).to(tl.float8e4nv), inside)
    else:
        tl.store(out_y + row * size + at, y, inside)
    tl.store(out_rstd + row, rstd)


def add_rms_norm(
    h_TH: torch.Tensor, m_TH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h + m, its RMS norm, reciprocal root mean squares in float32); without m the first is h
    itself.
    """
    out_y = torch.empty_like(h_TH)
    out_h, rstd_T = _normed(h_TH, m_TH, weight_H, eps, out_y, None)
    return out_h, out_y, rstd_T


def add_rms_norm_fp8(
    h_TH: torch.Tensor, m_TH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, Fp8, torch.Tensor]:
    """`add_rms_norm` with the norm in float8; its sums may be rounded otherwise."""
    rows, size = h_TH.shape
    out_y = Fp8.empty(rows, size, h_TH.device)
    out_h, rstd_T = _normed(h_TH, m_TH, weight_H, eps, *out_y)
    return out_h, out_y, rstd_T


def _normed(
    h_TH: torch.Tensor,
    m_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    out_y: torch.Tensor,
    scales_T1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + m, reciprocal root mean squares); writes the norm."""
    rows, size = h_TH.shape
    out_h = h_TH if m_TH is None else torch.empty_like(h_TH)
    rstd_T = torch.empty(rows, dtype=torch.float32, device=h_TH.device)
    _add_rms_norm[(rows,)](
        h_TH, m_TH, weight_H, out_h, out_y, scales_T1, rstd_T, size, eps, m_TH is not None, **_block(size)
    )
    return out_h, rstd_T


@triton.jit
def _rms_norm_again(h, weight, rstd, out, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < size
    x = tl.load(h + row * size + at, inside, 0.0).to(tl.float32) * tl.load(rstd + row)
    scale = tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * size + at, (x.to(tl.bfloat16).to(tl.float32) * scale).to(tl.bfloat16), inside)


def rms_norm_again(h_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """The norm that `add_rms_norm` gave, once more."""
    out_TH = torch.empty_like(h_TH)
    _rms_norm_again[(len(h_TH),)](h_TH, weight_H, rstd_T, out_TH, h_TH.shape[1], **_block(h_TH.shape[1]))
    return out_TH


@triton.jit
def _rms_norm_backward(dy, h, weight, rstd, dh, out, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < size
    scale = tl.load(rstd + row)
    x = tl.load(h + row * size + at, inside, 0.0).to(tl.float32) * scale
    g = tl.load(dy + row * size + at, inside, 0.0).to(tl.float32) * tl.load(weight + at, inside, 0.0).to(
        tl.float32
    )
    result = scale * (g - x * (tl.sum(g * x) / size)) + tl.load(dh + row * size + at, inside, 0.0).to(
        tl.float32
    )
    tl.store(out + row * size + at, result.to(tl.bfloat16), inside)


def rms_norm_backward(
    dy_TH: torch.Tensor, h_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T: torch.Tensor, dh_TH: torch.Tensor
) -> torch.Tensor:
    """Gradient by h through the norm, plus `dh_TH`, which reaches h past it. The weight is frozen
    and gets none.
    """
    out_TH = torch.empty_like(h_TH)
    _rms_norm_backward[(len(h_TH),)](
        dy_TH, h_TH, weight_H, rstd_T, dh_TH, out_TH, h_TH.shape[1], **_block(h_TH.shape[1])
    )
    return out_TH


# --- rotary positions ---


@triton.jit
def _rotate(x, cos, sin, heads, width, sign, head_block: tl.constexpr, half: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, head_block)[:, None]
    at = tl.arange(0, half)[None, :]
    inside = (head < heads) & (at < half)
    place = x + row * width + head * (2 * half) + at
    c = tl.load(cos + row * (2 * half) + at)
    s = tl.load(sin + row * (2 * half) + at) * sign
    low = tl.load(place, inside, 0.0).to(tl.float32)
    high = tl.load(place + half, inside, 0.0).to(tl.float32)
    tl.store(place, (low * c - high * s).to(tl.bfloat16), inside)
    tl.store(place + half, (high * c + low * s).to(tl.bfloat16), inside)


def rotate_(
    qkv_TW: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, heads: int, *, back: bool = False
) -> None:
    """Turn the first `heads` heads (queries and keys) of each row by its position, in place; `back`
    is the inverse and the gradient.

    `cos_TD` and `sin_TD` are float32 and repeat their first half, as transformers' rotary
    embeddings do.
    """
    half = cos_TD.shape[1] // 2
    head_block = triton.next_power_of_2(heads)
    _rotate[(len(qkv_TW),)](
        qkv_TW, cos_TD, sin_TD, heads, qkv_TW.shape[1], -1.0 if back else 1.0, head_block, half, num_warps=4
    )


# --- attention ---


@triton.jit
def _load_rows(matrix, rows, width, real, d: tl.constexpr):
    """The first d columns of these rows of a matrix of `width`; 0 where there is no such row."""
    return tl.load(matrix + rows.to(tl.int64)[:, None] * width + tl.arange(0, d)[None, :], real[:, None], 0.0)


@triton.jit
def _store_rows(matrix, rows, width, real, values, d: tl.constexpr):
    tl.store(
        matrix + rows.to(tl.int64)[:, None] * width + tl.arange(0, d)[None, :],
        values.to(tl.bfloat16),
        real[:, None],
    )


@triton.jit
def _attention(
    qkv,
    starts,
    out,
    lse,
    tokens,
    width,
    heads,
    kv_heads,
    scale,
    group: tl.constexpr,
    d: tl.constexpr,
    tile: tl.constexpr,
):
    first = tl.program_id(0) * tile
    head = tl.program_id(1)
    rows = first + tl.arange(0, tile)
    real = rows < tokens
    q = _load_rows(qkv + head * d, rows, width, real, d)
    begin = tl.load(starts + rows, real, 0)
    keys = qkv + (heads + head // group) * d
    values = keys + kv_heads * d
    best = tl.full((tile,), -float("inf"), tl.float32)
    total = tl.zeros((tile,), tl.float32)
    mix = tl.zeros((tile, d), tl.float32)
    for n in range(tl.load(starts + first) // tile * tile, first + tile, tile):
        cols = n + tl.arange(0, tile)
        k = _load_rows(keys, cols, width, cols < tokens, d)
        v = _load_rows(values, cols, width, cols < tokens, d)
        score = tl.dot(q, tl.trans(k)) * scale
        seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= begin[:, None])
        score = tl.where(seen, score, -float("inf"))
        top = tl.maximum(best, tl.max(score, 1))
        base = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(p, 1)
        mix = mix * shrink[:, None] + tl.dot(p.to(tl.bfloat16), v)
        best = top
    _store_rows(out + head * d, rows, heads * d, real, mix / total[:, None], d)
    tl.store(lse + head * tokens + rows, best + tl.log2(total), real)


def attention(
    qkv_TW: torch.Tensor, starts_T: torch.Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each post: mixed values of shape [T, Q D], and log2 of the sums of
    exponentials, [Q, T] in float32.

    `starts_T` is the first token that each token sees (int32, never falling): the start of its
    post, or of its sliding window.
    """
    tokens, width = qkv_TW.shape
    d = width // (heads + 2 * kv_heads)
    out = torch.empty(tokens, heads * d, dtype=qkv_TW.dtype, device=qkv_TW.device)
    lse_QT = torch.empty(heads, tokens, dtype=torch.float32, device=qkv_TW.device)
    grid = (triton.cdiv(tokens, _TILE), heads)
    group = heads // kv_heads
    _attention[grid](
        qkv_TW,
        starts_T,
        out,
        lse_QT,
        tokens,
        width,
        heads,
        kv_heads,
        scale * _LOG2_E.value,
        group,
        d,
        _TILE,
        num_warps=4,
    )
    return out, lse_QT


@triton.jit
def _attention_dq(
    qkv,
    starts,
    out,
    dout,
    lse,
    delta,
    dqkv,
    tokens,
    width,
    heads,
    kv_heads,
    scale,
    group: tl.constexpr,
    d: tl.constexpr,
    tile: tl.constexpr,
):
    first = tl.program_id(0) * tile
    head = tl.program_id(1)
    rows = first + tl.arange(0, tile)
    real = rows < tokens
    q = _load_rows(qkv + head * d, rows, width, real, d)
    do = _load_rows(dout + head * d, rows, heads * d, real, d)
    weight = tl.sum(
        do.to(tl.float32) * _load_rows(out + head * d, rows, heads * d, real, d).to(tl.float32), 1
    )
    tl.store(delta + head * tokens + rows, weight, real)
    begin = tl.load(starts + rows, real, 0)
    total = tl.load(lse + head * tokens + rows, real, 0.0)
    keys = qkv + (heads + head // group) * d
    values = keys + kv_heads * d
    dq = tl.zeros((tile, d), tl.float32)
    for n in range(tl.load(starts + first) // tile * tile, first + tile, tile):
        cols = n + tl.arange(0, tile)
        k = _load_rows(keys, cols, width, cols < tokens, d)
        v = _load_rows(values, cols, width, cols < tokens, d)
        seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= begin[:, None])
        p = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * (scale * _LOG2_E) - total[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v)) - weight[:, None])
        dq += tl.dot(ds.to(tl.bfloat16), k)
    _store_rows(dqkv + head * d, rows, width, real, dq * scale, d)


@triton.jit
def _attention_dkv(
    qkv,
    starts,
    ends,
    dout,
    lse,
    delta,
    dqkv,
    tokens,
    width,
    heads,
    kv_heads,
    scale,
    group: tl.constexpr,
    d: tl.constexpr,
    tile: tl.constexpr,
):
    first = tl.program_id(0) * tile
    kv_head = tl.program_id(1)
    cols = first + tl.arange(0, tile)
    real = cols < tokens
    key_at, value_at = (heads + kv_head) * d, (heads + kv_heads + kv_head) * d
    k = _load_rows(qkv + key_at, cols, width, real, d)
    v = _load_rows(qkv + value_at, cols, width, real, d)
    dk = tl.zeros((tile, d), tl.float32)
    dv = tl.zeros((tile, d), tl.float32)
    last = tl.load(ends + tl.minimum(first + tile, tokens) - 1)
    for member in range(group):
        head = kv_head * group + member
        for m in range(first, last, tile):
            rows = m + tl.arange(0, tile)
            there = rows < tokens
            q = _load_rows(qkv + head * d, rows, width, there, d)
            do = _load_rows(dout + head * d, rows, heads * d, there, d)
            begin = tl.load(starts + rows, there, 0)
            total = tl.load(lse + head * tokens + rows, there, 0.0)
            weight = tl.load(delta + head * tokens + rows, there, 0.0)
            seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= begin[:, None]) & there[:, None]
            p = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * (scale * _LOG2_E) - total[:, None]), 0.0)
            dv += tl.dot(tl.trans(p.to(tl.bfloat16)), do)
            ds = p * (tl.dot(do, tl.trans(v)) - weight[:, None])
            dk += tl.dot(tl.trans(ds.to(tl.bfloat16)), q)
    _store_rows(dqkv + key_at, cols, width, real, dk * scale, d)
    _store_rows(dqkv + value_at, cols, width, real, dv, d)


def attention_backward(
    dout: torch.Tensor,
    qkv_TW: torch.Tensor,
    out: torch.Tensor,
    lse_QT: torch.Tensor,
    starts_T: torch.Tensor,
    ends_T: torch.Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
) -> torch.Tensor:
    """Gradient by `qkv_TW`. `ends_T` is the token after the last one that sees each token (int32,
    never falling).
    """
    tokens, width = qkv_TW.shape
    d, group, tiles = width // (heads + 2 * kv_heads), heads // kv_heads, triton.cdiv(tokens, _TILE_BACK)
    dqkv_TW, delta_QT = torch.empty_like(qkv_TW), torch.empty_like(lse_QT)
    sizes = (tokens, width, heads, kv_heads, scale, group, d, _TILE_BACK)
    _attention_dq[(tiles, heads)](
        qkv_TW, starts_T, out, dout, lse_QT, delta_QT, dqkv_TW, *sizes, num_warps=2, num_stages=2
    )
    _attention_dkv[(tiles, kv_heads)](
        qkv_TW, starts_T, ends_T, dout, lse_QT, delta_QT, dqkv_TW, *sizes, num_warps=2, num_stages=1
    )
    return dqkv_TW


# --- SwiGLU ---


@triton.jit
def _swiglu(gate_up, out, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    gate = tl.load(gate_up + row * (2 * size) + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * size) + size + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * size + at, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), inside)


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of shape [T, F]."""
    rows, size = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = torch.empty(rows, size, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    block = min(2048, triton.next_power_of_2(size))
    _swiglu[(rows, triton.cdiv(size, block))](gate_up_T2F, out_TF, size, block, num_warps=4)
    return out_TF


@triton.jit
def _swiglu_backward(gate_up, dout, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    place = gate_up + row * (2 * size) + at
    gate = tl.load(place, inside, 0.0).to(tl.float32)
    up = tl.load(place + size, inside, 0.0).to(tl.float32)
    d = tl.load(dout + row * size + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(place, (d * up * s * (1 + gate * (1 - s))).to(tl.bfloat16), inside)
    tl.store(place + size, (d * gate * s).to(tl.bfloat16), inside)


def swiglu_backward_(gate_up_T2F: torch.Tensor, dout_TF: torch.Tensor) -> torch.Tensor:
    """The gradient by gate and up, written over them."""
    rows, size = dout_TF.shape
    block = min(2048, triton.next_power_of_2(size))
    _swiglu_backward[(rows, triton.cdiv(size, block))](gate_up_T2F, dout_TF, size, block, num_warps=4)
    return gate_up_T2F


# --- dropout ---  The masks of dropout.py: a place is kept or not by 16 bits of Philox, drawn for
# eight places at once: those with one row and one remainder by 128 in eight neighbouring runs of
# 128 columns. So a tile of any kernel finds its own bits, whatever its height, and a row's bits are
# those of its post and its position in it, wherever the row is.

_RUN = tl.constexpr(RUN)
_ROUNDS = tl.constexpr(ROUNDS)
_MOST_RANKS = 256  # 64 KiB of shared memory; an L4, L40S or A10G has 99, an H100 227


@triton.jit
def _draw(key, places, number, row, real, chunk, at):
    post = tl.load(places + 2 * row, real, 0)
    position = tl.load(places + 2 * row + 1, real, 0)
    return tl.philox(tl.load(key), post, position, chunk * _RUN + at, number, _ROUNDS)


@triton.jit
def _kept(r0, r1, r2, r3, run: tl.constexpr, least):
    if run < 2:
        word = r0
    elif run < 4:
        word = r1
    elif run < 6:
        word = r2
    else:
        word = r3
    return ((word >> (16 * (run % 2))) & 0xFFFF) >= least


@triton.jit(do_not_specialize=["rows", "number", "least"])
def _drop(
    x,
    weight,
    rstd,
    out,
    rows,
    size,
    least,
    scale,
    key,
    places,
    number,
    norm: tl.constexpr,
    height: tl.constexpr,
):
    row = tl.program_id(0) * height + tl.arange(0, height)[:, None]
    chunk = tl.program_id(1)
    at = tl.arange(0, _RUN)[None, :]
    r0, r1, r2, r3 = _draw(key, places, number, row, row < rows, chunk, at)
    place = row.to(tl.int64) * size
    for run in tl.static_range(8):
        column = (8 * chunk + run) * _RUN + at
        inside = (row < rows) & (column < size)
        value = tl.load(x + place + column, inside, 0.0).to(tl.float32)
        if norm:
            value = (value * tl.load(rstd + row, row < rows, 0.0)).to(tl.bfloat16).to(tl.float32)
            value = (
                (value * tl.load(weight + column, column < size, 0.0).to(tl.float32))
                .to(tl.bfloat16)
                .to(tl.float32)
            )
        value = tl.where(_kept(r0, r1, r2, r3, run, least), value * scale, 0.0)
        tl.store(out + place + column, value.to(out.dtype.element_ty), inside)


def dropout(
    x_TI: torch.Tensor,
    p: float,
    counters: Counters,
    number: int,
    norm: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x, in its own format, with a share p of its entries at 0 and the rest divided by 1 - p. Where
    `norm` is given, that of `rms_norm_again(x, *norm)` in place of x.

    Which ones says `dropout.kept` for `counters`, whose places are of shape [T, 2], and the
    product's `number`.
    """
    (rows, size), out_TI = x_TI.shape, torch.empty_like(x_TI)
    weight_I, rstd_T = norm or (None, None)
    grid = (triton.cdiv(rows, 4), triton.cdiv(size, 8 * _RUN.value))
    drawn = *share(p), counters.key, counters.places, number
    _drop[grid](x_TI, weight_I, rstd_T, out_TI, rows, size, *drawn, norm is not None, 4, num_warps=4)
    return out_TI


@triton.jit(do_not_specialize=["rows", "number", "least"])
def _add_dropped_product(
    du,
    down,
    dx,
    rows,
    size,
    ranks,
    least,
    scale,
    key,
    places,
    number,
    height: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0) * height + tl.arange(0, height)[:, None]
    chunk = tl.program_id(1)
    at = tl.arange(0, _RUN)[None, :]
    rank = tl.arange(0, width)
    there = rank < ranks
    a = tl.load(du + row * ranks + rank[None, :], (row < rows) & there[None, :], 0.0)
    r0, r1, r2, r3 = _draw(key, places, number, row, row < rows, chunk, at)
    place = row.to(tl.int64) * size
    for run in tl.static_range(8):
        column = (8 * chunk + run) * _RUN + at
        inside = (row < rows) & (column < size)
        b = tl.load(down + rank[:, None] * size + column, there[:, None] & (column < size), 0.0)
        value = tl.where(_kept(r0, r1, r2, r3, run, least), tl.dot(a, b) * scale, 0.0)
        value += tl.load(dx + place + column, inside, 0.0).to(tl.float32)
        tl.store(dx + place + column, value.to(tl.bfloat16), inside)


def add_dropped_product_(
    dx_TI: torch.Tensor, du_TR: torch.Tensor, down_RI: torch.Tensor, p: float, counters: Counters, number: int
) -> None:
    """dx += `dropout`(du down), in place; the product does not go through memory. Ranks are added
    in parts that a tile has room for.
    """
    rows, size = dx_TI.shape
    grid = (triton.cdiv(rows, 32), triton.cdiv(size, 8 * _RUN.value))
    drawn = *share(p), counters.key, counters.places, number
    for first in range(0, len(down_RI), _MOST_RANKS):
        du, down = du_TR[:, first : first + _MOST_RANKS].contiguous(), down_RI[first : first + _MOST_RANKS]
        width = max(16, triton.next_power_of_2(len(down)))
        _add_dropped_product[grid](du, down, dx_TI, rows, size, len(down), *drawn, 32, width, num_warps=4)


# --- 4 bits ---


@triton.jit
def _unpack(
    packed,
    code,
    scales,
    code_2,
    scales_2,
    offset,
    out,
    pairs,
    wide,
    height: tl.constexpr,
    half: tl.constexpr,
    nested: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    there = block * half < pairs
    scale = tl.load(scales + block, there, 0)
    if nested:
        scale = tl.load(code_2 + scale.to(tl.int32)) * tl.load(
            scales_2 + block // wide, there, 0.0
        ) + tl.load(offset)
    at = block[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed + at, at < pairs, 0).to(tl.int32)
    first, second = tl.load(code + (pair >> 4)) * scale[:, None], tl.load(code + (pair & 15)) * scale[:, None]
    at = block[:, None] * (2 * half) + tl.arange(0, 2 * half)[None, :]
    tl.store(out + at, tl.interleave(first, second).to(tl.bfloat16), at < 2 * pairs)


def unpack_4bit_(out_OI: torch.Tensor, packed: torch.Tensor, state: Any) -> None:
    """A weight that bitsandbytes packed into 4 bits, bit for bit as its own kernels unpack it,
    nested scales in the same pass.
    """
    half, pairs = state.blocksize // 2, out_OI.numel() // 2
    second = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
    wide = state.state2.blocksize if state.nested else 1
    height = 4096 // state.blocksize
    grid = (triton.cdiv(pairs, height * half),)
    _unpack[grid](
        *(packed, state.code, state.absmax, *second, out_OI, pairs, wide, height, half, state.nested),
        num_warps=4,
        enable_fp_fusion=False,  # scale and offset are rounded one after the other, as there
    )


# --- SwiGLU to fp8 ---

# The results stay in registers, two of a thread in one, until the row's largest is known: 64
# registers of 1,024 threads hold those of 32,768 columns.
_SWIGLU = {"block": 4096, "a_thread": 4, "held": 32_768}


@triton.jit
def _pair(a, b):
    """Both as bfloat16 in 32 bits. Written as shifts it would be undone, as the compiler sees
    through them.
    """
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _first(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _larger(top, pair):
    return tl.maximum(top, tl.maximum(tl.abs(_first(pair)), tl.abs(_second(pair))))


@triton.jit
def _swiglu_at(gate_up, at, size, whole: tl.constexpr):
    gate = _load_float(gate_up, at, size, whole)
    return gate * tl.sigmoid(gate) * _load_float(gate_up + size, at, size, whole)


@triton.jit
def _swiglu_pair(gate_up, at, size, block: tl.constexpr, whole: tl.constexpr):
    """SwiGLU's results in the columns `at`, each with the one a block further on."""
    return _pair(_swiglu_at(gate_up, at, size, whole), _swiglu_at(gate_up, at + block, size, whole))


@triton.jit
def _store_swiglu_pair(out, at, size, pair, inverse, block: tl.constexpr, whole: tl.constexpr):
    _store_fp8(out, at, size, _first(pair) * inverse, whole)
    _store_fp8(out, at + block, size, _second(pair) * inverse, whole)


@triton.jit
def _swiglu_fp8(gate_up, out, scales, size, block: tl.constexpr, held: tl.constexpr, whole: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * (2 * size)
    out += row * size
    at = tl.arange(0, block)
    top = tl.zeros((block,), tl.float32)
    pairs = ()
    for n in tl.static_range(held):
        pair = _swiglu_pair(gate_up, at + n * 2 * block, size, block, whole)
        top = _larger(top, pair)
        pairs += (pair,)
    for n in range(held * 2 * block, size, 2 * block):
        top = _larger(top, _swiglu_pair(gate_up, at + n, size, block, whole))
    inverse = _store_scale(scales + row, top)
    for n in range(held * 2 * block, size, 2 * block):
        pair = _swiglu_pair(gate_up, at + n, size, block, whole)
        _store_swiglu_pair(out, at + n, size, pair, inverse, block, whole)
    for n in tl.static_range(held):
        _store_swiglu_pair(out, at + n * 2 * block, size, pairs[n], inverse, block, whole)


def swiglu_fp8(gate_up_T2F: torch.Tensor) -> Fp8:
    """`quantize_rows(swiglu(gate_up))`, the same bits, without a turn through memory."""
    rows, size = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = Fp8.empty(rows, size, gate_up_T2F.device)
    _swiglu_fp8[(rows,)](gate_up_T2F, *out, size, **_turns(size, 2, **_SWIGLU))
    return out


@triton.jit
def _swiglu_backward_pair(gate_up, dout, at, size, whole: tl.constexpr):
    """The gradients by gate and up of the columns `at`."""
    gate = _load_float(gate_up, at, size, whole)
    up = _load_float(gate_up + size, at, size, whole)
    d = _load_float(dout, at, size, whole)
    s = tl.sigmoid(gate)
    return _pair(d * up * s * (1 + gate * (1 - s)), d * gate * s)


@triton.jit
def _store_gradient_pair(out, at, size, pair, inverse, whole: tl.constexpr):
    _store_fp8(out, at, size, _first(pair) * inverse, whole)
    _store_fp8(out + size, at, size, _second(pair) * inverse, whole)


@triton.jit
def _swiglu_backward_fp8(
    gate_up, dout, out, scales, size, block: tl.constexpr, held: tl.constexpr, whole: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * (2 * size)
    dout += row * size
    out += row * (2 * size)
    at = tl.arange(0, block)
    top = tl.zeros((block,), tl.float32)
    pairs = ()
    for n in tl.static_range(held):
        pair = _swiglu_backward_pair(gate_up, dout, at + n * block, size, whole)
        top = _larger(top, pair)
        pairs += (pair,)
    for n in range(held * block, size, block):
        top = _larger(top, _swiglu_backward_pair(gate_up, dout, at + n, size, whole))
    inverse = _store_scale(scales + row, top)
    for n in range(held * block, size, block):
        pair = _swiglu_backward_pair(gate_up, dout, at + n, size, whole)
        _store_gradient_pair(out, at + n, size, pair, inverse, whole)
    for n in tl.static_range(held):
        _store_gradient_pair(out, at + n * block, size, pairs[n], inverse, whole)


def swiglu_backward_fp8(gate_up_T2F: torch.Tensor, dout_TF: torch.Tensor) -> Fp8:
    """`quantize_rows(swiglu_backward_(gate_up, dout))`, the same bits, without a turn through
    memory.
    """
    rows, size = dout_TF.shape
    out = Fp8.empty(rows, 2 * size, dout_TF.device)
    _swiglu_backward_fp8[(rows,)](gate_up_T2F, dout_TF, *out, size, **_turns(size, 1, **_SWIGLU))
    return out
