"""A short run before money is spent on the whole one: ten steps on real data, a preemption after
half of them and a second start, one evaluation, one checkpoint, the report.

It runs under RUN_ID-smoke in the same bucket, on the same machine and with the same base as the
whole run, so most failures of the whole run show here within minutes. Its measured times give the
estimate for the whole run; the first step of each start builds kernels and is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from emotion_train.config import Config
from emotion_train.console import counted
from emotion_train.data.index import Index, limited, read_index, require_slices, require_trainable
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import Preempted, WrongRequest
from emotion_train.runs.log import Entry, read_log, read_part, smoke_id
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from emotion_train.training.job import run_id_of
from launch.run.processes import say
from launch.run.topology import gpus, read_topology
from launch.workload import Work, work_of

STEPS = 10
_STATE = "/state.json"


@dataclass(frozen=True)
class WholeRun:
    """Estimated time and cost of the whole run from its smoke run, without machine set-up and
    preemptions; `usd` is None where no price is known.
    """

    steps: int
    posts_per_second: float
    training_s: float
    scoring_s: float
    start_s: float
    usd_per_hour: float | None

    @property
    def hours(self) -> float:
        return (self.training_s + self.scoring_s + self.start_s) / 3600

    @property
    def usd(self) -> float | None:
        return None if self.usd_per_hour is None else self.hours * self.usd_per_hour

    def __str__(self) -> str:
        words = (
            f"the whole run: {counted(self.steps, 'step')} in {_time(self.hours * 3600)} on this machine"
            f" ({_time(self.training_s)} of training at {self.posts_per_second:,.0f} posts/s,"
            f" {_time(self.scoring_s)} of scoring, {_time(self.start_s)} to start)"
        )
        cost = (
            "; no price is known here, report.usd_per_hour=N gives one"
            if self.usd is None
            else f", ${self.usd:,.2f} at ${self.usd_per_hour:,.2f} an hour"
        )
        return f"{words}{cost}; the machine's set-up and preemptions come on top"


def smoke_run(
    config: Config, start: Callable[[list[str], int | None], int], *, only_show: bool = False
) -> int:
    """Make the smoke run of a config and print the estimate for the whole run; returns the exit
    code.

    `start` makes one start on this node, given further overrides and the step after which it ends
    (None: it runs to its end); with `only_show` it only prints its line. Raises `WrongRequest` on
    several nodes without a run id that all of them know.
    """
    nodes = read_topology(gpus())
    if nodes.nodes > 1 and config.run.id is None and "SKYPILOT_TASK_ID" not in os.environ:
        raise WrongRequest("--smoke on several nodes needs a run id that all of them know; type run.id=NAME.")
    data_store, store = open_store(config.data.url), open_store(config.run.output_url)
    whole = read_index(data_store)
    require_trainable(whole, config.loss.weighted_labels)
    require_slices(whole, config.report.slices)
    run_id = run_id_of(config, os.environ)
    smoke = smoke_config(config, whole, run_id)
    words = smoke_words(smoke)
    if only_show:
        return start(words, None)
    index = limited(whole, smoke.data.limit)
    code = rehearse(smoke, index, store, lambda stop_after: start(words, stop_after), say)
    if code == 0 and nodes.node_rank == 0:
        asked = limited(whole, config.data.limit)
        found = whole_run(config, asked, index, store, smoke_id(run_id), data_store)
        print(found if found is not None else "the whole run: nothing was measured that tells its hours")
        print("next: the same command without --smoke")
    return code


def smoke_config(config: Config, whole: Index, run_id: str) -> Config:
    """The config of the smoke run, with the posts of ten steps, so that ten steps are one epoch."""
    train, data = config.train, config.data
    posts = max(len(whole.labels), STEPS * train.global_batch_size)
    changes: dict[str, dict[str, Any]] = {
        "run": {"id": smoke_id(run_id)},
        "train": {"max_steps": min(STEPS, train.max_steps or STEPS)},
        "data": {"limit": posts if data.limit is None else min(posts, data.limit)},
        "evaluation": {"every_steps": None},
        "checkpoint": {"every_seconds": None, "every_steps": None},
        "preemption": {"hold_s": 0},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    )


def smoke_words(smoke: Config) -> list[str]:
    """The overrides that turn a run into this smoke run; they win over all others."""
    return [
        f"run.id={smoke.run.id}",
        f"train.max_steps={smoke.train.max_steps}",
        f"data.limit={smoke.data.limit}",
        "evaluation.every_steps=none",
        "checkpoint.every_seconds=none",
        "checkpoint.every_steps=none",
        "preemption.hold_s=0",
    ]


def rehearse(
    smoke: Config,
    index: Index,
    store: Store,
    start: Callable[[int | None], int],
    say: Callable[[str], None],
) -> int:
    """Start the run of the config `smoke` on its `index`, end it as after a preemption notice and
    start it again; returns the exit code of the last start.

    `start` gets the step after which a start ends. A smoke run that was stopped before is resumed,
    as its second start. A published smoke run is not made again.
    """
    run_id = smoke.run.id or ""
    steps = smoke.train.steps(index.training.rows)
    half = max(1, steps // 2)
    if not _saved(read_log(store, run_id)):
        say(f"smoke run {run_id}: first start, to step {half} of {steps}")
        code = start(half)
        saved = _saved(read_log(store, run_id))
        if code != Preempted.exit_code or not saved or saved[-1].step < half:
            return code  # refused, failed, or really preempted
        say("smoke run: second start, which resumes from its checkpoint")
    return start(None)


def _saved(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.kind == "checkpoint"]


def whole_run(
    config: Config,
    whole: Index,
    index: Index,
    store: Store,
    run_id: str,
    data_store: Store,
) -> WholeRun | None:
    """The estimate for a run of `config` on the `whole` index, from the newest checkpoint of the
    smoke run `run_id` on `index`; dollars by the price of its newest start. None where that
    checkpoint is gone or measured nothing.
    """
    entries = read_log(store, run_id)
    price = [entry.metrics.get("usd_per_hour") for entry in entries if entry.kind == "claim"][-1:]
    progress = _progress(store, run_id, _saved(entries))
    starts = sum(entry.kind == "claim" for entry in entries)
    if progress is None or not progress["train_seconds"] or not progress["evaluation_seconds"]:
        return None
    posts, seconds = progress["examples"], progress["train_seconds"]
    warm_posts, warm_s = posts - progress["warm_up_examples"], seconds - progress["warm_up_seconds"]
    rate = warm_posts / warm_s if warm_posts > 0 and warm_s > 0 else posts / seconds
    scored = index.split("validation").rows * len(progress["history"])
    held_s = progress["earlier_wall_seconds"]
    work: Work = work_of(config, whole, data_store, tokens_per_post=1.0)
    steps = work.steps
    trained = steps * min(work.global_batch_size, work.train_posts)
    return WholeRun(
        steps=steps,
        posts_per_second=rate,
        training_s=min(trained, work.train_posts * work.epochs) / rate,
        scoring_s=work.scored_posts * progress["evaluation_seconds"] / scored,
        start_s=max(0.0, held_s - seconds - progress["evaluation_seconds"]) / max(1, starts),
        usd_per_hour=float(price[0]) if price and isinstance(price[0], int | float) else None,
    )


def _progress(store: Store, run_id: str, saved: Sequence[Entry]) -> dict[str, Any] | None:
    """The progress in the newest checkpoint, with its measured times; None where there is none."""
    for part in saved[-1].parts if saved else ():
        if part.key.endswith(_STATE):
            try:
                progress = object_in(read_part(store, run_id, part), finite=False).get("progress")
            except Unreadable:
                return None
            return progress if isinstance(progress, dict) and "warm_up_seconds" in progress else None
    return None


def _time(seconds: float) -> str:
    """`2.5 h`, `12 min` or `40 s`."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
