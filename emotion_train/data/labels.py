"""The label that each value of the label column means, as a code.

All different values are held in memory: up to 1,000 labels and 10,000 combinations of them.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np

from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import SEVERAL

MAX_LABELS = 1000
MAX_LABEL_CHARS = 200
_MAX_COMBINATIONS = 10_000  # values that look like several labels, while labels are not all known
_REMEMBERED = 100_000  # values whose code is kept
# Several strings or numbers as numpy prints them, without commas
_NUMPY_LIST = r"\[\s*(?:'[^',]*'(?:\s+'[^',]*')+|[0-9]+(?:\s+[0-9]+)+)\s*\]"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
# What pandas, R, Excel and people write into a CSV for a missing cell
_MISSING = re.compile(r"n/?a|n\.a\.|#n/?a!?|<na>|-?nan|null|nil|none|--?|\?|\.", re.IGNORECASE)
# Characters without ink that Unicode counts among letters, symbols and marks
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
# and characters with ink, or a meaning at the end of a flag, that it counts among formats (Cf)
_INKED = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd\U000e0020-\U000e007f]")


class LabelNames:
    """Turns a source's labels into codes. Given names have their positions as codes; other labels
    get the next code when first met.

    `given` are the names that the person typed. Ids are positions among them, unless one of them is
    itself a number: then numbers are names. `of_source` are the names in the source's files: all
    labels, in order, whose ids readers have already replaced.

    Without either, "joy,anger" may be one label or two. Such rows get a code like any other, and
    `settle` decides once all rows are read, so that the order of rows does not matter.
    """

    NONE, UNKNOWN, SEVERAL, OBJECT, TOO_LONG = -1, -2, -3, -4, -5
    # the trouble of a post whose list has an item with this code
    KINDS: ClassVar[dict[int, str]] = {
        NONE: "gap_in_list",
        UNKNOWN: "unknown_label",
        OBJECT: "object_label",
        TOO_LONG: "label_too_long",
    }

    def __init__(self, given: tuple[str, ...] | None, of_source: tuple[str, ...] | None) -> None:
        self._in_order = given or of_source
        self.fixed = self._in_order is not None
        self.codes: dict[str, int] = {name: code for code, name in enumerate(self._in_order or ())}
        self._by_number = _only_ones((number(name), code) for name, code in self.codes.items())
        self._trimmed = _only_ones((trimmed(name), code) for name, code in self.codes.items())
        numbered = any(number(name) is not None for name in self.codes)
        self._ids = 0 if numbered else len(given or ())  # ids below this number are positions
        self._seen: dict[str, int] = {}
        self._combinations = 0  # names that may turn out to be several labels

    def code(self, raw: str) -> int:
        """The code of a label, or one of the negative codes above.

        Raises `WrongRequest` when there are too many different values.
        """
        if len(raw) > 2 * MAX_LABEL_CHARS:  # free text by mistake: not kept in memory
            return self._resolve(raw)
        if raw not in self._seen:
            if len(self._seen) > _REMEMBERED:
                self._seen.clear()
            self._seen[raw] = self._resolve(raw)
        return self._seen[raw]

    def knows(self, value: str) -> bool:
        """Whether all labels are known and the value is one of them."""
        return self.fixed and self._known(value, value) is not None

    def single(self, raw: str) -> int:
        """The code of a list's item, which is one label whatever punctuation it has."""
        value = trimmed(raw)
        if not value:
            return self.NONE
        if (known := self._known(raw, value)) is not None:
            return known
        if len(value) > MAX_LABEL_CHARS:
            return self.TOO_LONG
        if value.startswith("{") and value.endswith("}"):
            return self.OBJECT
        if self.fixed:
            return self.UNKNOWN
        if len(self.codes) >= MAX_LABELS:
            raise _too_many(value)
        self.codes[value] = len(self.codes)
        return self.codes[value]

    def fix(self, names: tuple[str, ...]) -> None:
        """Fix all labels and their order, by their columns' names."""
        require_names(names, "--label-columns")
        if len(names) > MAX_LABELS:
            raise WrongRequest(
                f"--label-columns takes in {len(names):,} columns, and {MAX_LABELS:,} labels are the most;"
                " name the columns of labels only."
            )
        self._in_order, self.fixed = names, True
        self.codes = {name: code for code, name in enumerate(names)}

    def ranked(self) -> Any:
        """The place of each code in the final order, which becomes its code. Choices by these codes
        do not depend on the order of rows.
        """
        names = self.in_order()
        place = {name: number for number, name in enumerate(names)}
        rank_C = np.array([place[name] for name in self.codes], np.int32)
        self.codes = place
        return rank_C

    def settle(self) -> Any:
        """The final code of each code given so far; `SEVERAL` for a name that combines other names.
        `codes` then holds the final codes.
        """
        parts_of = {name: _parts(name) for name in self.codes}
        several = (
            set()
            if self.fixed
            else {
                name for name, parts in parts_of.items() if len(parts) > 1 and self.codes.keys() >= set(parts)
            }
        )
        names = [name for name in self.codes if name not in several]
        if len(names) > MAX_LABELS and not self.fixed:
            raise _too_many(names[MAX_LABELS])
        final_C = np.full(len(self.codes), self.SEVERAL, np.int32)
        final_C[[self.codes[name] for name in names]] = np.arange(len(names))
        self.codes = {name: code for code, name in enumerate(names)}
        return final_C

    def in_order(self) -> tuple[str, ...]:
        """All labels in the given order, else by number if all are numbers, else by alphabet."""
        if self._in_order is not None:
            return self._in_order
        numbers = {name: value for name in self.codes if (value := number(name)) is not None}
        if len(numbers) < len(self.codes):
            return tuple(sorted(self.codes))
        return tuple(sorted(self.codes, key=lambda name: (numbers[name], name)))

    def advice(self, unknown: str) -> str:
        """Advice on a value that is none of the labels, with a leading comma; may be empty."""
        if number(unknown) == -1:
            return ", which marks posts without a label in data sets of the Hugging Face hub"
        if number(unknown) is not None and self._ids:
            return f", and ids go from 0 to {self._ids - 1}"
        folded = {name.casefold(): name for name in self.codes}
        near = difflib.get_close_matches(unknown.casefold(), folded, n=1, cutoff=0.6)
        if near:
            return f", did you mean {folded[near[0]]!r}?"
        return ", which usually means that there is none" if means_missing(unknown) else ""

    def _resolve(self, raw: str) -> int:
        value = trimmed(raw)
        if not value:
            return self.NONE
        if (known := self._known(raw, value)) is not None:
            return known
        if SEVERAL in value:
            return self.SEVERAL
        if len(value) > MAX_LABEL_CHARS:
            return self._of_too_long(value)
        if re.fullmatch(_NUMPY_LIST, value):
            return self.SEVERAL
        # a list printed into a CSV cell
        if value.startswith("[") and value.endswith("]"):
            items = [
                item.strip(" '\"")
                for item in re.split(r"[,\s]+" if self._all_known(value) else ",", value[1:-1])
            ]
            return self._resolve(items[0]) if len(items) == 1 else self.SEVERAL
        if value.startswith("{") and value.endswith("}"):
            return self.OBJECT
        return self._of_unknown(value) if self.fixed else self._new_code(value)

    def _known(self, raw: str, value: str) -> int | None:
        """The code of a name spelled exactly or with other space around it; for a number, the code
        of the only name with that value, or the position itself. None for an unknown value.
        """
        for spelling in (raw, value):
            if spelling in self.codes:
                return self.codes[spelling]
        if not self.fixed:
            return None
        if (code := self._trimmed.get(value)) is not None:
            return code
        amount = number(value)
        if amount is None:
            return None
        if self._ids and 0 <= amount < self._ids and amount == amount.to_integral_value():
            return int(amount)
        return self._by_number.get(amount)

    def _of_too_long(self, value: str) -> int:
        """`SEVERAL` for a printed list or parts that are all known labels, else `TOO_LONG`."""
        listed = value.startswith("[") and value.endswith("]") and "," in value
        parts = _parts(value)
        all_known = (
            self.fixed and len(parts) > 1 and all(self._known(part, part) is not None for part in parts)
        )
        return self.SEVERAL if listed or all_known else self.TOO_LONG

    def _of_unknown(self, value: str) -> int:
        parts = _parts(value)
        several = len(parts) > 1 and all(self._resolve(part) >= 0 for part in parts)
        return self.SEVERAL if several else self.UNKNOWN

    def _new_code(self, value: str) -> int:
        combined = len(_parts(value)) > 1
        if (
            self._combinations >= _MAX_COMBINATIONS
            if combined
            else len(self.codes) - self._combinations >= MAX_LABELS
        ):
            raise _too_many(value)
        self._combinations += combined
        self.codes[value] = len(self.codes)
        return self.codes[value]

    def _all_known(self, value: str) -> bool:
        """Whether a list without commas, as numpy prints it, holds only known names or numbers."""
        parts = [part.strip("'\"") for part in value[1:-1].split()]
        return self.fixed and all(self._known(part, part) is not None for part in parts)


def require_names(names: tuple[str, ...], option: str = "--labels") -> None:
    """Raises `WrongRequest` where given names cannot be the labels of a data set."""
    clean = [trimmed(name) for name in names]
    doubled = next((name for name, times in Counter(clean).items() if times > 1 and name), None)
    long = next((name for name in clean if len(name) > MAX_LABEL_CHARS), None)
    if doubled is not None:
        reason = f"names {doubled!r} twice"
    elif len(names) < 2:
        reason = "must name at least two labels"
    elif not all(clean):
        reason = f"has no name at place {clean.index('') + 1}"
    elif long is not None:
        reason = f"names a label of {len(long):,} characters, and {MAX_LABEL_CHARS} are the most"
    elif any(SEVERAL in name for name in clean):
        reason = "has a control character in a name"
    else:
        return
    raise WrongRequest(f"{option} {reason}; type for example --labels anger,joy,neutral.")


def trimmed(value: str) -> str:
    """The value without white space and invisible characters at its ends: BOM, zero width, soft
    hyphen, marks of direction, controls. `SEVERAL` stays, since it separates labels.
    """
    if value.isascii() and value.isprintable():
        return value.strip(" ")
    start, end = 0, len(value)
    while start < end and is_invisible(value[start]):
        start += 1
    while end > start and is_invisible(value[end - 1]):
        end -= 1
    return value[start:end]


def is_invisible(character: str) -> bool:
    """Whether a character leaves no ink: white space, a control, a format (Unicode's Cf) or a
    filler.
    """
    if character == SEVERAL or _INKED.match(character):
        return False
    return character.isspace() or character in _BLANK or unicodedata.category(character) in ("Cf", "Cc", "Zs")


def number(name: str) -> Decimal | None:
    """The value of a name that is a number in ASCII digits, of any length; None for others."""
    return Decimal(name) if _NUMBER.fullmatch(name) else None


def means_missing(name: str) -> bool:
    """Whether a name is a usual word for a missing cell, such as NaN or #N/A."""
    return _MISSING.fullmatch(name) is not None


def _only_ones(pairs: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    """The code of each key, without the key None and without keys that have several codes."""
    pairs = [pair for pair in pairs if pair[0] is not None]
    times = Counter(key for key, _ in pairs)
    return {key: code for key, code in pairs if times[key] == 1}


def _parts(name: str) -> list[str]:
    """The labels that a name may combine."""
    return [part for piece in re.split(r"[,;|]", name) if (part := trimmed(piece))]


def _too_many(value: str) -> WrongRequest:
    return WrongRequest(
        f"The label column has more than {MAX_LABELS:,} different values, such as {value[:40]!r}; type"
        " --label-column with another."
    )
