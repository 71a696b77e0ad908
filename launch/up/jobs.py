"""SkyPilot as a program beside this one: is it there, is a job of ours alive, start one and follow
it.

SkyPilot is never imported: it lives in an environment of its own (docs/start/spot.md), and what it
prints goes to the terminal as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from emotion_train.errors import EmotionTrainError, WrongRequest
from launch.plan.verb import PROJECT

SKY = "sky"
# the bucket is the same one for the machine; its keys are secrets, which only a person may hand on
_HANDED_ON = ("AWS_ENDPOINT_URL", "AWS_REGION")
# what `sky jobs launch` and `logs` end with where they left the job, or saw it end a moment before
# SkyPilot wrote that down: sky.exceptions.JobExitCode NOT_FINISHED and NOT_FOUND
UNDECIDED = (101, 102)
_NONE = "No in-progress managed jobs"  # there was never a job, or its controller has gone to rest
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
    """`sky jobs launch` of a task, whose `environment` are its own variables; `more` are a person's
    words, which come last and win.
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


def alive(name: str) -> int | None:
    """The number of a job of that name which has not ended, None where there is none.

    Raises `EmotionTrainError` where SkyPilot does not answer: a second job beside a living one
    would be paid for twice.
    """
    line = [SKY, "jobs", "queue", "--skip-finished", "--output", "json"]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode != 0 and _NONE in done.stdout + done.stderr:
        return None
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EmotionTrainError(
            f"`{' '.join(line)}` ended with {done.returncode}: {' '.join(last) or 'no word'}; whether a job"
            f" {name} is still alive is not known, and nothing was started."
        )
    return living(done.stdout, name)


def living(printed: str, name: str) -> int | None:
    """The newest job of that name in what `sky jobs queue` printed, which may begin with lines that
    are no JSON.
    """
    begin = min((place for mark in "[{" if (place := printed.find(mark)) >= 0), default=None)
    if begin is None:
        return None
    document: Any = json.loads(printed[begin:])
    jobs = document.get("jobs", []) if isinstance(document, dict) else document
    numbers = [
        int(job["job_id"])
        for job in jobs
        if job.get("job_name") == name and not str(job.get("status", "")).split(".")[-1].startswith(_ENDED)
    ]
    return max(numbers, default=None)
