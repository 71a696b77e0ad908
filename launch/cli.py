"""`emotion-launch`: plan and check a run, start it on this machine or on each node, list and show
runs, pull adapters.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

from emotion_train.cli import VERBS as TRAIN_VERBS
from emotion_train.command_line import (
    LAUNCH,
    LAUNCH_VERBS,
    add_program_options,
    codes_of,
    end_at_once,
    parse,
    require_verb,
)
from emotion_train.edges.command_errors import Parser
from emotion_train.edges.paths import path_here
from emotion_train.edges.streams import LOG_VARIABLE, go_to, hold, text_is_the_result
from emotion_train.errors import (
    EXIT_CODES,
    WrongRequest,
    add_traceback_option,
    exit_code,
    guarded,
    without_traceback_option,
)
from launch.plan.spot import Spot

_LONGEST_PAUSE_S = 86400
_PLANNING = """Compares kinds and numbers of GPUs for a run: whether the base fits, the fastest
precision and micro-batch, posts a second, hours, and dollars on spot (expected preemptions and
recoveries included) and on demand. Starts nothing."""


_COMPARING = """Compares runs that were scored on the same posts, each with the first: macro-F1 with
the interval of the difference, labels, posts that flipped, calibration, dollars, speed, and the
differences in config, data and versions. Refuses runs that were scored on other posts."""


_PUSHING = """Uploads a published adapter with its model card to a model repository of the Hugging
Face hub, in one commit, by the hub's own client. The token comes from HF_TOKEN and needs write
permission. The report and the predictions, which hold texts of posts, are not uploaded."""


_DISTILLING = """Trains teachers on folds of the training posts, SEEDS for each fold. Every post
gets shares: the mean probabilities of the teachers that did not see it, mixed with its own label.
One adapter is trained on the shares. Data sets and runs that exist are not made again, so the same
command resumes."""


_ALL_STEPS = """Prepares the posts into the bucket, checks, plans, shows the price and asks, tries
the run out, trains it by `sky jobs launch` or on this machine, shows the report, pulls the adapter
and exports it. It prints each step as a command that can also be typed alone. The same command
resumes at the first step that is not done, as the bucket shows."""


def main(argv: Sequence[str] | None = None) -> int:
    hold(LAUNCH)
    end_at_once()
    words, show = without_traceback_option(sys.argv[1:] if argv is None else argv)
    if code := exit_code(
        LAUNCH, lambda: require_verb(LAUNCH, words, LAUNCH_VERBS, TRAIN_VERBS), show_traceback=show
    ):
        return code
    arguments = guarded(LAUNCH, lambda: parse(_parser(), words), show_traceback=show)
    arguments.traceback = show
    return exit_code(LAUNCH, lambda: int(arguments.verb(arguments)), show_traceback=show)


def _parser() -> Parser:
    parser = Parser(
        prog=LAUNCH,
        description=(
            "Plan and check a run, start it on this machine or on each node, list and show runs, pull"
            " adapters. Each verb has its own --help."
        ),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_program_options(parser)
    add_traceback_option(parser)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, summary: str, description: str = "") -> argparse.ArgumentParser:
        whole = description or f"{summary[0].upper()}{summary[1:]}."
        return verbs.add_parser(name, help=summary, description=whole, epilog=codes_of(LAUNCH, name))

    run = verb(
        "run",
        "start the training by accelerate launch; with several nodes (SkyPilot, srun) start it on each",
    )
    _add_config(run)
    run.add_argument(
        "--allow-unfenced",
        action="store_true",
        help=(
            "train also on a store that ignores create-only writes, where nothing keeps two writers of one"
            " run apart"
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
    run.add_argument(
        "--smoke",
        action="store_true",
        help=(
            "try the run out, under RUN_ID-smoke: ten steps on real data, one evaluation, one checkpoint, a"
            " second start that resumes, the report; then print the whole run's estimated hours and cost"
        ),
    )
    run.add_argument(
        "--seeds",
        metavar="N or LIST",
        help=(
            "train one run for each seed, RUN_ID-seed-N, and compare them at the end: 3 = three seeds from"
            " run.seed on, 1,5,9 = these seeds; with --dry-run also print the lines that start them as jobs"
        ),
    )
    run.add_argument(
        "--spread",
        action="store_true",
        help="with --seeds: each run on one GPU of this machine, one run for each GPU at once (default: one"
        " after the other, each on all GPUs)",
    )
    _add_at_once(run)
    run.set_defaults(verb=_run)

    _add_plan(verb("plan", "which GPUs would train this, how long and for how many dollars", _PLANNING))

    check = verb("check", "check config, data, output, credentials, base and GPU without loading a weight")
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
        help="hours that the credentials must last (default: the estimate of `emotion-launch plan`)",
    )
    check.set_defaults(verb=_check)

    runs = verb("runs", "list the runs below an output URL")
    runs.add_argument("output_url", metavar="OUTPUT_URL", help="s3://bucket/prefix or a folder")
    runs.set_defaults(verb=_runs)

    show = verb("show", "one run from its log: starts, preemptions, fall-backs, checkpoints, scores")
    show.add_argument("run_url", metavar="OUTPUT_URL/RUN_ID", help="a run that `emotion-launch runs` lists")
    show.add_argument(
        "--watch",
        action="store_true",
        help="follow the run until it is published; Ctrl-C ends the watching, not the run",
    )
    show.add_argument(
        "--every",
        type=float,
        default=10,
        metavar="S",
        help="seconds between two looks at the bucket (default: %(default)g)",
    )
    show.set_defaults(verb=_show)

    status = verb("label-status", "how far a labelling job is: units, posts a second, finish, dollars")
    status.add_argument("out_url", metavar="OUT_URL", help="the OUT_URL of `emotion-train label`")
    status.add_argument(
        "--watch",
        action="store_true",
        help="print it again until the job is done; Ctrl-C ends the watching, not the job",
    )
    status.add_argument(
        "--every",
        type=float,
        default=30,
        metavar="S",
        help="seconds between two looks at the bucket (default: %(default)g)",
    )
    status.set_defaults(verb=_label_status)

    _add_compare(
        verb(
            "compare",
            "runs on the same posts: which is better beyond chance, by how much, and what differs",
            _COMPARING,
        )
    )

    pull = verb("pull", "download a published adapter, verified by sha256")
    pull.add_argument(
        "run_url", metavar="OUTPUT_URL/RUN_ID", help="a run that `emotion-launch runs` lists as published"
    )
    pull.add_argument(
        "--to",
        type=path_here,
        required=True,
        metavar="FOLDER",
        help="new folder for the adapter; its report/ holds the report",
    )
    pull.add_argument(
        "--with-training-filter",
        action="store_true",
        help=(
            "also download the filter of the training texts: where the run is out of reach, `emotion-train"
            " evaluate --file` finds posts that were trained on by it. Left out by default, because whoever"
            " has it can test whether a text was trained on"
        ),
    )
    pull.set_defaults(verb=_pull)
    _add_push(verb("push", "upload a published adapter with its card to the Hugging Face hub", _PUSHING))
    _add_up(verb("up", "from posts to a served classifier: every step in one command", _ALL_STEPS))
    _add_distil(
        verb(
            "distil",
            "train one adapter that answers like several: teachers on folds, then a student on their shares",
            _DISTILLING,
        )
    )
    for page in verbs.choices.values():
        add_traceback_option(page)
    return parser


def _add_distil(distil: argparse.ArgumentParser) -> None:
    _add_config(distil)
    distil.add_argument(
        "--folds",
        type=_positive,
        default=3,
        metavar="K",
        help="parts of the training posts; a teacher is trained on all but one (default: %(default)s)",
    )
    distil.add_argument(
        "--seeds",
        default="2",
        metavar="N or LIST",
        help="seeds of each fold's teachers, as in `run --seeds`; 1 is allowed too (default: %(default)s)",
    )
    distil.add_argument(
        "--own",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share that a post's own label keeps; the rest comes from the teachers (default: %(default)g)",
    )
    distil.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="section.field=value",
        help="a value for the student alone, such as model.layers=0.5; may be given several times",
    )
    distil.add_argument(
        "--to",
        metavar="URL",
        help="where the data sets go, s3://bucket/prefix or a folder (default: DATA_URL-distil/RUN_ID)",
    )
    distil.add_argument(
        "--spread",
        action="store_true",
        help="each run on one GPU of this machine, one run for each GPU at once (default: one after the"
        " other, each on all GPUs)",
    )
    _add_at_once(distil)
    distil.add_argument(
        "--as-jobs",
        action="store_true",
        help="each run as a job of SkyPilot on a machine of its own, all teachers at once; jobs that are"
        " alive are followed, so the same command resumes",
    )
    _add_machine(distil, "with --as-jobs: machine to train on")
    distil.add_argument("--dry-run", action="store_true", help="print what would be made, and make nothing")
    distil.add_argument("--allow-unfenced", action="store_true", help="as in `run`, for each training")
    distil.set_defaults(verb=_distil, processes=None)


def _add_at_once(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at-once",
        type=_positive,
        default=1,
        metavar="N",
        help="with --spread: runs at once on each GPU, for small bases (default: %(default)s)",
    )


def _add_machine(parser: argparse.ArgumentParser, machine: str) -> None:
    """Adds the options that choose a machine of SkyPilot's; `machine` begins the help of --gpus."""
    parser.add_argument(
        "--gpus",
        metavar="NAME:COUNT",
        help=f"{machine} (default: the best of `emotion-launch plan`)",
    )
    parser.add_argument(
        "--max-usd", type=float, metavar="D", help="start nothing whose estimated price is above D dollars"
    )
    parser.add_argument("--yes", action="store_true", help="agree to the price without being asked")
    parser.add_argument(
        "--sky",
        default="",
        metavar="WORDS",
        help="options of `sky jobs launch`, quoted as one, such as '--infra aws --secret HF_TOKEN'",
    )


def _add_up(up: argparse.ArgumentParser) -> None:
    up.add_argument("source", metavar="SOURCE", help="posts, as `emotion-train prepare` takes them")
    _add_config(up)
    up.add_argument(
        "--bucket",
        required=True,
        metavar="URL",
        help="s3://bucket or s3://bucket/prefix for data set, runs and export; with --local also a folder",
    )
    up.add_argument(
        "--name",
        default="emotions",
        metavar="NAME",
        help="name of folder, job and, without run.id, run (default: %(default)s)",
    )
    up.add_argument(
        "--prepare", default="", metavar="WORDS", help="options of `emotion-train prepare`, quoted as one"
    )
    up.add_argument(
        "--local", action="store_true", help="train on this machine's GPUs, or CPU, instead of by SkyPilot"
    )
    _add_machine(up, "machine to train on")
    up.add_argument("--no-smoke", action="store_true", help="train the whole run without trying it out")
    up.add_argument("--no-export", action="store_true", help="do not merge adapter and base at the end")
    up.add_argument(
        "--folder",
        type=path_here,
        metavar="FOLDER",
        help="folder for the adapter and the task file (default: the --name, in the current folder)",
    )
    up.set_defaults(verb=_up)


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
        type=path_here,
        metavar="FILE",
        help=(
            "vms.csv of SkyPilot's catalog or the output of `sky gpus list -o json` (default: the catalog on"
            " this machine, else list prices that come with the program)"
        ),
    )
    plan.add_argument(
        "--cloud",
        action="append",
        default=[],
        metavar="NAME",
        help="prices of this cloud only; may be given several times",
    )
    plan.add_argument(
        "--precision", metavar="NAME", help="precision of the frozen base (default: the fastest that fits)"
    )
    plan.add_argument(
        "--label",
        type=_positive,
        metavar="N",
        help=(
            "plan to label N posts, as long as those of the data set, instead of a training; each GPU is one"
            " worker"
        ),
    )
    plan.add_argument("--within-hours", type=float, metavar="H", help="leave out GPUs that take longer")
    plan.add_argument(
        "--tokens-per-post",
        type=float,
        metavar="N",
        help="mean length, instead of the mean of a sample by the base's tokenizer",
    )
    plan.add_argument(
        "--preemptions-per-hour",
        type=float,
        default=Spot.preemptions_per_hour,
        metavar="R",
        help="expected preemptions of a spot machine (default: %(default)g)",
    )
    plan.add_argument(
        "--startup-minutes",
        type=float,
        default=Spot.startup_minutes,
        metavar="M",
        help="minutes for machine, set-up and loading, at each start (default: %(default)g)",
    )
    plan.add_argument(
        "--all",
        action="store_true",
        help="every row of the table, also GPUs that are too small (default: the ten best)",
    )
    plan.add_argument("--json", action="store_true", help="print every row as JSON instead of a table")
    plan.add_argument(
        "--write",
        type=path_here,
        metavar="FILE",
        help="also write a SkyPilot task with these GPUs, otherwise like sky/train.yaml",
    )
    plan.set_defaults(verb=_plan)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help=(
            "OUTPUT_URL/RUN_ID, a run's id below --output-url, a folder that was pulled or written by"
            " `emotion-train evaluate --out`, a report.json or a scorecard.json"
        ),
    )
    compare.add_argument("--output-url", metavar="OUTPUT_URL", help="where the runs given by id are stored")
    compare.add_argument(
        "--split", metavar="NAME", help="split to compare on (default: test, where there is one)"
    )
    compare.add_argument(
        "--group-by-config",
        action="store_true",
        help="count runs that differ only in their seed as one; the intervals then count seeds too",
    )
    compare.add_argument(
        "--page",
        default="comparison.html",
        metavar="FILE",
        help=("file or s3:// URL for the HTML page; an earlier page is replaced (default: %(default)s)"),
    )
    compare.add_argument(
        "--fail-if-worse",
        action="store_true",
        help="end with 1 where a run is worse than the first beyond chance",
    )
    compare.set_defaults(verb=_compare)


def _add_push(push: argparse.ArgumentParser) -> None:
    push.add_argument(
        "run_url", metavar="OUTPUT_URL/RUN_ID", help="a run that `emotion-launch runs` lists as published"
    )
    push.add_argument(
        "hub_id", metavar="HUB_ID", help="OWNER/NAME of a model repository, made if it does not exist"
    )
    who = push.add_mutually_exclusive_group()
    who.add_argument("--private", action="store_true", help="a new repository is private (the default)")
    who.add_argument("--public", action="store_true", help="a new repository is public")
    push.add_argument(
        "--license", metavar="NAME", help="licence of the adapter by the hub's short name, such as cc-by-4.0"
    )
    push.add_argument("--dry-run", action="store_true", help="list the files and upload nothing")
    push.set_defaults(verb=_push)


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
        help="accelerate config, a path or a name in accelerate_configs/ (default: chosen by the GPUs)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from emotion_train.processes.systems import require_system

    require_system("run")
    from emotion_train.config import load_config
    from launch.run.choice import asked_for
    from launch.run.seeds import end_with_seeds, run_seeds
    from launch.run.topology import gpus

    end_with_seeds()
    if arguments.at_once > 1 and not arguments.spread:
        raise WrongRequest("--at-once is for runs that are spread over GPUs; give --spread, or leave it out.")
    if arguments.seeds is None and arguments.spread:
        raise WrongRequest("--spread is for several seeds; give --seeds 3, or leave it out.")
    if arguments.seeds is not None and arguments.smoke:
        raise WrongRequest("--smoke tries one run out; give it without --seeds.")
    if arguments.seeds is not None:
        config = load_config(arguments.config, arguments.overrides)
        _, topology = asked_for(gpus(), arguments.accelerate_config, processes=arguments.processes)
        return run_seeds(arguments, config, topology, lambda own: _start(own, []))
    if arguments.smoke:
        from launch.run.smoke import smoke_run

        config = load_config(arguments.config, arguments.overrides)
        return smoke_run(
            config,
            lambda words, stop_after: _start(arguments, words, stop_after),
            only_show=arguments.dry_run,
        )
    return _start(arguments, [])


def _distil(arguments: argparse.Namespace) -> int:
    from emotion_train.processes.systems import require_system

    if not arguments.as_jobs:
        require_system("run")
    from emotion_train.config import load_config
    from launch.run.choice import asked_for
    from launch.run.distil import distil
    from launch.run.topology import Topology, gpus

    config = load_config(arguments.config, arguments.overrides)
    topology = Topology(())
    if not arguments.as_jobs:
        _, topology = asked_for(gpus(), arguments.accelerate_config, processes=None)
    return distil(arguments, config, topology, lambda own: _start(own, []))


def _start(arguments: argparse.Namespace, more: Sequence[str], stop_after_step: int | None = None) -> int:
    """One start of the run on this node, with `more` overrides; returns its exit code."""
    from emotion_train.config import load_config
    from emotion_train.processes.notices import hold_seconds
    from emotion_train.training.job import output_log
    from launch.run.choice import accelerate_line, ask_for_base, choose, printable
    from launch.run.environment import trainer_environment
    from launch.run.machine_price import price_here
    from launch.run.processes import run_to_end, wait_for_answer
    from launch.run.topology import gpus

    overrides = [*arguments.overrides, *more]
    config = load_config(arguments.config, overrides)
    hold_s = hold_seconds(config.preemption.hold_s, os.environ)
    found = gpus()
    # the choice of a layout needs the base's shape
    if found and arguments.accelerate_config is None and not arguments.dry_run:
        wait_for_answer(ask_for_base(config), hold_s)
    choice = choose(found, arguments.accelerate_config, config, processes=arguments.processes)
    topology = choice.topology
    if config.report.usd_per_hour is None and (price := price_here(topology)) is not None:
        overrides.append(f"report.usd_per_hour={price.usd:.4f}")
        print(f"${price.usd:,.2f} an hour: {price.source}", flush=True)
    environment, cleared = trainer_environment(topology, show_traceback=arguments.traceback)
    line = accelerate_line(
        choice.config_file,
        arguments.config,
        overrides,
        arguments.allow_unfenced,
        topology,
        config.distributed.timeout_s,
        stop_after_step,
    )
    print(f"{choice.config_file.stem}: {choice.reason}\n{printable(line)}", flush=True)
    if arguments.dry_run:
        return 0
    log = output_log(config)
    go_to(log)
    if cleared:
        print(
            f"{LAUNCH}: {choice.config_file.name} decides; cleared for this run: {', '.join(cleared)}",
            file=sys.stderr,
        )
    if log is not None:
        environment[LOG_VARIABLE] = str(log)
        if not sys.stderr.isatty():  # a pipe may close, and then it is too late to say so
            print(f"emotion-launch: if this output is cut off, it continues in {log}", file=sys.stderr)
    return run_to_end(line, environment, hold_s)


def _plan(arguments: argparse.Namespace) -> int:
    from launch.plan.verb import plan

    text_is_the_result()
    return plan(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from rich.text import Text

    from emotion_train.console import Terminal
    from launch.check.checks import check_all
    from launch.run.topology import gpus

    if arguments.hours is not None and not 0 < arguments.hours < math.inf:
        raise WrongRequest(f"--hours is {arguments.hours:g}; give a number above 0.")
    console = Terminal(highlight=False, soft_wrap=True)
    all_ok = True
    first_with: dict[str, str] = {}
    for check in check_all(
        arguments.config,
        arguments.overrides,
        gpus(),
        arguments.accelerate_config,
        wanted_gpus=arguments.gpus,
        hours=arguments.hours,
    ):
        all_ok = all_ok and check.ok
        mark, style = (
            ("wrong", "red") if not check.ok else ("warn", "yellow") if check.doubtful else ("ok", "green")
        )
        console.print(Text.assemble((mark, style), f"{'':<{6 - len(mark)}}{check.name:<11} "), end="")
        finding = " ".join(check.finding.split())
        earlier = check.name if check.ok else first_with.setdefault(finding, check.name)
        console.print(finding if earlier == check.name else f"for the reason given at {earlier}")
    return 0 if all_ok else 2


def _runs(arguments: argparse.Namespace) -> int:
    from emotion_train.storage.folder import FolderStore
    from emotion_train.storage.open import open_store
    from launch.results.pages import a_console, print_runs

    text_is_the_result()
    store = open_store(arguments.output_url)
    if isinstance(store, FolderStore) and not store.root.exists():
        raise WrongRequest(
            f"There is no folder {store.url}; give the run.output_url of your runs, s3://bucket/prefix or a"
            " folder."
        )
    print_runs(store, a_console())
    return 0


def _require_seconds(every_s: float) -> None:
    if not 0 < every_s <= _LONGEST_PAUSE_S:
        raise WrongRequest(f"--every is {every_s:g}; give seconds above 0, up to {_LONGEST_PAUSE_S}.")


def _show(arguments: argparse.Namespace) -> int:
    from emotion_train.runs.published import split_run_url
    from emotion_train.storage.open import open_store
    from launch.results.pages import a_console, show, watch

    text_is_the_result()
    _require_seconds(arguments.every)
    output_url, run_id = split_run_url(arguments.run_url)
    store = open_store(output_url)
    if arguments.watch:
        watch(store, run_id, arguments.every, a_console())
    else:
        show(store, run_id, a_console())
    return 0


def _label_status(arguments: argparse.Namespace) -> int:
    from emotion_train.storage.open import open_store
    from launch.results.labelling import show, watch
    from launch.results.pages import a_console

    text_is_the_result()
    _require_seconds(arguments.every)
    store = open_store(arguments.out_url)
    if arguments.watch:
        watch(store, arguments.every, a_console())
    else:
        show(store, a_console())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from launch.results.compare import run

    return run(
        arguments.runs,
        output_url=arguments.output_url,
        split=arguments.split,
        group_by_config=arguments.group_by_config,
        page=arguments.page,
        fail_if_worse=arguments.fail_if_worse,
    )


def _pull(arguments: argparse.Namespace) -> int:
    from launch.results.pull import run

    return run(arguments.run_url, arguments.to, arguments.with_training_filter)


def _push(arguments: argparse.Namespace) -> int:
    from launch.results.push import run

    return run(
        arguments.run_url,
        arguments.hub_id,
        public=arguments.public,
        licence=arguments.license,
        dry_run=arguments.dry_run,
    )


def _up(arguments: argparse.Namespace) -> int:
    from launch.up.verb import up

    return up(arguments)


if __name__ == "__main__":
    sys.exit(main())
