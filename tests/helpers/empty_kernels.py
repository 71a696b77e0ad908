"""Stand-ins for emotion_train/model/kernels.py that allocate what its Triton kernels write into and
compute nothing, to count memory.
"""

from __future__ import annotations

from typing import Any

import torch


def add_rms_norm(
    h_TH: torch.Tensor, m_TH: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return h_TH if m_TH is None else torch.zeros_like(h_TH), torch.zeros_like(h_TH), torch.zeros(len(h_TH))


def rms_norm_again(h_TH: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.zeros_like(h_TH)


def rms_norm_backward(dy_TH: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.zeros_like(dy_TH)


def rotate_(*_: Any, back: bool = False) -> None:
    """In place."""


def attention(
    qkv_TW: torch.Tensor, starts_T: torch.Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = qkv_TW.shape
    return torch.zeros(tokens, heads * width // (heads + 2 * kv_heads), dtype=qkv_TW.dtype), torch.zeros(
        heads, tokens
    )


def attention_backward(
    dout: torch.Tensor, qkv_TW: torch.Tensor, out: torch.Tensor, lse_QT: torch.Tensor, *_: Any
) -> torch.Tensor:
    gradient, _delta = torch.zeros_like(qkv_TW), torch.zeros_like(lse_QT)
    return gradient


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(gate_up_T2F), gate_up_T2F.shape[1] // 2, dtype=gate_up_T2F.dtype)


def swiglu_backward_(gate_up_T2F: torch.Tensor, dout_TF: torch.Tensor) -> torch.Tensor:
    return gate_up_T2F


def dropout(x_TI: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.zeros_like(x_TI)


def add_dropped_product_(*_: Any) -> None:
    """In place."""
