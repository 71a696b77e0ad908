"""A saved adapter made ready to score posts: what verbs ask for, and the model on its device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from emotion_train.config import DEFAULT_TOKENS_PER_MICROBATCH, Precision
from emotion_train.errors import WrongRequest
from emotion_train.model.facts import read_facts
from emotion_train.sizing.fit import refusal_of_weights
from emotion_train.sizing.shape import Shape

if TYPE_CHECKING:
    from emotion_train.model.lora import LoadedAdapter

_MOST = 2**31 - 1


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="URL",
        help=(
            "published run (OUTPUT_URL/RUN_ID, s3://… or a folder), pulled into a cache and verified; or an"
            " adapter folder written by `emotion-launch pull`, or its copy in a bucket"
        ),
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help=(
            "folder, .gguf file, hub id or staged copy (s3://bucket/prefix) of the base model (default: the"
            " one it was trained on)"
        ),
    )
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="format of the frozen base (default: as in training)"
    )
    parser.add_argument(
        "--decoder",
        choices=("fused", "stock"),
        default="fused",
        help="as model.decoder of a training: stock = transformers' modules (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="auto takes the GPU where there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-microbatch",
        type=positive,
        default=DEFAULT_TOKENS_PER_MICROBATCH,
        metavar="N",
        help="tokens of one forward pass (default: %(default)s)",
    )


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prepare` too can be told of a file, for one that --file names."""
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="column of the post in --file (default: text)"
    )
    parser.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help="encoding of --file (default: utf-8)"
    )
    parser.add_argument(
        "--quoting",
        choices=("auto", "csv", "none"),
        default="auto",
        help="what quotes in a CSV or TSV are: csv, marks around a cell; none, letters (default: auto)",
    )
    parser.add_argument(
        "--max-chars",
        type=positive,
        default=20_000,
        metavar="N",
        help="longest post of --file in characters (default: 20000)",
    )
    parser.add_argument(
        "--unescape-html",
        action="store_true",
        help="make HTML entities (&amp;) characters, where the adapter was trained on posts prepared so",
    )


def positive(word: str) -> int:
    # a longer word is never made a number: Python would refuse one of 5,000 digits in its own way
    if not word.isdecimal() or len(word) > 10 or not 1 <= int(word) <= _MOST:
        raise argparse.ArgumentTypeError(f"{word[:40]!r} is not a whole number from 1 to {_MOST}")
    return int(word)


def load_with_progress(arguments: argparse.Namespace) -> LoadedAdapter:
    """The adapter that `add_adapter_arguments` describes, on the device that it names, where
    --adapter is a folder by now (`emotion_train.runs.adapter_cache`). Raises `WrongRequest` for too
    small a GPU.
    """
    import torch

    from emotion_train.model.load import BaseConfig, read_config
    from emotion_train.model.lora import load_adapter
    from emotion_train.processes.machine import memory_of
    from emotion_train.progress import ProgressLine

    base: str | BaseConfig | None = arguments.base
    folder = Path(arguments.adapter)
    device = torch.device("cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        facts = read_facts(folder)
        base = opened = read_config(arguments.base or facts.base)
        precision = arguments.precision or facts.precision
        refuse_small_gpu(opened.files.name, Shape.of(opened.text.to_dict()), precision, memory_of(device))
    with ProgressLine("loading", 1, "tensors") as line:
        return load_adapter(
            folder,
            base=base,
            precision=arguments.precision,
            fused=arguments.decoder == "fused",
            device=device,
            tell=lambda placed, total: line.update(placed, total=total),
        )


def refuse_small_gpu(base: str, shape: Shape, precision: Precision, gpu_bytes: int) -> None:
    """Raises `WrongRequest` where the base's weights alone do not fit a GPU that reports this
    memory.
    """
    if (refusal := refusal_of_weights(base, shape, precision, gpu_bytes)) is not None:
        raise WrongRequest(refusal)
