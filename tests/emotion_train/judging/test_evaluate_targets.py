"""Posts of several labels and of shares are scored on a split and on a file, in any order of labels
and in the forms in which people have them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from emotion_train import api, cli
from emotion_train.config import LoraSection
from emotion_train.data.index import read_index
from emotion_train.data.targets import Target, TargetKind, dense, is_target
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.floors import TFIDF
from emotion_train.evaluation.predictions import Predictions, SetPredictions, any_predictions_from_parquet
from emotion_train.judging.file_posts import FilePosts
from emotion_train.judging.question import Question
from emotion_train.model.facts import AdapterFacts, read_facts
from emotion_train.model.lora import adapter_state, build_classifier, load_adapter_state, save_adapter
from emotion_train.report.schema import Scorecard
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


def in_adapter(target: Target) -> Target:
    """The same with the adapter's label ids."""
    return tuple(sorted((LABELS.index(OF_DATA[label]), share) for label, share in target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters and data sets of several labels and of shares; the first adapter was trained on
    `trained-several`, which has its labels.
    """
    folder = tmp_path_factory.mktemp("targets")
    base, lora = str(causal_checkpoint(folder / "base")), LoraSection(r=2)
    model, info = build_classifier(base, "fp32", len(LABELS), lora, 0, "cpu")
    draw = torch.Generator().manual_seed(5)
    load_adapter_state(
        model, {k: v + 0.2 * torch.randn(v.shape, generator=draw) for k, v in adapter_state(model).items()}
    )
    tokenizer = PostTokenizer.load(base, 64)
    trained_on = str(folder / "trained-several")
    own = {name: [(text, in_adapter(target)) for text, target in some] for name, some in SPLITS.items()}
    index = read_index(write_targets(trained_on, "several", own, folder, LABELS))
    kinds: tuple[TargetKind, ...] = ("several", "shares")
    for targets in kinds:
        facts = AdapterFacts.of(
            info,
            tokenizer,
            precision="fp32",
            lora=lora,
            labels=LABELS,
            targets=targets,
            index_sha256=index.sha256() if targets == "several" else None,
            data_url=trained_on if targets == "several" else None,
        )
        save_adapter(model, folder / targets, tokenizer=tokenizer, facts=facts)
        splits = {
            name: [(text, target if targets == "several" else shared(target)) for text, target in some]
            for name, some in SPLITS.items()
        }
        write_targets(str(folder / f"data-{targets}"), targets, splits, folder, OF_DATA)
    decision = Decision(targets="several", labels=LABELS, thresholds=THRESHOLDS)
    (folder / "several" / DECISION).write_bytes(decision.to_bytes())
    return folder


def wanted(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The truth and the answers of the test posts, in the adapter's labels."""
    texts, targets = zip(*SPLITS["test"], strict=True)
    found = api.load_adapter(folder / "several", device="cpu").predict(texts)
    truth_NC, answers_NC = np.zeros((len(texts), 4), bool), np.zeros((len(texts), 4), bool)
    for row, (target, prediction) in enumerate(zip(targets, found, strict=True)):
        truth_NC[row, [LABELS.index(OF_DATA[label]) for label, _ in target]] = True
        answers_NC[row, [LABELS.index(label) for label in prediction.labels]] = True
    return truth_NC, answers_NC


def test_a_split_of_several_labels_is_scored_with_the_decision_s_thresholds(folder: Path) -> None:
    out = folder / "out-several"
    card = api.evaluate_adapter(folder / "several", folder / "data-several", out=out, device="cpu")
    truth_NC, answers_NC = wanted(folder)
    assert card.figures.macro_f1 == pytest.approx(
        f1_score(truth_NC, answers_NC, average="macro", zero_division=0)
    )
    assert {floor.name for floor in card.figures.floors} > {TFIDF}
    stored = any_predictions_from_parquet((out / "predictions_test.parquet").read_bytes())
    assert isinstance(stored, SetPredictions)
    rows = [stored.ids.index(f"test {row}") for row in range(len(truth_NC))]
    assert (stored.truth_NC[rows] == truth_NC).all()
    assert (stored.predicted_NC[rows] == answers_NC).all()


def spelled(kind: TargetKind, form: str, path: Path) -> tuple[str, ...] | None:
    """The test posts in a file of this form; returns the columns of labels that it has."""
    texts = [text for text, _ in SPLITS["test"]]
    targets = [target if kind == "several" else shared(target) for _, target in SPLITS["test"]]
    shares = [{OF_DATA[label]: share for label, share in target} for target in targets]
    if form == "columns":
        cells = [[f"{of_post.get(label, 0):g}" for label in OF_DATA] for of_post in shares]
        rows = [",".join([text, *row]) for text, row in zip(texts, cells, strict=True)]
        path.write_text("\n".join([f"text,{','.join(OF_DATA)}", *rows]))
        return (f"{OF_DATA[0]}..{OF_DATA[-1]}",)
    if form in ("lists", "objects", "votes"):
        values: list[object] = [
            of_post if form == "objects" else [*of_post] * (2 if form == "votes" else 1) for of_post in shares
        ]
        lines = [
            json.dumps({"text": text, "label": value}) for text, value in zip(texts, values, strict=True)
        ]
        path.write_text("\n".join(lines))
        return None
    ids = [[str(LABELS.index(name)) for name in of_post] for of_post in shares]
    cells = [list(of_post) for of_post in shares] if form != "ids" else ids
    mark = {"bars": "|", "semicolons": "; ", "ids": ","}[form]
    rows = [f'{text},"{mark.join(row)}"' for text, row in zip(texts, cells, strict=True)]
    path.write_text("\n".join(["text,label", *rows]))
    return None


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("several", form) for form in ("bars", "semicolons", "ids", "lists", "columns")),
        *(("shares", form) for form in ("objects", "votes", "columns")),
    ],
)
def test_a_file_is_read_in_every_form(folder: Path, tmp_path: Path, kind: TargetKind, form: str) -> None:
    path = tmp_path / ("posts.jsonl" if form in ("lists", "objects", "votes") else "posts.csv")
    columns = spelled(kind, form, path)
    asked = Question(
        AdapterChoice(folder / kind), file=str(path), label_columns=columns, allow_none=kind == "several"
    )
    found = FilePosts.read(asked, read_facts(folder / kind))
    assert found.texts == [text for text, _ in SPLITS["test"]]
    true = [target if kind == "several" else shared(target) for _, target in SPLITS["test"]]
    places = [LABELS.index(name) for name in OF_DATA]
    assert dense(found.targets, len(LABELS))[:, places] == pytest.approx(dense(true, len(OF_DATA)), abs=1e-5)
    assert all(is_target(target, kind, len(LABELS)) for target in found.targets)


def test_a_file_of_several_labels_is_answered_by_the_decision_s_thresholds(
    folder: Path, tmp_path: Path
) -> None:
    spelled("several", "columns", tmp_path / "posts.csv")
    words = ["evaluate", "--adapter", str(folder / "several"), "--device", "cpu", "--allow-none"]
    words += ["--file", str(tmp_path / "posts.csv"), "--label-columns", "rage, calm,joy"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    stored = any_predictions_from_parquet((tmp_path / "out" / "predictions_file.parquet").read_bytes())
    truth_NC, answers_NC = wanted(folder)
    assert isinstance(stored, SetPredictions)
    order = np.argsort([int(post.rpartition(":")[2]) for post in stored.ids])
    assert (stored.truth_NC[order] == truth_NC).all()
    assert (stored.predicted_NC[order] == answers_NC).all()
    card = Scorecard.model_validate_json((tmp_path / "out" / "scorecard.json").read_bytes())
    split = api.evaluate_adapter(folder / "several", folder / "trained-several", device="cpu")
    assert split.figures.macro_f1 == card.figures.macro_f1
    assert TFIDF in {floor.name for floor in card.figures.floors}
    of_file, of_split = (
        next(floor for floor in figures.floors if floor.name == TFIDF)
        for figures in (card.figures, split.figures)
    )
    assert of_file == of_split


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
    ("adapter", "asked", "says"),
    [
        ("shares", {"data_url": "data-several"}, "have several labels and the adapter answers with shares"),
        (
            "several",
            {"data_url": "data-shares"},
            "have shares of labels and the adapter answers with several",
        ),
        ("shares", {"allow_none": True}, "--allow-none is for several labels, and the adapter answers with"),
        (
            "several",
            {"label_columns": ["joy", "awe"]},
            "a column for the label 'awe', which the adapter does",
        ),
        ("several", {"label_columns": ["joy", "fear"]}, "column that is neither 0 nor 1 +1 .*posts.csv:3"),
        ("several", {"label_columns": ["joy", "text"]}, "takes in column 'text'.*another meaning"),
        ("several", {}, "no label +1 .*posts.csv:2\n.*, or type --allow-none"),
        ("several", {"label_column": "odd"}, "unknown label +1 .*posts.csv:2\n    'ire' 1 time\nMend them; "),
        ("shares", {"label_columns": ["joy", "fear"]}, "negative or no number +1 .*posts.csv:3"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, asked: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(folder)
    Path("posts.csv").write_text('text,label,odd,joy,awe,fear\ntea,,"joy,ire",1,0,0\nboo,joy,joy,1,1,-1\n')
    asked = asked if "data_url" in asked else {"file": "posts.csv", **asked}
    with pytest.raises(WrongRequest, match=re.compile(says, re.DOTALL)):
        api.evaluate_adapter(adapter, device="cpu", **asked)
