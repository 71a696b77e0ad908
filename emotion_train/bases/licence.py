"""The licence of a base as this machine knows it: by its card beside it or in the hub's cache, by a
GGUF file's header, or by name for the bases of this program's configs. No request is sent.
"""

from __future__ import annotations

import re
from pathlib import Path

from emotion_train.bases.gguf_file import GgufFile
from emotion_train.bases.packaged import SMALL_MODEL
from emotion_train.edges import hub
from emotion_train.edges.bounded import Unreadable, bytes_of, yaml_in
from emotion_train.errors import WrongRequest

_KNOWN = {
    SMALL_MODEL: "apache-2.0",
    "mistralai/Mistral-Small-3.1-24B-Base-2503": "apache-2.0",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": "apache-2.0",
}
_MOST_BYTES = 1 << 20
_HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}")


def licence_of(base: str) -> str | None:
    """The licence's short name, such as apache-2.0; None where it is not known here."""
    if base in _KNOWN:
        return _KNOWN[base]
    folder = Path(base)
    if folder.suffix == ".gguf" and folder.is_file():
        return _named(_in_header(folder))
    card: Path | None = (folder if folder.is_dir() else folder.parent) / "README.md"
    if not folder.exists():
        card = hub.in_cache(base, "README.md") if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    if card is None or not card.is_file():
        return None
    try:
        header = _HEADER.match(bytes_of(card, _MOST_BYTES).decode("utf-8", "replace"))
        values = yaml_in(header[1]) if header else None
    except (Unreadable, OSError):
        return None
    return _named(values.get("license") if isinstance(values, dict) else None)


def _in_header(path: Path) -> object:
    try:
        return GgufFile.open(path).metadata.get("general.license")
    except WrongRequest:
        return None


def _named(found: object) -> str | None:
    return found if isinstance(found, str) and _NAME.fullmatch(found) else None
