"""Recorded passes of encoders: what a graph computes against the plain passes, on a CPU as it would
be recorded, on a GPU as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emotion_train.bases.encoders import ENCODERS
from emotion_train.config import LoraSection
from emotion_train.data.packing import Pack, pack
from emotion_train.evaluation.scoring import forward_pack
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import key_of
from emotion_train.model.graphs import GraphedPasses, _Recorded, pays
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import build_classifier
from emotion_train.model.loss import weighted_loss_sum
from tests.emotion_train.model.test_encoder import loud
from tests.helpers.tiny_models import encoder_checkpoint

FAMILIES = [(kind, "cls") for kind in ENCODERS] + [("modernbert", "mean")]
LORA = LoraSection(r=4, dropout=0.2, targets="all-linear")
DROPOUT = dict.fromkeys(("embedding_dropout", "mlp_dropout", "classifier_dropout"), 0.1)
# up to 64 posts and more, with and without filling tokens, one post above the least bound
LENGTHS = ([3, 17, 1, 40, 3], [9, 56], [5, 12] * 32, [3, 140, 1], [8] * 70)
MANY = [50] * 70  # above 3,072 tokens another kernel adds the gradients of an embedding


def made(
    folder: Path, kind: str, pooling: str, lora: LoraSection | None, device: str = "cpu"
) -> EmotionClassifier:
    """An encoder in training, whose adapter is no longer zero."""
    changes: dict[str, Any] = {"classifier_pooling": pooling, **DROPOUT} if kind == "modernbert" else {}
    base = str(encoder_checkpoint(folder / f"{kind}-{pooling}", kind, **changes))
    model, _ = build_classifier(base, "bf16" if device == "cuda" else "fp32", 3, lora, 0, device)
    return loud(model, 0.2).train()


def trained_of(model: EmotionClassifier) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def pack_of(lengths: Sequence[int], fill: int = 16, seed: int = 0) -> Pack:
    draw = np.random.default_rng(seed)
    posts = [draw.integers(4, 250, length).astype(np.int32) for length in lengths]
    targets_NC = np.eye(3)[draw.integers(0, 3, len(lengths))]
    weights_NC = targets_NC * draw.uniform(0.5, 2, (len(lengths), 1))
    return pack(posts, targets_NC, weights_NC, 10_000, 3, fill, numbers=range(7, 7 + len(posts)))[0]


def plain(model: EmotionClassifier, one: Pack, scale: float, key: int) -> torch.Tensor:
    """The loss sum by the passes as they are without graphs; adds their gradients."""
    loss = weighted_loss_sum(
        forward_pack(model, one, model.device, key),
        torch.from_numpy(one.targets_NC).to(model.device),
        torch.from_numpy(one.weights_NC).to(model.device),
    )
    (loss * scale).backward()
    return loss.detach()


def gradients_of(model: EmotionClassifier) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in trained_of(model) if parameter.grad is not None]
    assert len(found) == len(trained_of(model))
    return found


class Unrecorded(GraphedPasses):
    """Computes at each replay, by what the device was given, what a GPU would have recorded."""

    def _has_room(self, tokens: int) -> bool:
        return True

    def _record(self, pack: Pack, shape: Any, dropout_key: int) -> _Recorded:
        given, scale, loss = self._given(pack, shape, dropout_key), torch.ones(()), torch.zeros(())
        self._lend_sums()

        def replay() -> None:
            found, gradients = self._gradients(given, shape, scale)
            loss.copy_(found)
            torch._foreach_add_(self._sums, gradients)

        graph: Any = SimpleNamespace(replay=replay)
        return _Recorded(graph, given, scale, loss)


def near(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], to: float = 1e-5) -> None:
    scale = max(float(one.abs().max()) for one in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=to * scale, rtol=to)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
def test_what_is_recorded_of_an_encoder_gives_the_gradients_of_its_packs(
    tmp_path: Path, kind: str, pooling: str, lora: LoraSection | None
) -> None:
    """A recording reads boundaries with empty segments, and posts that weigh nothing."""
    model = made(tmp_path, kind, pooling, lora)
    graphs = GraphedPasses(model, trained_of(model), lambda tokens: 0, 4096, "one")
    shapes = set()
    for lengths in LENGTHS:
        one, key = pack_of(lengths), key_of(1, len(lengths))
        model.zero_grad()
        wanted_loss = plain(model, one, 0.25, key)
        wanted = gradients_of(model)
        shape = graphs._shape(one)
        shapes.add(shape)
        loss, found = graphs._gradients(graphs._given(one, shape, key), shape, torch.tensor(0.25))
        torch.testing.assert_close(loss, wanted_loss, atol=0, rtol=1e-6)
        near(found, wanted)
    assert {(shape.posts, shape.longest) for shape in shapes} == {(64, 128), (64, 256), (128, 128)}


def varlen_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_lengths: torch.Tensor,
    _: torch.Tensor,
    longest: int,
    __: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What the varlen kernel computes on a GPU, by a mask of all tokens."""
    tokens_T = torch.arange(len(query))
    segments_T = torch.searchsorted(cu_lengths, tokens_T, right=True)
    distance_TT = (tokens_T[:, None] - tokens_T).abs()
    seen_TT = (segments_T[:, None] == segments_T) & (distance_TT < longest)
    if window_size[0] >= 0:
        seen_TT &= distance_TT <= window_size[0]
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    out_HTD = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen_TT, scale=scale)
    return out_HTD.transpose(0, 1)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a number that a GPU has, which ends a recording."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        assert name != "segment_reduce" or kwargs.get("unsafe"), "its checks of the lengths wait"
        return func(*args, **kwargs)


@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
def test_the_passes_of_an_encoder_ask_the_device_for_no_number(
    tmp_path: Path, kind: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get only what the varlen kernel is given: a recording knows no other posts' lengths."""
    model = made(tmp_path, kind, pooling, LORA)
    graphs = GraphedPasses(model, trained_of(model), lambda tokens: 0, 4096, "one")
    one, key = pack_of([3, 17, 1, 130, 3]), key_of(1, 1)
    wanted_loss, wanted = plain(model, one, 0.25, key), gradients_of(model)
    monkeypatch.setattr("emotion_train.model.head.is_fused", lambda device, compute: True)
    monkeypatch.setattr("emotion_train.model.attention.varlen_attn", varlen_reference)
    monkeypatch.setattr(Segments, "recorded", lambda boundaries, longest: Segments((), boundaries, longest))
    shape = graphs._shape(one)
    given, scale = graphs._given(one, shape, key), torch.tensor(0.25)
    with NoWaiting():
        loss, found = graphs._gradients(given, shape, scale)
    torch.testing.assert_close(loss, wanted_loss, atol=0, rtol=1e-5)
    near(found, wanted, to=1e-4)  # one product sums over all tokens of the pack


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
def test_packs_with_and_without_a_graph_add_up_to_the_gradients_of_a_step(
    tmp_path: Path, lora: LoraSection | None
) -> None:
    """Packs that have a graph, first, last and between others that have none yet."""
    packs = [pack_of(lengths) for lengths in LENGTHS]
    model, other = (made(tmp_path / name, "bert", "cls", lora) for name in ("plain", "recorded"))
    optimizer = torch.optim.SGD(trained_of(other), lr=0.01)
    graphs = Unrecorded(other, trained_of(other), lambda tokens: 0, 4096, "one")
    replayed, first = 0, []
    for step, numbers in enumerate([[0, 1], [2, 0, 1, 0], [2, 0], [1, 2, 3], [0]]):
        for number in numbers:
            one, key = packs[number], key_of(1, step)
            wanted_loss, loss = plain(model, one, 0.5, key), graphs(one, 0.5, key)
            replayed += loss is not None
            loss = plain(other, one, 0.5, key) if loss is None else loss
            torch.testing.assert_close(loss, wanted_loss, atol=0, rtol=1e-6)
            first += [loss.item()] if number == 0 else []
        near(gradients_of(other), gradients_of(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        model.load_state_dict(other.state_dict())  # else rounding grows from step to step
    assert replayed == 8
    assert len(set(first)) == 4  # of one pack, in four steps


class Forbidden(Unrecorded):
    """Fails in its second recording."""

    def _record(self, pack: Pack, shape: Any, dropout_key: int) -> _Recorded:
        if self._recorded:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        return super()._record(pack, shape, dropout_key)


def test_a_recording_that_fails_is_told_once_and_costs_the_graph_alone(tmp_path: Path) -> None:
    model, said = made(tmp_path, "bert", "cls", None), list[str]()
    graphs = Forbidden(model, trained_of(model), lambda tokens: 0, 4096, "one", say=said.append)
    first, second, third = (pack_of(lengths) for lengths in (LENGTHS[0], LENGTHS[2], LENGTHS[3]))
    answers = [graphs(one, 0.5, 1) for one in (first, first, second, second, second, third, third, first)]
    assert [loss is not None for loss in answers] == [False, True, *[False] * 5, True]
    (words,) = said
    assert words.endswith("slower: operation not permitted when stream is capturing")


@pytest.mark.parametrize("kind", ENCODERS)
def test_which_encoders_are_recorded(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tmp_path, kind, "cls", None)
    assert not pays(model, 1)  # a CPU
    monkeypatch.setattr("emotion_train.model.head.is_fused", lambda device, compute: True)
    assert pays(model, 1)
    assert not pays(model, 2)
    monkeypatch.setattr("emotion_train.model.graphs.RECORDED_BELOW", 1000)
    assert not pays(model, 1)
    monkeypatch.undo()
    monkeypatch.setattr("emotion_train.model.head.is_fused", lambda device, compute: True)
    if kind == "modernbert":
        model.classifier.model.rotary_emb.rope_type["full_attention"] = "dynamic"
        assert not pays(model, 1)
        model.classifier.model.rotary_emb.rope_type["full_attention"] = "linear"
        assert pays(model, 1)
    model.enable_gradient_checkpointing()
    assert not pays(model, 1)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
def test_a_graph_of_an_encoder_repeats_what_it_recorded_to_the_bit(
    tmp_path: Path, kind: str, pooling: str, lora: LoraSection | None
) -> None:
    """Other posts, other masks and other weights than those of the recording; without the graph the
    same passes run one kernel at a time. For more than 3,072 tokens PyTorch adds the gradients of
    a table's rows by another kernel, whose order may differ in a recording.
    """
    model = made(tmp_path, kind, pooling, lora, "cuda")
    assert pays(model, 1)
    graphs = GraphedPasses(model, trained_of(model), lambda tokens: 0, 4096, "one")
    optimizer = torch.optim.AdamW(trained_of(model), lr=1e-2, fused=True)
    scale = torch.tensor(0.25, device="cuda")
    for lengths in (*LENGTHS, MANY):
        for seed in (0, 1):  # is None when the shape is new, and a recording then
            graphs(pack_of(lengths, 128, seed), 1.0, 0)
    losses = []
    for step in range(3):
        for lengths in (*LENGTHS, MANY):
            one, key = pack_of(lengths, 128, 2), key_of(1, step)
            shape = graphs._shape(one)
            wanted_loss, wanted = graphs._gradients(graphs._given(one, shape, key), shape, scale)
            model.zero_grad()
            loss = graphs(one, 0.25, key)
            assert loss is not None
            assert torch.equal(loss, wanted_loss)
            found = gradients_of(model)
            if lora is None and shape.tokens > 3072:
                near(found, wanted)
            else:
                assert all(map(torch.equal, found, wanted))
            losses.append(loss.item())
        optimizer.step()
    assert len(set(losses)) == len(losses)


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
def test_an_encoder_trained_by_graphs_has_the_bits_of_one_trained_without(
    tmp_path: Path, kind: str, pooling: str, lora: LoraSection | None
) -> None:
    """For packs of 64 posts, to which a graph adds none: only the bounds of the varlen kernel
    differ, and an empty segment.
    """
    packs = [pack_of(lengths, 128) for lengths in ([5, 12] * 32, [3, 9, 14, 140] * 16, [20, 4] * 32)]
    steps = [[0, 1], [2, 0], [1, 2], [2, 1, 0], [2]]
    found = []
    for recorded in (False, True):
        model = made(tmp_path / str(recorded), kind, pooling, lora, "cuda")
        parameters = trained_of(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        graphs = GraphedPasses(model, parameters, lambda tokens: 0, 4096, "one")
        losses, replayed = [], 0
        for step, numbers in enumerate(steps):
            for number in numbers:
                loss = graphs(packs[number], 0.5, key_of(1, step)) if recorded else None
                replayed += loss is not None
                loss = plain(model, packs[number], 0.5, key_of(1, step)) if loss is None else loss
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert replayed == (7 if recorded else 0)
        found.append((losses, [parameter.detach().clone() for parameter in parameters]))
    (wanted_losses, wanted), (losses, weights) = found
    assert losses == wanted_losses
    assert all(map(torch.equal, weights, wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
def test_posts_that_fill_up_a_graph_of_an_encoder_change_gradients_by_rounding_alone(
    tmp_path: Path, kind: str, pooling: str, lora: LoraSection | None
) -> None:
    """The head's products may sum more rows in another order, which bfloat16 rounds up."""
    model = made(tmp_path, kind, pooling, lora, "cuda")
    graphs = GraphedPasses(model, trained_of(model), lambda tokens: 0, 4096, "one")
    for lengths in LENGTHS:
        one, key = pack_of(lengths, 128), key_of(1, 1)
        model.zero_grad()
        wanted_loss, wanted = plain(model, one, 0.25, key), gradients_of(model)
        graphs(one, 1.0, 0)
        graphs(one, 1.0, 0)
        model.zero_grad()
        loss = graphs(one, 0.25, key)
        assert loss is not None
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=0)
        ours, theirs = (torch.cat([one.flatten() for one in some]) for some in (gradients_of(model), wanted))
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.gpu
def test_a_model_that_asks_the_gpu_for_a_number_trains_without_a_graph(tmp_path: Path) -> None:
    """And one that does not is recorded after it."""
    said: list[str] = []
    for asks in (True, False):
        model = made(tmp_path / str(asks), "bert", "cls", None, "cuda")
        if asks:
            model.layers[0].register_forward_hook(lambda layer, given, found: found[0].sum().item() and None)
        graphs = GraphedPasses(model, trained_of(model), lambda tokens: 0, 4096, "one", say=said.append)
        stream = torch.cuda.current_stream()
        for key in range(4):
            one = pack_of(LENGTHS[2], 128, seed=key)
            model.zero_grad()
            wanted_loss, wanted = plain(model, one, 0.25, key), gradients_of(model)
            model.zero_grad()
            loss = graphs(one, 0.25, key)
            assert (loss is not None) == (key > 0 and not asks)
            loss = plain(model, one, 0.25, key) if loss is None else loss
            near([loss, *gradients_of(model)], [wanted_loss, *wanted])
            assert torch.cuda.current_stream() == stream
        assert len(said) == 1
    assert "CUDA graphs" in said[0]
