"""Documents such as a data set's index.json and a staged base's base.json: frozen canonical JSON,
refused when damaged or of another schema.

A document may carry a digest over the rest of its content. It catches accidents, such as an edit by
hand or a broken copy. It does not stop an attacker, who can compute the digest anew.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from emotion_train.edges.bounded import Unreadable, object_in, phrase
from emotion_train.errors import WrongRequest
from emotion_train.storage.store import Store


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


DIGEST = "digest"


class Manifest(FrozenModel):
    """A whole document. The default of its field `schema_version` is the schema that is written.

    `older` are further schemas that can be read, and `digested` the schemas with a digest. The
    digest is no field: `to_bytes` adds it and `read_manifest` compares it.
    """

    older: ClassVar[tuple[str, ...]] = ()
    digested: ClassVar[tuple[str, ...]] = ()
    max_bytes: ClassVar[int] = 64 << 20

    @classmethod
    def newest(cls) -> str:
        return str(cls.model_fields["schema_version"].default)

    @classmethod
    def refuse_unknown(cls, document: dict[str, Any]) -> str | None:
        """Why this version cannot read a document of a known schema; None where it can."""
        return None

    def content(self) -> dict[str, Any]:
        """The content to write, without the digest."""
        return self.model_dump(mode="json")

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same content always gives the same bytes."""
        content = self.content()
        if content["schema_version"] in self.digested:
            content[DIGEST] = digest_of(content)
        return _canonical(content)


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def digest_of(content: dict[str, Any]) -> str:
    """The sha256 of the canonical JSON of a document's content, without its digest."""
    rest = {name: value for name, value in content.items() if name != DIGEST}
    return hashlib.sha256(_canonical(rest)).hexdigest()


M = TypeVar("M", bound=Manifest)
NOT_INSTALLED = "unknown"


def read_manifest(kind: type[M], store: Store, key: str, *, other_schema: str, damaged: str) -> M:
    """Read and check a document. Raises `ObjectNotFound` when there is none, and `WrongRequest`
    that ends in the sentence `other_schema` or `damaged`.
    """

    def verify(raw: bytes) -> M:
        try:
            document = object_in(raw, kind.max_bytes, once=True)
            schema = document.get("schema_version")
            if schema not in (kind.newest(), *kind.older):
                raise WrongRequest(
                    f"{store.url}/{key} has schema {str(schema)[:80]!r}; this version reads"
                    f" {kind.newest()!r}. {other_schema}"
                )
            if schema in kind.digested and document.pop(DIGEST, None) != digest_of(document):
                raise Unreadable("its digest is not that of its content")
            if (reason := kind.refuse_unknown(document)) is not None:
                raise WrongRequest(f"{store.url}/{key} {reason}")
            return kind.model_validate(document)
        except (Unreadable, ValidationError) as error:
            reason = phrase(error)
            raise WrongRequest(f"{store.url}/{key} is damaged or was edited ({reason}). {damaged}") from None

    return store.read_verified(key, verify, length=kind.max_bytes + 1)


def version_of(package: str) -> str:
    """The installed version, else `NOT_INSTALLED`: this program may run from a source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
