"""The store that a URL names: a bucket (`s3://bucket/prefix`) or a folder."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from urllib.request import url2pathname

from emotion_train.edges.paths import unknown_user
from emotion_train.errors import WrongRequest
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.s3 import S3Store
from emotion_train.storage.store import Store, checked_key, without_secrets


def open_store(url: str) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain path; no request is sent yet.

    Raises `WrongRequest` for any other URL.
    """
    if not url.strip():
        raise WrongRequest("The URL of a store is empty; type s3://bucket/prefix or the path of a folder.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in url):
        raise WrongRequest(
            f"The URL {url!a} holds a control character or is not UTF-8; type s3://bucket/prefix or the"
            " path of a folder."
        )
    if mistyped := re.match(r"(s3|gs|az|https?|file)(//|;/+)", url.strip()):
        raise WrongRequest(
            f"The URL {url} has no colon after {mistyped[1]}; did you mean"
            f" {mistyped[1]}://{url.strip()[mistyped.end() :]}?"
        )
    scheme, colon, rest = url.strip().partition(":")
    if not colon or len(scheme) == 1 or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        if (name := unknown_user(url.strip())) is not None:
            raise WrongRequest(
                f"There is no user {name!r} on this machine for {url.strip()}; for a folder of that name type"
                f" ./{url.strip()}."
            )
        return FolderStore(Path(url.strip()))
    if scheme.lower() == "s3":
        return _open_bucket(rest)
    if scheme.lower() == "file":
        if not rest.startswith("///") and (rest.startswith("//") or not rest.startswith("/")):
            raise WrongRequest(
                f"The URL {url} names no folder of this machine; type file:///folder or the plain path."
            )
        return FolderStore(Path(url2pathname(rest.removeprefix("//"))))
    raise WrongRequest(
        f"The URL {without_secrets(url)} has scheme {scheme}; allowed are s3://bucket/prefix and folders (a"
        f" path, or file:///path).{_way_round(scheme.lower(), rest.rpartition('@')[2].lstrip('/'))}"
    )


def _way_round(scheme: str, place: str) -> str:
    """How to reach objects of another scheme; empty where there is no way."""
    typed = f" and type s3://{place}."
    if scheme in ("s3a", "s3n"):
        return f" Type s3://{place}."
    if scheme in ("gs", "gcs"):
        return (
            " Google Cloud Storage is reached by its S3 endpoint: set"
            " AWS_ENDPOINT_URL=https://storage.googleapis.com, and AWS_ACCESS_KEY_ID and"
            f" AWS_SECRET_ACCESS_KEY to an HMAC key of its interoperability settings,{typed}"
        )
    if (
        scheme in ("az", "azure", "abfs", "abfss", "adl", "wasb", "wasbs")
        or ".blob.core.windows.net" in place
    ):
        return (
            " Azure Blob Storage has no S3 endpoint, and there is no way to it yet: copy to and from a bucket"
            " or a folder, for example by azcopy or rclone."
        )
    if scheme in ("r2", "oss", "cos", "b2", "minio", "do", "oci"):
        return f" Set AWS_ENDPOINT_URL to the S3 endpoint of that store,{typed}"
    return ""


def _open_bucket(rest: str) -> Store:
    if "@" in rest.removeprefix("//").partition("/")[0]:
        raise WrongRequest(
            "The s3:// URL holds an @: put no keys into it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            " instead."
        )
    bucket, _, prefix = rest.lstrip("/").rstrip("/").partition("/")
    if not rest.startswith("//") or rest.startswith("///") or not bucket:
        raise WrongRequest(
            f"The URL s3:{rest} is malformed; type s3://{bucket or 'bucket'}/{prefix or 'prefix'}."
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", bucket):
        raise WrongRequest(
            f"The URL s3:{rest} names bucket {bucket!r}; allowed are 3 to 63 letters, digits, dots and"
            " dashes: s3://bucket/prefix."
        )
    if prefix:
        checked_key(prefix)
    return S3Store(bucket, prefix)
