"""The memory plan against what autograd keeps of the program's own layers, and against figures
measured on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import emotion_train.model
from emotion_train.bases.encoders import ENCODERS
from emotion_train.config import ATTENTION_PROJECTIONS, LINEAR_LAYERS, LoraSection
from emotion_train.model.attention import HAS_GQA, Segments
from emotion_train.model.attention import is_fused as is_fused_attention
from emotion_train.model.dropout import Counters
from emotion_train.model.fused import FusedDecoder, fits
from emotion_train.model.graphs import GraphedPasses
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import build_classifier
from emotion_train.sizing.activations import (
    FusedBlocks,
    delta_kept_by_layer,
    fused_overhead,
    stock_kept_by_layer,
)
from emotion_train.sizing.fit import Layout, largest_microbatch
from emotion_train.sizing.memory import GIB, estimate, is_fused, is_recorded, usable_bytes, weight_bytes
from emotion_train.sizing.recipe import Recipe, repeats_keys
from emotion_train.sizing.shape import Precision, Shape, Targets, target_names
from tests.helpers import empty_kernels, plain_kernels
from tests.helpers.tiny_models import OWN, causal_checkpoint, encoder_checkpoint, text_config

MISTRAL_SMALL = Shape(5120, 32_768, 40, 32, 8, 128, 131_072)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
NARROW = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
}

ONE_WINDOW = {**NARROW, "sliding_window_pattern": 6, "sliding_window": 512}  # no masks, one rotation
STOCK_KINDS = [("mistral", SMALL), ("llama", NARROW), ("qwen3", SMALL), ("gemma3_text", ONE_WINDOW)]


# of a base that multiplies queries from the 8,192nd position on, which no post reaches
STRETCHED = {**OWN["ministral3"]["rope_parameters"], "original_max_position_embeddings": 8192}


def recipe_of(
    shape: Shape,
    precision: Precision = "bf16",
    targets: Targets = ATTENTION_PROJECTIONS,
    dropout: float = 0.05,
    r: int = 16,
    labels: int = 15,
    **more: Any,
) -> Recipe:
    lora = LoraSection.model_validate({"r": r, "dropout": dropout, "targets": targets})
    return Recipe(shape, precision, lora, labels, **more)


def test_the_real_model_has_its_published_number_of_parameters() -> None:
    vision_and_language_head = 24_011_361_280 - 22_901_324_800
    head_of_two_labels = 2 * 5120  # the count of the text classifier was made with one
    assert MISTRAL_SMALL.parameters + head_of_two_labels + vision_and_language_head == 24_011_361_280
    assert MISTRAL_SMALL.trained_parameters(16, ATTENTION_PROJECTIONS, 15) == 19_737_600
    assert weight_bytes(MISTRAL_SMALL, "nf4") / GIB == pytest.approx(11.93, abs=0.01)
    assert weight_bytes(MISTRAL_SMALL, "bf16") / GIB == pytest.approx(42.66, abs=0.01)


@pytest.mark.parametrize(
    ("layers", "precision", "targets", "dropout", "tokens", "measured_gib"),
    [
        (40, "nf4", ATTENTION_PROJECTIONS, 0.05, 8192, 65.3),  # the whole program
        (4, "bf16", ATTENTION_PROJECTIONS, 0.0, 8192, 9.3),
        (4, "bf16", "all-linear", 0.0, 8192, 9.5),
        (4, "nf4", ATTENTION_PROJECTIONS, 0.0, 8192, 6.9),
        (4, "fp8", ATTENTION_PROJECTIONS, 0.0, 8192, 9.4),
        (4, "fp8", ATTENTION_PROJECTIONS, 0.0, 4096, 6.8),
    ],
)
def test_peaks_of_the_fused_decoder_measured_on_one_h100_are_predicted(
    layers: int, precision: Precision, targets: Targets, dropout: float, tokens: int, measured_gib: float
) -> None:
    shape = (
        MISTRAL_SMALL if layers == 40 else replace(MISTRAL_SMALL, num_hidden_layers=layers, vocab_size=4096)
    )
    planned = estimate(recipe_of(shape, precision, targets, dropout), tokens, False)
    assert planned.total / GIB == pytest.approx(measured_gib, rel=0.02)  # GiB on one H100 80GB, torch 2.11


def test_the_peak_of_the_stock_modules_measured_on_one_h200_is_predicted() -> None:
    """The measured step also kept PyTorch's masks of dropout, a byte for each adapter input."""
    planned = estimate(recipe_of(MISTRAL_SMALL, "nf4", decoder="stock", repeated_keys=True), 8192, False)
    masks = 8192 * 40 * (3 * 5120 + 4096)  # before q, k and v, and before o
    measured_gib = 114.0  # benchmarks/speed.md, torch 2.11
    assert (planned.total + masks) / GIB == pytest.approx(measured_gib, rel=0.01)


@pytest.mark.parametrize(
    ("precision", "tokens", "measured_gib"),
    [
        *(("nf4", 512, 16.2), ("nf4", 1024, 19.4), ("nf4", 2048, 26.0), ("nf4", 3072, 32.5)),
        *(("nf4", 4096, 39.1), ("nf4", 6144, 52.1), ("nf4", 8192, 65.2), ("nf4", 9728, 75.0)),
        *(("bf16", 512, 46.3), ("bf16", 1024, 49.5), ("bf16", 2048, 56.1), ("bf16", 3072, 62.6)),
        *(("bf16", 4096, 69.2), ("bf16", 6144, 82.2), ("bf16", 8192, 95.3), ("bf16", 9728, 105.1)),
        *(("fp8", 512, 46.3), ("fp8", 1024, 49.6), ("fp8", 2048, 56.1), ("fp8", 3072, 62.7)),
        *(("fp8", 4096, 69.2), ("fp8", 6144, 82.3), ("fp8", 8192, 95.4), ("fp8", 9728, 105.3)),
    ],
)
def test_peaks_measured_on_one_h200_are_predicted(
    precision: Precision, tokens: int, measured_gib: float
) -> None:
    """All 40 blocks; `benchmarks/memory.md`, "Tokens a micro-batch". Both figures are rounded."""
    planned = estimate(recipe_of(MISTRAL_SMALL, precision), tokens, False)
    assert planned.total / GIB == pytest.approx(measured_gib, abs=0.15)


@pytest.mark.parametrize(
    ("gpu_mib", "targets", "tokens", "measured_gib"),
    [
        (81_559, ATTENTION_PROJECTIONS, 9728, 75.0),
        (81_559, "all-linear", 9472, 75.1),
        (23_028, ATTENTION_PROJECTIONS, 1024, 19.4),
        (23_028, "all-linear", 1024, 20.5),
    ],
)
def test_what_is_taken_on_smaller_cards_fitted_there_when_it_was_measured(
    gpu_mib: int, targets: Targets, tokens: int, measured_gib: float
) -> None:
    """One H200, capped to a card's memory; `benchmarks/memory.md`, "Smaller cards"."""
    found = largest_microbatch(recipe_of(MISTRAL_SMALL, "nf4", targets), gpu_mib << 20)
    assert found is not None
    assert (found.tokens, found.gradient_checkpointing) == (tokens, False)
    assert found.memory.total / GIB == pytest.approx(measured_gib, abs=0.4)


def test_a_configuration_is_read_whole_or_as_the_text_part_of_a_multimodal_one() -> None:
    text = text_config("mistral", **SMALL).to_dict()
    assert (
        Shape.of(text)
        == Shape.of({"text_config": text, "vision_config": {"hidden_size": 1}})
        == Shape(64, 160, 2, 6, 2, 16, 260)
    )
    with pytest.raises(ValueError, match="intermediate_size"):
        Shape.of({"hidden_size": 64})


@pytest.mark.parametrize(("kind", "changes"), [*STOCK_KINDS, ("qwen3_5_text", SMALL)])
def test_parameters_are_counted_as_the_model_has_them(
    kind: str, changes: dict[str, int], tmp_path: Path
) -> None:
    model = classifier(tmp_path, kind, changes, 2, LINEAR_LAYERS, 0.0, "fp32")
    shape = Shape.of(model.classifier.config.to_dict())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(
        parameter.numel() for name, parameter in model.named_parameters() if not parameter.requires_grad
    )
    assert shape.trained_parameters(8, "all-linear", 5) == trained
    # PEFT keeps the untrained head beside the trained one
    assert shape.parameters == frozen - 5 * shape.hidden_size


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    "lora",
    [None, LoraSection(r=8, targets="all-linear"), LoraSection(r=8, targets=("q_proj", "up_proj"))],
)
def test_an_encoder_s_parameters_are_counted_as_the_model_has_them(
    kind: str, lora: LoraSection | None, tmp_path: Path
) -> None:
    encoder_checkpoint(tmp_path / "base", kind)
    model, _ = build_classifier(str(tmp_path / "base"), "fp32", 5, lora, 0, "cpu")
    shape = Shape.of(model.classifier.config.to_dict())
    recipe = Recipe(shape, "bf16", lora, 5)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert recipe.trained_parameters == trained
    if lora is None:
        assert shape.parameters == trained - 5 * (shape.hidden_size + 1)
    assert not is_fused(shape, "bf16")
    assert weight_bytes(shape, "bf16") == 4 * shape.parameters
    weights = estimate(recipe, 1, False)
    assert weights.optimizer == 16 * trained
    assert weights.weights == (0 if lora is None else 4 * shape.parameters)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize(
    ("lora", "precision"),
    [
        *((None, "bf16"), (None, "fp32")),
        (LoraSection(r=8, dropout=0.0), "bf16"),
        (LoraSection(r=8, dropout=0.0, targets=("q_proj", "k_proj", "up_proj", "down_proj")), "fp32"),
        (LoraSection(r=8, dropout=0.0, targets="all-linear"), "bf16"),
    ],
)
def test_an_encoder_s_block_keeps_as_many_bytes_per_token_as_is_planned(
    kind: str, lora: LoraSection | None, precision: Precision, tmp_path: Path
) -> None:
    found = []
    layers: dict[str, Any] = {"layer_types": ["full_attention"] * 3} if kind == "modernbert" else {}
    for blocks in (1, 3):
        base = encoder_checkpoint(
            tmp_path / f"{blocks}",
            kind,
            num_hidden_layers=blocks,
            hidden_size=256,
            intermediate_size=640,
            **{name: one[:blocks] for name, one in layers.items()},
        )
        model = build_classifier(str(base), precision, 5, lora, 0, "cpu")[0].train()
        found.append((kept_bytes(model, 384) - kept_bytes(model, 192)) / 192)
    shape = Shape.of(model.classifier.config.to_dict())
    planned = sum(stock_kept_by_layer(Recipe(shape, precision, lora, 5)).values())
    element = 4 if precision == "fp32" else 2
    reads = lora is None or "o_proj" in target_names(lora.targets)
    joined = element * shape.hidden_size if reads else 0  # attention's outputs, on a CPU
    assert (found[1] - found[0]) / 2 == planned + joined


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", [ATTENTION_PROJECTIONS, "all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize(("kind", "changes"), STOCK_KINDS)
def test_a_stock_block_keeps_as_many_bytes_per_token_as_is_planned(
    kind: str, changes: dict[str, int], targets: Targets, dropout: float, tmp_path: Path
) -> None:
    one, two = (per_token(tmp_path, kind, changes, layers, targets, dropout, "bf16") for layers in (1, 2))
    shape = Shape.of(text_config(kind, **changes).to_dict())
    planned = sum(stock_kept_by_layer(recipe_of(shape, "bf16", targets, dropout, r=8)).values())
    assert two - one == planned + only_on_a_cpu(shape, targets, dropout)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("targets", "dropout"),
    [(ATTENTION_PROJECTIONS, 0.05), ("all-linear", 0.0), (("k_proj", "down_proj"), 0.0)],
)
@pytest.mark.parametrize("every", [1, 9])  # all blocks attend, none does
def test_both_kinds_of_qwen3_5_s_blocks_keep_as_many_bytes_per_token_as_is_planned(
    every: int, targets: Targets, dropout: float, precision: Precision, tmp_path: Path
) -> None:
    changes = {**SMALL, "full_attention_interval": every}
    two, three = (
        per_token(tmp_path, "qwen3_5_text", changes, layers, targets, dropout, precision) for layers in (2, 3)
    )
    shape = Shape.of(text_config("qwen3_5_text", **changes).to_dict())
    recipe = recipe_of(shape, precision, targets, dropout, r=8)
    # on a CPU attention's outputs are joined to one tensor, which the gate's product keeps
    joined = (4 if precision == "fp32" else 2) * shape.query_width
    planned = (
        sum(stock_kept_by_layer(recipe).values()) + joined
        if every == 1
        else sum(delta_kept_by_layer(recipe).values())
    )
    assert three - two == planned


@pytest.mark.parametrize(
    ("length", "posts"),
    [(160, 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((32, 16), (22, 23), (171, 3)))],
)
def test_the_peak_of_a_step_of_delta_nets_is_planned(length: int, posts: int, tmp_path: Path) -> None:
    """An estimate from above: how many chunks are padded depends on the posts."""
    changes = (
        WIDER | {"full_attention_interval": 9, "intermediate_size": 768, "hidden_size": 256} | DELTA_NETS
    )
    tokens = length * posts
    model = classifier(tmp_path, "qwen3_5_text", changes, 2, ATTENTION_PROJECTIONS, 0.05, "bf16")
    shape = Shape.of(text_config("qwen3_5_text", **changes).to_dict())
    recipe = recipe_of(shape, "bf16", ATTENTION_PROJECTIONS, 0.05, r=8, labels=5, decoder="stock")
    planned = estimate(recipe, tokens, False)
    gradients = 4 * shape.trained_parameters(8, ATTENTION_PROJECTIONS, 5)
    found = highest(model, tokens, posts) / (planned.activations + planned.overhead + gradients)
    assert 0.7 < found <= 1


@pytest.mark.parametrize("precision", ["nf4", "fp32"])
def test_a_stock_block_of_another_precision_keeps_what_is_planned(
    precision: Precision, tmp_path: Path
) -> None:
    one, two = (
        per_token(tmp_path, "mistral", SMALL, layers, "all-linear", 0.0, precision) for layers in (1, 2)
    )
    element = 4 if precision == "fp32" else 2
    shape = Shape.of(text_config("mistral", **SMALL).to_dict())
    planned = sum(stock_kept_by_layer(recipe_of(shape, precision, "all-linear", 0.0, r=8)).values())
    assert two - one == planned + element * shape.query_width


def test_whole_stock_models_keep_what_is_planned(tmp_path: Path) -> None:
    """Both kinds, with the last norm and the rotary tables; the first block keeps no masks, since
    its input has no gradient.
    """
    shape = Shape.of(text_config("mistral", **SMALL).to_dict())
    recipe = recipe_of(shape, dropout=0.0, r=8, labels=5, decoder="stock")
    planned = estimate(recipe, 1, False).activations
    assert (
        per_token(tmp_path, "mistral", SMALL, 2, ATTENTION_PROJECTIONS, 0.0, "bf16")
        == planned + 2 * 2 * shape.query_width
    )
    again = estimate(recipe, 1, True).activations
    one_block = sum(stock_kept_by_layer(recipe).values())
    rotary = 4 * shape.head_dim  # kept by the checkpoints as an argument, of which no hook tells
    assert (
        per_token(tmp_path, "mistral", SMALL, 2, ATTENTION_PROJECTIONS, 0.0, "bf16", True)
        == again - one_block - rotary
    )


def only_on_a_cpu(shape: Shape, targets: Targets, dropout: float) -> int:
    """Bytes per token and block: attention outputs joined to one tensor, where the adapter's input
    is not another one.
    """
    return 2 * shape.query_width if "o_proj" in target_names(targets) and not dropout else 0


def classifier(
    folder: Path,
    kind: str,
    changes: dict[str, Any],
    layers: int,
    targets: Targets,
    dropout: float,
    precision: Precision,
) -> EmotionClassifier:
    base = folder / f"{kind}-{layers}"
    if not base.exists():
        causal_checkpoint(base, kind, num_hidden_layers=layers, **changes)
    lora = LoraSection(r=8, dropout=dropout, targets=targets if isinstance(targets, str) else tuple(targets))
    assert precision != "fp8"
    model, _ = build_classifier(str(base), precision, 5, lora, 0, "cpu")
    return model.train()


def per_token(
    folder: Path,
    kind: str,
    changes: dict[str, Any],
    layers: int,
    targets: Targets,
    dropout: float,
    precision: Precision,
    gradient_checkpointing: bool = False,
) -> float:
    """Bytes that autograd keeps per token, from two lengths, so that what does not grow with the
    tokens falls out.
    """
    model = classifier(folder, kind, changes, layers, targets, dropout, precision)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return (kept_bytes(model, 128) - kept_bytes(model, 64)) / 64


def kept_bytes(model: EmotionClassifier, tokens: int, posts: int = 3) -> int:
    """Each piece of memory once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(address, tensor)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, tokens, posts)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def forward(model: EmotionClassifier, tokens: int, posts: int = 3) -> torch.Tensor:
    boundaries = [tokens * place // posts for place in range(posts + 1)]
    logits_NC: torch.Tensor = model(
        torch.randint(4, 200, (1, tokens)),
        torch.cat([torch.arange(after - before) for before, after in pairwise(boundaries)])[None],
        Segments.of(boundaries, "cpu"),
        torch.tensor(boundaries[1:]) - 1,
        Counters(torch.tensor(0), torch.zeros(tokens, 2, dtype=torch.int32)),
    )
    return logits_NC


WIDER = {
    "hidden_size": 320,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    ("targets", "dropout", "gradient_checkpointing"),
    [
        (ATTENTION_PROJECTIONS, 0.05, False),
        pytest.param("all-linear", 0.0, True, marks=pytest.mark.slow),
        pytest.param(ATTENTION_PROJECTIONS, 0.05, True, marks=pytest.mark.slow),
        pytest.param("all-linear", 0.0, False, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_stock_step_is_planned(
    targets: Targets, dropout: float, gradient_checkpointing: bool, tmp_path: Path
) -> None:
    """All that is allocated in forward and backward pass, by PyTorch's profiler: what passes lies
    on top of what is kept.
    """
    tokens = 512  # PyTorch's bfloat16 on a CPU is slow
    model = classifier(tmp_path, "mistral", WIDER, 2, targets, dropout, "bf16")
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    shape = Shape.of(text_config("mistral", **WIDER).to_dict())
    recipe = recipe_of(shape, "bf16", targets, dropout, r=8, labels=5, decoder="stock")
    planned = estimate(recipe, tokens, gradient_checkpointing)
    gradients = 4 * shape.trained_parameters(8, targets, 5)
    here = (
        only_on_a_cpu(shape, targets, dropout)
        * tokens
        * (1 if gradient_checkpointing else shape.num_hidden_layers)
    )
    assert planned.activations + planned.overhead + gradients + here == pytest.approx(
        highest(model, tokens), rel=0.05
    )


def highest(model: EmotionClassifier, tokens: int, posts: int = 3) -> int:
    """Most bytes that forward and backward pass held at once, the gradients among them."""
    forward(model, 64)  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward(model, tokens, posts).sum().backward()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


# --- the fused decoder ---


def fused(
    monkeypatch: pytest.MonkeyPatch,
    kernels: ModuleType,
    folder: Path,
    changes: dict[str, Any],
    layers: int,
    targets: Targets,
    dropout: float,
    precision: Precision,
) -> EmotionClassifier:
    """A model that computes by the fused decoder on a CPU, with other kernels than Triton's."""
    monkeypatch.setattr(emotion_train.model, "kernels", kernels, raising=False)
    monkeypatch.setitem(sys.modules, "emotion_train.model.kernels", kernels)
    model = classifier(folder, "mistral", changes, layers, targets, dropout, precision)
    model.decoder = FusedDecoder(model.classifier)
    return model


DELTA_NETS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
SQUAT = {**WIDER, "intermediate_size": 320, "num_attention_heads": 16, "num_key_value_heads": 16}
CORNERS: list[tuple[Targets, float]] = [(ATTENTION_PROJECTIONS, 0.05), ("all-linear", 0.0)]
BETWEEN: list[tuple[Targets, float]] = [("all-linear", 0.05), (("q_proj", "down_proj"), 0.05)]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("targets", "dropout"), [*CORNERS, *BETWEEN])
def test_fused_blocks_keep_to_the_byte_what_is_planned(
    targets: Targets, dropout: float, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each block, each token of the last one, and each post."""

    def kept(layers: int, tokens: int, posts: int) -> int:
        return kept_bytes(
            fused(monkeypatch, plain_kernels, tmp_path, SMALL, layers, targets, dropout, precision),
            tokens,
            posts,
        )

    shape = Shape.of(text_config("mistral", **SMALL).to_dict())
    blocks = FusedBlocks(
        recipe_of(shape, "bf16", targets, dropout, r=8), element=2 if precision == "bf16" else 4
    )
    of_token, of_post = blocks.kept_by_last_layer()
    assert kept(3, 96, 4) - kept(2, 96, 4) == 96 * sum(blocks.kept_by_layer().values())
    assert kept(1, 128, 4) - kept(1, 96, 4) == 32 * of_token
    # the last norm's input and the head's, in float32, and a reciprocal root
    head = 2 * 4 * shape.hidden_size + 4
    assert kept(1, 96, 9) - kept(1, 96, 4) == 5 * (of_post + head)


def test_recomputing_fused_blocks_keep_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for layers in (1, 3):
        model = fused(monkeypatch, plain_kernels, tmp_path, SMALL, layers, "all-linear", 0.05, "bf16")
        model.enable_gradient_checkpointing()
        kept.append(kept_bytes(model, 96, 4))
    assert kept[1] - kept[0] == 2 * 96 * 2 * SMALL["hidden_size"]


@pytest.mark.parametrize(
    ("targets", "dropout"), [*CORNERS, *(pytest.param(*one, marks=pytest.mark.slow) for one in BETWEEN)]
)
@pytest.mark.parametrize(
    ("changes", "recompute"),
    [
        (SQUAT, True),
        pytest.param(WIDER, False, marks=pytest.mark.slow),
        pytest.param(WIDER, True, marks=pytest.mark.slow),
        pytest.param(SQUAT, False, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_step_by_fused_blocks_is_planned(
    changes: dict[str, int],
    targets: Targets,
    dropout: float,
    recompute: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that is allocated, by PyTorch's profiler, with kernels that allocate what Triton's do. In
    float32, whose sums need no copies.
    """
    tokens, posts, layers = 2048, 128, 4
    model = fused(monkeypatch, empty_kernels, tmp_path, changes, layers, targets, dropout, "fp32")
    if recompute:
        model.enable_gradient_checkpointing()
    shape = replace(Shape.of(text_config("mistral", **changes).to_dict()), num_hidden_layers=layers)
    planned = FusedBlocks(recipe_of(shape, "bf16", targets, dropout, r=8), element=4).of_pack(
        tokens, recompute
    )
    assert planned.kept + planned.passing == pytest.approx(highest(model, tokens, posts), rel=0.01)


@pytest.mark.parametrize("targets", [ATTENTION_PROJECTIONS, "all-linear", ("v_proj", "gate_proj")])
def test_the_adapters_copies_are_planned(
    targets: Targets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused(monkeypatch, plain_kernels, tmp_path, SMALL, 2, targets, 0.0, "bf16")
    assert model.decoder is not None
    adapters = [
        one.adapters
        for block in model.decoder._blocks
        for one in (block.qkv, block.out, block.gate_up, block.down)
    ]
    copies = sum(one.down_RI.nbytes + one.up_OR.nbytes for one in adapters if one)
    shape = Shape.of(text_config("mistral", **SMALL).to_dict())
    assert fused_overhead(recipe_of(shape, "bf16", targets, r=8)) == copies
    assert (
        fused_overhead(recipe_of(shape, "nf4", targets, r=8))
        == copies + 2 * 2 * shape.intermediate_size * shape.hidden_size
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("ministral3", {"rope_parameters": {**STRETCHED, "original_max_position_embeddings": 8191}}),
        ("ministral3", {"rope_parameters": STRETCHED}),
        ("qwen3_5_text", {}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 24}),
    ],
)
def test_the_plan_knows_which_bases_the_fused_decoder_computes(
    kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(kind, **changes)
    classifier, device = SimpleNamespace(config=config), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    fusable = (not changes and kind in ("llama", "mistral")) or STRETCHED in changes.values()
    assert Shape.of(config.to_dict()).fusable == fits(classifier, device) == fusable
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4 has no bfloat16
    assert not fits(classifier, device)
    assert not is_fused_attention(device, torch.bfloat16)


@pytest.mark.parametrize("shards", [1, 2])
def test_float32_bases_are_planned_by_the_stock_modules(shards: int) -> None:
    assert is_fused(MISTRAL_SMALL, "nf4")
    assert not is_fused(MISTRAL_SMALL, "fp32")
    by_default, stock = (
        estimate(recipe_of(MISTRAL_SMALL, "fp32", "all-linear", decoder=one), 1024, False, shards)
        for one in ("fused", "stock")
    )
    assert by_default == stock


@pytest.mark.parametrize("precision", ["nf4", "bf16", "fp8"])
def test_a_cut_base_leaves_a_gpu_its_part_and_two_whole_blocks(precision: Precision) -> None:
    recipe = recipe_of(MISTRAL_SMALL, precision, "all-linear")
    whole, half = (estimate(recipe, 1024, False, shards) for shards in (1, 2))
    others = 2 * MISTRAL_SMALL.other_parameters
    block = (whole.weights - others) / MISTRAL_SMALL.num_hidden_layers
    assert half.weights == pytest.approx((MISTRAL_SMALL.num_hidden_layers / 2 + 2) * block + others)
    # adapter, head and what is computed are those of one GPU
    assert (half.optimizer, half.activations) == (whole.optimizer, whole.activations)


# --- the choice ---


def chosen(
    gpu_gib: float, precision: Precision = "nf4", targets: Targets = ATTENTION_PROJECTIONS
) -> tuple[int, bool] | None:
    recipe = recipe_of(MISTRAL_SMALL, precision, targets)
    found = largest_microbatch(recipe, int(gpu_gib * GIB))
    if found is None:
        return None
    assert found.memory.total <= usable_bytes(int(gpu_gib * GIB))
    assert found.memory == estimate(recipe, found.tokens, found.gradient_checkpointing)
    return found.tokens, found.gradient_checkpointing


def test_a_small_gpu_recomputes_and_a_large_one_does_not() -> None:
    small, large = chosen(17), chosen(140.4)
    assert small is not None
    assert small[1]
    assert large is not None
    assert not large[1]
    assert large[0] > 8192


def test_one_more_quantum_of_tokens_would_not_fit() -> None:
    found = chosen(79.6)
    assert found is not None
    tokens, again = found
    more = estimate(recipe_of(MISTRAL_SMALL, "nf4"), tokens + 256, again)
    assert more.total > usable_bytes(int(79.6 * GIB))


def test_a_base_that_does_not_fit_is_no_choice() -> None:
    assert chosen(22.5, "bf16") is None
    assert chosen(10) is None


def test_a_recorded_model_leaves_room_for_a_second_pool() -> None:
    """Of 1.2 billion parameters, whose activations are most of what it takes."""
    shape = Shape(2048, 8192, 16, 32, 8, 64, 128_256)
    recorded, not_recorded = (
        largest_microbatch(
            recipe_of(shape, "bf16", "all-linear"),
            12 * GIB,
            layout=Layout(gpus),
            gradient_checkpointing=False,
        )
        for gpus in (1, 2)
    )
    assert recorded is not None
    assert not_recorded is not None
    assert recorded.tokens == pytest.approx(not_recorded.tokens / 2, abs=256)


def test_an_encoder_is_recorded_in_one_process_that_computes_in_bfloat16_and_recomputes_nothing() -> None:
    shape = Shape(768, 3072, 12, 12, 12, 64, 50_265, fusable=False, is_encoder=True)
    for recipe in (recipe_of(shape), replace(recipe_of(shape), lora=None)):
        assert is_recorded(recipe)
        assert not is_recorded(recipe, processes=2)
        assert not is_recorded(recipe, gradient_checkpointing=True)
        once, twice = (Layout(gpus).reserved(recipe, 4096, False) for gpus in (2, 1))
        assert (twice.activations, twice.overhead) == (2 * once.activations, 2 * once.overhead)
        assert Layout(1).reserved(recipe, 4096, True) == Layout(1).memory(recipe, 4096, True)
    assert not is_recorded(recipe_of(shape, "fp32"))
    assert not is_recorded(recipe_of(replace(shape, is_encoder=False)))  # by transformers' modules


def test_a_recording_leaves_room_for_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step neither AdamW's moments nor, for its first micro-batch, the parameters'
    gradients have their memory yet.
    """
    adapter = torch.nn.Parameter(torch.empty(GIB // 4, device="meta"))  # 1 GiB in float32
    on_a_gpu: Any = SimpleNamespace(device="cuda")
    graphs = GraphedPasses(on_a_gpu, [adapter], lambda tokens: tokens * GIB, most_tokens=2, targets="one")
    graphs._largest = 2
    # GiB; two for the recording's passes, two for those of the largest pack
    for free, room in ((7, False), (8, True)):
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device, free=free: ((free + 0.75) * GIB / 0.96 + 1, 80 * GIB)
        )
        assert graphs._has_room(2) is room


def test_shards_divide_the_base() -> None:
    one = estimate(recipe_of(MISTRAL_SMALL, decoder="stock"), 1024, True)
    four = estimate(recipe_of(MISTRAL_SMALL, decoder="stock"), 1024, True, shards=4)
    assert four.weights * 4 == pytest.approx(one.weights, rel=1e-6)
    assert four.activations == one.activations
    assert four.total < one.total


def test_an_optimizer_in_shards_leaves_the_parameters_whole() -> None:
    """ZeRO-2: each GPU has the adapter in float32, and its part of a copy, gradients, moments."""
    recipe = recipe_of(MISTRAL_SMALL, "nf4", r=64)
    one, four = (estimate(recipe, 1024, True, optimizer_shards=gpus) for gpus in (1, 4))
    assert one.optimizer == 16 * recipe.trained_parameters
    assert four.optimizer == (4 + 16 / 4) * recipe.trained_parameters
    assert one.weights == four.weights


def test_which_pytorch_repeats_keys_is_told_without_importing_it() -> None:
    assert repeats_keys() == (not HAS_GQA)
