"""Several adapters over one base answer as the mean of what each says on a base of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import emotion_train.model
from emotion_train.config import LoraSection
from emotion_train.errors import WrongRequest
from emotion_train.model.ensemble import Ensemble
from emotion_train.model.fused import FusedDecoder
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import adapter_state, build_classifier, load_adapter_state
from tests.emotion_train.model.test_attention import packed, posts
from tests.helpers import plain_kernels
from tests.helpers.tiny_models import causal_checkpoint


def a_model(folder: Path, targets: Any = "all-linear", r: int = 4) -> EmotionClassifier:
    lora = LoraSection(r=r, alpha=12, dropout=0.1, targets=targets)
    return build_classifier(str(folder), "fp32", 3, lora, 0, "cpu")[0].eval()


def drawn_states(model: EmotionClassifier, count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        {name: 0.1 * torch.randn(one.shape, generator=draw) for name, one in adapter_state(model).items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("up_proj", "down_proj")])
@pytest.mark.parametrize("fused", [False, True])
def test_the_mean_of_logits_is_that_of_each_member_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, targets: Any, fused: bool
) -> None:
    monkeypatch.setattr(emotion_train.model, "kernels", plain_kernels, raising=False)
    monkeypatch.setitem(sys.modules, "emotion_train.model.kernels", plain_kernels)
    causal_checkpoint(tmp_path / "base", "mistral", sliding_window=6)
    alone = a_model(tmp_path / "base", targets)
    states = drawn_states(alone, 3)
    each = []
    for state in states:
        load_adapter_state(alone, state)
        each.append(packed(alone, posts(), filling=7).detach())
    model = a_model(tmp_path / "base", targets)
    if fused:
        model.decoder = FusedDecoder(model.classifier)
    ensemble: Any = Ensemble(model, states)
    found = packed(ensemble, posts(), filling=7)
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-5, atol=1e-6)
    assert (each[0] - each[1]).abs().max() > 1e-3
    ensemble.temperature = torch.tensor([2.0])
    torch.testing.assert_close(packed(ensemble, posts(), filling=7), found / 2)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    causal_checkpoint(tmp_path / "base", "mistral")
    other = adapter_state(a_model(tmp_path / "base", r=2))
    model = a_model(tmp_path / "base")
    with pytest.raises(WrongRequest, match="does not fit the model"):
        Ensemble(model, [adapter_state(model), other])
