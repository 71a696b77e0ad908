"""The encoder of a config.json: its sizes, and the tensors that its checkpoint must and may have.

transformers is not used, as in architecture.py, and a test compares both. Other parts of a
checkpoint (language-model heads, an old head of labels, RoBERTa's pooler) are left out. The layers
between the pooled token and the head, which transformers calls pooler, dense or head, are used
where they are stored, and drawn anew where they are not.

Letters: V vocabulary, P positions, S kinds of segments, H hidden size, I inner size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")
ENCODER_PRECISIONS = ("bf16", "fp32")
_FIRST_WORDS = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_DEFAULTS: dict[str, dict[str, int]] = {
    "bert": _FIRST_WORDS,
    "roberta": {**_FIRST_WORDS, "vocab_size": 50_265, "pad_token_id": 1},
    "xlm-roberta": {**_FIRST_WORDS, "pad_token_id": 1},
    "modernbert": {
        "vocab_size": 50_368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
        "pad_token_id": 50_283,
    },
}
_SIZES = tuple(name for name in _FIRST_WORDS if name != "pad_token_id")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
# prefixes of a whole model's tensors in transformers
_PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "modernbert": "model."}
_BODY = {
    "bert": re.compile(r"(embeddings|encoder|pooler)\."),
    "roberta": re.compile(r"(embeddings|encoder)\."),
    "xlm-roberta": re.compile(r"(embeddings|encoder)\."),
    "modernbert": re.compile(r"(embeddings|layers|final_norm)\."),
}
_POOLING = {
    "roberta": re.compile(r"classifier\.dense\."),
    "xlm-roberta": re.compile(r"classifier\.dense\."),
    "modernbert": re.compile(r"head\."),
}
# numbers that are no weights, stored by old versions of transformers
_BUFFERS = re.compile(r"\.(position_ids|token_type_ids|inv_freq)$")
_OLD_NORM = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
_NEW_NORM = {"gamma": "weight", "beta": "bias"}


def with_defaults(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with transformers' defaults filled in."""
    values: dict[str, Any] = {**_DEFAULTS[kind], **given, "model_type": kind}
    if kind == "modernbert" and values.get("layer_types") is None and _is_size(values["num_hidden_layers"]):
        every = values.get("global_attn_every_n_layers", 3)
        if _is_size(every):
            values["layer_types"] = [
                _LAYER_TYPES[bool(layer % every)] for layer in range(values["num_hidden_layers"])
            ]
    return values


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def problem_of(kind: str, values: Mapping[str, Any], activations: tuple[str, ...]) -> str | None:
    """Why these values make no model, in a phrase after "cannot be used"; None where they do."""
    for name in _SIZES:
        if name in _DEFAULTS[kind] and not _is_size(values[name]):
            return f"its {name} is {str(values[name])[:40]!r} and no whole number above 0"
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if hidden % heads:
        return f"its hidden_size {hidden} is no multiple of its num_attention_heads {heads}"
    for name in ("hidden_act",) if kind != "modernbert" else ("hidden_activation", "classifier_activation"):
        if values.get(name, "gelu") not in activations:
            return f"its {name} {str(values[name])[:40]!r} is not known"
    return _problem_of_padding(kind, values) or (
        _problem_of_modernbert(values) if kind == "modernbert" else _problem_of_bert(values)
    )


def _problem_of_padding(kind: str, values: Mapping[str, Any]) -> str | None:
    pad, rows = values["pad_token_id"], values["vocab_size"]
    if pad is None and kind in ("bert", "modernbert"):
        return None
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < rows:
        return f"its pad_token_id is {str(pad)[:40]} and its embedding has the rows 0 to {rows - 1}"
    if positions(values) < 1:
        return f"its max_position_embeddings {values['max_position_embeddings']} leave no room for a token"
    return None


def _problem_of_bert(values: Mapping[str, Any]) -> str | None:
    for name in ("is_decoder", "add_cross_attention"):
        if values.get(name, False) is not False:
            return f"its {name} is {str(values[name])[:40]}, and only encoders are read of this kind"
    if values.get("position_embedding_type", "absolute") != "absolute":
        return f"its position_embedding_type is {str(values['position_embedding_type'])[:40]}, not absolute"
    return None


def _problem_of_modernbert(values: Mapping[str, Any]) -> str | None:
    if values["hidden_size"] // values["num_attention_heads"] % 2:
        return "its heads have an odd size"
    for name in _BIASES:
        if not isinstance(values.get(name, False), bool):
            return f"its {name} is neither true nor false"
    if not _is_size(values.get("local_attention", 128)):
        return f"its local_attention is {str(values['local_attention'])[:40]}"
    if values.get("classifier_pooling", "cls") not in ("cls", "mean"):
        return f"its classifier_pooling is {str(values['classifier_pooling'])[:40]}, neither cls nor mean"
    layers = values.get("layer_types")
    if not isinstance(layers, list) or len(layers) != values["num_hidden_layers"]:
        return "its layer_types does not have one entry for each of its num_hidden_layers"
    if strange := next((one for one in layers if one not in _LAYER_TYPES), None):
        return f"its layer_types have {str(strange)[:40]!r}"
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or not all(isinstance(one, Mapping | None) for one in rope.values()):
        return "its rope_parameters is no object of objects"
    return None


def positions(values: Mapping[str, Any]) -> int:
    """The tokens of the longest text. RoBERTa's first token has the position after padding's."""
    most = int(values["max_position_embeddings"])
    return most - int(values["pad_token_id"]) - 1 if "roberta" in values["model_type"] else most


# --- tensors ---


def encoder_tensors(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the checkpoint must have, by the classifier's names."""
    own = _of_modernbert(values) if values["model_type"] == "modernbert" else _of_bert(values)
    prefix = _PREFIX[values["model_type"]]
    return {prefix + name: shape for name, shape in own}


def pooling_tensors(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor between the pooled token and the head; a checkpoint has all of them
    or none.
    """
    kind, hidden_H = values["model_type"], values["hidden_size"]
    square, row = (hidden_H, hidden_H), (hidden_H,)
    if kind != "modernbert":
        layer = "bert.pooler.dense" if kind == "bert" else "classifier.dense"
        return {f"{layer}.weight": square, f"{layer}.bias": row}
    return {
        "head.dense.weight": square,
        **({"head.dense.bias": row} if values.get("classifier_bias") else {}),
        "head.norm.weight": row,
        **({"head.norm.bias": row} if values.get("norm_bias") else {}),
    }


def _of_bert(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden_H, inner_I = values["hidden_size"], values["intermediate_size"]
    for table, rows in (
        ("word", values["vocab_size"]),
        ("position", values["max_position_embeddings"]),
        ("token_type", values["type_vocab_size"]),
    ):
        yield f"embeddings.{table}_embeddings.weight", (rows, hidden_H)
    yield from _norm("embeddings.LayerNorm", hidden_H, True)
    for number in range(values["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.self.{name}", hidden_H, hidden_H, True)
        yield from _linear(f"{layer}.attention.output.dense", hidden_H, hidden_H, True)
        yield from _norm(f"{layer}.attention.output.LayerNorm", hidden_H, True)
        yield from _linear(f"{layer}.intermediate.dense", inner_I, hidden_H, True)
        yield from _linear(f"{layer}.output.dense", hidden_H, inner_I, True)
        yield from _norm(f"{layer}.output.LayerNorm", hidden_H, True)


def _of_modernbert(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden_H, inner_I = values["hidden_size"], values["intermediate_size"]
    attention, mlp, norm = (values.get(name, False) for name in ("attention_bias", "mlp_bias", "norm_bias"))
    yield "embeddings.tok_embeddings.weight", (values["vocab_size"], hidden_H)
    yield from _norm("embeddings.norm", hidden_H, norm)
    for number in range(values["num_hidden_layers"]):
        layer = f"layers.{number}"
        if number:  # the first has none
            yield from _norm(f"{layer}.attn_norm", hidden_H, norm)
        yield from _linear(f"{layer}.attn.Wqkv", 3 * hidden_H, hidden_H, attention)
        yield from _linear(f"{layer}.attn.Wo", hidden_H, hidden_H, attention)
        yield from _norm(f"{layer}.mlp_norm", hidden_H, norm)
        yield from _linear(f"{layer}.mlp.Wi", 2 * inner_I, hidden_H, mlp)
        yield from _linear(f"{layer}.mlp.Wo", hidden_H, inner_I, mlp)
    yield from _norm("final_norm", hidden_H, norm)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, size: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def encoder_name(kind: str, key: str) -> str | None:
    """The classifier's name of a checkpoint's tensor, with or without its model's prefix; None for
    a tensor that the classifier does not have.

    >>> encoder_name("bert", "encoder.layer.0.output.LayerNorm.gamma")
    'bert.encoder.layer.0.output.LayerNorm.weight'
    """
    if _BUFFERS.search(key):
        return None
    if kind in _POOLING and _POOLING[kind].match(key):
        return key
    own = key.removeprefix(_PREFIX[kind])
    if not _BODY[kind].match(own):
        return None
    return _PREFIX[kind] + _OLD_NORM.sub(lambda found: _NEW_NORM[found[1]], own)


def head_of(kind: str) -> str:
    """The name of the last layer of a classifier of this kind: its head of labels."""
    if kind not in ENCODERS:
        return "score"
    return "classifier.out_proj" if "roberta" in kind else "classifier"


def pooling_modules(kind: str) -> tuple[str, ...]:
    """The modules that are trained beside an adapter: the head, and an encoder's layers before
    it."""
    if kind not in ENCODERS:
        return ("score",)
    return {"bert": ("pooler", "classifier"), "modernbert": ("head", "classifier")}.get(kind, ("classifier",))
