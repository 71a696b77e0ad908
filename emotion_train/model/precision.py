"""The number formats in which the frozen base is held and computed.

Whatever the choice, everything that is trained (adapter and head) and the head's arithmetic are
float32: in bfloat16 a learning rate of 2e-5 leaves 70 % of the head's weights unmoved after 50
steps.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from emotion_train.config import Precision as Precision
from emotion_train.errors import WrongRequest


@dataclass(frozen=True)
class Formats:
    """`weights` of embeddings, norms and (unless `quantised`) linear layers; `compute` of what lies
    between the products.

    fp8 is brought from bfloat16 to float8 by the fused decoder, once the weights lie on their
    device.
    """

    weights: torch.dtype
    compute: torch.dtype
    quantised: bool


def formats(precision: Precision) -> Formats:
    """The formats of a base in this precision. Norms and embeddings of an nf4 base stay bfloat16,
    as in the checkpoint: together 1.3 GiB of the 24B model's 11.9 GiB.
    """
    if precision == "fp32":
        return Formats(torch.float32, torch.float32, quantised=False)
    return Formats(torch.bfloat16, torch.bfloat16, quantised=precision == "nf4")


def import_bitsandbytes_quickly() -> None:
    """Import it, where it can be, without PyTorch's compiler: it has functions of its own compiled,
    for devices that it has no kernels for, which takes two seconds before any is called. They are
    compiled when they are. PEFT imports it for every precision.
    """
    if "bitsandbytes" in sys.modules:
        return
    compile_now = torch.compile
    vars(torch)["compile"] = functools.partial(_compiled_when_called, compile_now)
    try:
        with suppress(Exception):  # whoever needs it imports it again, and is told
            import bitsandbytes  # noqa: F401
    finally:
        vars(torch)["compile"] = compile_now


def _compiled_when_called(
    compile_now: Callable[..., Any], function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    compiled = functools.cache(lambda: compile_now(function, **options))

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return compiled()(*given, **named)

    return call


def require_bitsandbytes() -> None:
    """Raises `WrongRequest` unless 4-bit layers can be made here."""
    import_bitsandbytes_quickly()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise WrongRequest(
            "model.precision is nf4, which needs the package bitsandbytes; type: pip install"
            " 'emotion-train[gpu]', or set model.precision=bf16 (3.6 times the memory)."
        ) from None


@dataclass(frozen=True)
class Codes4bit:
    """A quantised weight as it is stored: `state` in the layout of bitsandbytes' and transformers'
    own checkpoints, suffix to tensor.
    """

    shape: tuple[int, ...]
    codes: torch.Tensor  # uint8, two codes a byte
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, layer: torch.nn.Module) -> Codes4bit:
        """The codes of a layer that `linear_4bit` made with uint8 storage."""
        weight: Any = layer.weight
        state = weight.quant_state.as_dict(packed=True)
        return cls(
            tuple(weight.quant_state.shape),
            weight.data,
            {f".{name}": tensor for name, tensor in state.items()},
        )


def linear_4bit(
    weight_OI: torch.Tensor | Codes4bit,
    bias_O: torch.Tensor | None,
    device: torch.device,
    quant_storage: torch.dtype = torch.uint8,
) -> torch.nn.Module:
    """A frozen bitsandbytes layer of these weights: 4-bit NormalFloat, double quantisation,
    bfloat16 compute, quantised on `device`.

    `quant_storage` is the type under which the codes lie in memory. uint8 is safe from a stray
    `.to(dtype)`; FSDP and DeepSpeed ZeRO-3 shard only floating-point weights and want bfloat16.
    """
    import bitsandbytes as bnb

    layer: torch.nn.Module = bnb.nn.Linear4bit(
        weight_OI.shape[1],
        weight_OI.shape[0],
        bias=bias_O is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=quant_storage,
        device="meta",
    )
    if isinstance(weight_OI, Codes4bit):
        stats = {f"weight{suffix}": tensor for suffix, tensor in weight_OI.state.items()}
        codes = weight_OI.codes.view(-1).view(quant_storage).view(-1, 1)
        layer.weight = bnb.nn.Params4bit.from_prequantized(codes, stats, device=device, module=layer)
    else:
        layer.weight = bnb.nn.Params4bit(
            weight_OI.to(torch.bfloat16).contiguous(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=quant_storage,
            module=layer,
        ).to(device)
    # An evaluation forward on a CPU with avx512_bf16 repacks the codes in place, and training
    # gradients after it are wrong: seen with bitsandbytes 0.50.2 (relative error of the adapter's
    # gradient 0.68; its only sign is a warning).
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer
