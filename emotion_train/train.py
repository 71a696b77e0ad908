"""Train one run from its config to its published adapter and report; `accelerate launch -m
emotion_train.train --config run.yaml`.

The order of the text is the order of time: config, data, run, model, loop, report. Every process
runs all of it; rank 0 alone writes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from emotion_train.bases.ahead import BaseAhead
from emotion_train.config import Config, load_config, require_trackers
from emotion_train.data.index import Index, limited, read_index, require_slices, require_trainable
from emotion_train.edges.streams import go_to
from emotion_train.errors import Fenced, LostContact, WrongRequest
from emotion_train.processes.borrowed import is_borrowed
from emotion_train.processes.launcher_link import FENCED_S, answers_signals, end_within
from emotion_train.processes.machine import memory_of, room_ahead, whole_memory_of
from emotion_train.processes.notices import Notice, PreemptionWatch, hold_seconds
from emotion_train.runs.log import Entry
from emotion_train.storage.open import open_store
from emotion_train.storage.patience import StoreRequest
from emotion_train.storage.store import Store
from emotion_train.training.claim import Claiming, look_before_claiming
from emotion_train.training.finish import report_and_publish
from emotion_train.training.job import (
    Claimed,
    Job,
    end_even_if_stuck,
    output_log,
    published,
    run_id_of,
    say,
    say_nothing,
    say_published,
    too_small,
)
from emotion_train.training.start import (
    config_on_gpu,
    keep_kernels,
    require_engine,
    require_fp8,
    require_host,
    start_processes,
    start_trainer,
)

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.load import BaseConfig
    from emotion_train.processes.ranks import Ranks
    from emotion_train.runs.checkpoint import Progress
    from emotion_train.runs.parent import ParentAdapter
    from emotion_train.training.trainer import Trainer

_FIRST_LOOK_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="run config in YAML; only data.url and run.output_url have no default",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="values that win over the file"
    )
    parser.add_argument(
        "--allow-unfenced",
        action="store_true",
        help=(
            "train also on a store that ignores create-only writes, where nothing keeps two writers of one"
            " run apart"
        ),
    )
    parser.add_argument(
        "--stop-after-step",
        type=int,
        metavar="N",
        help=(
            "after step N of this start, save and end with exit code 33, as after a preemption notice. The"
            " same command without it resumes; `emotion-launch run --smoke` rehearses a recovery in this way"
        ),
    )


def run(arguments: argparse.Namespace, complete_environment: Callable[[], None] = lambda: None) -> int:
    """Returns 0 when the run is published, by this process or by an earlier one.

    `complete_environment` as in `train`.
    """
    config = load_config(arguments.config, arguments.overrides)
    go_to(output_log(config))
    again = partial(_command, arguments)
    _, final = train(
        config, arguments.allow_unfenced, again, os.environ, arguments.stop_after_step, complete_environment
    )
    return published(final)


def train(
    config: Config,
    allow_unfenced: bool,
    again: Callable[[str, str], str],
    environment: Mapping[str, str],
    stop_after_step: int | None = None,
    complete_environment: Callable[[], None] = lambda: None,
) -> tuple[str, Entry]:
    """Id and final entry of the run, which this process or an earlier one published.

    `again` makes the command that resumes the run, from its id and the kind of device;
    `environment` holds the variables of `accelerate launch`, once `complete_environment` was
    called, just before torch is imported; `stop_after_step` rehearses a preemption after that step.
    Raises the errors of `emotion_train.errors`.
    """
    started = datetime.now(UTC)
    require_trackers(config)
    data_store, output_store = open_store(config.data.url), open_store(config.run.output_url)
    with ExitStack() as stack:
        # one process of each machine is enough
        asked = config.preemption.notices if environment.get("LOCAL_RANK", "0") == "0" else "none"
        watch = stack.enter_context(PreemptionWatch(asked, say))
        answers_signals()
        room_bytes = room_ahead(int(environment.get("LOCAL_WORLD_SIZE", "1")))
        ahead = stack.enter_context(BaseAhead(config.model.base, config.model.layers, room_bytes))
        reading = _ask_for_index(config, data_store)
        complete_environment()

        import torch

        from emotion_train.model.pieces_on_device import bring_to, gpu_of_process

        bring_to(ahead, gpu_of_process(environment), config.model.precision)

        from emotion_train.processes.interruption import Interruptions
        from emotion_train.processes.ranks import is_about_contact, lost_contact
        from emotion_train.training.microbatch import settle
        from emotion_train.training.room import wait_for_room
        from emotion_train.training.waiting import PatientStart

        accelerator, engine, ranks = start_processes(config, environment)
        run_id = ranks.from_main(run_id_of(config, os.environ))
        config = config.model_copy(update={"run": config.run.model_copy(update={"id": run_id})})
        hold_s = hold_seconds(config.preemption.hold_s, os.environ)
        rehearsal = Rehearsal(stop_after_step)
        interruptions = Interruptions(
            ranks, lambda: rehearsal.notice or watch.notice, hold_s, say if ranks.is_main else say_nothing
        )
        start = PatientStart(interruptions, config.run.start_timeout_s, say)
        index = limited(start.answer(reading), config.data.limit)
        look = start.on_main(
            "the log of the run",
            output_store.url,
            lambda: look_before_claiming(config, index, output_store, allow_unfenced),
        )
        if look.final is not None:
            say_published(output_store, run_id, look.final, ranks.is_main)
            return run_id, look.final
        config = config_on_gpu(config, accelerator.device, say if ranks.is_main else say_nothing)
        kernels_ready = keep_kernels(config, ranks, accelerator.device, stack)
        base, tokenizer = start.everywhere(
            "the base", config.model.base, lambda: _look_at_base(config, ahead)
        )
        require_engine(base, engine)
        parent = None
        if config.model.adapter is not None and not look.saved:
            parent = start.only_on_main(
                "the adapter to train on from",
                config.model.adapter,
                lambda: _look_at_parent(config, index, base, tokenizer),
            )
            parent = _on_all_ranks(parent, ranks)
        require_fp8(config, base, engine, accelerator.device)
        require_host(config, base, len(index.trained_labels), accelerator.device)
        settle_for = partial(
            settle,
            config,
            base,
            index,
            data_store,
            tokenizer,
            engine,
            ranks,
            accelerator.device,
            say,
            lambda choose: start.on_main("some posts", data_store.url, choose),
        )
        # another start may still hold the GPU, so its whole memory counts until the claim ends that
        # start
        config = settle_for(read=whole_memory_of if look.owned else memory_of)
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
            again(run_id, accelerator.device.type),
            base,
            parent,
        )
        answer = start.only_on_main("the claim of the run", output_store.url, Claiming(job, start.note_saved))
        claimed = answer if isinstance(answer, Claimed) else None
        if final := ranks.from_main(answer if isinstance(answer, Entry) else None):
            say_published(output_store, run_id, final, ranks.is_main)
            return run_id, final
        try:
            if look.owned:
                job = wait_for_room(job, settle_for)
            kernels_ready()
            trainer = start_trainer(job, claimed, stack)
            if trainer.saver is not None and not is_borrowed():
                trainer.saver.on_fenced = partial(end_within, FENCED_S, Fenced.exit_code)
            _fit(job, trainer, rehearsal)
            return run_id, report_and_publish(job, trainer, claimed, stack)
        except torch.OutOfMemoryError:
            raise WrongRequest(too_small(job)) from None
        except LostContact:
            end_even_if_stuck()
            raise
        except RuntimeError as error:
            if not is_about_contact(error):
                raise
            end_even_if_stuck()
            raise LostContact(lost_contact(ranks.rank, ranks.timeout_s, error)) from error


def _ask_for_index(config: Config, store: Store) -> StoreRequest[Index]:
    """The request for the data set's index; a wrong index is refused here, before anything heavy is
    loaded.
    """

    def trainable() -> Index:
        index = read_index(store)
        require_trainable(index, config.loss.weighted_labels)
        require_slices(index, config.report.slices)
        return index

    request = StoreRequest("the index of the data set", store.url, trainable, config.run.start_timeout_s)
    if request.look(_FIRST_LOOK_S):
        request.result()
    elif (words := request.news()) is not None and os.environ.get("RANK", "0") == "0":
        say(words)
    return request


def _look_at_base(config: Config, ahead: BaseAhead | None = None) -> tuple[BaseConfig, PostTokenizer]:
    """The base's config and tokenizer, before a weight is read and before the run is claimed."""
    from emotion_train.bases.files import BaseFiles
    from emotion_train.model.load import read_config
    from emotion_train.model.trainable import require_trainable_base
    from emotion_train.sizing.recipe import adapter_of

    files = BaseFiles.find(config.model.base, config.model.layers) if ahead is None else ahead.files()
    found = require_trainable_base(files, config.model.precision, config.data.max_length)
    adapter_of(config, found.model.is_encoder)
    return read_config(found.files), found.tokenizer


def _look_at_parent(
    config: Config, index: Index, base: BaseConfig, tokenizer: PostTokenizer
) -> ParentAdapter:
    """The adapter from which the run trains on, checked against config, data and base; at most a
    few rows of the base are read.
    """
    from emotion_train.exporting.base_rows import known_weights_sha256
    from emotion_train.runs.parent import (
        label_sentences,
        read_parent,
        refuse_other_depth,
        refuse_other_weights,
        refuse_unfit,
        require_old_posts,
    )

    parent = read_parent(str(config.model.adapter))
    refuse_other_depth(parent, base.layers)
    refuse_unfit(parent, config, index, shape_sha256=base.shape_sha256, tokenizer_sha256=tokenizer.sha256())
    refuse_other_weights(parent, config.model.base, known_weights_sha256(base))
    require_old_posts(config, parent, index.labels)
    for sentence in label_sentences(parent.described(index.labels)):
        say(sentence)
    return parent


def _on_all_ranks(parent: ParentAdapter | None, ranks: Ranks) -> ParentAdapter:
    """Rank 0's parent on every rank."""
    light = ranks.from_main(None if parent is None else parent.light)
    assert light is not None, "rank 0 has read it"
    weights = ranks.bytes_from_main(b"" if parent is None else parent.weights)
    return replace(light, weights=bytes(weights))


def _command(arguments: argparse.Namespace, run_id: str, device: str) -> str:
    """The command line that resumes this run."""
    words = ["--accelerate-config", "cpu"] if device == "cpu" else []
    words += ["--config", arguments.config] if arguments.config else []
    words += ["--allow-unfenced"] if arguments.allow_unfenced else []
    words += [word for word in arguments.overrides if not word.startswith("run.id=")]
    return shlex.join(["emotion-launch", "run", *words, f"run.id={run_id}"])


class Rehearsal:
    """A preemption notice of our own, after the given step of this start (None: never), for all
    ranks at the same step.
    """

    def __init__(self, after_step: int | None) -> None:
        self._after_step = after_step
        self.notice: Notice | None = None

    def hear(self, step: int) -> None:
        if self._after_step is not None and step >= self._after_step:
            self.notice = self.notice or Notice("terminate", "A preemption is rehearsed", None, 0)


def _fit(job: Job, trainer: Trainer, rehearsal: Rehearsal) -> None:
    from emotion_train.progress import ProgressLine

    def tell(progress: Progress, note: str) -> None:
        rehearsal.hear(progress.step)
        line.update(progress.step, trainer.pace.words(progress, note))

    with ProgressLine("training", trainer.steps, "steps", shown=job.ranks.is_main) as line:
        trainer.tell = tell
        trainer.tell_milestone = line.say
        trainer.fit()


if __name__ == "__main__":
    from emotion_train.cli import main
    from emotion_train.processes.launcher_link import run_as_trainer

    sys.exit(run_as_trainer(lambda: main(["train", *sys.argv[1:]])))
