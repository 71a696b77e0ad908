"""Checks of boto3's settings before they are used: the CA bundle, the endpoint and the region of
its standard chain. A wrong setting is refused in one sentence that names its place.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from emotion_train.errors import EmotionTrainError, StorageError
from emotion_train.storage.s3_errors import WrongEndpoint, config_file, refusal


@contextmanager
def naming_settings(url: str) -> Iterator[None]:
    """Errors while boto3 is set up for `url` become a sentence, except botocore's own errors, which
    `s3_errors.explain` turns into sentences.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except (EmotionTrainError, BotoCoreError, ClientError, ResponseParserError, WrongEndpoint):
        raise
    except Exception as error:
        raise StorageError(refusal(url, error)) from error


def trusted_bundle(session: Any) -> bytes | None:
    """The CA certificates that boto3 trusts instead of its own, in PEM; None where none are named.

    As in boto3, they come from AWS_CA_BUNDLE, the profile's `ca_bundle`, or REQUESTS_CA_BUNDLE.
    Raises `StorageError` for a file that is missing or has no certificates.
    """
    named = session._session.get_config_variable("ca_bundle")  # of boto3, which has no public way
    path = os.environ.get("REQUESTS_CA_BUNDLE") if named is None else named
    if path is None:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        source = (
            "REQUESTS_CA_BUNDLE"
            if named is None
            else "AWS_CA_BUNDLE"
            if os.environ.get("AWS_CA_BUNDLE") == named
            else f"ca_bundle in {config_file()}"
        )
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{source} is {path!r}, from which no CA certificates can be read ({reason}); name a PEM file of"
            " certificates, or remove the setting to trust the usual ones."
        ) from error


def require_endpoint(url: str, endpoint: str) -> None:
    """Raises `StorageError` for an endpoint that no request can be sent to."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise wrong_endpoint(url, endpoint) from None
    labels = [host] if ":" in host else host.rstrip(".").split(".")  # an IPv6 address has colons
    if (
        parts.scheme not in ("http", "https")
        or port == 0
        or not all(re.fullmatch("[^\\s/%\"'<>]{1,63}", label) for label in labels)
    ):
        raise wrong_endpoint(url, endpoint)


def wrong_endpoint(url: str, given: str) -> StorageError:
    return StorageError(
        f"{url} cannot be reached: AWS_ENDPOINT_URL is {given.rpartition('@')[2]!r}, which is no URL; type"
        " https://HOST, or http://HOST:PORT for a server of your own."
    )


def unknown_region(session: Any, region: str | None) -> str | None:
    """A phrase on a region that boto3 does not know, which may be newer than boto3; else None."""
    known: list[str] = [
        name
        for partition in session.get_available_partitions()
        for name in session.get_available_regions("s3", partition)
    ]
    if region is None or not known or region in known:
        return None
    near = get_close_matches(region, known, 1)
    return f"the region is {region!r}, which boto3 does not know" + (
        f" (did you mean {near[0]}?)" if near else ""
    )
