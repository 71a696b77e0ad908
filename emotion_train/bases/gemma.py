"""Gemma 3's own fields in a config.json and a GGUF file.

Five of six layers see the last `sliding_window` tokens; the sixth sees the whole post, and rotates
positions by another base. transformers is not used, as in architecture.py, and a test compares
both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LAYER_TYPES = ("sliding_attention", "full_attention")
PATTERN = 6  # each sixth layer sees the whole post, unless a configuration says otherwise
# Settings that transformers does not compute, or not causally.
_OFF = ("use_bidirectional_attention", "attn_logit_softcapping")


def problem_of_gemma(given: Mapping[str, Any], layers: int, activations: tuple[str, ...]) -> str | None:
    """Why this configuration makes no causal text model, in a phrase after "cannot be used"; None
    where it does.
    """
    if given.get("hidden_activation", "silu") not in activations:
        return f"its hidden_activation {str(given['hidden_activation'])[:40]!r} is not known"
    for name in _OFF:
        if given.get(name):
            return f"its {name} is {str(given[name])[:40]}, and models of this kind are read without it"
    for name, default in (("sliding_window", 4096), ("query_pre_attn_scalar", 256)):
        if not _is_size(given.get(name, default)):
            return f"its {name} is {str(given[name])[:40]!r} and no whole number above 0"
    kinds = given.get("layer_types")
    if kinds is None:
        every = given.get("sliding_window_pattern", PATTERN)
        return None if _is_size(every) else f"its sliding_window_pattern is {str(every)[:40]!r}"
    if strange := next((one for one in kinds[:layers] if one not in LAYER_TYPES), None):
        return f"its layer_types have {str(strange)[:40]!r}"
    return _problem_of_rotations(given.get("rope_parameters") or {})


def _problem_of_rotations(rope: Mapping[str, Any]) -> str | None:
    if not all(isinstance(one, Mapping | None) for one in rope.values()):
        return "its rope_parameters is no object of objects"
    return None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


# --- GGUF ---

GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS_OF_27B = 62


def gguf_configuration(sizes: Mapping[str, Any], field: Callable[..., Any]) -> dict[str, Any]:
    """Gemma 3's configuration from a GGUF header; `field` reads one number of it, with a default.

    llama.cpp writes neither the pattern of layers nor the local rotation, which are the same in the
    whole family. It recognises the 27B, which scales queries differently, by its number of layers.
    https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma3.cpp
    """
    heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": field("rope.freq_base", 1_000_000.0)}
    if (factor := field("rope.scaling.factor", 1.0)) != 1.0:
        whole |= {"rope_type": "linear", "factor": factor}
    local = {"rope_type": "default", "rope_theta": field("rope.freq_base_swa", 10_000.0)}
    return {
        **sizes,
        "sliding_window": field("attention.sliding_window"),
        "layer_types": [LAYER_TYPES[(layer + 1) % PATTERN == 0] for layer in range(layers)],
        "query_pre_attn_scalar": (
            sizes["hidden_size"] // heads if layers == _LAYERS_OF_27B else sizes["head_dim"]
        ),
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
    }
