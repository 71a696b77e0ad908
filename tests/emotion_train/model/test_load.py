from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emotion_train.bases.architecture import text_name
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.load import load_base, read_config
from tests.helpers.tiny_models import (
    causal_checkpoint,
    hidden,
    multimodal_checkpoint,
    text_config,
    write_checkpoint,
)
from tests.helpers.touched_tensors import note_touched


@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
@pytest.mark.parametrize("layout", ["hub", "current"])
def test_text_part_computes_what_the_whole_multimodal_model_computes(
    tmp_path: Path, layout: str, kind: str
) -> None:
    folder, whole = multimodal_checkpoint(tmp_path / "base", layout, kind)
    model, info = load_base(str(folder), "fp32", 5, "cpu")
    torch.testing.assert_close(hidden(model.model), hidden(whole.model.language_model), rtol=0, atol=1e-5)
    assert (info.layout, info.architecture) == ("multimodal", kind)
    assert info.parameters == sum(p.numel() for p in whole.model.language_model.parameters())
    assert not any(
        "vision" in name or "projector" in name or "lm_head" in name for name, _ in model.named_parameters()
    )


def test_vision_tensors_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = multimodal_checkpoint(tmp_path / "base")
    touched = note_touched(monkeypatch)
    load_base(str(folder), "fp32", 2, "cpu")
    assert touched
    assert all(key.startswith("language_model.model.") for key in touched)


@pytest.mark.parametrize(
    "kind", ["mistral", "llama", "qwen2", "qwen3", "gemma3_text", "qwen3_5_text", "ministral3"]
)
def test_plain_checkpoints_load_as_transformers_loads_them(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    folder = causal_checkpoint(tmp_path / "base", kind)
    model, info = load_base(str(folder), "fp32", 3, "cpu")
    torch.testing.assert_close(
        hidden(model.model),
        hidden(AutoModel.from_pretrained(folder, trust_remote_code=False).eval()),
        rtol=0,
        atol=1e-5,
    )
    assert info.layout == "text"
    assert model.config.use_cache is False


def test_classification_checkpoint_gives_its_base_and_not_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = text_config("llama", num_labels=9)
    old = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False).eval()
    folder = write_checkpoint(tmp_path / "base", config, dict(old.state_dict()))
    model, _ = load_base(str(folder), "fp32", 2, "cpu")
    torch.testing.assert_close(hidden(model.model), hidden(old.model), rtol=0, atol=1e-5)
    assert model.score.weight.shape == (2, 64)
    assert not model.score.weight.any()


def test_bare_backbone_checkpoint_loads(tmp_path: Path) -> None:
    from transformers import AutoModel

    backbone = AutoModel.from_config(text_config("mistral"), trust_remote_code=False).eval()
    folder = write_checkpoint(tmp_path / "base", backbone.config, dict(backbone.state_dict()), shards=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    model, _ = load_base(str(folder), "fp32", 2, "cpu")
    torch.testing.assert_close(hidden(model.model), hidden(backbone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", None),
        ("vision_tower.transformer.layers.0.attention.q_proj.weight", None),
        ("model.vision_tower.transformer.layers.0.attention.q_proj.weight", None),
        ("multi_modal_projector.norm.weight", None),
        ("model.multi_modal_projector.norm.weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("score.weight", None),
    ],
)
def test_names_of_text_tensors(key: str, name: str | None) -> None:
    assert text_name(key) == name


def edit_shard(folder: Path, edit: Any) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    weight_map = {
        key: file for key, file in json.loads(index.read_text())["weight_map"].items() if file != path.name
    }
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(state, path.name)}))


def lose_a_tensor(state: dict[str, torch.Tensor]) -> None:
    del state[next(key for key in state if key.endswith("proj.weight"))]


def gain_a_layer(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(128, 64)


def widen_a_layer(state: dict[str, torch.Tensor]) -> None:
    state[next(key for key in state if key.endswith("proj.weight"))] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lose_a_tensor, "lacks"),
        (gain_a_layer, "of no layer"),
        (widen_a_layer, "other shapes than its configuration"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Any, words: str
) -> None:
    folder = causal_checkpoint(tmp_path / "base")
    edit_shard(folder, edit)
    monkeypatch.setattr(
        "emotion_train.model.load.stream", lambda weights: pytest.fail("a tensor was asked for")
    )
    with pytest.raises(WrongRequest, match=words) as error:
        load_base(str(folder), "fp32", 2, "cpu")
    assert "(1 of 20 text tensors)" in str(error.value)
    assert "proj.weight" in str(error.value)


def test_shard_named_by_the_index_but_absent_is_refused(tmp_path: Path) -> None:
    folder = causal_checkpoint(tmp_path / "base")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WrongRequest, match=r"has no model-00002-of-00002\.safetensors"):
        load_base(str(folder), "fp32", 2, "cpu")


def test_damaged_shard_is_refused(tmp_path: Path) -> None:
    folder = causal_checkpoint(tmp_path / "base")
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WrongRequest, match="damaged"):
        load_base(str(folder), "fp32", 2, "cpu")


# --- requests that cannot be met ---


def test_base_that_does_not_exist_is_refused_in_one_sentence() -> None:
    with pytest.raises(WrongRequest, match="does not exist; give a checkpoint's folder"):
        read_config("./no/such/folder")


def test_unreachable_hub_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WrongRequest, match=r"someone/some-model is neither a folder here nor in the local hub cache"
    ):
        read_config("someone/some-model")


def test_base_in_the_hub_cache_loads_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    repo = tmp_path / "models--someone--small"
    causal_checkpoint(repo / "snapshots" / "abc", shards=1)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    snapshot = repo / "snapshots" / "abc"
    (snapshot / "model-00001-of-00001.safetensors").rename(snapshot / "model.safetensors")
    (snapshot / "model.safetensors.index.json").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_base("someone/small", "fp32", 2, "cpu")[1].name == "someone/small"
    assert PostTokenizer.load("someone/small", 16).bos_id == 1
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(WrongRequest, match="nor in the local hub cache, and HF_HUB_OFFLINE"):
        load_base("someone/small", "fp32", 2, "cpu")


def test_folder_without_config_or_with_pickles_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match=r"has no config\.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(text_config().to_json_string(use_diff=False))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WrongRequest, match=r"has no model\.safetensors"):
        load_base(str(tmp_path), "fp32", 2, "cpu")


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(WrongRequest, match="architecture gpt2; supported are llama, mistral, qwen2, qwen3"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(WrongRequest, match="architecture from_the_future; supported are llama"):
        read_config(str(tmp_path))


def test_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    config = {
        **text_config().to_dict(),
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongRequest, match="already quantised"):
        read_config(str(tmp_path))


def test_nf4_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = causal_checkpoint(tmp_path / "base")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(WrongRequest, match=r"pip install 'emotion-train\[gpu\]'"):
        load_base(str(folder), "nf4", 2, "cpu")


# --- number formats ---


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_formats_of_an_unquantised_base(tmp_path: Path, precision: Any) -> None:
    model, _ = load_base(str(causal_checkpoint(tmp_path / "base")), precision, 2, "cpu")
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {parameter.dtype for parameter in model.model.parameters()} == {wanted}
    assert model.score.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma3_text"])
def test_nf4_quantises_the_linear_layers_of_the_blocks_and_nothing_else(tmp_path: Path, kind: str) -> None:
    import bitsandbytes as bnb

    model, _ = load_base(str(causal_checkpoint(tmp_path / "base", kind)), "nf4", 2, "cpu")
    quantised = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - quantised == {"score"}
    assert len(quantised) == 2 * 7
    for name in quantised:
        layer = model.get_submodule(name)
        assert layer.support_avx512bf16_for_cpu is False
        assert (layer.weight.quant_state.nested, layer.weight.quant_type, layer.compute_dtype) == (
            True,
            "nf4",
            torch.bfloat16,
        )
    others = [
        p.dtype for n, p in model.named_parameters() if n.rpartition(".")[0] not in quantised | {"score"}
    ]
    assert set(others) == {torch.bfloat16}
    assert type(model.score) is nn.Linear


def test_nf4_codes_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    folder = causal_checkpoint(tmp_path / "base")
    ours, _ = load_base(str(folder), "nf4", 2, "cpu")
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=2,
        dtype=torch.bfloat16,
        quantization_config=recipe,
        device_map={"": "cpu"},
        trust_remote_code=False,
    )
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        mine, other = ours.get_submodule(name).weight, theirs.get_submodule(name).weight
        assert torch.equal(mine, other)
        assert torch.equal(mine.quant_state.absmax, other.quant_state.absmax)


def test_nf4_codes_can_be_stored_as_bfloat16_for_sharding(tmp_path: Path) -> None:
    folder = str(causal_checkpoint(tmp_path / "base"))
    plain, _ = load_base(folder, "nf4", 2, "cpu")
    shardable, _ = load_base(folder, "nf4", 2, "cpu", to_be_sharded=True)
    assert {parameter.dtype for parameter in shardable.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(hidden(shardable.model), hidden(plain.model), rtol=0, atol=0)


def test_identity_of_the_weights_is_the_same_for_every_precision_and_differs_between_bases(
    tmp_path: Path,
) -> None:
    folder = str(causal_checkpoint(tmp_path / "one", dtype=torch.bfloat16))
    identities = {
        load_base(folder, precision, 2, "cpu")[1].weights_sha256 for precision in ("fp32", "bf16", "nf4")
    }
    other = load_base(
        str(causal_checkpoint(tmp_path / "two", seed=1, dtype=torch.bfloat16)), "fp32", 2, "cpu"
    )[1]
    assert len(identities) == 1
    assert other.weights_sha256 not in identities
    assert other.shape_sha256 == read_config(folder).shape_sha256


@pytest.mark.gpu
def test_nf4_arrives_on_the_gpu_without_holding_more_than_it_needs(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "head_dim": 128,
    }
    folder = str(causal_checkpoint(tmp_path / "base", dtype=torch.bfloat16, **changes))
    load_base(folder, "nf4", 2, "cuda")  # bitsandbytes' own tables stay allocated
    gc.collect()  # a 4-bit weight and its layer hold each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, _ = load_base(folder, "nf4", 2, "cuda")
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before < 1.15 * held
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
