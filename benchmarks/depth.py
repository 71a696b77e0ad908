"""Macro-F1 against depth: the first blocks of SmolLM2-135M alone, on posts that neither trained nor
chose, through the program's own command.

    python benchmarks/depth.py                                        # six depths, nine seeds
    python benchmarks/depth.py --depths 1,0.5 --seeds 1,2 --at-once 2
    python benchmarks/depth.py --depths 1,0.5 --taught 0.5    # students of whole teachers, too
    python benchmarks/depth.py --table --out depth.jsonl
    python benchmarks/depth.py --table --plot depth.svg       # takes `pip install matplotlib`

The recipe is goemotions.yaml in bf16 with `model.layers`; the training file gives training and
validation posts (each run takes its best epoch on the latter), and the development file, which
nothing chose by, is the test split that is scored. Each result is a JSON line in --out as soon as
it is there, and the run's predictions of the test split a file in the folder beside it; a run whose
line is there is not repeated. Overrides are for all runs. `--table` prints what lines and
predictions say and trains nothing: each depth's mean over the seeds, and its difference to the
whole depth with an interval that counts posts and seeds.

The depths of --taught are trained once more, on shares that whole teachers gave to posts which they
had not seen (`emotion-launch distil`, 3 folds x 2 seeds).

Trainings run side by side on one GPU, so their seconds are no measure of speed (speed.py is).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from class_weights import prepare
from side_by_side import (
    GOEMOTIONS,
    add_base_argument,
    add_run_arguments,
    comma,
    interval,
    lines,
    published,
    report_in,
    side_by_side,
    spread,
    workers,
)

from emotion_train.bases.packaged import small_model
from emotion_train.evaluation.comparison import Paired, paired_difference, resampled_f1
from emotion_train.evaluation.predictions import Predictions, predictions_from_parquet, predictions_key

WHOLE = "1"
DEPTHS = (WHOLE, "0.9", "0.77", "0.65", "0.5", "0.4")
SPLIT = "test"
TAUGHT = " taught"


class Run(NamedTuple):
    folder: Path
    kept: Path
    base: str
    set: str
    depth: str
    taught: str | None  # the data set with the teachers' shares, below the folder
    seed: str
    overrides: tuple[str, ...]

    @property
    def named(self) -> str:
        return self.depth if self.taught is None else f"{self.depth}{TAUGHT}"

    @property
    def id(self) -> str:
        return f"{self.set}-{self.named}-{self.seed}".replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--depths",
        type=comma,
        default=list(DEPTHS),
        metavar="A,B",
        help=f"shares of the blocks, or their numbers; {WHOLE} is all (default: {','.join(DEPTHS)})",
    )
    parser.add_argument(
        "--sets", type=comma, default=["goemotions-15"], metavar="A,B", help="those of class_weights.py"
    )
    parser.add_argument("--taught", type=comma, default=[], metavar="A,B", help="depths for students")
    add_base_argument(parser)
    add_run_arguments(parser, "depth.jsonl")
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="what each depth loses, against its share of the work"
    )
    arguments = parser.parse_args()
    if not arguments.table:
        train_all(arguments)
    found = [row for name in sets_in(arguments.out) for row in rows_of(arguments.out, name)]
    print(table(found))
    if arguments.plot:
        plot(found, arguments.plot)


def train_all(arguments: argparse.Namespace) -> None:
    kept = folder_of(arguments.out)
    kept.mkdir(parents=True, exist_ok=True)
    base = arguments.base or str(small_model())
    with tempfile.TemporaryDirectory(prefix="depth-") as temporary:
        folder = Path(temporary)
        with workers(len(arguments.sets)) as pool:
            list(pool.map(prepare, [folder] * len(arguments.sets), arguments.sets))
        overrides = tuple(arguments.overrides)
        runs = [
            Run(folder, kept, base, name, depth, None, seed, overrides)
            for name in arguments.sets
            for seed in arguments.seeds
            for depth in arguments.depths
        ]
        side_by_side(train, runs, arguments.at_once, arguments.out)
        if arguments.taught:
            shares = {name: teach(arguments, folder, base, name) for name in arguments.sets}
            students = [
                Run(folder, kept, base, name, depth, shares[name], seed, overrides)
                for name in arguments.sets
                for seed in arguments.seeds
                for depth in arguments.taught
            ]
            side_by_side(train, students, arguments.at_once, arguments.out)


def teach(arguments: argparse.Namespace, folder: Path, base: str, name: str) -> str:
    """The data set with the shares of whole teachers, below the folder."""
    where = ["--accelerate-config", "cpu"]
    if torch.cuda.is_available():
        where = ["--spread", "--at-once", str(arguments.at_once)]
    values = [
        f"data.url={folder / name}",
        f"run.output_url={folder}/taught",
        f"run.id={name}",
        f"model.base={base}",
        "model.precision=bf16",
        f"checkpoint.local_folder={folder / 'local'}",
    ]
    line = [sys.executable, "-m", "launch.cli", "distil", "--config", str(GOEMOTIONS), *where]
    line += ["--folds", "3", "--seeds", "2", *values, *arguments.overrides]
    subprocess.run(line, check=True, stdout=sys.stderr)
    (soft,) = (folder / f"{name}-distil" / name).glob("soft-*")
    return str(soft.relative_to(folder))


def folder_of(out: Path) -> Path:
    """Where the predictions of the runs in this file of lines are."""
    return out.with_name(f"{out.stem}-predictions")


def train(run: Run) -> dict[str, object]:
    """One run to its published report; its predictions are kept."""
    layers = f"model.layers={'null' if run.depth == WHOLE else run.depth}"
    pulled = published(run, run.taught or run.set, "model.precision=bf16", layers)
    report = report_in(pulled)
    facts = json.loads((pulled / "emotion_train.json").read_text())
    shutil.copyfile(pulled / "report" / predictions_key(SPLIT), run.kept / f"{run.id}.parquet")
    return {
        "run": run.id,
        "set": run.set,
        "depth": run.named,
        "layers": facts["layers"],
        "whole_layers": facts["whole_layers"],
        "seed": int(run.seed),
        "overrides": list(run.overrides),
        "test": report["splits"][SPLIT]["macro_f1"],
        "validation": report["splits"]["validation"]["macro_f1"],
        "best_step": report["best_step"],
        "seconds": report["speed"]["train_seconds"],
        "peak_memory_bytes": report["speed"]["peak_memory_bytes"],
        "device": report["identity"]["device"],
    }


class Row(NamedTuple):
    """What the runs of one depth say; `less` is their difference to all blocks on the test split
    with its 95 % interval over posts and seeds, None for all blocks.
    """

    set: str
    depth: str
    blocks: int | None
    whole: int
    validation: list[float]
    test: list[float]
    less: Paired | None


def sets_in(path: Path) -> list[str]:
    return list(dict.fromkeys(str(line["set"]) for line in lines(path)))


def rows_of(path: Path, name: str) -> list[Row]:
    """The depths of a set, the whole one first, students behind the others."""
    found: list[dict[str, Any]] = [line for line in lines(path) if line["set"] == name]
    by_depth: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(found, key=order):
        by_depth.setdefault(str(line["depth"]), []).append(line)
    differences = against_whole(by_depth, folder_of(path))
    return [
        Row(
            name,
            depth,
            group[0]["layers"],
            group[0]["whole_layers"],
            [float(line["validation"]) for line in group],
            [float(line[SPLIT]) for line in group],
            differences.get(depth),
        )
        for depth, group in by_depth.items()
    ]


def order(line: dict[str, Any]) -> tuple[bool, int, int]:
    return str(line["depth"]).endswith(TAUGHT), -(line["layers"] or 10_000), line["seed"]


def table(found: list[Row]) -> str:
    rows = [
        f"| data | depth | blocks | seeds | validation | {SPLIT} | minus all blocks, 95 % interval |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        blocks = "all" if row.blocks is None else f"{row.blocks} of {row.whole}"
        less = "" if row.less is None else interval(row.less)
        cells = [
            row.set,
            row.depth,
            blocks,
            str(len(row.test)),
            spread(row.validation),
            spread(row.test),
            less,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(found: list[Row], path: str) -> None:
    """Dots are the differences of the means, bars their 95 % intervals."""
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row.set for row in found))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(5 * len(sets) + 1, 4), layout="constrained", squeeze=False
    )
    for name, axis in zip(sets, axes[0], strict=True):
        axis.axhline(0, color="tab:gray", linewidth=1)
        axis.plot([100], [0], "o", color="tab:gray")
        for taught, colour in ((False, "tab:blue"), (True, "tab:orange")):
            cut = [row for row in found if row.set == name and row.depth.endswith(TAUGHT) == taught]
            less = [(100 * row.blocks / row.whole, row.less) for row in cut if row.blocks and row.less]
            if not less:
                continue
            share = [one + taught for one, _ in less]  # beside each other
            middle = [one.difference for _, one in less]
            bars = [
                [one.difference - one.low for _, one in less],
                [one.high - one.difference for _, one in less],
            ]
            words = "students of whole teachers" if taught else "alone"
            axis.errorbar(share, middle, bars, fmt="o", color=colour, capsize=3, label=words)
        axis.legend()
        axis.set(
            title=name,
            xlabel="share of the blocks, and of a step's work, %",
            ylabel="test macro-F1 minus that of all blocks",
            xlim=(30, 105),
        )
    figure.savefig(path)


def against_whole(by_depth: dict[str, list[dict[str, Any]]], kept: Path) -> dict[str, Paired]:
    """Each depth's difference in macro-F1 to all blocks, by the predictions of its runs."""
    if WHOLE not in by_depth or len(by_depth) < 2:
        return {}
    depths = [depth for depth, found in by_depth.items() for _ in found]
    runs = [read(kept / f"{line['run']}.parquet") for found in by_depth.values() for line in found]
    first = runs[0]
    for one in runs:
        assert one.ids == first.ids, "runs of one set score the same posts"
        assert (one.truth_N == first.truth_N).all()
    f1 = resampled_f1(first.truth_N, [one.predicted_N for one in runs], first.prob_NC.shape[1])
    score_R, score_SR = f1.f1_RC.mean(axis=-1), f1.f1_SRC.mean(axis=-1)
    places = {depth: [at for at, one in enumerate(depths) if one == depth] for depth in by_depth}
    return {
        depth: paired_difference(score_R, score_SR, places[WHOLE], own, len(first.ids))[0]
        for depth, own in places.items()
        if depth != WHOLE
    }


def read(path: Path) -> Predictions:
    """The predictions in the order of their ids."""
    found = predictions_from_parquet(path.read_bytes())
    return found.take(sorted(range(len(found.ids)), key=lambda row: found.ids[row]))


if __name__ == "__main__":
    main()
