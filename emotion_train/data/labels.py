"""Which label each value of the label column means, by code.

All values that differ are held in memory: up to 1,000 labels and 10,000 combinations of them.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import numpy as np

from emotion_train.data.posts import SEVERAL
from emotion_train.errors import WrongRequest

MAX_LABELS = 1000
_MAX_COMBINATIONS = 10_000  # values that look like several labels, until all labels are known
# Several strings or numbers as numpy prints them, without commas
_NUMPY_LIST = r"\[\s*(?:'[^',]*'(?:\s+'[^',]*')+|[0-9]+(?:\s+[0-9]+)+)\s*\]"


class LabelNames:
    """Turns what a source says of a label into a code; codes of given names are their positions,
    others come by first sight.

    Where no names are given, "joy,anger" may be one label or two: its rows get a code like any
    other, and `settle` decides when all rows were seen, so that their order does not matter.
    """

    NONE, UNKNOWN, SEVERAL, OBJECT = -1, -2, -3, -4

    def __init__(self, given: tuple[str, ...] | None, of_source: tuple[str, ...] | None) -> None:
        self._integers = None if any(map(_is_number, given or ())) else given
        self.fixed = given is not None or of_source is not None
        self._in_order = given or of_source
        self.codes: dict[str, int] = {name: code for code, name in enumerate(self._in_order or ())}
        self._seen: dict[str, int] = {}
        self._combinations = 0  # names that may turn out to be several

    def code(self, raw: str) -> int:
        if raw not in self._seen:
            if len(self._seen) > 100_000:
                self._seen.clear()
            self._seen[raw] = self._resolve(raw.strip())
        return self._seen[raw]

    def settle(self) -> Any:
        """The final code of each code given so far; `SEVERAL` for a name made of two or more
        others. `codes` holds the final ones.
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
        """Given order, else by number if all are numbers, else by alphabet."""
        if self._in_order is not None:
            return self._in_order
        return tuple(
            sorted(self.codes, key=int)
            if all(re.fullmatch(r"[0-9]+", name) for name in self.codes)
            else sorted(self.codes)
        )

    def nearest(self, unknown: str) -> str:
        near = difflib.get_close_matches(unknown, self.codes, n=1, cutoff=0.5)
        return f", did you mean {near[0]!r}?" if near else ""

    def _resolve(self, value: str) -> int:
        if not value:
            return self.NONE
        if value in self.codes:
            return self.codes[value]
        # a list printed into a CSV cell
        if value.startswith("[") and value.endswith("]") and not re.fullmatch(_NUMPY_LIST, value):
            items = [
                item.strip(" '\"")
                for item in re.split(r"[,\s]+" if self._all_known(value) else ",", value[1:-1])
            ]
            return self._resolve(items[0]) if len(items) == 1 else self.SEVERAL
        if SEVERAL in value or re.fullmatch(_NUMPY_LIST, value):
            return self.SEVERAL
        if value.startswith("{") and value.endswith("}"):
            return self.OBJECT
        if (
            self._integers
            and re.fullmatch(r"[0-9]+(\.0)?", value)
            and int(float(value)) < len(self._integers)
        ):
            return self.codes.get(self._integers[int(float(value))], self.UNKNOWN)
        if self.fixed:
            parts = _parts(value)
            return (
                self.SEVERAL
                if len(parts) > 1 and all(self._resolve(part) >= 0 for part in parts)
                else self.UNKNOWN
            )
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
        """Whether a list without commas, as numpy prints it, is made of known names or numbers."""
        return self.fixed and all(self._resolve(part.strip("'\"")) >= 0 for part in value[1:-1].split())


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[0-9]+", name) is not None


def _parts(name: str) -> list[str]:
    """The labels of which a name may be made."""
    return [part.strip() for part in re.split(r"[,;|]", name) if part.strip()]


def _too_many(value: str) -> WrongRequest:
    return WrongRequest(
        f"The label column has more than {MAX_LABELS:,} different values, such as {value[:40]!r}; type"
        " --label-column with another."
    )
