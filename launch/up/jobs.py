"""SkyPilot as a program beside this one: finds it, lists our living jobs, starts and follows a job.

SkyPilot is never imported: it has an environment of its own (docs/start/spot.md), and its output
goes to the terminal unchanged.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion_train.console import shown
from emotion_train.edges.bounded import yaml_in
from emotion_train.errors import EmotionTrainError, WrongRequest
from launch.plan.verb import PROJECT
from launch.up.commands import Commands, Stopped

SKY = "sky"
# the machine needs them to reach the same bucket; its keys are secrets, which only a person may
# pass on
_HANDED_ON = ("AWS_ENDPOINT_URL", "AWS_REGION")
# exit codes of `sky jobs launch` and `logs` where they left the job, or where it ended a moment
# before SkyPilot recorded that: sky.exceptions.JobExitCode NOT_FINISHED and NOT_FOUND
UNDECIDED = (101, 102)
_SETTLING_S, _LOOK_S = 120.0, 5.0  # until SkyPilot has recorded how a job ended
_NONE = "No in-progress managed jobs"  # there was never a job, or its controller is stopped
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")


def require_sky() -> str:
    """The program's path; raises `WrongRequest` where there is none."""
    found = shutil.which(SKY)
    if found is None:
        raise WrongRequest(
            "SkyPilot's program `sky` is not on the PATH; install it in an environment of its own (pip"
            " install 'skypilot[aws]') and put that on the PATH, or type --local to train on this machine."
        )
    return found


def launch_line(
    task: str,
    name: str,
    environment: Mapping[str, str],
    more: Sequence[str],
    given: Mapping[str, str] = os.environ,
) -> list[str]:
    """The line of `sky jobs launch` for a task with the variables `environment`; a person's own
    options `more` come last and win.
    """
    handed_on = {name: given[name] for name in _HANDED_ON if given.get(name)}
    words = [f"{key}={value}" for key, value in {**environment, **handed_on}.items()]
    return [
        *(SKY, "jobs", "launch", "--yes", "--name", name, task),
        *(word for value in words for word in ("--env", value)),
        *more,
    ]


def follow_line(number: int) -> list[str]:
    return [SKY, "jobs", "logs", "--follow", str(number)]


def task_settings(task: Path) -> list[str]:
    """The overrides that `plan --write` put into the task; the OVERRIDES given at launch would
    replace them.
    """
    envs = yaml_in(task.read_text(encoding="utf-8")).get("envs") or {}
    return str(envs.get("OVERRIDES") or "").split()


def out_of_reach(url: str) -> bool:
    """Whether the URL is a local folder, which a cloud's machine does not reach."""
    return "://" not in url


def refuse_white_space(overrides: Sequence[str]) -> None:
    """Raises `WrongRequest` for a value with white space, which a task cannot be given."""
    for word in overrides:
        if any(letter.isspace() for letter in word):
            raise WrongRequest(
                f"{word!r} holds white space, at which a task's OVERRIDES are split; write it without, or put"
                " it into a file for --config."
            )


def words_of(option: str, text: str) -> list[str]:
    """The words of an option that takes several in one text; raises `WrongRequest` for a text that
    a shell could not split.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise WrongRequest(f"{option} is {text!r}, which a shell could not read ({error}).") from None


# --- jobs and their runs ---


@dataclass(frozen=True)
class Job:
    """A job of this `name`, and the run that it trains, which messages call `what`. `is_published`
    asks the bucket, which knows how the run ended where SkyPilot does not.
    """

    name: str
    what: str
    is_published: Callable[[], bool]

    def require_published(self) -> None:
        """Raises `EmotionTrainError` where the job is gone and its run is not published."""
        if not self.is_published():
            raise EmotionTrainError(
                f"The job {self.name} ended or was left, and {self.what} is not published; `sky jobs queue"
                " --all` and `sky jobs logs` say how it ended. The same command follows it, or starts it"
                " again."
            )


def train_at_once(
    lines: Sequence[tuple[Job, Sequence[str]]], living: Mapping[str, int], here: Commands
) -> None:
    """Start each job by its line, unless a job of its name is among the `living`, and follow the
    jobs one after the other until all their runs are published.

    Raises `Stopped` or `EmotionTrainError` at the first job that ends without publishing; the
    others keep running.
    """
    for job, line in lines:
        if (number := living.get(job.name)) is not None:
            print(f"\njob {number}, {job.name}, is alive", flush=True)
        else:
            here.call([*line, "--detach-run"], cwd=PROJECT)
    for job, _ in lines:
        if not job.is_published():
            follow_where_alive(job, here)
            job.require_published()


def follow_where_alive(job: Job, here: Commands) -> None:
    """Follow the job to its end, where it is alive. Raises `Stopped` where it failed, and where
    SkyPilot stopped following it.
    """
    if (number := alive(job.name)) is None:
        return
    print(f"\njob {number}, {job.name}, is alive; following it", flush=True)
    try:
        here.call(follow_line(number), cwd=PROJECT)
    except Stopped as stopped:
        if stopped.code not in UNDECIDED or not _has_ended(job):
            raise


def _has_ended(job: Job) -> bool:
    """Whether the bucket or SkyPilot shows within two minutes that the job has ended."""
    until = time.monotonic() + _SETTLING_S
    while not job.is_published() and alive(job.name) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_S)
    return True


# --- what SkyPilot says ---


def alive(name: str) -> int | None:
    """The newest number of a job of that name that has not ended, None where there is none; raises
    as `living_jobs` does.
    """
    return living_jobs().get(name)


def living_jobs() -> dict[str, int]:
    """The jobs that have not ended: the newest number for each name.

    Raises `EmotionTrainError` where SkyPilot does not answer: a second job beside a living one
    would be paid for twice.
    """
    line = [SKY, "jobs", "queue", "--skip-finished", "--output", "json"]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=False)
    if _NONE in done.stdout + done.stderr:
        return {}
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EmotionTrainError(
            f"`{' '.join(line)}` ended with {done.returncode}: {' '.join(last) or 'no message'}; which jobs"
            " are still alive is not known, and nothing was started."
        )
    return living(done.stdout)


def living(printed: str) -> dict[str, int]:
    """The newest number of each unfinished job's name in the output of `sky jobs queue`, which may
    begin with messages of a starting server, with brackets and colours in them.

    Raises `EmotionTrainError` where the output holds no list of jobs.
    """
    document = _json_in(printed)
    jobs = document.get("jobs", []) if isinstance(document, dict) else document
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise _not_understood(printed)
    newest: dict[str, int] = {}
    for job in jobs:
        if not str(job.get("status", "")).split(".")[-1].startswith(_ENDED):
            name = str(job.get("job_name"))
            newest[name] = max(int(job["job_id"]), newest.get(name, 0))
    return newest


def _json_in(printed: str) -> Any:
    """The first whole JSON list or object in a program's output."""
    plain = _COLOURS.sub("", printed)
    for begin in re.finditer(r"[\[{]", plain):
        with suppress(json.JSONDecodeError):
            found, _ = json.JSONDecoder().raw_decode(plain, begin.start())
            if isinstance(found, dict) or all(isinstance(one, dict) for one in found):
                return found
    raise _not_understood(printed)


def _not_understood(printed: str) -> EmotionTrainError:
    return EmotionTrainError(
        f"`sky jobs queue` printed no list of jobs ({shown(printed.strip()[-200:]) or 'nothing'}); which jobs"
        " are still alive is not known, and nothing was started."
    )
