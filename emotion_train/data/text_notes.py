"""Texts with signs of trouble that a person should know before training on them: HTML entities,
UTF-8 that was read as Latin-1, line breaks.

Each sign needs a certain byte, which is searched in the whole batch at once; only texts with that
byte cost more.
"""

from __future__ import annotations

import html
import re
from html.entities import html5
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The semicolon is needed: "&copy=1" in a link is no entity, though browsers take it for one
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|([A-Za-z][A-Za-z0-9]{1,31}));")


def _misread(first: int, last: int) -> str:
    """The characters that bytes from `first` to `last` become in Latin-1 and Windows-1252."""
    raw = bytes(range(first, last + 1))
    return "".join(sorted({*raw.decode("latin-1"), *raw.decode("cp1252", "ignore")}))


def _mojibake() -> str:
    """A pattern (RE2) for characters of two bytes or more that were read byte by byte.

    A capital letter before a quote, dash or ellipsis may be meant ("AMANHÃ…"): it counts only next
    to small letters, or where two such pairs follow each other.
    """
    may_be_meant = "…‘’“”–—«»\u00a0"
    following = _misread(0x80, 0xBF)
    strange = "".join(letter for letter in following if letter not in may_be_meant)
    return "|".join(
        (
            "Â[\u00a0-\u00bf]",
            f"Ã[{strange}]",
            f"[ÄÅ][{strange.translate(dict.fromkeys(map(ord, '°²³')))}]",
            f"[a-z][ÄÅ][{may_be_meant}][a-z]|Ä°[a-z]",
            f"[a-z]Ã[{may_be_meant}]|Ã[{may_be_meant}][a-z]|(?:^| )Ã\u00a0",
            f"â(?:[{strange}][{following}]|[{following}][{strange}])",
            f"ð[Ÿ\u009f][{following}]",
            "ï»¿|ï¿½",
            f"(?:[\u00c2-\u00df][{following}]){{2}}",
            f"(?:[\u00e0-\u00ef][{following}]{{2}}){{2}}",
        )
    )


_MOJIBAKE = _mojibake()
_LEAD = 0xC3  # the first UTF-8 byte of each of U+00C0 to U+00FF, which begin all mojibake


def rows(texts: Any) -> dict[str, Any]:
    """Positions of texts with `line_breaks`, `html_entities` and `mojibake`; a kind without any is
    left out.
    """
    broken = np.union1d(_with_byte(texts, 0x0A), _with_byte(texts, 0x0D))
    leads = _with_foreign_pair(texts)
    misread = pc.match_substring_regex(texts.take(pa.array(leads)), _MOJIBAKE)
    by_kind = {
        "line_breaks": broken,
        "html_entities": with_entities(texts),
        "mojibake": leads[misread.to_numpy(zero_copy_only=False).astype(bool)],
    }
    return {kind: rows for kind, rows in by_kind.items() if len(rows)}


def with_entities(texts: Any) -> Any:
    """Positions of texts with at least one HTML entity."""
    candidates = _with_byte(texts, ord("&"))
    values = texts.take(pa.array(candidates)).to_pylist()
    return candidates[np.array([_has_entity(value) for value in values], bool)]


def unescaped(text: str) -> str:
    """The text with each HTML entity replaced by its character, once: &amp;lt; becomes &lt;."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text)


def _has_entity(text: str) -> bool:
    return any(match[1] is None or f"{match[1]};" in html5 for match in _ENTITY.finditer(text))


def _with_byte(texts: Any, byte: int) -> Any:
    """Positions of the texts whose UTF-8 has this byte, in order."""
    raw, bounds = _bytes_of(texts)
    return _texts_at(np.flatnonzero(raw == byte), bounds)


def _with_foreign_pair(texts: Any) -> Any:
    """Positions of texts with a letter of U+00C0 to U+00FF before another letter that is not ASCII:
    few texts of any language have it, and all mojibake does.
    """
    raw, bounds = _bytes_of(texts)
    at = np.flatnonzero(raw[:-2] == _LEAD) if len(raw) > 2 else np.zeros(0, np.int64)
    return _texts_at(at[raw[at + 2] >= 0x80], bounds)


def _bytes_of(texts: Any) -> tuple[Any, Any]:
    """The bytes of all texts one after the other, and where each begins, with the end."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]], bounds - bounds[0]


def _texts_at(places: Any, bounds: Any) -> Any:
    """Positions of the texts that hold these bytes, each once."""
    return np.unique(np.searchsorted(bounds, places, side="right") - 1).astype(np.int64)
