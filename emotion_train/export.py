"""Merges a published adapter and its base into one plain transformers checkpoint, which a pipeline
and vLLM serve without this program.

    emotion-train export s3://team/runs/RUN_ID --to s3://team/models/emotions
    emotion-train export final --to emotions --dtype fp32

Memory: a few blocks of rows, 2 GiB for Mistral Small, and no GPU. Disk: two files of 1 GiB below
TMPDIR beside the result. An adapter that was trained on an nf4 base is merged into the unquantised
base; the change is measured on validation posts where this machine has room for the model.
"""

from __future__ import annotations

import argparse
import sys

from emotion_train.evaluation.adapter import add_base_argument, positive
from emotion_train.exporting.export import COMPARED, ExportResult, export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help=(
            "published run (OUTPUT_URL/RUN_ID, s3://… or a folder); or an adapter folder written by"
            " `emotion-launch pull`, or its copy in a bucket"
        ),
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="URL",
        help="where the checkpoint goes: a folder or s3://bucket/prefix, empty or of a killed export",
    )
    add_base_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="format of the weights; the head is float32 in both (default: bf16)",
    )
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--compare",
        type=positive,
        metavar="N",
        help=(
            "compare the export with the adapter as it was trained on N validation posts, which loads both"
            f" models (default: {COMPARED} for an adapter trained on nf4, else none)"
        ),
    )
    compared.add_argument("--no-compare", action="store_true", help="do not compare")
    parser.add_argument(
        "--data",
        metavar="DATA_URL",
        help="data set of these posts (default: the data set in the run's report)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="device of the comparison; auto takes a GPU where there is one (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and print its URL, what merging changed, and how to serve it; returns 0."""
    result = export(
        arguments.adapter,
        arguments.to,
        base=arguments.base,
        dtype=arguments.dtype,
        compare=0 if arguments.no_compare else arguments.compare,
        data_url=arguments.data,
        device=arguments.device,
    )
    facts = result.facts
    words = f"{facts.dtype}, {result.bytes / 2**30:.2f} GiB, {result.parameters:,} parameters"
    print(f"export  {result.url} ({words}){_already(result)}")
    if result.change is not None:
        print(f"change  {result.change.sentence()}")
    if result.unmeasured is not None:
        print(f"change  not measured: {result.unmeasured}")
    print(f"next    README.md there has the lines for a pipeline and for vLLM (cut at {facts.max_length})")
    return 0


def _already(result: ExportResult) -> str:
    if result.created:
        return ""
    if not result.others:
        return ": already there, the same"
    return (
        f": already there; {' and '.join(result.others)} there: not as this version writes, so edited,"
        " damaged or of another version"
    )


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
