"""Qwen3.5's gated delta nets: posts of a pack against transformers' own class, one post at a time,
and the recurrence in chunks against one token at a time.

Letters: T tokens, G key heads, R value heads of each, K and V their sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from emotion_train.config import LoraSection
from emotion_train.model.attention import Segments
from emotion_train.model.delta_net import Chunks, GatedDeltaNet, chunks_of, computed_again, delta_rule
from emotion_train.model.dropout import PostDropout
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import load_base, read_config, skeleton
from emotion_train.model.lora import build_classifier
from emotion_train.model.trainable import require_trainable_base
from emotion_train.sizing.activations import CHUNK
from tests.emotion_train.model.test_attention import gradients, make, packed, padded
from tests.helpers.tiny_models import HYBRID, causal_checkpoint, text_config, write_checkpoint
from tests.helpers.touched_tensors import note_touched

KIND = "qwen3_5_text"
# below, at and above one, two and three chunks, in no order
LENGTHS = (5, 97, 1, CHUNK, 40, 2 * CHUNK, CHUNK + 1, 66)
CPU = torch.device("cpu")
# with weights larger than that the two ways in which transformers itself computes the recurrence
# differ by more than 1e-5: the norm behind it divides by what is nearly nothing
CALM: dict[str, Any] = {"initializer_range": 0.05}


def long_posts(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 200, (length,), generator=draw) for length in LENGTHS]


# --- the recurrence ---


def one_token_at_a_time(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, strength: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """The rule as it is defined, for one post: shapes as `delta_rule` has them."""
    unit = [one * torch.rsqrt((one * one).sum(-1, keepdim=True) + 1e-6) for one in (query, key)]
    state_GRKV = torch.zeros(*value.shape[1:3], query.shape[-1], value.shape[-1], dtype=query.dtype)
    outputs = []
    for q_GK, k_GK, v_GRV, b_GR, g_GR in zip(*unit, value, strength, decay, strict=True):
        state_GRKV = state_GRKV * g_GR.exp()[..., None, None]
        held_GRV = torch.einsum("gk,grkv->grv", k_GK, state_GRKV)
        change_GRV = b_GR[..., None] * (v_GRV - held_GRV)
        state_GRKV = state_GRKV + torch.einsum("gk,grv->grkv", k_GK, change_GRV)
        outputs.append(torch.einsum("gk,grkv->grv", q_GK, state_GRKV) * query.shape[-1] ** -0.5)
    return torch.stack(outputs)


def drawn(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries, keys, values, strengths and decays of two key heads with three value heads each."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((2, 8), (2, 8), (2, 3, 5), (2, 3), (2, 3))
    made = [torch.randn(tokens, *shape, generator=draw, dtype=dtype) for shape in shapes]
    made[3] = made[3].sigmoid()
    made[4] = -made[4].exp() / 4  # from next to nothing to all
    return [one.requires_grad_() for one in made]


def test_the_rule_in_chunks_is_that_of_one_token_at_a_time_in_each_post() -> None:
    given = drawn(sum(LENGTHS))
    weights = torch.linspace(-1, 1, sum(LENGTHS), dtype=torch.float64)[:, None, None, None]
    wanted = torch.cat(
        [one_token_at_a_time(*post) for post in zip(*(one.split(LENGTHS) for one in given), strict=True)]
    )
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), given)
    chunks = Chunks.of(LENGTHS, 3, CPU)
    assert chunks.rounds == (8, 5, 2, 1)

    rule: Callable[..., torch.Tensor] = delta_rule

    def in_chunks(*numbers: torch.Tensor) -> torch.Tensor:
        return rule(*numbers, chunks=chunks)

    for made in (in_chunks(*given), computed_again(in_chunks, *given)):
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad((made * weights).sum(), given), wanted_gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_every_token_has_a_place_of_its_own_and_the_next_chunk_of_a_post_has_its_row() -> None:
    chunks = Chunks.of(LENGTHS, 3, CPU)
    for places, width in ((chunks.slots_T, sum(chunks.rounds) * CHUNK), (chunks.apart_T, chunks.width)):
        assert len(set(places.tolist())) == sum(LENGTHS)
        assert 0 <= int(places.min()) <= int(places.max()) < width
    starts = [sum(chunks.rounds[:number]) for number in range(len(chunks.rounds))]
    for post, length in enumerate(LENGTHS):
        first = sum(LENGTHS[:post])
        rows = [int(chunks.slots_T[first + token]) // CHUNK for token in range(0, length, CHUNK)]
        assert len({row - start for row, start in zip(rows, starts, strict=False)}) == 1
        between = chunks.apart_T[first : first + length].diff()
        assert bool((between == 1).all())
        assert post == 0 or int(chunks.apart_T[first] - chunks.apart_T[first - 1]) == 4


def test_what_fills_a_pack_makes_no_post_wait() -> None:
    classifier = SimpleNamespace(config=text_config(KIND))
    chunks = chunks_of(classifier, (20, CHUNK + 1, 250), 2, CPU)["chunks"]
    assert chunks.rounds == (2 + 8, 1)
    assert len(set(chunks.slots_T.tolist())) == 20 + CHUNK + 1 + 250
    assert chunks_of(SimpleNamespace(config=text_config("qwen3")), (20,), 1, CPU) == {}


def test_only_what_needs_a_gradient_gets_one() -> None:
    one, other = torch.ones(3, requires_grad=True), torch.ones(3)
    made = computed_again(lambda x, y: x * y, one, other)
    made.sum().backward()
    assert one.grad is not None
    assert torch.equal(one.grad, torch.ones(3))
    assert other.grad is None
    with torch.no_grad():
        assert computed_again(lambda x: x * 2, one).grad_fn is None


# --- the model ---


def own_class(folder: Path, labels: int = 3) -> Any:
    """transformers' classifier with the checkpoint's weights and its own attention."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    )
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3}])
def test_posts_of_a_pack_are_computed_as_transformers_computes_each_alone(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Hidden states of several chunks, and the gradients of every product's weights."""
    folder = causal_checkpoint(tmp_path / "base", KIND, num_hidden_layers=4, **CALM, **changes)
    stock = own_class(folder).model
    model, _ = load_base(str(folder), "fp32", 3, "cpu")
    classifier = EmotionClassifier(model, "fp32")
    assert [type(block.linear_attn) for block in model.model.layers[::2]] == [GatedDeltaNet] * 2
    texts = long_posts()
    trained = [name for name, _ in stock.named_parameters() if "proj" in name or "embed" in name]
    for name, parameter in (*stock.named_parameters(), *model.model.named_parameters()):
        parameter.requires_grad_(name in trained)
    wanted = torch.cat([stock(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    segments = Segments.of([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], "cpu")
    hidden: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state[0]))
    classifier(torch.cat(texts)[None], positions[None], segments, torch.tensor(LENGTHS).cumsum(0) - 1)
    hook.remove()
    torch.testing.assert_close(hidden[0], wanted, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, wanted.numel()).view_as(wanted)
    found, theirs = (
        torch.autograd.grad((one * weights).sum(), [which.get_parameter(name) for name in trained])
        for one, which in ((hidden[0], model.model), (wanted, stock))
    )
    largest = max(float(one.abs().max()) for one in theirs)
    for name, one, other in zip(trained, found, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest, msg=name)


def test_long_posts_give_the_same_packed_filled_padded_and_alone(tmp_path: Path) -> None:
    model = make(tmp_path / "base", KIND)
    texts = long_posts()
    wanted = torch.cat([packed(model, [text]) for text in texts])
    before = gradients(model, wanted)
    scale = max(float(one.abs().max()) for one in before.values())
    for logits in (packed(model, texts), packed(model, texts, filling=75), padded(model, texts)):
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        for name, one in gradients(model, logits).items():
            torch.testing.assert_close(one, before[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_post_does_not_read_the_state_of_its_neighbour(tmp_path: Path) -> None:
    model = make(tmp_path / "base", KIND)
    texts = long_posts()
    with torch.no_grad():
        before = packed(model, texts)
        texts[1] = torch.flip(texts[1], dims=[0])
        after = packed(model, texts)
    others = [number for number in range(len(texts)) if number != 1]
    assert torch.equal(before[others], after[others])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_recomputation_finds_the_same_gradients_and_masks(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        model = make(tmp_path / "base", KIND, dropout=0.3).train()
        if recompute:
            model.enable_gradient_checkpointing()
        first = packed(model, long_posts(), numbers=range(7, 15))
        packed(model, long_posts(1), numbers=range(30, 38))  # before the backward pass of the first
        found.append(gradients(model, first))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("targets", "of_delta_net", "of_attention"),
    [
        (("q_proj",), {"in_proj_qkv": 0, "in_proj_z": 0}, {"q_proj": 4}),
        (("v_proj", "o_proj"), {"in_proj_qkv": 0, "out_proj": 1}, {"v_proj": 4, "o_proj": 5}),
        (("k_proj", "down_proj"), {"in_proj_qkv": 0, "down_proj": 3}, {"k_proj": 4, "down_proj": 7}),
    ],
)
def test_a_delta_net_has_adapters_where_an_attention_has_them(
    tmp_path: Path, targets: tuple[str, ...], of_delta_net: dict[str, int], of_attention: dict[str, int]
) -> None:
    """And layers that stand in one place share the mask of dropout, whose number is told."""
    causal_checkpoint(tmp_path / "base", KIND)
    lora = LoraSection(r=2, dropout=0.1, targets=targets)
    model, _ = build_classifier(str(tmp_path / "base"), "fp32", 3, lora, 0, "cpu")
    for block, wanted in zip(model.layers, (of_delta_net, of_attention), strict=True):
        found = {
            name.split(".")[-3]: one.number
            for name, one in block.named_modules()
            if isinstance(one, PostDropout)
        }
        assert found == wanted


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_other_precisions_stay_near_float32(tmp_path: Path, precision: Any) -> None:
    folder = causal_checkpoint(tmp_path / "base", KIND, dtype=torch.bfloat16, initializer_range=0.05)
    wanted, ours = (make(folder, precision=one) for one in ("fp32", precision))
    texts = long_posts()
    with torch.no_grad():
        exact, rounded = packed(wanted, texts), packed(ours, texts)
        alone = torch.cat([packed(ours, [text]) for text in texts])
    scale = float(exact.abs().max())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=(0.05 if precision == "bf16" else 0.5) * scale)
    torch.testing.assert_close(rounded, alone, rtol=0, atol=0.02 * scale)


# --- the multimodal checkpoint ---


def multimodal(folder: Path) -> tuple[Path, Any]:
    """A small Qwen3.5 with its vision tower and with a block that guesses ahead, as the published
    files have them; and the whole model.
    """
    from transformers import AutoModelForImageTextToText

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    ids = {name: 250 + n for n, name in enumerate(("image_token_id", "video_token_id"))}
    config = AutoConfig.for_model(
        "qwen3_5", text_config=text_config(KIND, **CALM).to_dict(), vision_config=vision, **ids
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False).eval()
    state = dict(model.state_dict())
    block = {name: tensor for name, tensor in state.items() if ".layers.1." in name}
    state |= {
        name.replace("model.language_model.layers.1", "mtp.layers.0"): one for name, one in block.items()
    }
    state |= {"mtp.fc.weight": torch.zeros(64, 128), "mtp.norm.weight": torch.zeros(64)}
    return write_checkpoint(folder, config, state, shards=3), model


def test_of_a_multimodal_checkpoint_the_text_part_alone_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = multimodal(tmp_path / "base")
    touched = note_touched(monkeypatch)
    found = require_trainable_base(str(folder))
    assert (found.model.kind, found.model.layout) == (KIND, "multimodal")
    model, info = load_base(str(folder), "fp32", 2, "cpu")
    assert touched
    assert all(key.startswith("model.language_model.") for key in touched)
    assert info.parameters == sum(one.numel() for one in whole.model.language_model.parameters())
    ids = torch.cat(long_posts()[:2])[None]
    with torch.no_grad():
        ours = model.model(input_ids=ids).last_hidden_state
        theirs = whole.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_classifier_s_checkpoint_gives_its_base(tmp_path: Path) -> None:
    """Checkpoints of either class that transformers has for it are read."""
    config = text_config(KIND, num_labels=5)
    old = skeleton(config, 5).to_empty(device="cpu")
    state = {name: torch.full(tensor.shape, 0.01) for name, tensor in old.state_dict().items()}
    plain = write_checkpoint(tmp_path / "plain", config, state)
    state = {name.replace("model.", "model.language_model."): one for name, one in state.items()}
    whole = AutoConfig.for_model("qwen3_5", text_config=config.to_dict())
    nested = write_checkpoint(tmp_path / "nested", whole, state)
    for folder in (plain, nested):
        model, info = load_base(str(folder), "fp32", 2, "cpu")
        assert info.architecture == KIND
        assert model.score.weight.shape == (2, 64)
        assert type(model).__name__ == "Qwen3_5TextForSequenceClassification"
        assert json.loads((folder / "config.json").read_text())["model_type"].startswith("qwen3_5")
    assert read_config(str(nested)).layout == "multimodal"
    assert HYBRID["full_attention_interval"] == 2
