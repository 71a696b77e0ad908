"""The memory plan against what autograd keeps of the program's own layers, and against figures measured on a GPU."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from emotion_train.config import ATTENTION_PROJECTIONS, LINEAR_LAYERS, LoraSection
from emotion_train.memory import (
    GIB,
    Precision,
    Shape,
    Targets,
    estimate,
    kept_by_layer,
    largest_microbatch,
    target_names,
    usable_bytes,
    weight_bytes,
)
from emotion_train.model.attention import Segments
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import build_classifier
from tests.emotion_train.tiny_models import causal_checkpoint, text_config

MISTRAL_SMALL = Shape(5120, 32_768, 40, 32, 8, 128, 131_072)
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
NARROW = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32}


def test_the_real_model_has_its_published_number_of_parameters() -> None:
    vision_and_language_head = 24_011_361_280 - 22_901_324_800
    head_of_two_labels = 2 * 5120  # the count of the text classifier was made with one
    assert MISTRAL_SMALL.parameters + head_of_two_labels + vision_and_language_head == 24_011_361_280
    assert MISTRAL_SMALL.trained_parameters(16, ATTENTION_PROJECTIONS, 15) == 19_737_600
    assert weight_bytes(MISTRAL_SMALL, "nf4") / GIB == pytest.approx(11.93, abs=0.01)
    assert weight_bytes(MISTRAL_SMALL, "bf16") / GIB == pytest.approx(42.66, abs=0.01)


def test_the_peak_measured_on_one_h200_is_predicted() -> None:
    planned = estimate(MISTRAL_SMALL, "nf4", 16, ATTENTION_PROJECTIONS, 8192, False, 15, repeated_keys=True)
    assert planned.total / GIB == pytest.approx(114.0, rel=0.01)  # benchmarks/README.md, torch 2.11


@pytest.mark.parametrize(
    ("precision", "tokens", "measured_gib"),
    [("nf4", 8192, 76), ("nf4", 12_288, 107), ("bf16", 4096, 76), ("bf16", 8192, 106), ("fp8", 4096, 76), ("fp8", 8192, 106)],
)
def test_peaks_of_compiled_layers_measured_on_one_h200_are_predicted(precision: Precision, tokens: int, measured_gib: float) -> None:
    planned = estimate(
        MISTRAL_SMALL, precision, 16, ATTENTION_PROJECTIONS, tokens, False, 15, lora_dropout=0.0, compiled=True, repeated_keys=True
    )
    assert planned.total / GIB == pytest.approx(measured_gib, rel=0.05)


def test_a_configuration_is_read_whole_or_as_the_text_part_of_a_multimodal_one() -> None:
    text = text_config("mistral", **SMALL).to_dict()
    assert Shape.of(text) == Shape.of({"text_config": text, "vision_config": {"hidden_size": 1}}) == Shape(64, 160, 2, 6, 2, 16, 260)
    with pytest.raises(ValueError, match="intermediate_size"):
        Shape.of({"hidden_size": 64})


@pytest.mark.parametrize(("kind", "changes"), [("mistral", SMALL), ("llama", NARROW), ("qwen3", SMALL)])
def test_parameters_are_counted_as_the_model_has_them(kind: str, changes: dict[str, int], tmp_path: Path) -> None:
    model = classifier(tmp_path, kind, changes, 2, LINEAR_LAYERS, 0.0, "fp32")
    shape = Shape.of(model.classifier.config.to_dict())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for name, parameter in model.named_parameters() if not parameter.requires_grad)
    assert shape.trained_parameters(8, "all-linear", 5) == trained
    assert shape.parameters == frozen - 5 * shape.hidden_size  # PEFT keeps the untrained head beside the trained one


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", [ATTENTION_PROJECTIONS, "all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize(("kind", "changes"), [("mistral", SMALL), ("llama", NARROW), ("qwen3", SMALL)])
def test_a_block_keeps_as_many_bytes_per_token_as_is_planned(
    kind: str, changes: dict[str, int], targets: Targets, dropout: float, tmp_path: Path
) -> None:
    one, two = (per_token(tmp_path, kind, changes, layers, targets, dropout, "bf16") for layers in (1, 2))
    shape = Shape.of(text_config(kind, **changes).to_dict())
    planned = sum(kept_by_layer(shape, 8, targets, lora_dropout=dropout).values())
    assert two - one == planned + only_on_a_cpu(shape, targets, dropout)


# both by PyTorch's own compiler, 2.13; the second is https://github.com/pytorch/pytorch/pull/30531
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("kind", "targets", "dropout"), [("mistral", ATTENTION_PROJECTIONS, 0.05), ("qwen3", "all-linear", 0.0)])
def test_a_compiled_block_keeps_what_is_planned(kind: str, targets: Targets, dropout: float, tmp_path: Path) -> None:
    """Graphs as PyTorch's compiler cuts them into forward and backward, run without making kernels."""
    one, two = (per_token(tmp_path, kind, SMALL, layers, targets, dropout, "bf16", compiled=True) for layers in (1, 2))
    shape = Shape.of(text_config(kind, **SMALL).to_dict())
    planned = sum(kept_by_layer(shape, 8, targets, lora_dropout=dropout, compiled=True).values())
    assert two - one == planned + only_on_a_cpu(shape, targets, 0.0 if not dropout else None)


@pytest.mark.parametrize("precision", ["nf4", "fp32"])
def test_a_block_of_another_precision_keeps_what_is_planned(precision: Precision, tmp_path: Path) -> None:
    one, two = (per_token(tmp_path, "mistral", SMALL, layers, "all-linear", 0.0, precision) for layers in (1, 2))
    element = 4 if precision == "fp32" else 2
    shape = Shape.of(text_config("mistral", **SMALL).to_dict())
    planned = sum(kept_by_layer(shape, 8, "all-linear", lora_dropout=0.0, element=element).values())
    assert two - one == planned + element * shape.query_width


def test_whole_models_keep_what_is_planned(tmp_path: Path) -> None:
    """Both kinds, with the last norm and the rotary tables; the first block keeps no masks, since its input has no gradient."""
    shape = Shape.of(text_config("mistral", **SMALL).to_dict())
    planned = estimate(shape, "bf16", 8, ATTENTION_PROJECTIONS, 1, False, 5, lora_dropout=0.0).activations
    assert per_token(tmp_path, "mistral", SMALL, 2, ATTENTION_PROJECTIONS, 0.0, "bf16") == planned + 2 * 2 * shape.query_width
    again = estimate(shape, "bf16", 8, ATTENTION_PROJECTIONS, 1, True, 5, lora_dropout=0.0).activations
    one_block = sum(kept_by_layer(shape, 8, ATTENTION_PROJECTIONS, lora_dropout=0.0).values())
    rotary = 4 * shape.head_dim  # kept by the checkpoints as an argument, of which no hook tells
    assert per_token(tmp_path, "mistral", SMALL, 2, ATTENTION_PROJECTIONS, 0.0, "bf16", True) == again - one_block - rotary


def only_on_a_cpu(shape: Shape, targets: Targets, dropout: float | None) -> int:
    """Bytes per token and block: dropout's mask as wide as the input (None: as on CUDA), and attention outputs joined to one tensor."""
    if dropout is None:
        return 0
    if dropout:
        return sum(shape.linear_layers[name][1] for name in target_names(targets))
    return 2 * shape.query_width if "o_proj" in target_names(targets) else 0


def classifier(
    folder: Path, kind: str, changes: dict[str, int], layers: int, targets: Targets, dropout: float, precision: Precision
) -> EmotionClassifier:
    base = folder / f"{kind}-{layers}"
    if not base.exists():
        causal_checkpoint(base, kind, num_hidden_layers=layers, **changes)
    lora = LoraSection(r=8, dropout=dropout, targets=targets if isinstance(targets, str) else tuple(targets))  # type: ignore[arg-type]
    assert precision != "fp8"
    model, _ = build_classifier(str(base), precision, 5, lora, 0, "cpu")
    return model.train()


def per_token(
    folder: Path,
    kind: str,
    changes: dict[str, int],
    layers: int,
    targets: Targets,
    dropout: float,
    precision: Precision,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> float:
    """Bytes that autograd keeps per token, from two lengths, so that what does not grow with the tokens falls out."""
    model = classifier(folder, kind, changes, layers, targets, dropout, precision)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        torch.compiler.reset()
        for block in model.layers:
            block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    return (kept_bytes(model, 128) - kept_bytes(model, 64)) / 64


def kept_bytes(model: EmotionClassifier, tokens: int) -> int:
    """Each piece of memory once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(address, tensor)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def forward(model: EmotionClassifier, tokens: int) -> torch.Tensor:
    boundaries = [0, tokens // 4, tokens // 2, tokens]
    logits_NC: torch.Tensor = model(
        torch.randint(4, 200, (1, tokens)),
        torch.cat([torch.arange(after - before) for before, after in pairwise(boundaries)])[None],
        Segments.of(boundaries, "cpu"),
        torch.tensor(boundaries[1:]) - 1,
    )
    return logits_NC


WIDER = {"hidden_size": 320, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("targets", "dropout"), [(ATTENTION_PROJECTIONS, 0.05), ("all-linear", 0.0)])
def test_the_peak_of_a_step_is_planned(targets: Targets, dropout: float, gradient_checkpointing: bool, tmp_path: Path) -> None:
    """All that is allocated in forward and backward pass, by PyTorch's profiler: what passes lies on top of what is kept."""
    tokens = 1024
    model = classifier(tmp_path, "mistral", WIDER, 2, targets, dropout, "bf16")
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    kept_bytes(model, tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward(model, tokens).sum().backward()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    shape = Shape.of(text_config("mistral", **WIDER).to_dict())
    planned = estimate(shape, "bf16", 8, targets, tokens, gradient_checkpointing, 5, lora_dropout=dropout)
    gradients = 4 * shape.trained_parameters(8, targets, 5)
    here = only_on_a_cpu(shape, targets, dropout) * tokens * (1 if gradient_checkpointing else shape.num_hidden_layers)
    assert planned.activations + planned.overhead + gradients + here == pytest.approx(max(accumulate(sizes)), rel=0.05)


# --- the choice ---


def chosen(gpu_gib: float, precision: Precision = "nf4", targets: Targets = ATTENTION_PROJECTIONS, **more: bool) -> tuple[int, bool] | None:
    found = largest_microbatch(MISTRAL_SMALL, precision, 16, targets, 15, int(gpu_gib * GIB), **more)  # type: ignore[arg-type]
    if found is None:
        return None
    assert found.memory.total <= usable_bytes(int(gpu_gib * GIB))
    assert found.memory == estimate(MISTRAL_SMALL, precision, 16, targets, found.tokens, found.gradient_checkpointing, 15, **more)  # type: ignore[arg-type]
    return found.tokens, found.gradient_checkpointing


def test_a_small_gpu_recomputes_and_a_large_one_does_not() -> None:
    small, large = chosen(22.5), chosen(140.4)
    assert small is not None
    assert small[1]
    assert large is not None
    assert not large[1]
    assert large[0] > 8192


def test_one_more_quantum_of_tokens_would_not_fit() -> None:
    found = chosen(79.6)
    assert found is not None
    tokens, again = found
    more = estimate(MISTRAL_SMALL, "nf4", 16, ATTENTION_PROJECTIONS, tokens + 256, again, 15)
    assert more.total > usable_bytes(int(79.6 * GIB))


def test_a_base_that_does_not_fit_is_no_choice() -> None:
    assert chosen(22.5, "bf16") is None
    assert chosen(10) is None


def test_shards_divide_the_base() -> None:
    one = estimate(MISTRAL_SMALL, "bf16", 16, ATTENTION_PROJECTIONS, 1024, True, 15)
    four = estimate(MISTRAL_SMALL, "bf16", 16, ATTENTION_PROJECTIONS, 1024, True, 15, shards=4)
    assert four.weights * 4 == pytest.approx(one.weights, rel=1e-6)
    assert four.activations == one.activations
    assert four.total < one.total
