"""The end of a run: best adapter, scores of every held-out split, report, publication."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from emotion_train.bases.depth import depth_words
from emotion_train.bases.public_names import place_here, public_base, public_config, public_place
from emotion_train.console import tell
from emotion_train.errors import NotPublished, StorageError, WrongRequest
from emotion_train.processes.machine import device_name
from emotion_train.runs.log import Entry, mean_price
from emotion_train.storage.open import open_store
from emotion_train.storage.patience import Patience
from emotion_train.training.job import Claimed, Job, data_patience_s, published, say, say_published
from emotion_train.training.start import scoring_loader

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from emotion_train.config import Config
    from emotion_train.data.index import Index
    from emotion_train.data.lengths import Cut, Lengths
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.predictions import AnyPredictions
    from emotion_train.evaluation.temperature import BeforeAndAfter, Tempered
    from emotion_train.model.load import BaseInfo
    from emotion_train.report.figures import AnyResult
    from emotion_train.report.posts import Chosen, Texts
    from emotion_train.report.schema import OldPosts, Report
    from emotion_train.storage.store import Store
    from emotion_train.training.trainer import Trainer


T = TypeVar("T")
# the fields of a checkpoint's progress that a report takes unchanged
_MEASURED = ("computed_tokens", "train_seconds", "evaluation_seconds", "saves", "stall_seconds")
_COUNTED_POSTS = 20_000  # of the training split, for the lengths in the report
_LABELS_SHOWN = 30
_TRY_S = 10.0  # for one look at the saver, while all ranks wait


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The figures of the held-out splits, on rank 0: their results, the posts that
    `data.max_length` cuts of each split, the decision by validation posts, the probabilities of
    each split before and after its temperature, and the posts a second of all ranks together. Other
    ranks have only `adapter`, which is published with its head at the temperature.
    """

    splits: Mapping[str, AnyResult]
    cuts: Mapping[str, Cut]
    decision: Decision | None
    posts_per_second: float | None
    tempered: Mapping[str, BeforeAndAfter]
    adapter: Mapping[str, torch.Tensor]
    old_posts: OldPosts | None = None
    remarks: tuple[str, ...] = ()


def report_and_publish(job: Job, trainer: Trainer, claimed: Claimed | None, stack: ExitStack) -> Entry:
    """Take the best checkpoint, score it on every held-out split, and publish adapter and report
    together; returns the final entry.
    """
    from emotion_train.console import Terminal
    from emotion_train.processes.machine import peak_memory
    from emotion_train.report.figures import headline_of
    from emotion_train.report.posts import MISLABELLED, Chosen
    from emotion_train.report.terminal import print_report
    from emotion_train.runs.publish import final_files, publish

    _until_the_store_takes_it(job, lambda: _drain(trainer), lambda: _kept_by(trainer))
    best, adapter = _load_best(job, trainer, claimed)
    held_out = _score_in_peace(job, trainer, stack, adapter)
    peak_bytes, memory_kind = peak_memory(job.accelerator.device)
    memory = max(job.ranks.gather(peak_bytes), default=0), memory_kind
    report: Report | None = None  # on rank 0 only
    files: dict[str, bytes] = {}
    if claimed is not None:
        splits = held_out.splits
        chosen = Chosen.of(splits, headline_of(splits), job.config.report.examples)
        shown = _texts_of_chosen(job, chosen, splits)
        report = _build_report(job, trainer, held_out, best, claimed, memory, chosen, shown)
        with tempfile.TemporaryDirectory(prefix="emotion-train-") as folder:
            _save_adapter(job, trainer, report, held_out, Path(folder))
            files = final_files(Path(folder), report, splits, _texts(job, splits), trainer.trackers.events())
        if (doubted := chosen.to_csv(splits, job.index.labels, shown)) is not None:
            files[MISLABELLED] = doubted
    trained_on = job.ranks.only_on_main(lambda: _training_filter(job))

    def publish_all() -> Entry:
        assert claimed is not None
        assert report is not None
        assert trained_on is not None
        step = trainer.progress.step
        return publish(claimed.writer, step // trainer.steps_per_epoch, step, files, report, trained_on)

    def keep() -> str:
        assert claimed is not None
        return claimed.local.keep_final(files)

    # nobody leaves before that
    entry = cast(Entry, job.ranks.from_main(_until_the_store_takes_it(job, publish_all, keep)))
    published(entry)
    if claimed is not None and report is not None:
        claimed.local.clear()
        _clear_up(job, claimed)
        print_report(report, Terminal(highlight=False))
    say_published(job.output_store, job.run_id, entry, job.ranks.is_main)
    if files:
        trainer.trackers.finish(files)
    job.accelerator.end_training()
    return entry


def _clear_up(job: Job, claimed: Claimed) -> None:
    """Delete what killed starts left; each commit does so, and there may have been none since."""
    from emotion_train.runs.retention import collect

    try:
        collect(claimed.writer, job.config.checkpoint.keep_every)
    except StorageError as error:
        say(f"Old checkpoints were not cleared away: {error}")


def _drain(trainer: Trainer) -> None:
    """Raises `StorageError` with the reason when some state is not committed yet."""
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
    from emotion_train.edges.bounded import tensors_in
    from emotion_train.runs import checkpoint

    def find() -> tuple[Entry, memoryview]:
        assert claimed is not None
        best = checkpoint.best_adapter(job.output_store, job.run_id, claimed.writer.log, claimed.fell_back)
        assert best is not None, "every epoch ends with a checkpoint that has a score"
        return best

    best = _until_the_store_takes_it(job, find, lambda: "Its checkpoints are all in that store.")
    entry = cast(Entry, job.ranks.from_main(best[0] if best is not None else None))
    state = tensors_in(job.ranks.bytes_from_main(best[1] if best is not None else b""))
    trainer.engine.load_adapter(state)
    return entry, state


def _score_in_peace(
    job: Job, trainer: Trainer, stack: ExitStack, adapter: Mapping[str, torch.Tensor]
) -> HeldOut:
    """The scored held-out splits; scoring begins again when it was cut off for a preemption notice
    that was withdrawn.
    """
    from emotion_train.training.trainer import CutOff

    while True:
        try:
            return _score_splits(job, trainer, stack, adapter)
        except CutOff:
            job.interruptions.hold(f"All {trainer.steps} steps are saved, the report is not yet made.")
            trainer.engine.load_adapter(adapter)  # the head may be at its temperature already


def _texts(job: Job, splits: Mapping[str, AnyResult]) -> dict[str, dict[str, str]] | None:
    """The texts of the scored posts by split and id, where the config asks for them."""
    from emotion_train.evaluation.floors import posts

    if not job.config.report.texts:
        return None
    patience_s = data_patience_s(job.config)
    return {
        name: {key: text for key, text, _ in posts(job.data_store, job.index.split(name), patience_s)}
        for name in splits
    }


def _texts_of_chosen(job: Job, chosen: Chosen, splits: Mapping[str, AnyResult]) -> dict[str, dict[str, str]]:
    """The texts of the posts that the report shows, by split and id."""
    from emotion_train.data.reader import texts_of

    patience_s = data_patience_s(job.config)
    return {
        name: texts_of(job.data_store, job.index.split(name), ids, patience_s)
        for name, ids in chosen.wanted(splits).items()
    }


def _until_the_store_takes_it(job: Job, action: Callable[[], T], keep: Callable[[], str]) -> T | None:
    """The result of `action` on rank 0, None elsewhere; tried again while the store fails, for
    `run.publish_timeout_s` seconds.

    Raises `NotPublished` after that, with the sentence of `keep` on where the run's result is, and
    `Preempted` when a preemption notice comes before.
    """
    from emotion_train.processes.interruption import GOING

    patience = Patience(job.config.run.publish_timeout_s)

    def attempt() -> tuple[T | None, str | None]:
        try:
            return action(), None
        except StorageError as error:
            if patience.left_s <= 0:
                raise _not_published(job, error, keep()) from error
            return None, str(error)

    while True:
        answer = job.ranks.only_on_main(attempt)
        problem = job.ranks.from_main(answer[1] if answer is not None else None)
        if problem is None:
            return answer[0] if answer is not None else None
        if job.ranks.is_main and patience.may_tell():
            say(f"NOT PUBLISHED yet, trying again for {patience.left_s:.0f} s: {problem}")
        if job.interruptions.exchange_now() & GOING:
            job.interruptions.hold("All steps are trained and not yet published.")
        job.interruptions.wait(patience.next_pause_s())


def _not_published(job: Job, error: StorageError, kept: str) -> NotPublished:
    return NotPublished(
        f"Run {job.run_id} is trained and could not be published to {job.output_store.url}: {error} {kept}"
        f" When the store answers again, type on this machine: {job.again}"
    )


def _score_splits(
    job: Job, trainer: Trainer, stack: ExitStack, adapter: Mapping[str, torch.Tensor]
) -> HeldOut:
    """The figures of validation and, where it exists, test, and the posts that data.max_length cuts
    of these and of a sample of train.

    Validation posts are scored first without a temperature, which chooses it, and then with it: the
    published adapter, read back, gives bit for bit the published probabilities.
    """
    from emotion_train.data.lengths import Cut
    from emotion_train.evaluation.floors import tfidf_predictions
    from emotion_train.evaluation.temperature import BeforeAndAfter, temper
    from emotion_train.model.lora import with_temperature
    from emotion_train.report.figures import decided

    names = [
        name for name in ("validation", "test") if name in job.index.splits and job.index.splits[name].rows
    ]
    floors, cuts = {}, {}
    most = job.config.data.max_length
    if job.ranks.is_main:
        cuts["train"] = Cut.of(_train_lengths(job), most)
        tell("fitting the TF-IDF floor")
        seed, patience_s = job.config.run.seed, data_patience_s(job.config)
        floors = tfidf_predictions(
            job.data_store, job.index, names, job.config.report.floor_max_rows, seed, patience_s
        )
    chose = _score_split(job, trainer, stack, names[0])
    tempered = job.ranks.only_on_main(lambda: temper(_there(chose).predictions))
    temperature = job.ranks.from_main(None if tempered is None else tempered.temperature)
    if temperature is not None:
        adapter = with_temperature(adapter, _of_all_rows(temperature, job.index))
        trainer.engine.load_adapter(adapter)
    decision: Decision | None = None
    results: dict[str, AnyResult] = {}
    seconds = 0.0
    changed: dict[str, BeforeAndAfter] = {}
    for name in names:
        is_known = temperature is None and name == names[0]
        scored = chose if is_known else _score_split(job, trainer, stack, name)
        if scored is not None and tempered is not None:
            seconds += scored.seconds
            cuts[name] = scored.cut
            decision = decision or _decision(job, scored.predictions, tempered)
            results[name] = decided(
                scored.counts, scored.predictions, floors.get(name), decision, name == names[0]
            )
            changed[name] = (
                BeforeAndAfter(_there(chose).predictions.prob_NC, tempered.held_out_NC)
                if name == names[0]
                else decision.before_and_after(scored.predictions)
            )
    posts = sum(job.index.split(name).rows for name in names)
    old, remarks = _old_posts(job, trainer, stack, decision)
    rate = posts / seconds if seconds else None
    return HeldOut(results, cuts, decision, rate, changed, adapter, old, remarks)


def _old_posts(
    job: Job, trainer: Trainer, stack: ExitStack, decision: Decision | None
) -> tuple[OldPosts | None, tuple[str, ...]]:
    """The run's figures on the held-out posts of its parent adapter, on rank 0; and a remark where
    they were asked for and cannot be computed.
    """
    from emotion_train.evaluation.predictions import SetPredictions, join_predictions
    from emotion_train.progress import ProgressLine
    from emotion_train.report.old_posts import old_figures
    from emotion_train.runs.parent import old_posts, said_of_old_posts

    parent, settings = trainer.question.parent, job.config.report
    if settings.old_data is None or parent is None:
        return None, ()

    def look() -> _Old | str:
        try:
            store, index, name = old_posts(str(settings.old_data), parent)
            return _Old(store, index, name, said_of_old_posts(str(job.config.model.adapter), name))
        except (WrongRequest, StorageError) as error:
            return f"The posts of {parent.name} were not scored: {error}"

    found = job.ranks.only_on_main(look)
    light = job.ranks.from_main(found if not isinstance(found, _Old) else (found.index, found.name))
    if isinstance(light, str):
        return None, (light,)
    assert isinstance(light, tuple)
    index, name = light
    of_old = replace(job, index=index, data_store=open_store(settings.old_data))
    labels = job.index.labels
    # a label that the run no longer has gets any place: the true labels come from the parent's
    # predictions
    places_C = [labels.index(label) if label in labels else 0 for label in index.labels]
    rows = index.split(name).rows
    with ProgressLine(f"scoring {name} of {parent.name}", rows, "posts", shown=job.ranks.is_main) as line:
        scored = trainer.score(scoring_loader(of_old, name, stack), line.update, places_C)
    parts = job.ranks.gather(scored.predictions)
    if not isinstance(found, _Old):
        return None, ()
    after = join_predictions(parts, found.said.ids)
    if isinstance(after, SetPredictions):
        assert decision is not None
        after = after.answered(decision.answers(after.prob_NC))
    figures = old_figures(
        parent,
        labels,
        found.said,
        after,
        split=name,
        samples=settings.bootstrap_samples,
        seed=job.config.run.seed,
    )
    return figures, ()


@dataclass(frozen=True, eq=False)
class _Old:
    """The data set of the parent adapter, its held-out split, and the parent's predictions for
    it.
    """

    store: Store
    index: Index
    name: str
    said: AnyPredictions


def _of_all_rows(temperature: tuple[float, ...], index: Index) -> tuple[float, ...]:
    """The temperature of all rows of the head: where each label has one, rows of auxiliary labels
    get 1.
    """
    if len(temperature) < len(index.labels):  # one for all
        return temperature
    return (*temperature, *(1.0 for _ in index.trained_labels[len(index.labels) :]))


@dataclass(frozen=True, eq=False)
class _Scored:
    """A whole split: counts and predictions of all ranks, the posts that were cut, and the seconds
    of scoring.
    """

    counts: NDArray[np.int64]
    predictions: AnyPredictions
    cut: Cut
    seconds: float


def _score_split(job: Job, trainer: Trainer, stack: ExitStack, name: str) -> _Scored | None:
    """The model's predictions for a split, on rank 0; None on the other ranks, which score their
    shares.
    """
    from emotion_train.data.lengths import Cut, Lengths
    from emotion_train.data.tokenization import CountingTokenizer
    from emotion_train.evaluation.predictions import join_predictions
    from emotion_train.progress import ProgressLine

    rows = job.index.split(name).rows
    with ProgressLine(f"scoring {name}", rows, "posts", shown=job.ranks.is_main) as line:
        counting = CountingTokenizer(job.tokenizer)
        began = time.perf_counter()
        scored = trainer.score(scoring_loader(job, name, stack, counting), line.update)
        seconds = time.perf_counter() - began
    parts = job.ranks.gather(scored.predictions)
    lengths = job.ranks.gather(counting.lengths)
    if not job.ranks.is_main:
        return None
    cut = Cut.of(sum(lengths, Lengths.of([])), job.config.data.max_length)
    return _Scored(scored.counts, join_predictions(parts, rows), cut, seconds)


def _there(scored: _Scored | None) -> _Scored:
    assert scored is not None, "rank 0 has what all scored"
    return scored


def _decision(job: Job, validation: AnyPredictions, tempered: Tempered) -> Decision:
    """The decision of this adapter, from validation posts at its temperature."""
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.predictions import SetPredictions

    decision = (
        Decision.of(validation, job.index.labels)
        if isinstance(validation, SetPredictions)
        else Decision.one(job.index.labels, job.index.targets)
    )
    return decision.acting(validation, tempered, job.config.report.gates)


def _train_lengths(job: Job) -> Lengths:
    """Tokens of some training posts. The split was shuffled as a whole, so any posts will do;
    20,000 give a share of 5 % to within 0.3 points, in a second or two.
    """
    from emotion_train.data.lengths import Lengths
    from emotion_train.data.reader import sample_texts

    split = job.index.training
    texts = sample_texts(job.data_store, split, _COUNTED_POSTS, data_patience_s(job.config))
    return Lengths.of(len(ids) for ids in job.tokenizer.encode_whole(texts[:_COUNTED_POSTS]))


def _training_filter(job: Job) -> bytes:
    """The filter of the texts that were trained on; the other ranks wait some 12 s a million
    posts."""
    from emotion_train.data.text_filter import filter_of_split
    from emotion_train.progress import ProgressLine

    train, patience_s = job.index.training, data_patience_s(job.config)
    with ProgressLine("filter of the training posts", train.rows, "posts") as line:
        made = filter_of_split(job.data_store, train, job.index.sha256(), patience_s, line.update)
    return made.to_bytes()


def _build_report(
    job: Job,
    trainer: Trainer,
    held_out: HeldOut,
    best: Entry,
    claimed: Claimed,
    memory: tuple[int, Literal["GPU", "RSS"]],
    chosen: Chosen,
    texts: Texts,
) -> Report:
    from emotion_train.data.reader import kept_values
    from emotion_train.processes.machine import git_commit, versions
    from emotion_train.report.figures import Measured, build_report, dataset_facts
    from emotion_train.report.schema import Evaluation, Identity, LossPoint
    from emotion_train.runs.parent import label_sentences
    from emotion_train.training import curve

    progress, ended = trainer.progress, datetime.now(UTC)
    memory_bytes, memory_kind = memory
    bad_rows = (
        [f"{progress.bad_rows} rows turned out bad at run time and were trained with weight 0."]
        if progress.bad_rows
        else []
    )
    return build_report(
        labels=job.index.labels,
        splits=held_out.splits,
        history=[Evaluation.model_validate(one) for one in progress.history],
        best_step=best.step,
        dataset=dataset_facts(job.index, held_out.splits),
        cuts=held_out.cuts,
        measured=Measured(
            **{name: value for name, value in asdict(progress).items() if name in _MEASURED},
            posts=progress.examples,
            real_tokens=progress.tokens,
            wall_seconds=trainer.wall_seconds(),
            upload_seconds=trainer.upload_seconds(),
            labelling_posts_per_second=held_out.posts_per_second,
            peak_memory_bytes=memory_bytes,
            memory_kind=memory_kind,
        ),
        identity=Identity(
            run_id=job.run_id,
            config=public_config(_as_trained(job)),
            config_sha256=job.config.sha256(),
            index_sha256=job.index.sha256(),
            data_url=public_place(job.config.data.url),
            base=public_base(job.config.model.base),
            precision=job.config.model.precision,
            versions=versions(),
            git_commit=git_commit(),
            device=device_name(job.accelerator.device.type),
            world_size=job.ranks.world_size,
            started_utc=job.started,
            ended_utc=ended,
            parent=trainer.question.parent,
        ),
        # each start at the price of its own machine
        settings=job.config.report.model_copy(update={"usd_per_hour": mean_price(claimed.writer.log, ended)}),
        seed=job.config.run.seed,
        decision=held_out.decision,
        tempered=held_out.tempered,
        remarks=[
            *_left_out(job, trainer.question.base),
            *_auxiliary(job),
            *([] if trainer.question.parent is None else label_sentences(trainer.question.parent)),
            *held_out.remarks,
            *bad_rows,
            *claimed.remarks,
        ],
        losses=[LossPoint(step=step, loss=loss) for step, loss in curve.points(progress)],
        chosen=chosen,
        texts=texts,
        slice_values=kept_values(
            job.data_store,
            job.index.split(chosen.headline),
            job.config.report.slices,
            data_patience_s(job.config),
        ),
        old_posts=held_out.old_posts,
    )


def _as_trained(job: Job) -> Config:
    """The config; for an encoder with train.method as it was trained, instead of auto."""
    from emotion_train.model.encoder import is_encoder
    from emotion_train.sizing.recipe import adapter_of

    if not is_encoder(job.base.text):
        return job.config
    method = "full" if adapter_of(job.config, True) is None else "lora"
    return job.config.model_copy(update={"train": job.config.train.model_copy(update={"method": method})})


def _left_out(job: Job, base: BaseInfo) -> list[str]:
    """Remarks on data, steps and blocks of the base that the config left out."""
    config, whole = job.config, job.index.whole
    posts, all_posts = job.index.training.rows, whole.training.rows
    words = []
    if posts < all_posts:
        words.append(
            f"data.limit is {config.data.limit}: {posts:,} of {all_posts:,} training posts were used, and as"
            " many at most of each other split."
        )
    steps = config.train.steps(posts)
    every = config.train.model_copy(update={"max_steps": None}).steps(posts)
    if steps < every:
        words.append(f"train.max_steps is {config.train.max_steps}: {steps:,} of {every:,} steps were taken.")
    if (depth := depth_words(base.layers, base.whole_layers)) is not None:
        words.append(f"model.layers is {config.model.layers}: {depth} of the base were read and computed.")
    return words


def _auxiliary(job: Job) -> list[str]:
    """A remark on auxiliary posts, which were trained on and which no figure counts."""
    if (auxiliary := job.index.auxiliary) is None:
        return []
    names, shown = auxiliary.labels, ", ".join(auxiliary.labels[:_LABELS_SHOWN])
    labels = f"the labels {shown}{', …' if len(names) > _LABELS_SHOWN else ''} and " if names else ""
    return [
        f"Beside the training posts {auxiliary.split.rows:,} auxiliary posts were trained on, of {labels}of"
        " several labels; no figure counts them."
    ]


def _save_adapter(
    job: Job,
    trainer: Trainer,
    report: Report,
    held_out: HeldOut,
    folder: Path,
) -> None:
    """Write the adapter's folder, with the decision beside the adapter."""
    from emotion_train.evaluation.decision import DECISION
    from emotion_train.model.encoder import is_encoder
    from emotion_train.model.facts import AdapterFacts
    from emotion_train.model.lora import of_main_labels, save_adapter
    from emotion_train.report.card_lines import card_header, card_lines, card_sections
    from emotion_train.sizing.recipe import adapter_of

    assert held_out.decision is not None, "there is a validation split"
    facts = AdapterFacts.of(
        trainer.question.base,
        job.tokenizer,
        precision=job.config.model.precision,
        lora=adapter_of(job.config, is_encoder(job.base.text)),
        labels=job.index.labels,
        targets=job.index.targets,
        run_id=job.run_id,
        index_sha256=job.index.sha256(),
        output_url=place_here(job.config.run.output_url),
        data_url=place_here(job.config.data.url),
    )
    save_adapter(
        trainer.bare_model,
        folder,
        tokenizer=job.tokenizer,
        facts=facts,
        state=of_main_labels(held_out.adapter, len(job.index.labels)),
        metrics_lines=card_lines(report),
        card_sections=card_sections(report),
        card_header=card_header(report),
    )
    (folder / DECISION).write_bytes(held_out.decision.to_bytes())
