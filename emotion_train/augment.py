"""Makes a data set with synthetic posts for its rarest labels: a hosted model writes them after
real training posts; they are cleaned, without duplicates, filtered, marked and weighted.

    emotion-train augment s3://team/emotions s3://team/emotions-more \\
        --llm gpt-4o-mini@https://api.openai.com/v1 --max-usd 2

Validation and test posts stay the same bytes. Answers are stored as they come, so the same command
resumes and pays for nothing twice. Only `emotion-launch compare` shows whether synthetic posts
help: with them, without, and with as many real posts repeated (--repeat-of).
"""

from __future__ import annotations

import argparse

from emotion_train.evaluation.adapter import positive
from emotion_train.hosted.options import add_hosted_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "data_url",
        metavar="DATA_URL",
        help="data set written by `emotion-train prepare`, which stays as it is",
    )
    add("new_data_url", metavar="NEW_DATA_URL", help="where the augmented data set goes")
    add_hosted_arguments(parser, models="hosted model, such as gpt-4o-mini@https://api.openai.com/v1")
    add(
        "--to",
        default="median",
        metavar="median|N",
        help="posts of a label afterwards, at most the median and thrice its real ones (default: median)",
    )
    add("--labels", metavar="A,B", help="only these labels (default: all below --to)")
    add("--weight", type=float, default=0.5, metavar="W", help="weight of a synthetic post (default: 0.5)")
    add("--shots", type=positive, default=5, metavar="N", help="real posts that a call shows (default: 5)")
    add(
        "--per-call",
        type=positive,
        default=5,
        metavar="N",
        help="posts that a call asks for, half as many after cut answers (default: 5)",
    )
    add(
        "--keep",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="share of each label's new posts to keep, the best by a classifier (default: 0.7)",
    )
    add("--adapter", metavar="URL", help="adapter that filters instead of out-of-fold TF-IDF")
    add("--device", choices=("auto", "cpu"), default="auto", help="runs --adapter (default: %(default)s)")
    add(
        "--repeat-of",
        metavar="AUGMENTED_URL",
        help="ask no model: repeat as many real posts of each label as that data set has synthetic ones",
    )
    for action in parser._actions:
        if "--llm" in action.option_strings:
            action.required = False  # --repeat-of asks no model


def run(arguments: argparse.Namespace) -> int:
    """Make the data set and print its summary; returns 0."""
    from emotion_train.hosted.augment import augment
    from emotion_train.hosted.augmentation import Augmentation

    print(augment(Augmentation.of(arguments)))
    return 0
