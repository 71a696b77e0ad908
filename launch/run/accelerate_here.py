"""`accelerate launch` of one process, which is this one: it becomes the trainer. Another process
would import torch and accelerate a second time.

The trainer begins to read its base and its data set first; where it needs torch, accelerate reads
its config file and says what the trainer's environment is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from emotion_train import train
from emotion_train.command_line import TRAIN, end_at_once, parse, quiet_libraries
from emotion_train.edges.command_errors import Parser
from emotion_train.edges.streams import hold
from emotion_train.errors import TRACEBACK_VARIABLE, exit_code
from emotion_train.processes.accelerate_refusals import REFUSALS, refusal
from emotion_train.processes.launcher_link import run_as_trainer

# accelerate's number of threads where none is asked for; libraries read it as they are loaded
_THREADS = ("OMP_NUM_THREADS", "1")


def main() -> int:
    hold(TRAIN)
    end_at_once()
    quiet_libraries()
    os.environ.setdefault(*_THREADS)
    end = sys.argv.index(train.__name__) + 1
    parser = Parser(prog=f"{TRAIN} train")
    train.add_arguments(parser)
    arguments = parse(parser, sys.argv[end:])
    return run_as_trainer(
        lambda: exit_code(
            TRAIN,
            lambda: train.run(arguments, partial(_complete, sys.argv[1:end])),
            show_traceback=bool(os.environ.get(TRACEBACK_VARIABLE)),
        )
    )


def _complete(words: Sequence[str]) -> None:
    """Give this process the environment that `accelerate launch` with these words gives to the one
    it starts. Raises `WrongRequest` where accelerate refuses its config file.
    """
    from accelerate.commands import launch

    prepare, parser = launch.prepare_simple_launcher_cmd_env, launch.launch_command_parser()

    def start(arguments: argparse.Namespace) -> None:
        _, environment = prepare(arguments)
        os.environ.update(environment)

    launch.simple_launcher = start
    try:
        launch.launch_command(parser.parse_args(words))
    except REFUSALS as error:
        raise refusal(words, error) from error


if __name__ == "__main__":
    sys.exit(main())
