"""Bytes of one GPU that training a base takes: weights, adapter with its optimizer, what autograd
keeps, and what passes.

Arithmetic over the base's shape, for the trainer and for the launcher alike; nothing here asks a
GPU. What the blocks keep and pass is counted tensor by tensor in activations.py, for the fused
decoder and for transformers' modules.

`total` predicts `torch.cuda.max_memory_allocated()`. A GPU needs more than that: `usable_bytes`
takes off the driver's context, libraries and what the allocator cannot use between its blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from emotion_train.sizing.activations import FusedBlocks, fused_overhead, stock_of_pack
from emotion_train.sizing.shape import Precision as Precision
from emotion_train.sizing.shape import Shape as Shape
from emotion_train.sizing.shape import Targets as Targets
from emotion_train.sizing.shape import target_names as target_names

GIB = 2**30
# 4-bit codes, an 8-bit scale for each 64 of them, a 32-bit scale for each 256 of those:
# bitsandbytes' double quantisation
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_TRAINED_BYTES = 4 + 4 + 8  # float32 parameter, gradient, AdamW's two moments
# While the fused decoder stacks a product's weights, as multiples of them: the copy; for fp8 also
# its transpose and both codes.
_STACKING: dict[Precision, int] = {"bf16": 2, "fp8": 6}
_CONTEXT_BYTES = 0.75 * GIB  # CUDA context, cuBLAS and NCCL workspaces
_BETWEEN_BLOCKS = 0.04  # of the memory; what the caching allocator holds and cannot use
TOKEN_QUANTUM = 256  # matrix products like their rows in such multiples
MOST_TOKENS = 16_384  # more bring no speed: the products are at their rate far below
# with fewer, recomputing a larger micro-batch is faster than reading the weights that often
WORTHWHILE_TOKENS = 1024
# parameters (two 4-bit ones count as one); above it, products take longer than starting them
RECORDED_BELOW = 3e9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU. `optimizer`: adapter and head with gradients and moments. `overhead`: what
    lives only while a layer is computed.
    """

    weights: int
    optimizer: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations + self.overhead

    def __str__(self) -> str:
        words = (
            f"{getattr(self, name) / GIB:.1f} {name}"
            for name in ("weights", "optimizer", "activations", "overhead")
        )
        return f"{self.total / GIB:.1f} GiB ({', '.join(words)})"


def is_fused(shape: Shape, precision: Precision, shards: int = 1) -> bool:
    """Whether a GPU computes this base by the fused decoder (unless model.decoder is stock): not in
    float32, not from weights in pieces.
    """
    return shape.fusable and precision != "fp32" and shards == 1


def is_recorded(shape: Shape, precision: Precision, processes: int = 1) -> bool:
    """Whether the fused decoder's passes are recorded as CUDA graphs: of small models, in one
    process.
    """
    held = shape.linear_parameters // (2 if precision == "nf4" else 1) + shape.other_parameters
    return is_fused(shape, precision) and processes == 1 and held < RECORDED_BELOW


def estimate(
    shape: Shape,
    precision: Precision,
    lora_r: int,
    lora_targets: Targets,
    tokens_per_microbatch: int,
    gradient_checkpointing: bool,
    labels: int,
    shards: int = 1,
    *,
    lora_dropout: float = 0.05,
    fused: bool = True,
    repeated_keys: bool = False,
) -> MemoryEstimate:
    """Peak of one training step. `shards`: GPUs over which base and optimizer are spread (FSDP2,
    ZeRO-3); 1 is a whole copy on each.

    `fused`: by the fused decoder where it fits (`is_fused`), else by transformers' modules, whose
    attention kernel wants `repeated_keys` before PyTorch 2.12.
    """
    trained = shape.trained_parameters(lora_r, lora_targets, labels)
    optimizer = _TRAINED_BYTES * trained // shards
    if fused and is_fused(shape, precision, shards):
        pack = FusedBlocks(shape, precision, lora_r, lora_targets, lora_dropout).of_pack(
            tokens_per_microbatch, gradient_checkpointing
        )
        # it is over when training begins
        stacking = _STACKING.get(precision, 0) * shape.largest_stack - pack.kept - optimizer
        overhead = max(pack.passing + fused_overhead(shape, precision, lora_r, lora_targets), stacking)
    else:
        pack = stock_of_pack(
            shape,
            precision,
            lora_r,
            lora_targets,
            lora_dropout,
            tokens_per_microbatch,
            gradient_checkpointing,
            repeated_keys,
        )
        copies = 0 if precision == "fp32" else 2 * trained  # autocast's bfloat16 copies of the adapter
        # the block at work and the next one
        gathered = 2 * weight_bytes(shape, precision) // shape.num_hidden_layers if shards > 1 else 0
        overhead = pack.passing + copies + gathered
    return MemoryEstimate(weight_bytes(shape, precision) // shards, optimizer, pack.kept, overhead)


def weight_bytes(shape: Shape, precision: Precision) -> int:
    """The frozen base. fp8 keeps each matrix twice, for the product and for the input gradient,
    with a float32 scale per row of each.
    """
    if precision == "fp32":
        return 4 * shape.parameters
    if precision == "bf16":
        return 2 * shape.parameters
    if precision == "nf4":
        return int(shape.linear_parameters * _NF4_BITS / 8) + 2 * shape.other_parameters
    scales = shape.num_hidden_layers * 4 * sum(map(sum, shape.stacked_layers))
    return 2 * shape.linear_parameters + scales + 2 * shape.other_parameters


def usable_bytes(gpu_bytes: int) -> int:
    """What `MemoryEstimate.total` may reach on a GPU that reports this memory."""
    return int(gpu_bytes * (1 - _BETWEEN_BLOCKS) - _CONTEXT_BYTES)


@dataclass(frozen=True)
class MicroBatch:
    """What fits a GPU best: `tokens` per forward pass, and whether the blocks are computed again in
    the backward pass.
    """

    tokens: int
    gradient_checkpointing: bool
    memory: MemoryEstimate


def tokens_to_fill(share: int, longest_post: int) -> int:
    """Of a micro-batch worth having where a GPU's share of a step has `share` tokens: all of it,
    within bounds.
    """
    whole = -(-max(share, longest_post) // TOKEN_QUANTUM) * TOKEN_QUANTUM
    return max(longest_post, min(MOST_TOKENS, whole))


def largest_microbatch(
    shape: Shape,
    precision: Precision,
    lora_r: int,
    lora_targets: Targets,
    labels: int,
    gpu_bytes: int,
    *,
    longest_post: int = 128,
    most_tokens: int = MOST_TOKENS,
    lora_dropout: float = 0.05,
    fused: bool = True,
    repeated_keys: bool = False,
    shards: int = 1,
    processes: int = 1,
    gradient_checkpointing: bool | None = None,
) -> MicroBatch | None:
    """The largest micro-batch for a GPU that reports `gpu_bytes`; None when not even one post of
    `longest_post` tokens fits.

    Recorded passes of small models (in one of `processes`) have a pool of memory for themselves,
    beside that of shapes not yet recorded. Without recomputation where at least `WORTHWHILE_TOKENS`
    fit, unless `gradient_checkpointing` says which: recomputing costs half as much work again, a
    small micro-batch reads the weights more often. Tokens come in multiples of 256 below
    `most_tokens`.
    """

    def memory(tokens: int, again: bool) -> MemoryEstimate:
        return estimate(
            shape,
            precision,
            lora_r,
            lora_targets,
            tokens,
            again,
            labels,
            shards,
            lora_dropout=lora_dropout,
            fused=fused,
            repeated_keys=repeated_keys,
        )

    def needed(tokens: int, again: bool) -> int:
        taken = memory(tokens, again)
        pools = 2 if fused and shards == 1 and is_recorded(shape, precision, processes) else 1
        return taken.weights + taken.optimizer + pools * (taken.activations + taken.overhead)

    def largest(again: bool) -> MicroBatch | None:
        available = usable_bytes(gpu_bytes)
        too_many = bisect_left(
            range(most_tokens + 1), True, key=lambda tokens: needed(tokens, again) > available
        )
        fitting = too_many - 1
        tokens = fitting // TOKEN_QUANTUM * TOKEN_QUANTUM if fitting >= TOKEN_QUANTUM else fitting
        return MicroBatch(tokens, again, memory(tokens, again)) if tokens >= longest_post else None

    if gradient_checkpointing is not None:
        return largest(gradient_checkpointing)
    kept, again = largest(False), largest(True)
    if kept is not None and (kept.tokens >= min(WORTHWHILE_TOKENS, most_tokens) or again is None):
        return kept
    return again or kept
