"""Macro-F1 of SmolLM2-135M on 15 GoEmotions labels with and without the posts that `prepare` would
drop (`--auxiliary keep`), with a mean of the weights (train.ema), with dropout and with half of the
blocks, through the program's own commands.

    python benchmarks/auxiliary.py                                   # all recipes, nine seeds
    python benchmarks/auxiliary.py --set goemotions-15-tds --out tds.jsonl --keep tds-runs
    python benchmarks/auxiliary.py --recipes plain,auxiliary --seeds 1,2 --at-once 2
    python benchmarks/auxiliary.py --table                           # what --out says so far

Both data sets are made of GoEmotions with 28 labels, official train and dev splits, for the 15
labels of goemotions-15 or of the other folder that --set names, and have the same training posts of
these labels and the same validation posts, on which each run picks its best
epoch and on which the figures are. Recipe: goemotions.yaml. Each result is a JSON line in --out as
soon as it is there, and its report and predictions go to --keep/RUN; a run whose line is there is
not repeated. The table has the mean over seeds, what three seeds at a time give together (mean of
their logits), and the paired difference to the first recipe by `emotion-launch compare`, whose
interval counts posts and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from goemotions import LABELS
from side_by_side import (
    add_base_argument,
    add_run_arguments,
    comma,
    command,
    interval,
    keep,
    lines,
    published,
    report_in,
    side_by_side,
    spread,
)

from emotion_train.bases.packaged import small_model
from emotion_train.evaluation.metrics import ClassCounts
from emotion_train.evaluation.predictions import Predictions, predictions_from_parquet, predictions_key

SPLIT = "validation"
SET = "goemotions-15"
EMA, HALF = "train.ema=0.99", "model.layers=0.5"


class Recipe(NamedTuple):
    """`data` is what becomes of the posts that `prepare` would drop."""

    data: str
    values: tuple[str, ...] = ()


RECIPES = {
    "plain": Recipe("drop"),
    "ema": Recipe("drop", (EMA,)),
    "auxiliary": Recipe("keep"),
    "auxiliary-ema": Recipe("keep", (EMA,)),
    "auxiliary-ema-dropout": Recipe("keep", (EMA, "lora.dropout=0.1")),
    "ema-half": Recipe("drop", (EMA, HALF)),
    "auxiliary-ema-half": Recipe("keep", (EMA, HALF)),
}


class Run(NamedTuple):
    folder: Path
    keep: Path
    base: str
    recipe: str
    seed: str
    overrides: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.recipe}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=comma, default=list(RECIPES), metavar="A,B", help="default: all")
    parser.add_argument("--posts", type=Path, help="folder of train.parquet and dev.parquet with 28 labels")
    parser.add_argument(
        "--set", default=SET, help="whose labels.json names the labels (default: %(default)s)"
    )
    parser.add_argument("--keep", type=Path, default=Path("auxiliary-runs"), metavar="FOLDER")
    add_base_argument(parser)
    add_run_arguments(parser, "auxiliary.jsonl")
    arguments = parser.parse_args()
    if not arguments.table:
        train_all(arguments)
    print(table(arguments.out, arguments.keep))


def train_all(arguments: argparse.Namespace) -> None:
    posts = arguments.posts or Path(os.environ["EMOTION_DATA_DIR"], "goemotions")
    base = arguments.base or str(small_model())
    with tempfile.TemporaryDirectory(prefix="auxiliary-") as temporary:
        folder = Path(temporary)
        prepare(posts, folder, labels_of(arguments.set))
        runs = [
            Run(folder, arguments.keep.absolute(), base, recipe, seed, tuple(arguments.overrides))
            for seed in arguments.seeds
            for recipe in arguments.recipes
        ]
        side_by_side(train, runs, arguments.at_once, arguments.out)


def labels_of(name: str) -> Sequence[str]:
    if name == SET:
        return LABELS
    found = Path(os.environ["EMOTION_DATA_DIR"], name, "labels.json")
    return [str(label) for label in json.loads(found.read_text())["labels"]]


def prepare(posts: Path, folder: Path, labels: Sequence[str] = LABELS) -> None:
    source = folder / "posts"
    source.mkdir()
    for name, split in (("train", "train"), ("dev", SPLIT)):
        table = pq.read_table(posts / f"{name}.parquet", columns=["text", "labels"])
        pq.write_table(table, source / f"{split}.parquet")
    words = ("--label-column", "labels", "--labels", ",".join(labels), "--on-bad", "drop")
    for choice in ("drop", "keep"):
        command("prepare", str(source), str(folder / choice), *words, "--auxiliary", choice)


def train(run: Run) -> dict[str, object]:
    """One run to its published report, what that says of the validation split, and its predictions
    into the folder of kept runs.
    """
    recipe = RECIPES[run.recipe]
    pulled = published(run, recipe.data, "model.precision=bf16", *recipe.values)
    report = report_in(pulled)
    keep(run, pulled, run.keep / run.id, SPLIT)
    return {
        "run": run.id,
        "recipe": run.recipe,
        "seed": int(run.seed),
        "macro_f1": report["splits"][SPLIT]["macro_f1"],
        "best_step": report["best_step"],
        "seconds": report["speed"]["train_seconds"],
        "posts_per_second": report["speed"]["posts_per_second"],
        "device": report["identity"]["device"],
    }


def table(path: Path, keep: Path) -> str:
    found: dict[str, list[dict[str, object]]] = {}
    for line in sorted(lines(path), key=lambda line: int(str(line["seed"]))):
        found.setdefault(str(line["recipe"]), []).append(line)
    recipes = [name for name in RECIPES if name in found]
    rows = [
        "| recipe | seeds | macro-F1 | three seeds together | minus the first, 95 % interval | s a run |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in recipes:
        ids = [str(line["run"]) for line in found[name]]
        scores, seconds = ([float(str(line[key])) for line in found[name]] for key in ("macro_f1", "seconds"))
        less = (
            ""
            if name == recipes[0]
            else difference([str(one["run"]) for one in found[recipes[0]]], ids, keep)
        )
        cells = [spread(scores), spread(together(ids, keep)), less, f"{statistics.mean(seconds):.0f}"]
        rows.append(f"| {name} | {len(ids)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def together(runs: list[str], keep: Path) -> list[float]:
    """Macro-F1 of the mean logits of three runs at a time, each run once."""
    found = []
    for start in range(0, len(runs) - 2, 3):
        parts = [
            predictions_from_parquet((keep / run / predictions_key(SPLIT)).read_bytes())
            for run in runs[start : start + 3]
        ]
        logs_NC = [np.log(np.clip(part.prob_NC.astype(np.float64), 1e-30, 1)) for part in parts]
        assert all(list(part.ids) == list(parts[0].ids) for part in parts)
        mean_NC = np.exp(np.mean(logs_NC, axis=0))
        mean_NC /= mean_NC.sum(axis=1, keepdims=True)
        joint = Predictions.of(parts[0].ids, parts[0].truth_N, mean_NC.astype(np.float32))
        found.append(ClassCounts(joint.counts()).macro_f1)
    return found


def difference(first: list[str], others: list[str], keep: Path, split: str = SPLIT) -> str:
    """How much higher the others' macro-F1 is on the same posts; the interval counts posts and
    seeds.
    """
    from launch.results.compare import comparison_of

    words = [str(keep / run) for run in (*first, *others)]
    (found,) = comparison_of(words, split=split, group_by_config=True).versus
    return interval(found.macro_f1)


if __name__ == "__main__":
    main()
