"""`emotion-launch`: plan and check a run, start it on this machine or on each node, list and show
runs, pull adapters.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from emotion_train.edges.streams import LOG_VARIABLE, go_to, hold, text_is_the_result
from emotion_train.errors import EXIT_CODES, exit_code
from launch.plan.choices import Spot
from launch.run.choice import accelerate_line, ask_for_base, choose, printable

_PLANNING = """Compares kinds and numbers of GPUs for a run: whether the base fits, with which
precision and micro-batch, how many posts a second, how many hours, and dollars on spot (expected
preemptions and recoveries included) and on demand. Nothing is started."""


def main(argv: Sequence[str] | None = None) -> int:
    hold("emotion-launch")
    arguments = _parse(argv)
    return exit_code("emotion-launch", lambda: int(arguments.verb(arguments)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """`section.field=value` words may stand before, between and after the options; argparse takes
    one row of them only.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (
        hasattr(arguments, "overrides") and all("=" in word and not word.startswith("-") for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emotion-launch",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    run = verbs.add_parser(
        "run",
        help=(
            "start the training by accelerate launch; with several nodes (SkyPilot, srun) it is started on"
            " each"
        ),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(run)
    run.add_argument(
        "--allow-unfenced",
        action="store_true",
        help=(
            "train also on a store that ignores create-only writes: nothing then keeps two writers of one run"
            " apart"
        ),
    )
    run.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="processes on each node (default: one for each visible GPU; one on the CPU)",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print the accelerate launch line and start nothing"
    )
    run.set_defaults(verb=_run)

    _add_plan(
        verbs.add_parser(
            "plan",
            help="which GPUs would train this, how long and for how many dollars",
            description=_PLANNING,
        )
    )

    check = verbs.add_parser(
        "check", help="look at config, data, output, credentials, base and GPU without loading anything"
    )
    _add_config(check)
    check.add_argument(
        "--gpus",
        metavar="NAME:COUNT",
        help="the machine that will train, as SkyPilot names it (default: this one)",
    )
    check.add_argument(
        "--hours",
        type=float,
        metavar="H",
        help="how long the run will take, by `emotion-launch plan`: credentials must last",
    )
    check.set_defaults(verb=_check)

    runs = verbs.add_parser("runs", help="list the runs below an output URL")
    runs.add_argument("output_url", metavar="OUTPUT_URL", help="s3://bucket/prefix or a folder")
    runs.set_defaults(verb=_runs)

    show = verbs.add_parser(
        "show", help="one run from its log: starts, preemptions, fall-backs, checkpoints, scores"
    )
    show.add_argument("run_url", metavar="OUTPUT_URL/RUN_ID", help="a run that `emotion-launch runs` lists")
    show.add_argument(
        "--watch",
        action="store_true",
        help="follow it until it is published; Ctrl-C ends the watching, not the run",
    )
    show.add_argument(
        "--every",
        type=float,
        default=10,
        metavar="S",
        help="seconds between two looks at the bucket (default: %(default)g)",
    )
    show.set_defaults(verb=_show)

    pull = verbs.add_parser("pull", help="download a published adapter, verified by sha256")
    pull.add_argument(
        "run_url", metavar="OUTPUT_URL/RUN_ID", help="a run that `emotion-launch runs` lists as published"
    )
    pull.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="new folder for the adapter; its report/ holds the report",
    )
    pull.add_argument(
        "--with-training-filter",
        action="store_true",
        help=(
            "also the filter of the training texts, by which `emotion-train evaluate --file` finds posts that"
            " were trained on where the run is out of reach. Left out by default: whoever has it can ask of"
            " any text whether it was trained on"
        ),
    )
    pull.set_defaults(verb=_pull)
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--config",
        metavar="FILE",
        help="run config in YAML (default: the defaults, which are the recipe of the 24B model)",
    )
    plan.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="values that win over the file"
    )
    plan.add_argument("--data", metavar="URL", help="the data set; the same as data.url=URL")
    plan.add_argument(
        "--prices",
        type=Path,
        metavar="FILE",
        help="vms.csv of SkyPilot's catalog or `sky gpus list -o json`, for its own",
    )
    plan.add_argument(
        "--cloud",
        action="append",
        default=[],
        metavar="NAME",
        help="prices of this cloud only; may be given several times",
    )
    plan.add_argument(
        "--precision", metavar="NAME", help="of the frozen base (default: the fastest that fits)"
    )
    plan.add_argument("--within-hours", type=float, metavar="H", help="leave out what takes longer")
    plan.add_argument(
        "--tokens-per-post",
        type=float,
        metavar="N",
        help="mean length, instead of a sample by the base's tokenizer",
    )
    plan.add_argument(
        "--preemptions-per-hour",
        type=float,
        default=Spot.preemptions_per_hour,
        metavar="R",
        help="expected of a spot machine (default: %(default)g)",
    )
    plan.add_argument(
        "--startup-minutes",
        type=float,
        default=Spot.startup_minutes,
        metavar="M",
        help="new machine, set-up and loading, at each start (default: %(default)g)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="also write a SkyPilot task with these GPUs; the rest of it as in sky/train.yaml",
    )
    plan.set_defaults(verb=_plan)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="run config in YAML (emotion_train/configs/ has examples)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="values that win over the file"
    )
    parser.add_argument(
        "--accelerate-config",
        metavar="FILE",
        help="accelerate config, a path or a name in accelerate_configs/ (default: by the GPUs)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from emotion_train.processes.systems import require_system

    require_system("run")
    from emotion_train.config import load_config
    from emotion_train.processes.notices import hold_seconds
    from emotion_train.training.job import output_log
    from launch.run.processes import run_to_end, wait_for_answer
    from launch.run.topology import gpus

    config = load_config(arguments.config, arguments.overrides)
    hold_s = hold_seconds(config.preemption.hold_s, os.environ)
    found = gpus()
    # the choice of a layout needs the base's shape
    if found and arguments.accelerate_config is None and not arguments.dry_run:
        wait_for_answer(ask_for_base(config), hold_s)
    choice = choose(found, arguments.accelerate_config, config, processes=arguments.processes)
    topology = choice.topology
    line = accelerate_line(
        choice.config_file,
        arguments.config,
        arguments.overrides,
        arguments.allow_unfenced,
        topology,
        config.distributed.timeout_s,
    )
    print(f"{choice.config_file.stem}: {choice.reason}\n{printable(line)}", flush=True)
    if arguments.dry_run:
        return 0
    log = output_log(config)
    go_to(log)
    environment = dict(os.environ)
    if log is not None:
        environment[LOG_VARIABLE] = str(log)
        if not sys.stderr.isatty():  # a pipe may close, and then it is too late to say so
            print(f"emotion-launch: should nobody read this any more, it goes on in {log}", file=sys.stderr)
    if topology.on_cpu:  # accelerate would take the physical cores, with a warning
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // topology.processes_per_node))
        )
    return run_to_end(line, environment, hold_s)


def _plan(arguments: argparse.Namespace) -> int:
    from launch.plan.verb import plan

    text_is_the_result()
    return plan(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from emotion_train.console import Terminal
    from emotion_train.errors import WrongRequest
    from launch.check.checks import check_all
    from launch.run.topology import gpus

    if arguments.hours is not None and not 0 < arguments.hours < math.inf:
        raise WrongRequest(f"--hours is {arguments.hours:g}; give a number above 0.")
    console = Terminal(highlight=False, soft_wrap=True)
    all_ok = True
    for check in check_all(
        arguments.config,
        arguments.overrides,
        gpus(),
        arguments.accelerate_config,
        wanted_gpus=arguments.gpus,
        hours=arguments.hours,
    ):
        all_ok = all_ok and check.ok
        mark = (
            "[red]wrong[/]" if not check.ok else "[yellow]warn[/] " if check.doubtful else "[green]ok[/]   "
        )
        console.print(f"{mark} {check.name:<11} ", end="")
        console.print(" ".join(check.finding.split()), markup=False)
    return 0 if all_ok else 2


def _runs(arguments: argparse.Namespace) -> int:
    from emotion_train.storage.open import open_store
    from launch.results.pages import a_console, print_runs

    text_is_the_result()
    print_runs(open_store(arguments.output_url), a_console())
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from emotion_train.errors import WrongRequest
    from emotion_train.runs.published import split_run_url
    from emotion_train.storage.open import open_store
    from launch.results.pages import a_console, show, watch

    text_is_the_result()
    if not arguments.every > 0:
        raise WrongRequest(f"--every is {arguments.every:g}; give seconds above 0.")
    output_url, run_id = split_run_url(arguments.run_url)
    store = open_store(output_url)
    if arguments.watch:
        watch(store, run_id, arguments.every, a_console())
    else:
        show(store, run_id, a_console())
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from launch.results.pull import run

    return run(arguments.run_url, arguments.to, arguments.with_training_filter)


if __name__ == "__main__":
    sys.exit(main())
