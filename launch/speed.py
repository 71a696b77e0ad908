"""Seconds of a micro-batch and of a step on a kind of GPU: three straight lines, calibrated on one H200.

    matrix products   4 x linear parameters x tokens (6 x with recomputation), at a fraction of the GPU's dense bf16 rate
    weights           read for the forward and for the backward pass, and brought from nf4 to bf16 before, whatever the number of tokens
    launching         the CPU's time to start the kernels of every block, which bounds small models and small micro-batches

The fractions come from one H200 (benchmarks/README.md, the shape of Mistral Small 3.1) and are assumed for every other GPU, so the order of
two kinds is only as good as their data sheets. Tests hold the predictions to what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from emotion_train.memory import Precision, Shape, Targets, target_names, weight_bytes
from launch.gpus import GpuKind


@dataclass(frozen=True)
class _Rate:
    """`eager` and `compiled`: fraction of the dense bf16 rate. A matrix product reads `bytes_per_weight`."""

    eager: float
    compiled: float
    bytes_per_weight: float


# Compiled blocks, useful TFLOP/s at two sizes of micro-batch, of 989 dense: nf4 555 at 8k and 583 at 12k tokens, bf16 570 at 4k and 593 at
# 8k, fp8 913 and 964 likewise. Eager: this program in nf4, 5,172 tokens/s in packs of 8k; the other eager ones are not measured.
_RATES: dict[Precision, _Rate] = {
    "nf4": _Rate(eager=0.54, compiled=0.645, bytes_per_weight=2),
    "bf16": _Rate(eager=0.54, compiled=0.615, bytes_per_weight=2),
    "fp8": _Rate(eager=0.84, compiled=0.98, bytes_per_weight=1),
    "fp32": _Rate(eager=0.05, compiled=0.055, bytes_per_weight=4),  # its own products, a sixteenth of bf16's rate
}
_OF_BANDWIDTH = 0.8
# What nf4 takes longer than bf16 at the same size, two passes over 22 billion weights: 0.14 s on an H200's 132 multiprocessors. Smaller
# GPUs are bound by their memory: half a byte of codes and scales read, two bytes of bf16 written.
_UNPACKED_PER_S = 2.4e9  # weights, by one multiprocessor
_NF4_BYTES_MOVED = 2.516
_MLP_ADAPTERS = 1.14  # fp8, 6k tokens: 831 TFLOP/s with adapters on all linear layers, 946 with those on q, k, v, o
# SmolLM2-135M, 30 blocks with 7 adapters, in 216 ms a step of one eager micro-batch, whatever its size
_LAUNCH_BLOCK_S = 2.0e-3
_LAUNCH_ADAPTER_S = 0.74e-3
_LAUNCH_COMPILED = 0.3
_NVLINK_BYTES_PER_S = 200e9
_PCIE_BYTES_PER_S = 10e9


@dataclass(frozen=True)
class Speed:
    """How fast one GPU of a kind trains a base. `shards`: GPUs that share one copy of the base."""

    kind: GpuKind
    shape: Shape
    precision: Precision
    lora_r: int
    lora_targets: Targets
    gradient_checkpointing: bool
    compiled: bool = False
    shards: int = 1

    def microbatch_s(self, tokens: int) -> float:
        """Forward and backward pass over so many tokens."""
        names, rate = target_names(self.lora_targets), _RATES[self.precision]
        again = 1.5 if self.gradient_checkpointing else 1.0
        fraction = rate.compiled if self.compiled else rate.eager
        adapters = _MLP_ADAPTERS if {"gate_proj", "up_proj", "down_proj"} & set(names) else 1.0
        products = 4 * self.shape.linear_parameters * tokens / (fraction * self.kind.bf16_flops) * again * adapters
        weight_s = rate.bytes_per_weight / (_OF_BANDWIDTH * self.kind.bytes_per_s) + (self._unpack_s() if self.precision == "nf4" else 0.0)
        weights = 2 * self.shape.linear_parameters * weight_s * again
        launching = (_LAUNCH_BLOCK_S + _LAUNCH_ADAPTER_S * len(names)) * self.shape.num_hidden_layers * again
        gathering = 0.0
        if self.shards > 1:
            gathering = 2 * again * weight_bytes(self.shape, self.precision) * (1 - 1 / self.shards) / self._link()
        return max(products + weights, launching * (_LAUNCH_COMPILED if self.compiled else 1.0), gathering)

    def scoring_s(self, tokens: int) -> float:
        """Forward pass alone."""
        forward = self.microbatch_s(tokens) / 2
        return forward / 1.5 if self.gradient_checkpointing else forward

    def joining_s(self, gpus: int, labels: int) -> float:
        """Adding up the adapter's float32 gradients over the GPUs, once a step."""
        trained = 4 * self.shape.trained_parameters(self.lora_r, self.lora_targets, labels)
        return 2 * trained * (1 - 1 / gpus) / self._link()

    def _unpack_s(self) -> float:
        """Seconds to bring one weight from nf4 to bf16."""
        bound_by_memory = _NF4_BYTES_MOVED / (_OF_BANDWIDTH * self.kind.bytes_per_s)
        return max(1 / (_UNPACKED_PER_S * self.kind.multiprocessors), bound_by_memory)

    def _link(self) -> float:
        return _NVLINK_BYTES_PER_S if self.kind.nvlink else _PCIE_BYTES_PER_S
