"""Objects in a bucket as a store.

Reads go through obstore and everything else through boto3, because each is faster and more robust
at its part. When obstore fails, boto3 asks once more, as only its errors say why. If boto3 succeeds
repeatedly where obstore fails, as with certificates that only boto3's TLS accepts, boto3 reads from
then on. An object of up to `SUMMED_BYTES` that is read whole is compared with its ETag, if that is
its MD5: 2 ms per MiB. Credentials, profile, region, endpoint and trusted certificates come from
boto3's standard chain. Importing this page is cheap: the first request imports both libraries.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from emotion_train.errors import AlreadyExists, ObjectNotFound, StorageError
from emotion_train.storage.buffers import Buffers
from emotion_train.storage.s3_answers import ask, watch, with_reason
from emotion_train.storage.s3_errors import (
    CLEAR_400,
    WrongEndpoint,
    code_of,
    explain,
    is_ambiguous,
    status_of,
)
from emotion_train.storage.s3_settings import (
    naming_settings,
    require_endpoint,
    trusted_bundle,
    unknown_region,
    wrong_endpoint,
)
from emotion_train.storage.second_look import second_look
from emotion_train.storage.store import ObjectInfo, Store, checked_key, filled_by_ranges

CONNECT_TIMEOUT_S = 5


READ_TIMEOUT_S = 20
PATIENT_ATTEMPTS = 8


PART_BYTES = 64 << 20
ONE_REQUEST = 1 << 30  # most bytes that are created at once; S3 takes 5 GiB, not atomic in parts
# larger data is written in pieces of 8 MiB: a failure costs one of them, not all that was sent
WRITTEN_AT_ONCE = 64 << 20
READ_PATIENCE = timedelta(seconds=120)
CREATE_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
# Shorter than the least time that boto3 leaves on a refreshed credential (10 minutes).
CREDENTIAL_TTL = timedelta(minutes=5)
SUMMED_BYTES = 64 << 20  # larger objects have sums of their own
# signs of an obstore failure that every further read would meet, in its connection
_LASTING = ("certificate", "(connect)", "builder error", "tls", "panic")
_ENOUGH_FALL_BACKS = 2  # in a row, for any other reason
_BODY_ATTEMPTS = 3
_NO_CACHE = {"Cache-Control": "no-cache", "Pragma": "no-cache"}


class _Connection(NamedTuple):
    patient: Any  # boto3 client with retries
    single: Any  # boto3 client that sends each request once
    reader: Any  # obstore.store.S3Store; None where none can be made
    new_client: Callable[[], Any]  # boto3 client with a connection of its own, past caches
    new_reader: Callable[[], Any]  # obstore reader with a connection of its own, past caches


class _Answer(NamedTuple):
    data: Any  # an object with a buffer
    etag: str | None  # None when the data is a part of the object


class _Listing(NamedTuple):
    found: list[ObjectInfo]
    problem: str | None  # a sign that it was changed on its way
    readable: bool


class _OtherSum(ValueError):
    pass


class _Doubtful(ValueError):
    pass


class S3Store(Store):
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._connected: _Connection | None = None
        self._without_checksums = False
        # False for example with encryption by KMS; None until an object has shown it
        self._etags_are_sums: bool | None = None
        self._fall_backs = 0  # reads in a row at which obstore failed and boto3 succeeded

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        return bytes(self._read(key, start, length, if_match))

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        import numpy as np

        def fill(at: int, piece: memoryview) -> int:
            data = np.frombuffer(self._read(key, start + at, len(piece), if_match), np.uint8)
            # numpy lets other threads run while it copies; a memoryview would block them
            np.frombuffer(piece, np.uint8)[: len(data)] = data
            return len(data)

        return filled_by_ranges(buffer, fill)

    def read_again(
        self, key: str, look: int, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        return bytes(self._get(look, key, start, length, if_match).data)

    def _read(self, key: str, start: int, length: int | None, if_match: str | None) -> Any:
        """The bytes, as an object with a buffer; a whole object is compared with its ETag's sum."""
        answer = self._get(0, key, start, length, if_match)
        if self._has_its_sum(answer):
            return answer.data

        def read(look: int) -> Any:
            nonlocal answer
            if look:
                answer = self._get(look, key, start, length, if_match)
            return answer.data

        def verify(data: Any) -> Any:
            if not self._has_its_sum(answer):
                raise _OtherSum
            return data

        try:
            return second_look(read, verify, self.url_of(key))
        except _OtherSum:  # the same bytes twice: the ETag is no sum
            if self._etags_are_sums is None:
                self._etags_are_sums = False
            return answer.data

    def _has_its_sum(self, answer: _Answer) -> bool:
        """False when an ETag that may be an MD5 differs from the data's MD5."""
        if (
            answer.etag is None
            or self._etags_are_sums is False
            or len(answer.data) > SUMMED_BYTES
            or not re.fullmatch("[0-9a-f]{32}", answer.etag)
        ):
            return True
        if hashlib.md5(answer.data, usedforsecurity=False).hexdigest() != answer.etag:
            return False
        self._etags_are_sums = True
        return True

    def _get(self, look: int, key: str, start: int, length: int | None, if_match: str | None) -> _Answer:
        """One read. Odd looks go through boto3, even looks first through obstore; all but look 0
        use new connections.
        """
        name = self._name(key)
        if length == 0:
            return _Answer(b"", None)
        with self._explaining(self.url_of(key)):
            connection = self._connection()
            failure: BaseException | None = None
            if look % 2 == 0 and not self._reads_by_boto3:
                try:
                    reader = self._alone(connection.new_reader) if look else connection.reader
                    answer = _get_by_obstore(reader, name, start, length, if_match)
                    self._fall_backs = 0
                    return answer
                # obstore's own error, or the credential provider's: boto3's error tells which
                except BaseException as error:
                    if not _is_of_obstore(error):
                        raise
                    failure = error
            if look == 0:
                client = connection.patient if self._reads_by_boto3 else connection.single
                answer = self._get_by_boto3(client, name, start, length, if_match)
                if failure is not None and answer.data:  # no data: the object ends before `start`
                    self._keep_fall_back(failure)
                return answer
            with closing(self._alone(connection.new_client)) as client:
                return self._get_by_boto3(client, name, start, length, if_match)

    @property
    def _reads_by_boto3(self) -> bool:
        return self._fall_backs >= _ENOUGH_FALL_BACKS

    def _keep_fall_back(self, failure: BaseException) -> None:
        """Count a read at which only obstore failed. A failing connection costs each read all of
        obstore's retries, 1.5 s and more.
        """
        message = f"{type(failure).__name__}: {failure}".lower()
        self._fall_backs += _ENOUGH_FALL_BACKS if any(sign in message for sign in _LASTING) else 1

    def _alone(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, one thread at a time: a boto3 session is not thread-safe."""
        with self._lock:
            return make()

    def stat(self, key: str) -> ObjectInfo:
        with self._explaining(self.url_of(key)):
            connection, name = self._connection(), self._name(key)
            try:
                answer = connection.patient.head_object(Bucket=self._bucket, Key=name)
            except Exception as error:
                raise with_reason(connection.single, self._bucket, name, error) from None
        return ObjectInfo(
            key, int(answer["ContentLength"]), _unquoted(answer["ETag"]), _epoch(answer.get("LastModified"))
        )

    def write(self, key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        with self._explaining(self.url_of(key)):
            try:
                return self._upload(key, data)
            except Exception as error:
                if not self._dislikes_checksums(error):
                    raise
                return self._upload(key, data)

    def create(self, key: str, data: bytes | Path) -> ObjectInfo:
        url = self.url_of(key)
        # the client that sends a file has retries of its own
        for pause_s in CREATE_PAUSES_S[:2] if isinstance(data, Path) else CREATE_PAUSES_S:
            time.sleep(pause_s)
            try:
                with self._explaining(url):
                    return self._create_once(key, data)
            except StorageError as error:
                cause = error.__cause__
                if not (is_ambiguous(cause) or self._dislikes_checksums(cause)):
                    raise
                last = error
            # The answer may be lost, or be a 412 that this write itself caused: the stored bytes
            # decide.
            with suppress(ObjectNotFound):
                if self.holds(key, data):
                    return self.stat(key)
                raise AlreadyExists(f"{url} exists already with other content.")
        raise last

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        listing = _Listing([], None, True)

        def read(look: int) -> bytes:
            nonlocal listing
            listing = self._list_once(prefix, look)
            return b"" if listing.problem is None else repr(listing).encode()

        def verify(_: bytes) -> None:
            if listing.problem is not None:
                raise _Doubtful

        with suppress(_Doubtful):  # the same problem twice: this store's listings have it
            second_look(read, verify, f"{self.url}/{prefix}")
        return self._sorted(listing, prefix)

    def list_again(self, prefix: str, look: int) -> Iterator[ObjectInfo]:
        return self._sorted(self._list_once(prefix, look), prefix)

    def _sorted(self, listing: _Listing, prefix: str) -> Iterator[ObjectInfo]:
        if not listing.readable:
            raise StorageError(
                f"{self.url}/{prefix} cannot be listed: no S3 server answers like that"
                f" ({listing.problem}); check AWS_ENDPOINT_URL."
            )
        return iter(sorted(listing.found, key=lambda info: info.key))

    def _list_once(self, prefix: str, look: int) -> _Listing:
        """One listing; all but look 0 use new connections."""
        with self._explaining(f"{self.url}/{prefix}"):
            connection = self._connection()
            if look == 0:
                return self._listing_of(connection.patient, prefix)
            with closing(self._alone(connection.new_client)) as client:
                return self._listing_of(client, prefix)

    def _listing_of(self, client: Any, prefix: str) -> _Listing:
        from botocore.parsers import ResponseParserError

        found: list[ObjectInfo] = []
        problem: str | None = None
        whole = self._prefix + prefix
        try:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=whole):
                items = page.get("Contents", [])
                problem = problem or _problem_of(page, whole)
                for item in items:
                    if not item["Key"].endswith("/"):  # a folder made by a web console
                        found.append(
                            ObjectInfo(
                                item["Key"].removeprefix(self._prefix),
                                int(item["Size"]),
                                _unquoted(item["ETag"]),
                                _epoch(item.get("LastModified")),
                            )
                        )
        # no XML, or no listing's: a number, a date (whose parser may warn) or a name is broken
        except (ResponseParserError, ValueError, LookupError, OverflowError, RuntimeWarning) as error:
            return _Listing([], " ".join(str(error).split())[:200] or type(error).__name__, False)
        return _Listing(found, problem, True)

    def delete(self, key: str) -> None:
        with suppress(ObjectNotFound), self._explaining(self.url_of(key)):
            self._connection().patient.delete_object(Bucket=self._bucket, Key=self._name(key))

    def now(self) -> float:
        """The time by the store's clock: an answer's Date. Raises `StorageError` without one."""
        with self._explaining(self.url):
            client = self._connection().patient
            answer = client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return parsedate_to_datetime(date).timestamp()
        except (ValueError, TypeError):
            raise StorageError(
                f"{self.url} does not give the time (Date: {date[:40]!r}); reach it without the proxy that"
                " leaves the time out."
            ) from None

    def clear_unfinished(self, prefix: str) -> None:
        """Do nothing: single requests leave nothing, and an upload in parts may be at work."""

    def abort_uploads(self, prefix: str, doomed: Callable[[str], bool]) -> tuple[str, ...]:
        """Delete them like every `Store`. Where the bucket does not allow or know these requests,
        nothing happens, and its lifecycle rule clears the uploads.
        """
        from botocore.exceptions import ClientError

        aborted = []
        with self._explaining(f"{self.url}/{prefix}"):
            client = self._connection().patient
            pages = client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            try:
                for upload in [one for page in pages for one in page.get("Uploads", [])]:
                    key = upload["Key"].removeprefix(self._prefix)
                    if upload["Key"].startswith(self._prefix + prefix) and doomed(key):
                        client.abort_multipart_upload(
                            Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        aborted.append(key)
            except ClientError as error:
                # 404: finished, or aborted by another start
                if status_of(error) not in (400, 403, 404, 405, 501):
                    raise
        return tuple(aborted)

    def _name(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _upload(self, key: str, data: bytes | Path | Buffers) -> ObjectInfo:
        client, name = self._connection().patient, self._name(key)
        if isinstance(data, Path) or len(data) > WRITTEN_AT_ONCE:
            content = Buffers([data]) if isinstance(data, bytes) else data
            with content.open("rb") if isinstance(content, Path) else content.open() as file:
                client.upload_fileobj(file, self._bucket, name)
            return self.stat(key)
        body = data if isinstance(data, bytes) else data.open()
        answer = client.put_object(Bucket=self._bucket, Key=name, Body=body)
        return ObjectInfo(key, len(data), _unquoted(answer["ETag"]))

    def _create_once(self, key: str, data: bytes | Path) -> ObjectInfo:
        where = {"Bucket": self._bucket, "Key": self._name(key)}
        if not isinstance(data, Path):
            answer = self._connection().single.put_object(**where, Body=data, IfNoneMatch="*")
            return ObjectInfo(key, len(data), _unquoted(answer["ETag"]))
        client, size = self._connection().patient, data.stat().st_size
        with data.open("rb") as file:
            if size <= ONE_REQUEST:
                answer = client.put_object(**where, Body=file, IfNoneMatch="*")
            else:
                answer = _create_in_parts(client, where, file)
        return ObjectInfo(key, size, _unquoted(answer["ETag"]))

    def _get_by_boto3(
        self, client: Any, name: str, start: int, length: int | None, if_match: str | None
    ) -> _Answer:
        from botocore.exceptions import ClientError, IncompleteReadError, ResponseStreamingError

        request = {"Bucket": self._bucket, "Key": name}
        if start or length is not None:
            request["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        if if_match is not None:
            request["IfMatch"] = _quoted(if_match)
        for attempts_left in reversed(range(_BODY_ATTEMPTS)):
            try:
                answer = client.get_object(**request)
                body: IO[bytes] = answer["Body"]
                data = body.read()
                break
            except ClientError as error:
                if status_of(error) == 416:  # the object ends before `start`
                    return _Answer(b"", None)
                raise
            # boto3 does not retry once the body has begun
            except (IncompleteReadError, ResponseStreamingError):
                if not (attempts_left and self._reads_by_boto3):
                    raise
        size = str(answer.get("ContentRange", f"/{len(data)}")).rpartition("/")[2]
        return _Answer(data, _unquoted(answer.get("ETag", "")) if size == str(len(data)) else None)

    def _dislikes_checksums(self, error: BaseException | None) -> bool:
        """True once, when a store may have refused the checksum headers that boto3 adds; later
        requests have none.
        """
        if self._without_checksums or status_of(error) not in (400, 411, 501) or code_of(error) in CLEAR_400:
            return False
        with self._lock:
            self._without_checksums, self._connected = True, None
        return True

    def _connection(self) -> _Connection:
        with self._lock:
            if self._connected is None:
                with naming_settings(self.url):
                    self._connected = self._connect()
            return self._connected

    def _connect(self) -> _Connection:
        """Connect to the bucket in its region; raises botocore's errors for missing credentials, no
        network, and a missing bucket.
        """
        import boto3
        from botocore.config import Config
        from botocore.exceptions import EndpointConnectionError

        session = boto3.Session()
        bundle = trusted_bundle(session)
        # boto3 itself reads AWS_DEFAULT_REGION only
        region = session.region_name or os.environ.get("AWS_REGION")
        options: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": 32,
        }
        if self._without_checksums:
            options["request_checksum_calculation"] = "when_required"

        def client(attempts: int) -> Any:
            config = Config(retries={"mode": "standard", "total_max_attempts": attempts}, **options)
            return watch(session.client("s3", region_name=region, config=config))

        try:
            looking = client(3)
        except ValueError as error:
            if "IPv6" in str(error):  # the only message without the endpoint
                given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
            elif str(error).startswith("Invalid endpoint"):
                given = str(error).partition(": ")[2]
            else:
                raise
            raise wrong_endpoint(self.url, given) from error
        require_endpoint(self.url, looking.meta.endpoint_url)
        hosts: list[str] = []  # hosts that were asked for the bucket
        looking.meta.events.register(
            "before-send.s3.HeadBucket",
            lambda request, **_: hosts.append(urlsplit(request.url).hostname or ""),
        )
        try:
            headers = self._headers_of_bucket(looking)
        except EndpointConnectionError as error:
            if ".amazonaws.com" not in looking.meta.endpoint_url or not (
                reason := unknown_region(session, region)
            ):
                raise
            raise StorageError(
                f"{self.url} cannot be reached: {reason}. Set AWS_REGION to the bucket's, or AWS_ENDPOINT_URL"
                " for a store other than AWS."
            ) from error
        virtual = bool(hosts) and hosts[-1].startswith(f"{self._bucket.lower()}.")
        region = headers.get("x-amz-bucket-region") or region
        patient = client(PATIENT_ATTEMPTS)

        def new_client() -> Any:
            made = client(3)
            made.meta.events.register(
                "before-call.s3", lambda params, **_: params["headers"].update(_NO_CACHE)
            )
            return made

        def new_reader(headers: dict[str, str] | None = None) -> Any:
            try:
                return _obstore_reader(self._bucket, session, patient, virtual, bundle, headers)
            except BaseException as error:  # a setting that only boto3 knows
                if not _is_of_obstore(error):
                    raise
                return None

        return _Connection(patient, client(1), new_reader(), new_client, lambda: new_reader(_NO_CACHE))

    def _headers_of_bucket(self, client: Any) -> Any:
        """The headers of an answer of the bucket; raises the error that best says why there is
        none.
        """
        from botocore.exceptions import ClientError

        try:
            return client.head_bucket(Bucket=self._bucket)["ResponseMetadata"]["HTTPHeaders"]
        except ClientError as error:
            # this user may not read the bucket's facts, but perhaps its objects
            if status_of(error) == 403:
                return error.response["ResponseMetadata"]["HTTPHeaders"]
            if status_of(error) in (405, 501):  # a store without this request
                return ask(client, self._bucket, None)
            raise with_reason(client, self._bucket, None, error) from None

    @contextmanager
    def _explaining(self, url: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError, WrongEndpoint) as error:
            raise explain(error, url, self._bucket) from error


def _create_in_parts(client: Any, where: dict[str, str], file: IO[bytes]) -> Any:
    """Create an object in parts. The last request, which joins them, carries the condition."""
    upload = where | {"UploadId": client.create_multipart_upload(**where)["UploadId"]}
    parts: list[dict[str, Any]] = []
    try:
        while piece := file.read(PART_BYTES):
            number = len(parts) + 1
            answer = client.upload_part(**upload, PartNumber=number, Body=piece)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        return client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except BaseException:
        with suppress(Exception):  # else the bucket's lifecycle rule clears it
            client.abort_multipart_upload(**upload)
        raise


def _get_by_obstore(reader: Any, name: str, start: int, length: int | None, if_match: str | None) -> _Answer:
    import obstore

    options: dict[str, Any] = {}
    if length is not None:
        options["range"] = (start, start + length)
    elif start:
        options["range"] = {"offset": start}
    if if_match is not None:
        options["if_match"] = _quoted(if_match)
    answer = obstore.get(reader, name, options=options)
    data, meta = answer.bytes(), answer.meta
    if meta["e_tag"] is None:
        raise ValueError("an object of S3 has an ETag")
    return _Answer(data, _unquoted(meta["e_tag"] or "") if len(data) == meta["size"] else None)


def _problem_of(page: dict[str, Any], prefix: str) -> str | None:
    """How a page of a listing contradicts itself, for example after a flipped bit; None where it
    does not.
    """
    items = page.get("Contents", [])
    names = [item["Key"] for item in items]
    if page.get("KeyCount") not in (None, len(items)):
        return f"it has {len(items)} objects and says {page['KeyCount']}"
    if bool(page.get("IsTruncated")) != ("NextContinuationToken" in page):
        return "it is cut off and names no next page, or the reverse"
    if other := [name for name in names if not name.startswith(prefix)]:
        return f"{other[0]!r} does not begin with {prefix!r}"
    if len(set(names)) < len(names):
        return "a name occurs twice"
    return None


def _is_of_obstore(error: BaseException) -> bool:
    """Whether obstore, or a function it called, failed; a panic of its Rust code is no
    `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _obstore_reader(
    bucket: str,
    session: Any,
    client: Any,
    virtual: bool,
    bundle: bytes | None,
    headers: dict[str, str] | None = None,
) -> Any:
    """An obstore store with the boto3 client's credentials, region, endpoint, trusted CA
    certificates and form of host (`virtual`: the bucket's name before the endpoint's). It adds
    `headers` to each request.
    """
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store as ObstoreS3Store

    provider = Boto3CredentialProvider(session, ttl=CREDENTIAL_TTL)
    provider.config = {}  # else its region contradicts the bucket's own
    endpoint = urlsplit(client.meta.endpoint_url)
    options: dict[str, Any] = {
        "allow_http": endpoint.scheme == "http",
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
        # for a whole body, which may be large; read_timeout catches a silent peer
        "timeout": timedelta(hours=1),
    }
    if headers is not None:
        options["default_headers"] = headers
    if bundle is not None:
        options["root_certificate"] = bundle
    return ObstoreS3Store(
        bucket,
        endpoint=(
            endpoint._replace(netloc=f"{bucket}.{endpoint.netloc}").geturl() if virtual else endpoint.geturl()
        ),
        region=(
            client.meta.region_name if client.meta.region_name not in (None, "aws-global") else "us-east-1"
        ),
        virtual_hosted_style_request=virtual,
        credential_provider=provider,
        client_options=options,
        retry_config={"max_retries": PATIENT_ATTEMPTS, "retry_timeout": READ_PATIENCE},
    )


def _epoch(date: Any) -> float | None:
    """The UTC epoch seconds of a date as boto3 gives it."""
    return None if date is None else float(date.timestamp())


def _unquoted(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _quoted(etag: str) -> str:
    return f'"{_unquoted(etag)}"'
