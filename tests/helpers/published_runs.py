"""Runs that are published without being trained: what a model of a chosen skill says about the
posts of a prepared data set, with its report, by the program's own writers.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from emotion_train.config import load_config
from emotion_train.data.index import read_index
from emotion_train.data.targets import largest
from emotion_train.evaluation.floors import posts
from emotion_train.evaluation.metrics import confusion
from emotion_train.evaluation.predictions import Predictions
from emotion_train.preparation.steps import prepare
from emotion_train.report.figures import Measured, SplitResult, build_report, dataset_facts
from emotion_train.report.schema import Identity
from emotion_train.runs.log import Writer
from emotion_train.runs.publish import final_files, publish
from emotion_train.storage.open import open_store

SHARES = {"calm": 0.5, "glee": 0.3, "rage": 0.2}
ROWS = {"train": 60, "validation": 40, "test": 240}


def write_data(
    folder: Path, name: str = "data", train_seed: int = 0, test_words: str = "so", seed: int = 42
) -> str:
    """A prepared data set below `folder`; its test posts are the same for any `train_seed`, and
    have the same ids and labels for any `test_words`; `seed` shuffles them.
    """
    source = folder / f"source-{name}"
    source.mkdir(parents=True)
    for split, rows in ROWS.items():
        draw = random.Random(f"{split} {train_seed if split == 'train' else 0}")
        with (source / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(rows):
                label = draw.choices(list(SHARES), list(SHARES.values()))[0]
                words = test_words if split == "test" else draw.choice(["tea", "rain", "stars"])
                writer.writerow([f"{words} {label} {split} {row} {draw.random()}", label])
    prepare(str(source), str(folder / name), seed=seed)
    return str(folder / name)


def said_by(
    ids: Sequence[str], truth: Sequence[int], skill: float, seed: int, classes: int = len(SHARES)
) -> Predictions:
    """Probabilities whose true logit is `skill` higher; what is hard is hard for every seed."""
    order = np.argsort(np.argsort(ids))  # no chance of an order
    hard_NC = np.random.default_rng(7).normal(size=(len(ids), classes))[order]
    logits_NC = hard_NC + np.random.default_rng(seed).normal(size=(len(ids), classes))[order] / 2
    logits_NC[np.arange(len(ids)), truth] += skill
    prob_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    return Predictions.of(ids, truth, prob_NC)


def publish_run(
    folder: Path,
    run_id: str,
    *overrides: str,
    skill: float = 2.0,
    data: str | None = None,
    texts: bool = False,
    usd_per_hour: float | None = None,
) -> str:
    """Publish a run below `folder`/runs; returns its URL. `run.seed` is among the overrides."""
    config = load_config(
        None,
        [
            f"data.url={data or folder / 'data'}",
            f"run.output_url={folder / 'runs'}",
            f"run.id={run_id}",
            "model.base=some/base",
            "report.bootstrap_samples=100",
            f"report.usd_per_hour={'null' if usd_per_hour is None else usd_per_hour}",
            *overrides,
        ],
    )
    store, output = open_store(config.data.url), open_store(config.run.output_url)
    index, now = read_index(store), datetime(2026, 1, 2, tzinfo=UTC)
    splits, words = {}, {}
    for name in ("validation", "test"):
        ids, read, targets = zip(*posts(store, index.split(name)), strict=True)
        own = said_by(ids, [*map(largest, targets)], skill, config.run.seed, len(index.labels))
        splits[name] = SplitResult(confusion(own.truth_N, own.predicted_N, len(index.labels)), own)
        words[name] = dict(zip(ids, read, strict=True))
    report = build_report(
        labels=index.labels,
        splits=splits,
        history=[],
        best_step=None,
        dataset=dataset_facts(index, {}),
        measured=Measured(600, 9000, 9000, 30.0, 1.0, 36.0, 2**30, "RSS"),
        identity=Identity(
            run_id=run_id,
            config=config.model_dump(mode="json"),
            config_sha256=config.sha256(),
            index_sha256=index.sha256(),
            data_url=config.data.url,
            base=config.model.base,
            precision=config.model.precision,
            versions={"torch": "2.11", "emotion_train": "0.1.0"},
            git_commit=None,
            device="CPU",
            world_size=1,
            started_utc=now,
            ended_utc=now,
        ),
        settings=config.report,
        seed=config.run.seed,
    )
    adapter = folder / f"adapter-{run_id}"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    writer = Writer(output, run_id, index.sha256(), config.sha256())
    writer.claim(0, 0)
    files = final_files(adapter, report, splits, words if texts else None)
    publish(writer, 1, 10, files, report, b"filter")
    return f"{output.url}/{run_id}"
