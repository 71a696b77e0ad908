"""Bytes of one GPU that training a base takes: weights, adapter with its optimizer, what autograd keeps, and what passes.

Arithmetic over the base's shape, for the trainer and for the launcher alike; nothing here asks a GPU. What autograd keeps is counted
tensor by tensor from the program's own layers (`kept_by_layer`), and a test compares it with what autograd really keeps. The price: a
change of a layer's code that keeps another tensor has to be written down here.

`total` predicts `torch.cuda.max_memory_allocated()`. A GPU needs more than that: `usable_bytes` takes off the driver's context, libraries
and what the allocator cannot use between its blocks.

Letters: H hidden size, I intermediate size, Q width of the queries (heads x head size), K width of the keys, r rank of the adapter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["nf4", "bf16", "fp32", "fp8"]
Targets = Literal["all-linear"] | Sequence[str]

GIB = 2**30
# 4-bit codes, an 8-bit scale for each 64 of them, a 32-bit scale for each 256 of those: bitsandbytes' double quantisation
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_TRAINED_BYTES = 4 + 4 + 8  # float32 parameter, gradient, AdamW's two moments
_CONTEXT_BYTES = 0.75 * GIB  # CUDA context, cuBLAS and NCCL workspaces
_BETWEEN_BLOCKS = 0.04  # of the memory; what the caching allocator holds and cannot use
TOKEN_QUANTUM = 256  # matrix products like their rows in such multiples
MOST_TOKENS = 16_384  # more bring no speed: the products are at their rate far below
WORTHWHILE_TOKENS = 1024  # with fewer, recomputing a larger micro-batch is faster than reading the weights that often


@dataclass(frozen=True)
class Shape:
    """The text model of a base, as far as its size depends on it. `qk_norm`: queries and keys are normalised (Qwen3)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    qk_norm: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From the content of a config.json; of a multimodal one the text part. Raises `ValueError` naming the key that is missing."""
        text = config.get("text_config", config)
        missing = [
            key for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if key not in text
        ]
        if missing:
            raise ValueError(f"the model's configuration has no {missing[0]}")
        heads = int(text["num_attention_heads"])
        return cls(
            hidden_size=int(text["hidden_size"]),
            intermediate_size=int(text["intermediate_size"]),
            num_hidden_layers=int(text["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
            vocab_size=int(text["vocab_size"]),
            qk_norm=text.get("model_type") == "qwen3",
        )

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of one block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (self.query_width, hidden),
            "k_proj": (self.key_width, hidden),
            "v_proj": (self.key_width, hidden),
            "o_proj": (hidden, self.query_width),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @property
    def linear_parameters(self) -> int:
        """Of all blocks; 2 x these x tokens is the floating-point work of a forward pass, and as much again for the input gradients."""
        return self.num_hidden_layers * sum(outputs * inputs for outputs, inputs in self.linear_layers.values())

    @property
    def other_parameters(self) -> int:
        """Embedding and norms, which are never quantised."""
        heads = 2 * self.head_dim if self.qk_norm else 0
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * (2 * self.hidden_size + heads) + self.hidden_size

    @property
    def parameters(self) -> int:
        """Of the text classifier without its head."""
        return self.linear_parameters + self.other_parameters

    def trained_parameters(self, lora_r: int, lora_targets: Targets, labels: int) -> int:
        """Adapter and head."""
        adapted = [self.linear_layers[name] for name in target_names(lora_targets)]
        return self.num_hidden_layers * lora_r * sum(map(sum, adapted)) + labels * self.hidden_size


def target_names(lora_targets: Targets) -> tuple[str, ...]:
    """Names of the adapted linear layers of a block."""
    if lora_targets == "all-linear":
        return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return tuple(lora_targets)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU. `optimizer`: adapter and head with gradients and moments. `overhead`: what lives only while a layer is computed."""

    weights: int
    optimizer: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations + self.overhead

    def __str__(self) -> str:
        words = (f"{getattr(self, name) / GIB:.1f} {name}" for name in ("weights", "optimizer", "activations", "overhead"))
        return f"{self.total / GIB:.1f} GiB ({', '.join(words)})"


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
    compiled: bool = False,
    repeated_keys: bool = False,
) -> MemoryEstimate:
    """Peak of one training step. `shards`: GPUs over which base and optimizer are spread (FSDP2, ZeRO-3); 1 is a whole copy on each.

    `compiled`: each block is one compiled graph, which keeps less. `repeated_keys`: the attention kernel wants as many key heads as query
    heads, as PyTorch before 2.12 does.
    """
    element = 4 if precision == "fp32" else 2
    trained = shape.trained_parameters(lora_r, lora_targets, labels)
    layer = sum(
        kept_by_layer(
            shape, lora_r, lora_targets, lora_dropout=lora_dropout, element=element, compiled=compiled, repeated_keys=repeated_keys
        ).values()
    )
    norm, rotary = 4 * shape.hidden_size + 4, 2 * element * shape.head_dim
    if gradient_checkpointing:
        kept = shape.num_hidden_layers * element * shape.hidden_size + norm + rotary + layer
    else:
        kept = shape.num_hidden_layers * layer + rotary  # the first block keeps no norm of its input, which makes up for the last norm
    down = 0 if "down_proj" not in target_names(lora_targets) else (element + (lora_dropout > 0)) * shape.intermediate_size
    backward = tokens_per_microbatch * _passing_by_token(shape, element, norm + down)
    unpacked = _unpacked_bytes(shape, precision) + tokens_per_microbatch * element * shape.intermediate_size
    copies = 0 if precision == "fp32" else 2 * trained  # autocast's bfloat16 copies of the adapter
    gathered = 2 * weight_bytes(shape, precision) // shape.num_hidden_layers if shards > 1 else 0  # the block at work and the next one
    return MemoryEstimate(
        weights=weight_bytes(shape, precision) // shards,
        optimizer=_TRAINED_BYTES * trained // shards,
        activations=tokens_per_microbatch * kept,
        overhead=max(backward, unpacked) + copies + gathered,
    )


def weight_bytes(shape: Shape, precision: Precision) -> int:
    """The frozen base. fp8 keeps each matrix twice, for the product and for the input gradient, with a float32 scale per row of each."""
    if precision == "fp32":
        return 4 * shape.parameters
    if precision == "bf16":
        return 2 * shape.parameters
    if precision == "nf4":
        return int(shape.linear_parameters * _NF4_BITS / 8) + 2 * shape.other_parameters
    scales = shape.num_hidden_layers * 4 * sum(outputs + inputs for outputs, inputs in shape.linear_layers.values())
    return 2 * shape.linear_parameters + scales + 2 * shape.other_parameters


def kept_by_layer(
    shape: Shape,
    lora_r: int,
    lora_targets: Targets,
    *,
    lora_dropout: float,
    element: int = 2,
    compiled: bool = False,
    repeated_keys: bool = False,
) -> dict[str, int]:
    """Bytes per token that autograd keeps of one block from its forward to its backward pass, by what they are.

    `element`: bytes of an activation, 2 under autocast. Frozen weights keep no input: only adapters do. A mask of dropout has one byte per
    element on CUDA. `compiled` is what PyTorch's partitioner keeps of a block that is one graph; prototypes of that on one H200 (Mistral
    Small 3.1's shape, q, k, v, o, no dropout) took 197 kB per token and block between 4k and 8k tokens in bf16 and fp8, and 203 kB between
    8k and 12k in nf4, where this gives 195.
    """
    names = target_names(lora_targets)
    hidden, inner, query = shape.hidden_size, shape.intermediate_size, shape.query_width
    key = query if repeated_keys else shape.key_width
    heads = (query + shape.key_width, shape.num_attention_heads + shape.num_key_value_heads) if shape.qk_norm else (0, 0)
    norm_element = element if compiled else 4  # its input as it came, or in float32
    return {
        "norms": 2 * (norm_element * hidden + 4) + norm_element * heads[0] + 4 * heads[1],
        "adapter inputs": _adapter_inputs(shape, names, element, lora_dropout > 0),
        "adapter ranks": element * lora_r * len(names),
        "attention": element * (2 * query + 2 * key) + 4 * shape.num_attention_heads,
        "mlp": (2 if compiled else 3) * element * inner,  # gate, up and, unless it is computed again, the SiLU of gate
    }


def _adapter_inputs(shape: Shape, names: Sequence[str], element: int, drops: bool) -> int:
    """With dropout each adapter has an input and a mask of its own. Without, q, k and v share one, gate and up another, and that of o is
    the attention's output, kept in any case."""
    if drops:
        return sum((element + 1) * shape.linear_layers[name][1] for name in names)
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
    return sum(element * shape.linear_layers[group[0]][1] for group in groups if set(group) & set(names))


def _passing_by_token(shape: Shape, element: int, let_go: int) -> int:
    """Per token, while the last block's backward pass runs on top of all that is kept: the gradients of the MLP's three inner tensors, less
    what is `let_go` by then, the last norm's input and that of the adapter on down_proj; or the first of these gradients alone."""
    return max(3 * element * shape.intermediate_size - let_go, element * (shape.intermediate_size + 2 * shape.hidden_size))


def _unpacked_bytes(shape: Shape, precision: Precision) -> int:
    """The largest matrix, brought from nf4 to bfloat16 for its product."""
    return 2 * max(outputs * inputs for outputs, inputs in shape.linear_layers.values()) if precision == "nf4" else 0


def usable_bytes(gpu_bytes: int) -> int:
    """What `MemoryEstimate.total` may reach on a GPU that reports this memory."""
    return int(gpu_bytes * (1 - _BETWEEN_BLOCKS) - _CONTEXT_BYTES)


@dataclass(frozen=True)
class MicroBatch:
    """What fits a GPU best: `tokens` per forward pass, and whether the blocks are computed again in the backward pass."""

    tokens: int
    gradient_checkpointing: bool
    memory: MemoryEstimate


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
    compiled: bool = False,
    repeated_keys: bool = False,
    shards: int = 1,
    gradient_checkpointing: bool | None = None,
) -> MicroBatch | None:
    """The largest micro-batch for a GPU that reports `gpu_bytes`; None when not even one post of `longest_post` tokens fits.

    Without recomputation where at least `WORTHWHILE_TOKENS` fit, unless `gradient_checkpointing` says which: recomputing costs half as much
    work again, a small micro-batch reads the weights more often. Tokens come in multiples of 256 below `most_tokens`.
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
            compiled=compiled,
            repeated_keys=repeated_keys,
        )

    def largest(again: bool) -> MicroBatch | None:
        available = usable_bytes(gpu_bytes)
        too_many = bisect_left(range(most_tokens + 1), True, key=lambda tokens: memory(tokens, again).total > available)
        fitting = too_many - 1
        tokens = fitting // TOKEN_QUANTUM * TOKEN_QUANTUM if fitting >= TOKEN_QUANTUM else fitting
        return MicroBatch(tokens, again, memory(tokens, again)) if tokens >= longest_post else None

    if gradient_checkpointing is not None:
        return largest(gradient_checkpointing)
    kept, again = largest(False), largest(True)
    if kept is not None and (kept.tokens >= min(WORTHWHILE_TOKENS, most_tokens) or again is None):
        return kept
    return again or kept
