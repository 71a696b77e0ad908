"""One and two GPUs by every engine: the real size in nf4, trained by the program's own command
line, saved, read back, compared.

    # 45 GiB there, two GPUs with 80 GB, some eight minutes
    python benchmarks/many_gpus.py --folder /dev/shm/mistral
    python benchmarks/many_gpus.py --folder FOLDER --layers 10 --engines
        one,each,ddp,zero2,zero3,fsdp2 --precision nf4,bf16
    # 131 GiB there: a base that one GPU has no room for in bf16
    python benchmarks/many_gpus.py --folder FOLDER-70B --shape llama-3.3-70b --engines fsdp2
        --precision nf4,bf16

Writes Mistral Small 3.1's shape with random weights as `real_size.py` does (one that is there is
used again), prepares GoEmotions posts and trains on the same steps with one GPU and with two by
each engine. Posts/s are those between two evaluations, read from the run's own checkpoints, so that
start-up and the first kernels do not count. Each adapter is pulled and read by a new process on one
GPU, which scores the validation posts again. That must give what was published; what is trained
agrees between engines to rounding, since two GPUs cut a step into other packs than one.

`each` is what the machine itself allows: a run of one GPU on every GPU at the same time, which
share nothing but power, processor and disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goemotions import MISTRAL, SINGLE_GPU, add_posts_argument, prepared, splits, words
from real_size import add_checkpoint_arguments, ensure_checkpoint, probabilities, some_posts
from safetensors.torch import load_file

from emotion_train.runs.checkpoint import read_document
from emotion_train.runs.log import read_log
from emotion_train.runs.published import download
from emotion_train.storage.open import open_store
from launch.run.choice import CONFIGS, accelerate_line
from launch.run.topology import Topology

FILES = {
    "one": SINGLE_GPU,
    "each": SINGLE_GPU,
    "ddp": CONFIGS / "multi_gpu_ddp.yaml",
    "zero2": CONFIGS / "multi_gpu_deepspeed_zero2.yaml",
    "zero3": CONFIGS / "multi_gpu_deepspeed_zero3.yaml",
    "fsdp2": CONFIGS / "multi_gpu_fsdp2_qlora.yaml",
}
VALIDATION = 512


@dataclass(frozen=True)
class Run:
    engine: str
    precision: str
    gpus: int
    posts_per_second: float  # of all GPUs together
    report: dict[str, Any]
    adapter: Path
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--engines",
        type=words,
        default=["one", "each", "ddp", "zero2", "fsdp2"],
        metavar="A,B",
        help=f"of {', '.join(FILES)}",
    )
    parser.add_argument(
        "--precision",
        type=words,
        default=["nf4"],
        metavar="A,B",
        help="nf4, bf16, fp8 or fp32 (default: nf4)",
    )
    parser.add_argument("--gpus", type=int, default=2, help="for the engines of several (default: 2)")
    parser.add_argument(
        "--steps", type=int, default=20, help="half of them before the clock runs (default: 20)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=800,
        help="posts a step over all GPUs (default: 800, two packs for each of two)",
    )
    parser.add_argument(
        "--read-back",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score the validation posts again from each adapter (default: yes)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    ensure_checkpoint(arguments)
    tell(began, "checkpoint there")
    with tempfile.TemporaryDirectory(prefix="many-gpus-") as name:
        folder = Path(name)
        posts = some_posts(
            splits(arguments.posts, folder / "all"),
            folder / "posts",
            arguments.steps * arguments.batch,
            VALIDATION,
        )
        prepared(posts, folder, "--on-bad", "drop")
        runs = []
        for precision in arguments.precision:
            for engine in arguments.engines:
                runs.append(
                    each_alone(arguments, folder, precision)
                    if engine == "each"
                    else train(arguments, folder, engine, precision)
                )
                tell(began, f"{runs[-1].name} trained, {runs[-1].posts_per_second:.0f} posts/s")
        apart: list[float] | None = None
        if arguments.read_back:
            with ThreadPoolExecutor(max(1, torch.cuda.device_count())) as pool:
                apart = list(pool.map(lambda numbered: read_back(folder, *numbered), enumerate(runs)))
            tell(began, "adapters read back")
        print(table(arguments, runs, apart))


def tell(began: float, what: str) -> None:
    print(f"many_gpus.py: {time.perf_counter() - began:.0f} s: {what}", file=sys.stderr, flush=True)


def each_alone(arguments: argparse.Namespace, folder: Path, precision: str) -> Run:
    """A run of one GPU on every GPU at once; the adapter is that of the first."""
    gpus = range(arguments.gpus)
    with ThreadPoolExecutor(arguments.gpus) as pool:
        runs = list(pool.map(lambda gpu: train(arguments, folder, "each", precision, gpu), gpus))
    print(
        f"many_gpus.py: alone, at once: {', '.join(f'{run.posts_per_second:.0f}' for run in runs)} posts/s",
        file=sys.stderr,
        flush=True,
    )
    return replace(runs[0], gpus=len(runs), posts_per_second=sum(run.posts_per_second for run in runs))


def train(
    arguments: argparse.Namespace, folder: Path, engine: str, precision: str, gpu: int | None = None
) -> Run:
    """One run to its published report, by the line that `emotion-launch run` would start; on this
    GPU where one is named.
    """
    run_id = f"{engine}-{precision}" if gpu is None else f"{engine}-{precision}-{gpu}"
    values = [
        *(
            f"data.url={folder / 'data'}",
            f"run.output_url={folder / 'runs'}",
            f"run.id={run_id}",
            f"model.base={arguments.folder}",
        ),
        *(
            f"model.precision={precision}",
            "train.epochs=1",
            f"train.global_batch_size={arguments.batch}",
            "lora.dropout=0",
        ),
        *(
            "train.tokens_per_microbatch=4096",
            f"evaluation.every_steps={arguments.steps // 2}",
            "checkpoint.every_seconds=null",
        ),
        *(
            "checkpoint.keep_every=1",
            "preemption.notices=none",
            "report.floor_max_rows=0",
            "report.bootstrap_samples=100",
        ),
        *("distributed.timeout_s=300", *arguments.overrides),
    ]
    topology = Topology((), processes_per_node=1 if FILES[engine] == SINGLE_GPU else arguments.gpus)
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    began = time.perf_counter()
    subprocess.run(
        accelerate_line(FILES[engine], str(MISTRAL), values, topology=topology),
        check=True,
        stdout=sys.stderr,
        env=environment,
    )
    seconds = time.perf_counter() - began
    download(f"{folder / 'runs'}/{run_id}", folder / run_id)
    report: dict[str, Any] = json.loads((folder / run_id / "report" / "report.json").read_text())
    assert report["identity"]["world_size"] == topology.world_size
    return Run(
        engine,
        precision,
        topology.world_size,
        speed(str(folder / "runs"), run_id)[0],
        report,
        folder / run_id,
        seconds,
    )


def speed(output_url: str, run_id: str) -> tuple[float, float]:
    """Posts/s and real tokens/s of training between the first evaluation and the second."""
    store = open_store(output_url)
    saved = [
        entry
        for entry in read_log(store, run_id)
        if entry.kind == "checkpoint" and "macro_f1" in entry.metrics
    ]
    first, last = (read_document(store, run_id, entry)["progress"] for entry in saved[:2])
    seconds = last["train_seconds"] - first["train_seconds"]
    return (last["examples"] - first["examples"]) / seconds, (last["tokens"] - first["tokens"]) / seconds


def read_back(folder: Path, number: int, run: Run) -> float:
    """The largest difference between a published probability and that of the pulled adapter in a
    new process on one GPU.
    """
    command = [
        sys.executable,
        "-m",
        "emotion_train.evaluate",
        "--adapter",
        str(run.adapter),
        "--data",
        f"{folder}/data",
    ]
    again = folder / f"again-{run.name}"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % max(1, torch.cuda.device_count()))}
    line = [*command, "--split", "validation", "--out", str(again), "--tokens-per-microbatch", "4096"]
    line += ["--decoder", "stock" if run.engine == "zero3" else "fused"]  # as it was trained
    subprocess.run(
        line, check=True, stdout=sys.stderr, env=environment if torch.cuda.is_available() else None
    )
    published, reread = (
        probabilities(at / "predictions_validation.parquet") for at in (run.adapter / "report", again)
    )
    assert published.keys() == reread.keys()
    return max(float(np.abs(published[post] - reread[post]).max()) for post in published)


def likeness(run: Run, other: Run) -> float:
    """Cosine of all that was trained; the head and A begin alike, so B alone counts."""
    mine, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, other))
    names = [name for name in theirs if "lora_B" in name]
    assert mine.keys() == theirs.keys()
    a, b = (torch.cat([found[name].flatten() for name in names]).double() for found in (mine, theirs))
    return float(torch.cosine_similarity(a, b, dim=0))


def table(arguments: argparse.Namespace, runs: list[Run], apart: list[float] | None) -> str:
    rows = [
        (
            "| engine | base | GPUs | posts/s | against one GPU | peak memory of a GPU, GiB | adapter's"
            " cosine to that of one GPU | largest difference of a probability after reading back | whole"
            " command, s |"
        ),
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for number, run in enumerate(runs):
        one = next(
            (other for other in runs if (other.engine, other.precision) == ("one", run.precision)), None
        )
        against = (
            f"{run.posts_per_second / one.posts_per_second:.2f} | {likeness(run, one):.5f}"
            if one is not None
            else "- | -"
        )
        ratio, cosine = against.split(" | ")
        rows.append(
            f"| {run.engine} | {run.precision} | {run.gpus} | {run.posts_per_second:.0f} | {ratio} |"
            f" {run.report['speed']['peak_memory_bytes'] / 2**30:.1f} | {cosine} |"
            f" {f'{apart[number]:.1e}' if apart else '-'} | {run.seconds:.0f} |"
        )
    identity = runs[0].report["identity"]
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    steps = (
        f"{arguments.shape}, {arguments.layers} layers, {arguments.steps} steps of {arguments.batch}"
        f" posts, packs of 4,096 tokens{f', {VALIDATION} read back' if apart else ''}"
    )
    return "\n".join([*rows, "", f"{steps}. {identity['device']}; {versions}"])


if __name__ == "__main__":
    main()
