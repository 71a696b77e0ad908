"""Labels of a data set that a person should check: names that only a machine tells apart, words for
a missing label, numbers without names.

Each gets a line of advice. Nothing here changes a label: two spellings stay two labels until the
source is mended.
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from emotion_train.console import counted
from emotion_train.data.labels import is_invisible, means_missing, number

_SHOWN = 5
_MOST_TYPED = 200  # characters of a list that a person would paste
_QUOTES = "'\"`´\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a«»"
_END_MARKS = ".!?,;:\u3002\u3001\u00b7\u2026"
# Letters of Cyrillic and Greek that look like Latin ones, in the same places of both strings
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁһӏАВЕКМНОРСТХУІЈЅαορνιΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijsdhlABEKMHOPCTXYIJSaopviABEZHIKMNOPTYX",
)


def doubts(labels: Sequence[str], counts: Sequence[int], *, given: bool) -> list[str]:
    """One line for each doubt, empty where there is none.

    `counts` are the posts of each label. Names that the person gave (`given`) are doubted only
    where two of them look alike.
    """
    lines = [_alike_line(group) for group in alike(labels)]
    if given:
        return lines
    for name, count in zip(labels, counts, strict=True):
        if means_missing(name):
            lines.append(
                f"missing     {_says(name, count)}, and usually means that there is none; {_without(labels)}"
            )
        elif number(name) == -1:
            lines.append(
                f"unlabelled  {_says(name, count)}, which marks posts without a label in data sets of the"
                f" Hugging Face hub; {_without(labels)}"
            )
    return [*lines, *_numbers(labels)]


def alike(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that a person would take for one. They differ only in case, spelling of
    accents, letters of another script that look the same, space, invisible characters, quotes
    around them or punctuation at their end, or are equal as numbers.
    """
    groups: dict[str | Decimal, list[str]] = {}
    for name in sorted(labels):
        groups.setdefault(_likeness(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _likeness(name: str) -> str | Decimal:
    """A key that is equal for labels that are alike."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    inked = "".join(_plain(letter) for letter in folded if not _without_ink(letter)).translate(_LOOKALIKES)
    bare = inked.rstrip(_END_MARKS).strip(_QUOTES).rstrip(_END_MARKS)
    value = number(bare)
    return bare or inked or name if value is None else value


def _plain(character: str) -> str:
    """A digit of any script as its ASCII digit."""
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


def _without_ink(character: str) -> bool:
    """Whether a character is invisible, or a mark that chooses between a black and a coloured
    emoji.
    """
    return is_invisible(character) or "\ufe00" <= character <= "\ufe0f"


def _alike_line(group: list[str]) -> str:
    shown = [_shown(name, group) for name in group[:_SHOWN]]
    if len(group) > _SHOWN:
        names = f"{', '.join(shown)} and {len(group) - _SHOWN} more"
    else:
        names = f"{', '.join(shown[:-1])} and {shown[-1]}"
    return (
        f"alike       {names} are {len(group)} labels, each with posts of its own; mend the source and"
        " prepare it elsewhere if they are one"
    )


def _shown(name: str, group: list[str]) -> str:
    """The label, with escapes where it looks like another label of the group, or is not spelled in
    NFC.
    """
    looks = [_look(other) for other in group]
    same = looks.count(_look(name)) > 1 and _look(name) != name
    return ascii(name) if same or not unicodedata.is_normalized("NFC", name) else repr(name)


def _look(name: str) -> str:
    letters = unicodedata.normalize("NFC", name)
    inked = "".join(letter for letter in letters if letter == " " or not _without_ink(letter))
    return inked.translate(_LOOKALIKES)


def _says(name: str, count: int) -> str:
    return f"{name!r} is a label of {counted(count, 'post')}"


def _without(labels: Sequence[str]) -> str:
    """Advice on what to type to leave out the labels that mean none."""
    others = [name for name in labels if not means_missing(name) and number(name) != -1]
    joined = ",".join(others)
    if len(others) < 2 or not joined.isprintable():
        return "if so, mend the source"
    if any("," in name for name in others) or len(joined) > _MOST_TYPED:
        option = "--labels-file FILE (the other labels, one a line)"
    else:
        option = f"--labels={shlex.quote(joined)}"  # with =, since the first may begin with a minus
    return f"if so, prepare it elsewhere with {option} --on-bad drop"


def _numbers(labels: Sequence[str]) -> list[str]:
    """Advice to name labels that are all numbers."""
    present = [name for name in labels if not means_missing(name)]
    values = {value for name in present if (value := number(name)) is not None and value != -1}
    if not values or any(number(name) is None for name in present):
        return []
    if values == set(range(len(values))):
        remedy = "prepare it elsewhere with --labels NAME_OF_0,NAME_OF_1,… or --labels-file"
    else:
        remedy = "write them into the source (--labels names the numbers from 0 on only)"
    return [f"numbers     the labels are numbers ({_some(present)}); if they have names, {remedy}"]


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= _SHOWN else f"{', '.join(labels[:2])}, … {labels[-1]}"
