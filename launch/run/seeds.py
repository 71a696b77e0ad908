"""One config trained with several seeds, one run for each: one after the other on all GPUs and
nodes, or spread over this machine's GPUs; at the end one page compares the runs.

A published run is not trained again, so the same command resumes where it was stopped. With
--spread each seed is an `emotion-launch run` of its own on one GPU; the price is that its output
goes to a file, since several progress bars do not fit one terminal.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from emotion_train.config import Config
from emotion_train.edges.streams import LOG_VARIABLE
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.processes.imports import past_current_folder
from emotion_train.processes.launcher_link import FOLDER_VARIABLE, STOP_SIGNALS, alive, end_with_launcher
from launch.run.processes import say
from launch.run.topology import Gpu, Topology

MOST_SEEDS = 100
_LOOK_EVERY_S = 0.2
_MOST_ID = 128  # characters, as run.id allows
_BYTES_SHOWN = 2000  # of a failed run's output
OF_THE_RUN = ("run.id=", "run.seed=")
_ENDS = (2, 34, 1, 33)  # exit codes; of several failed runs the first of these is the command's


class SeedRun(NamedTuple):
    """One of the runs; `overrides` are all that its command line needs. Messages call it `name`, or
    by its seed where that is empty.
    """

    seed: int
    run_id: str
    overrides: tuple[str, ...]
    name: str = ""

    @property
    def called(self) -> str:
        return self.name or f"seed {self.seed}"

    def value_of(self, key: str) -> str | None:
        """The value of the key in the last override that sets it."""
        prefix = f"{key}="
        return next(
            (word[len(prefix) :] for word in reversed(self.overrides) if word.startswith(prefix)), None
        )


def seeds_of(words: str, first: int, fewest: int = 2) -> tuple[int, ...]:
    """The seeds that `--seeds` asks for: a number of them from `first` on, or a list.

    >>> seeds_of("3", 42), seeds_of("1,5,9", 42)
    ((42, 43, 44), (1, 5, 9))
    """
    parts = [part.strip() for part in words.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"[0-9]{1,19}", part) for part in parts):
        raise WrongRequest(
            f"--seeds is {words!r}; give how many, such as 3, or a list of them, such as 1,5,9."
        )
    numbers = tuple(map(int, parts))
    listed = "," in words
    seeds = numbers if listed else tuple(range(first, first + min(numbers[0], MOST_SEEDS + 1)))
    if not fewest <= len(seeds) <= MOST_SEEDS or len(set(seeds)) < len(seeds):
        raise WrongRequest(
            f"--seeds is {words!r}; give {fewest} to {MOST_SEEDS}, or a list of as many different seeds, such"
            " as 1,5,9."
        )
    return seeds


def seed_runs(
    words: str, config: Config, overrides: Sequence[str], environment: Mapping[str, str] = os.environ
) -> list[SeedRun]:
    """A run for each seed, RUN_ID-seed-N; RUN_ID is the config's, else derived as for one run.

    Raises `WrongRequest` for seeds that make no sense.
    """
    from emotion_train.training.job import run_id_of

    seeds = seeds_of(words, config.run.seed)
    longest = max(len(f"-seed-{seed}") for seed in seeds)
    base = run_id_of(config, environment)[: _MOST_ID - longest]
    kept = [word for word in overrides if not word.startswith(OF_THE_RUN)]
    return [
        SeedRun(seed, f"{base}-seed-{seed}", (*kept, f"run.id={base}-seed-{seed}", f"run.seed={seed}"))
        for seed in seeds
    ]


def run_seeds(
    arguments: argparse.Namespace,
    config: Config,
    topology: Topology,
    run_once: Callable[[argparse.Namespace], int],
) -> int:
    """Train all seeds and compare them. Returns 0 when every run is published and the page written,
    else the exit code of the run that failed. Call this function in the main thread.
    """
    runs = seed_runs(arguments.seeds, config, arguments.overrides)
    if arguments.spread:
        require_gpus(arguments, topology)
    if arguments.dry_run:
        for one in runs:
            _one(arguments, one, run_once)
        print("\n".join(as_jobs(arguments.config, config, runs)))
        return 0
    print(f"{len(runs)} runs, one a seed: {', '.join(one.run_id for one in runs)}", flush=True)
    code = (
        spread_runs(arguments, config, runs, topology.gpus * arguments.at_once)
        if arguments.spread
        else next((code for one in runs if (code := _one(arguments, one, run_once))), 0)
    )
    if code:
        say(
            f"not all seeds are trained; the same command with run.id={_base(runs)} resumes, and trains no"
            " published run again"
        )
        return code
    return 0 if topology.node_rank else _compare(config.run.output_url, runs)


def _one(arguments: argparse.Namespace, one: SeedRun, run_once: Callable[[argparse.Namespace], int]) -> int:
    own = argparse.Namespace(**{**vars(arguments), "overrides": list(one.overrides), "seeds": None})
    return run_once(own)


def _base(runs: Sequence[SeedRun]) -> str:
    return runs[0].run_id.removesuffix(f"-seed-{runs[0].seed}")


def require_gpus(arguments: argparse.Namespace, topology: Topology) -> None:
    if not topology.gpus:
        raise WrongRequest(
            "--spread gives each run a GPU of its own and no GPU is used here; leave it out to train one"
            " run after the other."
        )
    if topology.nodes > 1:
        raise WrongRequest(
            f"--spread is for the GPUs of one machine and there are {topology.nodes} nodes; leave it out, or"
            " start each seed as a job of its own (--dry-run prints the lines)."
        )
    if arguments.accelerate_config not in (None, "single_gpu_qlora") or arguments.processes not in (None, 1):
        raise WrongRequest(
            "--spread trains each run on one GPU; leave --accelerate-config and --processes out."
        )


# --- as jobs ---


def as_jobs(
    config_file: str | None, config: Config, runs: Sequence[SeedRun], then: str | None = None
) -> list[str]:
    """The lines that start each run as a job of SkyPilot, and the line that comes `then`, by
    default the one that compares them.
    """
    output = config.run.output_url
    urls = [f"{output.rstrip('/')}/{one.run_id}" for one in runs]
    then = then or shlex.join(["emotion-launch", "compare", *urls])
    if not (config.data.url.startswith("s3://") and output.startswith("s3://")):
        return [
            "as jobs of SkyPilot: not from here, data.url and run.output_url have to be in a bucket",
            f"then: {then}",
        ]
    lines = ["as jobs of SkyPilot, each on a machine of its own:"]
    for one in runs:
        environment = task_environment(one, config_file, config)
        words = ["sky", "jobs", "launch", "sky/train.yaml", "-n", one.run_id]
        words += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        lines.append(shlex.join(words))
    return [*lines, f"then: {then}"]


def task_environment(
    one: SeedRun, config_file: str | None, config: Config, settings: Sequence[str] = ()
) -> dict[str, str]:
    """The variables of sky/train.yaml for this run; its own values win over `settings`."""
    own = [word for word in one.overrides if not word.startswith(("data.url=", "run.output_url="))]
    return {
        "DATA_URL": one.value_of("data.url") or config.data.url,
        "OUTPUT_URL": config.run.output_url,
        "CONFIG": config_file or os.devnull,  # the defaults
        "OVERRIDES": " ".join([*settings, *own]),
    }


# --- spread over GPUs ---


def spread_runs(
    arguments: argparse.Namespace, config: Config, runs: Sequence[SeedRun], gpus: Sequence[Gpu]
) -> int:
    """Train each run by an `emotion-launch run` of its own on one of the GPUs; returns as `spread`
    does.
    """
    from emotion_train.training.job import folder_here

    folder = folder_here(config) / "output"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = ["--config", arguments.config] if arguments.config else []
    words += ["--allow-unfenced"] if arguments.allow_unfenced else []
    line = [sys.executable, "-m", "launch.cli", "run", *words]
    jobs = [(one, [*line, *one.overrides], folder / f"{one.run_id}.log") for one in runs]
    return spread(jobs, gpus, {**os.environ, **past_current_folder()})


def spread(
    jobs: Sequence[tuple[SeedRun, Sequence[str], Path]],
    gpus: Sequence[Gpu],
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Run the commands, each on a GPU of its own and with its output in its file, as many at once
    as there are GPUs; returns 0, or a failed command's exit code.

    After a failure or a signal no further command is started; the signal is passed on. All commands
    end with this process. Call this function in the main thread.
    """
    waiting, idle = list(jobs), list(gpus)
    running: dict[int, tuple[subprocess.Popen[bytes], SeedRun, Path, Gpu]] = {}
    codes: list[int] = []
    with (
        tempfile.TemporaryDirectory(prefix="emotion-launch-") as name,
        alive(Path(name)),
        _passing_on(running) as signals,
    ):
        while running or (waiting and not any(codes) and not signals):
            while waiting and idle and not any(codes) and not signals:
                (one, line, log), gpu = waiting.pop(0), idle.pop(0)
                process = _start(line, log, _own_environment(environment, gpu, name))
                running[process.pid] = process, one, log, gpu
                if signals:  # came while it was started
                    process.send_signal(signals[-1])
                print(f"{one.called} on {gpu.name} {gpu.index}; its output: {log}", flush=True)
            time.sleep(_LOOK_EVERY_S)
            for process, one, log, gpu in list(running.values()):
                if (code := process.poll()) is not None:
                    del running[process.pid]
                    idle.append(gpu)
                    codes.append(code if code in (0, *_ENDS) else 1)
                    _tell_end(one, codes[-1], log)
    if waiting and not any(codes):
        codes.append(1)  # a signal came when all that had started were done
    return next((code for code in _ENDS if code in codes), 0)


def _own_environment(environment: Mapping[str, str], gpu: Gpu, folder: str) -> dict[str, str]:
    """The environment of one run: its GPU, and one GPU where a scheduler promised several."""
    own = {name: value for name, value in environment.items() if name != LOG_VARIABLE}
    for name in ("SKYPILOT_NUM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if own.get(name):
            own[name] = "1"
    return own | {"CUDA_VISIBLE_DEVICES": gpu.uuid, FOLDER_VARIABLE: folder}


def _start(line: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        return subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=opened,
            start_new_session=True,
        )
    finally:
        os.close(opened)


def _tell_end(one: SeedRun, code: int, log: Path) -> None:
    if code == 0:
        print(f"{one.called} is published: {one.run_id}", flush=True)
        return
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _BYTES_SHOWN))
        last = file.read().decode("utf-8", "replace")
    say(f"{one.called} ended with {code}; the end of {log}:\n{last}")


@contextmanager
def _passing_on(running: Mapping[int, object]) -> Iterator[list[int]]:
    """Pass signals on to all running commands and collect them, instead of ending this process."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process_id in list(running):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    wanted = [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_seeds() -> None:
    """End this launcher and its trainers when the launcher that spreads seeds ends, where one
    started it.
    """
    end_with_launcher(lambda folder: os._exit(1))


# --- the page ---


def _compare(output_url: str, runs: Sequence[SeedRun]) -> int:
    from launch.results.compare import comparison_of, write_page
    from launch.results.comparison_terminal import print_comparison
    from launch.results.pages import a_console

    urls = [f"{output_url.rstrip('/')}/{one.run_id}" for one in runs]
    page = f"{output_url.rstrip('/')}/{_base(runs)}-seeds.html"
    line = shlex.join(["emotion-launch", "compare", *urls, "--page", page])
    try:
        comparison = comparison_of(urls)
        written = write_page(comparison, page)
    except EmotionTrainError as error:
        say(f"all seeds are published, but the page that compares them is not written: {error} Type {line}")
        return 1
    print_comparison(comparison, a_console())
    print(f"written: {written}")
    pooled = shlex.join(["emotion-launch", "compare", "--group-by-config", *urls])
    print(f"with another config's seeds: {pooled} URLS_OF_THOSE_RUNS", flush=True)
    return 0
