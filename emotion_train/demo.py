"""All steps on this machine in minutes: a local S3 server, demonstration posts, a small real
model, and the commands that a person types.

Each step is a command of its own, printed before it runs, with the local server in place of a cloud
bucket.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import shutil
import sys
import time
from pathlib import Path

from emotion_train.bases.packaged import SMALL_MODEL, small_model
from emotion_train.command_line import program
from emotion_train.config import example_config
from emotion_train.edges.paths import path_here
from emotion_train.errors import WrongRequest
from emotion_train.processes.command import call
from emotion_train.processes.imports import past_current_folder
from emotion_train.storage.local_s3 import LocalS3

POSTS = Path(__file__).parent / "demo_posts"
BUCKET = "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=path_here,
        default=Path(".demo"),
        metavar="FOLDER",
        help="folder for server, adapter and report; made anew (default: %(default)s)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="values that win over configs/demo_cpu.yaml",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run all steps by `emotion-launch up`, then list the runs and predict; returns the exit code
    of the first command that fails, else 0.
    """
    folder: Path = arguments.folder
    small_model()  # refuses where the package of the small model is not installed
    _make_anew(folder)
    started = time.monotonic()
    with LocalS3(folder / "s3") as server:
        server.create_bucket(BUCKET)
        environment = server.environment()
        environment |= past_current_folder(environment)
        print(f"SeaweedFS serves s3://{BUCKET} at {server.endpoint}")
        adapter, truth = str(folder / "adapter"), held_out_posts(folder / "held_out.csv")
        predict = ["emotion-train", "predict", "--adapter", adapter]
        commands = [
            [
                *("emotion-launch", "up", str(POSTS), "--bucket", f"s3://{BUCKET}", "--folder", str(folder)),
                *("--local", "--accelerate-config", "cpu", "--no-smoke", "--config", str(example_config())),
                f"model.base={SMALL_MODEL}",
                *arguments.overrides,
            ],
            ["emotion-launch", "runs", f"s3://{BUCKET}/emotions/runs"],
            [*predict, "--file", str(truth), "--columns", "truth"],
            [
                *predict,
                "what a lovely mess",
                "my hands will not stop shaking before this exam",
                "ugh, the printer again",
            ],
        ]
        for command in commands:
            print(f"\n$ {shlex.join(command)}", flush=True)
            if code := call([*program(command[0]), *command[1:]], environment):
                return code
    print(
        f"\ndone in {time.monotonic() - started:.0f} s; read {folder / 'adapter' / 'report' / 'report.html'}"
    )
    return 0


def held_out_posts(path: Path, count: int = 3) -> Path:
    """Write some posts of the test split, of different labels, with their label as `truth`."""
    with (POSTS / "test.csv").open(newline="", encoding="utf-8") as file:
        first: dict[str, str] = {}
        for row in csv.DictReader(file):
            first.setdefault(row["label"], row["text"])
    with path.open("w", newline="", encoding="utf-8") as file:
        posts = [(first[label], label) for label in [*first][:count]]
        csv.writer(file).writerows([("text", "truth"), *posts])
    return path


def _make_anew(folder: Path) -> None:
    """Make the folder empty; only a folder that an earlier demo made is removed."""
    marker = folder / ".emotion-train-demo"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise WrongRequest(f"{folder} exists and was not made by the demo; give --folder another name.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
