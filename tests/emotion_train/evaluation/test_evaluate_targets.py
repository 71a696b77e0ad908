"""Posts of a split are scored by an adapter of the same targets, in any order of labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emotion_train import api
from emotion_train.config import LoraSection
from emotion_train.data.targets import Target, TargetKind
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.predictions import Predictions, any_predictions_from_parquet
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.lora import adapter_state, build_classifier, load_adapter_state, save_adapter
from tests.helpers.target_data import Post, having, write_targets
from tests.helpers.tiny_models import causal_checkpoint

LABELS = ("calm", "fear", "joy", "rage")  # of the adapter
OF_DATA = ("rage", "calm", "joy")
THRESHOLDS = (0.5, 0.45, 0.55, 0.4)
WORDS = {"rage": "stop shouting", "calm": "tea and rain", "joy": "party"}


def posts(seed: int, rows: int) -> list[Post]:
    """Posts with any of the data set's labels, and the words of each."""
    draw = np.random.default_rng(seed)
    found: list[Post] = []
    for row in range(rows):
        labels = np.flatnonzero(draw.random(3) < 0.45).tolist()
        words = [WORDS[OF_DATA[label]] for label in labels]
        found.append((" ".join([*words, f"post {seed} {row}"]), having(*labels)))
    return found


SPLITS = {"train": posts(0, 40), "validation": posts(1, 20), "test": posts(2, 30)}


def shared(target: Target) -> Target:
    """The target as shares; of a post without a label, calm."""
    return tuple((label, 1 / len(target)) for label, _ in target) or ((1, 1.0),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters and data sets called `several` and `shares`."""
    folder = tmp_path_factory.mktemp("targets")
    base, lora = str(causal_checkpoint(folder / "base")), LoraSection(r=2)
    model, info = build_classifier(base, "fp32", len(LABELS), lora, 0, "cpu")
    draw = torch.Generator().manual_seed(5)
    load_adapter_state(
        model, {k: v + 0.2 * torch.randn(v.shape, generator=draw) for k, v in adapter_state(model).items()}
    )
    tokenizer = PostTokenizer.load(base, 64)
    kinds: tuple[TargetKind, ...] = ("several", "shares")
    for targets in kinds:
        facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=lora, labels=LABELS, targets=targets)
        save_adapter(model, folder / targets, tokenizer=tokenizer, facts=facts)
        splits = {
            name: [(text, target if targets == "several" else shared(target)) for text, target in some]
            for name, some in SPLITS.items()
        }
        write_targets(str(folder / f"data-{targets}"), targets, splits, folder, OF_DATA)
    decision = Decision(targets="several", labels=LABELS, thresholds=THRESHOLDS)
    (folder / "several" / DECISION).write_bytes(decision.to_bytes())
    return folder


def test_shares_are_scored_on_the_largest_and_by_distance(folder: Path) -> None:
    out = folder / "out-shares"
    api.evaluate_adapter(folder / "shares", folder / "data-shares", out=out, device="cpu")
    stored = any_predictions_from_parquet((out / "predictions_test.parquet").read_bytes())
    assert isinstance(stored, Predictions)
    assert stored.shares_NC is not None
    row = stored.ids.index("test 0")
    own = np.zeros(4)
    for label, share in shared(SPLITS["test"][0][1]):
        own[LABELS.index(OF_DATA[label])] = share
    assert stored.shares_NC[row].tolist() == pytest.approx(own.tolist())
    assert stored.truth_N[row] == own.argmax()


@pytest.mark.parametrize(
    ("adapter", "data", "says"),
    [
        ("shares", "data-several", "have several labels and the adapter answers with shares of labels"),
        ("several", "data-shares", "have shares of labels and the adapter answers with several labels"),
    ],
)
def test_posts_of_other_targets_are_refused(folder: Path, adapter: str, data: str, says: str) -> None:
    with pytest.raises(WrongRequest, match=says):
        api.evaluate_adapter(folder / adapter, folder / data, device="cpu")
