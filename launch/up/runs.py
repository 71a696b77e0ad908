"""Several runs of one config, each as a job of SkyPilot on a machine of its own: planned and agreed
to once, started together.

The bucket and SkyPilot's queue show what is done: a published run is not trained again, and a job
that is alive is followed. So the same command resumes wherever it was stopped; the jobs run on
without it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from emotion_train.command_line import LAUNCH
from emotion_train.config import Config
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from launch.plan.task_file import TEMPLATE
from launch.plan.verb import PROJECT, stays_here
from launch.run.seeds import OF_THE_RUN, SeedRun, task_environment
from launch.up.commands import Commands
from launch.up.jobs import (
    SKY,
    Job,
    launch_line,
    living_jobs,
    out_of_reach,
    refuse_white_space,
    require_sky,
    task_settings,
    train_at_once,
    words_of,
)
from launch.up.price import agree, price_of

_JOB_NAME = re.compile(r"[a-zA-Z][-_.a-zA-Z0-9]*")


def require_jobs(arguments: argparse.Namespace, urls: Sequence[str], run_id: str) -> None:
    """Raises `WrongRequest` where the runs cannot be jobs, before anything is made."""
    require_sky()
    for option in ("accelerate_config", "allow_unfenced"):
        if getattr(arguments, option):
            raise WrongRequest(
                f"--{option.replace('_', '-')} is for trainings on this machine; leave it out, or --as-jobs."
            )
    for url in urls:
        if out_of_reach(url):
            raise WrongRequest(
                f"{url} is a folder, which a cloud's machine does not reach; give s3://bucket/prefix, or"
                " leave --as-jobs out to train on this machine."
            )
    if not _JOB_NAME.fullmatch(run_id):
        raise WrongRequest(
            f"run.id is {run_id!r}, and SkyPilot takes names of letters, digits, '-', '_' and '.', a letter"
            " first; give another."
        )
    refuse_white_space(arguments.overrides)
    words_of("--sky", arguments.sky)


class RunsByJobs:
    """Plans, agrees to and starts the jobs. `arguments` are the verb's: config, overrides, and the
    machine. The plan's task is written to `task_file`, unless `--gpus` names the machine.
    """

    def __init__(
        self, arguments: argparse.Namespace, config: Config, here: Commands, task_file: Path
    ) -> None:
        self._arguments = arguments
        self._config = config
        self._here = here
        self._task_file = task_file.resolve()
        self._agreed = False

    def train(self, runs: Sequence[tuple[SeedRun, Job]], later: int) -> None:
        """Start the jobs that are not alive and follow all until their runs are published. The
        question before the first start counts the price of `later` more runs too. Raises as
        `train_at_once` does, and `WrongRequest` where nobody agrees.
        """
        living = living_jobs()
        new = [one for one, job in runs if job.name not in living]
        if new and not self._agreed:
            self._ask_for(new[0], len(new) + later)
        lines = [(job, self._line(one) if one in new else ()) for one, job in runs]
        train_at_once(lines, living, self._here)

    def _ask_for(self, first: SeedRun, runs: int) -> None:
        arguments = self._arguments
        config = [] if arguments.config is None else ["--config", arguments.config]
        values = [word for word in arguments.overrides if not word.startswith(OF_THE_RUN)]
        plan = [LAUNCH, "plan", *config, *values]
        self._here.call([SKY, "check"], cwd=PROJECT)
        self._here.call([*plan, *([] if arguments.gpus else ["--write", str(self._task_file)])])
        price = price_of(json.loads(self._here.answer([*plan, "--json"])), arguments.gpus)
        self._here.call([LAUNCH, "check", *config, *first.overrides, "--gpus", price.gpus])
        agree(arguments, price, runs)
        self._agreed = True

    def _line(self, one: SeedRun) -> list[str]:
        arguments = self._arguments
        task = TEMPLATE if arguments.gpus else self._task_file
        config = _as_sent(arguments.config)
        environment = task_environment(one, config, self._config, task_settings(task))
        gpus = ["--gpus", arguments.gpus] if arguments.gpus else []
        return launch_line(str(task), one.run_id, environment, [*gpus, *words_of("--sky", arguments.sky)])


def _as_sent(config: str | None) -> str | None:
    """The config's path relative to the project's folder, which is sent to the machine; unchanged
    where it is outside.
    """
    if config is None or stays_here(config):
        return config
    path = typed_path(config).resolve()
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else config
