"""Writes the generated pages of docs/reference/: config.md, cli.md, exit-codes.md.

    python docs/scripts/reference.py

tests/test_docs.py fails if a page differs from what this prints.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import emotion_train.cli as train
import launch.cli as launch
from emotion_train import errors
from emotion_train.command_line import LAUNCH, TRAIN, codes_of
from emotion_train.config_reference import as_markdown

REFERENCE = Path(__file__).parents[1] / "reference"
_MADE_BY = "This page is made by `python docs/scripts/reference.py`; change the code and run it again."
# options that every verb has
_EVERYWHERE = {"--help", "--traceback"}
# what does not fit into the table of the programs' help
_MORE = {
    "0": "The request is done; from `train`, `run`, `label`, `benchmark` and `augment` it means that the"
    " result is stored.",
    "1": "A sentence names the cause, or says where the traceback of an unexpected error is; also if the"
    " store did not answer for `run.start_timeout_s` or `run.publish_timeout_s`. The same command resumes"
    " the run.",
    "2": "The sentence says what was given, what is allowed and what to type; also if a store refuses (403,"
    " no such bucket). The same command would end in the same way.",
    "33": "The machine was about to be taken. SkyPilot starts the run again by itself"
    " (`recover_on_exit_codes: [33]`).",
    "34": "Do nothing: the other writer trains, and this process has overwritten nothing."
    " `emotion-launch show OUTPUT_URL/RUN_ID` names the writer that owns the run. If that writer is dead,"
    " start the run again to take it over ([two writers](../guides/resume-and-recover.md#two-writers)).",
}


def pages() -> dict[str, str]:
    """The text of each page, by its name below docs/reference/."""
    return {"config.md": as_markdown(), "cli.md": cli(), "exit-codes.md": exit_codes()}


class Verb(NamedTuple):
    """One verb of a program: what it does in a phrase, and its parser."""

    summary: str
    parser: argparse.ArgumentParser


def verbs() -> dict[str, dict[str, Verb]]:
    """The verbs by program and name."""
    return {
        TRAIN: _verbs_of(train._parser(train.VERBS)),
        LAUNCH: _verbs_of(launch._parser()),
    }


def _verbs_of(program: argparse.ArgumentParser) -> dict[str, Verb]:
    (action,) = [one for one in program._actions if isinstance(one, argparse._SubParsersAction)]
    summaries = {one.dest: one.help or "" for one in action._choices_actions}
    return {name: Verb(summaries[name], parser) for name, parser in action.choices.items()}


# --- cli.md ---


def cli() -> str:
    """Every verb of both programs, with its arguments and exit codes."""
    lines = [
        "# Command line",
        "",
        f"There are two programs: `{TRAIN}` prepares posts, trains, scores and predicts; `{LAUNCH}` plans,",
        "checks, starts, lists and compares runs. Both have `--help`, `--version`, `--traceback` (shows the",
        "traceback of an unexpected error) and `--completion bash` or `zsh`. `section.field=value` sets a",
        "[config key](config.md).",
        "",
        _MADE_BY,
        "",
        "| verb | what it does |",
        "|---|---|",
    ]
    every = verbs()
    for program, named in every.items():
        lines += [
            f"| [`{program} {name}`](#{program}-{name}) | {_cell(verb.summary)} |"
            for name, verb in named.items()
        ]
    for program, named in every.items():
        for name, (_, parser) in named.items():
            lines += ["", f"## {program} {name}", "", " ".join((parser.description or "").split()), ""]
            lines += [f"    {_usage(program, name, parser)}", ""]
            rows = [
                f"| {_names(action)} | {_cell(_told(action, parser))} |"
                for action in parser._actions
                if not _EVERYWHERE & set(action.option_strings)
            ]
            lines += ["| argument | meaning |", "|---|---|", *rows, ""] if rows else []
            codes = codes_of(program, name).partition(":")[2].partition(" (")[0].strip()
            lines.append(f"[Exit codes](exit-codes.md): {codes}.")
    return "\n".join(lines) + "\n"


def _usage(program: str, name: str, parser: argparse.ArgumentParser) -> str:
    """One line; options that may be left out are not spelled."""
    words = [program, name]
    options = False
    for action in parser._actions:
        value = _metavar(action)
        if not action.option_strings:
            words.append({"*": f"[{value} …]", "?": f"[{value}]"}.get(str(action.nargs), value))
        elif action.required:
            words.append(f"{action.option_strings[-1]} {value}")
        else:
            options |= not _EVERYWHERE & set(action.option_strings)
    return " ".join([*words, *(["[options]"] if options else [])])


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None and action.metavar is None:
        return "|".join(map(str, action.choices))
    return str(action.metavar or action.dest.upper())


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{_metavar(action)}`".replace("|", "\\|")
    value = _metavar(action)
    named = ", ".join(action.option_strings)
    return f"`{f'{named} {value}'.strip()}`".replace("|", "\\|")


def _told(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    values = {**vars(action), "prog": parser.prog}
    return " ".join(((action.help or "") % values).split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# --- exit-codes.md ---


def exit_codes() -> str:
    """The table of codes, the errors with each, and where to look next."""
    lines = [
        "# Exit codes",
        "",
        "What the exit code of a program means, and what to do then.",
        "",
        _MADE_BY,
        "",
    ]
    lines += ["| code | meaning | what then |", "|---|---|---|"]
    meanings = dict(re.findall(r"^  (\d+) +(.*(?:\n      .*)*)", errors.EXIT_CODES, re.MULTILINE))
    lines += [f"| {code} | {' '.join(text.split())} | {_MORE[code]} |" for code, text in meanings.items()]
    lines += [
        "",
        "`accelerate launch`, if you type it yourself, exits with 1 for every code but 0.",
        "",
        "The output does not decide the code: a reader that leaves, or a full disk under the output, changes",
        "no code ([nobody reads it](../guides/resume-and-recover.md#when-nobody-reads-the-output)).",
        "",
        "## What a scheduler does with them",
        "",
        "SkyPilot, Slurm and Kubernetes, and the settings for each of them:",
        "[the table](../design/log.md#what-a-scheduler-does-with-each-exit-code).",
        "",
        "## Errors by code",
        "",
        "In Python each is an exception of `emotion_train.errors` ([in Python](../python.md)).",
        "",
        "| code | error | when |",
        "|---|---|---|",
    ]
    for code, error in sorted(_family(), key=lambda pair: (pair[0], pair[1].__name__)):
        told = " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())
        lines.append(f"| {code} | `{error.__name__}` | {_cell(told)} |")
    lines += [
        "",
        "`StorageError` and its kinds exit with 1 if the store did not answer, because waiting may help.",
        "",
        "Each verb's own codes are in the [command line](cli.md). What to do about a message:",
        "[troubleshooting](../guides/troubleshooting.md).",
    ]
    return "\n".join(lines) + "\n"


def _family() -> list[tuple[int, type[errors.EmotionTrainError]]]:
    """The public errors of `emotion_train.errors` with their codes."""
    found = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.EmotionTrainError)
    ]
    return [(error.exit_code, error) for error in found]


def main() -> None:
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
