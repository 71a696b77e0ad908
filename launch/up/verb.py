"""`emotion-launch up`: from posts to a served classifier, in the order of time. Each step is a
command of its own, printed before it is run.

    emotion-launch up posts.csv --bucket s3://team                   SkyPilot's spot machines train
    emotion-launch up posts.csv --bucket s3://team --local           this machine's GPU or CPU does

The same command resumes at the first step that is not done, on any machine: see `steps.py`.
"""

from __future__ import annotations

import argparse
import json
import sys

from emotion_train.command_line import LAUNCH
from emotion_train.config import Config, load_config
from emotion_train.data.index import INDEX_KEY
from emotion_train.errors import WrongRequest
from emotion_train.processes.systems import require_system
from emotion_train.runs.question import same_question_as_published
from emotion_train.storage.open import open_store
from launch.plan.task_file import TEMPLATE
from launch.plan.verb import PROJECT
from launch.up.commands import Commands, Stopped, commands
from launch.up.jobs import (
    UNDECIDED,
    Job,
    follow_where_alive,
    launch_line,
    out_of_reach,
    refuse_white_space,
    require_sky,
    task_settings,
    words_of,
)
from launch.up.price import Price, agree, price_of, refuse_wrong_options
from launch.up.steps import Places, Steps, final_of, is_begun, is_pulled

_RECIPE = "emotion_train/configs/mistral_small_3_1.yaml"


def up(arguments: argparse.Namespace) -> int:
    """Returns 0 when the run is published, pulled and exported, else the exit code of the step that
    failed.

    Raises `WrongRequest` for wrong or missing options, before anything is uploaded, and for a price
    above `--max-usd`.
    """
    steps = _steps(arguments)
    places = steps.places
    if arguments.local:
        require_system("run")
    else:
        require_sky()
    published = _look_before(steps)
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
    refuse_wrong_options(arguments, not arguments.local, "--local")
    if not arguments.local and out_of_reach(arguments.bucket):
        raise WrongRequest(
            f"--bucket is the folder {arguments.bucket}, which a cloud's machine does not reach; give"
            " s3://bucket/prefix, or --local to train on this machine."
        )
    if not arguments.local:
        refuse_white_space(arguments.overrides)
    config = arguments.config or (None if arguments.local else _RECIPE)
    own = ["data.url=not-yet", "run.output_url=not-yet"]
    given: Config = load_config(config, [*own, *arguments.overrides])
    overrides = tuple(word for word in arguments.overrides if not word.startswith("run.id="))
    places = Places.of(arguments.bucket, arguments.name, given.run.id, arguments.folder)
    return Steps(places, arguments.source, tuple(words_of("--prepare", arguments.prepare)), config, overrides)


def _look_before(steps: Steps) -> bool:
    """Whether the run is published. This first look at the bucket finds wrong credentials before
    anything is uploaded. Raises `WrongRequest` where it was published with another request.
    """
    places = steps.places
    open_store(places.data_url).find(INDEX_KEY)
    if (final := final_of(places)) is None:
        return False
    config = load_config(steps.config, steps.values)
    store = open_store(places.output_url)
    for words in same_question_as_published(store, places.run_id, final, config):
        print(f"{LAUNCH}: {places.run_url} was published with another {words}", file=sys.stderr)
    return True


def _train_here(arguments: argparse.Namespace, steps: Steps, here: Commands) -> None:
    layout = ["--accelerate-config", arguments.accelerate_config] if arguments.accelerate_config else []
    here.call(steps.check(None) + layout)
    if _is_to_be_tried(arguments, steps.places):
        here.call(steps.run("--smoke", *layout))
    here.call(steps.run(*layout))


def _train_by_jobs(arguments: argparse.Namespace, steps: Steps, here: Commands) -> None:
    job = _job_of(steps.places)
    follow_where_alive(job, here)
    if job.is_published():
        return
    price = _plan(arguments, steps, here)
    here.call(steps.check(price.gpus))
    agree(arguments, price)
    if _is_to_be_tried(arguments, steps.places):
        _start_job(arguments, steps, here, smoke=True)
    _start_job(arguments, steps, here, smoke=False)


def _start_job(arguments: argparse.Namespace, steps: Steps, here: Commands, *, smoke: bool) -> None:
    """Start a job and follow it until its run is published. Raises `Stopped` where the command
    failed, and `EmotionTrainError` where the job ended without publishing.
    """
    job = _job_of(steps.places, smoke=smoke)
    try:
        here.call(_job(arguments, steps, smoke=smoke), cwd=PROJECT)
    except Stopped as stopped:
        if stopped.code not in UNDECIDED or not job.is_published():
            raise
    job.require_published()


def _job_of(places: Places, *, smoke: bool = False) -> Job:
    what = f"the try-out of {places.run_url}" if smoke else places.run_url
    return Job(places.name, what, lambda: final_of(places, smoke=smoke) is not None)


def _is_to_be_tried(arguments: argparse.Namespace, places: Places) -> bool:
    return not (arguments.no_smoke or is_begun(places) or final_of(places, smoke=True))


def _plan(arguments: argparse.Namespace, steps: Steps, here: Commands) -> Price:
    """Show the plan, write its task file, and return its best row."""
    written = [] if arguments.gpus else ["--write", str(steps.places.task_file.resolve())]
    here.call(steps.plan(*written))
    return price_of(json.loads(here.answer(steps.plan("--json"))), arguments.gpus)


def _job(arguments: argparse.Namespace, steps: Steps, *, smoke: bool) -> list[str]:
    places = steps.places
    task = TEMPLATE if arguments.gpus else places.task_file.resolve()
    environment = {
        "DATA_URL": places.data_url,
        "OUTPUT_URL": places.output_url,
        "CONFIG": str(steps.config),
        "OVERRIDES": " ".join([f"run.id={places.run_id}", *task_settings(task), *steps.overrides]),
        **({"SMOKE": "1"} if smoke else {}),
    }
    gpus = ["--gpus", arguments.gpus] if arguments.gpus else []
    more = [*gpus, *words_of("--sky", arguments.sky)]
    return launch_line(str(task), places.name, environment, more)


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
