"""The training loop: packed micro-batches in, one optimizer update a step, evaluation and
checkpoint now and then.

A step's update is that of its whole batch, however it was cut into micro-batches and ranks: the
weighted losses are summed and divided once by the step's sum of weights. The stock Trainer scales
such gradients by accumulation x world size (transformers#47688).

Letters: N posts of a micro-batch, C labels.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.data.loader import Loader, StepBatch
from emotion_train.data.order import counter_hash
from emotion_train.data.packing import Pack
from emotion_train.errors import Diverged, EmotionTrainError, Fenced
from emotion_train.evaluation.metrics import ClassCounts, confusion
from emotion_train.evaluation.predictions import Predictions
from emotion_train.evaluation.scoring import forward_pack, score
from emotion_train.model.attention import on_device
from emotion_train.model.graphs import GraphedPasses, pays
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import BaseInfo
from emotion_train.model.loss import weighted_loss_sum
from emotion_train.processes.interruption import GOING, Interruptions
from emotion_train.processes.ranks import Ranks, Signal
from emotion_train.runs import checkpoint
from emotion_train.runs.checkpoint import Progress, Question, Snapshot, State
from emotion_train.runs.saver import Saver
from emotion_train.sizing.memory import Shape, estimate
from emotion_train.training.engines import Kind, make_engine

_LOG_EVERY_STEPS = 10
_DROPOUT_STREAM = 2
_KEEP_LOCALLY_AFTER_S = 10.0  # the shortest notices are of 30 s
_COMMIT_PATIENCE_S = 120.0


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Rate of the update after `step` completed ones: linear to `peak` over the warm-up, then half
    a cosine that ends just above 0.

    It is transformers' `get_cosine_schedule_with_warmup` moved by one step in the warm-up, so that
    no update has rate 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _notice(signals: Signal) -> dict[str, float | int | str | None]:
    """Why a state is saved, for whoever reads the log; nothing when only a clock asked for it."""
    for signal, words in (
        (Signal.LEAVE, "interrupted"),
        (Signal.STOP, "preempted"),
        (Signal.REBALANCE, "preemption may come"),
    ):
        if signals & signal:
            return {"notice": words}
    return {}


@dataclass(frozen=True)
class Scored:
    """A split as the model sees it: counts over all ranks, and this rank's predictions."""

    counts_CC: npt.NDArray[np.int64]
    predictions: Predictions


@dataclass(frozen=True)
class _Stretch:
    """This rank's figures of some steps, whose losses are on their way from the GPU: `losses` holds
    them once `there` has come.
    """

    step: int  # the last one
    learning_rate: float  # of the next one
    counts: npt.NDArray[np.float64]  # real tokens, computed tokens and bad rows
    losses: torch.Tensor
    there: torch.cuda.Event | None
    for_log: bool


class CutOff(Exception):
    """An evaluation that was given up on all ranks, because the machine goes."""


class Trainer:
    """Trains the adapter of `model`; `started` is when this process began.

    `engine` is how the ranks share the model. `saver` is None on all ranks but 0; `tell` and
    `tell_milestone` are for the terminal.
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
        saver: Saver | None,
        base: BaseInfo,
        started: datetime,
        interruptions: Interruptions | None = None,
        engine: Kind = "one process",
    ) -> None:
        self.config = config
        self.index = index
        self.accelerator = accelerator
        self.ranks = ranks
        self.train_loader = train
        self.validation_loader = validation
        self.saver = saver
        self.question = Question(config, index, base)
        self.started = started
        self.interruptions = interruptions or Interruptions(ranks, lambda: None, 0.0, lambda words: None)
        self.tell: Callable[[Progress, str], None] = lambda progress, words: None
        self.tell_milestone: Callable[[str], None] = lambda line: None
        self.progress = Progress()
        self.bare_model = model
        self.engine = make_engine(engine, model, config.train, accelerator.device)
        self.model = self.engine.module
        graphed = engine == "one process" and pays(model, ranks.world_size)
        self._graphs = self._graphed(list(self.engine.trained.own)) if graphed else None
        self.steps_per_epoch = train.steps_per_epoch
        self.steps = self.steps_per_epoch * config.train.epochs
        self.warmup_steps = round(self.steps * config.train.warmup_ratio)
        # this rank's real tokens, computed tokens and bad rows that the run's figures do not have
        # yet
        self._own = np.zeros(3)
        self._losses: list[torch.Tensor] = []  # this rank's, of the same steps
        self._on_their_way: deque[_Stretch] = deque()
        # when the training that `train_seconds` does not have yet began; None while it pauses
        self._clock: float | None = None
        self._saved_step = 0  # of the newest state given to the saver
        self._asked_to_save = time.monotonic()

    def _graphed(self, parameters: list[torch.nn.Parameter]) -> GraphedPasses:
        model, lora, train = self.config.model, self.config.lora, self.config.train
        shape, labels = Shape.of(self.bare_model.classifier.config.to_dict()), len(self.index.labels)

        def passing_bytes(tokens: int) -> int:
            taken = estimate(
                shape,
                model.precision,
                lora.r,
                lora.targets,
                tokens,
                train.gradient_checkpointing,
                labels,
                lora_dropout=lora.dropout,
            )
            return taken.activations + taken.overhead

        return GraphedPasses(self.bare_model, parameters, passing_bytes, train.microbatch_tokens)

    def fit(self) -> None:
        """Train from the cursor to the end of the last epoch; every epoch ends with an evaluation
        and a checkpoint.

        Raises `Preempted` when the machine goes, `Fenced` when another writer has taken the run
        over, and `Diverged`.
        """
        self.model.train()
        self._evaluate_if_due()  # the one in which this run was stopped
        while self.progress.step < self.steps:
            epoch, first = divmod(self.progress.step, self.steps_per_epoch)
            self._clock = time.perf_counter()
            with contextlib.closing(self.train_loader.steps(epoch, first)) as batches:
                for batch in batches:
                    self._step(batch)
                    if self.progress.step % _LOG_EVERY_STEPS == 0:
                        self._log_loss()
                    self._answer(self._exchange() | self._due_by_steps())
                    self._evaluate_if_due()

    def _step(self, batch: StepBatch) -> None:
        """One optimizer update from the whole step, all micro-batches and all ranks."""
        self._seed_dropout()
        scale = self.engine.gradient_scale / (batch.weight_sum or 1.0)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, pack in enumerate(batch.packs):
            loss += self._passes(pack, scale, last=number == len(batch.packs) - 1)
        self.engine.update(self.learning_rate)
        self._losses.append(loss / (batch.weight_sum or 1.0))
        self.progress.step += 1
        self.progress.examples += batch.examples
        self._own += (batch.real_tokens, sum(len(pack.tokens_T) for pack in batch.packs), batch.bad_rows)
        self.tell(self.progress, "")

    def _passes(self, pack: Pack, scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss sum."""
        if self._graphs is not None and (loss_sum := self._graphs(pack, scale)) is not None:
            return loss_sum
        with self.engine.microbatch(last):
            loss_sum = self._loss_sum(pack)
            self.engine.backward(loss_sum * scale)
        return loss_sum.detach()

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        return self._rate_after(self.progress.step)

    def _rate_after(self, step: int) -> float:
        return learning_rate(step, self.steps, self.warmup_steps, self.config.train.learning_rate)

    def _loss_sum(self, pack: Pack) -> torch.Tensor:
        device = self.accelerator.device
        logits_NC = forward_pack(self.model, pack, device)
        return weighted_loss_sum(
            logits_NC, on_device(pack.labels_N, device), on_device(pack.weights_N, device)
        )

    def _seed_dropout(self) -> None:
        """Dropout is a function of (seed, step, rank), so that a resumed run draws what the old one
        would have drawn.
        """
        seed = int(
            counter_hash(self.config.run.seed, _DROPOUT_STREAM, self.progress.step, self.ranks.rank)[0]
            >> np.uint64(1)
        )
        torch.manual_seed(seed)

    def _log_loss(self) -> None:
        """Mean loss of the steps before the last call to the trackers and the terminal, so that the
        GPU is not waited for.
        """
        self._hand_over(for_log=True)
        self._add_up(all_but=1)

    def _hand_over(self, for_log: bool) -> None:
        """Send the figures of the steps since the last call on their way."""
        if not self._losses:
            return
        losses, there = torch.stack(self._losses).double(), None
        if losses.is_cuda:
            losses = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True).copy_(
                losses, non_blocking=True
            )
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        self._on_their_way.append(
            _Stretch(self.progress.step, self.learning_rate, self._own.copy(), losses, there, for_log)
        )
        self._own[:] = 0
        self._losses.clear()

    def _add_up(self, all_but: int = 0) -> list[float]:
        """Take what the ranks have each seen, but for the newest stretches, into the run's figures;
        the one place that waits for the GPU.

        Returns the losses of those steps. Raises `Diverged` when one is no number.
        """
        arrived: list[float] = []
        if not all_but:
            self._hand_over(for_log=False)
        while len(self._on_their_way) > all_but:
            arrived += self._arrive(self._on_their_way.popleft())
        if not all_but and self._clock is not None:
            self._synchronize()
            now = time.perf_counter()
            self.progress.train_seconds += now - self._clock
            self._clock = now
        return arrived

    def _arrive(self, stretch: _Stretch) -> list[float]:
        if stretch.there is not None:
            stretch.there.synchronize()
        (tokens, computed, bad), all_losses = np.split(
            self.ranks.sum(np.concatenate([stretch.counts, stretch.losses.numpy()])), [3]
        )
        self.progress.tokens += int(tokens)
        self.progress.computed_tokens += int(computed)
        self.progress.bad_rows += int(bad)
        losses: list[float] = all_losses.tolist()
        for loss in losses:
            if not math.isfinite(loss):
                raise Diverged(
                    f"The loss is {loss} at step {stretch.step} with learning rate"
                    f" {stretch.learning_rate:.3g}; checkpoints until then are kept. Start a new run with a"
                    " lower train.learning_rate."
                )
            self.progress.loss_sum += loss
            self.progress.loss_steps += 1
        if stretch.for_log:
            mean = sum(losses) / len(losses)
            self.accelerator.log(
                {"train/loss": mean, "train/learning_rate": stretch.learning_rate}, step=stretch.step
            )
            self.tell(self.progress, f"loss {mean:.3f}")
        return losses

    # between two steps

    def _exchange(self) -> Signal:
        """What any rank has to tell; `Fenced` and defects of the saver end all ranks at the same
        step.
        """
        own = Signal.NONE
        if self.saver is not None:
            if self.saver.failure is not None:
                own |= Signal.FENCED if isinstance(self.saver.failure, Fenced) else Signal.FAILED
            every = self.config.checkpoint.every_seconds
            if every is not None and time.monotonic() - self._asked_to_save >= every:
                self._asked_to_save = time.monotonic()
                own |= Signal.SAVE
        signals = self.interruptions.exchange(own)
        if signals & (Signal.FENCED | Signal.FAILED):
            if self.saver is not None:
                self.saver.check()
            raise (
                Fenced("Rank 0 was fenced.")
                if signals & Signal.FENCED
                else EmotionTrainError("Rank 0 could not save.")
            )
        return signals

    def _due_by_steps(self) -> Signal:
        """Whether this step ends with a checkpoint, the same on all ranks; an evaluation brings its
        own.
        """
        every = self.config.checkpoint.every_steps
        due = every is not None and self.progress.step % every == 0 and not self._evaluation_due()
        return Signal.SAVE if due else Signal.NONE

    def _answer(self, signals: Signal) -> None:
        """Save when asked to; when the machine goes, save, wait until that is committed, and
        hold.
        """
        if signals & (GOING | Signal.REBALANCE | Signal.SAVE):
            self._save(_notice(signals))
        if signals & Signal.REBALANCE:
            self.tell_milestone(
                f"The machine may be taken soon: step {self.progress.step} is being saved, training goes on"
            )
        if signals & GOING:
            self._clock = None
            self.interruptions.hold(self.ranks.on_main(self._wait_until_saved))
            self._clock = time.perf_counter()

    def _wait_until_saved(self) -> str:
        """Where the newest state is, in words for a person; asked on rank 0."""
        assert self.saver is not None
        if not self.saver.drain(_KEEP_LOCALLY_AFTER_S):
            kept = self.saver.keep_what_waits()
            if not self.saver.drain(_COMMIT_PATIENCE_S):
                return kept
        return f"Step {self.progress.step} of {self.steps} is saved."

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.config.evaluation.every_steps
        if step == 0 or (self.progress.history and self.progress.history[-1]["step"] == step):
            return False
        return step % self.steps_per_epoch == 0 or (every is not None and step % every == 0)

    def _evaluate_if_due(self) -> None:
        while self._evaluation_due():
            try:
                self._add_up()
                self._clock = None
                self._evaluate()
            except CutOff:
                self._answer(Signal.STOP)
            self._clock = time.perf_counter()

    def _evaluate(self) -> None:
        """Score the validation split and save what was scored."""
        train_loss = self.progress.loss_sum / self.progress.loss_steps
        figures = ClassCounts(self.score(self.validation_loader, self._tell_of_validation).counts_CC)
        self.progress.loss_sum, self.progress.loss_steps = 0.0, 0
        self.progress.history.append(
            {
                "step": self.progress.step,
                "epoch": self.progress.step / self.steps_per_epoch,
                "train_loss": train_loss,
                "macro_f1": figures.macro_f1,
                "learning_rate": self._rate_after(self.progress.step - 1),
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
        self._save({"macro_f1": figures.macro_f1, "train_loss": train_loss})
        self.tell_milestone(
            f"step {self.progress.step} of {self.steps}: training loss {train_loss:.3f}, validation macro-F1"
            f" {figures.macro_f1:.3f}"
        )

    def _tell_of_validation(self, done: int) -> None:
        self.tell(self.progress, f"validating {done:,}")

    def _save(self, metrics: dict[str, float | int | str | None]) -> None:
        """Copy the state and give it to the saver; without a score only if this step was not saved
        yet.
        """
        if "macro_f1" not in metrics and self.progress.step == self._saved_step:
            return
        self._add_up()
        self._saved_step, self._asked_to_save = self.progress.step, time.monotonic()
        began = time.perf_counter()
        state = self.state()
        if self.saver is not None:
            self.progress.saves += 1
            self.progress.stall_seconds += time.perf_counter() - began
            self.saver.offer(
                Snapshot(state, self.progress.step // self.steps_per_epoch, self.question, metrics)
            )

    def wall_seconds(self) -> float:
        """How long the machine was held for this run, by this process and by those before it."""
        return self.progress.earlier_wall_seconds + (datetime.now(UTC) - self.started).total_seconds()

    def upload_seconds(self) -> float:
        """How long uploads ran beside the training of this run, in this process and in those before
        it.
        """
        return self.progress.upload_seconds + (self.saver.upload_seconds if self.saver is not None else 0.0)

    def state(self) -> State:
        """A copy of all that a resumed run needs, of the tensors on rank 0 only; called on all
        ranks, which may each hold a part.
        """
        progress = replace(
            self.progress,
            history=list(self.progress.history),
            earlier_wall_seconds=self.wall_seconds(),
            upload_seconds=self.upload_seconds(),
        )
        adapter, moments = self.engine.adapter(), self.engine.moments()
        if not self.ranks.is_main:
            return State(progress, {}, {})
        copies = checkpoint.host_copy(
            {**{f"adapter {name}": one for name, one in adapter.items()}, **moments}
        )
        return State(
            progress,
            {name: copies[f"adapter {name}"] for name in adapter},
            {name: copies[name] for name in moments},
        )

    def restore(self, state: State) -> None:
        self.progress = state.progress
        self._saved_step = state.progress.step
        self.engine.load_adapter(state.adapter)
        self.engine.load_moments(state.optimizer, state.progress.step)

    def score(self, loader: Loader, tell: Callable[[int], None]) -> Scored:
        """Predict a whole split: counts over all ranks, this rank's own predictions. Raises
        `CutOff` when the machine goes.
        """

        def tell_and_listen(done: int) -> None:
            tell(done)
            signals = self._exchange()
            if signals & GOING:
                raise CutOff
            self._answer(signals)

        started = time.perf_counter()
        classes = len(self.index.labels)
        predictions = score(self.model, loader, self.accelerator.device, classes, tell_and_listen)
        counts_CC = self.ranks.sum(confusion(predictions.truth_N, predictions.predicted_N, classes)).astype(
            np.int64
        )
        self.progress.evaluation_seconds += time.perf_counter() - started
        return Scored(counts_CC, predictions)

    def _synchronize(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
