"""A data set's index.json edited by one who computes its digest anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emotion_train.data.index import Index
from emotion_train.storage.document import DIGEST, digest_of


def sealed(document: dict[str, Any]) -> bytes:
    """The document as JSON with the digest of its content."""
    return json.dumps(document | {DIGEST: digest_of(document)}).encode()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the file's document in place."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(sealed(document))


def index_of(document: dict[str, Any] | bytes) -> Index:
    """The index of a document, whatever its digest is."""
    content = dict(json.loads(document)) if isinstance(document, bytes) else dict(document)
    content.pop(DIGEST, None)
    return Index.model_validate(content)
