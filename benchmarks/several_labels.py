"""Macro-F1 of SmolLM2-135M on GoEmotions' 28 labels, several of which a post may have, through the
program's own command: with thresholds that were chosen without the post (out of fold), and with
0.5.

    python benchmarks/several_labels.py                                  # all recipes, nine seeds
    python benchmarks/several_labels.py --recipes balanced,0.25 --seeds 1,2 --at-once 2

Trained on the official train split; figures are on its dev split, on which each run picks its best
epoch too. The recipe is goemotions.yaml with other class weights, `-ema` with a mean of the weights
besides; `asymmetric` is the loss of Ridnik et al. 2021 (arXiv:2009.14119; gamma 0 and 4, margin
0.05) in place of the weighted binary cross entropy, put into the trainer by this script alone. Each
result is a JSON line in --out as soon as it is there; a run whose line is there is not repeated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pyarrow.parquet as pq
import torch
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
)

from emotion_train.bases.packaged import small_model
from emotion_train.data.targets import TargetKind

ASYMMETRIC = "asymmetric"
RECIPES: dict[str, tuple[str, ...]] = {
    "none": ("loss.class_weights=none",),
    "0.25": ("loss.class_weights=0.25",),
    "0.5": ("loss.class_weights=0.5",),
    "balanced": ("loss.class_weights=balanced",),
    ASYMMETRIC: ("loss.class_weights=none",),
    "none-ema": ("loss.class_weights=none", "train.ema=0.99"),
    "0.25-ema": ("loss.class_weights=0.25", "train.ema=0.99"),
}
FIGURES = ("macro_f1", "macro_f1_at_half", "micro_f1", "mean_average_precision")


class Run(NamedTuple):
    folder: Path
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
    parser.add_argument("--posts", type=Path, help="folder of train.parquet, dev.parquet and emotions.txt")
    add_base_argument(parser)
    add_run_arguments(parser, "several_labels.jsonl")
    arguments = parser.parse_args()
    if not arguments.table:
        train_all(arguments)
    print(table(arguments.out))


def train_all(arguments: argparse.Namespace) -> None:
    posts = arguments.posts or Path(os.environ["EMOTION_DATA_DIR"], "goemotions")
    base = arguments.base or str(small_model())
    with tempfile.TemporaryDirectory(prefix="several-labels-") as temporary:
        folder = Path(temporary)
        prepare(posts, folder)
        runs = [
            Run(folder, base, recipe, seed, tuple(arguments.overrides))
            for seed in arguments.seeds
            for recipe in arguments.recipes
        ]
        side_by_side(train, runs, arguments.at_once, arguments.out)


def prepare(posts: Path, folder: Path) -> None:
    source = folder / "posts"
    source.mkdir()
    for name, split in (("train", "train"), ("dev", "validation")):
        table = pq.read_table(posts / f"{name}.parquet", columns=["text", "labels"])
        pq.write_table(table, source / f"{split}.parquet")
    names = ",".join((posts / "emotions.txt").read_text().split())
    words = ("--targets", "several", "--label-column", "labels", "--labels", names)
    command("prepare", str(source), str(folder / "data"), *words, "--on-bad", "drop")


def train(run: Run) -> dict[str, object]:
    """One run to its published report, and what that says of the validation split."""
    values = RECIPES[run.recipe]
    if run.recipe == ASYMMETRIC:
        with (
            mock.patch("emotion_train.training.trainer.weighted_loss_sum", asymmetric_loss_sum),
            mock.patch("emotion_train.model.graphs.weighted_loss_sum", asymmetric_loss_sum),
        ):
            report = report_in(published(run, "data", *values))
    else:
        report = report_in(published(run, "data", *values))
    figures = report["splits"]["validation"]
    return {
        "run": run.id,
        "recipe": run.recipe,
        "seed": int(run.seed),
        **{name: figures[name] for name in FIGURES},
        "best_step": report["best_step"],
        "seconds": report["speed"]["train_seconds"],
        "posts_per_second": report["speed"]["posts_per_second"],
        "device": report["identity"]["device"],
    }


def asymmetric_loss_sum(
    logits_NC: torch.Tensor,
    targets_NC: torch.Tensor,
    weights_NC: torch.Tensor,
    kind: TargetKind,
    masked: bool = False,
) -> torch.Tensor:
    """In place of `model.loss.weighted_loss_sum`: easy negatives count little, those below the
    margin nothing. Every label is known of every post.
    """
    assert not masked
    prob_NC = logits_NC.float().sigmoid()
    negative_NC = (prob_NC - 0.05).clamp(min=0)
    log_positive_NC = torch.nn.functional.logsigmoid(logits_NC.float())
    log_negative_NC = (1 - negative_NC).clamp(min=1e-8).log()
    losses_NC = -targets_NC * log_positive_NC - (1 - targets_NC) * negative_NC**4 * log_negative_NC
    return (weights_NC.float() * losses_NC).sum(dim=-1).sum()


def table(path: Path) -> str:
    """Mean and standard deviation over seeds."""
    recipes = list(dict.fromkeys(str(line["recipe"]) for line in lines(path)))
    rows = [f"| recipe | seeds | {' | '.join(FIGURES)} |", "|---|--:|" + "--:|" * len(FIGURES)]
    for recipe in recipes:
        found = [line for line in lines(path) if line["recipe"] == recipe]
        cells = [spread([float(str(line[name])) for line in found]) for name in FIGURES]
        rows.append(f"| {recipe} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
