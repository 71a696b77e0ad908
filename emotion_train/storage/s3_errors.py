"""A failure of a bucket in one sentence: the URL, the likely cause, and what to type."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from emotion_train.errors import ObjectChanged, ObjectNotFound, StorageError
from emotion_train.storage.store import without_secrets


def status_of(error: BaseException | None) -> int | None:
    """HTTP status of a botocore ClientError; None for any other."""
    response = getattr(error, "response", None)
    return (
        int(response["ResponseMetadata"].get("HTTPStatusCode", 0))
        if isinstance(response, dict) and "ResponseMetadata" in response
        else None
    )


def code_of(error: BaseException | None) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_ambiguous(error: BaseException | None) -> bool:
    """Whether a conditional write may have happened although it ended in this error, or may happen
    when tried again.
    """
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError

    status = status_of(error)
    return isinstance(error, (HTTPClientError, NoConnection, ResponseParserError)) or (
        status is not None and (status in (409, 412, 429) or status >= 500) and status != 501
    )


_LOGIN_CODES = (
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "RequestExpired",
    "InvalidToken",
)


_REGION_CODES = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
)


# Answers with status 400 that have nothing to do with checksums.
CLEAR_400 = (
    *_LOGIN_CODES,
    *_REGION_CODES,
    "RequestTimeout",
    "EntityTooLarge",
    "KeyTooLongError",
    "InvalidBucketName",
    "BadDigest",
)


_BUSY_CODES = (
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
)


_KEYS_REMEDY = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE, and type `aws sts get-caller-identity`"
    " to see who you are"
)


def explain(error: Exception, url: str, bucket: str) -> StorageError:
    """The one sentence for a botocore error: what failed, why most likely, what to type. Never
    holds a key or a signature.
    """
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError

    status, code = status_of(error), code_of(error)
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError)):
        return StorageError(
            f"No credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or"
            " type `aws configure`."
        )
    if isinstance(error, known.ProfileNotFound):
        return StorageError(
            f"No credentials for {url}: {error}; type `aws configure list-profiles` to see those that exist"
            " and set AWS_PROFILE."
        )
    if (
        isinstance(error, (known.SSOError, known.TokenRetrievalError, known.CredentialRetrievalError))
        or code in _LOGIN_CODES
    ):
        return StorageError(
            f"The login for {url} has expired; type `aws sso login`, or renew AWS_SESSION_TOKEN and its two"
            " keys.",
            transient=True,
        )
    if isinstance(error, known.SSLError):
        return StorageError(
            f"{_endpoint_of(error)} showed a certificate that is not trusted, so {url} was not used; set"
            " AWS_CA_BUNDLE to your CA file."
        )
    if isinstance(error, (known.HTTPClientError, known.ConnectionError)):
        return StorageError(
            f"{url} cannot be reached: {_endpoint_of(error)} does not answer; check the network,"
            f" AWS_ENDPOINT_URL ({without_secrets(os.environ.get('AWS_ENDPOINT_URL', 'not set'))}) and the"
            " region.",
            transient=True,
        )
    if isinstance(error, (known.FlexibleChecksumError, ResponseParserError)):
        return StorageError(
            f"The answer of {url} was changed on its way (its sum is another, or it is no XML); try again, or"
            " use https and check AWS_ENDPOINT_URL.",
            transient=True,
        )
    if code == "NoSuchBucket" or (status == 404 and "Bucket" in getattr(error, "operation_name", "")):
        return StorageError(
            f"There is no bucket {bucket} for {url}; check the name, or type `aws s3 mb s3://{bucket}` to"
            " make it."
        )
    if status == 404:
        return ObjectNotFound(f"There is no object at {url}.")
    if status == 412:
        return ObjectChanged(f"{url} has changed since its ETag was noted; another program has replaced it.")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return StorageError(f"The access key for {url} was refused ({code}); {_KEYS_REMEDY}.")
    if code == "RequestTimeTooSkewed":
        return StorageError(
            f"{url} refused the request because this machine's clock is wrong; set it, for example with"
            " `timedatectl set-ntp true`."
        )
    if status in (401, 403):
        operation = getattr(error, "operation_name", "the request")
        return StorageError(
            f"No permission for {operation} on {url} ({code or status}); {_KEYS_REMEDY}, then ask for that"
            " right on the bucket."
        )
    if code in _REGION_CODES:
        return StorageError(
            f"{url} lies in another region than the one in use ({code}); set AWS_REGION to the bucket's."
        )
    if status == 507 or code in ("QuotaExceeded", "XMinioStorageFull"):
        return StorageError(
            f"The store behind {url} is full; free some space there, or name another bucket.", transient=True
        )
    reason = (
        f"{code} {error.response['Error'].get('Message', '')}"
        if isinstance(error, known.ClientError)
        else without_secrets(str(error))
    )
    return StorageError(
        f"{url} failed with {' '.join(reason.split())[:200]} (status {status}); try again, or name another"
        " bucket.",
        transient=isinstance(error, known.IncompleteReadError)
        or code in _BUSY_CODES
        or status in (408, 409, 425, 429)
        or (status is not None and status >= 500 and status != 501),
    )


def _endpoint_of(error: Exception) -> str:
    endpoint = getattr(error, "kwargs", {}).get("endpoint_url")
    if not endpoint:
        return "the endpoint"
    parts = urlsplit(str(endpoint))
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
