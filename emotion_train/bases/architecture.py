"""The text model of a config.json: its kind, its sizes, and the tensors that its checkpoint must
have.

transformers is not used, since it would load torch and the launcher reads this too. Its defaults
for missing keys, and its refusals, are repeated here for the kinds that can be trained (for
encoders in encoders.py); a test compares both. Letters: V vocabulary, H hidden size, I inner size,
Q query width, K key width, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from emotion_train.bases.depth import blocks_read, cut_configuration
from emotion_train.bases.encoders import (
    ENCODERS,
    encoder_name,
    encoder_tensors,
    pooling_tensors,
    positions,
    problem_of,
    with_defaults,
)
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.gemma import problem_of_gemma
from emotion_train.bases.gguf_file import GgufFile
from emotion_train.bases.qwen3_5 import (
    QWEN3_5,
    QWEN3_5_DEFAULTS,
    block_tensors,
    problem_of_delta_nets,
    with_kinds_of_blocks,
)
from emotion_train.config import MOST_LAYERS
from emotion_train.errors import WrongRequest

# decoders, by their text part; all share the names of ATTENTION_PROJECTIONS and LINEAR_LAYERS
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", QWEN3_5, "ministral3")
_QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "ministral3": {
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
    },
    QWEN3_5: QWEN3_5_DEFAULTS,
}
# The text part's kind where a multimodal configuration does not name it.
_TEXT_KINDS = {
    **{"mistral3": "mistral", "llava": "llama", "llava_next": "llama", "vipllava": "llama"},
    "gemma3": "gemma3_text",
    "qwen3_5": QWEN3_5,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Sizes that may be null and are then derived.
_DERIVED = {
    "llama": ("num_key_value_heads", "head_dim"),
    "mistral": ("head_dim",),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads",),
    "gemma3_text": (),
    "ministral3": (),
    QWEN3_5: (),
}
_BIASED = ("llama", "qwen3", "gemma3_text")  # kinds whose attention may add biases
_LARGEST_SIZE = 2**31
# Functions between the two halves of an MLP, by transformers' names.
_ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_TEXT = re.compile(
    r"^(?:language_model\.model\.|model\.language_model\.|model\.)?(?=(?:embed_tokens|layers|norm)\.)"
)


@dataclass(frozen=True)
class TextModel:
    """The text part of a base. `layout` says how the model card's snippet must load it: "text",
    "multimodal" or "gguf". `values` is its configuration with defaults filled in.

    `layers` is the number of blocks to read where the base has more, `whole_layers`; None: all are
    read. Everything here is about the blocks to read.
    """

    kind: str
    layout: str
    values: Mapping[str, Any]
    gguf: GgufFile | None = None
    layers: int | None = None
    whole_layers: int | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.values["vocab_size"])

    @property
    def positions(self) -> int:
        """The number of tokens of the longest text that the base was made for."""
        if self.is_encoder:
            return positions(self.values)
        own = int(self.values["max_position_embeddings"])
        rope = _rope(self.values)
        first, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if isinstance(first, int) and isinstance(factor, int | float):
            return max(own, int(first * factor))
        return own

    @property
    def is_encoder(self) -> bool:
        """Whether each token sees the whole post, not only what comes before it."""
        return self.kind in ENCODERS

    def optional_tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each optional tensor; a checkpoint has all of them or none."""
        return pooling_tensors(self.values) if self.is_encoder else {}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the checkpoint's text part, by the classifier's names."""
        if self.is_encoder:
            return encoder_tensors(self.values)
        sizes = self.values
        hidden_H, vocab_V = sizes["hidden_size"], sizes["vocab_size"]
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocab_V, hidden_H),
            "model.norm.weight": (hidden_H,),
        }
        for layer in range(sizes["num_hidden_layers"]):
            own = block_tensors(sizes, layer) if self.kind == QWEN3_5 else self._of_a_layer()
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own}
        return shapes

    def _of_a_layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        sizes = self.values
        hidden_H, inner_I, head_D = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
        query_Q, key_K = sizes["num_attention_heads"] * head_D, sizes["num_key_value_heads"] * head_D
        biases = self._biases()
        for name, outputs, inputs in (
            ("self_attn.q_proj", query_Q, hidden_H),
            ("self_attn.k_proj", key_K, hidden_H),
            ("self_attn.v_proj", key_K, hidden_H),
            ("self_attn.o_proj", hidden_H, query_Q),
            ("mlp.gate_proj", inner_I, hidden_H),
            ("mlp.up_proj", inner_I, hidden_H),
            ("mlp.down_proj", hidden_H, inner_I),
        ):
            yield f"{name}.weight", (outputs, inputs)
            if name.rpartition(".")[2] in biases:
                yield f"{name}.bias", (outputs,)
        yield "input_layernorm.weight", (hidden_H,)
        yield "post_attention_layernorm.weight", (hidden_H,)
        if self.kind == "gemma3_text":
            yield "pre_feedforward_layernorm.weight", (hidden_H,)
            yield "post_feedforward_layernorm.weight", (hidden_H,)
        if self.kind in ("qwen3", "gemma3_text"):
            yield "self_attn.q_norm.weight", (head_D,)
            yield "self_attn.k_norm.weight", (head_D,)

    def _biases(self) -> tuple[str, ...]:
        """The linear layers that add a bias."""
        if self.kind == "qwen2":
            return ("q_proj", "k_proj", "v_proj")
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        inner = ("gate_proj", "up_proj", "down_proj")
        return (
            *(attention if self.kind in _BIASED and self.values.get("attention_bias") else ()),
            *(inner if self.kind == "llama" and self.values.get("mlp_bias") else ()),
        )


def text_model(files: BaseFiles) -> TextModel:
    """The text part of a base, from its config.json or its GGUF header. Raises `WrongRequest` for a
    base that cannot be trained here: another architecture, quantised weights, impossible sizes, or
    fewer blocks than asked for.
    """
    return _cut(_whole_text_model(files), files)


def _cut(model: TextModel, files: BaseFiles) -> TextModel:
    """The model with only the blocks to read."""
    there = int(model.values["num_hidden_layers"])
    whole = (files.staged.index.source_layers if files.staged is not None else None) or there
    layers = blocks_read(files.name, files.layers, there, whole)
    if layers == whole:
        return model
    values = cut_configuration(model.values, layers)
    return replace(model, values=values, layers=layers, whole_layers=whole)


def _whole_text_model(files: BaseFiles) -> TextModel:
    if files.gguf is not None:
        gguf = GgufFile.open(files.gguf)
        return _checked(files.name, "header", gguf.kind, "gguf", gguf.config(), gguf)
    document = files.config()
    if files.staged is None:  # a staged base's own base.json says what it holds
        _refuse_quantised(files.name, document)
    kind, layout, text = _text_part(files.name, document)
    return _checked(files.name, "config.json", kind, layout, text)


def kind_of(files: BaseFiles) -> str:
    """The kind of a base's text part. Raises `WrongRequest` for an unsupported kind."""
    if files.gguf is not None:
        return GgufFile.open(files.gguf).kind
    return _text_part(files.name, files.config())[0]


def _text_part(base: str, document: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """The kind, layout and configuration of the text part."""
    whole = document.get("model_type")
    if not isinstance(whole, str):
        raise WrongRequest(f"The config.json of the base {base} cannot be used: it names no model_type.")
    text = document.get("text_config")
    if whole in (*ARCHITECTURES, *ENCODERS) or text is None:
        layout, text, kind = "text", document, whole
        if whole == "mistral" and "layer_types" in document:
            kind = "ministral"  # as transformers takes it: its layers differ, and Mistral's do not
    elif isinstance(text, Mapping):
        layout, kind = "multimodal", text.get("model_type", _TEXT_KINDS.get(whole, whole))
    else:
        raise _unusable(base, "config.json", "its text_config is no object")
    if kind not in ARCHITECTURES and (kind not in ENCODERS or layout != "text"):
        raise WrongRequest(
            f"The base {base} has the architecture {str(kind)[:80]}; supported are"
            f" {', '.join(ARCHITECTURES)}, also as the text part of a multimodal model such as Mistral"
            f" Small 3.1, and the encoders {', '.join(ENCODERS)}."
        )
    return kind, layout, text


def already_quantised(base: str, how: str = "") -> WrongRequest:
    """The refusal of a checkpoint whose weights are codes."""
    return WrongRequest(
        f"The base {base} is already quantised{f' ({how})' if how else ''}; give the unquantised checkpoint"
        " that it was made from, and set model.precision=nf4 for a small one."
    )


def _refuse_quantised(base: str, document: Mapping[str, Any]) -> None:
    text = document.get("text_config")
    for part in (document, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if (found := part.get(key)) is not None:
                method = found.get("quant_method") if isinstance(found, Mapping) else None
                raise already_quantised(base, str(method)[:40] if method else "")


# --- sizes ---


def _checked(
    base: str, place: str, kind: str, layout: str, given: Mapping[str, Any], gguf: GgufFile | None = None
) -> TextModel:
    if kind in ENCODERS:
        return _checked_encoder(base, place, kind, given)
    nulls = {*_SIZES, *_DEFAULTS[kind]} - set(_DERIVED[kind])
    values = _DEFAULTS[kind] | {
        key: value for key, value in given.items() if value is not None or key in nulls
    }
    values["model_type"] = kind
    if "num_key_value_heads" in _DERIVED[kind] and given.get("num_key_value_heads", 1) is None:
        values.pop("num_key_value_heads", None)  # the default, which is for what is left out
    if "num_key_value_heads" not in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in _SIZES:
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST_SIZE:
            raise _unusable(base, place, f"its {name} is {str(value)[:40]!r} and no whole number above 0")
    if values["num_hidden_layers"] > MOST_LAYERS:
        raise _unusable(base, place, f"num_hidden_layers is {values['num_hidden_layers']}")
    if kind == QWEN3_5:
        values = with_kinds_of_blocks(values)
    if "head_dim" not in values:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    problem = _problem_of_heads(kind, values) or _problem_of_words(values)
    if kind == "gemma3_text":
        problem = problem or problem_of_gemma(given, values["num_hidden_layers"], _ACTIVATIONS)
    if kind == "ministral3":
        problem = problem or _problem_of_long_queries(values)
    if kind == QWEN3_5:
        problem = problem or problem_of_delta_nets(values)
    if problem:
        raise _unusable(base, place, problem)
    return TextModel(kind, layout, values, gguf)


def _checked_encoder(base: str, place: str, kind: str, given: Mapping[str, Any]) -> TextModel:
    values = with_defaults(kind, given)
    if problem := problem_of(kind, values, _ACTIVATIONS):
        raise _unusable(base, place, problem)
    if values["num_hidden_layers"] > MOST_LAYERS:
        raise _unusable(base, place, f"num_hidden_layers is {values['num_hidden_layers']}")
    return TextModel(kind, "text", values)


def _problem_of_heads(kind: str, values: Mapping[str, Any]) -> str | None:
    heads, keys, hidden = (
        values[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if kind in ("llama", "gemma3_text") and hidden % heads:
        return f"its hidden_size {hidden} is no multiple of its num_attention_heads {heads}"
    if heads % keys:
        return f"its num_attention_heads {heads} is no multiple of its num_key_value_heads {keys}"
    if values["head_dim"] < 2 or values["head_dim"] % 2:
        return f"its head_dim is {values['head_dim']}, which is not even"
    return None


def _problem_of_words(values: Mapping[str, Any]) -> str | None:
    activation = values.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        return f"its hidden_act {str(activation)[:40]!r} is not known"
    for name in ("attention_bias", "mlp_bias"):
        if not isinstance(values.get(name, False), bool):
            return f"its {name} is neither true nor false"
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name, {}), Mapping):
            return f"its {name} is no object"
    rope: Any = _rope(values)
    if not isinstance(rope, Mapping):
        return "its rope_parameters is no object of objects"
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) not in _ROPE_TYPES:
        return f"its rope_type {str(scaling)[:40]!r} is not known"
    layers = values.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or len(layers) != values["num_hidden_layers"]):
        return "its layer_types does not have one entry for each of its num_hidden_layers"
    return None


def _problem_of_long_queries(values: Mapping[str, Any]) -> str | None:
    """Why Ministral 3's scaling of queries cannot be computed; None where it can. It multiplies
    queries by how far their position exceeds those of its first training.
    """
    rope = dict(_rope(values))
    if not rope:  # transformers then takes the family's
        return None
    if rope.get("rope_type", rope.get("type")) in ("yarn", "llama3", "longrope"):
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    for name, least in (("original_max_position_embeddings", 1), ("llama_4_scaling_beta", 0)):
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            return f"its rope_parameters have the {name} {str(value)[:40]}"
    return None


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scaling of positions, under either transformers version's name; where layers have
    rotations of their own, the scaling of those that see the whole post.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    own: Mapping[str, Any] = rope.get("full_attention") or rope
    return own


def _unusable(base: str, place: str, why: str) -> WrongRequest:
    return WrongRequest(f"The {place} of the base {base} cannot be used: {why}; give a whole checkpoint.")


# --- names of tensors ---


def text_name(key: str, kind: str = ARCHITECTURES[0]) -> str | None:
    """The classifier's name of a tensor in the checkpoint of a base of this kind; None for vision,
    projector, language-model head and an old classification head. All decoders name alike.

    >>> text_name("language_model.model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    if kind in ENCODERS:
        return encoder_name(kind, key)
    if not _TEXT.match(key) or key.endswith("rotary_emb.inv_freq"):
        return None
    return _TEXT.sub("model.", key)


def refuse_other_tensors(base: str, model: TextModel, given: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `WrongRequest` unless a checkpoint has exactly the tensors of this model, and all or
    none of the optional ones.
    """
    optional = model.optional_tensors()
    refuse_misfits(base, model.tensors() | (optional if optional.keys() & given.keys() else {}), given)


def refuse_misfits(
    base: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `WrongRequest` unless a checkpoint has exactly the tensors that its model wants, in
    their shapes.
    """
    for problem, names in (
        ("lacks", sorted(wanted.keys() - given.keys())),
        ("has tensors of no layer that its configuration names:", sorted(given.keys() - wanted.keys())),
        (
            "has other shapes than its configuration says:",
            sorted(n for n in wanted.keys() & given.keys() if wanted[n] != given[n]),
        ),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise WrongRequest(
                f"The base {base} {problem} {shown} ({len(names)} of {len(wanted)} text tensors); give a"
                " whole checkpoint whose configuration belongs to its weights."
            )
