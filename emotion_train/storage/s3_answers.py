"""Whether an answer is S3's: an endpoint that redirects, a web console and a proxy's page answer
too, and boto3 takes their answers for S3's.

The check looks at parts that every S3 answer has: the ETag of an object, the root of a listing, an
error in XML. It costs nothing, since these answers have already come.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urljoin, urlsplit

from emotion_train.storage.s3_errors import WrongEndpoint, code_of, status_of

_WITH_ETAG = ("GetObject", "HeadObject", "PutObject")
_WAITED_FOR = (408, 429)  # 4xx statuses that a proxy may give too, and that pass
_SHOWN = 200  # bytes of a foreign answer that are searched for a reason
# statuses of a HEAD that need no further reason
_PLAIN = (404, 412, 416, *_WAITED_FOR)


def watch(client: Any) -> Any:
    """The boto3 client, which now raises `WrongEndpoint` for an answer that S3 never gives."""
    endpoint = str(client.meta.endpoint_url)

    def look_at(response_dict: dict[str, Any] | None, **_: object) -> None:
        if response_dict is not None:  # else no answer, or none that boto3 can read
            _look_at(endpoint, response_dict)

    client.meta.events.register("response-received.s3", look_at)
    return client


def _look_at(endpoint: str, answer: dict[str, Any]) -> None:
    operation, status = str(answer["context"]["operation_name"]), int(answer["status_code"])
    headers, body = answer["headers"], answer.get("body")
    reason = _doubt(operation, status, headers, body if isinstance(body, bytes) else b"")
    if reason is None:
        return
    if operation == "ListObjectsV2" and status < 300:  # looked at again like any other listing
        from botocore.parsers import ResponseParserError

        raise ResponseParserError(reason)
    location = headers.get("location") if 300 <= status < 400 else None
    raise WrongEndpoint(origin(endpoint), reason, urljoin(endpoint, location) if location else None)


def _doubt(operation: str, status: int, headers: Any, body: bytes) -> str | None:
    """Why this is no answer of S3; None when it may be one."""
    kind = str(headers.get("content-type", "")).partition(";")[0] or "no content"
    what = f"it answered {operation} with status {status} and {kind}"
    if 300 <= status < 400 and status != 304:
        # S3 itself redirects to other regions, with a code or with the region
        return None if b"<Code>" in body or "x-amz-bucket-region" in headers else what
    if status < 300 and operation in _WITH_ETAG:
        return None if "etag" in headers else f"{what}, without an ETag"
    if status < 300 and operation == "ListObjectsV2":
        return None if b"ListBucketResult" in body else f"{what}, which is no listing"
    if (
        not 400 <= status < 500
        or status in _WAITED_FOR
        or not body.strip()
        or "xml" in kind
        or body.lstrip().startswith((b"<?xml", b"<Error"))
    ):
        return None
    words = " ".join(body[:_SHOWN].decode("utf-8", "replace").split())
    return f"{what}: {words}" if kind == "text/plain" else what


def origin(url: str) -> str:
    """Scheme, host and port of a URL, without keys."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def with_reason(client: Any, bucket: str, name: str | None, error: Exception) -> Exception:
    """A better error for a failed HEAD, by one GET of the object `name`, or of the bucket where it
    is None; `error` itself where that says no more.

    A HEAD has no body with a reason: an expired login, a wrong clock and a wrong key all look like
    400 or 403.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    status = status_of(error)
    bucket_is_gone = status == 404 and name is None
    if (
        status is None
        or not 400 <= status < 500
        or (status in _PLAIN and not bucket_is_gone)
        or not code_of(error).isdecimal()
    ):
        return error
    try:
        ask(client, bucket, name)
    except ClientError as told:
        return error if not code_of(told) or code_of(told).isdecimal() else told
    except WrongEndpoint as told:
        return told
    except (BotoCoreError, ResponseParserError):
        return error
    return error


def ask(client: Any, bucket: str, name: str | None) -> dict[str, str]:
    """The headers of a GET of one byte, or of a list of one key."""
    if name is None:
        answer = client.list_objects_v2(Bucket=bucket, MaxKeys=1)
    else:
        answer = client.get_object(Bucket=bucket, Key=name, Range="bytes=0-0")
        answer["Body"].close()
    headers: dict[str, str] = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers
