"""The shared parts of both command lines: suggestions for a wrong verb, config values among the
options, --version, --completion, and the exit codes of a verb.

A function imports only what it needs: this page adds to the time of --help.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from emotion_train.edges.command_errors import Parser
from emotion_train.errors import WrongRequest

TRAIN, LAUNCH = "emotion-train", "emotion-launch"
# `emotion_train` never imports the launcher, so its verbs are listed here; a test compares them
LAUNCH_VERBS = (
    *("run", "plan", "check", "runs", "show", "label-status", "compare", "pull", "push", "up", "distil"),
)

# what options name where an empty word would be no place
_PLACES = ("URL", "DATA_URL", "OUTPUT_URL", "OUTPUT_URL/RUN_ID", "RUN_URL", "FOLDER", "FILE", "BASE")

# words that people type instead of a verb, and the verbs they mean, the likelier first
_MEANT = {
    "train": ("run",),
    "distill": ("distil",),
    "ensemble": ("distil",),
    "fit": ("run", "train"),
    "finetune": ("run", "train"),
    "fine-tune": ("run", "train"),
    "launch": ("run",),
    "start": ("run",),
    "submit": ("run",),
    "eval": ("evaluate",),
    "test": ("evaluate",),
    "score": ("evaluate",),
    "infer": ("predict",),
    "inference": ("predict",),
    "classify": ("predict",),
    "bulk": ("label",),
    "annotate": ("label", "predict"),
    "preprocess": ("prepare",),
    "tokenize": ("prepare",),
    "dataset": ("prepare",),
    "stage": ("stage-base",),
    "download": ("pull",),
    "upload": ("push",),
    "fetch": ("pull",),
    "get": ("pull",),
    "list": ("runs",),
    "ls": ("runs",),
    "status": ("runs", "show", "label-status"),
    "logs": ("show",),
    "log": ("show",),
    "watch": ("show",),
    "estimate": ("plan",),
    "price": ("plan",),
    "prices": ("plan",),
    "cost": ("plan",),
    "validate": ("check",),
    "doctor": ("check",),
    "verify": ("check",),
    "merge": ("export",),
    "convert": ("export",),
    "serve": ("export",),
    "defaults": ("config",),
    "settings": ("config",),
    "quickstart": ("demo", "up"),
    "all": ("up",),
    "llm": ("benchmark",),
    "synthesize": ("augment",),
    "generate": ("augment",),
}


def program(name: str) -> list[str]:
    """The argv that starts one of the two programs by this interpreter, wherever it is installed.

    >>> program(TRAIN)[1:]
    ['-m', 'emotion_train.cli']
    """
    return [sys.executable, "-m", {TRAIN: "emotion_train.cli", LAUNCH: "launch.cli"}[name]]


def end_at_once() -> None:
    """Skip Python's last search for cycles when this process ends; both programs call it.

    The search walks through every object after the last line was printed: 1.5 s of a processor with
    torch and transformers loaded, and half a minute on a busy machine.
    """
    atexit.register(gc.freeze)


def quiet_libraries() -> None:
    """bitsandbytes no longer logs at its import that a package is missing, which nothing here
    needs. `emotion-train` and `emotion_train.api` call it.
    """
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def require_verb(program: str, words: Sequence[str], verbs: Collection[str], others: Collection[str]) -> int:
    """0 for a command line whose first word is a verb of the program, or an option.

    Raises `WrongRequest` that says which verb was meant, or which program has it; `others` are the
    verbs of the other program.
    """
    if not words:
        raise WrongRequest(f"A verb is missing: {', '.join(verbs)}; {program} --help says what each does.")
    word = words[0]
    if word in verbs or (word.startswith("-") and word != "--"):
        return 0
    other = LAUNCH if program == TRAIN else TRAIN
    meant = _MEANT.get(word.lower(), ())
    guesses = [f"{program} {verb}" for verb in meant if verb in verbs]
    if word in others:
        guesses.append(f"{other} {word}")
    guesses += [f"{other} {verb}" for verb in meant if verb in others]
    for name, candidates in ((program, verbs), (other, others)):
        near = difflib.get_close_matches(word.lower(), candidates, n=1, cutoff=0.6)
        guesses += [f"{name} {verb}" for verb in near]
    if guesses == [] or not word.isprintable():
        raise WrongRequest(
            f"{program} has no verb {word[:40]!r}; its verbs are {', '.join(verbs)}, and {other} has"
            f" {', '.join(others)}."
        )
    if guesses[0] == f"{other} {word}":
        raise WrongRequest(f"{word} is a verb of {other}; type {guesses[0]}.")
    raise WrongRequest(f"There is no verb {word[:40]!r}; did you mean {guesses[0]}?")


def codes_of(program: str, verb: str) -> str:
    """The exit codes of a verb, in one line; the table is in the program's help."""
    codes = "0 done, 1 failed, 2 wrong request"
    if verb in ("run", "train"):
        codes = (
            "0 published, 1 failed, 2 wrong request, 33 saved and preempted, 34 another writer owns the run"
        )
    elif verb == "label":
        codes = (
            "0 every post has its label or its error, 1 failed, 2 wrong request, 33 units left to others and"
            " preempted: start it again"
        )
    elif verb == "check":
        codes = "0 nothing is wrong, 1 failed, 2 something is wrong"
    elif verb == "up":
        codes = "0 published, pulled and exported, else the code of the step that ended it"
    elif verb == "distil":
        codes = "0 the student is published, else the code of the run or step that ended it"
    return f"exit codes: {codes} ({program} --help says more)"


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments. `section.field=value` words may come before, between and after the options,
    where argparse itself takes only one group of them.
    """
    arguments, rest = parser.parse_known_args(words)
    _refuse_empty_places(parser.page(words)[0], arguments)
    takes_values = hasattr(arguments, "overrides")
    if rest and not (takes_values and all("=" in word and not word.startswith("-") for word in rest)):
        option = next((word for word in rest if word.startswith("--")), None)
        meant = _key_for_option(option, words) if takes_values and option is not None else ""
        parser.refuse_rest(words, rest, meant)
    if rest:
        arguments.overrides += rest
    return arguments


def _refuse_empty_places(page: Parser, arguments: argparse.Namespace) -> None:
    """End for an option whose place is empty, as a shell variable that is not set leaves it: the
    option would count as not given, and `--out` would write nothing.
    """
    for action in page._actions:
        if not action.option_strings or action.metavar not in _PLACES:
            continue
        given = getattr(arguments, action.dest, None)
        if "" in (given if isinstance(given, list) else [given]):
            name = action.option_strings[-1]
            otherwise = "" if action.required else ", or leave it out"
            page.error(f"{name} is empty; type {name} {action.metavar}{otherwise}")


def _key_for_option(option: str, words: Sequence[str]) -> str:
    """A suggestion such as train.learning_rate=1e-4 for `--lr 1e-4`; empty where no key is
    meant.
    """
    from emotion_train.config import nearest_key

    name, equals, value = option.removeprefix("--").partition("=")
    if not equals:
        following = words[words.index(option) + 1 :]
        value = following[0] if following and not following[0].startswith("--") else "VALUE"
    # --data is an option of plan alone; elsewhere the word is the name of a section
    last = name.rpartition(".")[2].replace("-", "_").replace("data", "data_url", name == "data")
    meant = nearest_key(last) or ""
    key, _, what = meant.partition(" ")
    return f"the word {key}={value}{' ' if what else ''}{what}" if "." in key else ""


def add_program_options(
    parser: argparse.ArgumentParser, whole: Callable[[], argparse.ArgumentParser] | None = None
) -> None:
    """Adds --version and --completion; `whole` makes the parser with the options of all verbs,
    where `parser` has only the typed verb's.
    """
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=("bash", "zsh"),
        metavar="SHELL",
        const=whole,
        help=(
            "print a script by which bash or zsh completes verbs, options and config keys, and leave; for"
            f" bash type `source <({parser.prog} --completion bash)`"
        ),
    )


def version() -> str:
    """The installed version; a checkout that is only on the path has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(TRAIN)
    except PackageNotFoundError:
        return "(not installed: a checkout on the path)"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(f"{parser.prog} {version()}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        from emotion_train.completion import script

        sys.stdout.write(script(str(values), self.const() if self.const else parser))
        parser.exit()
