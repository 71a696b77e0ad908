"""A bucket's failure in one sentence: the URL, the likely cause, and what to type."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from emotion_train.errors import ObjectChanged, ObjectNotFound, StorageError
from emotion_train.storage.store import without_secrets


class WrongEndpoint(Exception):
    """The endpoint is no S3. `endpoint` is its scheme, host and port, `moved_to` the target of its
    redirect, and `reason` its own answer.
    """

    def __init__(self, endpoint: str, reason: str, moved_to: str | None = None) -> None:
        super().__init__(f"{endpoint} is no S3: {reason}")
        self.endpoint, self.reason, self.moved_to = endpoint, reason, moved_to


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of a botocore ClientError; None for any other error."""
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
    """Whether a conditional write may have succeeded in spite of this error, or may succeed when
    tried again.
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


# beginnings of the names of botocore's exceptions for wrong settings
_SETTINGS = (
    "Invalid",
    "Unsupported",
    "Unknown",
    "Config",
    "InfiniteLoop",
    "Missing",
    "EndpointProvider",
    "ParamValidation",
)
_SECRET = re.compile("KEY|SECRET|TOKEN(?!_FILE)|PASSWORD")


_KEYS_REMEDY = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE, and type `aws sts get-caller-identity`"
    " to see who you are"
)


def explain(error: Exception, url: str, bucket: str) -> StorageError:
    """One sentence for a botocore error: what failed, the likely cause, what to type. It never
    holds a key or a signature.
    """
    from botocore import exceptions as known
    from botocore.parsers import ResponseParserError

    status, code = status_of(error), code_of(error)
    if isinstance(error, WrongEndpoint):
        return StorageError(f"{url} cannot be reached: {_elsewhere(error)}.")
    if isinstance(error, known.ConfigParseError):
        cause = " ".join(str(error.__cause__ or error.__context__ or "").split())
        return StorageError(
            f"{url} cannot be reached, because boto3 cannot read the file {error.kwargs['path']}"
            f"{f' ({cause[:200]})' if cause else ''}; mend it, or name another in AWS_CONFIG_FILE or"
            " AWS_SHARED_CREDENTIALS_FILE."
        )
    if isinstance(error, known.InvalidRegionError):
        source = next(
            (name for name in ("AWS_DEFAULT_REGION", "AWS_REGION") if os.environ.get(name)), config_file()
        )
        return StorageError(
            f"{url} cannot be reached: the region is {error.kwargs['region_name']!r} (from {source}), which"
            " is no name of a region; type one such as eu-west-1."
        )
    if isinstance(error, known.BotoCoreError) and type(error).__name__.startswith(_SETTINGS):
        return StorageError(refusal(url, error))
    if isinstance(error, known.CredentialRetrievalError) and error.kwargs.get("provider") == "custom-process":
        said = " ".join(without_secrets(str(error.kwargs.get("error_msg", ""))).split())[:200]
        return StorageError(
            f"There is no login for {url}: credential_process in {config_file()} failed ({said}); run that"
            " command by itself to see why.",
            transient=True,
        )
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
        return StorageError(f"{_endpoint_of(error)} {_tls_trouble(error)}; {url} was not used.")
    if type(error) is known.HTTPClientError:  # neither unsent nor refused: the answer is unreadable
        said = " ".join(without_secrets(str(error.kwargs.get("error", ""))).split())[:200]
        given = without_secrets(os.environ.get("AWS_ENDPOINT_URL", "not set"))
        return StorageError(
            f"{url} cannot be reached: AWS_ENDPOINT_URL ({given}) speaks no S3, or boto3 cannot ask it"
            f" ({said}); check its address and port.",
            transient=True,
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
            f"The answer of {url} was changed on its way (its checksum differs, or it is no XML); try again,"
            " or use https and check AWS_ENDPOINT_URL.",
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


def refusal(url: str, error: Exception) -> str:
    """A sentence for settings that boto3 refuses: its message, and the setting that is likely
    wrong.
    """
    said = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
    return (
        f"boto3 cannot be set up for {url} ({said}); {_suspect(said)}, or type"
        " `aws configure list` to see what is in use."
    )


def _suspect(said: str) -> str:
    """The setting whose value is in an error, else all places of settings."""
    settings = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_") and value and not _SECRET.search(name)
    }
    for name, value in settings.items():
        if len(value) > 1 and (repr(value) in said or f" {value}" in said):
            return f"{name} is {value!r}: correct it"
    names = f"AWS variables that are set ({', '.join(sorted(settings))})" if settings else "AWS variables"
    return f"look at the {names} and at {config_file()}"


def config_file() -> str:
    return os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"


def _elsewhere(error: WrongEndpoint) -> str:
    """A phrase on an endpoint that is no S3, and what to type."""
    if "HTTP request to an HTTPS server" in error.reason:
        return f"{error.endpoint} speaks TLS only; set AWS_ENDPOINT_URL to https{error.endpoint[4:]}"
    if error.moved_to is not None:
        parts = urlsplit(error.moved_to)
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if place != error.endpoint:
            return (
                f"AWS_ENDPOINT_URL ({error.endpoint}) redirects to {place}, and S3 requests follow no"
                f" redirect; set AWS_ENDPOINT_URL={place} if that is your store"
            )
    return (
        f"AWS_ENDPOINT_URL ({error.endpoint}) does not speak S3: {error.reason}; set it to the address and"
        " port of the S3 server, which are not those of its web console"
    )


def _tls_trouble(error: Exception) -> str:
    """A phrase on a failed handshake, and what to type."""
    said = str(getattr(error, "kwargs", {}).get("error", error))
    remedy = "set AWS_CA_BUNDLE to your CA file"
    if "certificate has expired" in said or "not yet valid" in said:
        return (
            "showed a certificate that is not valid at this time; look at this machine's clock (`date`), or"
            " have the certificate renewed"
        )
    if "mismatch" in said or "doesn't match" in said:
        return (
            "showed a certificate for another name, which is not trusted; set AWS_ENDPOINT_URL to the name"
            " that it was made for"
        )
    if "CERTIFICATE_VERIFY_FAILED" in said or "certificate" in said.lower():
        return f"showed a certificate that is not trusted; {remedy}"
    return (
        f"speaks no TLS that this machine understands ({' '.join(said.split())[:120]}); if it is a server"
        " without TLS type http:// in AWS_ENDPOINT_URL"
    )


def _endpoint_of(error: Exception) -> str:
    endpoint = getattr(error, "kwargs", {}).get("endpoint_url")
    if not endpoint:
        return "the endpoint"
    parts = urlsplit(str(endpoint))
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
