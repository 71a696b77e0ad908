"""Scores an adapter on a split of a prepared data set, or on a file of labelled posts, with the
same figures and floors as the report.
"""

from __future__ import annotations

import argparse
import sys

from emotion_train.evaluation.adapter import add_adapter_arguments, add_file_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, several="logits")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="DATA_URL", help="data set written by `emotion-train prepare`")
    what.add_argument(
        "--file",
        metavar="FILE",
        help=(
            "labelled posts: a CSV, TSV, JSONL, Parquet or Arrow file or a folder of them, also in a bucket"
            " (s3://…)"
        ),
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="split of --data (default: test)")
    add_file_arguments(parser)
    parser.add_argument(
        "--label-column",
        default="label",
        metavar="NAME",
        help="column of the labels in --file, as `prepare` reads them (default: label)",
    )
    parser.add_argument(
        "--label-columns",
        metavar="A,B,C",
        help=(
            "columns of the labels in --file in place of --label-column, with 0 or 1 in each, or with shares"
            " or numbers of votes; joy..anger are all columns from joy to anger"
        ),
    )
    parser.add_argument(
        "--allow-none",
        action="store_true",
        help="with an adapter of several labels: a post of --file may have none (default: it is refused)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder or s3:// URL for scorecard.json and the predictions (default: only print)",
    )
    parser.add_argument(
        "--with-texts", action="store_true", help="write the texts of the posts into the predictions too"
    )
    parser.add_argument(
        "--run",
        dest="run_url",  # `run` is the verb's own function
        metavar="OUTPUT_URL/RUN_ID",
        help=(
            "run that published the adapter; its filter finds posts that were trained on (default: the"
            " filter pulled by --with-training-filter, else the run that report/report.json names)"
        ),
    )
    parser.add_argument(
        "--training-data",
        metavar="DATA_URL",
        help=(
            "data set that the adapter was trained on, for the TF-IDF floor of a file and, where there is no"
            " filter, to find posts that were trained on (default: the data set in the run's report)"
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the figures, and write them to --out; returns 0."""
    from emotion_train.console import Terminal
    from emotion_train.judging.judge import evaluate
    from emotion_train.judging.question import Question
    from emotion_train.report.terminal import print_scorecard

    console = Terminal(highlight=False, soft_wrap=True)
    evaluate(Question.of(arguments), lambda card: print_scorecard(card, console))
    return 0


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
