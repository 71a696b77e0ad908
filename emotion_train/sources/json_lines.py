"""Reads posts from JSON Lines: one object per line, with a label as text, number or list."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from emotion_train.edges.bounded import DoubledKey, Unreadable, line_in, object_in
from emotion_train.errors import WrongRequest
from emotion_train.sources.posts import SEVERAL, UTF8, Batch, Columns, PostFile, by_bytes, kept_text, utf8
from emotion_train.sources.unpacked import head_of, lines_of, newline_of

MOST_DESCRIPTION_BYTES = 1 << 20


def read_json_lines(number: int, file: PostFile, columns: Columns) -> Iterator[Batch]:
    """All lines of the file; raises `WrongRequest` where it is one JSON document over many lines,
    or where its first objects lack a column.
    """
    head = head_of(file)
    _refuse_one_document(head, file)
    own, keys = columns, dict[str, None]()
    with lines_of(file, newline_of(head)) as lines:
        numbered = ((line_number, line) for line_number, line in enumerate(lines, 1))
        for piece in by_bytes((pair, len(pair[1])) for pair in numbered):
            rows = [(row, *_parsed(line, file.encoding)) for row, line in piece]
            met = dict.fromkeys(key for _, post, trouble in rows if trouble is None for key in post)
            if not met.keys() <= keys.keys():
                keys |= met
                own = columns.among(list(keys), str(file.path))
            yield _batch(number, own, rows)


def columns_of_lines(file: PostFile, columns: Columns) -> Columns | None:
    """The columns as the file's first lines spell them; None where no object ends among the bytes
    read here. Raises as `read_json_lines`.
    """
    head = head_of(file)
    _refuse_one_document(head, file)
    keys: dict[str, None] = {}
    for line in head.split("\n"):
        post, trouble = _parsed(line, "")
        if trouble is None:
            keys |= dict.fromkeys(post)
    return columns.among(list(keys), str(file.path)) if keys else None


def is_description(name: str, raw: bytes) -> bool:
    """Whether a JSON file beside posts holds none, such as a list of label names: one object over
    several lines, without a list of objects. No such object is JSON Lines.
    """
    if not name.lower().endswith(".json") or b"\n" not in raw.strip():
        return False
    try:
        described = object_in(raw, MOST_DESCRIPTION_BYTES)
    except Unreadable:
        return False
    return not any(
        isinstance(item, dict) for value in described.values() if isinstance(value, list) for item in value
    )


def _batch(number: int, columns: Columns, rows: list[tuple[int, dict[str, Any], str | None]]) -> Batch:
    judged = [(row, post, trouble or _unfit(post, columns)) for row, post, trouble in rows]
    good = [(row, post) for row, post, trouble in judged if trouble is None]
    values = {
        name: utf8([spell(post.get(name)) for _, post in good])
        for name in columns.named
        for spell in (_spelling_of(name, columns),)
    }
    return Batch.of(
        number,
        [row for row, _ in good],
        columns,
        values,
        broken=tuple((trouble, row) for row, _, trouble in judged if trouble not in (None, "blank")),
        blank=tuple(row for row, _, trouble in judged if trouble == "blank"),
    )


def _spelling_of(name: str, columns: Columns) -> Callable[[Any], str | None]:
    """The function that spells the values of this column."""
    if name == columns.label:
        return spelled_target if columns.lists else spelled
    return kept_text if columns.only_kept(name) else spelled


def _unfit(post: dict[str, Any], columns: Columns) -> str | None:
    """The kind of trouble that keeps an object from being a post; None for a post."""
    if not isinstance(post.get(columns.text), str | None):
        return "not_text"
    label = None if columns.label is None else post.get(columns.label)
    labels = label if isinstance(label, list) else [label]
    infinite = any(isinstance(value, float) and math.isinf(value) for value in labels)
    return "infinite_label" if infinite else None


def spelled(value: Any) -> str | None:
    """A label as text; for a list, its items with `SEVERAL` between them. None where the label, or
    an item of the list, is missing (null, NaN).
    """
    if isinstance(value, list):
        items = [spelled(item) for item in value]
        return None if not items or None in items else SEVERAL.join(map(str, items))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else str(value)


def spelled_target(value: Any) -> str | None:
    """One label or several as text: for a list, a `SEVERAL` before each item, with an empty text
    for a missing item; for an object, its JSON without nulls.
    """
    if isinstance(value, list):
        return "".join(f"{SEVERAL}{spelled(item) or ''}" for item in value) or None
    if isinstance(value, dict):
        return json.dumps({key: item for key, item in value.items() if item is not None})
    return spelled(value)


def _parsed(line: str, encoding: str) -> tuple[dict[str, Any], str | None]:
    """The line's object, or the kind of trouble with it."""
    if not line.strip():
        return {}, "blank"
    try:
        text = line.encode("latin-1").decode() if encoding == UTF8 else line
        post = line_in(text)
    except UnicodeDecodeError:
        return {}, "undecodable"
    except DoubledKey:
        return {}, "doubled_key"
    except Unreadable:
        return {}, "broken_json"
    return (post, None) if isinstance(post, dict) else ({}, "broken_json")


def _refuse_one_document(head: str, file: PostFile) -> None:
    start = head.lstrip()
    if start.startswith("["):
        raise WrongRequest(
            f"{file.path} is one JSON array, not JSON Lines; convert it with `jq -c '.[]' {file.path} >"
            " posts.jsonl`."
        )
    first = start.partition("\n")[0].strip()
    if first == "{" or (first.startswith("{") and first.endswith(",")):
        inner = re.search(r'"(\w+)"\s*:\s*\[\s*\{', head)
        query = f"'.{inner[1]}[]'" if inner else "."
        raise WrongRequest(
            f"{file.path} spreads one JSON object over many lines, which is not JSON Lines; convert it with"
            f" `jq -c {query} {file.path} > posts.jsonl`."
        )
