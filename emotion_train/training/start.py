"""From processes to a trainer at its cursor: device and kernels, model, loaders, saver, state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.config import POSTS_PER_SCORING_STEP, Config
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.processes.machine import device_name
from emotion_train.storage.open import open_store
from emotion_train.storage.patience import not_started
from emotion_train.training.job import Claimed, Job, data_patience_s, folder_here, say

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from accelerate import Accelerator

    from emotion_train.data.index import Split
    from emotion_train.data.loader import Encoder, Loader
    from emotion_train.model.head import EmotionClassifier
    from emotion_train.model.load import BaseConfig, BaseInfo
    from emotion_train.processes.ranks import Ranks
    from emotion_train.runs.parent import ParentAdapter
    from emotion_train.runs.saver import Saver
    from emotion_train.training.engines import Kind
    from emotion_train.training.trainer import Trainer


def require_fp8(config: Config, base: BaseConfig, engine: Kind, device: torch.device) -> None:
    """Raises `WrongRequest` when the config asks for fp8 and engine, GPU or base cannot compute
    it.
    """
    from emotion_train.model.head import require_float8
    from emotion_train.sizing.memory import is_fused
    from emotion_train.sizing.shape import Shape

    if config.model.precision != "fp8":
        return
    if engine == "DeepSpeed ZeRO-3":
        raise WrongRequest(
            f"model.precision is fp8 and {engine} computes by transformers' modules, which know no fp8: give"
            " --config_file accelerate_configs/multi_gpu_fsdp2_qlora.yaml, or model.precision=bf16."
        )
    require_float8(device, is_fused(Shape.of(base.text.to_dict()), "fp8"))


def require_engine(base: BaseConfig, engine: Kind) -> None:
    """Raises `WrongRequest` for an encoder under an engine that shards its optimizer or weights."""
    from emotion_train.model.encoder import is_encoder

    if is_encoder(base.text) and engine not in ("one process", "DDP"):
        raise WrongRequest(
            f"The base {base.files.name} is an encoder, which each GPU holds whole, and {engine} shards it;"
            " give --config_file accelerate_configs/multi_gpu_ddp.yaml."
        )


def require_host(config: Config, base: BaseConfig, labels: int, device: torch.device) -> None:
    """Raises `WrongRequest` on a CPU whose machine has too little memory for the base."""
    from emotion_train.processes.machine import memory_of_host
    from emotion_train.sizing.host import require_host_memory
    from emotion_train.sizing.recipe import Recipe
    from emotion_train.sizing.shape import Shape

    if device.type == "cpu" and (host_bytes := memory_of_host()) is not None:
        recipe = Recipe.of(config, Shape.of(base.text.to_dict()), labels)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        require_host_memory(config.model.base, recipe, config.data.max_length, processes, host_bytes)


def config_on_gpu(config: Config, device: torch.device, say: Callable[[str], None] = say) -> Config:
    """The config as it can be computed on this device: a GPU without bfloat16 units takes
    transformers' modules. Raises `WrongRequest` for one that this build of PyTorch has no kernels
    for.
    """
    import torch

    from emotion_train.model.attention import has_bfloat16

    if device.type != "cuda":
        return config
    own, name = torch.cuda.get_device_capability(device), device_name(device.type)
    # sm_75, or sm_90a for what only that very chip runs
    first = min(
        (divmod(int(digits), 10) for word in torch.cuda.get_arch_list() if (digits := word[3:]).isdigit()),
        default=own,
    )
    if own < first:
        raise WrongRequest(
            f"{name} has compute capability {own[0]}.{own[1]} and PyTorch {torch.__version__} has kernels"
            f" from {first[0]}.{first[1]} on; take a newer GPU (`emotion-launch plan` compares them), or type"
            " --accelerate-config cpu."
        )
    if has_bfloat16(device) or config.model.precision == "fp32":
        return config
    say(f"{name} has no bfloat16 units: PyTorch computes it in float32, by transformers' modules, slowly")
    return config.model_copy(update={"model": config.model.model_copy(update={"decoder": "stock"})})


def keep_kernels(config: Config, ranks: Ranks, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """Returns a function that waits for Triton's kernels: until `stack` is closed they come in the
    background from `run.kernels_url`, where what this run builds is kept.
    """
    if config.run.kernels_url is None or device.type != "cuda":
        return lambda: None
    import torch

    from emotion_train.model.built_kernels import BuiltKernels

    store, folder = open_store(config.run.kernels_url), folder_here(config) / "kernels"
    gpu = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    patience_s = config.run.start_timeout_s
    kernels = BuiltKernels(store, folder, gpu, say, keeps=ranks.is_main, patience_s=patience_s)
    return stack.enter_context(kernels).ready


def start_processes(config: Config, environment: Mapping[str, str]) -> tuple[Accelerator, Kind, Ranks]:
    """`environment` is what `accelerate launch` sets."""
    from emotion_train.processes.ranks import Ranks
    from emotion_train.training.engines import start_accelerator

    accelerator, engine = start_accelerator(config.distributed.timeout_s, environment)
    ranks = Ranks(config.distributed.timeout_s)
    if ranks.world_size > 1 and ranks.is_main:
        say(f"{ranks.world_size} processes, {engine} on {device_name(accelerator.device.type)}")
    return accelerator, engine, ranks


def load_model(job: Job) -> tuple[EmotionClassifier, BaseInfo]:
    """The model, on all ranks; begun again when it was given up for a termination that was
    withdrawn.
    """
    import numpy as np

    from emotion_train.training.trainer import CutOff

    while True:
        loaded = None
        with _said_of_the_start(job), job.ranks.in_contact(), suppress(CutOff):
            loaded = build_model(job)
        if not job.ranks.sum(np.array([loaded is None])).any():
            assert loaded is not None
            _refuse_different_bases(job, loaded[1])
            return loaded
        job.interruptions.hold("The model was being loaded; what the log has is safe.")


@contextmanager
def _said_of_the_start(job: Job) -> Iterator[None]:
    """Raises `NotStarted` for a store that did not answer while the weights were read."""
    try:
        yield
    except StorageError as error:
        if not error.transient:
            raise
        raise not_started(
            "the weights of the base", job.config.model.base, job.config.run.start_timeout_s, error
        ) from error


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


def build_model(job: Job) -> tuple[EmotionClassifier, BaseInfo]:
    """The frozen base with a new adapter and head, or those that it trains on from, on this
    process's device unless the engine shards it.

    Raises `CutOff` after a preemption notice.
    """
    from emotion_train.model.encoder import is_encoder
    from emotion_train.model.lora import build_classifier
    from emotion_train.progress import ProgressLine
    from emotion_train.sizing.recipe import adapter_of
    from emotion_train.training.engines import shards_weights
    from emotion_train.training.trainer import CutOff

    def tell(placed: int, total: int) -> None:
        line.update(placed, total=total)
        if job.interruptions.going():
            raise CutOff

    config = job.config
    cut = shards_weights(job.engine)
    with ProgressLine("loading", 1, "tensors", shown=job.accelerator.is_main_process) as line:
        model, base = build_classifier(
            job.base,
            config.model.precision,
            len(job.index.trained_labels),
            adapter_of(config, is_encoder(job.base.text)),
            config.run.seed,
            job.accelerator.device,
            auxiliary=len(job.index.trained_labels) - len(job.index.labels),
            to_be_sharded=cut,
            tell=tell,
            patience_s=config.run.start_timeout_s,
        )
    if job.parent is not None:
        _start_from(job.parent, job, model, base)
    if config.model.decoder == "fused":
        if not cut:
            model.fuse()
            _keep_unpacked(job, model)
        elif job.engine == "FSDP2":
            model.fuse_cut(job.accelerator.device)
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model, base


def _keep_unpacked(job: Job, model: EmotionClassifier) -> None:
    """Let the fused decoder hold 4-bit weights in bfloat16, too, where the GPU has room."""
    from emotion_train.processes.machine import memory_of
    from emotion_train.training.microbatch import blocks_to_unpack

    device = job.accelerator.device
    if model.decoder is None or device.type != "cuda":
        return
    kept = model.decoder.keep_unpacked(blocks_to_unpack(job, memory_of(device)))
    if kept and job.ranks.is_main:
        of_all = f"{kept} of {job.base.text.num_hidden_layers} blocks"
        say(f"the weights of {of_all} are kept unpacked, in memory that nothing else needs")


def _start_from(parent: ParentAdapter, job: Job, model: EmotionClassifier, base: BaseInfo) -> None:
    """Put the parent's adapter, and the rows of its head that the labels have, into the model."""
    from emotion_train.edges.bounded import Unreadable, tensors_in
    from emotion_train.model.lora import adapter_state, load_adapter_state
    from emotion_train.model.warm_start import warm_state
    from emotion_train.runs.parent import refuse_other_weights

    refuse_other_weights(parent, job.config.model.base, base.weights_sha256)
    try:
        state = tensors_in(parent.weights)
    except Unreadable as error:
        raise WrongRequest(
            f"The weights of model.adapter={parent.place} are damaged ({error}); pull it again."
        ) from None
    labels, places_C = len(parent.facts.labels), parent.places(job.index.trained_labels)
    load_adapter_state(model, warm_state(adapter_state(model), state, labels, places_C, parent.temperature))


def start_trainer(job: Job, claimed: Claimed | None, stack: ExitStack) -> Trainer:
    """The trainer at its cursor: at the start, or after the newest state; `claimed` is None on
    ranks other than 0.
    """
    from emotion_train.model.loss import class_weights
    from emotion_train.runs.checkpoint import Snapshot
    from emotion_train.training.trainer import Trainer

    model, base = load_model(job)
    counts = job.index.training.real_label_counts
    weights_C = class_weights(counts, job.config.loss.class_weights, job.index.trained_labels)
    train = _training_loader(job, weights_C, stack)
    validation = scoring_loader(job, "validation", stack)
    saver = None if claimed is None else stack.enter_context(open_saver(job, claimed))
    trainer = Trainer(job, model, base, train, validation, saver)
    _restore(job, trainer, claimed)
    if saver is not None and claimed is not None:
        for saved in claimed.not_in_log:
            saver.offer(Snapshot(saved.state(), saved.entry.epoch, trainer.question, saved.entry.metrics))
    job.ranks.only_on_main(lambda: _open_trackers(job, trainer, claimed, stack))
    if claimed is not None:
        claimed.forget_states()
    return trainer


def _open_trackers(job: Job, trainer: Trainer, claimed: Claimed | None, stack: ExitStack) -> None:
    """Open those of the config on rank 0, where the run resumed."""
    from emotion_train.training.trackers import Trackers

    assert claimed is not None
    events = claimed.newest.events if claimed.newest is not None else b""
    trainer.trackers = Trackers(say, events)
    first = next(entry.nonce for entry in claimed.writer.log if entry.kind == "claim")
    stack.callback(trainer.trackers.close)
    trainer.trackers.open(job.config, first, Path("tracking"))


def open_saver(job: Job, claimed: Claimed) -> Saver:
    from emotion_train.runs.retention import collect
    from emotion_train.runs.saver import Saver

    return Saver(
        claimed.writer, claimed.local, say, lambda: collect(claimed.writer, job.config.checkpoint.keep_every)
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
    trainer.question = replace(trainer.question, parent=checkpoint.parent_of(saved.document))
    trainer.restore(saved.state())
    if job.ranks.is_main:
        say(f"resumed at step {entry.step} of {trainer.steps}")


def scoring_loader(job: Job, name: str, stack: ExitStack, encoder: Encoder | None = None) -> Loader:
    """Each post of a split once, over all ranks; `encoder` may stand in for the job's tokenizer."""
    import numpy as np

    posts = POSTS_PER_SCORING_STEP * job.ranks.world_size
    weights_C = np.ones(len(job.index.labels))
    return _open_loader(job, job.index.split(name), weights_C, posts, 0, stack, scoring=True, encoder=encoder)


def _training_loader(job: Job, weights_C: npt.NDArray[np.float64], stack: ExitStack) -> Loader:
    """Every post that is trained on, auxiliary ones among them."""
    batch_size, seed = job.config.train.global_batch_size, job.config.run.seed
    return _open_loader(job, job.index.training, weights_C, batch_size, seed, stack)


def _open_loader(
    job: Job,
    split: Split,
    weights_C: npt.NDArray[np.float64],
    batch_size: int,
    seed: int,
    stack: ExitStack,
    scoring: bool = False,
    encoder: Encoder | None = None,
) -> Loader:
    from emotion_train.data.loader import Loader, encoder_threads
    from emotion_train.data.order import Order
    from emotion_train.data.reader import RowGroupReader
    from emotion_train.evaluation.scoring import fill_multiple

    return stack.enter_context(
        Loader(
            RowGroupReader(job.data_store, split, patience_s=data_patience_s(job.config)),
            Order(split.row_counts, split.lanes, seed),
            encoder or job.tokenizer,
            weights_C,
            global_batch_size=batch_size,
            tokens_per_microbatch=job.config.train.microbatch_tokens,
            fill_multiple=fill_multiple(job.accelerator.device),
            rank=job.ranks.rank,
            world_size=job.ranks.world_size,
            in_slices=scoring,
            agree=job.ranks.agree_in_scoring if scoring else job.ranks.agree,
            threads=encoder_threads(),
            targets=job.index.targets if scoring else job.index.trained_targets,
            known_SC=None if scoring else job.index.known_labels,
        )
    )
