"""Compares a fine-tuned adapter with hosted models on the same posts: scores with paired intervals,
dollars, latency, and unanswered posts.

    emotion-train benchmark --run s3://team/runs/RUN_ID --data s3://team/emotions \\
        --llm gpt-4o-mini@https://api.openai.com/v1 --max-usd 1 --out benchmark

One request a post. Answers are stored below --out as they come, so the same command resumes and
pays for nothing twice; after the last answer it makes no request.
"""

from __future__ import annotations

import argparse
import sys

from emotion_train.console import tell
from emotion_train.evaluation.adapter import positive
from emotion_train.hosted.options import add_hosted_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    own = parser.add_mutually_exclusive_group(required=True)
    own.add_argument(
        "--run",
        dest="run_url",
        metavar="RUN_URL",
        help="published run, OUTPUT_URL/RUN_ID, whose published predictions are used, without a GPU",
    )
    own.add_argument(
        "--adapter",
        metavar="URL",
        help="a run, an adapter's folder or its copy in a bucket, which is scored and measured here",
    )
    add("--data", required=True, metavar="DATA_URL", help="data set written by `emotion-train prepare`")
    add("--split", default="validation", metavar="NAME", help="split that is asked (default: validation)")
    add_hosted_arguments(
        parser, models="hosted model, such as gpt-4o-mini@https://api.openai.com/v1; any number"
    )
    add(
        "--rows",
        type=positive,
        metavar="N",
        help="ask for N posts, with each label in its share (default: all)",
    )
    add(
        "--shots",
        type=int,
        default=0,
        metavar="N",
        help="training posts of each label in the prompt (default: 0)",
    )
    add(
        "--prompt",
        metavar="FILE",
        help="file of a prompt with {labels}, {post} and, optionally, {definitions}, {examples}",
    )
    add(
        "--max-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="most tokens of an answer, a model's reasoning included (default: 64)",
    )
    add(
        "--usd-per-hour",
        type=float,
        metavar="USD",
        help="price of the machine that labels (default: the price of --run's machine)",
    )
    add("--base", metavar="BASE", help="base of --adapter (default: the one it was trained on)")
    add("--device", choices=("auto", "cpu"), default="auto", help="runs --adapter (default: %(default)s)")
    add("--out", required=True, metavar="FOLDER", help="folder or s3:// URL for answers and report")


def run(arguments: argparse.Namespace) -> int:
    """Ask the models, write and print the figures; returns 0."""
    from emotion_train.console import Terminal
    from emotion_train.hosted.benchmark import benchmark
    from emotion_train.hosted.benchmark_page import print_benchmark
    from emotion_train.hosted.benchmark_request import BenchmarkRequest

    made = benchmark(BenchmarkRequest.of(arguments))
    if isinstance(made, str):
        print(made)
        return 0
    print_benchmark(made.figures, Terminal(highlight=False, soft_wrap=True))
    tell(f"written: {made.url} and benchmark.html", sys.stdout)
    return 0
