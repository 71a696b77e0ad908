"""What training does on an NVIDIA GPU: the float32 head, the step of a packed batch, an adapter
saved and read back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from emotion_train.config import LoraSection
from emotion_train.data.packing import Pack, pack
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.evaluation.scoring import fill_multiple, forward_pack, probabilities_of
from emotion_train.model.dropout import key_of
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.fused import FusedDecoder
from emotion_train.model.graphs import GraphedPasses
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import load_base
from emotion_train.model.lora import adapter_state, build_classifier, load_adapter, save_adapter
from emotion_train.model.loss import weighted_loss_sum
from emotion_train.sizing.memory import estimate
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from tests.emotion_train.model.test_attention import LORA, make, packed
from tests.emotion_train.model.test_attention import gradients as gradients_of
from tests.emotion_train.model.test_delta_net import long_posts
from tests.helpers.tiny_models import causal_checkpoint

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
TEXTS = [
    "good",
    "what a lovely mess",
    "no",
    "stop it, stop it now",
    "stars over the vast sea " * 4,
    "hm, perhaps not",
] * 8
LABELS = [number % 3 for number in range(len(TEXTS))]
CLASS_WEIGHTS = (0.5, 1.0, 3.0)
DROPOUT_KEY = key_of(1, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_checkpoint(tmp_path_factory.mktemp("gpu") / "base", **SHAPE)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PostTokenizer:
    return PostTokenizer.load(str(base), 128)


def packs_of(tokenizer: PostTokenizer, capacity: int) -> list[Pack]:
    targets_NC = np.eye(3)[LABELS]
    return pack(
        tokenizer.encode(TEXTS),
        targets_NC,
        targets_NC * CLASS_WEIGHTS,
        capacity,
        tokenizer.pad_id,
        fill_multiple(torch.device("cuda")),
    )


def one_step(model: EmotionClassifier, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of loss sums that were divided by the step's sum of weights, by the parameter's
    name.
    """
    weight_sum = sum(CLASS_WEIGHTS[label] for label in LABELS)
    model.zero_grad()
    for loss in losses:
        (loss / weight_sum).backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_gradients(
    model: EmotionClassifier, tokenizer: PostTokenizer, capacity: int
) -> tuple[float, dict[str, torch.Tensor]]:
    losses = [
        weighted_loss_sum(
            forward_pack(model, one, model.device, DROPOUT_KEY),
            torch.from_numpy(one.targets_NC).cuda(),
            torch.from_numpy(one.weights_NC).cuda(),
        )
        for one in packs_of(tokenizer, capacity)
    ]
    gradients = one_step(model, losses)
    return sum(loss.item() for loss in losses) / sum(CLASS_WEIGHTS[label] for label in LABELS), gradients


def padded_gradients(
    model: EmotionClassifier, tokenizer: PostTokenizer
) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch in one right-padded array, by PyTorch's own weighted loss."""
    tokens = [torch.from_numpy(one).long() for one in tokenizer.encode(TEXTS)]
    padded_NL = torch.nn.utils.rnn.pad_sequence(
        tokens, batch_first=True, padding_value=tokenizer.pad_id
    ).cuda()
    logits_NC = model.forward_padded(padded_NL, torch.tensor([len(one) for one in tokens]).cuda())
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(CLASS_WEIGHTS).cuda())(
        logits_NC, torch.tensor(LABELS).cuda()
    )
    model.zero_grad()
    loss.backward()
    return loss.item(), {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])


@pytest.mark.parametrize("capacity", [256, 4096])
def test_packed_step_is_that_of_the_padded_whole_batch_in_float32(
    base: Path, tokenizer: PostTokenizer, capacity: int
) -> None:
    model = make(base, precision="fp32", device="cuda").train()
    assert (len(packs_of(tokenizer, capacity)) == 1) == (capacity == 4096)
    loss, gradients = packed_gradients(model, tokenizer, capacity)
    whole_loss, whole = padded_gradients(model, tokenizer)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=1e-5 * float(flat(whole).abs().max())
        )


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_packed_step_is_that_of_the_padded_whole_batch_up_to_bf16(
    base: Path, tokenizer: PostTokenizer, precision: Any
) -> None:
    model = make(base, precision=precision, device="cuda").train()
    assert model.is_fused
    loss, gradients = packed_gradients(model, tokenizer, 4096)
    whole_loss, whole = padded_gradients(model, tokenizer)
    assert loss == pytest.approx(whole_loss, rel=5e-3)
    assert torch.cosine_similarity(flat(gradients), flat(whole), dim=0) > 0.999


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_fused_step_is_the_stock_step_up_to_bf16(
    base: Path, tokenizer: PostTokenizer, precision: Any, recompute: bool
) -> None:
    model = make(base, precision=precision, device="cuda").train()
    stock_loss, stock = packed_gradients(model, tokenizer, 4096)
    model.fuse()
    assert model.decoder is not None
    model.decoder.recompute = recompute
    loss, gradients = packed_gradients(model, tokenizer, 4096)
    assert loss == pytest.approx(stock_loss, rel=5e-3)
    assert torch.cosine_similarity(flat(gradients), flat(stock), dim=0) > 0.999
    assert float(flat(gradients).norm() / flat(stock).norm()) == pytest.approx(1, abs=0.01)
    _, again = packed_gradients(model, tokenizer, 4096)
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients.items())


def test_fp8_step_points_where_the_bf16_step_does(base: Path, tokenizer: PostTokenizer) -> None:
    model = make(base, precision="bf16", device="cuda").train()
    bf16_loss, bf16 = packed_gradients(model, tokenizer, 4096)
    model.decoder = FusedDecoder(model.classifier, fp8=True)
    loss, gradients = packed_gradients(model, tokenizer, 4096)
    assert loss == pytest.approx(bf16_loss, rel=0.05)
    assert torch.cosine_similarity(flat(gradients), flat(bf16), dim=0) > 0.98


def test_weights_that_are_kept_unpacked_change_no_bit(base: Path, tokenizer: PostTokenizer) -> None:
    model = make(base, precision="nf4", device="cuda").train()
    model.fuse()
    loss, gradients = packed_gradients(model, tokenizer, 256)
    before = torch.cuda.memory_allocated()
    assert model.decoder is not None
    assert model.decoder.keep_unpacked(40) == 2
    held = torch.cuda.memory_allocated() - before
    shape = Shape.of(model.classifier.config.to_dict())
    assert held == pytest.approx(2 * shape.linear_parameters, rel=0.01)
    again, found = packed_gradients(model, tokenizer, 256)
    assert again == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of NCCL with this process in it."""
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "nf4", "fp8"])
def test_a_base_that_is_cut_gives_the_bits_of_a_whole_one(
    alone: None, base: Path, tokenizer: PostTokenizer, precision: Any, recompute: bool
) -> None:
    """The codes, scales and weights that are put together from parts are those that were cut."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 units")
    device = torch.device("cuda")
    found = []
    for cut in (False, True):
        model, _ = build_classifier(str(base), precision, 3, LORA, 0, device, to_be_sharded=cut)
        if cut:
            assert model.fuse_cut(device)
        else:
            model.fuse()
        assert model.decoder is not None
        assert model.decoder.is_gathered is cut
        model.decoder.recompute = recompute
        for _ in range(2):  # the second step begins with the blocks that the first one left
            found.append(packed_gradients(model.train(), tokenizer, 256))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(flat(gradients), flat(found[0][1]))


@pytest.mark.parametrize(
    ("precision", "dropout", "masked"),
    [
        ("bf16", 0.0, False),
        ("bf16", 0.3, False),
        ("bf16", 0.0, True),
        ("nf4", 0.0, False),
        ("nf4", 0.3, True),
    ],
)
def test_recorded_passes_give_the_gradients_of_the_passes(
    base: Path, tokenizer: PostTokenizer, precision: Any, dropout: float, masked: bool
) -> None:
    """The mask is another than that of the recording; `masked`: some posts come
    from a source that does not know all labels.
    """
    model = make(base, precision=precision, device="cuda", dropout=dropout).train()
    model.fuse()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    graphs, scale = GraphedPasses(model, parameters, lambda tokens: 0, 4096, "one", masked), 0.25
    for one in packs_of(tokenizer, 256):
        if masked:
            unknown_NC = (one.targets_NC == 0) & (np.arange(3) == (one.slots_N[:, None] + 1) % 3)
            one = replace(one, targets_NC=np.where(unknown_NC, -1, one.targets_NC).astype(np.float32))
            assert unknown_NC.any()
        model.zero_grad()
        loss = weighted_loss_sum(
            forward_pack(model, one, model.device, DROPOUT_KEY),
            torch.from_numpy(one.targets_NC).cuda(),
            torch.from_numpy(one.weights_NC).cuda(),
            masked=masked,
        )
        (loss * scale).backward()
        loss = loss.detach()  # the recording wants no earlier pass alive
        expected = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        model.zero_grad()
        graphs(one, scale, 0)  # is None when the shape is new, and a recording then
        graphs(one, scale, 0)
        model.zero_grad()
        recorded = graphs(one, scale, DROPOUT_KEY)
        assert recorded is not None
        torch.testing.assert_close(recorded, loss, rtol=1e-4, atol=0)
        found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        # up to bf16: a recording has more posts, which weigh nothing
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 0.02
        graphs(one, scale, DROPOUT_KEY)  # gradients add up
        assert all(
            parameter.grad is not None and torch.equal(parameter.grad, 2 * once)
            for parameter, once in zip(parameters, found, strict=True)
        )


def test_a_recording_takes_what_was_planned_and_is_left_out_where_that_is_not_free(tmp_path: Path) -> None:
    width: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "head_dim": 64,
    }
    model = make(tmp_path / "wide", precision="bf16", device="cuda", num_hidden_layers=8, **width).train()
    model.fuse()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recipe = Recipe(Shape.of(model.classifier.config.to_dict()), "bf16", LORA, labels=3)

    def planned(tokens: int) -> int:
        taken = estimate(recipe, tokens, False)
        return taken.activations + taken.overhead

    graphs = GraphedPasses(model, parameters, planned, 8192, "one")
    no_room = GraphedPasses(model, parameters, lambda tokens: 2**50, 8192, "one")
    for tokens in (2048, 4096, 8192):  # each larger than those that the pool has room for
        posts = tokens // 16
        ones_NC = np.ones((posts, 3))
        one = pack([np.full(16, 5, np.int32)] * posts, ones_NC, ones_NC, tokens, 0, 256)[0]
        assert graphs(one, 1.0, 0) is None  # the first time
        assert no_room(one, 1.0, 0) is None
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        assert graphs(one, 1.0, 0) is not None
        assert no_room(one, 1.0, 0) is None
        torch.cuda.empty_cache()
        left, _ = torch.cuda.mem_get_info()
        plan = planned(tokens) + sum(parameter.nbytes for parameter in parameters)
        # the first recording brings workspaces and the graphs' own memory
        assert free - left < 1.1 * plan + 128 * 2**20


def test_no_kernel_is_built_again_for_another_pack(base: Path, tokenizer: PostTokenizer) -> None:
    from emotion_train.model import kernels

    # dropout's kernels see as many rows as the pack has posts
    lora = LoraSection(r=4, dropout=0.05, targets="all-linear")
    model = build_classifier(str(base), "bf16", 3, lora, 0, "cuda")[0].train()
    model.fuse()

    def built() -> int:
        mine = [one for one in vars(kernels).values() if isinstance(one, triton.runtime.JITFunction)]
        assert len(mine) > 8
        return sum(len(cache[0]) for one in mine for cache in one.device_caches.values())

    import triton

    packed_gradients(model, tokenizer, 4096)
    before = built()
    for capacity in (512, 384, 128):  # packs of 1 to 4 multiples of 128 tokens, and 3 to 30 posts
        packed_gradients(model, tokenizer, capacity)
    assert built() == before


@pytest.mark.parametrize("decoder", ["fused", "stock"])
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_dropout_is_the_same_in_any_packing(
    base: Path, tokenizer: PostTokenizer, precision: Any, decoder: str
) -> None:
    model = make(base, precision=precision, device="cuda", dropout=0.3).train()
    if decoder == "fused":
        model.fuse()
    loss, gradients = packed_gradients(model, tokenizer, 4096)
    others = [packed_gradients(model, tokenizer, capacity) for capacity in (256, 640)]
    model.eval()
    without, other_gradients = packed_gradients(model, tokenizer, 4096)
    for one, found in others:
        assert one == pytest.approx(loss, rel=2e-3)
        assert torch.cosine_similarity(flat(found), flat(gradients), dim=0) > 0.999
    assert torch.cosine_similarity(flat(other_gradients), flat(gradients), dim=0) < 0.99
    assert without != pytest.approx(loss, rel=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_head_is_float32_and_moves_at_a_small_learning_rate(
    base: Path, tokenizer: PostTokenizer, precision: Any
) -> None:
    model = make(base, precision=precision, device="cuda").train()
    head = model.classifier.score.modules_to_save["default"].weight
    assert head.dtype == torch.float32
    assert all(
        parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad
    )
    before = copy.deepcopy(head.detach())
    packed_gradients(model, tokenizer, 4096)
    assert forward_pack(model, packs_of(tokenizer, 4096)[0], model.device).dtype == torch.float32
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, fused=True).step()
    assert float((head != before).float().mean()) > 0.99  # in bfloat16 most of them would stand still


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_adapter_that_is_saved_and_read_back_gives_the_same_bits(
    base: Path, tokenizer: PostTokenizer, precision: Any, tmp_path: Path
) -> None:
    model = make(base, precision=precision, device="cuda")
    _, info = load_base(str(base), precision, 3, "cuda")
    facts = AdapterFacts.of(info, tokenizer, precision=precision, lora=LORA, labels=("a", "b", "c"))
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer, facts=facts)
    loaded = load_adapter(tmp_path / "adapter", device="cuda")
    assert all(
        torch.equal(tensor, adapter_state(model)[name])
        for name, tensor in adapter_state(loaded.model).items()
    )
    model.fuse()
    model.eval()
    device = model.device
    ours, theirs = (probabilities_of(one, tokenizer, TEXTS, 4096, device, 3) for one in (model, loaded.model))
    assert np.array_equal(ours, theirs)
    assert float(np.abs(ours - ours[0]).max()) > 0.01  # the posts differ


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_delta_nets_compute_a_pack_on_a_gpu_as_posts_alone_on_a_cpu(tmp_path: Path, precision: Any) -> None:
    """Posts of one to four chunks, and gradients that come through all of them."""
    texts = long_posts()
    changes: dict[str, Any] = {"initializer_range": 0.05, "head_dim": 64, "linear_value_head_dim": 16}
    exact = make(tmp_path / "base", "qwen3_5_text", **changes)
    model = make(tmp_path / "base", "qwen3_5_text", precision=precision, device="cuda")
    wanted, found = packed(exact, texts), packed(model, texts, filling=75)
    scale = float(wanted.detach().abs().max())
    near = {"fp32": 1e-4, "bf16": 0.05, "nf4": 0.5}[precision] * scale
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=near)
    alone = torch.cat([packed(model, [text]) for text in texts])
    torch.testing.assert_close(found, alone, rtol=0, atol=min(near, 0.05 * scale))
    ours, theirs = gradients_of(model, found), gradients_of(exact, wanted)
    one, other = (torch.cat([some[name].flatten().cpu() for name in theirs]) for some in (ours, theirs))
    least = {"fp32": 0.9999, "bf16": 0.99, "nf4": 0.9}[precision]
    assert torch.cosine_similarity(one, other, dim=0) > least
