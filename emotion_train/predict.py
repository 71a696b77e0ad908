"""Labels posts with a trained adapter: posts on the command line, in a file, or on standard input,
one a line. An adapter of several labels answers with the labels that reach their threshold, or with
none.

Posts are read and mended by the readers of `prepare`, so that the tokenizer sees the same text as
in training. They are labelled 1,024 at a time; a file may have any size, and is checked as a whole
first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.edges.spreadsheet import harmless
from emotion_train.edges.streams import text_is_the_result, write_utf8
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import (
    AdapterChoice,
    add_adapter_arguments,
    add_file_arguments,
    open_classifier,
    positive,
)
from emotion_train.evaluation.answer_lines import TOP, Written, kept_names, printer
from emotion_train.evaluation.members import facts_together
from emotion_train.model.facts import AdapterFacts

if TYPE_CHECKING:
    from emotion_train.evaluation.adapter import Classifier
    from emotion_train.evaluation.unlabelled import Post
    from emotion_train.exporting.served import Served

_AT_A_TIME = 1024
_LONGEST_PATH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, required=False, several="logits")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help=(
            "server that labels the posts, such as vLLM's at http://localhost:8000, and serves --adapter or"
            " its export (default: this program labels them)"
        ),
    )
    parser.add_argument(
        "--model", metavar="NAME", help="model of --endpoint (default: the first that the server names)"
    )
    parser.add_argument(
        "--against",
        metavar="URL",
        help=(
            "instead of --adapter: label the posts here too, by this adapter, and print how much --endpoint"
            " differs; ends with 1 where a probability differs by more than --tolerance"
        ),
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="P",
        help="difference of a probability that --against allows (default: %(default)s)",
    )
    parser.add_argument(
        "posts",
        nargs="*",
        metavar="POST",
        help="posts to label (default: standard input, one a line; blank lines are left out)",
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help=(
            "posts in a CSV, TSV, JSONL, Parquet or Arrow file or a folder of them, also in a bucket"
            " (s3://…); one a line in any other file (blank lines are left out)"
        ),
    )
    add_file_arguments(parser)
    parser.add_argument(
        "--columns",
        metavar="A,B",
        help=(
            "columns of --file to print before each post, as text; a column with the name of one of this"
            " program's own columns (row, text, label, labels, probabilities) is printed as input_…"
        ),
    )
    parser.add_argument(
        "--on-bad",
        choices=("refuse", "drop"),
        default="refuse",
        help="what to do with posts of --file that cannot be used (default: refuse and name them)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl", "csv"),
        default="text",
        help="format of the output (default: text); jsonl and csv also number the posts",
    )
    parser.add_argument(
        "--escape-formulas",
        action="store_true",
        help=(
            "put an apostrophe before csv cells that begin with =, +, -, @, a tab or a carriage return, which"
            " spreadsheets would compute (default: cells as they are)"
        ),
    )
    parser.add_argument(
        "--accept-precision",
        type=float,
        metavar="P",
        help=(
            "mark the answers that by the adapter's gate are right at least this share of the time, such as"
            " 0.95; a person checks the others (default: no mark)"
        ),
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help=(
            "print the probabilities of the head as it was trained, before its temperature; answers and marks"
            " stay (default: the published probabilities, which are chances)"
        ),
    )
    parser.add_argument(
        "--top",
        type=positive,
        metavar="N",
        help=(
            f"labels to print for each post as text (default: {TOP}; with several labels, all that reach"
            " their threshold); jsonl and csv hold all"
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each post, in the order of the input; returns 0, or 1 where --against
    differs too much.
    """
    text_is_the_result()
    if arguments.posts and arguments.file:
        raise WrongRequest("Posts are given as words and as --file; give one of the two.")
    if arguments.columns and not arguments.file:
        raise WrongRequest("--columns names columns of --file, which is not given; give --file too.")
    if arguments.escape_formulas and arguments.format != "csv":
        raise WrongRequest(
            f"--escape-formulas is for csv and --format is {arguments.format}; add --format csv, or leave it"
            " out."
        )
    if bool(arguments.adapter) == bool(arguments.against):
        raise WrongRequest(
            "--adapter and --against exclude each other; give --adapter, or with --endpoint either of them."
            if arguments.adapter
            else "--adapter is missing; give --adapter with a run's URL or an adapter's folder, or --against"
            " to compare --endpoint with it."
        )
    if len(arguments.adapter or ()) > 1:
        _refuse_for_several(arguments)
    if not arguments.endpoint and (arguments.against or arguments.model):
        raise WrongRequest("--against and --model are for a server; give its --endpoint, http://HOST:PORT.")
    if arguments.against and (arguments.raw or arguments.accept_precision is not None):
        raise WrongRequest(
            "--raw and --accept-precision change printed labels, and --against prints none; leave them out."
        )
    if not 0 <= arguments.tolerance <= 1:
        raise WrongRequest(f"--tolerance is {arguments.tolerance:g}; give a number from 0 to 1.")
    with ExitStack() as stack:
        from emotion_train.evaluation.posts_request import PostsRequest, posts_of_request
        from emotion_train.runs.adapter_cache import find_adapter

        asked = PostsRequest.of(arguments)
        _note_files(arguments.posts)
        posts = posts_of_request(asked, stack)
        places = arguments.adapter or [arguments.against]
        folder, *more = folders = [find_adapter(place).folder for place in places]
        chosen = replace(AdapterChoice.of(arguments), adapter=folder, more=tuple(more))
        # a wrong folder is refused before torch is imported, and before anything is typed
        facts = facts_together(folders, places)[0]
        _require_chances(arguments, folder, facts)
        kept = kept_names(asked.columns, facts, arguments.accept_precision is not None)
        served = _served(arguments, folder, facts)
        first = list(islice(posts, _AT_A_TIME if arguments.posts or arguments.file else 1))
        if not first:
            raise WrongRequest(
                'There is no post to label; type one as a word ("what a lovely mess"), give --file, or pipe'
                " lines in."
            )
        if served is not None and arguments.against:
            return _compare([*first, *posts], served, chosen, arguments.tolerance)
        _label(first, posts, lambda: served or open_classifier(chosen), arguments, kept)
    return 0


def _note_files(posts: Sequence[str]) -> None:
    """A line on standard error for each post that is the name of a file of posts here."""
    from emotion_train.sources.open import format_of

    for post in posts:
        if len(post) < _LONGEST_PATH and format_of(Path(post)) is not None and Path(post).is_file():
            print(
                f"emotion-train: {post} is labelled as a post; --file {post} labels the posts in that file",
                file=sys.stderr,
            )


def _refuse_for_several(arguments: argparse.Namespace) -> None:
    """Raises `WrongRequest` for options that need a single adapter."""
    for option, given, what in (
        ("--endpoint", arguments.endpoint is not None, "serves one adapter"),
        ("--accept-precision", arguments.accept_precision is not None, "is by the gate of one adapter"),
        ("--raw", arguments.raw, "is about the temperature of one adapter"),
    ):
        if given:
            raise WrongRequest(
                f"{option} {what}, and several are given; leave it out, or give one --adapter."
            )


def _require_chances(arguments: argparse.Namespace, folder: Path, facts: AdapterFacts) -> None:
    """Raises `WrongRequest` for a precision without a gate in the adapter; prints a remark where
    --raw changes nothing.
    """
    if arguments.accept_precision is None and not arguments.raw:
        return
    from emotion_train.evaluation.decision import read_decision

    decision = read_decision(folder, facts)
    if arguments.accept_precision is not None:
        decision.accept_above(arguments.accept_precision)
    if arguments.raw and decision.temperature is None:
        print("emotion-train: the adapter has no temperature, so --raw changes nothing", file=sys.stderr)


def _served(arguments: argparse.Namespace, folder: Path, facts: AdapterFacts) -> Served | None:
    """The server that labels the posts; None where this program does."""
    if not arguments.endpoint:
        return None
    from emotion_train.evaluation.decision import read_decision
    from emotion_train.exporting.served import Served

    return Served(arguments.endpoint, arguments.model, read_decision(folder, facts), facts.max_length)


def _compare(posts: Sequence[Post], served: Served, chosen: AdapterChoice, tolerance: float) -> int:
    """Print how much the server's probabilities differ from the adapter's; returns 1 where they
    differ too much, else 0.
    """
    from emotion_train.exporting.agreement import Agreement

    texts = [post.text for post in posts]
    theirs_NC = served.probabilities(texts)  # before the base is loaded, since the server may refuse
    classifier = open_classifier(chosen)
    agreement = Agreement.of(
        texts,
        classifier.probabilities(texts),
        theirs_NC,
        classifier.loaded.tokenizer,
        classifier.decision,
        served.called,
    )
    for line in agreement.lines(tolerance):
        print(line)
    return int(agreement.largest > tolerance)


def _label(
    first: list[Post],
    rest: Iterator[Post],
    open_one: Callable[[], Classifier | Served],
    arguments: argparse.Namespace,
    kept: Sequence[str],
) -> None:
    if arguments.format != "text":
        write_utf8()
    classifier = open_one()
    cell = harmless if arguments.escape_formulas else str
    decision, precision = classifier.decision, arguments.accept_precision
    marked = precision is not None
    written = Written(classifier.labels, classifier.targets == "several", kept, arguments.top, cell, marked)
    print_batch = printer(arguments.format, written, sys.stdout)
    chunk = first + list(islice(rest, _AT_A_TIME - len(first)))
    while chunk:
        prob_NC = classifier.probabilities([post.text for post in chunk])
        shown_NC = decision.raw(prob_NC) if arguments.raw else prob_NC
        print_batch(chunk, shown_NC, classifier.answers(prob_NC), decision.marks(prob_NC, precision))
        chunk = list(islice(rest, _AT_A_TIME))
    if remark := classifier.remark():
        print(f"emotion-train: {remark}", file=sys.stderr)


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
