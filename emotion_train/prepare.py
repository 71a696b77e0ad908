"""Turns posts into a prepared data set: checked, without duplicates, split by stratum, shuffled
once, written, verified, indexed.

    emotion-train prepare posts.csv s3://team/emotions

The source is read once; its clean rows go through temporary files twice (TMPDIR needs about the
size of the source), so that memory is bounded whatever the size. The same source, options and
library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emotion_train.data.targets import KINDS
from emotion_train.edges.paths import path_here
from emotion_train.preparation.options import Options
from emotion_train.preparation.steps import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from emotion_train.data.conflicts import POLICIES
    from emotion_train.sources.open import FORMATS

    default = Options()
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        metavar="SOURCE",
        help=(
            "CSV, JSONL, Parquet or Arrow file, a folder of them (names train…, validation…, test… give"
            " splits), either also in a bucket (s3://…), or a hub name"
        ),
    )
    add("data_url", metavar="DATA_URL", help="where the data set goes: s3://bucket/prefix or a folder")
    add(
        "--text-column",
        default=default.text_column,
        metavar="NAME",
        help="column of the posts (default: text)",
    )
    add(
        "--label-column",
        default=default.label_column,
        metavar="NAME",
        help="column of the labels: names, or numbers with --labels (default: label)",
    )
    add(
        "--targets",
        choices=KINDS,
        default=default.targets,
        help=(
            "labels of a post: one label; several, as a list or as joy,anger or joy|anger in a cell; or"
            ' shares, as {"joy": 0.67, "neutral": 0.33} or a list of votes (default: one)'
        ),
    )
    add(
        "--label-columns",
        metavar="A,B,C",
        help=(
            "columns of the labels in place of --label-column, with 0 or 1 in each, or with shares or numbers"
            " of votes; joy..anger are all columns from joy to anger"
        ),
    )
    add(
        "--allow-none",
        action="store_true",
        help="with --targets several: a post may have none of the labels (default: it is refused)",
    )
    add(
        "--annotations-by",
        metavar="COLUMN",
        help=(
            "column of the annotators, where each row is one annotator's answer: rows with the same id"
            " (--id-column), or else the same text, become one post, with shares or with the labels that at"
            " least half of them gave"
        ),
    )
    add(
        "--weight-column",
        metavar="NAME",
        help="column of each post's weight in the loss, a number above 0 (default: each weighs 1)",
    )
    add("--id-column", metavar="NAME", help="column of unique ids (default: file name and row number)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--labels",
        metavar="A,B,C",
        help="all labels in the order of their ids (default: those found, sorted)",
    )
    labels.add_argument(
        "--labels-file",
        type=path_here,
        metavar="FILE",
        help="the same from a file, one label a line, or its id, a tab and its name",
    )
    add(
        "--multi-label",
        choices=("refuse", "drop"),
        help="what to do with posts that have several labels (default: as --on-bad)",
    )
    add(
        "--on-bad",
        choices=("refuse", "drop"),
        default="refuse",
        help="what to do with posts that cannot be used (default: refuse and name them)",
    )
    add(
        "--on-conflict",
        choices=dict.fromkeys(policy for policies in POLICIES.values() for policy in policies),
        help=(
            "label of a text with different labels in several rows: first takes the first row's, majority the"
            " label of most rows (of equally many, the first row's); drop leaves all its rows out, refuse"
            " names them. With several labels majority takes those that at least half of the rows have and"
            " union those that any row has; with shares mean takes the mean (default: majority, with shares"
            " mean)"
        ),
    )
    add(
        "--max-chars",
        type=int,
        default=default.max_chars,
        metavar="N",
        help="longest post in characters (default: 20000)",
    )
    add(
        "--unescape-html",
        action="store_true",
        help="replace HTML entities in posts by their characters: &amp; becomes &",
    )
    add(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of each label for validation, unless that split is given (default: 0.1)",
    )
    add(
        "--test-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of each label for test, unless splits are given (default: 0.1)",
    )
    add(
        "--seed",
        type=int,
        default=default.seed,
        metavar="N",
        help="seed of splitting and shuffling (default: 42)",
    )
    add(
        "--rows-per-group",
        type=int,
        default=default.rows_per_group,
        metavar="N",
        help="most posts of a row group, the unit of reading (default: 1024)",
    )
    add(
        "--rows-per-object",
        type=int,
        default=default.rows_per_object,
        metavar="N",
        help="most posts of a Parquet object (default: 262144)",
    )
    add(
        "--memory-mb",
        type=int,
        default=default.memory_mb,
        metavar="MB",
        help="memory for shuffling; changes no byte of the result (default: 512)",
    )
    add(
        "--corrections",
        metavar="FILE",
        help=(
            "CSV with labels that a person corrected, such as the mislabelled.csv beside a report; a row"
            " matches a post by its text, or by id without texts, and by its old label"
        ),
    )
    add(
        "--keep-columns",
        metavar="A,B,C",
        help="columns of the source to keep, for report.slices, such as lang,source",
    )
    add(
        "--auxiliary",
        choices=("drop", "keep"),
        default=default.auxiliary,
        help=(
            "with --labels: what to do with training posts that have other labels or several: keep trains on"
            " them and scores only the --labels, drop treats them as --on-bad says (default: drop)"
        ),
    )
    add(
        "--auxiliary-source",
        dest="auxiliary_sources",
        action="append",
        default=[],
        metavar="FILE",
        help=(
            "another data set with labels of its own, whose training posts are trained on too; its text and"
            " label columns have the same names (may be given several times)"
        ),
    )
    add("--format", choices=FORMATS, help="format of the source (default: by its ending)")
    add(
        "--encoding",
        default=default.encoding,
        metavar="NAME",
        help="encoding of text files, such as latin-1 or utf-16 (default: utf-8)",
    )
    add(
        "--quoting",
        choices=("auto", "csv", "none"),
        default=default.quoting,
        help=(
            "meaning of quotes in CSV and TSV: csv, marks around a cell; none, letters (default: auto,"
            " letters in a TSV whose lines are all whole rows)"
        ),
    )
    add(
        "--header",
        metavar="A,B,C",
        help="column names for a CSV or TSV without a header line, such as text,label,rater",
    )
    add("--text-file", metavar="FILE", help="posts, one a line, with --label-file instead of SOURCE")
    add("--label-file", metavar="FILE", help="labels of the posts in --text-file, one a line")
    add("--subset", metavar="NAME", help="subset (configuration) of a hub data set, such as simplified")


def run(args: argparse.Namespace) -> int:
    """Prepare the data set and print its summary; returns 0."""
    from emotion_train.preparation.summary import summary

    labels = _read_labels(args.labels, args.labels_file)
    columns = _read_labels(args.label_columns, None)
    own = ("labels", "label_columns", "header", "keep_columns", "auxiliary_sources")
    result = prepare(
        args.source,
        args.data_url,
        **{name: getattr(args, name) for name in Options.__dataclass_fields__ if name not in own},
        labels=labels,
        label_columns=columns,
        header=_read_labels(args.header, None),
        keep_columns=_read_labels(args.keep_columns, None) or (),
        auxiliary_sources=tuple(args.auxiliary_sources),
    )
    print(summary(result, given=labels is not None or columns is not None))
    return 0


def _read_labels(words: str | None, file: Path | None) -> tuple[str, ...] | None:
    """The names of a file, or those between the commas of a word."""
    from emotion_train.data.labels_file import names_in, read_names

    if file is not None:
        return read_names(file)
    return None if words is None else names_in(words)


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
