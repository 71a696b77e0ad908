"""The sizes of a base's text model: what its memory and its speed depend on, read from a
config.json without a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from emotion_train.bases.encoders import ENCODERS
from emotion_train.config import LARGEST_MAX_LENGTH, LINEAR_LAYERS
from emotion_train.config import Precision as Precision

Targets = Literal["all-linear"] | Sequence[str]
# layers with one input, which the fused decoder computes as one product
STACKS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Shape:
    """The text model of a base, as far as its size depends on it.

    `positions`: rows of an encoder's table of positions and of its other small tables, 0 where
    positions are rotary. `is_encoder`: a block's MLP has a gate where there are no such rows.

    `qk_norm`: queries and keys are normalised (Qwen3, Gemma 3). `block_norms`: norms of a hidden
    state in one block, of which Gemma 3 has four. `fusable`: its blocks are such that the
    fused decoder can compute them on a GPU.
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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From the content of a config.json; of a multimodal one the text part. Raises `ValueError`
        naming the key that is missing.
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
        has_table = is_encoder and text.get("model_type") != "modernbert"
        return cls(
            hidden_size=int(text["hidden_size"]),
            intermediate_size=int(text["intermediate_size"]),
            num_hidden_layers=int(text["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocab_size=int(text["vocab_size"]),
            qk_norm=text.get("model_type") in ("qwen3", "gemma3_text"),
            fusable=_fusable(text, head_dim) and not is_encoder,
            is_encoder=is_encoder,
            positions=(
                int(text.get("max_position_embeddings", 512)) + int(text.get("type_vocab_size", 2))
                if has_table
                else 0
            ),
            block_norms=4 if text.get("model_type") == "gemma3_text" else 2,
        )

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of one block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        gate = {} if self.positions else {"gate_proj": (inner, hidden)}
        return {
            "q_proj": (self.query_width, hidden),
            "k_proj": (self.key_width, hidden),
            "v_proj": (self.key_width, hidden),
            "o_proj": (hidden, self.query_width),
            **gate,
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @cached_property
    def stacked_layers(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each of one block's products by the fused decoder, in the order of
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
        return self.num_hidden_layers * sum(
            outputs * inputs for outputs, inputs in self.linear_layers.values()
        )

    @property
    def other_parameters(self) -> int:
        """Embedding and norms, which are never quantised; of an encoder also biases and what lies
        before its head.
        """
        if self.is_encoder:
            biases = sum(outputs for outputs, _ in self.linear_layers.values()) if self.positions else 0
            norms = (2 if self.positions else 1) * 2 * self.hidden_size
            return (
                (self.vocab_size + self.positions + self.hidden_size) * self.hidden_size
                + self.num_hidden_layers * (norms + biases)
                + (3 if self.positions else 2) * self.hidden_size
            )
        heads = 2 * self.head_dim if self.qk_norm else 0
        return (
            self.vocab_size * self.hidden_size
            + self.num_hidden_layers * (self.block_norms * self.hidden_size + heads)
            + self.hidden_size
        )

    @property
    def parameters(self) -> int:
        """Parameters of the text classifier without its head."""
        return self.linear_parameters + self.other_parameters

    def trained_parameters(self, lora_r: int, lora_targets: Targets, labels: int) -> int:
        """Adapter and head, of an encoder also what lies before its head."""
        layers = self.linear_layers
        adapted = [layers[name] for name in target_names(lora_targets) if name in layers]
        if not self.is_encoder:
            return self.num_hidden_layers * lora_r * sum(map(sum, adapted)) + labels * self.hidden_size
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
    header, which names no kind here, is a Llama. Ministral 3 multiplies queries beyond its first
    training's positions, which no post may reach then.
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
