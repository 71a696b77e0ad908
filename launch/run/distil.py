"""`emotion-launch distil`: one adapter that answers like several. Teachers are trained on folds of
the training posts, each scores the fold that it did not see, the probabilities become shares, and
one student is trained on them.

Data sets that are stored are not made again, and published runs are not trained again. So the same
command resumes where it was stopped, on any machine. The price: FOLDS x SEEDS trainings on nearly
all posts, and the training posts stored FOLDS + 1 times more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from emotion_train.config import Config, load_config
from emotion_train.console import counted
from emotion_train.data.index import INDEX_KEY, Index, read_index
from emotion_train.errors import WrongRequest
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.run.processes import say
from launch.run.seeds import SeedRun, as_jobs, require_gpus, seeds_of, spread_runs
from launch.run.topology import Topology

if TYPE_CHECKING:
    from emotion_train.data.reader import Rows

MOST_FOLDS = 20
_MOST_ID = 128
_OF_STUDENT = ("model", "lora", "train", "loss")  # sections that --student may set
# nobody reads a teacher's report
_OF_TEACHERS = ("report.floor_max_rows=0", "report.examples=0", "report.bootstrap_samples=100")


class Plan(NamedTuple):
    """The data sets and runs to make; `to` is the prefix of the data sets, `own` the share that a
    post's own label keeps. `config` is that of the teachers; the student's has its own values.
    """

    config: Config
    student: tuple[str, ...]
    student_config: Config
    run_id: str
    folds: int
    seeds: tuple[int, ...]
    own: float
    to: str

    def fold_url(self, fold: int) -> str:
        return f"{self.to}/fold-{fold}-of-{self.folds}"

    @property
    def soft_url(self) -> str:
        seeds = "-".join(map(str, self.seeds))
        return f"{self.to}/soft-{self.folds}-folds-seeds-{seeds}-own-{self.own:g}"

    def teacher_id(self, fold: int, seed: int) -> str:
        return f"{self.run_id}-fold-{fold}-of-{self.folds}-seed-{seed}"


def distil(
    arguments: argparse.Namespace,
    config: Config,
    topology: Topology,
    run_once: Callable[[argparse.Namespace], int],
) -> int:
    """Returns 0 when the student is published, else the exit code of the run that failed. Call it
    in the main thread.
    """
    plan = plan_of(arguments, config)
    _refuse_wrong_options(arguments, topology)
    if arguments.dry_run:
        print("\n".join(_lines_of(plan)))
        if arguments.as_jobs:
            teachers = teachers_of(plan, arguments.overrides)
            print("\n".join(as_jobs(arguments.config, config, teachers, then="the student")))
        return 0
    if arguments.as_jobs:
        return _by_jobs(arguments, plan)
    return _make(
        plan, arguments.overrides, lambda runs: _train_here(arguments, plan, runs, topology, run_once)
    )


def _refuse_wrong_options(arguments: argparse.Namespace, topology: Topology) -> None:
    from launch.up.price import refuse_wrong_options

    refuse_wrong_options(arguments, arguments.as_jobs, "add --as-jobs")
    if arguments.at_once > 1 and not arguments.spread:
        raise WrongRequest("--at-once is for runs that are spread over GPUs; give --spread, or leave it out.")
    if arguments.as_jobs and arguments.spread:
        raise WrongRequest(
            "--spread trains on the GPUs of this machine, and --as-jobs on others; give one of the two."
        )
    if arguments.spread:
        require_gpus(arguments, topology)
    if topology.nodes > 1 and not arguments.as_jobs:
        raise WrongRequest(
            f"distil runs on one machine and there are {topology.nodes} nodes; type it on one of them with"
            " --as-jobs, which starts each run as a job of SkyPilot."
        )


def _make(plan: Plan, overrides: Sequence[str], train: Callable[[Sequence[SeedRun]], int]) -> int:
    """Makes everything, in the order of time. `train` trains the runs that are not published yet,
    and returns the exit code.
    """
    source = open_store(plan.config.data.url)
    index = read_index(source)
    rows = _training_posts(source, index, plan)
    _make_folds(source, index, rows, plan)
    if code := train(teachers_of(plan, overrides)):
        return code
    _make_soft(source, index, rows, plan)
    if code := train([student_of(plan, overrides)]):
        return code
    print(f"the student: {plan.config.run.output_url.rstrip('/')}/{plan.run_id}")
    return 0


def plan_of(arguments: argparse.Namespace, config: Config) -> Plan:
    """The plan of the data sets and runs; raises `WrongRequest` for a config that cannot be
    distilled.
    """
    from emotion_train.training.job import run_id_of

    if not 2 <= arguments.folds <= MOST_FOLDS:
        raise WrongRequest(f"--folds is {arguments.folds}; give 2 to {MOST_FOLDS}.")
    if not 0 <= arguments.own < 1:
        raise WrongRequest(f"--own is {arguments.own:g}; give a share from 0 to below 1, such as 0.3.")
    student = _student_config(arguments)
    if config.model.adapter is not None or student.model.adapter is not None:
        raise WrongRequest(
            "model.adapter names an adapter that may have seen the posts of any fold, so no teacher would be"
            " out of fold; leave it out."
        )
    if config.data.limit is not None:
        raise WrongRequest("data.limit drops posts that a teacher has to answer; leave it out.")
    if config.run.id is None:
        raise WrongRequest("distil finds its runs again by run.id; give run.id=NAME.")
    run_id = run_id_of(config, os.environ)
    seeds = seeds_of(arguments.seeds, config.run.seed, fewest=1)
    to = (arguments.to or f"{config.data.url.rstrip('/')}-distil/{run_id}").rstrip("/")
    own = tuple(arguments.student)
    plan = Plan(config, own, student, run_id, arguments.folds, seeds, arguments.own, to)
    if len(longest := plan.teacher_id(plan.folds - 1, max(seeds))) > _MOST_ID:
        raise WrongRequest(f"run.id is too long for its teachers ({longest}); give a shorter one.")
    return plan


def _student_config(arguments: argparse.Namespace) -> Config:
    for word in arguments.student:
        if word.partition(".")[0] not in _OF_STUDENT:
            raise WrongRequest(
                f"--student sets how the student is trained, and {word} is no such value; give one of"
                f" {', '.join(_OF_STUDENT)}, such as model.layers=0.5."
            )
    return load_config(arguments.config, [*arguments.overrides, *arguments.student])


def teachers_of(plan: Plan, overrides: Sequence[str]) -> list[SeedRun]:
    """A run for each fold and seed."""
    return [
        _run(plan, overrides, plan.fold_url(fold), plan.teacher_id(fold, seed), seed, _OF_TEACHERS)
        for seed in plan.seeds
        for fold in range(plan.folds)
    ]


def student_of(plan: Plan, overrides: Sequence[str]) -> SeedRun:
    return _run(plan, [*overrides, *plan.student], plan.soft_url, plan.run_id, plan.config.run.seed)


def _run(
    plan: Plan, overrides: Sequence[str], data_url: str, run_id: str, seed: int, more: Sequence[str] = ()
) -> SeedRun:
    kept = [word for word in overrides if not word.startswith(("run.id=", "run.seed=", "data.url="))]
    own = (f"data.url={data_url}", f"run.id={run_id}", f"run.seed={seed}")
    return SeedRun(seed, run_id, (*more, *kept, *own), run_id)


def _lines_of(plan: Plan) -> list[str]:
    runs = [plan.teacher_id(fold, seed) for seed in plan.seeds for fold in range(plan.folds)]
    return [
        f"{plan.folds} data sets, each without a fold: {plan.fold_url(0)} …",
        f"{counted(len(runs), 'teacher')}: {', '.join(runs)}",
        f"their out-of-fold probabilities as shares, {plan.own:g} of a post's own: {plan.soft_url}",
        f"the student{''.join(f', {word}' for word in plan.student)}: {plan.run_id}",
    ]


# --- the data sets ---


def _training_posts(source: Store, index: Index, plan: Plan) -> Rows:
    from emotion_train.preparation.derived import read_split
    from emotion_train.preparation.folds import require_foldable

    rows = read_split(source, index, "train")
    require_foldable(index, rows, plan.folds, plan.config.data.url)
    return rows


def _make_folds(source: Store, index: Index, rows: Rows, plan: Plan) -> None:
    from emotion_train.preparation.folds import write_fold

    for fold in range(plan.folds):
        store = open_store(plan.fold_url(fold))
        if _is_there(store, index, "fold_of"):
            continue
        print(f"data set without fold {fold} of {plan.folds}: {store.url}", flush=True)
        write_fold(source, index, rows, fold, plan.folds, store, "--to")


def _make_soft(source: Store, index: Index, rows: Rows, plan: Plan) -> None:
    from emotion_train.preparation.folds import write_soft
    from emotion_train.runs.out_of_fold import out_of_fold

    store = open_store(plan.soft_url)
    if _is_there(store, index, "distilled_from"):
        return
    runs = {fold: [plan.teacher_id(fold, seed) for seed in plan.seeds] for fold in range(plan.folds)}
    prob_by_id = out_of_fold(open_store(plan.config.run.output_url), runs, rows)
    print(f"shares that {counted(len(runs) * len(plan.seeds), 'teacher')} gave: {store.url}", flush=True)
    facts: dict[str, str | int | float | None] = {
        "folds": plan.folds,
        "teacher_seeds": ",".join(map(str, plan.seeds)),
        "teachers": f"{plan.run_id}-fold-…",
        "own_share": plan.own,
    }
    write_soft(source, index, rows, prob_by_id, plan.own, facts, store, "--to")


def _is_there(store: Store, index: Index, made_of: str) -> bool:
    """Whether the data set is stored. Raises `WrongRequest` where it was made from another data
    set.
    """
    if store.find(INDEX_KEY) is None:
        return False
    if read_index(store).source.get(made_of) != index.sha256():
        raise WrongRequest(
            f"{store.url} was made from another data set than data.url names; give another --to or run.id."
        )
    return True


# --- the runs ---


def _is_published(plan: Plan, one: SeedRun) -> bool:
    from emotion_train.runs.out_of_fold import is_published

    index = read_index(open_store(one.value_of("data.url") or plan.config.data.url))
    config = plan.student_config if one.run_id == plan.run_id else plan.config
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": one.seed})})
    return is_published(open_store(plan.config.run.output_url), one.run_id, index, config)


def _train_here(
    arguments: argparse.Namespace,
    plan: Plan,
    runs: Sequence[SeedRun],
    topology: Topology,
    run_once: Callable[[argparse.Namespace], int],
) -> int:
    """Train the runs that are not published yet; returns the exit code."""
    left = [one for one in runs if not _is_published(plan, one)]
    if not left:
        return 0
    print(
        f"{len(left)} of {counted(len(runs), 'run')} to train: {', '.join(one.run_id for one in left)}",
        flush=True,
    )
    if arguments.spread:
        code = spread_runs(arguments, plan.config, left, topology.gpus * arguments.at_once)
    else:
        code = next((code for one in left if (code := _one(arguments, one, run_once))), 0)
    if code:
        say("not all runs are trained; the same command resumes, and trains no published run again")
    return code


def _by_jobs(arguments: argparse.Namespace, plan: Plan) -> int:
    """What `_make` does, with each run as a job of SkyPilot on a machine of its own."""
    from emotion_train.training.job import folder_here
    from launch.up.commands import Stopped, commands
    from launch.up.jobs import Job
    from launch.up.runs import RunsByJobs, require_jobs

    output_url = plan.config.run.output_url.rstrip("/")
    require_jobs(arguments, (plan.config.data.url, output_url, plan.to), plan.run_id)

    def train(runs: Sequence[SeedRun]) -> int:
        left = [one for one in runs if not _is_published(plan, one)]
        if left:
            jobs = [
                Job(one.run_id, f"{output_url}/{one.run_id}", partial(_is_published, plan, one))
                for one in left
            ]
            # the student comes after its teachers
            by_jobs.train(list(zip(left, jobs, strict=True)), int(left[0].run_id != plan.run_id))
        return 0

    with commands() as here:
        task_file = folder_here(plan.config) / f"{plan.run_id}.yaml"
        by_jobs = RunsByJobs(arguments, plan.config, here, task_file)
        try:
            return _make(plan, arguments.overrides, train)
        except Stopped as stopped:
            say(
                f"that step ended with {stopped.code}; started jobs keep running (`sky jobs queue`), and the"
                " same command follows them"
            )
            return stopped.code


def _one(arguments: argparse.Namespace, one: SeedRun, run_once: Callable[[argparse.Namespace], int]) -> int:
    return run_once(argparse.Namespace(**{**vars(arguments), "overrides": list(one.overrides)}))
