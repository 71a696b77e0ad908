"""`emotion-train VERB`: one page per verb, imported only when it is asked for, so that --help costs
no torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Sequence

from emotion_train.command_line import (
    LAUNCH_VERBS,
    TRAIN,
    add_program_options,
    codes_of,
    end_at_once,
    parse,
    quiet_libraries,
    require_verb,
)
from emotion_train.edges.command_errors import Parser
from emotion_train.edges.streams import hold
from emotion_train.errors import (
    EXIT_CODES,
    add_traceback_option,
    exit_code,
    guarded,
    without_traceback_option,
)
from emotion_train.processes.systems import require_system

VERBS = {
    "prepare": "validate and shuffle posts into Parquet objects of a bucket or folder",
    "stage-base": "put a base model into a bucket once, where runs read it without a hub",
    "train": "train an adapter (the process that accelerate launch starts)",
    "evaluate": "score an adapter on a split or a file of labelled posts",
    "predict": "label posts given as arguments, a file or standard input",
    "label": "label the posts of files, a bucket or a data set, by any number of workers that come and go",
    "export": "merge an adapter into its base: a plain transformers checkpoint for pipelines and vLLM",
    "benchmark": "compare an adapter with hosted models on the same posts",
    "augment": "make a data set with synthetic posts for the rarest labels",
    "config": "print every key of a run config with default, unit and meaning",
    "demo": "run all steps with a small real model and a local S3 server",
}
# `config` is the module of the run config, so the verb's page has another name
_PAGES = {"config": "config_reference"}


def page_of(verb: str) -> str:
    """The module of a verb, below `emotion_train`."""
    return _PAGES.get(verb, verb.replace("-", "_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code of the table in `EXIT_CODES`."""
    hold(TRAIN)
    end_at_once()
    quiet_libraries()
    words, show = without_traceback_option(sys.argv[1:] if argv is None else argv)
    if code := exit_code(TRAIN, lambda: require_verb(TRAIN, words, VERBS, LAUNCH_VERBS), show_traceback=show):
        return code
    asked_for = [word for word in words if not word.startswith("-")][:1]
    if code := exit_code(TRAIN, lambda: require_system(*asked_for), show_traceback=show):
        return code
    arguments = guarded(TRAIN, lambda: parse(_parser(asked_for), words), show_traceback=show)
    return exit_code(TRAIN, lambda: int(arguments.run(arguments)), show_traceback=show)


def _parser(asked_for: Collection[str]) -> Parser:
    """The parser with all verbs, and the arguments of the verbs `asked_for`."""
    parser = Parser(
        prog=TRAIN,
        description=(
            "Prepare posts, train an emotion classifier, score it and use it. Each verb has its own --help."
        ),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_program_options(parser, lambda: _parser(VERBS))
    add_traceback_option(parser)
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        page = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=codes_of(TRAIN, name),
        )
        if name in asked_for:
            module = importlib.import_module(f"emotion_train.{page_of(name)}")
            module.add_arguments(page)
            add_traceback_option(page)
            page.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
