"""What emotion_train/model/kernels.py computes, in plain PyTorch, any device and number format: the
reference for its kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import emotion_train.model
from emotion_train.model.dropout import Counters, kept, share
from emotion_train.model.head import EmotionClassifier


def add_rms_norm(
    h_TH: torch.Tensor, m_TH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_TH = h_TH if m_TH is None else h_TH + m_TH
    rstd_T = torch.rsqrt(h_TH.float().square().mean(-1) + eps)
    return h_TH, rms_norm_again(h_TH, weight_H, rstd_T), rstd_T


def rms_norm_again(h_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    return (h_TH.float() * rstd_T[:, None]).to(h_TH.dtype) * weight_H


def rms_norm_backward(
    dy_TH: torch.Tensor, h_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T: torch.Tensor, dh_TH: torch.Tensor
) -> torch.Tensor:
    x_TH, g_TH = h_TH.float() * rstd_T[:, None], dy_TH.float() * weight_H.float()
    return (rstd_T[:, None] * (g_TH - x_TH * (g_TH * x_TH).mean(-1, keepdim=True)) + dh_TH.float()).to(
        h_TH.dtype
    )


def rotate_(
    qkv_TW: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, heads: int, *, back: bool = False
) -> None:
    d = cos_TD.shape[1]
    x = qkv_TW[:, : heads * d].view(len(qkv_TW), heads, d)
    low, high = x.float().chunk(2, -1)
    turned = torch.cat([-high, low], -1) * (-1 if back else 1)
    x.copy_(x.float() * cos_TD[:, None] + turned * sin_TD[:, None])


def _parts(qkv_TW: torch.Tensor, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """Queries, keys and values of shape QTD, with keys and values repeated for each query head."""
    d = qkv_TW.shape[1] // (heads + 2 * kv_heads)
    q, k, v = (
        x.view(len(x), -1, d).transpose(0, 1).float()
        for x in qkv_TW.split([heads * d, kv_heads * d, kv_heads * d], 1)
    )
    return [q, k.repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0)]


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, starts_T: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    at_T = torch.arange(len(starts_T), device=q.device)
    seen_TT = (at_T[None, :] <= at_T[:, None]) & (at_T[None, :] >= starts_T[:, None])
    scores = torch.where(seen_TT, q @ k.transpose(1, 2) * scale, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]), lse


def attention(
    qkv_TW: torch.Tensor, starts_T: torch.Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _parts(qkv_TW, heads, kv_heads)
    p, lse = _probabilities(q, k, starts_T, scale)
    return (p @ v).transpose(0, 1).reshape(len(qkv_TW), -1).to(qkv_TW.dtype), lse / torch.log(
        torch.tensor(2.0)
    )


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
    """By autograd through `attention`."""
    leaf = qkv_TW.detach().float().requires_grad_()
    with torch.enable_grad():
        again, _ = attention(leaf, starts_T, heads, kv_heads, scale)
    (gradient,) = torch.autograd.grad(again, leaf, dout.float())
    return gradient.to(qkv_TW.dtype)


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_T2F.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_T2F.dtype)


def swiglu_backward_(gate_up_T2F: torch.Tensor, dout_TF: torch.Tensor) -> torch.Tensor:
    """By autograd through `swiglu`."""
    leaf = gate_up_T2F.detach().float().requires_grad_()
    with torch.enable_grad():
        again = swiglu(leaf)
    (gradient,) = torch.autograd.grad(again, leaf, dout_TF.float())
    return gate_up_T2F.copy_(gradient)


def dropout(
    x_TI: torch.Tensor,
    p: float,
    counters: Counters,
    number: int,
    norm: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    x_TI = x_TI if norm is None else rms_norm_again(x_TI, *norm)
    kept_TI = kept(counters, number, x_TI.shape[1], p)
    return torch.where(kept_TI, x_TI.float() * share(p)[1], 0.0).to(x_TI.dtype)


def add_dropped_product_(
    dx_TI: torch.Tensor, du_TR: torch.Tensor, down_RI: torch.Tensor, p: float, counters: Counters, number: int
) -> None:
    dx_TI.add_(dropout(du_TR @ down_RI, p, counters, number))


def quantize_rows(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales_T1 = x_TI.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (x_TI.float() / scales_T1).to(torch.float8_e4m3fn), scales_T1


# --- 4 bits ---


def unpack_4bit_(out_OI: torch.Tensor, packed: torch.Tensor, state: Any) -> None:
    from bitsandbytes.functional import dequantize_4bit

    out_OI.copy_(dequantize_4bit(packed.view(-1, 1), state).view(out_OI.shape))


# --- in the place of the GPU's ---


@contextmanager
def cut_base_on_cpu() -> Iterator[None]:
    """`EmotionClassifier.fuse_cut` cuts the base on a CPU in any precision, and the fused decoder
    computes with this page.
    """

    def fuse_cut(self: EmotionClassifier, device: torch.device) -> bool:
        self.cut(device)
        return True

    # one key and not patch.dict, which would forget the modules that are imported meanwhile
    here, name = sys.modules[__name__], "emotion_train.model.kernels"
    sys.modules[name] = here
    try:
        with (
            mock.patch.object(emotion_train.model, "kernels", here, create=True),
            mock.patch.object(EmotionClassifier, "fuse_cut", fuse_cut),
        ):
            yield
    finally:
        del sys.modules[name]
