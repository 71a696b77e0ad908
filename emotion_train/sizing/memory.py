"""Bytes of one GPU that training a base needs: weights, adapter with its optimizer, the activations
that autograd keeps, and the tensors that live only for a while.

Arithmetic over the base's shape, for the trainer and for the launcher alike; nothing here asks a
GPU. activations.py counts the blocks' bytes tensor by tensor, for the fused decoder and for
transformers' modules.

`total` predicts `torch.cuda.max_memory_allocated()`. A GPU needs more than that: `usable_bytes`
leaves out the driver's context, libraries and the memory lost between the allocator's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from emotion_train.sizing.activations import FusedBlocks, fused_overhead, stock_of_pack
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Precision, Shape

GIB = 2**30
# 4-bit codes, an 8-bit scale for each 64 of them, a 32-bit scale for each 256 of those:
# bitsandbytes' double quantisation
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_PARAMETER_BYTES = 4  # in float32
_TRAINED_BYTES = _PARAMETER_BYTES + 4 + 8  # with its gradient and AdamW's two moments
# While the fused decoder stacks a product's weights, as multiples of them: the copy; for fp8 also
# its transpose and both codes.
_STACKING: dict[Precision, int] = {"bf16": 2, "fp8": 6}
_CONTEXT_BYTES = 0.75 * GIB  # CUDA context, cuBLAS and NCCL workspaces
_BETWEEN_BLOCKS = 0.04  # of the memory, which the caching allocator holds and cannot use
# parameters (two 4-bit ones count as one); above it, products take longer than their launch
RECORDED_BELOW = 3e9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU. `optimizer`: adapter and head with gradients and moments. `overhead`:
    tensors that live only while a layer is computed.
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


def is_fused(shape: Shape, precision: Precision) -> bool:
    """Whether the fused decoder can compute this base on a GPU: it knows the blocks, and the
    precision is not float32.
    """
    return shape.fusable and precision != "fp32"


def uses_fused(recipe: Recipe) -> bool:
    """Whether a GPU computes this recipe by the fused decoder: model.decoder is fused, and
    `is_fused`.
    """
    return recipe.decoder == "fused" and is_fused(recipe.shape, recipe.precision)


def is_recorded(recipe: Recipe, processes: int = 1, gradient_checkpointing: bool = False) -> bool:
    """Whether a GPU with bfloat16 records the passes as CUDA graphs: for small models, in one
    process, those of the fused decoder, and of encoders that recompute nothing.
    """
    shape = recipe.shape
    held = shape.linear_parameters // (2 if recipe.precision == "nf4" else 1) + shape.other_parameters
    of_encoder = shape.is_encoder and recipe.precision != "fp32" and not gradient_checkpointing
    return (uses_fused(recipe) or of_encoder) and processes == 1 and held < RECORDED_BELOW


@lru_cache(maxsize=4096)  # searches ask for the same numbers of tokens on each kind of GPU
def estimate(
    recipe: Recipe,
    tokens_per_microbatch: int,
    gradient_checkpointing: bool,
    shards: int = 1,
    optimizer_shards: int = 1,
) -> MemoryEstimate:
    """Peak of one training step. `shards`: GPUs over which the base is sharded (FSDP2, ZeRO-3), and
    the optimizer too where transformers' modules compute; 1 is a whole copy on each.

    `optimizer_shards`: GPUs over which gradients, moments and a float32 copy of the adapter are
    sharded, beside a whole copy of the adapter (ZeRO-2).
    """
    shape, precision, trained = recipe.shape, recipe.precision, recipe.trained_parameters
    weights, optimizer = weight_bytes(shape, precision), _TRAINED_BYTES * trained
    if optimizer_shards > 1 and shards == 1:
        optimizer = _PARAMETER_BYTES * trained + _TRAINED_BYTES * trained // optimizer_shards
    averaged = _PARAMETER_BYTES * trained if recipe.averaged else 0  # whole under every engine
    if uses_fused(recipe):
        weights = weights if shards == 1 else cut_bytes(shape, precision, shards)
        pack = FusedBlocks(recipe).of_pack(tokens_per_microbatch, gradient_checkpointing)
        # stacking is over when training begins
        stacking = _STACKING.get(precision, 0) * shape.largest_stack - pack.kept - optimizer
        overhead = max(pack.passing + fused_overhead(recipe), stacking)
    else:
        weights, optimizer = weights // shards, optimizer // shards
        pack = stock_of_pack(recipe, tokens_per_microbatch, gradient_checkpointing)
        # autocast's bfloat16 copies of the adapter, or of an encoder
        copied = shape.parameters if shape.is_encoder else trained
        copies = 0 if precision == "fp32" else 2 * copied
        # the block at work and the next one
        gathered = 2 * weight_bytes(shape, precision) // shape.num_hidden_layers if shards > 1 else 0
        overhead = pack.passing + copies + gathered
    if recipe.lora is None:
        weights = 0  # weights that are trained are counted with their optimizer
    return MemoryEstimate(weights, optimizer + averaged, pack.kept, overhead)


def cut_bytes(shape: Shape, precision: Precision, shards: int) -> int:
    """Bytes of one GPU for a sharded base in the fused decoder: its shard of the blocks, two whole
    blocks, embedding and norms.
    """
    others = 2 * shape.other_parameters
    blocks = weight_bytes(shape, precision) - others
    return blocks // shards + 2 * blocks // shape.num_hidden_layers + others


def weight_bytes(shape: Shape, precision: Precision) -> int:
    """Bytes of the frozen base. fp8 keeps each matrix twice, for the product and for the input
    gradient, with a float32 scale for each row of both. An encoder is float32 in any precision.
    """
    if precision == "fp32" or shape.is_encoder:
        return 4 * shape.parameters
    if precision == "bf16":
        return 2 * shape.parameters
    if precision == "nf4":
        return int(shape.linear_parameters * _NF4_BITS / 8) + 2 * shape.other_parameters
    scales = shape.num_hidden_layers * 4 * sum(map(sum, shape.stacked_layers))
    return 2 * shape.linear_parameters + scales + 2 * shape.other_parameters


def usable_bytes(gpu_bytes: int) -> int:
    """The largest `MemoryEstimate.total` for a GPU that reports this memory."""
    return int(gpu_bytes * (1 - _BETWEEN_BLOCKS) - _CONTEXT_BYTES)
