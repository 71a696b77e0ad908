"""Answers of hosted models: one object per answer, created and never overwritten, so that nobody
pays twice for a stored answer.

The price is one small object per post; reading 3,000 of them back takes some seconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from emotion_train.console import tell
from emotion_train.errors import ObjectNotFound, StorageError
from emotion_train.storage.document import Manifest, read_manifest
from emotion_train.storage.patience import Patience, until_it_answers
from emotion_train.storage.store import Store

# answered: with a text, which may turn out unparseable; failed: an error, a cut body, no answer in
# time, or a process that was killed while it waited
Outcome = Literal["answered", "refused", "filtered", "cut", "unparseable", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "filtered", "cut", "unparseable", "failed")
ANSWERS = "answers"
_THREADS = 16
_DELETE_IT = "Delete it, and the same command asks again."
Nano = Annotated[int, Field(ge=0)]
M = TypeVar("M", bound=Manifest)
T = TypeVar("T")
_STORE_PATIENCE_S = 120.0


class Answer(Manifest):
    """The outcome of one request. `nano_usd` is its cost in billionths of a dollar: by its usage,
    or the most that it can have cost (`estimated`).

    `latency_s` is the last attempt's latency, and `attempts` the number of attempts.
    """

    schema_version: Literal["emotion-train/answer/1"] = "emotion-train/answer/1"
    outcome: Outcome
    text: str = ""
    reason: str = ""
    model: str | None = None
    fingerprint: str | None = None
    request_id: str | None = None
    tokens_in: Nano | None = None
    tokens_out: Nano | None = None
    nano_usd: Nano = 0
    estimated: bool = False
    latency_s: float | None = None
    attempts: int = Field(1, ge=1)
    concurrency: int = Field(1, ge=1)


class Form(Manifest):
    """The form of request that an endpoint takes, found out once: how to ask for JSON, and which
    settings it knows.
    """

    schema_version: Literal["emotion-train/form/1"] = "emotion-train/form/1"
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    temperature: bool = True
    seed: bool = True
    max_tokens: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


class Answers:
    """The answers below a prefix of a store. Safe for use from several threads."""

    def __init__(self, store: Store, prefix: str = "") -> None:
        self._store = store
        self._prefix = f"{prefix}/" if prefix else ""
        self._known: dict[str, Answer] = {}

    def key_of(self, request: str) -> str:
        """The object's key for a request, which is named FOLDER/NUMBER."""
        return f"{self._prefix}{ANSWERS}/{request}.json"

    def known(self, request: str) -> Answer | None:
        """The answer, if this object has read or stored it."""
        return self._known.get(request)

    def keep(self, request: str, answer: Answer) -> None:
        """Store the answer for good. Raises `StorageError`."""
        patiently(lambda: self._store.create(self.key_of(request), answer.to_bytes()))
        self._known[request] = answer

    def read(self, requests: Iterable[str]) -> None:
        """Look in the store for answers to these requests that are not known yet."""
        wanted = [request for request in requests if request not in self._known]
        folders = {request.partition("/")[0] for request in wanted}
        if len(wanted) > _THREADS:  # one listing instead of a request for each missing answer
            stored = {
                info.key
                for folder in sorted(folders)
                for info in self._store.list(f"{self._prefix}{ANSWERS}/{folder}/")
            }
            wanted = [request for request in wanted if self.key_of(request) in stored]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="answers") as pool:
            for request, answer in zip(wanted, pool.map(self._read_one, wanted), strict=True):
                if answer is not None:
                    self._known[request] = answer

    def _read_one(self, request: str) -> Answer | None:
        return read_or_none(Answer, self._store, self.key_of(request))

    def form(self, folder: str) -> Form | None:
        """The form of request that this endpoint takes; None where nobody has found out."""
        return read_or_none(Form, self._store, f"{self._prefix}forms/{folder}.json")

    def keep_form(self, folder: str, form: Form) -> None:
        """Store the endpoint's form. Raises `AlreadyExists` where another process stored one."""
        self._store.create(f"{self._prefix}forms/{folder}.json", form.to_bytes())


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns, tried again for two minutes while the store does not answer: a short
    outage must not lose an answer that was paid for.
    """
    patience = Patience(_STORE_PATIENCE_S)

    def told(error: StorageError) -> None:
        if patience.may_tell():
            tell(f"waiting for the store: {error}")

    return until_it_answers(action, patience, _slept, told)


def _slept(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def read_or_none(kind: type[M], store: Store, key: str) -> M | None:
    """The document; None where there is none. Raises `WrongRequest` for a damaged one."""
    try:
        return patiently(
            lambda: read_manifest(
                kind, store, key, other_schema="Use the version that wrote it.", damaged=_DELETE_IT
            )
        )
    except ObjectNotFound:
        return None


def digest_of(*content: Any) -> str:
    """A name for the content that decides answers: equal content, equal name.

    >>> digest_of("model", 1) == digest_of("model", 1) != digest_of("model", 2)
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]
