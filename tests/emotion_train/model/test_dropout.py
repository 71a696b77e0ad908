"""Dropout's masks: the numbers of the published generator, a pure function of where a number
stands, even and independent, and the same by every way to compute them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from emotion_train.config import LoraSection
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import (
    Counters,
    Current,
    PostDropout,
    kept,
    key_of,
    philox,
    product_number,
    share,
)
from emotion_train.model.fused import FusedDecoder
from emotion_train.model.lora import build_classifier
from tests.emotion_train.model.test_attention import gradients, make, packed, posts
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint

# of the Random123 library's file kat_vectors, "philox4x32": rounds, counter, key, result
ONES, PI = [0xFFFFFFFF] * 6, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
KNOWN_ANSWERS = [
    (7, [0] * 6, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, ONES, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (7, PI, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    (10, [0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
]


def counters_of(numbers: list[int], length: int, key: int = 0) -> Counters:
    """The counters of posts of this length, one after another."""
    posts_T = torch.tensor(numbers).repeat_interleave(length)
    positions_T = torch.arange(length).repeat(len(numbers))
    return Counters(torch.tensor(key), torch.stack([posts_T, positions_T], 1).int())


@pytest.mark.parametrize(("rounds", "given", "expected"), KNOWN_ANSWERS)
def test_the_generator_gives_the_published_numbers(
    rounds: int, given: list[int], expected: list[int]
) -> None:
    key = np.array(given[4] | given[5] << 32, np.uint64).view(np.int64)
    counter = tuple(torch.tensor(word) for word in given[:4])
    assert [int(word) for word in philox(torch.tensor(int(key)), counter, rounds)] == expected


def kept_by_hand(key: int, post: int, position: int, number: int, channel: int, p: float) -> bool:
    """The rule in Python's own integers, one number at a time."""
    chunk, rest = divmod(channel, 1024)
    run, at = divmod(rest, 128)
    counter = [post % 2**32, position, 128 * chunk + at, number]
    words = [key % 2**32, key // 2**32 % 2**32]
    for _ in range(7):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ words[0], b % 2**32, a >> 32 ^ counter[3] ^ words[1], a % 2**32]
        words = [(words[0] + 0x9E3779B9) % 2**32, (words[1] + 0xBB67AE85) % 2**32]
    return (counter[run // 2] >> 16 * (run % 2)) % 2**16 >= round(p * 2**16)


@pytest.mark.parametrize("channels", [1, 64, 127, 128, 300, 1024, 2500])
def test_a_mask_is_the_rule_for_each_number(channels: int) -> None:
    key, numbers = key_of(2**62 + 1, 5), [0, 7, 2**31 - 1, -1, -(2**31)]
    mask_TC = kept(counters_of(numbers, 3, key), 159, channels, 0.3)
    assert mask_TC.shape == (15, channels)
    draw = np.random.default_rng(0)
    for row in range(15):
        for channel in {0, channels - 1, *draw.integers(0, channels, 12).tolist()}:
            by_hand = kept_by_hand(key, numbers[row // 3], row % 3, 159, channel, 0.3)
            assert bool(mask_TC[row, channel]) == by_hand


def test_a_key_is_that_of_seed_and_step_alone() -> None:
    keys = [key_of(seed, step) for seed in (0, 1, 2**63 - 1) for step in (0, 1, 10**7)]
    assert len(set(keys)) == 9
    assert keys == [key_of(seed, step) for seed in (0, 1, 2**63 - 1) for step in (0, 1, 10**7)]
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert len({key % 2**32 for key in keys}) == len({key >> 32 for key in keys}) == 9


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_each_channel_position_and_post_keeps_its_share(p: float) -> None:
    posts, length, channels = 100, 40, 1300
    mask = kept(counters_of(list(range(posts)), length, key_of(42, 3)), 5, channels, p).double()
    least, scale = share(p)
    expected = 1 - least / 2**16
    assert scale == pytest.approx(1 / (1 - p), rel=2e-5)
    cube = mask.view(posts, length, channels)
    for axes in ((0, 1), (0, 2), (1, 2)):
        means = cube.mean(axes)
        error = np.sqrt(expected * (1 - expected) * means.numel() / mask.numel())
        z = (means - expected) / error
        assert z.abs().max() < 5
        # their squares are a chi-square: neither too even nor too uneven
        assert abs(float(z.square().sum()) - z.numel()) < 5 * np.sqrt(2 * z.numel())
    assert abs(float(mask.mean()) - expected) < 5 * np.sqrt(expected * (1 - expected) / mask.numel())


def test_neighbours_are_not_correlated() -> None:
    """Channels, channels that share one draw, positions, posts, products, steps and seeds."""
    channels, length = 2100, 64
    numbers = list(range(20))

    def mask(number: int = 8, seed: int = 42, step: int = 100, first: int = 0) -> torch.Tensor:
        counters = counters_of([first + one for one in numbers], length, key_of(seed, step))
        return kept(counters, number, channels, 0.5).view(len(numbers), length, channels).double() - 0.5

    one = mask()
    pairs = {
        **{f"channels {gap} apart": (one[..., gap:], one[..., :-gap]) for gap in (1, 2, 16, 127, 128, 129)},
        **{f"channels {gap} apart": (one[..., gap:], one[..., :-gap]) for gap in (256, 512, 896, 1024)},
        **{f"positions {gap} apart": (one[:, gap:], one[:, :-gap]) for gap in (1, 2, 32)},
        "posts": (one[1:], one[:-1]),
        "post and position exchanged": (one[:, : len(numbers)], one[:, : len(numbers)].transpose(0, 1)),
        **{f"product {number}": (one, mask(number=number)) for number in (9, 12, 0)},
        **{f"step {step}": (one, mask(step=step)) for step in (101, 99, 356)},
        "seed": (one, mask(seed=43)),
        "seed and step exchanged": (one, mask(seed=100, step=42)),
        "posts far away": (one, mask(first=2**16)),
    }
    for name, (first, second) in pairs.items():
        product = first * second  # 1/4 or -1/4
        if name == "post and position exchanged":  # without the diagonal, each pair once
            rows, columns = torch.triu_indices(len(numbers), len(numbers), 1)
            product = product[rows, columns]
        z = 4 * float(product.sum()) / np.sqrt(product.numel())
        assert abs(z) < 4.5, f"{name}: {z:.1f} standard deviations"


def test_a_post_has_its_mask_in_any_pack() -> None:
    whole = kept(counters_of([11, 5, 900], 7), 3, 200, 0.3)
    again = kept(counters_of([900, 3, 11], 7), 3, 200, 0.3)
    shorter = kept(counters_of([5], 4), 3, 200, 0.3)
    wider = kept(counters_of([5], 7), 3, 3000, 0.3)
    assert torch.equal(again[:7], whole[14:])
    assert torch.equal(again[14:], whole[:7])
    assert torch.equal(shorter, whole[7:11])
    assert not torch.equal(again[7:14], whole[7:14])
    assert torch.equal(wider[:, :200], whole[7:14])


# --- the module ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_drops_by_its_mask_and_so_does_its_gradient(dtype: torch.dtype) -> None:
    current, counters = Current(), counters_of(list(range(40)), 50)
    module = PostDropout(0.3, 6, current)
    x = torch.randn(1, 2000, 300).to(dtype).requires_grad_()  # more than is drawn at once
    dy = torch.randn(1, 2000, 300).to(dtype)
    with current.of(counters):
        y = module(x)
    y.backward(dy)  # outside of the block
    mask, scale = kept(counters, 6, 300, 0.3), share(0.3)[1]
    for found, given in ((y, x), (x.grad, dy)):
        assert found is not None
        assert torch.equal(found[0], torch.where(mask, given[0].float() * scale, 0.0).to(dtype))
    assert module.eval()(x) is x


def test_training_without_counters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _by_plain_kernels(monkeypatch)
    with pytest.raises(ValueError, match="without the counters of its posts"):
        PostDropout(0.3, 6, Current())(torch.ones(1, 2, 3))
    model = make(tmp_path / "base", dropout=0.3).train()
    pack = torch.arange(10, 15)[None], torch.arange(5)[None], Segments.of([0, 5], "cpu"), torch.tensor([4])
    for decoder in (None, FusedDecoder(model.classifier)):
        model.decoder = decoder
        with pytest.raises(ValueError, match="without the counters of its posts"):
            model.train()(*pack)
        assert model.eval()(*pack).shape == (1, 3)


def test_only_layers_of_a_block_have_a_number() -> None:
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    numbers = [
        product_number(f"base_model.model.model.layers.{layer}.{n}") for layer in (0, 31) for n in names
    ]
    assert numbers == [0, 0, 1, 2, 3, 124, 124, 125, 126, 127]
    for name in ("base_model.model.score", "model.layers.x.mlp.up_proj", "model.layers.3.mlp.experts"):
        with pytest.raises(ValueError, match="is no adapted layer"):
            product_number(name)


def test_every_adapter_has_our_dropout_and_none_has_pytorchs(tmp_path: Path) -> None:
    causal_checkpoint(tmp_path / "base", "qwen3")
    for dropout, count in ((0.1, 14), (0.0, 0)):
        lora = LoraSection(r=2, dropout=dropout, targets="all-linear")
        model, _ = build_classifier(str(tmp_path / "base"), "fp32", 3, lora, 0, "cpu")
        found = [one for one in model.modules() if isinstance(one, PostDropout)]
        assert len(found) == count
        assert len({id(one.current) for one in found}) == (count > 0)
        assert sorted(one.number for one in found) == sorted(
            [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7][:count]
        )
        assert not any(isinstance(one, nn.Dropout) and one.p > 0 for one in model.modules())


# --- the model ---


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma3_text", "qwen3_5_text"])
def test_posts_give_the_same_logits_and_gradients_in_any_packing(tmp_path: Path, kind: str) -> None:
    model = make(tmp_path / "base", kind, dropout=0.3).train()
    texts, numbers = posts(), [70, 3, 2**31 + 5, 41]
    whole = packed(model, texts, filling=5, numbers=numbers)
    expected = gradients(model, whole)
    order = [2, 0, 3, 1]
    parts = [
        packed(model, [texts[n] for n in some], numbers=[numbers[n] for n in some])
        for some in ([2, 0], [3, 1])
    ]
    apart = torch.cat(parts)[torch.tensor(order).argsort()]
    torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, apart).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    others = packed(model, texts, numbers=[71, 4, 6, 42])
    assert (others - whole).abs().max() > 1e-3
    assert torch.equal(packed(model.eval(), texts), packed(model, texts, numbers=numbers))


@pytest.mark.parametrize("fused", [False, True])
def test_recomputation_after_other_packs_finds_the_same_mask(
    tmp_path: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for recompute in (False, True):
        model = make(tmp_path / "base", dropout=0.3).train()
        if fused:
            _by_plain_kernels(monkeypatch)
            model.decoder = FusedDecoder(model.classifier)
        if recompute:
            model.enable_gradient_checkpointing()
        first = packed(model, posts(), numbers=[7, 8, 9, 10])
        packed(model, posts(), numbers=[1, 2, 3, 4])  # before the backward pass of the first
        found.append(gradients(model, first))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _by_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import emotion_train.model
    from tests.helpers import plain_kernels

    monkeypatch.setattr(emotion_train.model, "kernels", plain_kernels, raising=False)
    monkeypatch.setitem(sys.modules, "emotion_train.model.kernels", plain_kernels)


# --- Triton's kernels, interpreted ---

INTERPRETED = """
import torch
from emotion_train.model import kernels
from emotion_train.model.dropout import Counters, kept
from tests.helpers import plain_kernels

torch.manual_seed(0)
for tokens, channels in ((5, 160), (3, 1100)):  # more than one program each
    places = torch.stack([torch.randint(-(2**31), 2**31, (tokens,)), torch.arange(tokens) * 1999], 1).int()
    for key, number in ((2**62 + 5, 1), (-1, 159)):
        counters = Counters(torch.tensor(key), places)
        mask = kept(counters, number, channels, 0.3)
        # the interpreter cuts off what a GPU rounds: equal to the bit are float32's numbers only
        for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float32, 0)):
            ones = torch.ones(tokens, channels, dtype=dtype)
            dropped = kernels.dropout(ones, 0.3, counters, number)
            assert torch.equal(dropped != 0, mask), (key, number)
            expected = plain_kernels.dropout(ones, 0.3, counters, number)
            torch.testing.assert_close(dropped, expected, rtol=tolerance, atol=0)
        du, down = torch.ones(tokens, 12).bfloat16(), torch.ones(12, channels).bfloat16()
        added = torch.zeros(tokens, channels).bfloat16()
        kernels.add_dropped_product_(added, du, down, 0.3, counters, number)
        assert torch.equal(added != 0, mask), (key, number)
print("the same")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="PyTorch's builds for CPUs come without Triton")
def test_interpreted_kernels_draw_the_same_masks_to_the_bit() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout == "the same\n", done.stderr
