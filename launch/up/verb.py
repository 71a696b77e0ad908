"""`emotion-launch up`: from posts to a served classifier, in the order of time. Each step is a
command of its own, printed before it runs.

    emotion-launch up posts.csv --bucket s3://team                   SkyPilot's spot machines train
    emotion-launch up posts.csv --bucket s3://team --local           this machine's GPU or CPU does

Typed again it resumes at the step that is not done, on any machine: see `steps.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion_train.command_line import LAUNCH
from emotion_train.config import Config, load_config
from emotion_train.data.index import INDEX_KEY
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.processes.systems import require_system
from emotion_train.storage.open import open_store
from launch.plan.task_file import TEMPLATE
from launch.plan.verb import PROJECT
from launch.up.commands import Commands, Stopped, commands
from launch.up.jobs import UNDECIDED, alive, follow_line, launch_line, require_sky
from launch.up.steps import Places, Steps, final_of, is_begun, is_pulled

_RECIPE = "emotion_train/configs/mistral_small_3_1.yaml"
_SETTLING_S, _LOOK_S = 120.0, 5.0  # until SkyPilot has written down how a job ended


@dataclass(frozen=True)
class Price:
    """What a plan says of the machine that will be asked for; None is what it does not know."""

    gpus: str
    hours: float | None
    usd: float | None

    def __str__(self) -> str:
        hours = "a time that is not known" if self.hours is None else f"about {self.hours:.1f} hours"
        usd = "a price that is not known" if self.usd is None else f"about ${self.usd:,.2f}"
        return f"{self.gpus}, {hours}, {usd}"


def up(arguments: argparse.Namespace) -> int:
    """Returns 0 when the run is published, pulled and exported, else the exit code of the step that
    failed.

    Raises `WrongRequest` for what is missing, before anything is uploaded, and for a price above
    `--max-usd`.
    """
    steps = _steps(arguments)
    places = steps.places
    if arguments.local:
        require_system("run")
    else:
        require_sky()
    published = _look_before(places)
    try:
        with commands() as here:
            if not (arguments.local or published):
                here.call(["sky", "check"], cwd=PROJECT)
            here.call(steps.prepare())
            if not published:
                train = _train_here if arguments.local else _train_by_jobs
                train(arguments, steps, here)
            here.call(steps.show())
            _pull(steps, here)
            if not arguments.no_export:
                here.call(steps.export())
    except Stopped as stopped:
        print(
            f"{LAUNCH}: that step ended with {stopped.code}; the same command resumes at it",
            file=sys.stderr,
        )
        return stopped.code
    print("\n".join(_next_lines(places, exported=not arguments.no_export)))
    return 0


def _steps(arguments: argparse.Namespace) -> Steps:
    for key in ("data.url", "run.output_url"):
        if any(word.startswith(f"{key}=") for word in arguments.overrides):
            raise WrongRequest(f"{key} follows from --bucket and --name; leave it out.")
    if arguments.max_usd is not None and not 0 < arguments.max_usd < float("inf"):
        raise WrongRequest(f"--max-usd is {arguments.max_usd:g}; give a number of dollars above 0.")
    if not arguments.local and _is_out_of_reach(arguments.bucket):
        raise WrongRequest(
            f"--bucket is the folder {arguments.bucket}, which a cloud's machine does not reach; give"
            " s3://bucket/prefix, or --local to train on this machine."
        )
    for option in ("gpus", "sky", "max_usd", "yes"):
        if arguments.local and getattr(arguments, option):
            raise WrongRequest(
                f"--{option.replace('_', '-')} is for machines that SkyPilot finds; leave it out, or --local."
            )
    for word in arguments.overrides:
        if not arguments.local and any(letter.isspace() for letter in word):
            raise WrongRequest(
                f"{word!r} holds white space, at which a task's OVERRIDES are split; write it without, or put"
                " it into a file for --config."
            )
    config = arguments.config or (None if arguments.local else _RECIPE)
    own = ["data.url=not-yet", "run.output_url=not-yet"]
    given: Config = load_config(config, [*own, *arguments.overrides])
    overrides = tuple(word for word in arguments.overrides if not word.startswith("run.id="))
    places = Places.of(arguments.bucket, arguments.name, given.run.id, arguments.folder)
    return Steps(places, arguments.source, tuple(_words("--prepare", arguments.prepare)), config, overrides)


def _is_out_of_reach(bucket: str) -> bool:
    return "://" not in bucket


def _words(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise WrongRequest(f"{option} is {text!r}, which a shell could not read ({error}).") from None


def _look_before(places: Places) -> bool:
    """Whether the run is published; the first look at the bucket, which says what its credentials
    lack before anything is uploaded.
    """
    open_store(places.data_url).find(INDEX_KEY)
    return final_of(places) is not None


def _train_here(arguments: argparse.Namespace, steps: Steps, here: Commands) -> None:
    layout = ["--accelerate-config", arguments.accelerate_config] if arguments.accelerate_config else []
    here.call(steps.check(None) + layout)
    if _is_to_be_tried(arguments, steps.places):
        here.call(steps.run("--smoke", *layout))
    here.call(steps.run(*layout))


def _train_by_jobs(arguments: argparse.Namespace, steps: Steps, here: Commands) -> None:
    places = steps.places
    if (number := alive(places.name)) is not None:
        print(f"\njob {number}, {places.name}, is alive; following it", flush=True)
        _follow(places, number, here)
    if final_of(places) is not None:
        return
    price = _plan(arguments, steps, here)
    here.call(steps.check(price.gpus))
    _agree(arguments, price)
    if _is_to_be_tried(arguments, places):
        _start_job(arguments, steps, here, smoke=True)
    _start_job(arguments, steps, here, smoke=False)


def _follow(places: Places, number: int, here: Commands) -> None:
    """Follow a job to its end. Raises `Stopped` where it failed, and where SkyPilot left it."""
    try:
        here.call(follow_line(number), cwd=PROJECT)
    except Stopped as stopped:
        if stopped.code not in UNDECIDED or not _has_ended(places):
            raise


def _has_ended(places: Places) -> bool:
    """Whether the job's end comes to be known within two minutes, from the bucket or SkyPilot."""
    until = time.monotonic() + _SETTLING_S
    while final_of(places) is None and alive(places.name) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_S)
    return True


def _start_job(arguments: argparse.Namespace, steps: Steps, here: Commands, *, smoke: bool) -> None:
    """Start a job and follow it until its run is published. Raises `Stopped`, and
    `EmotionTrainError` for one that ended without.
    """
    try:
        here.call(_job(arguments, steps, smoke=smoke), cwd=PROJECT)
    except Stopped as stopped:
        if stopped.code not in UNDECIDED or final_of(steps.places, smoke=smoke) is None:
            raise
    _require_published(steps.places, smoke=smoke)


def _is_to_be_tried(arguments: argparse.Namespace, places: Places) -> bool:
    return not (arguments.no_smoke or is_begun(places) or final_of(places, smoke=True))


def _plan(arguments: argparse.Namespace, steps: Steps, here: Commands) -> Price:
    """Show the plan, write its task file, and return its best row."""
    written = [] if arguments.gpus else ["--write", str(steps.places.task_file.resolve())]
    here.call(steps.plan(*written))
    return price_of(json.loads(here.answer(steps.plan("--json"))), arguments.gpus)


def price_of(plan: dict[str, Any], gpus: str | None) -> Price:
    """The best row of `plan --json`, or that of the GPUs which are asked for: the cheaper of spot
    and on demand.
    """
    rows = [row for row in plan["choices"] if gpus is None or row["gpus"].lower() == gpus.lower()]
    if not rows:
        return Price(str(gpus), None, None)
    row = rows[0]
    known = [
        (usd, hours)
        for usd, hours in ((row["usd_spot"], row["hours_on_spot"]), (row["usd_on_demand"], row["hours"]))
        if usd is not None
    ]
    usd, hours = min(known, default=(None, row["hours"]))
    return Price(row["gpus"], hours, usd)


def _agree(arguments: argparse.Namespace, price: Price) -> None:
    """Raises `WrongRequest` unless the price is within `--max-usd` and somebody agrees to it."""
    if arguments.max_usd is not None:
        if price.usd is None:
            raise WrongRequest(
                f"The price of {price.gpus} is not known, so --max-usd {arguments.max_usd:g} cannot be kept;"
                " name other --gpus, or leave --max-usd out."
            )
        if price.usd > arguments.max_usd:
            raise WrongRequest(
                f"{price}: more than --max-usd {arguments.max_usd:g}. `emotion-launch plan --all` shows what"
                " is cheaper; nothing was started."
            )
    question = f"train on {price}"
    if arguments.yes:
        print(question, flush=True)
        return
    if not sys.stdin.isatty():
        raise WrongRequest(f"{question}: nobody can answer here; type --yes to agree. Nothing was started.")
    if input(f"{question}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise WrongRequest("Nothing was started.")


def _job(arguments: argparse.Namespace, steps: Steps, *, smoke: bool) -> list[str]:
    places = steps.places
    task = TEMPLATE if arguments.gpus else places.task_file.resolve()
    environment = {
        "DATA_URL": places.data_url,
        "OUTPUT_URL": places.output_url,
        "CONFIG": str(steps.config),
        "OVERRIDES": " ".join([f"run.id={places.run_id}", *_settings(task), *steps.overrides]),
        **({"SMOKE": "1"} if smoke else {}),
    }
    gpus = ["--gpus", arguments.gpus] if arguments.gpus else []
    more = [*gpus, *_words("--sky", arguments.sky)]
    return launch_line(str(task), places.name, environment, more)


def _settings(task: Path) -> list[str]:
    """The values that `plan --write` gave to the task, which ours would replace."""
    from emotion_train.edges.bounded import yaml_in

    envs = yaml_in(task.read_text(encoding="utf-8")).get("envs") or {}
    return str(envs.get("OVERRIDES") or "").split()


def _require_published(places: Places, *, smoke: bool = False) -> None:
    if final_of(places, smoke=smoke) is None:
        what = f"the try-out of {places.run_url}" if smoke else places.run_url
        raise EmotionTrainError(
            f"The job {places.name} ended or was left, and {what} is not published; `sky jobs queue --all`"
            " and `sky jobs logs` say how it ended. The same command follows it, or starts it again."
        )


def _pull(steps: Steps, here: Commands) -> None:
    places = steps.places
    final = final_of(places)
    if final is not None and is_pulled(final, places.adapter):
        print(f"\n{places.adapter} holds the published adapter, byte for byte", flush=True)
    else:
        here.call(steps.pull())


def _next_lines(places: Places, *, exported: bool) -> list[str]:
    lines = [
        "",
        f"report   {places.adapter / 'report' / 'report.html'}",
        f'predict  emotion-train predict --adapter {places.adapter} "what a lovely mess"',
    ]
    lines.append(f"label    emotion-train label POSTS {places.labelled_url} --adapter {places.run_url}")
    if exported:
        lines.append(f"serve    docs/guides/serve.md has the lines of vLLM for {places.export_url}")
    return lines
