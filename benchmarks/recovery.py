"""What a kill costs: lost steps, and seconds until training resumes, for SmolLM2-135M on the CPU
with a real S3 server.

    python benchmarks/recovery.py --kills 6

The trainer runs as in the demo, with a checkpoint every `--every` seconds, and is killed (SIGKILL)
at random moments. A step counts as lost when it was done and the next start did not resume after
it. Seconds are from the start of the process, imports included, to the end of its first new step.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from emotion_train.bases.packaged import small_model
from emotion_train.config import example_config
from emotion_train.demo import BUCKET, POSTS
from emotion_train.storage.local_s3 import LocalS3

PATIENCE_S = 300


@dataclass(frozen=True)
class Life:
    """One process, from its start to its kill."""

    seconds_to_first_step: float
    step_seconds: float
    first_step: int
    last_step: int


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--child":
        sys.exit(child(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="between two checkpoints (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills (default: 1)")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with (
        tempfile.TemporaryDirectory(prefix="recovery-") as name,
        LocalS3(Path(name, "s3")) as server,
        ExitStack() as stack,
    ):
        server.create_bucket(BUCKET)
        environment = server.environment()
        data = f"s3://{BUCKET}/posts"
        prepare = [sys.executable, "-m", "emotion_train.prepare", str(POSTS), data]
        subprocess.run(prepare, check=True, env=environment, stdout=sys.stderr)
        words = [
            f"model.base={small_model()}",
            f"data.url={data}",
            f"run.output_url=s3://{BUCKET}/runs",
            "train.epochs=100",
        ]
        words += [f"checkpoint.every_seconds={arguments.every}", "preemption.notices=none"]
        log = stack.enter_context(Path(name, "log").open("wb"))
        lives = []
        for number in range(arguments.kills + 1):
            lives.append(
                live(
                    Path(name, f"steps-{number}"),
                    words,
                    environment,
                    draw.uniform(0.5, 3.5) * arguments.every,
                    log.fileno(),
                )
            )
            print(f"life {number + 1}: {lives[-1]}", file=sys.stderr, flush=True)
    print(table(lives, arguments.every))


def child(record: Path, words: list[str]) -> int:
    """The trainer, with the time at the end of each step appended to `record`."""
    from emotion_train.cli import main as command_line
    from emotion_train.training.trainer import Trainer

    step = Trainer._step

    def recorded(trainer: Trainer, batch: object) -> None:
        step(trainer, batch)  # type: ignore[arg-type]
        with record.open("a") as file:
            file.write(f"{time.time()} {trainer.progress.step}\n")

    Trainer._step = recorded  # type: ignore[method-assign,assignment]
    return command_line(["train", "--config", str(example_config()), *words])


def live(record: Path, words: list[str], environment: dict[str, str], seconds: float, log: int) -> Life:
    """Start the trainer, let it train that long after its first step, kill it."""
    record.touch()
    began, deadline = time.time(), time.monotonic() + PATIENCE_S
    environment = {**environment, "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        [sys.executable, __file__, "--child", str(record), *words], env=environment, stdout=log, stderr=log
    ) as process:
        while not record.stat().st_size:
            assert process.poll() is None, "the trainer ended before its first step"
            assert time.monotonic() < deadline, "the trainer takes too long to its first step"
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    lines = [line.split() for line in record.read_text().splitlines()]
    times, steps = [float(moment) for moment, _ in lines], [int(step) for _, step in lines]
    return Life(times[0] - began, (times[-1] - times[0]) / max(1, len(times) - 1), steps[0], steps[-1])


def table(lives: list[Life], every_s: float) -> str:
    lost = [before.last_step - after.first_step + 1 for before, after in pairwise(lives)]
    starts = [life.seconds_to_first_step for life in lives[1:]]
    step_s = statistics.mean(life.step_seconds for life in lives)
    return "\n".join(
        [
            (
                "| kills | lost steps per kill: mean, most | of seconds each | seconds from start to the"
                " first new step: mean, most |"
            ),
            "|--:|--:|--:|--:|",
            (
                f"| {len(lost)} | {statistics.mean(lost):.1f}, {max(lost)} | {step_s:.2f} |"
                f" {statistics.mean(starts):.1f}, {max(starts):.1f} |"
            ),
            "",
            f"A checkpoint every {every_s:g} s; {os.cpu_count()} CPUs.",
        ]
    )


if __name__ == "__main__":
    main()
