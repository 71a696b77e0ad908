"""The text model of Qwen3.5's config.json, with two kinds of blocks: most are gated delta nets,
which read a post from left to right into a state of fixed size, and each fourth attends to all of
it.

transformers is not used, as in architecture.py, and a test compares both. Vision and the blocks
that guess several tokens ahead (`mtp`) are never read; mixtures of experts are another kind.

Letters: H hidden size, I inner size, Q query width, K key width, D head size, C channels of the
convolution, W its width, N value heads of a delta net, V the width of all of them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

QWEN3_5 = "qwen3_5_text"
DELTA, ATTENTION = "linear_attention", "full_attention"
QWEN3_5_DEFAULTS = {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_SIZES = tuple(name for name in QWEN3_5_DEFAULTS if name.startswith("linear_"))
_OLD_NAMES = {"mamba": DELTA, "attention": ATTENTION}
# The layers of a delta net that are adapted where an attention's layers are. Queries, keys and
# values are one layer here; an attention's q_proj also makes the gate of its output, which is z in
# a delta net. The two small layers for the decay and the strength of a write (in_proj_a, in_proj_b)
# have no adapter.
_COUNTERPARTS = {
    "q_proj": ("in_proj_qkv", "in_proj_z"),
    "k_proj": ("in_proj_qkv",),
    "v_proj": ("in_proj_qkv",),
    "o_proj": ("out_proj",),
}


def with_kinds_of_blocks(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the kind of each block listed, as transformers fills it in: each
    fourth attends, unless `full_attention_interval` says otherwise.
    """
    kinds, every = values.get("layer_types"), values.get("full_attention_interval", 4)
    if kinds is None and _is_size(every) and _is_size(values["num_hidden_layers"]):
        blocks = range(1, values["num_hidden_layers"] + 1)
        kinds = [DELTA if block % every else ATTENTION for block in blocks]
    elif isinstance(kinds, list):
        kinds = [_OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    return {**values, "layer_types": kinds}


def problem_of_delta_nets(values: Mapping[str, Any]) -> str | None:
    """Why these values, filled in by `with_kinds_of_blocks`, make no model, in a phrase after
    "cannot be used"; None where they do.
    """
    for name in _SIZES:
        if not _is_size(values[name]):
            return f"its {name} is {str(values[name])[:40]!r} and no whole number above 0"
    keys, heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
    if heads % keys:
        return f"its linear_num_value_heads {heads} is no multiple of its linear_num_key_heads {keys}"
    kinds = values["layer_types"]
    if kinds is None:
        return f"its full_attention_interval is {str(values['full_attention_interval'])[:40]!r}"
    if strange := [kind for kind in kinds if kind not in (DELTA, ATTENTION)]:
        return f"its layer_types have {str(strange[0])[:40]!r}"
    return _problem_of_positions(values)


def _problem_of_positions(values: Mapping[str, Any]) -> str | None:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 0.25))
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        return f"its partial_rotary_factor is {str(share)[:40]!r} and no share of a head"
    sections = rope.get("mrope_section", [11, 11, 10])
    if not isinstance(sections, list) or len(sections) != 3 or not all(map(_is_size, sections)):
        return f"its mrope_section is {str(sections)[:40]!r} and not three whole numbers above 0"
    return None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


# --- tensors ---


def block_tensors(values: Mapping[str, Any], block: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of each tensor of one block."""
    hidden_H, inner_I = values["hidden_size"], values["intermediate_size"]
    yield from _delta_net(values) if values["layer_types"][block] == DELTA else _attention(values)
    yield "mlp.gate_proj.weight", (inner_I, hidden_H)
    yield "mlp.up_proj.weight", (inner_I, hidden_H)
    yield "mlp.down_proj.weight", (hidden_H, inner_I)
    yield "input_layernorm.weight", (hidden_H,)
    yield "post_attention_layernorm.weight", (hidden_H,)


def _attention(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden_H, head_D = values["hidden_size"], values["head_dim"]
    query_Q, key_K = values["num_attention_heads"] * head_D, values["num_key_value_heads"] * head_D
    for name, outputs, inputs in (
        ("q_proj", 2 * query_Q, hidden_H),  # beside each head's queries the gate of its output
        ("k_proj", key_K, hidden_H),
        ("v_proj", key_K, hidden_H),
        ("o_proj", hidden_H, query_Q),
    ):
        yield f"self_attn.{name}.weight", (outputs, inputs)
        if values.get("attention_bias"):
            yield f"self_attn.{name}.bias", (outputs,)
    yield "self_attn.q_norm.weight", (head_D,)
    yield "self_attn.k_norm.weight", (head_D,)


def _delta_net(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden_H, heads_N = values["hidden_size"], values["linear_num_value_heads"]
    values_V = heads_N * values["linear_value_head_dim"]
    channels_C = 2 * values["linear_num_key_heads"] * values["linear_key_head_dim"] + values_V
    for name, outputs, inputs in (
        ("in_proj_qkv", channels_C, hidden_H),
        ("in_proj_z", values_V, hidden_H),
        ("in_proj_b", heads_N, hidden_H),
        ("in_proj_a", heads_N, hidden_H),
        ("out_proj", hidden_H, values_V),
    ):
        yield f"linear_attn.{name}.weight", (outputs, inputs)
    yield "linear_attn.conv1d.weight", (channels_C, 1, values["linear_conv_kernel_dim"])
    yield "linear_attn.norm.weight", (values["linear_value_head_dim"],)
    yield "linear_attn.A_log", (heads_N,)
    yield "linear_attn.dt_bias", (heads_N,)


# --- adapters ---


def with_counterparts(names: Iterable[str]) -> tuple[str, ...]:
    """The names of adapted layers, followed by their counterparts in a delta net.

    >>> with_counterparts(("k_proj", "o_proj", "up_proj"))
    ('k_proj', 'o_proj', 'up_proj', 'in_proj_qkv', 'out_proj')
    """
    own = tuple(names)
    return tuple(dict.fromkeys((*own, *(other for name in own for other in _COUNTERPARTS.get(name, ())))))
