"""The sizes of a base's text model, on which its memory and speed depend, from a config.json
without a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from emotion_train.bases.encoders import ENCODERS
from emotion_train.bases.qwen3_5 import (
    DELTA,
    QWEN3_5,
    QWEN3_5_DEFAULTS,
    with_counterparts,
    with_kinds_of_blocks,
)
from emotion_train.config import LARGEST_MAX_LENGTH, LINEAR_LAYERS
from emotion_train.config import Precision as Precision

Targets = Literal["all-linear"] | Sequence[str]
# layers with one input, which the fused decoder computes as one product
STACKS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class DeltaNets:
    """The blocks of a Qwen3.5 that are gated delta nets: their number and sizes. `width`: tokens
    that the convolution reads.
    """

    blocks: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    width: int

    @classmethod
    def of(cls, text: Mapping[str, Any]) -> DeltaNets:
        """The delta nets of a text configuration."""
        values = with_kinds_of_blocks(QWEN3_5_DEFAULTS | dict(text))
        sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
        return cls(values["layer_types"].count(DELTA), *(int(values[f"linear_{size}"]) for size in sizes))

    @property
    def values_width(self) -> int:
        return self.value_heads * self.value_size

    @property
    def channels(self) -> int:
        """Width of queries, keys and values together."""
        return 2 * self.key_heads * self.key_size + self.values_width

    @property
    def other_parameters(self) -> int:
        """Parameters of one block outside its linear layers and the norms that every block has."""
        return self.channels * self.width + self.value_size + 2 * self.value_heads


@dataclass(frozen=True)
class Shape:
    """The sizes of a base's text model.

    `positions`: rows of an encoder's table of positions and of its other small tables, 0 where
    positions are rotary; without such rows a block's MLP has a gate.

    `qk_norm`: queries and keys are normalised (Qwen3, Gemma 3). `block_norms`: norms of a hidden
    state in one block; Gemma 3 has four. `delta_nets`: the delta nets of a Qwen3.5; its other
    blocks compute a gate for the attention's output beside the queries. `fusable`: the fused
    decoder can compute these blocks on a GPU.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    qk_norm: bool = False
    fusable: bool = True
    is_encoder: bool = False
    positions: int = 0
    block_norms: int = 2
    delta_nets: DeltaNets | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """The shape from the content of a config.json, or its text part in a multimodal one. Raises
        `ValueError` that names a missing key.
        """
        text = config.get("text_config", config)
        missing = [
            key
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "vocab_size",
            )
            if key not in text
        ]
        if missing:
            raise ValueError(f"the model's configuration has no {missing[0]}")
        heads = int(text["num_attention_heads"])
        head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
        is_encoder = text.get("model_type") in ENCODERS
        is_hybrid = text.get("model_type") == QWEN3_5
        has_table = is_encoder and text.get("model_type") != "modernbert"
        return cls(
            hidden_size=int(text["hidden_size"]),
            intermediate_size=int(text["intermediate_size"]),
            num_hidden_layers=int(text["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocab_size=int(text["vocab_size"]),
            qk_norm=text.get("model_type") in ("qwen3", "gemma3_text") or is_hybrid,
            fusable=_fusable(text, head_dim) and not is_encoder,
            is_encoder=is_encoder,
            positions=(
                int(text.get("max_position_embeddings", 512)) + int(text.get("type_vocab_size", 2))
                if has_table
                else 0
            ),
            block_norms=4 if text.get("model_type") == "gemma3_text" else 2,
            delta_nets=DeltaNets.of(text) if is_hybrid else None,
        )

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of one block; of an attending block in a
        Qwen3.5.
        """
        hidden, gated = self.hidden_size, 1 if self.delta_nets is None else 2
        return {
            "q_proj": (gated * self.query_width, hidden),
            "k_proj": (self.key_width, hidden),
            "v_proj": (self.key_width, hidden),
            "o_proj": (hidden, self.query_width),
            **self._mlp_layers(),
        }

    @cached_property
    def delta_layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of a block that is a delta net."""
        if (nets := self.delta_nets) is None:
            return {}
        hidden = self.hidden_size
        return {
            "in_proj_qkv": (nets.channels, hidden),
            "in_proj_z": (nets.values_width, hidden),
            "in_proj_b": (nets.value_heads, hidden),
            "in_proj_a": (nets.value_heads, hidden),
            "out_proj": (hidden, nets.values_width),
            **self._mlp_layers(),
        }

    def _mlp_layers(self) -> dict[str, tuple[int, int]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        gate = {} if self.positions else {"gate_proj": (inner, hidden)}
        return {**gate, "up_proj": (inner, hidden), "down_proj": (hidden, inner)}

    @property
    def blocks(self) -> tuple[tuple[int, dict[str, tuple[int, int]]], ...]:
        """The number of attending blocks and of delta nets, each with its linear layers."""
        nets = 0 if self.delta_nets is None else self.delta_nets.blocks
        found = ((self.num_hidden_layers - nets, self.linear_layers), (nets, self.delta_layers))
        return tuple((count, layers) for count, layers in found if count)

    @cached_property
    def stacked_layers(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each product of one block in the fused decoder, in the order of
        `STACKS`.
        """
        layers = self.linear_layers
        return [(sum(layers[name][0] for name in stack), layers[stack[0]][1]) for stack in STACKS]

    @property
    def largest_stack(self) -> int:
        """Weights of the largest of these products."""
        return max(outputs * inputs for outputs, inputs in self.stacked_layers)

    @cached_property
    def linear_parameters(self) -> int:
        """Linear parameters of all blocks; 2 x these x tokens is the floating-point work of a
        forward pass, and as much once more for the input gradients.
        """
        return sum(
            count * outputs * inputs for count, layers in self.blocks for outputs, inputs in layers.values()
        )

    @property
    def other_parameters(self) -> int:
        """Parameters of embedding and norms, which are never quantised; in an encoder also biases
        and the layers before its head.
        """
        if self.is_encoder:
            biases = sum(outputs for outputs, _ in self.linear_layers.values()) if self.positions else 0
            norms = (2 if self.positions else 1) * 2 * self.hidden_size
            return (
                (self.vocab_size + self.positions + self.hidden_size) * self.hidden_size
                + self.num_hidden_layers * (norms + biases)
                + (3 if self.positions else 2) * self.hidden_size
            )
        nets = self.delta_nets
        heads = 2 * self.head_dim if self.qk_norm else 0
        return (
            self.vocab_size * self.hidden_size
            + self.num_hidden_layers * self.block_norms * self.hidden_size
            + (self.num_hidden_layers - (0 if nets is None else nets.blocks)) * heads
            + (0 if nets is None else nets.blocks * nets.other_parameters)
            + self.hidden_size
        )

    @property
    def parameters(self) -> int:
        """Parameters of the text classifier without its head."""
        return self.linear_parameters + self.other_parameters

    def trained_parameters(self, lora_r: int, lora_targets: Targets, labels: int) -> int:
        """Parameters of adapter and head; in an encoder also the layers before its head."""
        if not self.is_encoder:
            names = with_counterparts(target_names(lora_targets))
            adapters = sum(
                count * sum(sum(layers[name]) for name in names if name in layers)
                for count, layers in self.blocks
            )
            return lora_r * adapters + labels * self.hidden_size
        layers = self.linear_layers
        adapted = [layers[name] for name in target_names(lora_targets) if name in layers]
        if not self.positions:  # ModernBERT stores the layers of a stack as one
            adapted = [
                layer
                for names, layer in zip(STACKS, self.stacked_layers, strict=True)
                if set(names) & set(target_names(lora_targets))
            ]
        heads = (self.hidden_size + labels) * (self.hidden_size + 1)
        return self.num_hidden_layers * lora_r * sum(map(sum, adapted)) + heads

    def all_parameters(self, labels: int) -> int:
        """Every weight, head included."""
        return self.parameters + labels * (self.hidden_size + 1)


def _fusable(text: Mapping[str, Any], head_dim: int) -> bool:
    """Whether the fused decoder computes such blocks: Llama's and Mistral's without biases. A GGUF
    header names no kind and counts as a Llama. Ministral 3 scales queries beyond the positions of
    its first training, so it counts only where no post can reach them.
    """
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if rope.get("original_max_position_embeddings", LARGEST_MAX_LENGTH) < LARGEST_MAX_LENGTH:
        kinds: tuple[str, ...] = ("llama", "mistral")
    else:
        kinds = ("llama", "mistral", "ministral3")
    biases = text.get("attention_bias", False) or text.get("mlp_bias", False)
    plain = text.get("model_type", "llama") in kinds and text.get("hidden_act", "silu") == "silu"
    return plain and not biases and head_dim in (16, 32, 64, 128)


def target_names(lora_targets: Targets) -> tuple[str, ...]:
    """Names of the adapted linear layers of a block; all-linear is all seven, never the head."""
    if lora_targets == "all-linear":
        return LINEAR_LAYERS
    return tuple(lora_targets)


def layer_names(lora_targets: Targets, kind: str) -> tuple[str, ...]:
    """Names of the adapted linear layers in the blocks of a decoder of this kind; for a Qwen3.5
    also in its delta nets.
    """
    names = target_names(lora_targets)
    return with_counterparts(names) if kind == QWEN3_5 else names
