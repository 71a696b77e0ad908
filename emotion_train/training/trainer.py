"""The training loop: packed micro-batches in, one optimizer update a step, evaluation and
checkpoint now and then.

A step's update comes from its whole batch, whatever its micro-batches and ranks: the weighted
losses are summed and divided once by the step's sum of weights. The stock Trainer scales such
gradients by accumulation x world size (transformers#47688).

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

from emotion_train.data.loader import Loader, StepBatch
from emotion_train.data.packing import Pack
from emotion_train.errors import EmotionTrainError, Fenced, WrongRequest
from emotion_train.evaluation.held_out_loss import loss_and_weight
from emotion_train.evaluation.metrics import ClassCounts
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions, join_predictions
from emotion_train.evaluation.scoring import forward_pack, score
from emotion_train.evaluation.sets import SetCounts
from emotion_train.evaluation.thresholds import cross_fit
from emotion_train.model.attention import on_device
from emotion_train.model.dropout import key_of
from emotion_train.model.graphs import GraphedPasses, pays
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import BaseInfo
from emotion_train.model.loss import weighted_loss_sum
from emotion_train.processes.interruption import GOING
from emotion_train.processes.ranks import Signal
from emotion_train.report.units import memory
from emotion_train.runs import checkpoint
from emotion_train.runs.checkpoint import Progress, Question, Snapshot, State
from emotion_train.runs.saver import Committed, Saver
from emotion_train.sizing.memory import estimate
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.training.averaging import WeightAverage
from emotion_train.training.engines import make_engine
from emotion_train.training.job import Job
from emotion_train.training.ledger import Ledger
from emotion_train.training.pace import Pace
from emotion_train.training.trackers import Trackers

_LOG_EVERY_STEPS = 10
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
    """The reason why a state is saved, for readers of the log; empty when only the clock asked for
    it.
    """
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
    """A scored split: the `counts` of its predictions over all ranks, and this rank's
    predictions.
    """

    counts: npt.NDArray[np.int64]
    predictions: AnyPredictions


class CutOff(Exception):
    """Given up after a preemption notice: an evaluation, on all ranks, or the loading of the model,
    on the ranks that have the notice.
    """


class Trainer:
    """Trains the adapter of `model`; how the ranks share its `base` is `job.engine`.

    `saver` is None on all ranks but 0; `tell` and `tell_milestone` are for the terminal.
    """

    def __init__(
        self,
        job: Job,
        model: EmotionClassifier,
        base: BaseInfo,
        train: Loader,
        validation: Loader,
        saver: Saver | None,
    ) -> None:
        self.config = config = job.config
        self.index = job.index
        self.accelerator = job.accelerator
        self.ranks = ranks = job.ranks
        self.interruptions = job.interruptions
        self.started = job.started
        self.train_loader = train
        self._masked = job.index.auxiliary is not None
        self.validation_loader = validation
        self.saver = saver
        parent = None if job.parent is None else job.parent.described(job.index.labels)
        self.question = Question(config, job.index, base, parent)
        self.tell: Callable[[Progress, str], None] = lambda progress, words: None
        self.tell_milestone: Callable[[str], None] = lambda line: None
        self.trackers = Trackers(self.tell_milestone)  # none until they are opened, on rank 0
        self.bare_model = model
        self.engine = make_engine(job.engine, model, config.train, job.accelerator.device)
        self.model = self.engine.module
        self.average = WeightAverage(self.engine, config.train.ema)
        graphed = job.engine == "one process" and pays(model, ranks.world_size)
        self._graphs = self._graphed(list(self.engine.trained.own)) if graphed else None
        self.steps_per_epoch = train.steps_per_epoch
        self.steps = config.train.steps(job.index.training.rows)
        self.warmup_steps = round(self.steps * config.train.warmup_ratio)
        self.ledger = Ledger(ranks, job.accelerator.device, self._rate_after, self._tell_of_loss)
        self.pace = Pace()
        self._saved_step = 0  # of the newest state given to the saver
        self._asked_to_save = time.monotonic()

    def _graphed(self, parameters: list[torch.nn.Parameter]) -> GraphedPasses:
        train, shape = self.config.train, Shape.of(self.bare_model.classifier.config.to_dict())
        recipe = Recipe.of(self.config, shape, len(self.index.trained_labels))

        def passing_bytes(tokens: int) -> int:
            taken = estimate(recipe, tokens, train.gradient_checkpointing)
            return taken.activations + taken.overhead

        return GraphedPasses(
            self.bare_model,
            parameters,
            passing_bytes,
            train.microbatch_tokens,
            self.index.trained_targets,
            self._masked,
            lambda words: self.tell_milestone(words),
        )

    def fit(self) -> None:
        """Train from the cursor to the last step; every epoch, and the last step, ends with an
        evaluation and a checkpoint.

        Raises `Preempted` after a preemption notice, `Fenced` when another writer has taken the run
        over, and `Diverged`.
        """
        self.model.train()
        self._evaluate_if_due()  # the one in which this run was stopped
        while self.progress.step < self.steps:
            epoch, first = divmod(self.progress.step, self.steps_per_epoch)
            self.ledger.start_clock()
            with contextlib.closing(self.train_loader.steps(epoch, first)) as batches:
                for batch in batches:
                    self._step(batch)
                    if self.progress.step % _LOG_EVERY_STEPS == 0:
                        self.ledger.log()
                    self._answer(self._exchange() | self._due_by_steps())
                    self._evaluate_if_due()
                    if self.progress.step >= self.steps:  # perhaps within an epoch
                        break

    def _step(self, batch: StepBatch) -> None:
        """One optimizer update from the whole step, all micro-batches and all ranks."""
        scale = self.engine.gradient_scale / (batch.weight_sum or 1.0)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, pack in enumerate(batch.packs):
            loss += self._passes(pack, scale, last=number == len(batch.packs) - 1)
        self.engine.update(self.learning_rate)
        self.average.take(self.progress.step + 1)
        self.ledger.take(batch, loss / (batch.weight_sum or 1.0))
        self.pace.take(self.progress.examples)
        self.tell(self.progress, "")

    def _passes(self, pack: Pack, scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss sum."""
        if (
            self._graphs is not None
            and (loss_sum := self._graphs(pack, scale, self._dropout_key)) is not None
        ):
            return loss_sum
        with self.engine.microbatch(last):
            loss_sum = self._loss_sum(pack)
            self.engine.backward(loss_sum * scale)
        return loss_sum.detach()

    @property
    def progress(self) -> Progress:
        """Where the run is, and its figures so far."""
        return self.ledger.progress

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        return self._rate_after(self.progress.step)

    def _rate_after(self, step: int) -> float:
        return learning_rate(step, self.steps, self.warmup_steps, self.config.train.learning_rate)

    def _loss_sum(self, pack: Pack) -> torch.Tensor:
        device = self.accelerator.device
        logits_NC = forward_pack(self.model, pack, device, self._dropout_key)
        return weighted_loss_sum(
            logits_NC,
            on_device(pack.targets_NC, device),
            on_device(pack.weights_NC, device),
            self.index.trained_targets,
            self._masked,
        )

    @property
    def _dropout_key(self) -> int:
        """The key of the next update's dropout, the same on every rank and for every pack."""
        return key_of(self.config.run.seed, self.progress.step)

    def _tell_of_loss(self, step: int, mean: float, learning_rate: float) -> None:
        self.trackers.log({"train/loss": mean, "train/learning_rate": learning_rate}, step)
        self.pace.loss = mean

    # between two steps

    def _exchange(self) -> Signal:
        """The signals of all ranks together; `Fenced` and defects of the saver end all ranks at the
        same step.
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
        """Save when asked to; after a preemption notice save, wait until that is committed, and
        hold.
        """
        if signals & (GOING | Signal.REBALANCE | Signal.SAVE):
            self._save(_notice(signals))
        if signals & Signal.REBALANCE:
            self.tell_milestone(
                f"A preemption may come soon: step {self.progress.step} is being saved, training continues"
            )
        if signals & GOING:
            self.ledger.stop_clock()
            self.interruptions.hold(self.ranks.on_main(self._wait_until_saved))
            self.ledger.start_clock()

    def _wait_until_saved(self) -> str:
        """Where the newest state is, in words for a person; asked on rank 0."""
        assert self.saver is not None
        if not self.saver.drain(_KEEP_LOCALLY_AFTER_S):
            self.tell_milestone(self._not_yet_saved(self.saver.newest))
            kept = self.saver.keep_what_waits()
            if not self.saver.drain(_COMMIT_PATIENCE_S):
                return kept
        return f"Step {self.progress.step} of {self.steps} is saved."

    def _not_yet_saved(self, newest: Committed | None) -> str:
        """What a machine may lose that goes before its last upload is done."""
        words = f"Step {self.progress.step} is still being uploaded"
        if newest is None:
            return f"{words}. If this machine goes before, another resumes where this start did."
        return (
            f"{words}; the {memory(newest.bytes)} of step {newest.step} took {newest.seconds:.0f} s. If this"
            f" machine goes before, another resumes from step {newest.step}."
        )

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.config.evaluation.every_steps
        if step == 0 or (self.progress.history and self.progress.history[-1]["step"] == step):
            return False
        last = step == self.steps or step % self.steps_per_epoch == 0
        return last or (every is not None and step % every == 0)

    def _evaluate_if_due(self) -> None:
        while self._evaluation_due():
            try:
                self.ledger.add_up()
                self.ledger.stop_clock()
                self._evaluate()
                self.pace.pause()
            except CutOff:
                self._answer(Signal.STOP)
            self.ledger.start_clock()

    def _evaluate(self) -> None:
        """Score the validation split and save what was scored."""
        train_loss = self.progress.loss_sum / self.progress.loss_steps
        with self.average.applied():
            scored = self.score(self.validation_loader, self._tell_of_validation)
        weights_C = self.train_loader.weights_C[: len(self.index.labels)]
        loss, weight = self.ranks.sum(loss_and_weight(scored.predictions, weights_C))
        figures = self._figures(scored) | {"loss": float(loss / weight)}
        macro_f1 = figures["macro_f1"]
        self.progress.loss_sum, self.progress.loss_steps = 0.0, 0
        self.progress.history.append(
            {
                "step": self.progress.step,
                "epoch": self.progress.step / self.steps_per_epoch,
                "train_loss": train_loss,
                "macro_f1": macro_f1,
                "learning_rate": self._rate_after(self.progress.step - 1),
                "validation_loss": figures["loss"],
            }
        )
        self.trackers.log(
            {f"validation/{name}": value for name, value in figures.items()}, self.progress.step
        )
        self._save({"macro_f1": macro_f1, "train_loss": train_loss})
        self.tell_milestone(
            f"step {self.progress.step} of {self.steps}: training loss {train_loss:.3f}, validation macro-F1"
            f" {macro_f1:.3f}"
        )

    def _figures(self, scored: Scored) -> dict[str, float]:
        """The figures of a scored split, with macro-F1; called on all ranks.

        Where posts have several labels, macro-F1 is computed with thresholds that did not see the
        post, so rank 0 needs the probabilities of all posts.
        """
        if not isinstance(scored.predictions, SetPredictions):
            counts = ClassCounts(scored.counts)
            return {
                "macro_f1": counts.macro_f1,
                "weighted_f1": counts.weighted_f1,
                "accuracy": counts.accuracy,
            }
        parts = self.ranks.gather(scored.predictions)

        def cross_fitted() -> SetCounts:
            whole = join_predictions(parts, len({post for part in parts for post in part.ids}))
            return SetCounts(cross_fit(whole).counts())

        counts_of_sets = self.ranks.on_main(cross_fitted)
        return {
            "macro_f1": counts_of_sets.macro_f1,
            "macro_f1_at_half": SetCounts(scored.counts).macro_f1,
            "micro_f1": counts_of_sets.micro_f1,
        }

    def _tell_of_validation(self, done: int) -> None:
        self.tell(self.progress, f"validating {done:,}")

    def _save(self, metrics: dict[str, float | int | str | None]) -> None:
        """Copy the state and give it to the saver. Without a score, a step that was saved already
        is skipped.
        """
        if "macro_f1" not in metrics and self.progress.step == self._saved_step:
            return
        self.ledger.add_up()
        self._saved_step, self._asked_to_save = self.progress.step, time.monotonic()
        began = time.perf_counter()
        if self.saver is not None:
            self.saver.make_room()
        state = self.state()
        if self.saver is not None:
            self.progress.saves += 1
            self.progress.stall_seconds += time.perf_counter() - began
            facts = self.pace.facts() | metrics
            self.saver.offer(
                Snapshot(state, self.progress.step // self.steps_per_epoch, self.question, facts)
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
        """A copy of everything that a resumed run needs, with the tensors on rank 0 only; called on
        all ranks, since each may hold a part.
        """
        progress = replace(
            self.progress,
            history=list(self.progress.history),
            curve=list(self.progress.curve),
            earlier_wall_seconds=self.wall_seconds(),
            upload_seconds=self.upload_seconds(),
        )
        with self.average.lifted():
            average = self.average.whole()
            adapter, moments = self.engine.adapter(), self.engine.moments()
            if not self.ranks.is_main:
                return State(progress, {}, {})
            named = {"adapter": adapter, "average": average}
            copies = checkpoint.host_copy(
                {
                    **{f"{kind} {name}": one for kind, some in named.items() for name, one in some.items()},
                    **moments,
                }
            )
        return State(
            progress,
            {name: copies[f"adapter {name}"] for name in adapter},
            {name: copies[name] for name in moments},
            self.trackers.events(),
            {name: copies[f"average {name}"] for name in average},
        )

    def restore(self, state: State) -> None:
        """Replace the present state by this one. Raises `WrongRequest` for a step that this run
        does not have.
        """
        if state.progress.step > self.steps:
            raise WrongRequest(
                f"The checkpoint is of step {state.progress.step} and this run has {self.steps}: the log or"
                " its parts were edited. Start a new run with another run.id."
            )
        self.ledger.progress = state.progress
        self._saved_step = state.progress.step
        self.average.load(state.average)
        self.engine.load_adapter(state.adapter)
        self.engine.load_moments(state.optimizer, state.progress.step)

    def score(
        self, loader: Loader, tell: Callable[[int], None], places_C: npt.ArrayLike | None = None
    ) -> Scored:
        """Predict a whole split: counts over all ranks, this rank's own predictions. `places_C` are
        the places of the split's labels among the model's, where the two differ.

        Raises `CutOff` after a preemption notice.
        """

        def tell_and_listen(done: int) -> None:
            tell(done)
            signals = self._exchange()
            if signals & GOING:
                raise CutOff
            self._answer(signals)

        started = time.perf_counter()
        classes = len(self.index.labels)
        predictions = score(self.model, loader, self.accelerator.device, classes, tell_and_listen, places_C)
        counts = self.ranks.sum(predictions.counts()).astype(np.int64)
        self.progress.evaluation_seconds += time.perf_counter() - started
        return Scored(counts, predictions)
