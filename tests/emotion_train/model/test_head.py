from __future__ import annotations

import pytest
import torch

from emotion_train.config import LoraSection
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import Counters, key_of
from emotion_train.model.head import EmotionClassifier, init_head
from emotion_train.model.load import load_base
from emotion_train.model.lora import build_classifier
from tests.helpers.tiny_models import causal_checkpoint

PAD = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(causal_checkpoint(tmp_path_factory.mktemp("head") / "base"))


def classifier(base: str, seed: int = 0, precision: str = "fp32") -> EmotionClassifier:
    network, _ = load_base(base, precision, 5, "cpu")  # type: ignore[arg-type]
    init_head(network, seed)
    return EmotionClassifier(network, precision)  # type: ignore[arg-type]


def pack(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, Segments, torch.Tensor]:
    ends = torch.tensor(lengths).cumsum(0)
    ids = torch.randint(4, 200, (1, int(ends[-1])), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions, Segments.of([0, *ends.tolist()], "cpu"), ends - 1


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 4), (1,) * 11])
def test_one_row_of_logits_per_post(base: str, lengths: tuple[int, ...]) -> None:
    logits = classifier(base)(*pack(*lengths))
    assert logits.shape == (len(lengths), 5)
    assert logits.dtype == torch.float32


def test_a_post_that_holds_the_padding_token_is_pooled_at_its_end(base: str) -> None:
    model = classifier(base)
    ids, positions, segments, last = pack(6)
    ids[0, -2:] = PAD
    rows = torch.full((2, 9), PAD)
    rows[0, :6] = ids[0]
    rows[1, :] = torch.arange(10, 19)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_padded(rows, torch.tensor([6, 9]))[0], model(ids, positions, segments, last)[0]
        )


def test_what_the_padding_holds_does_not_matter(base: str) -> None:
    model = classifier(base)
    rows = torch.arange(10, 26).view(2, 8)
    other = rows.clone()
    other[0, 5:] = 77
    with torch.no_grad():
        assert torch.equal(
            model.forward_padded(rows, torch.tensor([5, 8])),
            model.forward_padded(other, torch.tensor([5, 8])),
        )


def test_a_pack_without_posts_gives_zero_gradients_to_every_trainable_parameter(base: str) -> None:
    model, _ = build_classifier(base, "fp32", 5, LoraSection(r=2), 0, "cpu")
    logits = model(
        torch.full((1, 4), PAD),
        torch.arange(4)[None],
        Segments.of([0, 4], "cpu"),
        torch.empty(0, dtype=torch.long),
        Counters(torch.tensor(key_of(0, 0)), torch.zeros(4, 2, dtype=torch.int32)),
    )
    assert logits.shape == (0, 5)
    logits.sum().backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trainable)


def test_head_depends_on_the_seed_alone(base: str) -> None:
    first = classifier(base, seed=7).classifier.score.weight
    torch.rand(100)
    assert torch.equal(first, classifier(base, seed=7, precision="bf16").classifier.score.weight)
    assert not torch.equal(first, classifier(base, seed=8).classifier.score.weight)
    assert first.dtype == torch.float32
    assert 0.015 < first.std() < 0.025
    state = torch.get_rng_state()
    classifier(base)
    assert torch.equal(state, torch.get_rng_state())


def test_logits_are_float32_arithmetic_under_any_outer_autocast(base: str) -> None:
    exact, half = classifier(base), classifier(base, precision="bf16")
    with torch.no_grad():
        plain, plain_half = exact(*pack(6, 2)), half(*pack(6, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(exact(*pack(6, 2)), plain)
            assert torch.equal(half(*pack(6, 2)), plain_half)
    bf16_values = plain_half.to(torch.bfloat16).float()
    assert not torch.equal(plain_half, bf16_values)
