"""What a data set's index.json and a staged base's base.json share: frozen canonical JSON, refused
when damaged or of another schema.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from emotion_train.errors import WrongRequest
from emotion_train.storage.store import Store


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Manifest(FrozenModel):
    """The whole document; its field `schema_version` has the one schema that is read as default."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same content always gives the same bytes."""
        return (
            json.dumps(
                self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
            )
            + "\n"
        ).encode()


M = TypeVar("M", bound=Manifest)
NOT_INSTALLED = "unknown"


def read_manifest(kind: type[M], store: Store, key: str, *, other_schema: str, damaged: str) -> M:
    """Read and check a document. Raises `ObjectNotFound` when there is none, else `WrongRequest`
    that ends in the sentence for the case.
    """
    raw = store.read(key)
    schema = kind.model_fields["schema_version"].default
    try:
        document = json.loads(raw)
        found = document.get("schema_version") if isinstance(document, dict) else None
        if found != schema:
            raise WrongRequest(
                f"{store.url}/{key} has schema {found!r}; this version reads {schema!r}. {other_schema}"
            )
        return kind.model_validate(document)
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WrongRequest(f"{store.url}/{key} is damaged or was edited ({reason}). {damaged}") from None


def version_of(package: str) -> str:
    """The installed version, else `NOT_INSTALLED`: this program may be run from a source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
