"""Requests to the Hugging Face hub that end within seconds, with an answer or one sentence.

Each first request is made once, without the client's own retries, in a thread that is given up
after `ANSWER_S`: neither a name server nor a silent connection delays a verb for long. A hub that
did not answer is not asked again for `REMEMBERED_S`, so that a verb that needs ten files waits only
once. Weights, once the hub has answered, are downloaded with the client's retries. The price: one
more HEAD for a file that is not in the cache.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from emotion_train.errors import EmotionTrainError, StorageError, WrongRequest

T = TypeVar("T")

ANSWER_S = 4.0  # with the start of a program less than 5 s
REMEMBERED_S = 30.0
_SLOWEST_BYTES_A_SECOND = 50_000  # of a small file's download
_WEIGHTS = ".safetensors"
_CONFIG = "config.json"
_ENTRANCES = ("model.safetensors", "model.safetensors.index.json")  # every checkpoint has one of them
_NETWORK_FAMILIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_WRONG_ENDPOINT = (
    "InvalidURL",
    "UnsupportedProtocol",
    "LocalProtocolError",
    "InvalidSchema",
    "MissingSchema",
)
_LATER = (408, 429, 500, 502, 503, 504)
_away: dict[str, tuple[float, str]] = {}  # for each silent endpoint the time of asking and the reason
_lock = threading.Lock()


class HubAway(Exception):
    """The hub did not answer; the message is a phrase that says why."""


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, else huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def file(repo: str, name: str) -> Path | None:
    """The path of one file of a model's repository in the hub's cache, downloaded if needed; None
    where the repository has no such file.

    A copy in the cache is used where the hub is away or refuses. If the cache has the weights, a
    file missing beside them does not exist: a checkpoint of one file has no index. Raises `HubAway`
    and the client's errors; `refusal` explains both.
    """
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    _be_quiet()
    try:
        return _file(repo, name)
    except HFValidationError:
        raise
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and _has_code(error):
            return None
        if (path := in_cache(repo, name)) is not None:
            return path
        if name != _CONFIG and any(in_cache(repo, weights) for weights in _ENTRANCES):
            return None
        raise


def in_cache(repo: str, name: str, revision: str | None = None) -> Path | None:
    """The path of a file in the local cache, in the newest revision that was fetched, without a
    request to the hub; None where the cache has no such file.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        cached = try_to_load_from_cache(repo, name, revision=revision)
        return Path(cached) if isinstance(cached, str) else None
    return None


def start_of_file(repo: str, name: str, length: int) -> tuple[bytes, int]:
    """The first `length` bytes of a file of a model's repository (fewer where it is shorter), and
    the file's size in bytes. Nothing is cached. Raises as `file`.
    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    def read() -> tuple[bytes, int]:
        headers = build_hf_headers() | {"Range": f"bytes=0-{length - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", hf_hub_url(repo, name), headers=headers, timeout=ANSWER_S
        ) as response:
            hf_raise_for_status(response)
            start = b""
            for part in response.iter_bytes():
                start += part
                if len(start) >= length:
                    break
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            whole = total if total.isdecimal() else response.headers.get("Content-Length", "")
            return start[:length], int(whole) if whole.isdecimal() else len(start)

    _be_quiet()
    return ask(read, length / _SLOWEST_BYTES_A_SECOND)


def require_dataset(name: str) -> None:
    """Returns if the hub answers and lets us read this data set; else raises as `file`."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    def look() -> None:
        url = f"{endpoint()}/api/datasets/{name}"
        hf_raise_for_status(get_session().get(url, headers=build_hf_headers(), timeout=ANSWER_S))

    _be_quiet()
    ask(look)


def has_dataset_in_cache(name: str) -> bool:
    """Whether the `datasets` library may have a copy of this data set, or of its files."""
    from huggingface_hub import constants

    tables = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    files = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    owner = name.partition("/")[0].lower()
    return files.is_dir() or (
        tables.is_dir() and any(path.name.lower().startswith(owner) for path in tables.iterdir())
    )


@contextmanager
def offline(datasets_config: Any) -> Iterator[None]:
    """In this block, the client and the `datasets` library of this configuration send no requests:
    they would retry for a minute what has already failed.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE = before


def ask(action: Callable[[], T], more_s: float = 0.0) -> T:
    """The result of `action`, which makes one request without retries.

    Raises `HubAway` when there is no connection or no answer within `ANSWER_S` + `more_s` seconds,
    and at once while that is remembered. The client's errors for an answer are raised unchanged.
    """
    with _lock:
        asked_at, reason = _away.get(endpoint(), (float("-inf"), ""))
    if time.monotonic() - asked_at < REMEMBERED_S:
        raise HubAway(reason)
    try:
        with _network_errors():
            return within(ANSWER_S + more_s, action)
    except TimeoutError:
        reason = f"it did not answer within {ANSWER_S + more_s:.0f} s"
    except HubAway as away:
        reason = str(away)
    with _lock:
        _away[endpoint()] = time.monotonic(), reason
    raise HubAway(reason)


@contextmanager
def _network_errors() -> Iterator[None]:
    """Turns the client's errors for no connection, or no hub at its end, into `HubAway`, and those
    for no answer in time into `TimeoutError`.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        FileMetadataError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (LocalEntryNotFoundError, FileMetadataError) as error:
        raise _away_or_late(error.__cause__ or error) from None
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, TimeoutError):
        raise
    except Exception as error:  # the client's network library raises a family of its own
        if type(error).__name__ in _WRONG_ENDPOINT:
            raise WrongRequest(
                f"HF_ENDPOINT is {endpoint()!r}, which is no address of a web server; leave it out, or give"
                " an address such as https://huggingface.co."
            ) from None
        if not _is_of_the_network(error):
            raise
        raise _away_or_late(error) from None


def _away_or_late(error: BaseException) -> Exception:
    return TimeoutError() if "Timeout" in type(error).__name__ else HubAway(_phrase(error))


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result or error of `action` in a thread of its own; raises `TimeoutError` after
    `seconds`. The thread ends with the process.
    """
    values: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            values.append(action())
        except BaseException as error:  # raised below
            errors.append(error)
        ended.set()

    threading.Thread(target=work, name="hub", daemon=True).start()
    if not ended.wait(seconds):
        raise TimeoutError
    if errors:
        raise errors[0]
    return values[0]


def refusal(error: Exception, what: str, name: str, hint: str) -> EmotionTrainError:
    """An error with a sentence for the errors of `file`, `start_of_file` and `require_dataset`.
    `what` is `base` or `data set`; `hint` says what to give instead.

    A hub that is away or overloaded gives a transient `StorageError`, like a bucket.
    """
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, EmotionTrainError):
        return error
    if isinstance(error, HubAway):
        return StorageError(
            f"The {what} {name} is neither {_here(what)} nor in the local hub cache, and the Hugging Face hub"
            f" at {endpoint()} cannot be reached ({error}); check the network and HF_ENDPOINT, or {hint}.",
            transient=True,
        )
    if isinstance(error, OfflineModeIsEnabled):
        return WrongRequest(
            f"The {what} {name} is neither {_here(what)} nor in the local hub cache, and HF_HUB_OFFLINE"
            f" forbids to ask the Hugging Face hub; unset it, or {hint}."
        )
    status = int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
    if isinstance(error, GatedRepoError) or status == 403:
        return WrongRequest(
            f"The {what} {name} is gated{'' if isinstance(error, GatedRepoError) else ' or private (403)'}:"
            f" accept its licence at {_page(what, name)}, then set HF_TOKEN to a token of that account that"
            f" may read it{_token_now()}, or type hf auth login."
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return WrongRequest(
            f"The Hugging Face hub answered 401 for the {what} {name}: it wants a valid token{_token_now()};"
            f" set HF_TOKEN, accept the licence at {_page(what, name)} if it is gated, or {hint}."
        )
    if status in (401, 404) or isinstance(error, RepositoryNotFoundError) or _is_no_name(error):
        return WrongRequest(
            f"The {what} {name} is neither {_here(what)} nor on the Hugging Face hub, unless it is private"
            f" and HF_TOKEN may not read it; check the name, or {hint}."
        )
    if not isinstance(error, OSError):
        raise error
    if status == 0:  # disk full, no permission: the message names it
        return WrongRequest(
            f"The {what} {name} could not be fetched from the Hugging Face hub ({_phrase(error)}); {hint}."
        )
    return StorageError(
        f"The Hugging Face hub answered {status or 'without a status'} for the {what} {name}; try again"
        f" later, or {hint}.",
        transient=status in _LATER or status >= 500,
    )


# --- one file ---


def _file(repo: str, name: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    facts = ask(lambda: get_hf_file_metadata(hf_hub_url(repo, name), timeout=ANSWER_S))
    if facts.commit_hash is None:
        raise HubAway("what answers there is no Hugging Face hub: a login page or a proxy, perhaps")
    if (path := in_cache(repo, name, facts.commit_hash)) is not None:
        return path

    def download() -> Path:
        return Path(hf_hub_download(repo, name, etag_timeout=ANSWER_S))

    if not name.endswith(_WEIGHTS):
        return ask(download, (facts.size or 0) / _SLOWEST_BYTES_A_SECOND)
    with _network_errors():
        return download()


def _has_code(error: Exception) -> bool:
    """Whether the hub itself says that the file, and not the repository, is missing."""
    response = getattr(error, "response", None)
    return response is None or "x-error-code" in response.headers


def _be_quiet() -> None:
    """Turn off the client's own messages about retries, and its telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


# --- phrases ---


def _is_of_the_network(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return True
    return type(error).__module__.partition(".")[0] in _NETWORK_FAMILIES


def _is_no_name(error: Exception) -> bool:
    from huggingface_hub.errors import HFValidationError

    return isinstance(error, HFValidationError)


def _phrase(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def _page(what: str, name: str) -> str:
    return f"{endpoint()}/{'datasets/' if what == 'data set' else ''}{name}"


def _here(what: str) -> str:
    return "a folder here" if what == "base" else "a file or folder here"


def _token_now() -> str:
    from huggingface_hub import get_token

    return " (the one that is set may not)" if get_token() else " (none is set)"
