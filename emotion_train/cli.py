"""`emotion-train VERB`: one page per verb, imported only when it is asked for, so that --help costs no torch."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from emotion_train.errors import EmotionTrainError

VERBS = {
    "prepare": "validate, shuffle and shard posts into a bucket or folder",
    "train": "train an adapter (the process that accelerate launch starts)",
    "evaluate": "score an adapter on a split or a file of labelled posts",
    "predict": "label posts given as words, a file or standard input",
    "demo": "the whole path on a small real model and a local S3 server",
}
EXIT_CODES = """exit codes: 0 done, 1 failed (traceback), 2 wrong request, 33 checkpointed and preempted,
34 fenced: another writer owns the run"""
OUTCOME_VARIABLE = "EMOTION_TRAIN_OUTCOME"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code of the table in `EXIT_CODES`."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="emotion-train",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        page = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".", epilog=EXIT_CODES)
        if name == chosen:
            module = importlib.import_module(f"emotion_train.{name}")
            module.add_arguments(page)
            page.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    return _leave(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except EmotionTrainError as error:
        print(f"emotion-train: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("emotion-train: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = error.filename or "a temporary folder"
        print(f"emotion-train: the disk is full ({place}); free some space or set TMPDIR to a larger disk.", file=sys.stderr)
        return 2


def _leave(code: int) -> int:
    """Tell `emotion-launch run` the exit code, which accelerate would turn into 1."""
    if (path := os.environ.get(OUTCOME_VARIABLE)) and os.environ.get("RANK", "0") == "0":
        Path(path).write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main())
