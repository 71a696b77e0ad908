"""The sources of an export: export.json, the first object at its place, so that another export into
the same place is refused before anything is read.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from emotion_train.config import Precision
from emotion_train.data.targets import TargetKind
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import AlreadyExists, ObjectNotFound, StorageError, WrongRequest
from emotion_train.exporting.merge import ExportDtype
from emotion_train.exporting.weights import INDEX
from emotion_train.storage.document import Manifest, read_manifest
from emotion_train.storage.store import Store

EXPORT = "export.json"
_MAX_INDEX_BYTES = 64 << 20


class ExportFacts(Manifest):
    """`precision` is the base's precision in training; `base` is its public name. The export holds
    `layers` of the base's `whole_layers` blocks; None: all, and neither is written.
    """

    schema_version: Literal["emotion-train/export/1"] = "emotion-train/export/1"
    adapter_sha256: str
    base: str
    base_weights_sha256: str
    layers: int | None = None
    whole_layers: int | None = None
    dtype: ExportDtype
    precision: Precision
    targets: TargetKind
    labels: tuple[str, ...]
    max_length: int
    run_id: str | None

    def content(self) -> dict[str, Any]:
        """The content of export.json; for a whole base it is the same bytes as in earlier
        versions.
        """
        depth = {"layers", "whole_layers"} if self.layers is None else set()
        return self.model_dump(mode="json", exclude=depth)


def take_place(store: Store, facts: ExportFacts, own: set[str]) -> bool:
    """Take the place for this export. Returns True where the export is still to be made, False
    where all of it exists.

    Raises `WrongRequest` for a place that holds another export, or other objects, or an export that
    has lost an object; `own` names its small objects.
    """
    there = {info.key: info.size for info in store.list()}
    if EXPORT not in there and there:
        raise WrongRequest(
            f"{store.url} holds other objects, such as {min(there)}, and no export; name an empty folder or"
            " prefix."
        )
    try:
        store.create(EXPORT, facts.to_bytes())
    except AlreadyExists:
        raise _other(store, facts) from None
    if INDEX not in there:
        return True
    files = _files_of(store)
    for key, size in files.items():
        if there.get(key) != size:
            raise _incomplete(store, key)
    for key in sorted(own - there.keys()):
        raise _incomplete(store, key)
    return False


def _files_of(store: Store) -> dict[str, int]:
    """Bytes of each file of weights, by the index."""

    def verify(raw: bytes) -> dict[str, int]:
        files = object_in(raw, _MAX_INDEX_BYTES)["metadata"]["files"]
        return {str(key): int(about["bytes"]) for key, about in files.items()}

    try:
        return store.read_verified(INDEX, verify, length=_MAX_INDEX_BYTES + 1)
    except (Unreadable, ValueError, LookupError, TypeError, AttributeError):
        raise WrongRequest(
            f"{store.url_of(INDEX)} is not the index of an export; export into another, empty place."
        ) from None


def _incomplete(store: Store, key: str) -> WrongRequest:
    return WrongRequest(
        f"{store.url} has lost {key} since it was exported; export into another, empty place."
    )


def _other(store: Store, facts: ExportFacts) -> Exception:
    """The error for a place that another export has taken, or that cannot be read."""
    try:
        old = read_manifest(
            ExportFacts, store, EXPORT, other_schema="Name another place.", damaged="Name another place."
        )
    except (WrongRequest, ObjectNotFound, StorageError, ValidationError) as error:
        return error
    differs = next(
        (
            f"{name} {getattr(old, name)!r} there, {getattr(facts, name)!r} now"
            for name in ("run_id", "adapter_sha256", "dtype", "base_weights_sha256", "base", "labels")
            if getattr(old, name) != getattr(facts, name)
        ),
        "its facts differ",
    )
    return WrongRequest(
        f"{store.url} holds another export, or the beginning of one ({differs}); it is never overwritten."
        " Type another --to, or repeat the adapter and options it was made with."
    )
