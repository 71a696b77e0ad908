"""The fused decoder against transformers' own modules under autograd, and its kernels against plain
PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import emotion_train.model
from emotion_train.config import LoraSection
from emotion_train.model.attention import on_device, sight
from emotion_train.model.dropout import Counters, kept
from emotion_train.model.fused import FusedDecoder, fits
from emotion_train.model.graphs import pays
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import build_classifier
from emotion_train.model.precision import Precision
from tests.emotion_train.model.test_attention import gradients, packed, posts
from tests.helpers import plain_kernels
from tests.helpers.tiny_models import OWN, causal_checkpoint

if TYPE_CHECKING:
    from emotion_train.model.kernels import Fp8


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused decoder computes with plain PyTorch, so that it runs on a CPU in float32."""
    monkeypatch.setattr(emotion_train.model, "kernels", plain_kernels, raising=False)
    monkeypatch.setitem(sys.modules, "emotion_train.model.kernels", plain_kernels)


def make(
    folder: Path,
    targets: Any,
    dropout: float = 0.0,
    kind: str = "mistral",
    precision: Precision = "fp32",
    **changes: Any,
) -> EmotionClassifier:
    causal_checkpoint(folder, kind, **changes)
    lora = LoraSection(r=4, alpha=12, dropout=dropout, targets=targets)
    model, _ = build_classifier(str(folder), precision, 3, lora, 0, "cpu")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.train()


TARGETS = [
    "all-linear",
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj"),
    ("up_proj", "down_proj"),
]


@pytest.mark.parametrize(("recompute", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.4), (True, 0.4)])
@pytest.mark.parametrize("targets", TARGETS)
def test_fused_blocks_give_the_stock_blocks_logits_and_gradients(
    plain: None, tmp_path: Path, targets: Any, recompute: bool, dropout: float
) -> None:
    model = make(tmp_path / "base", targets, dropout)
    logits = packed(model, posts(), filling=7)
    expected = gradients(model, logits)
    model.decoder = FusedDecoder(model.classifier)
    model.decoder.recompute = recompute
    fused = packed(model, posts(), filling=7)
    torch.testing.assert_close(fused, logits, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, fused).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()), msg=name
        )


# positions of Ministral 3, which multiplies queries from the 8,192nd on
STRETCHED = {**OWN["ministral3"]["rope_parameters"], "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(("llama", {}), ("mistral", {"sliding_window": 6}), ("mistral", {"num_hidden_layers": 1})),
        ("ministral3", {"rope_parameters": STRETCHED}),
    ],
)
def test_fused_blocks_know_windows_kinds_and_depths(
    plain: None, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    model = make(tmp_path / "base", "all-linear", kind=kind, **changes)
    logits = packed(model, posts())
    expected = gradients(model, logits)
    model.decoder = FusedDecoder(model.classifier)
    fused = packed(model, posts())
    torch.testing.assert_close(fused, logits, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, fused).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()), msg=name
        )


def test_stacked_weights_stay_what_the_modules_hold(plain: None, tmp_path: Path) -> None:
    model = make(tmp_path / "base", "all-linear")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    FusedDecoder(model.classifier)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(parameter, after[name]) for name, parameter in before.items())
    layers: Any = model.layers
    gate, up = (getattr(layers[0].mlp, name).base_layer.weight for name in ("gate_proj", "up_proj"))
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()


@pytest.mark.parametrize("blocks", [1, 2, 40])
def test_weights_that_are_kept_unpacked_change_no_bit(
    plain: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    model = make(tmp_path / "base", "all-linear", dropout=0.4, precision="nf4")
    model.decoder = FusedDecoder(model.classifier)
    unpacked, real = list[int](), plain_kernels.unpack_4bit_

    def counting(out_OI: torch.Tensor, *given: Any) -> None:
        unpacked.append(out_OI.numel())
        real(out_OI, *given)

    monkeypatch.setattr(plain_kernels, "unpack_4bit_", counting)
    logits = packed(model, posts(), filling=7)
    expected = gradients(model, logits)
    each_time = len(unpacked)
    # passes, blocks, layers; nothing before the first block's q, k and v is trained
    assert each_time == 2 * 2 * 7 - 3
    assert model.decoder.keep_unpacked(blocks) == min(2, blocks)
    assert model.decoder.keep_unpacked(blocks) == min(2, blocks)
    assert len(unpacked) == each_time + 7 * min(2, blocks)  # once, whoever asks again
    unpacked.clear()
    again = packed(model, posts(), filling=7)
    assert torch.equal(again, logits)
    for name, gradient in gradients(model, again).items():
        assert torch.equal(gradient, expected[name]), name
    assert len(unpacked) == (2 * 7 if blocks == 1 else 0)


def test_nothing_is_kept_of_weights_that_are_not_packed(plain: None, tmp_path: Path) -> None:
    model = make(tmp_path / "base", "all-linear")
    assert FusedDecoder(model.classifier).keep_unpacked(2) == 0


def test_gradients_hold_no_more_memory_than_their_parameters(plain: None, tmp_path: Path) -> None:
    """A recorded graph adds them to those of other packs, and PyTorch adds a list of tensors in one
    kernel only where none has gaps.
    """
    model = make(tmp_path / "base", "all-linear", dropout=0.1)
    model.decoder = FusedDecoder(model.classifier)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(packed(model, posts()).sum(), parameters)
    assert all(gradient.is_contiguous() for gradient in found)
    held = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage().nbytes() for gradient in found}
    assert sum(held.values()) == sum(parameter.nbytes for parameter in parameters)


@pytest.mark.parametrize(("rope_type", "recorded"), [("default", True), ("linear", True), ("dynamic", False)])
def test_positions_that_ask_the_gpu_for_the_longest_post_are_not_recorded(
    plain: None, tmp_path: Path, rope_type: str, recorded: bool
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 2.0}
    model = make(tmp_path / "base", "all-linear", kind="llama", rope_parameters=rope)
    assert not pays(model, 1)  # of stock modules there is no graph
    model.decoder = FusedDecoder(model.classifier)
    assert pays(model, 1) is recorded
    assert not pays(model, 2)


def test_a_cpu_computes_with_the_stock_modules(tmp_path: Path) -> None:
    model = make(tmp_path / "base", "all-linear")
    assert not fits(model.classifier, model.device)
    model.fuse()
    assert not model.is_fused


# --- the kernels ---

SIZES = [(70, 64, 160, 4, 2, 16), (257, 576, 1536, 9, 3, 64), (200, 512, 1024, 8, 1, 128)]  # T H F Q K D


@pytest.fixture(params=SIZES, ids=str)
def sizes(request: pytest.FixtureRequest) -> tuple[int, ...]:
    torch.manual_seed(0)
    chosen: tuple[int, ...] = request.param
    return chosen


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def near(ours: torch.Tensor, plain: torch.Tensor, tolerance: float = 1e-2) -> None:
    assert ours.dtype == plain.dtype
    assert ours.shape == plain.shape
    error = (ours.float() - plain.float()).norm() / plain.float().norm().clamp(min=1e-6)
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.gpu
def test_norm_kernels_are_the_plain_ones(sizes: tuple[int, ...]) -> None:
    from emotion_train.model import kernels

    t, h, *_ = sizes
    x, m, dy, dh, weight = random(t, h), random(t, h), random(t, h), random(t, h), random(h)
    for second in (None, m):
        ours, theirs = (one.add_rms_norm(x, second, weight, 1e-5) for one in (kernels, plain_kernels))
        for a, b in zip(ours, theirs, strict=True):
            near(a, b)
        assert torch.equal(kernels.rms_norm_again(ours[0], weight, ours[2]), ours[1])
        near(
            kernels.rms_norm_backward(dy, ours[0], weight, ours[2], dh),
            plain_kernels.rms_norm_backward(dy, ours[0], weight, ours[2], dh),
        )


@pytest.mark.gpu
# of PyTorch, where the first product of a process is autograd's
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("window", [None, 20])
def test_attention_kernels_are_the_plain_ones(sizes: tuple[int, ...], window: int | None) -> None:
    from emotion_train.model import kernels

    t, _, _, q, k, d = sizes
    lengths = [1, 5, 30, 2, t - 38]
    starts, ends = on_device(sight(lengths, window), torch.device("cuda"))
    qkv, dout = random(t, (q + 2 * k) * d), random(t, q * d)
    angles = torch.rand(t, d // 2, device="cuda").repeat(1, 2) * 6
    turned = [qkv.clone(), qkv.clone()]
    for one, x in zip((kernels, plain_kernels), turned, strict=True):
        one.rotate_(x, angles.cos(), angles.sin(), q + k)
    near(turned[0], turned[1])
    kernels.rotate_(turned[0], angles.cos(), angles.sin(), q + k, back=True)
    near(turned[0], qkv)
    (out, lse), (plain_out, plain_lse) = (
        one.attention(qkv, starts, q, k, d**-0.5) for one in (kernels, plain_kernels)
    )
    near(out, plain_out)
    near(lse, plain_lse)
    ours, theirs = (
        one.attention_backward(dout, qkv, out, lse, starts, ends, q, k, d**-0.5)
        for one in (kernels, plain_kernels)
    )
    for a, b in zip(
        ours.split([q * d, k * d, k * d], 1), theirs.split([q * d, k * d, k * d], 1), strict=True
    ):
        near(a, b, 2e-2)
    assert torch.equal(ours, kernels.attention_backward(dout, qkv, out, lse, starts, ends, q, k, d**-0.5))


@pytest.mark.gpu
def test_swiglu_and_quantising_kernels_are_the_plain_ones(sizes: tuple[int, ...]) -> None:
    from emotion_train.model import kernels

    t, _, f, *_ = sizes
    gate_up, dout = random(t, 2 * f), random(t, f)
    near(kernels.swiglu(gate_up), plain_kernels.swiglu(gate_up))
    near(
        kernels.swiglu_backward_(gate_up.clone(), dout),
        plain_kernels.swiglu_backward_(gate_up.clone(), dout),
    )
    (codes, scales), (plain_codes, plain_scales) = (
        one.quantize_rows(dout) for one in (kernels, plain_kernels)
    )
    near(scales, plain_scales, 1e-5)
    near(codes.float() * scales, plain_codes.float() * plain_scales, 5e-3)
    near(codes.float() * scales, dout.float(), 5e-2)


@pytest.mark.gpu
# 40,000 columns are more than the registers hold, and no whole number of blocks
@pytest.mark.parametrize(("rows", "columns"), [(70, 96), (9, 1536), (5, 5120), (7, 32_768), (3, 40_000)])
def test_what_is_quantised_on_its_way_has_the_bits_of_two_turns_through_memory(
    rows: int, columns: int
) -> None:
    from emotion_train.model import kernels

    torch.manual_seed(0)
    gate_up, dout = random(rows, 2 * columns), random(rows, columns)
    h, m, weight = random(rows, columns), random(rows, columns), random(columns)
    for second in (None, m):
        out, norm, rstd = kernels.add_rms_norm_fp8(h, second, weight, 1e-5)
        assert torch.equal(out, kernels.add_rms_norm(h, second, weight, 1e-5)[0])
        near(rstd, kernels.add_rms_norm(h, second, weight, 1e-5)[2], 1e-6)
        equal_fp8(norm, kernels.quantize_rows(kernels.rms_norm_again(out, weight, rstd)))
    equal_fp8(kernels.swiglu_fp8(gate_up), kernels.quantize_rows(kernels.swiglu(gate_up)))
    equal_fp8(
        kernels.swiglu_backward_fp8(gate_up, dout),
        kernels.quantize_rows(kernels.swiglu_backward_(gate_up.clone(), dout)),
    )


def equal_fp8(ours: Fp8, plain: Fp8) -> None:
    assert torch.equal(ours.scales_T1, plain.scales_T1)
    assert torch.equal(ours.codes_TI.view(torch.uint8), plain.codes_TI.view(torch.uint8))


@pytest.mark.gpu
def test_dropout_kernels_draw_the_masks_of_a_cpu_to_the_bit(sizes: tuple[int, ...]) -> None:
    from emotion_train.model import kernels

    t, _, f, *_ = sizes
    x, before = random(t, f), random(t, f)
    places = torch.stack([torch.randint(-(2**31), 2**31, (t,)), torch.arange(t) * 1999], 1).int()
    on_cpu = Counters(torch.tensor(-(2**62) + 12345), places)
    counters = Counters(on_cpu.key.cuda(), places.cuda())
    for number in (0, 1, 159):
        mask = kept(on_cpu, number, f, 0.3).cuda()
        assert torch.equal(kept(counters, number, f, 0.3), mask)
        for one in (x, x.float()):
            dropped = kernels.dropout(one, 0.3, counters, number)
            assert torch.equal(dropped != 0, mask & (one != 0))
            near(dropped, torch.where(mask, one.float() / 0.7, 0.0).to(one.dtype))
    norm = random(f), torch.rand(t, device="cuda") + 0.5
    assert torch.equal(
        kernels.dropout(x, 0.3, counters, 159, norm),
        kernels.dropout(kernels.rms_norm_again(x, *norm), 0.3, counters, 159),
    )
    for ranks in (12, 300):
        du, down = random(t, ranks), random(ranks, f)
        product = torch.where(mask, (du.float() @ down.float()) / 0.7, 0.0)
        added = before.clone()
        kernels.add_dropped_product_(added, du, down, 0.3, counters, 159)
        assert torch.equal(added[~mask], before[~mask])
        near(added, (before.float() + product).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 160), (1536, 576), (1000, 5120)])
def test_weights_of_4_bits_are_unpacked_as_bitsandbytes_does_it(shape: tuple[int, int], nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from emotion_train.model import kernels

    packed, state = quantize_4bit(random(*shape), quant_type="nf4", compress_statistics=nested)
    out = torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
    kernels.unpack_4bit_(out, packed, state)
    assert torch.equal(out, dequantize_4bit(packed, state))
