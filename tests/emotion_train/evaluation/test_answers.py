"""A saved adapter answers as its targets and its decision say, in Python and by the verb."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emotion_train import api, cli
from emotion_train.config import LoraSection
from emotion_train.data.targets import TargetKind
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.gate import Gate
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.lora import adapter_state, build_classifier, load_adapter_state, save_adapter
from tests.helpers.tiny_models import causal_checkpoint

LABELS = ("calm", "fear", "joy")
TEXTS = ["what a lovely mess", "so tired", "日本 😀", "tea", "never again, never"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters `one`, `several` and `shares`, which differ in nothing but their targets."""
    folder = tmp_path_factory.mktemp("answers")
    base, lora = str(causal_checkpoint(folder / "base")), LoraSection(r=2)
    model, info = build_classifier(base, "fp32", len(LABELS), lora, 0, "cpu")
    draw = torch.Generator().manual_seed(5)
    load_adapter_state(
        model, {k: v + 0.2 * torch.randn(v.shape, generator=draw) for k, v in adapter_state(model).items()}
    )
    tokenizer = PostTokenizer.load(base, 24)
    kinds: tuple[TargetKind, ...] = ("one", "several", "shares")
    for targets in kinds:
        facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=lora, labels=LABELS, targets=targets)
        save_adapter(model, folder / targets, tokenizer=tokenizer, facts=facts)
    return folder


def decide(folder: Path, *thresholds: float) -> None:
    decision = Decision(targets="several", labels=LABELS, thresholds=thresholds)
    (folder / "several" / DECISION).write_bytes(decision.to_bytes())


def test_several_labels_are_those_that_reach_their_threshold(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decide(folder, 0.5, 0.5, 0.5)
    classifier = api.load_adapter(folder / "several", device="cpu")
    prob_NC = classifier.probabilities(TEXTS)
    softmax_NC = api.load_adapter(folder / "one", device="cpu").probabilities(TEXTS)
    odds_NC = prob_NC.astype(np.float64) / (1 - prob_NC)  # those of a logit: e^logit
    np.testing.assert_allclose(odds_NC / odds_NC.sum(axis=1, keepdims=True), softmax_NC, rtol=0.01)
    assert np.abs(prob_NC.sum(axis=1) - 1).min() > 1e-3

    above = min(1.0, float(prob_NC[:, 1].max()) + 0.001)
    thresholds = [float(prob_NC[0, 0]), above, float(np.median(prob_NC[:, 2]))]
    decide(folder, *thresholds)
    found = api.load_adapter(folder / "several", device="cpu").predict(TEXTS)
    for prediction, prob_C in zip(found, prob_NC.tolist(), strict=True):
        reached = [place for place in range(3) if prob_C[place] >= thresholds[place]]
        likeliest_first = sorted(reached, key=lambda place: -prob_C[place])
        assert prediction.labels == tuple(LABELS[place] for place in likeliest_first)
        assert prediction.label == (prediction.labels[0] if reached else None)
        assert prediction.probabilities == pytest.approx(dict(zip(LABELS, prob_C, strict=True)))
    assert len({prediction.labels for prediction in found}) > 1

    words = ["predict", "--adapter", str(folder / "several"), "--device", "cpu", "--format", "jsonl", *TEXTS]
    capsys.readouterr()
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [tuple(line["labels"]) for line in lines] == [prediction.labels for prediction in found]


@pytest.mark.parametrize("targets", ["one", "shares"])
def test_one_label_and_shares_are_answered_by_the_highest_probability(folder: Path, targets: str) -> None:
    found = api.load_adapter(folder / targets, device="cpu").predict(TEXTS)
    for prediction in found:
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
        highest = max(prediction.probabilities, key=prediction.probabilities.__getitem__)
        assert (prediction.label, prediction.labels) == (highest, (highest,))


def test_a_gate_marks_answers_and_raw_probabilities_change_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = folder / "one"
    try:
        published_NC = api.load_adapter(adapter, device="cpu").probabilities(TEXTS)
        at = float(np.sort(published_NC.max(axis=1))[2])
        gates = (
            Gate(label=None, precision=0.9, threshold=at, share=0.6),
            Gate(label=None, precision=0.99, threshold=None, share=None),
        )
        decision = Decision(targets="one", labels=LABELS, temperature=(0.5,), gates=gates)
        (adapter / DECISION).write_bytes(decision.to_bytes())
        classifier = api.load_adapter(adapter, device="cpu")
        accepted = [one.accepted for one in classifier.predict(TEXTS, accept_precision=0.9)]
        assert accepted == (published_NC.max(axis=1) >= np.float32(at)).tolist()
        assert accepted.count(True) == 3
        assert classifier.predict(TEXTS)[0].accepted is None
        words = ["predict", "--adapter", str(adapter), "--device", "cpu", "--format", "jsonl"]
        capsys.readouterr()
        assert cli.main([*words, "--accept-precision", "0.9", "--raw", *TEXTS]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["accepted"] for line in lines] == accepted
        assert [line["label"] for line in lines] == [LABELS[best] for best in published_NC.argmax(axis=1)]
        root_NC = np.sqrt(published_NC.astype(np.float64))  # logits times 0.5
        raw_NC = np.array([list(line["probabilities"].values()) for line in lines])
        np.testing.assert_allclose(raw_NC, root_NC / root_NC.sum(axis=1, keepdims=True), atol=2e-6)
        for wrong, sentence in (("0.99", "No probability of this adapter is enough"), ("0.5", "no gate for")):
            assert cli.main([*words, "--accept-precision", wrong, "tea"]) == 2
            assert sentence in capsys.readouterr().err
        with pytest.raises(WrongRequest, match=r"no gate for a precision of 0\.7"):
            classifier.predict(TEXTS, accept_precision=0.7)
    finally:
        (adapter / DECISION).unlink(missing_ok=True)
    assert cli.main([*words, "--accept-precision", "0.9", "tea"]) == 2
    assert "has no gates, as an earlier version published it" in capsys.readouterr().err
    assert cli.main([*words, "--raw", "tea"]) == 0
    assert "has no temperature, so --raw changes nothing" in capsys.readouterr().err


def test_an_adapter_of_several_labels_without_its_decision_is_refused_before_it_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "several" / DECISION).unlink(missing_ok=True)
    with pytest.raises(WrongRequest, match=f"has no {DECISION}"):
        api.load_adapter(folder / "several", base="no/such-base", device="cpu")
    assert cli.main(["predict", "--adapter", str(folder / "several"), "tea"]) == 2
    assert DECISION in capsys.readouterr().err
