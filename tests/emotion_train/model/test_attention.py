from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emotion_train.config import LoraSection
from emotion_train.model.attention import Segments, segment_attention
from emotion_train.model.dropout import Counters, key_of
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import build_classifier
from tests.helpers.tiny_models import causal_checkpoint

LENGTHS = (5, 1, 17, 9)
KEY = key_of(3, 7)  # of dropout
LORA = LoraSection(r=4, alpha=8, dropout=0.0, targets="all-linear")


def posts(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 200, (length,), generator=draw) for length in LENGTHS]


def make(
    folder: Path,
    kind: str = "mistral",
    precision: Any = "fp32",
    device: str = "cpu",
    dropout: float = 0.0,
    **changes: Any,
) -> EmotionClassifier:
    """A classifier whose adapter is no longer zero, so that every trainable parameter matters."""
    if not folder.exists():
        causal_checkpoint(folder, kind, **changes)
    lora = LORA.model_copy(update={"dropout": dropout})
    model, _ = build_classifier(str(folder), precision, 3, lora, 0, device)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def packed(
    model: EmotionClassifier, texts: list[torch.Tensor], filling: int = 0, numbers: Sequence[int] = ()
) -> torch.Tensor:
    """`numbers` of the posts in their split, for dropout; 0, 1, 2… when none are given."""
    lengths = [len(text) for text in texts]
    sizes = [*lengths, filling] if filling else lengths
    boundaries = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    ids = torch.cat([*texts, torch.full((filling,), 3)])[None].to(model.device)
    positions = torch.cat([torch.arange(size) for size in sizes])[None].to(model.device)
    last = (torch.tensor(lengths).cumsum(0) - 1).to(model.device)
    posts = [*(numbers or range(len(texts))), *[-1] * (len(sizes) - len(texts))]
    places = torch.stack([torch.tensor(posts).repeat_interleave(torch.tensor(sizes)), positions[0].cpu()], 1)
    counters = Counters(torch.tensor(KEY, device=model.device), places.int().to(model.device))
    logits: torch.Tensor = model(ids, positions, Segments.of(boundaries, model.device), last, counters)
    return logits


def padded(model: EmotionClassifier, texts: list[torch.Tensor]) -> torch.Tensor:
    rows = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=3).to(model.device)
    return model.forward_padded(rows, torch.tensor([len(text) for text in texts]))


def single(model: EmotionClassifier, texts: list[torch.Tensor]) -> torch.Tensor:
    """transformers' own eager attention and its own mask, one post at a time."""
    model.classifier.set_attn_implementation("eager")
    try:
        rows = []
        for text in texts:
            hidden = model.classifier.model(
                input_ids=text[None].to(model.device), use_cache=False
            ).last_hidden_state
            rows.append(model.classifier.score(hidden[0, -1:].float()))
        return torch.cat(rows)
    finally:
        model.classifier.set_attn_implementation("emotion_train_segments")


def gradients(model: EmotionClassifier, logits_NC: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights_NC = torch.linspace(-1, 1, logits_NC.numel(), device=logits_NC.device).view_as(logits_NC)
    (logits_NC * weights_NC).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": 6}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("ministral3", {}),
        ("qwen3_5_text", {}),
    ],
)
def test_packed_equals_padded_equals_one_post_at_a_time(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    model = make(tmp_path / "base", kind, **changes)
    texts = posts()
    reference = single(model, texts)
    wanted = gradients(model, reference)
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for logits in (packed(model, texts), packed(model, texts, filling=7), padded(model, texts)):
        torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
        for name, grad in gradients(model, logits).items():
            torch.testing.assert_close(
                grad,
                wanted[name],
                rtol=1e-4,
                atol=1e-5 * scale,
                msg=f"{name}: {{}}".format,
            )


def test_a_post_does_not_see_its_neighbours(tmp_path: Path) -> None:
    model = make(tmp_path / "base")
    texts = posts()
    with torch.no_grad():
        before = packed(model, texts)
        texts[2] = torch.flip(texts[2], dims=[0])
        after = packed(model, texts)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "ministral3"])
def test_gradient_checkpointing_keeps_the_gradients(tmp_path: Path, kind: str) -> None:
    model = make(tmp_path / "base", kind).train()
    wanted = gradients(model, packed(model, posts()))
    model.enable_gradient_checkpointing()
    recomputed: list[int] = []
    block: Any = model.layers[0]
    hook = block.mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    found = gradients(model, packed(model, posts()))
    hook.remove()
    assert len(recomputed) == 2
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_no_mask_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path / "base")
    seen = []

    def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen.append(attention_mask)
        return segment_attention(module, query, key, value, attention_mask, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "emotion_train_segments", spy)
    packed(model, posts())
    padded(model, posts())
    assert seen == [None] * 4


@pytest.mark.parametrize("boundaries", [[1, 3], [0, 3, 3]])
def test_segments_that_make_no_sense_are_errors(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="rise from 0"):
        Segments.of(boundaries, "cpu")


def test_segments_know_their_lengths_and_the_longest() -> None:
    segments = Segments.of([0, 3, 9], "cpu")
    assert segments.cu_lengths.tolist() == [0, 3, 9]
    assert segments.cu_lengths.dtype == torch.int32
    assert (segments.lengths, segments.max_length) == ((3, 6), 6)


# --- CUDA ---


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "window", "size"), [(2, None, 64), (4, None, 64), (2, 6, 64), (1, 6, 256), (1, None, 256)]
)
def test_fused_attention_equals_the_exact_one_on_cuda(heads: int, window: int | None, size: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    total = sum(LENGTHS)
    leaves = [
        torch.randn(1, h, total, size, generator=draw, device="cuda", dtype=torch.bfloat16)
        for h in (4, heads, heads)
    ]
    segments = Segments.of([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], "cuda")
    weights = torch.randn(1, total, 4, size, generator=draw, device="cuda")
    results = []
    for dtype, fused in ((torch.bfloat16, True), (torch.float32, False)):
        inputs = [leaf.detach().clone().to(dtype).requires_grad_() for leaf in leaves]
        query, key, value = inputs
        options = segments.as_kwargs(fused)
        out, _ = segment_attention(
            nn.Module(), query, key, value, None, scaling=0.1, sliding_window=window, **options
        )
        (out.float() * weights).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in inputs)])
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@pytest.mark.gpu
def test_packed_on_cuda_equals_one_post_at_a_time(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
    exact = make(tmp_path / "base", device="cuda", **shape)
    torch.testing.assert_close(packed(exact, posts()), single(exact, posts()), rtol=1e-4, atol=1e-4)
    assert not exact.is_fused
    reference = packed(exact, posts()).detach()
    wanted = gradients(exact, packed(exact, posts()))
    for precision in ("bf16", "nf4"):
        model = make(tmp_path / "base", precision=precision, device="cuda")
        assert model.is_fused
        logits = packed(model, posts(), filling=96)
        if precision == "bf16":
            torch.testing.assert_close(logits, reference, rtol=0.1, atol=0.1 * float(reference.abs().max()))
        found = gradients(model, logits)
        mine, theirs = (
            torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (found, wanted)
        )
        assert torch.cosine_similarity(mine, theirs, dim=0) > (0.98 if precision == "bf16" else 0.8)
