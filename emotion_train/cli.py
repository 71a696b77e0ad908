"""`emotion-train VERB`: one page per verb, imported only when it is asked for, so that --help costs
no torch.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from emotion_train.edges.streams import hold
from emotion_train.errors import EXIT_CODES, exit_code
from emotion_train.processes.systems import require_system

VERBS = {
    "prepare": "validate and shuffle posts into Parquet objects of a bucket or folder",
    "stage-base": "put a base model into a bucket once, where runs read it without a hub",
    "train": "train an adapter (the process that accelerate launch starts)",
    "evaluate": "score an adapter on a split or a file of labelled posts",
    "predict": "label posts given as words, a file or standard input",
    "demo": "the whole path on a small real model and a local S3 server",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code of the table in `EXIT_CODES`."""
    hold("emotion-train")
    # at each import it asks for a package that is not needed
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    if code := exit_code("emotion-train", lambda: require_system(chosen)):
        return code
    parser = argparse.ArgumentParser(
        prog="emotion-train",
        description=(
            "Prepare posts, train an emotion classifier, score it and use it. Each verb has its own --help."
        ),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        page = verbs.add_parser(
            name,
            help=summary,
            description=summary.capitalize() + ".",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            module = importlib.import_module(f"emotion_train.{name.replace('-', '_')}")
            module.add_arguments(page)
            page.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    return exit_code("emotion-train", lambda: int(arguments.run(arguments)))


if __name__ == "__main__":
    sys.exit(main())
