"""Train one run from its config to its published adapter and report; `accelerate launch -m emotion_train.train --config run.yaml`.

The order of the text is the order of time: config, data, run, model, loop, report. Every process runs all of it; rank 0 alone writes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.config import Config, load_config, require_trackers
from emotion_train.data.index import Index, read_index, require_trainable
from emotion_train.errors import WrongRequest
from emotion_train.runlog import Entry, Writer, read_log
from emotion_train.storage import Store, open_store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from accelerate import Accelerator

    from emotion_train.data.loader import Loader
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.distributed import Ranks
    from emotion_train.model.head import EmotionClassifier
    from emotion_train.model.load import BaseInfo
    from emotion_train.report.figures import SplitResult
    from emotion_train.report.schema import Report
    from emotion_train.trainer import Trainer

POSTS_PER_SCORING_STEP = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run config in YAML; all keys have defaults but data.url and run.output_url")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values that win over the file")


@dataclass(frozen=True)
class Job:
    """What stays the same from the start of this process to its end."""

    config: Config
    index: Index
    data_store: Store
    output_store: Store
    run_id: str
    accelerator: Accelerator
    ranks: Ranks
    tokenizer: PostTokenizer
    base: BaseInfo
    started: datetime


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 when the run is published, by this process or by an earlier one."""
    started = datetime.now(UTC)
    config = load_config(arguments.config, arguments.overrides)
    require_trackers(config)
    data_store, output_store = open_store(config.data.url), open_store(config.run.output_url)
    index = read_index(data_store)
    require_trainable(index)

    import torch

    from emotion_train.data.tokenization import PostTokenizer

    accelerator, ranks = _start_processes(config)
    run_id = ranks.from_main(config.run.id or derived_run_id(config, os.environ))
    config = config.model_copy(update={"run": config.run.model_copy(update={"id": run_id})})
    writer = Writer(output_store, run_id, index.sha256(), config.sha256()) if ranks.is_main else None
    entries = ranks.from_main(writer.entries if writer is not None else ())
    if finals := [entry for entry in entries if entry.kind == "final"]:
        if ranks.is_main:
            _say_published(output_store, run_id, finals[-1])
        return 0
    newest = _checkpoint_of_same_question(entries, config, index, output_store, run_id)
    tokenizer = PostTokenizer.load(config.model.base, config.data.max_length)
    if writer is not None:
        print(f"run {run_id} (run.id={run_id} resumes it)\n{config.to_yaml()}", file=sys.stderr, flush=True)
        writer.claim(*((newest.epoch, newest.step) if newest is not None else (0, 0)))

    try:
        model, base = _build_model(config, index, accelerator)
        job = Job(config, index, data_store, output_store, run_id, accelerator, ranks, tokenizer, base, started)
        with ExitStack() as stack:
            trainer = _start_trainer(job, model, writer, newest, stack)
            _fit(job, trainer)
            return _report_and_publish(job, trainer, writer, stack)
    except torch.OutOfMemoryError:
        raise WrongRequest(_too_small(config)) from None


def _too_small(config: Config) -> str:
    """The sentence for a GPU that is too small, with the nearest setting that needs less."""
    import torch

    tokens = config.train.tokens_per_microbatch
    remedies = [f"train.tokens_per_microbatch={tokens // 2}"] if tokens // 2 >= config.data.max_length else []
    remedies += [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    remedies += [] if config.model.precision == "nf4" else ["model.precision=nf4"]
    size = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
    return (
        f"The GPU's {size:.0f} GiB are too small for {config.model.base} in {config.model.precision} with {tokens} tokens a micro-batch; "
        f"type {' or '.join(remedies) or 'a smaller model.base'}, or take a larger GPU. The run continues from its last checkpoint."
    )


def derived_run_id(config: Config, environment: Mapping[str, str]) -> str:
    """SKYPILOT_TASK_ID, which stays the same over recoveries, else the time and the config's hash."""
    if task := environment.get("SKYPILOT_TASK_ID"):
        return re.sub(r"[^A-Za-z0-9._-]", "-", task)[-128:].lstrip("._-")
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.sha256()[:6]}"


def _checkpoint_of_same_question(entries: Sequence[Entry], config: Config, index: Index, store: Store, run_id: str) -> Entry | None:
    """The newest checkpoint, if any. Asked before the claim, so that a request which is refused never fences a writer at work."""
    from emotion_train import checkpoint

    saved = [entry for entry in entries if entry.kind == "checkpoint"]
    if not saved:
        return None
    for words in checkpoint.check_same_question(checkpoint.read_state(store, run_id, saved[-1]), config, index, saved[-1], run_id):
        print(f"continued with another {words}", file=sys.stderr)
    return saved[-1]


def _start_processes(config: Config) -> tuple[Accelerator, Ranks]:
    import torch
    from accelerate import Accelerator

    from emotion_train.distributed import Ranks

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    if not on_cpu and not torch.cuda.is_available():
        raise WrongRequest(
            "CUDA sees no GPU here (nvidia-smi shows the driver, `python -c 'import torch; print(torch.version.cuda)'` the build); to "
            "train on the CPU type accelerate launch --config_file accelerate_configs/cpu.yaml."
        )
    trackers = list(config.run.trackers)
    accelerator = Accelerator(cpu=on_cpu, log_with=trackers or None, project_dir="tracking" if trackers else None)
    return accelerator, Ranks()


def _build_model(config: Config, index: Index, accelerator: Accelerator) -> tuple[EmotionClassifier, BaseInfo]:
    """The frozen base with a new adapter and head on this process's device."""
    from emotion_train.model.lora import build_classifier
    from emotion_train.progress import ProgressLine

    with ProgressLine("loading", 1, "tensors", shown=accelerator.is_main_process) as line:
        model, base = build_classifier(
            config.model.base,
            config.model.precision,
            len(index.labels),
            config.lora,
            config.run.seed,
            accelerator.device,
            tell=lambda placed, total: line.update(placed, total=total),
        )
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model, base


def _start_trainer(job: Job, model: EmotionClassifier, writer: Writer | None, newest: Entry | None, stack: ExitStack) -> Trainer:
    """The trainer at its cursor: at the start, or after the newest checkpoint."""
    from emotion_train import checkpoint
    from emotion_train.loss import class_weights
    from emotion_train.trainer import Trainer

    weights_C = class_weights(job.index.split("train").label_counts, job.config.loss.class_weights)
    train = _open_loader(job, "train", weights_C, job.config.train.global_batch_size, job.config.run.seed, stack)
    validation = _scoring_loader(job, "validation", stack)
    trainer = Trainer(job.config, job.index, job.accelerator, job.ranks, model, train, validation, writer, job.base, job.started)
    if newest is not None:
        checkpoint.check_same_base(checkpoint.read_state(job.output_store, job.run_id, newest), job.base, job.run_id)
        trainer.restore(checkpoint.restore(job.output_store, job.run_id, newest))
        if job.ranks.is_main:
            print(f"resumed from checkpoint {newest.seq:08d} at step {newest.step} of {trainer.steps}", file=sys.stderr)
    if job.config.run.trackers:
        sections = job.config.model_dump(mode="json")
        values = {f"{section}.{key}": str(value) for section, fields in sections.items() for key, value in fields.items()}
        job.accelerator.init_trackers("emotion-train", config=values)
    return trainer


def _scoring_loader(job: Job, name: str, stack: ExitStack) -> Loader:
    import numpy as np

    return _open_loader(job, name, np.ones(len(job.index.labels)), POSTS_PER_SCORING_STEP * job.ranks.world_size, 0, stack)


def _open_loader(job: Job, name: str, weights_C: npt.NDArray[np.float64], batch_size: int, seed: int, stack: ExitStack) -> Loader:
    from emotion_train.data.loader import Loader
    from emotion_train.data.order import Order
    from emotion_train.data.reader import RowGroupReader
    from emotion_train.scoring import fill_multiple

    split = job.index.split(name)
    return stack.enter_context(
        Loader(
            RowGroupReader(job.data_store, split),
            Order(split.row_counts, split.lanes, seed),
            job.tokenizer,
            weights_C,
            global_batch_size=batch_size,
            tokens_per_microbatch=job.config.train.tokens_per_microbatch,
            fill_multiple=fill_multiple(job.accelerator.device),
            rank=job.ranks.rank,
            world_size=job.ranks.world_size,
            agree=job.ranks.agree,
        )
    )


def _fit(job: Job, trainer: Trainer) -> None:
    from emotion_train.progress import ProgressLine

    with ProgressLine("training", trainer.steps, "steps", shown=job.ranks.is_main) as line:
        trainer.tell = lambda progress, words: line.update(progress.step, words)
        trainer.tell_milestone = line.say
        trainer.fit()


def _report_and_publish(job: Job, trainer: Trainer, writer: Writer | None, stack: ExitStack) -> int:
    """Take the best checkpoint, score it on every held-out split, and publish adapter and report together."""
    from rich.console import Console

    from emotion_train import checkpoint
    from emotion_train.model.lora import load_adapter_state
    from emotion_train.publish import publish
    from emotion_train.report.terminal import print_report

    best = checkpoint.best(read_log(job.output_store, job.run_id))
    assert best is not None, "every epoch ends with a checkpoint"
    load_adapter_state(trainer.bare_model, checkpoint.restore_adapter(job.output_store, job.run_id, best))
    splits = _score_splits(job, trainer, stack)
    if writer is not None:
        report = _build_report(job, trainer, splits, best)
        with tempfile.TemporaryDirectory(prefix="emotion-train-") as folder:
            _save_adapter(job, trainer, report, Path(folder))
            entry = publish(writer, job.config.train.epochs, trainer.progress.step, Path(folder), report, splits)
        print_report(report, Console(highlight=False))
        _say_published(job.output_store, job.run_id, entry)
    job.ranks.from_main(None)  # nobody leaves before the run is published
    job.accelerator.end_training()
    return 0


def _score_splits(job: Job, trainer: Trainer, stack: ExitStack) -> dict[str, SplitResult]:
    """Counts and joined predictions of validation and, where there is one, test; empty predictions on ranks other than 0."""
    from emotion_train.progress import ProgressLine
    from emotion_train.publish import tfidf_predictions
    from emotion_train.report.figures import SplitResult
    from emotion_train.report.predictions import join_predictions

    names = [name for name in ("validation", "test") if name in job.index.splits and job.index.splits[name].rows]
    floors = {}
    if job.ranks.is_main:
        print("fitting the TF-IDF floor", file=sys.stderr, flush=True)
        floors = tfidf_predictions(job.data_store, job.index, names, job.config.report.floor_max_rows, job.config.run.seed)
    results: dict[str, SplitResult] = {}
    for name in names:
        with ProgressLine(f"scoring {name}", job.index.split(name).rows, "posts", shown=job.ranks.is_main) as line:
            scored = trainer.score(_scoring_loader(job, name, stack), line.update)
        parts = job.ranks.gather(scored.predictions)
        if job.ranks.is_main:
            results[name] = SplitResult(scored.counts_CC, join_predictions(parts, job.index.split(name).rows), floors.get(name))
    return results


def _build_report(job: Job, trainer: Trainer, splits: Mapping[str, SplitResult], best: Entry) -> Report:
    from emotion_train.publish import git_commit, peak_memory, versions
    from emotion_train.report.figures import Measured, build_report, dataset_facts
    from emotion_train.report.schema import Evaluation, Identity

    progress, ended = trainer.progress, datetime.now(UTC)
    memory_bytes, memory_kind = peak_memory(job.accelerator.device)
    remarks = [f"{progress.bad_rows} rows turned out bad at run time and were trained with weight 0."] if progress.bad_rows else []
    return build_report(
        labels=job.index.labels,
        splits=splits,
        history=[Evaluation.model_validate(one) for one in progress.history],
        best_step=best.step,
        dataset=dataset_facts(job.index),
        measured=Measured(
            posts=progress.examples,
            real_tokens=progress.tokens,
            computed_tokens=progress.computed_tokens,
            train_seconds=progress.train_seconds,
            evaluation_seconds=progress.evaluation_seconds,
            wall_seconds=trainer.wall_seconds(),
            peak_memory_bytes=memory_bytes,
            memory_kind=memory_kind,
        ),
        identity=Identity(
            run_id=job.run_id,
            config=job.config.model_dump(mode="json"),
            config_sha256=job.config.sha256(),
            index_sha256=job.index.sha256(),
            data_url=job.config.data.url,
            base=job.config.model.base,
            precision=job.config.model.precision,
            versions=versions(),
            git_commit=git_commit(),
            device=device_name(job.accelerator.device.type),
            world_size=job.ranks.world_size,
            started_utc=job.started,
            ended_utc=ended,
        ),
        settings=job.config.report,
        seed=job.config.run.seed,
        remarks=remarks,
    )


def _save_adapter(job: Job, trainer: Trainer, report: Report, folder: Path) -> None:
    from emotion_train.model.lora import AdapterFacts, save_adapter

    facts = AdapterFacts.of(
        job.base,
        job.tokenizer,
        precision=job.config.model.precision,
        lora=job.config.lora,
        labels=job.index.labels,
        run_id=job.run_id,
    )
    headline = report.splits[report.headline]
    lines = [
        f"{report.verdict.sentence}",
        "",
        "| split | macro-F1 | 95 % interval | weighted F1 | accuracy |",
        "|---|---|---|---|---|",
        f"| {report.headline} | {headline.macro_f1:.3f} | {headline.macro_f1_low:.3f} to {headline.macro_f1_high:.3f} "
        f"| {headline.weighted_f1:.3f} | {headline.accuracy:.3f} |",
    ]
    save_adapter(trainer.bare_model, folder, tokenizer=job.tokenizer, facts=facts, metrics_lines=lines)


def device_name(kind: str) -> str:
    """Name of the first GPU, or of the processor."""
    if kind == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    import platform

    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def _say_published(store: Store, run_id: str, entry: Entry) -> None:
    print(f"published at step {entry.step}: {store.url}/{run_id}")
    print(f"next: emotion-launch pull {store.url}/{run_id} --to adapter")


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
