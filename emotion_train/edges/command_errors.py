"""The one sentence in which a wrong option or argument ends: what was given, what is allowed, what
to type. argparse's own messages come behind a page of usage and speak of types.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

# argparse's messages and what is printed for them
_SENTENCES = (
    (
        r"argument (?P<name>.+?): invalid choice: (?P<value>.+?) \(choose from (?P<choices>.+)\)",
        r"{name} is {value}; type one of {choices}",
    ),
    (r"argument (?P<name>.+?): invalid int value: (?P<value>.+)", "{name} is {value}; type a whole number"),
    (r"argument (?P<name>.+?): invalid float value: (?P<value>.+)", "{name} is {value}; type a number"),
    (
        r"argument (?P<name>.+?): not allowed with argument (?P<value>.+)",
        "{name} and {value} exclude each other; type one of them",
    ),
    (r"argument (?P<name>.+?): expected (?:at least )?one argument", "{name} needs a value; type {name} …"),
    (r"argument (?P<name>.+?): (?P<value>.+)", "{name}: {value}"),
    (
        r"ambiguous option: (?P<name>.+) could match (?P<value>.+)",
        "{name} may mean {value}; type one of them whole",
    ),
)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.partition(" ")[0]
        self.exit(2, f"{program}: {self._sentence(message)}. {self.prog} --help explains each.\n")

    def _sentence(self, message: str) -> str:
        for pattern, sentence in _SENTENCES:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                groups = found.groupdict()
                if "choices" in groups:
                    groups["choices"] = groups["choices"].replace("'", "")
                return sentence.format(**groups)
        missing = re.fullmatch(r"the following arguments are required: (.+)", message)
        either = re.fullmatch(r"one of the arguments (.+) is required", message)
        if missing or either:
            # argparse also counts a positional argument that may be empty
            free = {action.metavar for action in self._actions if action.nargs == "*"}
            names = [name for name in missing[1].split(", ") if name not in free] if missing else []
            names += [" or ".join(either[1].split())] if either else []
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing; type {self.shape()}"
        return message

    def shape(self) -> str:
        """The command with its positional arguments and the options that it needs.

        >>> parser = Parser(prog="emotion-launch pull")
        >>> _ = parser.add_argument("run", metavar="OUTPUT_URL/RUN_ID")
        >>> _ = parser.add_argument("--to", required=True, metavar="FOLDER")
        >>> parser.shape()
        'emotion-launch pull OUTPUT_URL/RUN_ID --to FOLDER'
        """
        words = [self.prog]
        options = []
        for action in self._actions:
            name = action.metavar if isinstance(action.metavar, str) else action.dest
            if not action.option_strings:
                words.append({"?": f"[{name}]", "*": f"[{name} …]"}.get(str(action.nargs), name))
            elif action.required:
                options.append(f"{action.option_strings[-1]} {name}")
        for group in self._mutually_exclusive_groups:
            if group.required:
                either = [f"{action.option_strings[-1]} {action.metavar}" for action in group._group_actions]
                options.append(" or ".join(either))
        return " ".join(words + options)

    def page(self, words: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
        """The parser of the verb among the words, else this one, and the parsers of all verbs."""
        pages: dict[str, Parser] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                pages = action.choices
        verb = next((word for word in words if word in pages), None)
        return (self if verb is None else pages[verb]), pages

    def refuse_rest(self, words: Sequence[str], rest: Sequence[str], meant: str) -> NoReturn:
        """End for the words of `rest`, which no verb takes; `meant` is the config value, or the
        argument, that the first option of `rest` stands for, if any.
        """
        page, pages = self.page(words)
        program = self.prog
        verb = page.prog.removeprefix(f"{program} ")
        option = next((word for word in rest if word.startswith("-") and word != "-"), None)
        if option is None:
            given = " ".join(rest)
            self.exit(
                2,
                f"{program}: {verb} has no place for {given!r}; type {page.shape()}, with quotes around a"
                f" value that holds spaces. {page.prog} --help explains each.\n",
            )
        name = option.partition("=")[0]
        others = [one for one, other in pages.items() if name in other._option_string_actions]
        # without the dashes, which make short names look alike
        bare = {known.lstrip("-"): known for known in page._option_string_actions}
        near = [bare[one] for one in difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.6)]
        if meant:
            advice = f"did you mean {meant}?"
        elif others:
            advice = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it."
        elif near:
            advice = f"did you mean {near[0]}?"
        else:
            advice = f"{page.prog} --help lists its options."
        self.exit(2, f"{program}: {verb} has no option {name}; {advice}\n")
