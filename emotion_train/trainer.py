"""The training loop: packed micro-batches in, one optimizer update a step, evaluation and checkpoint now and then.

A step's update is that of its whole batch, however it was cut into micro-batches and ranks: the weighted losses are summed and divided
once by the step's sum of weights. The stock Trainer scales such gradients by accumulation x world size (transformers#47688).

Letters: N posts of a micro-batch, C labels.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from emotion_train import checkpoint
from emotion_train.checkpoint import Progress, State
from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.data.loader import Loader, StepBatch
from emotion_train.data.order import counter_hash
from emotion_train.data.packing import Pack
from emotion_train.distributed import Ranks
from emotion_train.errors import Diverged
from emotion_train.loss import weighted_loss_sum
from emotion_train.metrics import ClassCounts, confusion
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import BaseInfo
from emotion_train.model.lora import adapter_state, load_adapter_state
from emotion_train.report.predictions import Predictions
from emotion_train.runlog import Writer
from emotion_train.scoring import forward_pack, score

_LOG_EVERY_STEPS = 10
_DROPOUT_STREAM = 2


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Rate of the update after `step` completed ones: linear to `peak` over the warm-up, then half a cosine that ends just above 0.

    It is transformers' `get_cosine_schedule_with_warmup` moved by one step in the warm-up, so that no update has rate 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@dataclass(frozen=True)
class Scored:
    """A split as the model sees it: counts over all ranks, and this rank's predictions."""

    counts_CC: npt.NDArray[np.int64]
    predictions: Predictions


class Trainer:
    """Trains the adapter of `model`; `started` is when this process began.

    `writer` is None on all ranks but 0; `tell` and `tell_milestone` are for the terminal.
    """

    def __init__(
        self,
        config: Config,
        index: Index,
        accelerator: Accelerator,
        ranks: Ranks,
        model: EmotionClassifier,
        train: Loader,
        validation: Loader,
        writer: Writer | None,
        base: BaseInfo,
        started: datetime,
    ) -> None:
        self.config = config
        self.index = index
        self.accelerator = accelerator
        self.ranks = ranks
        self.train_loader = train
        self.validation_loader = validation
        self.writer = writer
        self.base = base
        self.started = started
        self.tell: Callable[[Progress, str], None] = lambda progress, words: None
        self.tell_milestone: Callable[[str], None] = lambda line: None
        self.progress = Progress()
        self._own = np.zeros(3)  # this rank's real tokens, computed tokens and bad rows since the last evaluation
        trainable = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.AdamW(
            trainable, lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=accelerator.device.type == "cuda"
        )
        self.bare_model = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.names = trainable
        self.steps_per_epoch = train.steps_per_epoch
        self.steps = self.steps_per_epoch * config.train.epochs
        self.warmup_steps = round(self.steps * config.train.warmup_ratio)
        self._losses: list[torch.Tensor] = []  # of steps not yet logged
        self._loss_windows: list[tuple[float, int]] = []  # (mean, steps) logged since the last evaluation

    def fit(self) -> None:
        """Train from the cursor to the end of the last epoch; every epoch ends with an evaluation and a checkpoint."""
        every = self.config.evaluation.every_steps
        self.model.train()
        while self.progress.step < self.steps:
            epoch, first = divmod(self.progress.step, self.steps_per_epoch)
            started = time.perf_counter()
            with contextlib.closing(self.train_loader.steps(epoch, first)) as batches:
                for batch in batches:
                    self._step(batch)
                    if self.progress.step % _LOG_EVERY_STEPS == 0:
                        self._log_loss()
                    last = self.progress.step % self.steps_per_epoch == 0
                    if last or (every is not None and self.progress.step % every == 0):
                        self._synchronize()
                        self.progress.train_seconds += time.perf_counter() - started
                        self._evaluate_and_commit()
                        started = time.perf_counter()

    def _step(self, batch: StepBatch) -> None:
        """One optimizer update from the whole step, all micro-batches and all ranks."""
        self._seed_dropout()
        # DDP averages the ranks' gradients, the step wants their sum
        scale = self.ranks.world_size / (batch.weight_sum or 1.0)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, pack in enumerate(batch.packs):
            reduce_now = number == len(batch.packs) - 1
            with contextlib.nullcontext() if reduce_now else self.accelerator.no_sync(self.model):
                loss_sum = self._loss_sum(pack)
                self.accelerator.backward(loss_sum * scale)
            loss += loss_sum.detach()
        if self.config.train.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(list(self.names), self.config.train.max_grad_norm)
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss / (batch.weight_sum or 1.0))
        self.progress.step += 1
        self.progress.examples += batch.examples
        self._own += (batch.real_tokens, sum(len(pack.tokens_T) for pack in batch.packs), batch.bad_rows)
        self.tell(self.progress, "")

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        return learning_rate(self.progress.step, self.steps, self.warmup_steps, self.config.train.learning_rate)

    def _loss_sum(self, pack: Pack) -> torch.Tensor:
        device = self.accelerator.device
        logits_NC = forward_pack(self.model, pack, device)
        return weighted_loss_sum(logits_NC, torch.from_numpy(pack.labels_N).to(device), torch.from_numpy(pack.weights_N).to(device))

    def _seed_dropout(self) -> None:
        """Dropout is a function of (seed, step, rank), so that a resumed run draws what the old one would have drawn."""
        seed = int(counter_hash(self.config.run.seed, _DROPOUT_STREAM, self.progress.step, self.ranks.rank)[0] >> np.uint64(1))
        torch.manual_seed(seed)

    def _log_loss(self) -> None:
        """Mean loss of the steps since the last call, over all ranks; the one place that waits for the GPU."""
        if self._losses:
            loss = float(self.ranks.sum(torch.stack(self._losses).mean().double().cpu().numpy()[None])[0])
            self._loss_windows.append((loss, len(self._losses)))
            self._losses.clear()
            if not math.isfinite(loss):
                raise Diverged(
                    f"The loss is {loss} at step {self.progress.step} with learning rate {self.learning_rate:.3g}; checkpoints until then "
                    "are kept. Start a new run with a lower train.learning_rate."
                )
            self.accelerator.log({"train/loss": loss, "train/learning_rate": self.learning_rate}, step=self.progress.step)
            self.tell(self.progress, f"loss {loss:.3f}")

    def _evaluate_and_commit(self) -> None:
        self._log_loss()
        self._add_up()
        means, counts = zip(*self._loss_windows, strict=True)
        train_loss = float(np.average(means, weights=counts))
        self._loss_windows.clear()
        figures = ClassCounts(self.score(self.validation_loader, lambda done: self.tell(self.progress, f"validating {done:,}")).counts_CC)
        self.progress.history.append(
            {
                "step": self.progress.step,
                "epoch": self.progress.step / self.steps_per_epoch,
                "train_loss": train_loss,
                "macro_f1": figures.macro_f1,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
            }
        )
        self.accelerator.log(
            {
                "validation/macro_f1": figures.macro_f1,
                "validation/weighted_f1": figures.weighted_f1,
                "validation/accuracy": figures.accuracy,
            },
            step=self.progress.step,
        )
        self._commit({"macro_f1": figures.macro_f1, "train_loss": train_loss})
        self.tell_milestone(
            f"step {self.progress.step} of {self.steps}: training loss {train_loss:.3f}, validation macro-F1 {figures.macro_f1:.3f}"
        )

    def _add_up(self) -> None:
        """Take the ranks' own counts into the run's."""
        tokens, computed, bad = self.ranks.sum(self._own).astype(int).tolist()
        self.progress.tokens += tokens
        self.progress.computed_tokens += computed
        self.progress.bad_rows += bad
        self._own[:] = 0

    def _commit(self, metrics: dict[str, float | int | str | None]) -> None:
        if self.writer is not None:
            epoch = self.progress.step // self.steps_per_epoch
            checkpoint.commit(self.writer, self.state(), epoch, self.config, self.index, self.base, metrics)

    def wall_seconds(self) -> float:
        """How long the machine was held for this run, by this process and by those before it."""
        return self.progress.earlier_wall_seconds + (datetime.now(UTC) - self.started).total_seconds()

    def state(self) -> State:
        """A copy of all that a resumed run needs."""
        progress = replace(self.progress, earlier_wall_seconds=self.wall_seconds())
        return State(progress, adapter_state(self.bare_model), checkpoint.optimizer_state(self.optimizer, self.names))

    def restore(self, state: State) -> None:
        self.progress = state.progress
        load_adapter_state(self.bare_model, state.adapter)
        checkpoint.load_optimizer_state(self.optimizer, self.names, state.optimizer, state.progress.step)

    def score(self, loader: Loader, tell: Callable[[int], None]) -> Scored:
        """Predict a whole split: counts over all ranks, this rank's own predictions."""
        started = time.perf_counter()
        classes = len(self.index.labels)
        predictions = score(self.model, loader, self.accelerator.device, classes, tell)
        counts_CC = self.ranks.sum(confusion(predictions.truth_N, predictions.predicted_N, classes)).astype(np.int64)
        self.progress.evaluation_seconds += time.perf_counter() - started
        return Scored(counts_CC, predictions)

    def _synchronize(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
