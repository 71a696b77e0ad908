"""Labelling made small: a model that answers by the text's hash, posts, and what the parts of a job
hold.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from emotion_train.data.packing import Pack
from emotion_train.evaluation.decision import Decision
from emotion_train.labelling.job import AdapterIdentity, Job, Reading, create_job
from emotion_train.labelling.planning import FoundSource, find_source, plan_units, with_plan
from emotion_train.labelling.worker import About, Worker
from emotion_train.storage.store import Store

LABELS = ("anger", "joy", "rage")


class HashScorer:
    """Probabilities that the text alone decides, at once and without a model."""

    device = "hash"
    busy_s = 0.0

    def packs(self, texts: Sequence[str]) -> list[Pack]:
        return [texts]  # type: ignore[list-item]

    def remark(self) -> str | None:
        return None

    def start(self, packs: Sequence[Pack], count: int) -> Answered:
        texts: Sequence[str] = packs[0]  # type: ignore[assignment]
        return Answered(probabilities(texts))


class Answered:
    def __init__(self, prob_NC: Any) -> None:
        self._prob_NC = prob_NC

    def result(self) -> Any:
        return self._prob_NC


def probabilities(texts: Sequence[str]) -> Any:
    """`prob_NC` of texts."""
    draws = [[zlib.crc32(f"{label}{text}".encode()) / 2**32 for label in LABELS] for text in texts]
    prob_NC = np.array(draws, np.float32).reshape(len(texts), len(LABELS))
    return prob_NC / np.maximum(prob_NC.sum(axis=1, keepdims=True), np.float32(1e-9))


def write_lines(path: Path, posts: int, **more: Any) -> Path:
    """A JSONL file of so many posts, numbered in `n`."""
    rows = ({"text": f"post {number}", "n": number, **more} for number in range(posts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_job(
    store: Store, source: str, unit_posts: int, reading: Reading | None = None, **fields: Any
) -> tuple[Job, FoundSource]:
    """A job of the hash model at this store, and its source."""
    reading = reading or Reading()
    found = find_source(source, reading)
    files, units = plan_units(found, reading, unit_posts)
    adapter = AdapterIdentity(
        name="hash", weights_sha256="w", base="b", base_weights_sha256="b", tokenizer_sha256="t", max_length=9
    )
    told: dict[str, Any] = {
        "id": "job",
        "source": source,
        "kind": found.kind,
        "index_sha256": found.index_sha256,
        "files": files,
        "units": units,
        "reading": reading,
        "adapters": (adapter,),
        "precision": "fp32",
        "targets": "one",
        "labels": LABELS,
    }
    job = create_job(store, Job(**(told | fields)))
    return job, with_plan(found, job.files)


def make_worker(store: Store, job: Job, source: FoundSource, name: str = "one", **options: Any) -> Worker:
    decision = options.pop("decision", None) or Decision.one(job.labels, job.targets)
    scorer = options.pop("scorer", None) or HashScorer()
    options.setdefault("look_every_s", 0.02)
    return Worker(store, job, source, scorer, decision, About(name, "hash", 2.0), **options)


def labelled(store: Store) -> list[dict[str, Any]]:
    """All rows of all parts."""
    rows: list[dict[str, Any]] = []
    for info in store.list("part-"):
        rows += pq.read_table(io.BytesIO(store.read(info.key))).to_pylist()
    return rows
