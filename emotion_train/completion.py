"""The script by which bash or zsh completes a program's verbs, options, their values, and the keys
of a run config.

It is made from the program's own parser and static from then on: completing starts no Python. The
price: after an update it has to be printed again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from emotion_train.config import all_keys

_PLACES = ("FILE", "FOLDER", "URL", "DATA_URL", "RUN_URL", "SOURCE", "BASE")  # completed as paths


@dataclass(frozen=True)
class _Verb:
    """The words that may follow a verb; `keys` end in =, `taking` maps an option to its allowed
    words, None for a path.
    """

    name: str
    help: str
    options: dict[str, str] = field(default_factory=dict)
    taking: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    keys: tuple[str, ...] = ()


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for `bash` or `zsh`."""
    verbs = [_verb(name, page, told) for name, page, told in _pages(parser)]
    of_the_program = _verb("", parser, "")
    made = _bash if shell == "bash" else _zsh
    return made(parser.prog, of_the_program, verbs)


def _pages(parser: argparse.ArgumentParser) -> Iterable[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {one.dest: one.help or "" for one in action._choices_actions}
            for name, page in action.choices.items():
                yield name, page, told.get(name, "")


def _verb(name: str, page: argparse.ArgumentParser, told: str) -> _Verb:
    options, taking = {}, dict[str, tuple[str, ...] | None]()
    keys: tuple[str, ...] = ()
    for action in page._actions:
        if not action.option_strings:
            if action.dest == "overrides":
                keys = tuple(f"{key}=" for key in all_keys())
            continue
        options[action.option_strings[-1]] = _first_sentence(page, action)
        for option in action.option_strings:
            if action.choices is not None:
                taking[option] = tuple(str(choice) for choice in action.choices)
            elif isinstance(action.metavar, str) and action.metavar.rpartition("/")[2] in _PLACES:
                taking[option] = None
            elif action.nargs != 0:
                taking[option] = ()
    return _Verb(name, told, options, taking, keys)


def _first_sentence(page: argparse.ArgumentParser, action: argparse.Action) -> str:
    told = page._get_formatter()._expand_help(action) if action.help else ""
    return re.split(r" \(|: |; ", told)[0]


def _bash(program: str, own: _Verb, verbs: list[_Verb]) -> str:
    function = "_" + program.replace("-", "_")
    return f"""# bash: {program}'s verbs, options and config keys. Type
# `source <({program} --completion bash)`, or put this as {program} into
# ~/.local/share/bash-completion/completions/.
{function}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {_quoted([*(verb.name for verb in verbs), *own.options])} -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}} $before" in
{_cases(_after_options(own, verbs, "words={}", "return"))}
    esac
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{_cases((verb.name, f"words={_quoted([*verb.options, *verb.keys])}") for verb in verbs)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]]; then
        compopt -o nospace
    fi
}}
complete -o default -F {function} {program}
"""


def _zsh(program: str, own: _Verb, verbs: list[_Verb]) -> str:
    function = "_" + program.replace("-", "_")
    described = _described((verb.name, verb.help) for verb in verbs)
    pages = (
        (
            verb.name,
            f"options=({_described(verb.options.items())})"
            + (f"; compadd -S '' -- {' '.join(verb.keys)}" if verb.keys else ""),
        )
        for verb in verbs
    )
    return f"""#compdef {program}
# zsh: {program}'s verbs, options and config keys. Put this as {function} into a folder of $fpath, or
# type `source <({program} --completion zsh)` after compinit.
{function}() {{
    local -a verbs options
    if (( CURRENT == 2 )); then
        verbs=({described})
        options=({_described(own.options.items())})
        _describe -t verbs verb verbs
        _describe -o options option options
        return
    fi
    case "$words[2] $words[CURRENT-1]" in
{_cases(_after_options(own, verbs, "compadd -- {}; return", "_files; return"))}
    esac
    case "$words[2]" in
{_cases(pages)}
    esac
    _describe -o options option options
    _files
}}
if [[ "$funcstack[1]" == "{function}" ]]; then
    {function} "$@"
else
    compdef {function} {program}
fi
"""


def _after_options(own: _Verb, verbs: list[_Verb], choice: str, path: str) -> Iterable[tuple[str, str]]:
    """The shell's action after an option that takes a value, by `VERB OPTION`."""
    for verb in verbs:
        for option, words in verb.taking.items():
            if words is None:
                yield f'"{verb.name} {option}"', path
            elif words:
                listed = _quoted(words) if choice.startswith("words") else " ".join(words)
                yield f'"{verb.name} {option}"', choice.format(listed)
            else:
                yield f'"{verb.name} {option}"', "return"
    for option, words in own.taking.items():
        if words:
            listed = _quoted(words) if choice.startswith("words") else " ".join(words)
            yield f'"{option} "*|"{own.name} {option}"', choice.format(listed)


def _cases(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"        {pattern}) {what} ;;" for pattern, what in pairs)


def _described(pairs: Iterable[tuple[str, Any]]) -> str:
    """The pairs as zsh's `'name:description'`, with colons and quotes of the description
    escaped.
    """
    return " ".join(_single(f"{name}:{told.replace(':', chr(92) + ':')}") for name, told in pairs)


def _single(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _quoted(words: Iterable[str]) -> str:
    return _single(" ".join(words))
