"""Puts the text part of a base into a bucket or folder once, so that runs read it from there in
parallel and need no hub.

    emotion-train stage-base mistralai/Mistral-Small-3.1-24B-Base-2503 s3://team/bases/mistral-small
    emotion-launch run --config run.yaml model.base=s3://team/bases/mistral-small

Transformers can read the result too. Host memory: 5 GiB, ten objects of half a GiB or of the
largest tensor. Every object is read back once, so staging moves the base's bytes twice; a second
staging reads the source again to compare and writes nothing.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import TYPE_CHECKING

from emotion_train.bases.depth import Layers, depth_words
from emotion_train.config import MOST_LAYERS

if TYPE_CHECKING:
    from emotion_train.bases.staged import StagedIndex

_WHEN_IT_PAYS = """when it pays:
  Runs on machines that start empty, such as spot GPUs: each start reads 12 GiB (nf4) or 43 GiB
  (bf16) of Mistral Small from a bucket in its own region instead of 48 GB from the hub, needs no
  token, and works when the hub is away. nf4 serves runs with model.precision=nf4 only and is a
  quarter of the bytes; bf16 serves nf4, bf16 and fp8. Make nf4 on a GPU: a CPU takes some 20
  minutes for Mistral Small. On a machine that keeps its hub cache there is little to gain."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{_WHEN_IT_PAYS}\n\n{parser.epilog}"
    parser.add_argument(
        "base", metavar="BASE", help="hub id or folder of a safetensors checkpoint (not .gguf, not quantised)"
    )
    parser.add_argument(
        "url",
        metavar="URL",
        help="place of the staged base: s3://bucket/prefix or a folder, empty or of a killed staging",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "nf4"),
        default="bf16",
        help="how the linear layers are stored; nf4 serves nf4 runs only (default: bf16)",
    )
    parser.add_argument(
        "--layers",
        type=layers_or_share,
        metavar="N",
        help=(
            "stage only the first N blocks, or a share of them such as 0.77, for runs whose model.layers is"
            " no larger (default: all)"
        ),
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device that makes nf4; auto takes a GPU where there is one (default: auto)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Stage the base and print what is there now; returns 0."""
    from emotion_train.model.staged_copy import stage

    result = stage(
        arguments.base, arguments.url, arguments.precision, arguments.device, layers=arguments.layers
    )
    index = result.index
    words = (
        f"{index.precision},{_depth(index)} {index.bytes / 2**30:.2f} GiB, objects of weights:"
        f" {len(index.shards)}, {index.parameters:,} parameters"
    )
    print(f"base    {result.url} ({words}){'' if result.created else ': already there, the same'}")
    print(
        f"next    {shlex.quote(f'model.base={result.url}')}"
        + (" model.precision=nf4" if index.precision == "nf4" else "")
    )
    return 0


def layers_or_share(word: str) -> Layers:
    """The value of --layers, a number of blocks or a share, like `model.layers` of a run."""
    if re.fullmatch("[0-9]{1,4}", word) and 1 <= int(word) <= MOST_LAYERS:
        return int(word)
    if re.fullmatch(r"0?\.[0-9]{1,9}", word) and float(word) > 0:
        return float(word)
    raise argparse.ArgumentTypeError(
        f"{word[:40]!r} is neither a number of blocks such as 23 nor a share of them below 1 such as 0.77"
    )


def _depth(index: StagedIndex) -> str:
    if index.source_layers is None:
        return ""
    blocks = {name.split(".")[2] for name in (tensor.name for tensor in index.tensors) if ".layers." in name}
    return f" {depth_words(len(blocks), index.source_layers)},"


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["stage-base", *sys.argv[1:]]))
