"""The labels in a post's cells: a list, a printed list, names with separators, an object of shares,
or one number per label in columns of their own.

    joy,anger   joy|anger   joy; anger   ['joy', 'anger']   ['joy' 'anger']   [3 10]
    {"joy": 0.67, "neutral": 0.33}

A list in place of shares holds votes: each item counts the same. Equal cells are read once. Columns
are read one after the other, so the cost of 1,000 columns grows only with their labels.

Letters: N posts, P pairs of a post and one of its labels.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from emotion_train.data.labels import LabelNames, trimmed
from emotion_train.data.target_columns import PostTargets
from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import SEVERAL

LONGEST_CELL = 1 << 20  # characters, of a list or an object
SHARES_OFF = 0.01  # by which the sum of rounded shares may differ from 1
_STRING = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_ITEM = re.compile(rf"({_STRING})|([^\s,]+)")
_LISTED = re.compile(rf"\s*(?:(?:{_STRING})[\s,]*)+", re.DOTALL)
_PAIR = re.compile(rf"\s*({_STRING})\s*:\s*([^\s,]+)\s*(?:,|$)", re.DOTALL)
_ELLIPSIS = "..."  # what numpy prints for items that it leaves out
_NOTHING = ("None", "nan", "null", "<NA>")
_TRUTH = {"true": "1", "false": "0"}


class Said(NamedTuple):
    """The labels and values in posts' cells, before each post's values are checked together."""

    post_P: Any
    label_P: Any
    value_P: Any
    trouble: dict[int, str]  # kind of trouble by post


class ReadCells(NamedTuple):
    """The different cells: the target, kind of trouble, unknown label and form of each; and the
    number of each post's cell among them.
    """

    targets: PostTargets
    kind: list[str | None]
    unknown: list[str]
    form: list[str]
    index_N: Any


class Form(NamedTuple):
    """A cell taken apart: its form, and its labels with their values."""

    name: str  # list, object or plain; empty for an empty cell
    pairs: Sequence[tuple[str, float]]
    trouble: str | None = None


def form_of(cell: str, names: LabelNames) -> Form:
    """The labels of a cell. A list's items are not divided further."""
    value = trimmed(cell)
    if not value:
        return Form("", ())
    if len(value) > LONGEST_CELL:
        return Form("plain", (), "label_too_long")
    if value.startswith(SEVERAL):
        return _of_list(value.split(SEVERAL)[1:])
    if names.knows(value):
        return Form("plain", [(value, 1.0)])
    if value[0] == "[" and value[-1] == "]":
        return _of_list(_printed(value[1:-1], names))
    if value[0] == "(" and value[-1] == ")" and _LISTED.fullmatch(value[1:-1]):
        return _of_list(_printed(value[1:-1], names))
    if value[0] == "{":
        return _of_object(value)
    parts = [part for piece in re.split(r"[,;|]", value) if (part := trimmed(piece))]
    return Form("plain", [(part, 1.0) for part in parts])


def _of_list(items: Sequence[str]) -> Form:
    gap = any(not trimmed(item) for item in items)
    return Form("list", [(item, 1.0) for item in items], "gap_in_list" if gap else None)


def _printed(inner: str, names: LabelNames) -> list[str]:
    """The items of a list as Python or numpy prints it, with or without quotes and commas."""
    if _LISTED.fullmatch(inner):
        return [_unquoted(match[1]) for match in _ITEM.finditer(inner)]
    if not inner.strip():
        return []
    if "," in inner:
        items = [item.strip() for item in inner.split(",")]
        return ["" if item in _NOTHING else item.strip("'\"") for item in items]
    items = ["" if item in _NOTHING else item for item in inner.split()]
    numbers = all(re.fullmatch(r"[0-9]+\.?", item) for item in items)
    return items if numbers or _ELLIPSIS in items or "" in items or all(map(names.knows, items)) else [inner]


def _unquoted(words: str) -> str:
    try:
        value = str(json.loads(words) if words[0] == '"' else ast.literal_eval(words))
    except (ValueError, SyntaxError):
        return words[1:-1]
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _of_object(value: str) -> Form:
    """The names and numbers of an object as JSON or Python spells it."""
    inner, shares, end = value[1:-1].strip(), dict[str, float](), 0
    while end < len(inner):
        match = _PAIR.match(inner, end)
        if match is None:
            return Form("object", (), "bad_share")
        name = trimmed(_unquoted(match[1]))
        number = number_of(match[2])
        if number is None or name in shares:
            return Form("object", (), "bad_share")
        shares[name], end = number, match.end()
    if value[-1] != "}":
        return Form("object", (), "bad_share")
    return Form("object", list(shares.items()))


def number_of(words: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(words)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in words else None


class TargetValues:
    """Reads cells as targets of one kind; new labels get codes of `names`."""

    def __init__(self, kind: TargetKind, names: LabelNames, *, allow_none: bool) -> None:
        self._kind = kind
        self._names = names
        self._allow_none = allow_none
        self._columns: tuple[str, ...] | None = None

    def of_cells(self, values: Any) -> ReadCells:
        """The targets of an array of cells; equal cells are read once."""
        encoded = values.dictionary_encode()
        index_N = encoded.indices.to_numpy(zero_copy_only=False)
        forms = [form_of(word, self._names) for word in encoded.dictionary.to_pylist()]
        unknown = [""] * len(forms)
        pairs: list[tuple[int, int, float]] = []
        trouble: dict[int, str] = {}
        for cell, form in enumerate(forms):
            coded, kind, unknown[cell] = self._coded(form)
            if kind is not None:
                trouble[cell] = kind
            else:
                pairs += [(cell, code, value) for code, value in coded]
        post_P, label_P, value_P = zip(*pairs, strict=True) if pairs else ((), (), ())
        said = Said(
            np.array(post_P, np.int64), np.array(label_P, np.int32), np.array(value_P, float), trouble
        )
        targets, kinds = self._checked(said, len(forms))
        return ReadCells(targets, kinds, unknown, [form.name for form in forms], index_N)

    def _coded(self, form: Form) -> tuple[list[tuple[int, float]], str | None, str]:
        """The codes with values, the kind of trouble, and the unknown label."""
        if form.trouble is not None:
            return [], form.trouble, ""
        if form.name == "object" and self._kind == "several":
            return [], "object_label", ""
        values: dict[int, float] = {}
        for name, value in form.pairs:
            code = LabelNames.UNKNOWN if name == _ELLIPSIS else self._names.single(name)
            if code < 0:
                return [], LabelNames.KINDS[code], trimmed(name)
            if code in values and self._kind == "several" and form.name == "list":
                return [], "doubled_label", ""
            values[code] = 1.0 if self._kind == "several" else values.get(code, 0.0) + value
        return list(values.items()), None, ""

    def of_columns(
        self, columns: Mapping[str, Any], posts: int, place: str
    ) -> tuple[PostTargets, list[str | None]]:
        """The targets and the kind of trouble of each post, from one column per label.

        Raises `WrongRequest` where an earlier file had other columns.
        """
        names = tuple(columns)
        if self._columns is None:
            self._columns = names
            self._names.fix(tuple(map(trimmed, names)))
        if self._columns != names:
            other = next(
                (name for name in (*names, *self._columns) if (name in names) != (name in self._columns)), ""
            )
            raise WrongRequest(
                f"{place} has other columns of labels than the file before, such as {other!r}, or in another"
                " order; give all files the same columns, or name each with --label-columns."
            )
        parts: list[tuple[Any, Any, Any]] = []
        trouble: dict[int, str] = {}
        hidden: set[int] = set()
        for code, column in enumerate(columns.values()):
            value_N = _numbers(column, truth=self._kind != "shares")
            wrong_N = np.isnan(value_N) if self._kind == "shares" else ~np.isin(value_N, (0.0, 1.0))
            kind = "bad_share" if self._kind == "shares" else "not_binary"
            trouble |= dict.fromkeys(np.flatnonzero(wrong_N).tolist(), kind)
            if wrong_N.any():
                hidden |= set(np.flatnonzero(_is_hidden(column)).tolist())
            posts_here = np.flatnonzero(~wrong_N & (value_N != 0))
            parts.append((posts_here, np.full(len(posts_here), code, np.int32), value_N[posts_here]))
        trouble |= dict.fromkeys(sorted(hidden), "hidden_labels")
        post_P, label_P, value_P = (np.concatenate(side) for side in zip(*parts, strict=True))
        return self._checked(Said(post_P, label_P, value_P, trouble), posts)

    def _checked(self, said: Said, posts: int) -> tuple[PostTargets, list[str | None]]:
        """The targets of posts without trouble, empty for the others; and each post's trouble."""
        kinds: list[str | None] = [said.trouble.get(post) for post in range(posts)]
        count_N = np.bincount(said.post_P, minlength=posts)
        share_P = said.value_P
        troubles = {"no_label": (count_N == 0) if not self._allow_none else np.zeros(posts, bool)}
        if self._kind == "one":
            troubles["several_labels"] = count_N > 1
        elif self._kind == "shares":
            negative_P = said.value_P < 0
            total_N = np.bincount(said.post_P, said.value_P, posts)
            part_N = np.bincount(said.post_P, said.value_P != np.floor(said.value_P), posts) > 0
            troubles["bad_share"] = (np.bincount(said.post_P, negative_P, posts) > 0) | ~np.isfinite(total_N)
            troubles["no_label"] |= ~troubles["bad_share"] & (total_N == 0)
            troubles["shares_off"] = part_N & (np.abs(total_N - 1) > SHARES_OFF + 1e-9)
            share_P = said.value_P / np.where(total_N == 0, 1, total_N)[said.post_P]
        for kind, wrong_N in troubles.items():
            for post in np.flatnonzero(wrong_N).tolist():
                kinds[post] = kinds[post] or kind
        good_N = np.array([kind is None for kind in kinds], bool)
        kept_P = good_N[said.post_P] & (share_P != 0)
        return PostTargets.of_pairs(said.post_P[kept_P], said.label_P[kept_P], share_P[kept_P], posts), kinds


def weights_of(column: Any) -> Any:
    """The weight of each post; NaN for anything but a finite number above 0."""
    weight_N = _numbers(column)
    weight_N[~(weight_N > 0)] = np.nan
    return weight_N


def _numbers(column: Any, *, truth: bool = False) -> Any:
    """A column of binary cells as numbers; NaN for anything but a finite number. With `truth`, true
    and false count as 1 and 0.
    """
    words, index_N = _words(column)
    values = (number_of(_TRUTH.get(word.strip().lower(), word) if truth else word) for word in words)
    value_D = np.array([math.nan if value is None else value for value in values], float)
    return value_D[index_N] if words else np.zeros(0)


def _is_hidden(column: Any) -> Any:
    """Where a column says NONE, as in a shared task's posts with secret labels (SemEval)."""
    words, index_N = _words(column)
    return np.array([word.strip().upper() == "NONE" for word in words], bool)[index_N]


def _words(column: Any) -> tuple[list[str], Any]:
    """The different cells of a binary column, and the number of each post's cell among them."""
    encoded = pc.fill_null(column, b"").dictionary_encode()
    words = [word.decode("utf-8", "replace") for word in encoded.dictionary.to_pylist()]
    return words, encoded.indices.to_numpy(zero_copy_only=False)
