"""Train one run from its config to its published adapter and report; `accelerate launch -m
emotion_train.train --config run.yaml`.

The order of the text is the order of time: config, data, run, model, loop, report. Every process
runs all of it; rank 0 alone writes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from emotion_train.config import POSTS_PER_SCORING_STEP, Config, load_config, require_trackers
from emotion_train.data.index import Index, read_index, require_trainable
from emotion_train.errors import LostContact, NotPublished, StorageError, WrongRequest
from emotion_train.processes.launcher_link import answers_signals
from emotion_train.processes.notices import PreemptionWatch, hold_seconds
from emotion_train.runs.log import Entry, Metrics, Published, Writer, read_log, require_conditional_writes
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from accelerate import Accelerator

    from emotion_train.data.loader import Loader
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.head import EmotionClassifier
    from emotion_train.model.load import BaseInfo
    from emotion_train.processes.interruption import Interruptions
    from emotion_train.processes.ranks import Ranks
    from emotion_train.report.figures import SplitResult
    from emotion_train.report.schema import Report
    from emotion_train.runs.checkpoint import Saved
    from emotion_train.runs.saver import LocalStates, Saver
    from emotion_train.training.engines import Kind
    from emotion_train.training.trainer import Trainer

T = TypeVar("T")
DATA_PATIENCE_S = 1800.0  # for a bucket that stops answering
_TRY_S = 10.0  # how long one look at the saver takes while all ranks wait for it
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_TELL_EVERY_S = 60.0
_END_AFTER_S = 120.0  # enough for the saver to end what it is about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="run config in YAML; all keys have defaults but data.url and run.output_url",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="values that win over the file"
    )
    parser.add_argument(
        "--allow-unfenced",
        action="store_true",
        help=(
            "train also on a store that ignores create-only writes: nothing then keeps two writers of one run"
            " apart"
        ),
    )


@dataclass(frozen=True)
class Job:
    """What stays the same from the start of this process to its end."""

    config: Config
    index: Index
    data_store: Store
    output_store: Store
    run_id: str
    accelerator: Accelerator
    engine: Kind
    ranks: Ranks
    interruptions: Interruptions
    tokenizer: PostTokenizer
    started: datetime
    again: str  # the command that goes on with this run


@dataclass
class Claimed:
    """What rank 0 holds after its claim: the right to write, and where the run goes on."""

    writer: Writer
    local: LocalStates
    newest: Saved | None = None  # the newest of the log's checkpoints and of the states on this machine
    # the states on this machine that the bucket did not take
    not_in_log: list[Saved] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # fall-backs, of this start and of those before

    def fell_back(self, words: str) -> None:
        """Say, log and remember, once, that a checkpoint was passed over."""
        if words not in self.remarks:
            _say(words)
            last = self.writer.log[-1]
            self.writer.append("note", last.epoch, last.step, (), {"note": "fall-back", "words": words})
            self.remarks.append(words)


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
    from emotion_train.processes.interruption import Interruptions
    from emotion_train.processes.ranks import is_about_contact, lost_contact
    from emotion_train.training.microbatch import settle

    with ExitStack() as stack:
        # once a machine is enough
        asked = config.preemption.notices if os.environ.get("LOCAL_RANK", "0") == "0" else "none"
        watch = stack.enter_context(PreemptionWatch(asked, _say))
        answers_signals()
        accelerator, engine, ranks = _start_processes(config)
        run_id = ranks.from_main(config.run.id or derived_run_id(config, os.environ))
        config = config.model_copy(update={"run": config.run.model_copy(update={"id": run_id})})
        hold_s = hold_seconds(config.preemption.hold_s, os.environ)
        interruptions = Interruptions(
            ranks, lambda: watch.notice, hold_s, _say if ranks.is_main else _say_nothing
        )
        if published := ranks.on_main(
            lambda: _look_before_claiming(config, index, output_store, arguments.allow_unfenced)
        ):
            return _say_published(output_store, run_id, published, ranks.is_main)
        _require_fp8(config, engine, accelerator.device)
        tokenizer = PostTokenizer.load(config.model.base, config.data.max_length)
        config = settle(config, index, data_store, tokenizer, engine, ranks, accelerator.device, _say)
        _keep_kernels(config, ranks, accelerator.device, stack)
        again = _command(arguments, run_id, accelerator.device.type)
        job = Job(
            config,
            index,
            data_store,
            output_store,
            run_id,
            accelerator,
            engine,
            ranks,
            interruptions,
            tokenizer,
            started,
            again,
        )
        claimed: list[Claimed] = []  # stays empty on ranks other than 0
        if published := ranks.on_main(lambda: _claim(job, claimed)):
            return _say_published(output_store, run_id, published, ranks.is_main)
        try:
            trainer = _start_trainer(job, claimed[0] if claimed else None, stack)
            _fit(job, trainer)
            return _report_and_publish(job, trainer, claimed[0] if claimed else None, stack)
        except torch.OutOfMemoryError:
            raise WrongRequest(_too_small(config)) from None
        except LostContact:
            _end_even_if_stuck()
            raise
        except RuntimeError as error:
            if not is_about_contact(error):
                raise
            _end_even_if_stuck()
            raise LostContact(lost_contact(ranks.rank, ranks.timeout_s, error)) from error


def _require_fp8(config: Config, engine: Kind, device: torch.device) -> None:
    """Raises `WrongRequest` when the config asks for fp8 and engine, GPU or base cannot compute
    it.
    """
    from emotion_train.model.head import require_float8
    from emotion_train.model.load import read_config
    from emotion_train.sizing.memory import is_fused
    from emotion_train.sizing.shape import Shape
    from emotion_train.training.engines import shards_weights

    if config.model.precision != "fp8":
        return
    if shards_weights(engine):
        raise WrongRequest(
            f"model.precision is fp8 and {engine} cuts the weights up; fp8 is computed from whole ones: give"
            " --config_file accelerate_configs/multi_gpu_ddp.yaml, or model.precision=bf16."
        )
    require_float8(device, is_fused(Shape.of(read_config(config.model.base).text.to_dict()), "fp8"))


def _keep_kernels(config: Config, ranks: Ranks, device: torch.device, stack: ExitStack) -> None:
    """Take Triton's kernels from where the config says, and keep there what this run builds."""
    if config.run.kernels_url is None or device.type != "cuda":
        return
    import torch

    from emotion_train.model.built_kernels import BuiltKernels

    store, folder = open_store(config.run.kernels_url), _folder_here(config) / "kernels"
    gpu = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    stack.enter_context(BuiltKernels(store, folder, gpu, _say, keeps=ranks.is_main))


def _end_even_if_stuck() -> None:
    """End this process in a while even if its GPU or a thread of its own still waits for a process
    that is gone.
    """
    timer = threading.Timer(_END_AFTER_S, os._exit, [1])
    timer.daemon = True
    timer.start()


def _too_small(config: Config) -> str:
    """The sentence for a GPU that is too small, with the nearest setting that needs less."""
    import torch

    tokens = config.train.microbatch_tokens
    remedies = [f"train.tokens_per_microbatch={tokens // 2}"] if tokens // 2 >= config.data.max_length else []
    remedies += [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    remedies += [] if config.model.precision == "nf4" else ["model.precision=nf4"]
    size = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
    return (
        f"The GPU's {size:.0f} GiB are too small for {config.model.base} in {config.model.precision} with"
        f" {tokens} tokens a micro-batch; type {' or '.join(remedies) or 'a smaller model.base'}, or take a"
        " larger GPU. The run continues from its last checkpoint."
    )


def derived_run_id(config: Config, environment: Mapping[str, str]) -> str:
    """SKYPILOT_TASK_ID, which stays the same over recoveries, else the time and the config's
    hash.
    """
    if task := environment.get("SKYPILOT_TASK_ID"):
        return re.sub(r"[^A-Za-z0-9._-]", "-", task)[-128:].lstrip("._-")
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.sha256()[:6]}"


def _command(arguments: argparse.Namespace, run_id: str, device: str) -> str:
    """The command line that goes on with this run."""
    words = ["--accelerate-config", "cpu"] if device == "cpu" else []
    words += ["--config", arguments.config] if arguments.config else []
    words += ["--allow-unfenced"] if arguments.allow_unfenced else []
    words += [word for word in arguments.overrides if not word.startswith("run.id=")]
    return shlex.join(["emotion-launch", "run", *words, f"run.id={run_id}"])


def _look_before_claiming(config: Config, index: Index, store: Store, allow_unfenced: bool) -> Entry | None:
    """The final entry, if there is one. Raises what would be refused, so that no writer at work is
    fenced by a request that is.
    """
    from emotion_train.runs import checkpoint

    assert config.run.id is not None
    _folder_here(config)
    entries = read_log(store, config.run.id)
    run_id = config.run.id

    def check(entry: Entry) -> list[str]:
        return checkpoint.check_same_question(
            checkpoint.read_document(store, run_id, entry), config, index, entry, run_id
        )

    if finals := [entry for entry in entries if entry.kind == "final"]:
        for entry in [entry for entry in entries if entry.kind == "checkpoint"][-1:]:
            with suppress(StorageError):  # a published run may have lost its checkpoints
                check(entry)
        return finals[-1]
    if checkpoint.newest(entries, check) is None and entries and entries[-1].index_sha256 != index.sha256():
        raise WrongRequest(
            f"Run {run_id} was started on another data set than {config.data.url} is now, and may be at work:"
            " its index differs. Give the old data.url to continue it, or another run.id to start a new run."
        )
    require_conditional_writes(store, run_id, allow_unfenced)
    return None


def _claim(job: Job, claimed: list[Claimed]) -> Entry | None:
    """Take the run over, then see where it stands; nobody else can add to it from now on.

    Returns the final entry when another writer has published in the meantime, else fills `claimed`.
    """
    from emotion_train.runs import checkpoint
    from emotion_train.runs.saver import LocalStates

    writer = Writer(job.output_store, job.run_id, job.index.sha256(), job.config.sha256())
    saved = [entry for entry in writer.entries if entry.kind == "checkpoint"]
    print(
        f"run {job.run_id} (run.id={job.run_id} resumes it)\n{job.config.to_yaml()}",
        file=sys.stderr,
        flush=True,
    )
    try:
        writer.claim(*((saved[-1].epoch, saved[-1].step) if saved else (0, 0)), facts=_facts(job))
    except Published as already:
        return already.entry
    found = Claimed(writer, LocalStates(_local_folder(job.config), job.run_id))
    found.remarks += [
        str(entry.metrics["words"])
        for entry in writer.entries
        if entry.kind == "note" and "words" in entry.metrics
    ]

    found.newest = checkpoint.newest(
        writer.entries,
        lambda entry: checkpoint.read_saved(job.output_store, job.run_id, entry),
        found.fell_back,
    )
    _prefer_local(job, found)
    if found.newest is not None:
        entry = found.newest.entry
        for words in checkpoint.check_same_question(
            found.newest.document, job.config, job.index, entry, job.run_id
        ):
            _say(f"continued with another {words}")
        _say_of_processes(found.writer)
    claimed.append(found)
    return None


def _say_of_processes(writer: Writer) -> None:
    """Note when this claim is on another number of processes than the one before."""
    claims = [entry.metrics.get("processes") for entry in writer.log if entry.kind == "claim"]
    if len(claims) > 1 and claims[-2] not in (None, claims[-1]):
        _say(f"continued on another number of processes (was {claims[-2]}, is {claims[-1]})")


def _facts(job: Job) -> Metrics:
    """What `emotion-launch runs` tells of a run that may not have a checkpoint yet."""
    config = job.config
    steps = -(-job.index.splits["train"].rows // config.train.global_batch_size) * config.train.epochs
    return {
        "base": config.model.base,
        "precision": config.model.precision,
        "steps": steps,
        "usd_per_hour": config.report.usd_per_hour,
        "device": device_name(job.accelerator.device.type),
        "processes": job.ranks.world_size,
    }


def _prefer_local(job: Job, found: Claimed) -> None:
    """Go on from a state that only this machine has when it is newer than the log's newest and
    answers the same question.

    Older ones are let go: behind the newest they would be where a run goes on that is killed just
    then.
    """
    from emotion_train.runs import checkpoint

    def place(entry: Entry) -> tuple[int, bool]:
        return entry.step, "macro_f1" in entry.metrics

    in_log = {place(entry) for entry in found.writer.entries if entry.kind == "checkpoint"}
    states = []
    for entry in found.local.entries():
        try:
            saved = checkpoint.read_saved(found.local.store, job.run_id, entry)
            checkpoint.check_same_question(saved.document, job.config, job.index, entry, job.run_id)
        except WrongRequest as error:
            _say(f"a state on this machine is passed over: {error}")
        else:
            if place(entry) not in in_log and (
                found.newest is None or place(entry) > place(found.newest.entry)
            ):
                states.append(saved)
    if states:
        step = found.newest.entry.step if found.newest is not None else 0
        _say(
            f"{found.local.folder} holds step {states[-1].entry.step}, the log has {step}: going on from the"
            " former"
        )
        found.newest, found.not_in_log = states[-1], states


def _local_folder(config: Config) -> Path:
    """Where the states of all runs below one output URL wait."""
    return _folder_here(config) / hashlib.sha256(config.run.output_url.encode()).hexdigest()[:12]


def _folder_here(config: Config) -> Path:
    """Where runs leave what stays on this machine; raises `WrongRequest` when it is another user's
    or cannot be written to.
    """
    default = Path(
        tempfile.gettempdir(), f"emotion-train-{os.getuid() if hasattr(os, 'getuid') else 'states'}"
    )
    folder = Path(config.checkpoint.local_folder) if config.checkpoint.local_folder is not None else default
    if hasattr(os, "getuid") and folder.exists() and folder.stat().st_uid != os.getuid():
        raise WrongRequest(
            f"checkpoint.local_folder {folder} belongs to another user; name a folder that is yours."
        )
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is no folder"
        raise WrongRequest(
            f"checkpoint.local_folder is {folder} and {there} {why}; name a folder that is yours."
        )
    return folder.absolute()


def _start_processes(config: Config) -> tuple[Accelerator, Kind, Ranks]:
    from emotion_train.processes.ranks import Ranks
    from emotion_train.training.engines import start_accelerator

    accelerator, engine = start_accelerator(config.distributed.timeout_s, list(config.run.trackers))
    ranks = Ranks(config.distributed.timeout_s)
    if ranks.world_size > 1 and ranks.is_main:
        _say(f"{ranks.world_size} processes, {engine} on {device_name(accelerator.device.type)}")
    return accelerator, engine, ranks


def _load_model(job: Job) -> tuple[EmotionClassifier, BaseInfo]:
    """The model, on all ranks; begun again when it was given up for a termination that was
    withdrawn.
    """
    import numpy as np

    from emotion_train.training.trainer import CutOff

    while True:
        loaded = None
        with suppress(CutOff):
            loaded = _build_model(job.config, job.index, job.accelerator, job.interruptions.going, job.engine)
        if not job.ranks.sum(np.array([loaded is None])).any():
            assert loaded is not None
            _refuse_different_bases(job, loaded[1])
            return loaded
        job.interruptions.hold("The model was being loaded; what the log has is safe.")


def _refuse_different_bases(job: Job, base: BaseInfo) -> None:
    """Raises `WrongRequest` on every rank when one has read other weights than rank 0, as after an
    update of the base between two nodes.
    """
    import numpy as np

    if job.ranks.sum(np.array([base.weights_sha256 != job.ranks.from_main(base.weights_sha256)])).any():
        raise WrongRequest(
            f"The nodes of this run read different weights for {base.name}; give all of them the same"
            " checkpoint, for example a folder or a hub id with an empty cache."
        )


def _build_model(
    config: Config,
    index: Index,
    accelerator: Accelerator,
    going: Callable[[], bool] = lambda: False,
    engine: Kind = "one process",
) -> tuple[EmotionClassifier, BaseInfo]:
    """The frozen base with a new adapter and head, on this process's device unless the engine cuts
    it up.

    Raises `CutOff` when the machine goes.
    """
    from emotion_train.model.lora import build_classifier
    from emotion_train.progress import ProgressLine
    from emotion_train.training.engines import shards_weights
    from emotion_train.training.trainer import CutOff

    def tell(placed: int, total: int) -> None:
        line.update(placed, total=total)
        if going():
            raise CutOff

    cut = shards_weights(engine)
    with ProgressLine("loading", 1, "tensors", shown=accelerator.is_main_process) as line:
        model, base = build_classifier(
            config.model.base,
            config.model.precision,
            len(index.labels),
            config.lora,
            config.run.seed,
            accelerator.device,
            to_be_sharded=cut,
            tell=tell,
        )
    if config.model.decoder == "fused" and not cut:
        model.fuse()
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model, base


def _start_trainer(job: Job, claimed: Claimed | None, stack: ExitStack) -> Trainer:
    """The trainer at its cursor: at the start, or after the newest state; `claimed` is None on
    ranks other than 0.
    """
    from emotion_train.model.loss import class_weights
    from emotion_train.runs.checkpoint import Question, Snapshot
    from emotion_train.training.trainer import Trainer

    model, base = _load_model(job)
    weights_C = class_weights(job.index.split("train").label_counts, job.config.loss.class_weights)
    train = _open_loader(
        job, "train", weights_C, job.config.train.global_batch_size, job.config.run.seed, stack
    )
    validation = _scoring_loader(job, "validation", stack)
    saver = None if claimed is None else stack.enter_context(_open_saver(job, claimed))
    trainer = Trainer(
        job.config,
        job.index,
        job.accelerator,
        job.ranks,
        model,
        train,
        validation,
        saver,
        base,
        job.started,
        job.interruptions,
        job.engine,
    )
    _restore(job, trainer, claimed)
    if saver is not None and claimed is not None:
        for saved in claimed.not_in_log:
            question = Question(job.config, job.index, base)
            saver.offer(Snapshot(saved.state(), saved.entry.epoch, question, saved.entry.metrics))
    if job.config.run.trackers:
        sections = job.config.model_dump(mode="json")
        values = {
            f"{section}.{key}": str(value)
            for section, fields in sections.items()
            for key, value in fields.items()
        }
        job.accelerator.init_trackers("emotion-train", config=values)
    return trainer


def _open_saver(job: Job, claimed: Claimed) -> Saver:
    from emotion_train.runs.retention import collect
    from emotion_train.runs.saver import Saver

    return Saver(
        claimed.writer, claimed.local, _say, lambda: collect(claimed.writer, job.config.checkpoint.keep_every)
    )


def _restore(job: Job, trainer: Trainer, claimed: Claimed | None) -> None:
    """Put the newest state into the trainer of every rank, as rank 0 read and verified it."""
    from emotion_train.runs import checkpoint

    newest = claimed.newest if claimed is not None else None
    found = job.ranks.from_main((newest.entry, tuple(newest.files)) if newest is not None else None)
    if found is None:
        return
    entry, names = found
    saved = checkpoint.Saved(
        entry,
        {
            name: job.ranks.bytes_from_main(newest.files[name] if newest is not None else b"")
            for name in names
        },
    )
    checkpoint.check_same_base(saved.document, trainer.question.base, job.run_id)
    trainer.restore(saved.state())
    if job.ranks.is_main:
        _say(f"resumed at step {entry.step} of {trainer.steps}")


def _scoring_loader(job: Job, name: str, stack: ExitStack) -> Loader:
    import numpy as np

    posts = POSTS_PER_SCORING_STEP * job.ranks.world_size
    return _open_loader(job, name, np.ones(len(job.index.labels)), posts, 0, stack, scoring=True)


def _open_loader(
    job: Job,
    name: str,
    weights_C: npt.NDArray[np.float64],
    batch_size: int,
    seed: int,
    stack: ExitStack,
    scoring: bool = False,
) -> Loader:
    from emotion_train.data.loader import Loader, encoder_threads
    from emotion_train.data.order import Order
    from emotion_train.data.reader import RowGroupReader
    from emotion_train.evaluation.scoring import fill_multiple

    split = job.index.split(name)
    return stack.enter_context(
        Loader(
            RowGroupReader(job.data_store, split, patience_s=_data_patience_s(job.config)),
            Order(split.row_counts, split.lanes, seed),
            job.tokenizer,
            weights_C,
            global_batch_size=batch_size,
            tokens_per_microbatch=job.config.train.microbatch_tokens,
            fill_multiple=fill_multiple(job.accelerator.device),
            rank=job.ranks.rank,
            world_size=job.ranks.world_size,
            in_slices=scoring,
            agree=job.ranks.agree_in_scoring if scoring else job.ranks.agree,
            threads=encoder_threads(),
        )
    )


def _data_patience_s(config: Config) -> float:
    """How long the bucket of the data may not answer, while other ranks wait for this one."""
    return min(DATA_PATIENCE_S, config.distributed.timeout_s / 2)


def _fit(job: Job, trainer: Trainer) -> None:
    from emotion_train.progress import ProgressLine

    with ProgressLine("training", trainer.steps, "steps", shown=job.ranks.is_main) as line:
        trainer.tell = lambda progress, words: line.update(progress.step, words)
        trainer.tell_milestone = line.say
        trainer.fit()


def _report_and_publish(job: Job, trainer: Trainer, claimed: Claimed | None, stack: ExitStack) -> int:
    """Take the best checkpoint, score it on every held-out split, and publish adapter and report
    together.
    """
    from emotion_train.console import Terminal
    from emotion_train.report.terminal import print_report
    from emotion_train.runs.publish import final_files, peak_memory, publish

    _until_the_store_takes_it(job, lambda: _drain(trainer), lambda: _kept_by(trainer))
    best, adapter = _load_best(job, trainer, claimed)
    splits = _score_in_peace(job, trainer, stack)
    peak_bytes, memory_kind = peak_memory(job.accelerator.device)
    memory = max(job.ranks.gather(peak_bytes), default=0), memory_kind
    reports: list[Report] = []  # stays empty on ranks other than 0
    files: dict[str, bytes] = {}
    if claimed is not None:
        reports.append(_build_report(job, trainer, splits, best, claimed.remarks, memory))
        with tempfile.TemporaryDirectory(prefix="emotion-train-") as folder:
            _save_adapter(job, trainer, reports[0], Path(folder), adapter)
            files = final_files(Path(folder), reports[0], splits)

    def publish_all() -> Entry:
        assert claimed is not None
        return publish(claimed.writer, job.config.train.epochs, trainer.progress.step, files, reports[0])

    def keep() -> str:
        assert claimed is not None
        return claimed.local.keep_final(files)

    entry = _until_the_store_takes_it(job, publish_all, keep)  # nobody leaves before that
    if claimed is not None:
        claimed.local.clear()
        print_report(reports[0], Terminal(highlight=False))
    _say_published(job.output_store, job.run_id, entry, job.ranks.is_main)
    job.accelerator.end_training()
    return 0


def _drain(trainer: Trainer) -> None:
    """Raises `StorageError` when some state is not committed yet, and why."""
    assert trainer.saver is not None
    if not trainer.saver.drain(_TRY_S):
        raise trainer.saver.problem or StorageError("The last checkpoints are still being uploaded.")


def _kept_by(trainer: Trainer) -> str:
    assert trainer.saver is not None
    return trainer.saver.keep_what_waits()


def _load_best(job: Job, trainer: Trainer, claimed: Claimed | None) -> tuple[Entry, dict[str, torch.Tensor]]:
    """Put the best adapter that verifies into the model of every rank; returns it with its
    entry.
    """
    from safetensors.torch import load

    from emotion_train.runs import checkpoint

    found: list[tuple[Entry, bytes]] = []  # stays empty on ranks other than 0

    def find() -> Entry:
        assert claimed is not None
        best = checkpoint.best_adapter(job.output_store, job.run_id, claimed.writer.log, claimed.fell_back)
        assert best is not None, "every epoch ends with a checkpoint that has a score"
        found.append(best)
        return best[0]

    entry = _until_the_store_takes_it(job, find, lambda: "Its checkpoints are all in that store.")
    state = load(job.ranks.bytes_from_main(found[0][1] if found else b""))
    trainer.engine.load_adapter(state)
    return entry, state


def _score_in_peace(job: Job, trainer: Trainer, stack: ExitStack) -> dict[str, SplitResult]:
    """The splits' results; begun again when they were given up for a termination that was
    withdrawn.
    """
    from emotion_train.training.trainer import CutOff

    while True:
        try:
            return _score_splits(job, trainer, stack)
        except CutOff:
            job.interruptions.hold(f"All {trainer.steps} steps are saved, the report is not yet made.")


def _until_the_store_takes_it(job: Job, action: Callable[[], T], keep: Callable[[], str]) -> T:
    """What `action` returns on rank 0, on every rank; tried again while the store fails, for
    `run.publish_timeout_s` seconds.

    Raises `NotPublished` after that, with what `keep` says of where the run's result is, and
    `Preempted` when the machine goes before.
    """
    from emotion_train.processes.interruption import GOING

    deadline, told, pause = (
        time.monotonic() + job.config.run.publish_timeout_s,
        -_TELL_EVERY_S,
        _FIRST_PAUSE_S,
    )

    def attempt() -> tuple[T | None, str | None]:
        try:
            return action(), None
        except StorageError as error:
            if time.monotonic() >= deadline:
                raise _not_published(job, error, keep()) from error
            return None, str(error)

    while True:
        value, problem = job.ranks.on_main(attempt)
        if problem is None:
            return value  # type: ignore[return-value]
        if time.monotonic() - told >= _TELL_EVERY_S and job.ranks.is_main:
            told = time.monotonic()
            _say(f"NOT PUBLISHED yet, trying again for {deadline - told:.0f} s: {problem}")
        if job.interruptions.exchange_now() & GOING:
            job.interruptions.hold(f"All {job.config.train.epochs} epochs are trained and not yet published.")
        job.interruptions.wait(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _not_published(job: Job, error: StorageError, kept: str) -> NotPublished:
    return NotPublished(
        f"Run {job.run_id} is trained and could not be published to {job.output_store.url}: {error} {kept}"
        f" When the store answers again, type on this machine: {job.again}"
    )


def _score_splits(job: Job, trainer: Trainer, stack: ExitStack) -> dict[str, SplitResult]:
    """Counts and joined predictions of validation and, where there is one, test; empty predictions
    on ranks other than 0.
    """
    from emotion_train.evaluation.predictions import join_predictions
    from emotion_train.progress import ProgressLine
    from emotion_train.report.figures import SplitResult
    from emotion_train.runs.publish import tfidf_predictions

    names = [
        name for name in ("validation", "test") if name in job.index.splits and job.index.splits[name].rows
    ]
    floors = {}
    if job.ranks.is_main:
        print("fitting the TF-IDF floor", file=sys.stderr, flush=True)
        seed, patience_s = job.config.run.seed, _data_patience_s(job.config)
        floors = tfidf_predictions(
            job.data_store, job.index, names, job.config.report.floor_max_rows, seed, patience_s
        )
    results: dict[str, SplitResult] = {}
    for name in names:
        with ProgressLine(
            f"scoring {name}", job.index.split(name).rows, "posts", shown=job.ranks.is_main
        ) as line:
            scored = trainer.score(_scoring_loader(job, name, stack), line.update)
        parts = job.ranks.gather(scored.predictions)
        if job.ranks.is_main:
            results[name] = SplitResult(
                scored.counts_CC, join_predictions(parts, job.index.split(name).rows), floors.get(name)
            )
    return results


def _build_report(
    job: Job,
    trainer: Trainer,
    splits: Mapping[str, SplitResult],
    best: Entry,
    remarks: Sequence[str],
    memory: tuple[int, Literal["GPU", "RSS"]],
) -> Report:
    from emotion_train.report.figures import Measured, build_report, dataset_facts
    from emotion_train.report.schema import Evaluation, Identity
    from emotion_train.runs.publish import git_commit, versions

    progress, ended = trainer.progress, datetime.now(UTC)
    memory_bytes, memory_kind = memory
    bad_rows = (
        [f"{progress.bad_rows} rows turned out bad at run time and were trained with weight 0."]
        if progress.bad_rows
        else []
    )
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
            saves=progress.saves,
            stall_seconds=progress.stall_seconds,
            upload_seconds=trainer.upload_seconds(),
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
        remarks=[*bad_rows, *remarks],
    )


def _save_adapter(
    job: Job, trainer: Trainer, report: Report, folder: Path, adapter: Mapping[str, torch.Tensor]
) -> None:
    from emotion_train.model.facts import AdapterFacts
    from emotion_train.model.lora import save_adapter

    facts = AdapterFacts.of(
        trainer.question.base,
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
        (
            f"| {report.headline} | {headline.macro_f1:.3f} | {headline.macro_f1_low:.3f} to"
            f" {headline.macro_f1_high:.3f} | {headline.weighted_f1:.3f} | {headline.accuracy:.3f} |"
        ),
    ]
    save_adapter(
        trainer.bare_model, folder, tokenizer=job.tokenizer, facts=facts, state=adapter, metrics_lines=lines
    )


def device_name(kind: str) -> str:
    """Name of the first GPU, or of the processor."""
    if kind == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    import platform

    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def _say(words: str) -> None:
    print(f"emotion-train: {words}", file=sys.stderr, flush=True)


def _say_nothing(words: str) -> None:
    """For ranks other than 0."""


def _say_published(store: Store, run_id: str, entry: Entry, shown: bool) -> int:
    if shown:
        print(f"published at step {entry.step}: {store.url}/{run_id}")
        print(f"next: emotion-launch pull {store.url}/{run_id} --to adapter")
    return 0


if __name__ == "__main__":
    from emotion_train.cli import main
    from emotion_train.processes.launcher_link import run_as_trainer

    sys.exit(run_as_trainer(lambda: main(["train", *sys.argv[1:]])))
