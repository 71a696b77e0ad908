"""Seconds of a micro-batch and of a step on a kind of GPU: some straight lines, calibrated on one
H100 and one H200.

    matrix products   4 x linear parameters x tokens (6 x with recomputation, and where every weight
                      is trained), at a fraction of the GPU's dense bf16 rate, or the time to read
                      the weights for either pass, whichever is longer
    passes            the bytes that the kernels between two products read and write, at a fraction
                      of the memory's data-sheet rate
    unpacking         nf4 weights, in either pass, whatever the number of tokens; not the blocks
                      that the GPU has room to keep unpacked
    launching         the CPU's time to start the kernels of every block, which bounds small models
                      and small micro-batches; passes that are recorded as CUDA graphs (below 3
                      billion parameters, encoders too, one process) cost the GPU's own time for a
                      kernel instead
    update            clipping and AdamW, once a step: the bytes of the trained weights' states
    gathering         sharded blocks over the link of the GPUs, beside the products: a part of that
                      time, or all of it where it takes longer than they do

The fused decoder was measured on one H100 80GB, transformers' modules on one H200
(benchmarks/speed.md). Every other GPU is assumed to reach the same fractions of its data sheet, so
the order of two kinds is only as good as this: an L4, bound by its 72 W, may be slower. Tests hold
the predictions to the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from emotion_train.sizing.fit import Layout
from emotion_train.sizing.memory import is_recorded, uses_fused, weight_bytes
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Precision, Shape
from launch.gpus import GpuKind

# Fractions of the dense bf16 rate. The fused decoder's are the rates of its products in the middle
# of a step, from a profile of 20 blocks: 702 TFLOP/s in bf16 and 1,360 in fp8 of 989 on an H100,
# 688 in bf16 on an H200. Those of transformers' modules include the time between the products: this
# program in nf4 on one H200, 5,172 tokens/s in packs of 8k; float32 has a sixteenth of bf16's rate.
_FUSED: dict[Precision, float] = {"nf4": 0.70, "bf16": 0.70, "fp8": 1.355}
_STOCK: dict[Precision, float] = {"nf4": 0.52, "bf16": 0.52, "fp32": 0.05}
# of the float32 rate, where bfloat16 is computed in float32: assumed, as for transformers' modules
_EMULATED = 0.52
_BYTES_PER_WEIGHT: dict[Precision, float] = {"nf4": 2, "bf16": 2, "fp8": 1, "fp32": 4}
_OF_BANDWIDTH = 0.8
# Both passes over the weights of 20 blocks: 20.1 ms on an H100's 132 multiprocessors, 2.8 of 3.35
# TB/s of its memory: half a byte of codes and scales read, two bytes of bf16 written.
_UNPACKED_PER_S = 8.4e9  # weights, by one multiprocessor
_NF4_BYTES_MOVED = 2.516
# Bytes that the fused decoder's kernels and the adapters on q, k, v and o read and write beside the
# products, forward and backward, for each token and block: multiples of the hidden size, the MLP's
# inner width, the queries' width, and the width of queries, keys and values together.
_MOVED = (54, 16, 16, 22.6)
_MOVED_IN_FP8 = 1.35  # times as many: each row is first read for its scale
# Adapters on the MLP read and write so many times its inner width, half for gate and up and half
# for down: measured 105.2 ms for four blocks at 8k tokens against 94.4 without.
_MOVED_BY_MLP_ADAPTERS = 36
# share of the last block's tokens that is left out: after its attention the fused decoder keeps
# only the tokens that end a post
_POOLED = 15 / 16
# SmolLM2-135M, 30 blocks with 7 adapters: 216 ms a step by transformers' modules whatever its size,
# 145 by the fused decoder (the 24B, 40 blocks with 4 adapters in fp8, 92 beside an H200), and 15
# when that is recorded, of which 8 are products and passes
_LAUNCH_S = 2.0e-3, 0.74e-3  # for a block, and for each of its adapters
_LAUNCH_FUSED_S = 0.2e-3, 0.57e-3
_RECORDED_BLOCK_S = 0.24e-3
# Encoders, whose passes are transformers' modules, recorded (benchmarks/encoders.py, five bases on
# one H200, within 12 %): bytes moved beside the products for each token, block and unit of the
# hidden size; for each weight to cast it to bf16, and where all are trained to write its gradient
# and add it; and the seconds of a micro-batch whatever its size.
_ENCODER_MOVED = 950
_CAST_BYTES, _GRADIENT_BYTES = 6, 16
_ENCODER_PASS_S = 0.8e-3
# read and written for each trained weight to clip its gradient and by AdamW with its two moments
_UPDATE_BYTES = 34
_NVLINK_BYTES_PER_S = 200e9
_PCIE_BYTES_PER_S = 10e9
# What gathering sharded blocks beside the products adds: a share of its own time, since both use
# the memory, and the wait of a pass over a block for the other GPUs. From two H200s with the 24B in
# three precisions (benchmarks/many-gpus.md); a 70B in two of them is predicted within 4 %.
_FELT_GATHERING = 0.08
_AGREEING_S = 0.25e-3


def gathers_quickly(kind: GpuKind, recipe: Recipe) -> bool:
    """Whether a base sharded over several of these GPUs may train faster than by recomputing: the
    fused decoder gathers the blocks beside the products, over NVLink.
    """
    return kind.nvlink and kind.bf16 and uses_fused(recipe)


@dataclass(frozen=True)
class Speed:
    """How fast one GPU of a kind trains a recipe, alone or as one of a layout."""

    kind: GpuKind
    recipe: Recipe
    gradient_checkpointing: bool
    layout: Layout = Layout()  # noqa: RUF009
    unpacked_blocks: int = 0

    @property
    def shape(self) -> Shape:
        return self.recipe.shape

    @property
    def precision(self) -> Precision:
        return self.recipe.precision

    def microbatch_s(self, tokens: int) -> float:
        """Seconds of a forward and backward pass over so many tokens."""
        launching_s = 0.0 if self._recorded else self._launching_s()
        return self._beside(self._gpu_s(tokens), launching_s)

    def scoring_s(self, tokens: int) -> float:
        """Seconds of a forward pass alone, which is not recorded."""
        whole = self._beside(self._gpu_s(tokens), self._launching_s())
        return whole / (3 if self.recipe.lora is None else 2) / self._recompute

    def updating_s(self) -> float:
        """Seconds to clip the gradients and to update the trained weights, once a step."""
        return _UPDATE_BYTES * self.recipe.trained_parameters / self._bandwidth

    def joining_s(self) -> float:
        """Seconds to add up the adapter's float32 gradients over the GPUs, once a step."""
        return 2 * 4 * self.recipe.trained_parameters * (1 - 1 / self.layout.gpus) / self._link()

    @property
    def _fused(self) -> bool:
        return uses_fused(self.recipe)

    @property
    def _recorded(self) -> bool:
        return is_recorded(self.recipe, self.layout.gpus, self.gradient_checkpointing)

    @property
    def _bandwidth(self) -> float:
        """Bytes a second that kernels read and write."""
        return _OF_BANDWIDTH * self.kind.bytes_per_s

    @property
    def _recompute(self) -> float:
        """The factor on the time where forward passes are recomputed."""
        return 1.5 if self.gradient_checkpointing else 1.0

    def _gpu_s(self, tokens: int) -> float:
        fraction = (_FUSED if self._fused else _STOCK)[self.precision] if self.kind.bf16 else _EMULATED
        passes = 6 if self.recipe.lora is None else 4
        products = passes * self._computed_parameters() * tokens / (fraction * self.kind.bf16_flops)
        read = 2 * self.shape.linear_parameters * _BYTES_PER_WEIGHT[self.precision] / self._bandwidth
        unpacked = self._unpacking_s() if self.precision == "nf4" else 0.0
        kernels = _RECORDED_BLOCK_S * self.shape.num_hidden_layers if self._fused or self._recorded else 0.0
        beside = self._passes_s(tokens) + (self._encoder_s(tokens) if self.shape.is_encoder else 0.0)
        return (max(products, read) + beside + unpacked + kernels) * self._recompute

    def _encoder_s(self, tokens: int) -> float:
        """Seconds between an encoder's products, its float32 weights cast anew."""
        shape, trains_all = self.shape, self.recipe.lora is None
        moved = _ENCODER_MOVED * shape.hidden_size * shape.num_hidden_layers * tokens
        moved += (_CAST_BYTES + (_GRADIENT_BYTES if trains_all else 0)) * shape.parameters
        return moved / self._bandwidth + _ENCODER_PASS_S

    def _computed_parameters(self) -> float:
        """Linear parameters, less the part of the last block that is computed for the posts' last
        tokens only.
        """
        if not self._fused:
            return float(self.shape.linear_parameters)
        return self.shape.linear_parameters - _POOLED * sum(
            outputs * inputs for outputs, inputs in self.shape.stacked_layers[1:]
        )

    def _passes_s(self, tokens: int) -> float:
        """Seconds between the products. For transformers' modules the products' fraction includes
        them, except for the adapters on the MLP.
        """
        shape, names = self.shape, set(self.recipe.adapted_layers)
        widths = (
            shape.hidden_size,
            shape.intermediate_size,
            shape.query_width,
            shape.query_width + 2 * shape.key_width,
        )
        moved = (
            sum(times * width for times, width in zip(_MOVED, widths, strict=True)) if self._fused else 0.0
        )
        moved *= _MOVED_IN_FP8 if self.precision == "fp8" else 1.0
        for group in ({"gate_proj", "up_proj"}, {"down_proj"}):
            moved += _MOVED_BY_MLP_ADAPTERS / 2 * shape.intermediate_size if group & names else 0.0
        blocks = shape.num_hidden_layers * self._computed_parameters() / shape.linear_parameters
        return moved * tokens * blocks / self._bandwidth

    def _launching_s(self) -> float:
        block_s, adapter_s = _LAUNCH_FUSED_S if self._fused else _LAUNCH_S
        return (
            (block_s + adapter_s * len(self.recipe.adapted_layers))
            * self.shape.num_hidden_layers
            * self._recompute
        )

    def _beside(self, gpu_s: float, launching_s: float) -> float:
        """Seconds of passes whose kernels are started, and whose blocks are gathered, beside
        them.
        """
        gathering_s = self._gathering_s()
        if gathering_s:
            passes = 2 * self._recompute * self.shape.num_hidden_layers
            gpu_s += _FELT_GATHERING * gathering_s + _AGREEING_S * passes
        return max(gpu_s, launching_s, gathering_s)

    def _gathering_s(self) -> float:
        """Seconds to put the blocks together from their shards."""
        shards = self.layout.base_shards
        if shards == 1:
            return 0.0
        gathered = weight_bytes(self.shape, self.precision) * (1 - 1 / shards)
        return 2 * self._recompute * gathered / self._link()

    def _unpacking_s(self) -> float:
        share = 1 - self.unpacked_blocks / self.shape.num_hidden_layers
        return 2 * share * self.shape.linear_parameters * self._unpack_s()

    def _unpack_s(self) -> float:
        """Seconds to unpack one weight from nf4 to bf16."""
        bound_by_memory = _NF4_BYTES_MOVED / self._bandwidth
        return max(1 / (_UNPACKED_PER_S * self.kind.multiprocessors), bound_by_memory)

    def _link(self) -> float:
        return _NVLINK_BYTES_PER_S if self.kind.nvlink else _PCIE_BYTES_PER_S
