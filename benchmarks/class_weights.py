"""Macro-F1 by class weights and by adapted layers, on posts that neither trained nor chose, through
the program's own command.

    python benchmarks/class_weights.py                          # all data sets, nine seeds
    python benchmarks/class_weights.py --sets demo --powers 0,1 --seeds 1,2 --at-once 2

For each data set the training file gives training and validation posts (each run takes its best
epoch on the latter), and the development file, which nothing chose by, is the test split that is
scored. SmolLM2-135M, LoRA and learning values of goemotions.yaml. Each result is a JSON line in
--out as soon as it is there; a run whose line is there is not repeated. `--table` prints what the
lines say and trains nothing.

The data sets: GoEmotions with 15 labels as it is (251:1), the same with at most 300 posts a label
(6:1), the 15 labels of goemotions-15-tds as they are (6:1), the same thinned to a tail of 78:1, and
the demonstration posts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from side_by_side import (
    add_base_argument,
    add_run_arguments,
    comma,
    command,
    lines,
    published,
    report_in,
    side_by_side,
    spread,
    workers,
)

from emotion_train.bases.packaged import small_model
from emotion_train.demo import POSTS

QKVO = "[q_proj,k_proj,v_proj,o_proj]"


class Run(NamedTuple):
    folder: Path
    base: str
    set: str
    targets: str
    power: str
    seed: str
    overrides: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.set}-{self.targets}-{self.power}-{self.seed}"


class Posts(NamedTuple):
    """Rows of a data set, (text, label), and how much a test post of each label counts, where that
    is not 1: a training split that was thinned stands for a population that is as thin, whose
    figure is had with less noise from all test posts by weight than from the few that were left.
    """

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    weights: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=comma, default=list(SETS), metavar="A,B", help="default: all")
    parser.add_argument("--powers", type=comma, default=["0", "0.25", "0.5", "0.75", "1"], metavar="A,B")
    parser.add_argument("--targets", default="all-linear", help="all-linear or qkvo (default: %(default)s)")
    add_base_argument(parser)
    add_run_arguments(parser, "class_weights.jsonl")
    arguments = parser.parse_args()
    if not arguments.table:
        train_all(arguments)
    print(table(arguments.out))


def train_all(arguments: argparse.Namespace) -> None:
    base = arguments.base or str(small_model())
    with tempfile.TemporaryDirectory(prefix="class-weights-") as temporary:
        folder = Path(temporary)
        with workers(arguments.at_once) as pool:
            list(pool.map(prepare, [folder] * len(arguments.sets), arguments.sets))
        runs = [
            Run(folder, base, name, arguments.targets, power, seed, tuple(arguments.overrides))
            for name in arguments.sets
            for seed in arguments.seeds
            for power in arguments.powers
        ]
        side_by_side(train, runs, arguments.at_once, arguments.out)


def prepare(folder: Path, name: str) -> None:
    posts, source = SETS[name](), folder / f"{name}-posts"
    source.mkdir()
    for split, rows in (("train", posts.train), ("test", posts.test)):
        texts, labels = zip(*rows, strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), source / f"{split}.parquet")
    (folder / f"{name}-weights.json").write_text(json.dumps(posts.weights))
    command("prepare", str(source), str(folder / name), "--on-bad", "drop")


def train(run: Run) -> dict[str, object]:
    """One run to its published report, and what that says of the test split."""
    values = [f"loss.class_weights={run.power}"]
    if run.targets != "all-linear":
        values.append(f"lora.targets={QKVO}")
    report = report_in(published(run, run.set, *values))
    weights = json.loads((run.folder / f"{run.set}-weights.json").read_text())
    confusion_CC = np.array(report["splits"]["test"]["confusion"], float)
    confusion_CC *= np.array([[weights.get(label, 1.0)] for label in report["labels"]])
    return {
        "run": run.id,
        "set": run.set,
        "targets": run.targets,
        "weights": run.power,
        "seed": int(run.seed),
        "test": float(f1_by_label(confusion_CC).mean()),
        "validation": report["splits"]["validation"]["macro_f1"],
        "labels never right": int((f1_by_label(confusion_CC) == 0).sum()),
        "seconds": report["speed"]["train_seconds"],
        "device": report["identity"]["device"],
    }


def f1_by_label(confusion_CC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """2 TP / (truth + predicted), rows being the truth; 0 for a label that is never right."""
    both_C = confusion_CC.sum(0) + confusion_CC.sum(1)
    return np.asarray(2 * confusion_CC.diagonal() / np.where(both_C > 0, both_C, 1.0))


def table(path: Path) -> str:
    """Mean and standard deviation over seeds of macro-F1 on the test split."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in lines(path):
        scores = found.setdefault((str(line["set"]), str(line["targets"])), {})
        scores.setdefault(str(line["weights"]), []).append(float(str(line["test"])))
    choices = sorted({choice for scores in found.values() for choice in scores})
    rows = [f"| data | adapted layers | {' | '.join(choices)} |", "|---|---|" + "--:|" * len(choices)]
    for (name, targets), scores in found.items():
        cells = [figure(scores.get(choice, [])) for choice in choices]
        rows.append(f"| {name} | {targets} | {' | '.join(cells)} |")
    return "\n".join(rows)


def figure(scores: list[float]) -> str:
    return f"{spread(scores)} ({len(scores)})" if scores else ""


# The data sets


def goemotions(folder: str) -> Posts:
    where = Path(os.environ["EMOTION_DATA_DIR"], folder)
    splits = [pq.read_table(where / f"{name}.parquet") for name in ("train", "dev")]
    rows = [list(zip(t["text"].to_pylist(), t["label"].to_pylist(), strict=True)) for t in splits]
    return Posts(rows[0], rows[1], {})


def demonstration() -> Posts:
    """The demonstration posts; validation posts train, too, as the program holds out its own."""
    import csv

    def rows(name: str) -> Iterator[tuple[str, str]]:
        with (POSTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            yield from ((row["text"], row["label"]) for row in csv.DictReader(file))

    return Posts([*rows("train"), *rows("validation")], list(rows("test")), {})


def thinned(posts: Posts, kept: Callable[[int, int], int]) -> Posts:
    """The first `kept(rank, count)` training posts of the label with this rank by frequency."""
    counts: dict[str, int] = {}
    for _, label in posts.train:
        counts[label] = counts.get(label, 0) + 1
    ranks = {label: rank for rank, label in enumerate(sorted(counts, key=lambda label: -counts[label]))}
    limits = {label: min(count, kept(ranks[label], count)) for label, count in counts.items()}
    seen: dict[str, int] = {}
    train = []
    for text, label in posts.train:
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= limits[label]:
            train.append((text, label))
    return Posts(train, posts.test, {label: limits[label] / count for label, count in counts.items()})


SETS: dict[str, Callable[[], Posts]] = {
    "goemotions-15": lambda: goemotions("goemotions-15"),
    "tds": lambda: goemotions("goemotions-15-tds"),
    "goemotions-15-flat": lambda: thinned(goemotions("goemotions-15"), lambda rank, count: 300),
    # from 2,340 posts down to 30, a constant factor from one label to the next
    "tds-steep": lambda: thinned(
        goemotions("goemotions-15-tds"), lambda rank, count: round(2340 * 78 ** (-rank / 14))
    ),
    "demo": demonstration,
}


if __name__ == "__main__":
    main()
