"""How fast is it? Useful work of this program in nf4, bf16 and fp8, beside a peer that is set up
well, the stock recipe and the GPU's own matrix products, in one run.

    # H200: 8,192 tokens a micro-batch
    python benchmarks/speed.py --folder /dev/shm/mistral
    # H100 80GB
    python benchmarks/speed.py --folder /dev/shm/mistral --tokens fp8=4096,bf16=4096
    # the first 77 and 50 % of the blocks, beside the peer with all of them
    python benchmarks/speed.py --folder FOLDER --runs peer-nf4,fp8,fp8@0.77,fp8@0.5,nf4@0.5

The model is Mistral Small 3.1's shape with random weights (as real_size.py writes it), the posts
are GoEmotions'. This program runs by its own command line with steps of `--batch` posts. The peer
is transformers' Trainer with Liger's kernels (pip install liger-kernel), posts of like length
together and its fastest batch, on the whole set (peer.py); the stock recipe is the Trainer in nf4
with each post padded to 128 tokens, batches of 8 and gradient checkpointing (stock_recipe.py). The
first half of this program's steps does not count, nor the first five of the stock recipe, nor a
batch of each width of the peer: libraries load in them, and kernels are built or chosen. Useful
work counts real tokens only: 4 x linear parameters x tokens; adapters, attention and what is
computed again count nothing. A bf16 product of 8192 x 8192 matrices is timed for three seconds
before and after each run, so that a GPU that runs at its power limit is compared with itself.
`fp8@0.77` is fp8 with model.layers=0.77, whose useful work is that of the blocks it computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from goemotions import MISTRAL, SINGLE_GPU, add_posts_argument, prepared, splits
from many_gpus import speed
from real_size import add_checkpoint_arguments, ensure_checkpoint, some_posts

from emotion_train.config import load_config
from emotion_train.data.index import read_index
from emotion_train.runs.published import download
from emotion_train.sizing.fit import Layout, MicroBatch
from emotion_train.sizing.memory import estimate
from emotion_train.sizing.recipe import Recipe
from emotion_train.storage.open import open_store
from launch.gpus import kind_of
from launch.plan.choices import Choice, best_settings, with_settings
from launch.plan.prices import Offer
from launch.plan.spot import Spot
from launch.run.choice import accelerate_line
from launch.workload import shape_of_base, work_of

HERE = Path(__file__).parent
VALIDATION = 512
PEER = "peer-"  # and the precision
DEPTH = "@"  # between a precision and model.layers
RUNS = ("peer-nf4", "peer-bf16", "stock", "nf4", "bf16", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument("--runs", default=",".join(RUNS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        default="",
        metavar="RUN=N,…",
        help="tokens a micro-batch, for example fp8=3584 (default: 8192 each)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="half of them before the clock runs (default: 20)"
    )
    parser.add_argument(
        "--batch", type=int, default=880, help="posts a step (default: 880, about 15,700 tokens)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for this program's runs")
    arguments = parser.parse_args()
    ensure_checkpoint(arguments)
    tokens = {
        name: int(count)
        for name, _, count in (word.partition("=") for word in arguments.tokens.split(",") if word)
    }
    rows = [
        (
            "| run | tokens a micro-batch | posts/s | tokens/s | useful TFLOP/s | of bf16 products |"
            " peak memory, GiB | planned, posts/s | GiB |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="speed-") as name:
        folder = Path(name)
        whole = splits(arguments.posts, folder / "all")
        posts = some_posts(
            whole,
            folder / "posts",
            arguments.batch * arguments.steps,
            VALIDATION,
        )
        prepared(posts, folder, "--on-bad", "drop")
        for run in arguments.runs.split(","):
            before = product_rate()
            if run == "stock":
                found = answer_of("stock_recipe.py", arguments.folder, posts / "train.parquet")
            elif run.startswith(PEER):
                precision = run.removeprefix(PEER)
                found = answer_of(
                    "peer.py", arguments.folder, whole / "train.parquet", "--precision", precision
                )
            else:
                found = ours(arguments.folder, folder, run, tokens.get(run, 8192), arguments)
            rate = (before + product_rate()) / 2
            speeds[run] = found["tokens_per_second"]
            computed = shape_of_base(str(arguments.folder), depth_of(run)).linear_parameters
            useful = 4 * computed * found["tokens_per_second"]
            cells = [
                f"{run}, batches of {found['batch']}, padded to {found['multiple']}"
                if run.startswith(PEER)
                else run,
                f"{found['tokens_a_microbatch']:,}",
                f"{found['posts_per_second']:.0f}",
                f"{found['tokens_per_second']:,.0f}",
                f"{useful / 1e12:.0f}",
            ]
            cells += [
                f"{100 * useful / rate:.0f} % of {rate / 1e12:.0f}",
                f"{found['peak_memory_bytes'] / 2**30:.1f}",
            ]
            rows.append(f"| {' | '.join([*cells, *found.get('planned', ['', ''])])} |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))
    for other in ("peer-nf4", "peer-bf16", "stock"):
        if other in speeds:
            ratios = ", ".join(
                f"{run} {speed / speeds[other]:.2f}" for run, speed in speeds.items() if run != other
            )
            print(f"\nTimes the tokens/s of {other}: {ratios}.")
    print(f"\n{torch.cuda.get_device_name()}; torch {torch.__version__}")


def product_rate(seconds: float = 3.0) -> float:
    """FLOP/s of a bf16 product of square matrices of 8192, random numbers, sustained; the GPU's
    memory is free again after it.
    """
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        done += 20
    rate = 2 * 8192**3 * done / (time.perf_counter() - began)
    del a, b
    torch.cuda.empty_cache()
    return rate


def depth_of(run: str) -> float | None:
    """`model.layers` of a run such as fp8@0.77; None: all blocks."""
    _, _, depth = run.partition(DEPTH)
    return None if not depth else float(depth) if "." in depth else int(depth)


def ours(
    checkpoint: Path, folder: Path, run: str, tokens: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    precision, run_id = run.partition(DEPTH)[0], run.replace(DEPTH, "-of-")
    values = [
        *(
            f"data.url={folder / 'data'}",
            f"run.output_url={folder / 'runs'}",
            f"run.id={run_id}",
            f"model.base={checkpoint}",
        ),
        *(f"model.precision={precision}", f"model.layers={depth_of(run) or 'null'}"),
        *("train.epochs=1", f"train.global_batch_size={arguments.batch}"),
        *(
            f"train.tokens_per_microbatch={tokens}",
            f"evaluation.every_steps={arguments.steps // 2}",
            "checkpoint.every_seconds=null",
        ),
        *(
            "checkpoint.keep_every=1",
            "report.floor_max_rows=0",
            "report.bootstrap_samples=100",
            *arguments.overrides,
        ),
    ]
    choice = planned(values)
    subprocess.run(accelerate_line(SINGLE_GPU, str(MISTRAL), values), check=True, stdout=sys.stderr)
    download(f"{folder / 'runs'}/{run_id}", folder / "pulled" / run_id)
    report = json.loads((folder / "pulled" / run_id / "report" / "report.json").read_text())
    posts, real_tokens = speed(str(folder / "runs"), run_id)
    expected = (
        [f"{choice.posts_per_second:.0f}", f"{choice.memory.total / 2**30:.1f}"]
        if choice is not None
        else ["", ""]
    )
    found = {
        "posts_per_second": posts,
        "tokens_per_second": real_tokens,
        "tokens_a_microbatch": tokens,
        "planned": expected,
    }
    return {**report["speed"], **found}


def planned(values: list[str], run_config: Path = MISTRAL) -> Choice | None:
    """What `emotion-launch plan` expects of this run on this GPU; None without one, for a kind that
    it does not know, and for one that is too small.
    """
    kind = kind_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if kind is None:
        return None
    config = load_config(str(run_config), values)
    store = open_store(config.data.url)
    work = work_of(config, read_index(store), store, None)
    shape = shape_of_base(config.model.base, config.model.layers)
    if config.train.tokens_per_microbatch == "auto":
        best = best_settings(config, shape, work, kind, 1, Offer(), Spot(), config.model.precision)
        return best if isinstance(best, Choice) else None
    recipe, tokens = Recipe.of(config, shape, work.labels), config.train.microbatch_tokens
    found = MicroBatch(tokens, False, estimate(recipe, tokens, False))
    return with_settings(recipe, work, kind, Layout(), Offer(), Spot(), found)


def answer_of(script: str, checkpoint: Path, posts: Path, *words: str) -> Any:
    """The value of the last line, JSON, that a script beside this one prints."""
    command = [sys.executable, str(HERE / script), "--base", str(checkpoint), "--posts", str(posts), *words]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
