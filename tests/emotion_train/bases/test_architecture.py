"""Tensors, sizes and refusals that are told without transformers are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emotion_train.bases.architecture import _ACTIVATIONS, _ROPE_TYPES, ARCHITECTURES, TextModel, text_model
from emotion_train.bases.encoders import ENCODERS
from emotion_train.bases.files import BaseFiles
from emotion_train.errors import WrongRequest
from emotion_train.model.load import _configuration, parameters_of, read_config, skeleton
from tests.helpers.tiny_models import gguf_base, text_config

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def written(folder: Path, document: dict[str, Any]) -> BaseFiles:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    return BaseFiles.find(str(folder))


def theirs(files: BaseFiles) -> tuple[dict[str, tuple[int, ...]], int]:
    config = read_config(files).text
    return parameters_of(skeleton(config, 2)), config.max_position_embeddings


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {},  # two layers of every default
        SMALL | {"vocab_size": 100},
        SMALL | {"head_dim": 32, "attention_bias": True, "mlp_bias": True},
        SMALL | {"max_position_embeddings": 77},
    ],
)
def test_tensors_and_positions_are_those_of_transformers(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    files = written(tmp_path, {"model_type": kind, "num_hidden_layers": 2, **changes})
    found = text_model(files)
    assert (found.tensors(), found.positions) == theirs(files)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
def test_a_size_that_is_null_is_derived_where_transformers_derives_it(
    tmp_path: Path, kind: str, key: str
) -> None:
    files = written(tmp_path, {"model_type": kind, "num_hidden_layers": 1, **SMALL, key: None})
    try:
        found = text_model(files)
    except WrongRequest:  # transformers refuses it, or fails on it when it makes the model
        with pytest.raises((WrongRequest, TypeError)):
            skeleton(_configuration(str(tmp_path), files.config()), 2)
    else:
        assert found.tensors() == theirs(files)[0]


HYBRID = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
WHOLE, LINEAR = "full_attention", "linear_attention"


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, [LINEAR, LINEAR, LINEAR, WHOLE, LINEAR]),
        ({"full_attention_interval": 2}, [LINEAR, WHOLE, LINEAR, WHOLE, LINEAR]),
        ({"layer_types": [WHOLE] * 5, "full_attention_interval": 3}, [WHOLE] * 5),
        ({"layer_types": None, "full_attention_interval": 1}, [WHOLE] * 5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 1}}, None),
        ({"attention_bias": True, "partial_rotary_factor": 0.5}, None),
    ],
)
def test_each_block_of_a_qwen3_5_has_the_kind_and_the_tensors_that_it_has_for_transformers(
    tmp_path: Path, changes: dict[str, Any], kinds: list[str] | None
) -> None:
    document = {"model_type": "qwen3_5_text", "num_hidden_layers": 5, **SMALL, **HYBRID, **changes}
    for whole in (document, {"model_type": "qwen3_5", "text_config": document}):
        files = written(tmp_path, whole)
        found, config = text_model(files), read_config(files).text
        assert found.tensors() == parameters_of(skeleton(config, 2))
        assert found.values["layer_types"] == config.layer_types
        assert kinds is None or kinds == config.layer_types
    text = document.copy()
    del text["model_type"]
    assert text_model(written(tmp_path, {"model_type": "qwen3_5", "text_config": text})).kind == (
        "qwen3_5_text"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_key_head_dim": None}, "its linear_key_head_dim is 'None' and no whole number above 0"),
        ({"linear_conv_kernel_dim": 0}, "its linear_conv_kernel_dim is '0'"),
        ({"head_dim": None}, "its head_dim is 'None'"),
        ({"num_key_value_heads": None}, "its num_key_value_heads is 'None'"),
        ({"linear_num_value_heads": 7}, "7 is no multiple of its linear_num_key_heads 3"),
        ({"full_attention_interval": 0}, "its full_attention_interval is '0'"),
        ({"layer_types": [LINEAR]}, "one entry for each of its num_hidden_layers"),
        ({"layer_types": [LINEAR, "sliding_attention"]}, "its layer_types have 'sliding_attention'"),
        ({"layer_types": [LINEAR, [WHOLE]]}, "its layer_types have"),
        ({"partial_rotary_factor": 2.0}, r"its partial_rotary_factor is '2\.0' and no share of a head"),
        ({"rope_parameters": {"partial_rotary_factor": "x"}}, "its partial_rotary_factor is 'x'"),
        ({"rope_parameters": {"mrope_section": [11, 11]}}, "and not three whole numbers above 0"),
        ({"model_type": "qwen3_5_moe_text"}, "architecture qwen3_5_moe_text; supported are llama, mistral"),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}},
            "has the architecture qwen3_5_moe_text; supported are",
        ),
        ({"model_type": "qwen3_next"}, "has the architecture qwen3_next"),
    ],
)
def test_a_qwen3_5_that_makes_no_model_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    document = {"model_type": "qwen3_5_text", "num_hidden_layers": 2, **SMALL, **HYBRID, **changes}
    files = written(tmp_path, document)
    with pytest.raises(WrongRequest, match=words) as caught:
        text_model(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},  # two layers of every default
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 99}
        | {"pad_token_id": 3, "max_position_embeddings": 40, "type_vocab_size": 3},
        {"norm_bias": True, "mlp_bias": True, "attention_bias": True, "classifier_bias": True},
        {"global_attn_every_n_layers": 2},
    ],
)
def test_an_encoder_s_tensors_are_those_of_transformers(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    files = written(tmp_path, {"model_type": kind, "num_hidden_layers": 2, **changes})
    found, config = text_model(files), read_config(files).text
    assert found.tensors() | found.optional_tensors() == parameters_of(skeleton(config, 2))
    assert found.values.get("layer_types") == getattr(config, "layer_types", None)
    before = config.pad_token_id + 1 if "roberta" in kind else 0  # RoBERTa's first position
    assert found.positions == config.max_position_embeddings - before


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bert", {"hidden_size": None}, "its hidden_size is 'None'"),
        ("bert", {"type_vocab_size": 0}, "its type_vocab_size is '0'"),
        ("bert", {"num_attention_heads": 5}, "768 is no multiple of its num_attention_heads 5"),
        ("bert", {"hidden_act": "gelly"}, "its hidden_act 'gelly' is not known"),
        ("bert", {"is_decoder": True}, "its is_decoder is True, and only encoders"),
        ("roberta", {"position_embedding_type": "relative_key"}, "relative_key, not absolute"),
        ("roberta", {"pad_token_id": None}, "its pad_token_id is None"),
        ("xlm-roberta", {"max_position_embeddings": 2}, "leave no room for a token"),
        ("bert", {"vocab_size": 20, "pad_token_id": 20}, "embedding has the rows 0 to 19"),
        ("bert", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ("modernbert", {"hidden_size": 36}, "its heads have an odd size"),
        ("modernbert", {"norm_bias": "no"}, "its norm_bias is neither true nor false"),
        ("modernbert", {"classifier_pooling": "max"}, "max, neither cls nor mean"),
        ("modernbert", {"layer_types": ["full_attention"]}, "one entry for each"),
        (
            "modernbert",
            {"layer_types": ["chunked_attention"] * 22},
            "its layer_types have 'chunked_attention'",
        ),
        ("modernbert", {"rope_parameters": [1]}, "no object of objects"),
        ("modernbert", {"local_attention": 0}, "its local_attention is 0"),
    ],
)
def test_an_encoder_s_configuration_that_makes_no_model_is_refused_in_one_sentence(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(WrongRequest, match=words) as caught:
        text_model(written(tmp_path, {"model_type": kind, **changes}))
    assert "\n" not in str(caught.value)


def test_queries_of_ministral_3_are_scaled_where_its_configuration_leaves_out_how(tmp_path: Path) -> None:
    """transformers then takes the family's positions, and with yarn alone the longest for the
    first training's.
    """
    files = written(tmp_path, {"model_type": "ministral3", **SMALL, "num_hidden_layers": 1})
    assert text_model(files).positions == theirs(files)[1] == 262_144
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "llama_4_scaling_beta": 0.1}
    short = {"max_position_embeddings": 512, "rope_parameters": rope}
    files = written(tmp_path, {"model_type": "ministral3", **SMALL, "num_hidden_layers": 1, **short})
    assert text_model(files).positions == 512
    assert read_config(files).text.rope_parameters["original_max_position_embeddings"] == 512


@pytest.mark.parametrize("text", [{"model_type": "mistral"}, {}])
def test_the_text_part_of_a_multimodal_model_is_that_of_transformers(
    tmp_path: Path, text: dict[str, Any]
) -> None:
    document = {"model_type": "mistral3", "text_config": {**SMALL, "num_hidden_layers": 1, **text}}
    files = written(tmp_path, document)
    found = text_model(files)
    assert (found.kind, found.layout) == ("mistral", "multimodal")
    assert (found.tensors(), found.positions) == theirs(files)


def test_a_gguf_header_names_what_its_model_has() -> None:
    files = BaseFiles.find(gguf_base())
    assert text_model(files).tensors() == theirs(files)[0]


def test_positions_of_a_base_that_was_stretched() -> None:
    def positions(**rope: Any) -> int:
        return TextModel("llama", "text", {"max_position_embeddings": 2048, "rope_scaling": rope}).positions

    assert positions() == 2048
    assert positions(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048) == 8192
    assert positions(rope_type="llama3", factor=8.0, original_max_position_embeddings=128) == 2048


def test_names_of_activations_and_of_rotary_positions_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(_ACTIVATIONS) <= ACT2FN.keys()
    assert {"silu", "gelu", "relu"} <= set(_ACTIVATIONS)
    assert ROPE_INIT_FUNCTIONS.keys() | {"default"} == set(_ROPE_TYPES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "it names no model_type"),
        ({"model_type": "gpt2"}, "has the architecture gpt2; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": "deberta-v2"}, "and the encoders bert, roberta, xlm-roberta, modernbert"),
        ({"model_type": "llava", "text_config": {"model_type": "bert"}}, "has the architecture bert"),
        ({"model_type": "llava", "text_config": {"model_type": "gpt2"}}, "has the architecture gpt2"),
        ({"model_type": "llava", "text_config": [1]}, "its text_config is no object"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "the architecture ministral"),
        ({"hidden_size": "64"}, "its hidden_size is '64' and no whole number above 0"),
        ({"num_hidden_layers": 0}, "its num_hidden_layers is '0'"),
        ({"vocab_size": True}, "its vocab_size is 'True'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_attention_heads": 5, "head_dim": 16}, "is no multiple of its num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "is no multiple of its num_key_value_heads 3"),
        ({"head_dim": 15}, "its head_dim is 15, which is not even"),
        ({"hidden_act": "sillu"}, "its hidden_act 'sillu' is not known"),
        ({"hidden_act": ["silu"]}, "is not known"),
        ({"attention_bias": "no"}, "its attention_bias is neither true nor false"),
        ({"rope_scaling": 3}, "its rope_scaling is no object"),
        ({"rope_parameters": {"rope_type": "ropey"}, "rope_scaling": None}, "its rope_type 'ropey'"),
        ({"layer_types": ["full_attention"]}, "one entry for each of its num_hidden_layers"),
        (
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "the llama_4_scaling_beta None",
        ),
        (
            {"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0.1}},
            "the original_max_position_embeddings None",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"already quantised \(fp8\)"),
        ({"quantization_config": {"load_in_4bit": True}}, "is already quantised;"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "already quantised"),
        (
            {"model_type": "mistral3", "text_config": {"quantization_config": {"quant_method": "awq"}}},
            r"already quantised \(awq\)",
        ),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    document = {**text_config("llama").to_dict(), **changes}
    with pytest.raises(WrongRequest, match=words) as caught:
        text_model(written(tmp_path, document))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"],
)
def test_a_config_json_that_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WrongRequest, match=r"config\.json of the base \S+ cannot be used") as caught:
        text_model(BaseFiles.find(str(tmp_path)))
    assert ("git lfs pull" in str(caught.value)) == content.startswith(b"version")
