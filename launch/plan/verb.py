"""`emotion-launch plan`, in the order of time: config, data set, base, prices, plan, task file,
table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from emotion_train.bases.encoders import ENCODER_PRECISIONS
from emotion_train.config import Config, Precision, load_config
from emotion_train.data.index import limited, read_index, require_slices, require_trainable
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from launch.plan.choices import Choice, Plan, make_plan, spot_of
from launch.plan.faster import faster_than
from launch.plan.prices import Prices, find_prices
from launch.plan.spot import Spot
from launch.plan.table import plan_json, print_plan
from launch.plan.task_file import what_the_list_is, write_task_file
from launch.workload import Work, precision_of_base, refuse_unfused_fp8, shape_of_base, work_of

_CLONE = Path(__file__).resolve().parents[2]
# the folder that SkyPilot sends to a machine: the clone, else the folder from which the task is
# launched
PROJECT = _CLONE if (_CLONE / "sky" / "train.yaml").is_file() else Path.cwd()
WHEELS = "emotion_train-*.whl"
_WRITTEN = 4  # kinds in a task file
_UNIT_MINUTES = 2.0  # that a preempted worker labels again
_WRITTEN_UP_TO = 2.0  # times the dollars of the best


def plan(arguments: argparse.Namespace) -> int:
    """Prints the plan, writes the task file where asked, and returns 0; raises `WrongRequest` when
    nothing fits.
    """
    _check_options(arguments)
    config = load_config(arguments.config, _words(arguments))
    store = open_store(config.data.url)
    index = limited(read_index(store), config.data.limit)
    require_trainable(index, config.loss.weighted_labels)
    require_slices(index, config.report.slices)
    shape = shape_of_base(config.model.base, config.model.layers)
    precision = precision_of_base(config.model.base, arguments.precision)
    if precision == "fp8":
        refuse_unfused_fp8(config, shape, "--precision ")
    if shape.is_encoder and precision not in (None, *ENCODER_PRECISIONS):
        raise WrongRequest(
            f"--precision is {precision} and {config.model.base} is an encoder, which is held in float32;"
            " type --precision bf16, or leave it out."
        )
    work = work_of(config, index, store, arguments.tokens_per_post)
    prices = find_prices(arguments.prices, arguments.cloud)
    spot = spot_of(config, Spot(arguments.preemptions_per_hour, arguments.startup_minutes))
    if arguments.label is not None:
        work, spot = work.to_label(arguments.label), replace(spot, checkpoint_minutes=_UNIT_MINUTES)
    made = make_plan(
        config, shape, work, prices, spot, precision=precision, within_hours=arguments.within_hours
    )
    if made.choices:
        made = replace(made, faster=faster_than(config, shape, work, made.choices[0], spot))
    if made.choices and arguments.write is not None:  # before anything is printed, whose reader may leave
        _write(arguments, config, shape, work, made, prices, spot)
    _show(arguments, made, config, work, prices, spot)
    if not made.choices:
        does = "trains" if arguments.label is None else "labels by"
        limit = f" within {arguments.within_hours:g} hours" if arguments.within_hours is not None else ""
        raise WrongRequest(
            f"None of the GPUs {does} {config.model.base}{limit}; allow more --within-hours, try another"
            " --precision, or take a smaller model.base."
        )
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    for option, value in (
        ("--within-hours", arguments.within_hours),
        ("--tokens-per-post", arguments.tokens_per_post),
    ):
        if value is not None and not 0 < value < math.inf:
            raise WrongRequest(f"{option} is {value:g}; give a number above 0.")
    if arguments.label is not None and arguments.write is not None:
        raise WrongRequest(
            "--write is for a training's task and --label plans none; take the GPUs by --gpus of `sky jobs"
            " launch sky/label.yaml`."
        )
    if arguments.precision is not None and arguments.precision not in get_args(Precision):
        raise WrongRequest(
            f"--precision is {arguments.precision!r}; allowed are {', '.join(get_args(Precision))}."
        )
    if not 0 <= arguments.preemptions_per_hour < 60 or not 0 <= arguments.startup_minutes < 1000:
        raise WrongRequest(
            "--preemptions-per-hour has to be from 0 to 60 and --startup-minutes from 0 to 1000."
        )


def _words(arguments: argparse.Namespace) -> list[str]:
    """The overrides, with the output's URL filled in: a plan never opens the output."""
    words = ["run.output_url=not-looked-at", *arguments.overrides]
    if arguments.data is not None:
        if (other := next((word for word in words if word.startswith("data.url=")), None)) is not None:
            raise WrongRequest(
                f"--data {arguments.data} and {other} name the data set twice; give one of them."
            )
        words.append(f"data.url={arguments.data}")
    return words


def _show(
    arguments: argparse.Namespace, found: Plan, config: Config, work: Work, prices: Prices, spot: Spot
) -> None:
    if arguments.json:
        print(plan_json(found, config, work, prices, spot))
        return
    from launch.results.pages import a_console

    print_plan(found, config, work, prices, spot, a_console(), arguments.all)


def _write(
    arguments: argparse.Namespace,
    config: Config,
    shape: Shape,
    work: Work,
    found: Plan,
    prices: Prices,
    spot: Spot,
) -> None:
    best = found.choices[0]
    chosen = _same_precision(config, shape, work, best, prices, spot, arguments.within_hours)
    given = [word for word in arguments.overrides if not word.startswith(("data.url=", "run.output_url="))]
    settings = best.settings()
    replaced = {word.partition("=")[0] for word in settings}
    words = [word for word in given if word.partition("=")[0] not in replaced] + settings
    about = what_the_list_is(best, prices, work.train_posts)
    write_task_file(arguments.write, chosen, words, arguments.config, about=about, complete=prices.complete)
    named = ", ".join(choice.name for choice in chosen)
    print(f"{arguments.write}: {named}, {' '.join(words)}", file=sys.stderr)
    if not (PROJECT / "requirements.lock").is_file() and not list(PROJECT.glob(WHEELS)):
        print(
            "note: a machine gets this program from the folder where the task is launched, and"
            f" {PROJECT} holds neither a clone of it nor its wheel; put the {WHEELS} file that you installed"
            " there.",
            file=sys.stderr,
        )
    for option, path in (("--config", arguments.config), ("model.base", config.model.base)):
        if path is not None and stays_here(path):
            remedy = (
                "copy it into that folder"
                if option == "--config"
                else "give a hub id, or the URL of emotion-train stage-base"
            )
            print(
                f"note: {option} is {path}, which is outside of {PROJECT} and so is not sent to a"
                f" cloud's machine; {remedy}.",
                file=sys.stderr,
            )


def stays_here(path: str) -> bool:
    """Whether this is a file or folder outside of the project's folder, so that SkyPilot does not
    send it.
    """
    return typed_path(path).exists() and not typed_path(path).resolve().is_relative_to(PROJECT)


def _same_precision(
    config: Config,
    shape: Shape,
    work: Work,
    best: Choice,
    prices: Prices,
    spot: Spot,
    within_hours: float | None,
) -> Sequence[Choice]:
    """The best choice and the next cheapest with its precision: a task has one set of values for
    all its GPUs.
    """
    made = make_plan(config, shape, work, prices, spot, precision=best.precision, within_hours=within_hours)
    others = [one for one in made.choices if one.name != best.name]
    if best.usd is None:  # larger ones are dearer, and nobody knows by how much
        return [best, *(one for one in others if one.count == best.count)][:_WRITTEN]
    return [best, *(one for one in others if one.usd is not None and one.usd <= _WRITTEN_UP_TO * best.usd)][
        :_WRITTEN
    ]
