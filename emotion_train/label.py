"""Labels the posts of a file, a bucket or a data set into Parquet parts, by any number of workers
that come and go: each post once, whichever worker dies.

The same command on another machine helps; after a kill it resumes; on a finished job it prints the
summary.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import (
    AdapterChoice,
    add_adapter_arguments,
    add_file_arguments,
    positive,
)

if TYPE_CHECKING:
    from emotion_train.labelling.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=(
            "posts: a prepared data set, or a CSV, TSV, JSONL or Parquet file or a folder of them, also in a"
            " bucket (s3://…)"
        ),
    )
    parser.add_argument(
        "out_url",
        metavar="OUT_URL",
        help="s3://bucket/prefix or a folder for job.json, leases/, part-….parquet and _SUCCESS.json",
    )
    add_adapter_arguments(parser, several="logits")
    add_file_arguments(parser, "SOURCE")
    parser.add_argument("--id-column", metavar="NAME", help="column with the posts' ids (default: none)")
    parser.add_argument(
        "--columns", metavar="A,B", help="columns of SOURCE to copy beside the labels, as text"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="split of a prepared data set to label (default: all)"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write the probabilities of all labels"
    )
    parser.add_argument(
        "--accept-precision",
        type=float,
        metavar="P",
        help=(
            "also write which answers to accept: answers as probable as these were right at least this share"
            " of the time, such as 0.95, on the adapter's validation posts"
        ),
    )
    parser.add_argument(
        "--on-bad",
        choices=("row", "stop"),
        default="row",
        help=(
            "what a post that cannot be labelled does: row writes an error in its row, stop ends the worker"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--unit-posts",
        type=positive,
        default=50_000,
        metavar="N",
        help=(
            "posts of one part, the most work that a killed worker loses; the first worker decides (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--lease-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help=(
            "minutes without renewal after which another worker takes a unit; the first worker decides"
            " (default: %(default)g)"
        ),
    )
    parser.add_argument(
        "--usd-per-hour", type=float, metavar="N", help="price of this machine, for the dollars of the job"
    )
    parser.add_argument(
        "--notices",
        choices=("auto", "aws", "gcp", "azure", "none"),
        default="auto",
        help="cloud whose preemption notices count beside SIGTERM (default: %(default)s)",
    )
    parser.add_argument(
        "--hold-s",
        type=float,
        metavar="S",
        help="seconds to wait for the kill after a notice (default: 300 under SkyPilot, else 0)",
    )
    parser.add_argument(
        "--patience-s",
        type=float,
        default=3600.0,
        metavar="S",
        help="seconds for which a store that does not answer is asked again (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Label together with the other workers; returns 0 when every post has its label or its
    error.
    """
    from emotion_train.console import counted, tell
    from emotion_train.processes.notices import PreemptionWatch

    def say(words: str) -> None:
        tell(f"emotion-train: {words}")

    # before the imports, which take seconds: a signal among them would end the worker as a failure
    with PreemptionWatch(arguments.notices, say) as watch:
        from emotion_train.labelling.request import label

        done = label(request_of(arguments), watch, say)
    for line in done.success.lines():
        print(line)
    if done.pace is not None and done.pace.seconds:
        pace, own = done.pace, done.pace.seconds
        print(
            f"this worker: {counted(pace.units, 'part')}, {counted(pace.posts, 'post')},"
            f" {pace.posts / own:,.1f} posts/s,"
            f" device busy for {min(1.0, done.busy_s / own):.0%} of {own:,.0f} s"
        )
    if done.remark is not None:
        say(done.remark)
    return 0


def request_of(arguments: argparse.Namespace) -> Request:
    """The request that the options make; raises `WrongRequest` for a number out of range."""
    from dataclasses import replace

    from emotion_train.labelling.job import Reading
    from emotion_train.labelling.request import Request
    from emotion_train.sources.unpacked import checked_encoding

    for option, value, least in (
        ("--lease-minutes", arguments.lease_minutes, 0.01),
        ("--usd-per-hour", arguments.usd_per_hour, 0.0),
        ("--hold-s", arguments.hold_s, 0.0),
        ("--patience-s", arguments.patience_s, 0.0),
    ):
        if value is not None and not least <= value < math.inf:
            raise WrongRequest(f"{option} is {value:g}; give a number from {least:g} on.")
    columns = [name.strip() for name in (arguments.columns or "").split(",") if name.strip()]
    first = replace(AdapterChoice.of(arguments), adapter="", more=())
    return Request(
        source=arguments.source,
        out_url=arguments.out_url,
        adapters=tuple(arguments.adapter),
        loading=first,
        reading=Reading(
            text_column=arguments.text_column,
            id_column=arguments.id_column,
            columns=tuple(dict.fromkeys(columns)),
            encoding=checked_encoding(arguments.encoding),
            quoting=arguments.quoting,
            max_chars=arguments.max_chars,
            unescape_html=arguments.unescape_html,
            split=arguments.split,
        ),
        probabilities=arguments.probabilities,
        accept_precision=arguments.accept_precision,
        on_bad=arguments.on_bad,
        unit_posts=arguments.unit_posts,
        lease_s=60 * arguments.lease_minutes,
        usd_per_hour=arguments.usd_per_hour,
        hold_s=arguments.hold_s,
        patience_s=arguments.patience_s,
    )


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["label", *sys.argv[1:]]))
