"""What does each fused piece gain alone? The kernels of the fused decoder beside what they replace,
in the size of one 24B block.

    # on a machine with one NVIDIA GPU, under two minutes
    python benchmarks/pieces.py
    python benchmarks/pieces.py --tokens 4096

Each row runs a piece as transformers, PEFT, bitsandbytes or PyTorch compute it (eagerly, in
bfloat16) and as `model/kernels.py` does, on the same random numbers; triton.testing.do_bench times
both. The last column is what a step of all 40 blocks gains by it, in milliseconds: how often a
block runs the piece (forward and backward pass), times 40.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import dropout, rms_norm, silu

from emotion_train.model.attention import Segments, on_device, segment_attention, sight
from emotion_train.model.dropout import Counters, key_of
from emotion_train.model.fused import product_in_float32
from emotion_train.processes.machine import versions

if TYPE_CHECKING or find_spec("triton"):  # PyTorch's builds for CPUs come without
    from triton.testing import do_bench

    from emotion_train.model import kernels

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, BLOCKS, RANK = 5120, 32_768, 32, 8, 128, 40, 16
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD
POST, DROPOUT, EPS = 18, 0.05, 1e-5


@dataclass(frozen=True)
class Piece:
    name: str
    replaces: str
    times: int  # that a block runs it in a step
    plain: Callable[[], Any]
    fused: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=7680, help="of a pack (default: 7680)")
    arguments = parser.parse_args()
    if find_spec("triton") is None:
        sys.exit("pieces.py: there is no Triton, which comes with PyTorch's builds for NVIDIA GPUs.")
    torch.manual_seed(0)
    print(
        "| piece | in place of | before, µs | fused, µs | times | 40 blocks gain, ms"
        " |\n|---|---|--:|--:|--:|--:|"
    )
    for piece in pieces(arguments.tokens):
        before, after = (1000 * do_bench(one, warmup=10, rep=50) for one in (piece.plain, piece.fused))
        gain = BLOCKS * piece.times * (before - after) / 1000
        print(
            f"| {piece.name} | {piece.replaces} | {before:.0f} | {after:.0f} | {before / after:.1f} |"
            f" {gain:.1f} |",
            flush=True,
        )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"\n{arguments.tokens:,} tokens; {torch.cuda.get_device_name()}; {datetime.now(UTC):%Y-%m-%d}; {used}"
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def counters_of(tokens: int) -> Counters:
    """Dropout's counters of posts that lie end to end."""
    at_T = torch.arange(tokens, device="cuda")
    places_T2 = torch.stack([at_T // POST, at_T % POST], 1).int()
    return Counters(torch.tensor(key_of(0, 0), device="cuda"), places_T2)


def pieces(tokens: int) -> list[Piece]:
    h, m, weight, gradient = (
        random(tokens, HIDDEN),
        random(tokens, HIDDEN),
        random(HIDDEN),
        random(tokens, HIDDEN),
    )
    counters = counters_of(tokens)
    _, _, rstd = kernels.add_rms_norm(h, m, weight, EPS)
    return [
        Piece(
            "residual and norm",
            "add, rms_norm",
            2,
            lambda: rms_norm(h + m, (HIDDEN,), weight, EPS),
            lambda: kernels.add_rms_norm(h, m, weight, EPS),
        ),
        Piece(
            "its backward pass",
            "autograd's, add",
            2,
            backward_of(lambda x: rms_norm(x, (HIDDEN,), weight, EPS), h, gradient, plus=m),
            lambda: kernels.rms_norm_backward(gradient, h, weight, rstd, m),
        ),
        Piece(
            "residual and norm to fp8",
            "norm, quantised after it",
            1,
            lambda: kernels.quantize_rows(kernels.add_rms_norm(h, m, weight, EPS)[1]),
            lambda: kernels.add_rms_norm_fp8(h, m, weight, EPS),
        ),
        *attention_pieces(tokens),
        *mlp_pieces(tokens),
        Piece(
            "dropout",
            "dropout, keeping a mask",
            2,
            lambda: dropout(h, DROPOUT),
            lambda: kernels.dropout(h, DROPOUT, counters, 1),
        ),
        *adapter_pieces(tokens, h, gradient, counters),
        *weight_pieces(),
    ]


def backward_of(
    forward: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    gradient: torch.Tensor,
    plus: torch.Tensor | None = None,
) -> Any:
    """What autograd does after the forward pass, once more at each call."""
    leaf = x.detach().clone().requires_grad_()
    output = forward(leaf)

    def run() -> torch.Tensor:
        (found,) = torch.autograd.grad(output, leaf, gradient, retain_graph=True)
        return found if plus is None else found + plus

    return run


def attention_pieces(tokens: int) -> list[Piece]:
    boundaries = [*range(0, tokens, POST), tokens]
    segments = Segments.of(boundaries, torch.device("cuda"))
    starts, ends = on_device(sight(np.diff(boundaries), None), torch.device("cuda"))
    qkv, dout = random(tokens, WIDTH), random(tokens, HEADS * HEAD)
    cos, sin = (torch.rand(tokens, HEAD // 2, device="cuda").repeat(1, 2) for _ in range(2))
    out, lse = kernels.attention(qkv, starts, HEADS, KV_HEADS, HEAD**-0.5)
    turned = qkv[:, : (HEADS + KV_HEADS) * HEAD].view(tokens, -1, HEAD)

    def rope() -> torch.Tensor:
        low, high = turned.chunk(2, -1)
        return turned * cos.bfloat16()[:, None] + torch.cat([-high, low], -1) * sin.bfloat16()[:, None]

    def varlen(packed: torch.Tensor) -> torch.Tensor:
        parts = packed.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], 1)
        query, key, value = (part.view(1, tokens, -1, HEAD).transpose(1, 2) for part in parts)
        nothing: Any = None
        mixed, _ = segment_attention(
            nothing, query, key, value, None, scaling=HEAD**-0.5, **segments.as_kwargs(True)
        )
        return mixed[0].flatten(1)

    return [
        Piece(
            "rotary positions",
            "products, halves turned",
            2,
            rope,
            lambda: kernels.rotate_(qkv.clone(), cos, sin, HEADS + KV_HEADS),
        ),
        Piece(
            "attention",
            "the varlen kernel",
            1,
            lambda: varlen(qkv),
            lambda: kernels.attention(qkv, starts, HEADS, KV_HEADS, HEAD**-0.5),
        ),
        Piece(
            "its backward pass",
            "autograd's",
            1,
            backward_of(varlen, qkv, dout),
            lambda: kernels.attention_backward(
                dout, qkv, out, lse, starts, ends, HEADS, KV_HEADS, HEAD**-0.5
            ),
        ),
    ]


def mlp_pieces(tokens: int) -> list[Piece]:
    gate_up, inner = random(tokens, 2 * INNER), random(tokens, INNER)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up

    return [
        Piece("SwiGLU", "silu, product", 1, lambda: plain(gate_up), lambda: kernels.swiglu(gate_up)),
        Piece(
            "its backward pass",
            "autograd's",
            1,
            backward_of(plain, gate_up, inner),
            lambda: kernels.swiglu_backward_(gate_up, inner),
        ),
        Piece(
            "SwiGLU to fp8",
            "SwiGLU, quantised after it",
            1,
            lambda: kernels.quantize_rows(kernels.swiglu(gate_up)),
            lambda: kernels.swiglu_fp8(gate_up),
        ),
        Piece(
            "its backward pass to fp8",
            "the same",
            1,
            lambda: kernels.quantize_rows(kernels.swiglu_backward_(gate_up, inner)),
            lambda: kernels.swiglu_backward_fp8(gate_up, inner),
        ),
    ]


def adapter_pieces(tokens: int, x: torch.Tensor, dx: torch.Tensor, counters: Counters) -> list[Piece]:
    """The adapters of q, k and v: three as PEFT computes them, and as one."""
    widths = (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
    downs, ups = (
        [random(RANK, HIDDEN).float() for _ in widths],
        [random(width, RANK).float() for width in widths],
    )
    ys, dy = [random(tokens, width) for width in widths], random(tokens, WIDTH)
    y = torch.cat(ys, 1)
    down, up = torch.cat(downs).bfloat16(), torch.block_diag(*ups).bfloat16()

    def plain() -> list[torch.Tensor]:
        return [
            y + dropout(x, DROPOUT) @ a.bfloat16().t() @ b.bfloat16().t() * 2.0
            for y, a, b in zip(ys, downs, ups, strict=True)
        ]

    def plain_backward() -> list[torch.Tensor]:
        found = []
        for part, a, b in zip(dy.split(widths, 1), downs, ups, strict=True):
            du = part @ b.bfloat16()
            found += [du.t() @ x, part.t() @ (x @ a.bfloat16().t()), dx + dropout(du @ a.bfloat16(), DROPOUT)]
        return found

    def fused() -> torch.Tensor:
        return y.addmm_(kernels.dropout(x, DROPOUT, counters, 1) @ down.t(), up.t())

    def fused_backward() -> None:
        du = dy @ up
        product_in_float32(du.t(), kernels.dropout(x, DROPOUT, counters, 1))
        product_in_float32(dy.t(), du)
        kernels.add_dropped_product_(dx, du, down, DROPOUT, counters, 1)

    return [
        Piece("adapters of q, k, v", "three, cast each time", 1, plain, fused),
        Piece("their backward pass", "the same", 1, plain_backward, fused_backward),
    ]


def weight_pieces() -> list[Piece]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    whole = random(INNER, HIDDEN)
    packed, state = quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
    return [
        Piece(
            "one of three large nf4 weights unpacked",
            "bitsandbytes",
            6,
            lambda: dequantize_4bit(packed, state, out=whole),
            lambda: kernels.unpack_4bit_(whole, packed, state),
        )
    ]


if __name__ == "__main__":
    main()
