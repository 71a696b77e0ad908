"""A GGUF header read for training and for planning, against headers that the gguf package wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emotion_train.bases.gguf_file import GgufFile
from emotion_train.bases.licence import licence_of
from emotion_train.errors import WrongRequest
from emotion_train.model.load import read_config
from emotion_train.sizing.shape import Shape
from launch.workload import shape_of_base

gguf = pytest.importorskip("gguf")

SIZES = {
    "embedding_length": 96,
    "feed_forward_length": 160,
    "block_count": 3,
    "attention.head_count": 6,
    "context_length": 512,
}


def header(
    path: Path,
    architecture: str = "llama",
    vocabulary: int = 40,
    licence: str | None = None,
    **fields: int | None,
) -> Path:
    """A file with the sizes above and one tensor; a field None is left out, and `__` is a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    if licence is not None:
        writer.add_license(licence)
    for name, value in {**SIZES, **{key.replace("__", "."): value for key, value in fields.items()}}.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((vocabulary, 96), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("fields", "kv_heads", "head_dim"),
    [
        ({}, 6, 16),
        ({"attention__head_count_kv": 2}, 2, 16),
        ({"attention__key_length": 32}, 6, 32),
    ],
)
def test_training_and_planning_read_the_same_shape(
    tmp_path: Path, fields: dict[str, Any], kv_heads: int, head_dim: int
) -> None:
    path = str(header(tmp_path / "base.gguf", **fields))
    planned = shape_of_base(path)
    assert planned == Shape(96, 160, 3, 6, kv_heads, head_dim, 40)
    text = read_config(path).text
    assert Shape.of(text.to_dict()) == planned
    assert (text.max_position_embeddings, text.rope_parameters["rope_theta"]) == (512, 10_000)


@pytest.mark.parametrize(("named", "known"), [("gemma", "gemma"), ("<b>", None), (None, None)])
def test_the_licence_of_a_file_is_that_of_its_header(
    tmp_path: Path, named: str | None, known: str | None
) -> None:
    path = header(tmp_path / "base.gguf", licence=named)
    assert licence_of(str(path)) == known
    path.write_bytes(path.read_bytes()[:40])
    assert licence_of(str(path)) is None


def test_a_header_without_its_embedding_says_how_many_words_it_has() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": 7,
        **{f"llama.{k}": v for k, v in SIZES.items()},
    }
    whole = GgufFile(Path("base.gguf"), {**metadata, "llama.attention.layer_norm_rms_epsilon": 1e-5}, {})
    assert whole.config()["vocab_size"] == 7


@pytest.mark.parametrize("read", [read_config, shape_of_base])
@pytest.mark.parametrize(
    ("architecture", "fields", "says"),
    [
        ("qwen2", {}, r"has the GGUF architecture qwen2; supported are llama"),
        ("llama", {"expert_count": 8}, r"has experts, read from safetensors only"),
        ("llama", {"embedding_length": None}, r"lacks llama\.embedding_length; download it again"),
        ("llama", {"attention__head_count": None}, r"lacks llama\.attention\.head_count;"),
    ],
)
def test_a_model_that_cannot_be_trained_is_not_planned_for_either(
    tmp_path: Path, read: Callable[[str], object], architecture: str, fields: dict[str, Any], says: str
) -> None:
    path = header(tmp_path / "base.gguf", architecture, **fields)
    with pytest.raises(WrongRequest, match=says):
        read(str(path))
