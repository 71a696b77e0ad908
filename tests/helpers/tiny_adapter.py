"""An adapter folder of two layers, whose head is drawn and not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.config import load_config
from emotion_train.model.facts import FACTS, LABELS, WEIGHTS, AdapterFacts
from emotion_train.storage.document import file_sha256
from tests.helpers.labelling_jobs import LABELS as NAMES

if TYPE_CHECKING:
    import torch


def write_adapter(folder: Path, real: bool = True, seed: int = 0, max_length: int = 96) -> Path:
    """`real`: with weights over a base beside it. Else only what is read before anything is loaded,
    which costs no torch.
    """
    lora = load_config(None, ["data.url=unused", "run.output_url=unused"]).lora
    if real:
        return _trained(folder, lora, seed, max_length)
    folder.mkdir(parents=True)
    facts = AdapterFacts(
        base="none",
        architecture="LlamaForCausalLM",
        layout="llama",
        base_shape_sha256="0" * 64,
        base_weights_sha256="0" * 64,
        precision="fp32",
        max_length=max_length,
        tokenizer_sha256="0" * 64,
        lora=lora,
        labels=NAMES,
    )
    (folder / FACTS).write_text(facts.model_dump_json(exclude={"labels"}))
    (folder / LABELS).write_text(json.dumps({"labels": NAMES}))
    (folder / WEIGHTS).write_bytes(b"none")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Give the adapter in this folder other weights, as if it had been saved with them."""
    from safetensors.torch import save_file

    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, "weights_sha256": file_sha256(folder / WEIGHTS)}))


def _trained(folder: Path, lora: object, seed: int, max_length: int) -> Path:
    import torch

    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.lora import build_classifier, save_adapter
    from tests.helpers.tiny_models import causal_checkpoint

    base = folder.parent / "base"
    if not base.exists():
        causal_checkpoint(base, "llama")
    model, info = build_classifier(str(base), "fp32", len(NAMES), lora, seed, torch.device("cpu"))  # type: ignore[arg-type]
    tokenizer = PostTokenizer.load(str(base), max_length)
    facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=lora, labels=NAMES)  # type: ignore[arg-type]
    save_adapter(model, folder, tokenizer=tokenizer, facts=facts)
    return folder
