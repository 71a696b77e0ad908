"""Whole objects in a bucket (`s3://bucket/prefix`) or in a folder, read, written and listed in the
same way.

Only this module speaks to a store. Credentials, profile, region and endpoint come from boto3's
standard chain. Ranged reads go through obstore and everything else through boto3, because each is
the faster and the more robust at its part. When obstore fails, boto3 asks once more, as only its
errors say why. Importing this module is cheap: both are imported by the first request.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from emotion_train.errors import AlreadyExists, ObjectChanged, ObjectNotFound, StorageError, WrongRequest

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
PATIENT_ATTEMPTS = 8
ONE_REQUEST = 1 << 30  # bytes; S3 takes 5 GiB in one, and what is larger than this is sent in parts
READ_PATIENCE = timedelta(seconds=120)
CREATE_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
# Shorter than the least time that boto3 leaves on a refreshed credential (10 minutes).
CREDENTIAL_TTL = timedelta(minutes=5)
_TEMPORARY = ".writing-"
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# a disk or a network mount that may come back
_DISK_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.EHOSTUNREACH,
)


@dataclass(frozen=True)
class ObjectInfo:
    """`etag` is without its quotes, and None on a folder."""

    key: str
    size: int
    etag: str | None


class Store(ABC):
    """Objects below one URL, named by `/`-separated keys. Safe for use from several threads."""

    url: str

    @abstractmethod
    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        """`length` bytes from `start`, fewer where the object ends; all of the rest when `length`
        is None.

        Raises `ObjectNotFound`, and `ObjectChanged` when the object's ETag is not `if_match`, as
        always on a folder, which has none.
        """

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        """Fill the buffer with the object's bytes from `start`; returns how many there were. Raises
        as `read`.
        """
        data = self.read(key, start=start, length=len(buffer), if_match=if_match)
        buffer[: len(data)] = data
        return len(data)

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and ETag; raises `ObjectNotFound`."""

    @abstractmethod
    def write(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Put the bytes, or the file's content, in place of whatever is there; readers see the old
        or the new object, never a part.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Put the bytes where nothing stands; of several writers at once one wins.

        The same bytes already there count as success (an own attempt whose answer was lost); raises
        `AlreadyExists` for others.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""

    @abstractmethod
    def clear_unfinished(self, prefix: str) -> None:
        """Remove what killed writes left below the folder `prefix/`, and what writes at work there
        have so far: these then fail.
        """

    def url_of(self, key: str) -> str:
        return f"{self.url}/{_checked_key(key)}"


def open_store(url: str) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain path; nothing is contacted
    yet.

    Raises `WrongRequest` for any other URL.
    """
    if "\0" in url or not url.strip():
        raise WrongRequest("The URL of a store is empty; type s3://bucket/prefix or the path of a folder.")
    if mistyped := re.match(r"(s3|gs|https?|file)(//|;/+)", url.strip()):
        raise WrongRequest(
            f"The URL {url} has no colon after {mistyped[1]}; did you mean"
            f" {mistyped[1]}://{url.strip()[mistyped.end() :]}?"
        )
    scheme, colon, rest = url.strip().partition(":")
    if not colon or len(scheme) == 1 or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return FolderStore(Path(url.strip()))
    if scheme.lower() == "s3":
        return _open_bucket(rest)
    if scheme.lower() == "file":
        if not rest.startswith("///") and (rest.startswith("//") or not rest.startswith("/")):
            raise WrongRequest(
                f"The URL {url} names no folder of this machine; type file:///folder or the plain path."
            )
        return FolderStore(Path(url2pathname(rest.removeprefix("//"))))
    named = (
        f"The URL {_without_secrets(url)} has scheme {scheme}; allowed are s3://bucket/prefix and folders (a"
        " path, or file:///path)."
    )
    if scheme.lower() in ("gs", "gcs", "r2", "oss", "cos"):
        named += (
            " Set AWS_ENDPOINT_URL to that cloud's S3 endpoint and type"
            f" s3://{rest.rpartition('@')[2].lstrip('/')}."
        )
    raise WrongRequest(named)


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
        _checked_key(prefix)
    return S3Store(bucket, prefix)


def _checked_key(key: str) -> str:
    parts = key.split("/")
    if (
        "\\" in key
        or "\0" in key
        or any(part in ("", ".", "..") or part.startswith(_TEMPORARY) for part in parts)
    ):
        raise WrongRequest(
            f"{key!r} cannot name an object; allowed are names joined by single slashes, without '.', '..'"
            " and backslashes."
        )
    return key


def _without_secrets(url: str) -> str:
    """The URL with user:password@ cut out."""
    return re.sub(r"//[^/@]*@", "//…@", url)


class FolderStore(Store):
    """Files below one folder. A killed write leaves a file named `.writing-…`, which no reader
    sees.

    The folder itself may be a symbolic link; one below it that leads out of it is refused, and so
    is what is no file.
    """

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._root = folder.expanduser().absolute()

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        path = self._path(key)
        with self._explaining(key), open(path, "rb", opener=_without_waiting) as file:
            if if_match is not None:
                raise ObjectChanged(
                    f"{self.url_of(key)} has no ETag, as it lies in a folder; {if_match} was expected."
                )
            file.seek(start)
            return file.read(-1 if length is None else length)

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        path = self._path(key)
        with self._explaining(key), open(path, "rb", buffering=0, opener=_without_waiting) as file:
            if if_match is not None:
                raise ObjectChanged(
                    f"{self.url_of(key)} has no ETag, as it lies in a folder; {if_match} was expected."
                )
            file.seek(start)
            filled = 0
            while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
                filled += count
            return filled

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._explaining(key):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            return ObjectInfo(key, path.stat().st_size, None)

    def write(self, key: str, data: bytes | Path) -> ObjectInfo:
        path = self._path(key)
        with self._explaining(key, writing=True), _temporary_beside(path, data) as temporary:
            os.replace(temporary, path)
            _sync_folder(path.parent)
            return ObjectInfo(key, path.stat().st_size, None)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        path = self._path(key)
        with self._explaining(key, writing=True), _temporary_beside(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.is_dir() or path.read_bytes() != data:
                    raise AlreadyExists(f"{self.url_of(key)} exists already with another content.") from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StorageError(
                    f"{self.url} lies on a file system without hard links ({error.strerror}), as mounted"
                    " buckets do: nothing can be created there by one process only; name a folder on another"
                    " disk, or the bucket itself as s3://bucket/prefix."
                ) from error
            _sync_folder(path.parent)
            return ObjectInfo(key, len(data), None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder_of_all = prefix.rpartition("/")[0]
        top = self._path(folder_of_all) if folder_of_all else self._root
        found: list[ObjectInfo] = []
        with self._explaining(prefix):
            if self._root.exists() and not self._root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "is a file")
            for folder, _, names in os.walk(top, onerror=_raise_unless_missing):
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(_TEMPORARY):
                        with suppress(FileNotFoundError):  # removed since it was listed
                            found.append(ObjectInfo(key, path.stat().st_size, None))
        return iter(sorted(found, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(ObjectNotFound), self._explaining(key):
            path.unlink()
            for folder in path.parents[: len(path.relative_to(self._root).parts) - 1]:
                try:
                    folder.rmdir()
                except OSError:  # something else lies there
                    break

    def clear_unfinished(self, prefix: str) -> None:
        with self._explaining(prefix):
            for path in (self._root / prefix).rglob(f"{_TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        path = self._root / _checked_key(key)
        real_root = os.path.realpath(self._root)
        if os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
            raise StorageError(
                f"{self.url}/{key} is a symbolic link that leads out of {self.url}; put the file itself"
                " there."
            )
        return path

    @contextmanager
    def _explaining(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _explain_os_error(error, f"{self.url}/{key}", self._root, writing) from error


@contextmanager
def _temporary_beside(path: Path, data: bytes | Path) -> Iterator[Path]:
    """A file of that content beside `path`, on the disk and not only in its cache; removed at the
    end unless it was moved.
    """
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        with _open_in_its_folder(temporary) as file:
            if isinstance(data, Path):
                with open(data, "rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def _open_in_its_folder(path: Path) -> IO[bytes]:
    """A new file; its folder is made, again if `delete` removes the empty one in between."""
    for _ in range(100):
        # the latter when the folder that was there went while mkdir looked at it
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "xb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "xb")


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; raises `FileNotFoundError` for a pipe or a device, which could block a reader
    for ever.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "is no file")
    return descriptor


def _sync_folder(folder: Path) -> None:
    """Make the names in the folder survive a power cut; Windows cannot open a folder and needs no
    such call.
    """
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _explain_os_error(error: OSError, url: str, root: Path, writing: bool) -> StorageError:
    if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)) and (
        writing or root.is_file()
    ):
        return StorageError(
            f"{url} cannot be written or read: a file stands where a folder is needed, or the reverse; name"
            " another folder."
        )
    if not writing and isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return ObjectNotFound(f"There is no object at {url}.")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk is full: {url} could not be written; free some space or name a folder on another"
            " disk.",
            transient=True,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"No permission for {url} ({error.strerror}); name a folder that is yours, or see `ls -ld {root}`"
            " for whose it is."
        )
    away = error.errno in _DISK_AWAY
    return StorageError(
        f"{url} failed: {error.strerror or error}; check the disk, or name another folder.", transient=away
    )


class _Connection(NamedTuple):
    patient: Any  # boto3 client with retries
    single: Any  # boto3 client that sends each request once
    reader: Any  # obstore.store.S3Store


class S3Store(Store):
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._connected: _Connection | None = None
        self._without_checksums = False

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        return bytes(self._read(key, start, length, if_match))

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        data = memoryview(self._read(key, start, len(buffer), if_match))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, key: str, start: int, length: int | None, if_match: str | None) -> Any:
        """The bytes, as an object with a buffer."""
        import obstore

        name = self._name(key)
        options: dict[str, Any] = {}
        if length == 0:
            return b""
        if length is not None:
            options["range"] = (start, start + length)
        elif start:
            options["range"] = {"offset": start}
        if if_match is not None:
            options["if_match"] = _quoted(if_match)
        with self._explaining(self.url_of(key)):
            connection = self._connection()
            try:
                return obstore.get(connection.reader, name, options=options).bytes()
            # of obstore's own family, or whatever the credential provider raised: boto3 tells which
            except Exception:
                return self._read_once(connection.single, name, start, length, if_match)

    def stat(self, key: str) -> ObjectInfo:
        with self._explaining(self.url_of(key)):
            answer = self._connection().patient.head_object(Bucket=self._bucket, Key=self._name(key))
        return ObjectInfo(key, int(answer["ContentLength"]), _unquoted(answer["ETag"]))

    def write(self, key: str, data: bytes | Path) -> ObjectInfo:
        with self._explaining(self.url_of(key)):
            try:
                return self._upload(key, data)
            except Exception as error:
                if not self._dislikes_checksums(error):
                    raise
                return self._upload(key, data)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        url = self.url_of(key)
        for pause_s in CREATE_PAUSES_S:
            time.sleep(pause_s)
            try:
                with self._explaining(url):
                    answer = self._connection().single.put_object(
                        Bucket=self._bucket, Key=self._name(key), Body=data, IfNoneMatch="*"
                    )
                return ObjectInfo(key, len(data), _unquoted(answer["ETag"]))
            except StorageError as error:
                cause = error.__cause__
                if not (_is_ambiguous(cause) or self._dislikes_checksums(cause)):
                    raise
                last = error
            # The answer may be lost, or be a 412 that this very write has caused: what stands there
            # decides.
            with suppress(ObjectNotFound):
                if self.read(key) == data:
                    return self.stat(key)
                raise AlreadyExists(f"{url} exists already with another content.")
        raise last

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found: list[ObjectInfo] = []
        with self._explaining(f"{self.url}/{prefix}"):
            pages = (
                self._connection()
                .patient.get_paginator("list_objects_v2")
                .paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
            )
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # a folder drawn by a web console
                        found.append(
                            ObjectInfo(
                                item["Key"].removeprefix(self._prefix),
                                int(item["Size"]),
                                _unquoted(item["ETag"]),
                            )
                        )
        return iter(sorted(found, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        with suppress(ObjectNotFound), self._explaining(self.url_of(key)):
            self._connection().patient.delete_object(Bucket=self._bucket, Key=self._name(key))

    def clear_unfinished(self, prefix: str) -> None:
        """Nothing: a single request leaves nothing, and a bucket's lifecycle rule clears uploads in
        several parts.
        """

    def _name(self, key: str) -> str:
        return self._prefix + _checked_key(key)

    def _upload(self, key: str, data: bytes | Path) -> ObjectInfo:
        client, name = self._connection().patient, self._name(key)
        if isinstance(data, Path) or len(data) > ONE_REQUEST:
            with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as file:
                client.upload_fileobj(file, self._bucket, name)
            return self.stat(key)
        answer = client.put_object(Bucket=self._bucket, Key=name, Body=data)
        return ObjectInfo(key, len(data), _unquoted(answer["ETag"]))

    def _read_once(
        self, client: Any, name: str, start: int, length: int | None, if_match: str | None
    ) -> bytes:
        from botocore.exceptions import ClientError

        request = {"Bucket": self._bucket, "Key": name}
        if start or length is not None:
            request["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        if if_match is not None:
            request["IfMatch"] = _quoted(if_match)
        try:
            body: IO[bytes] = client.get_object(**request)["Body"]
            return body.read()
        except ClientError as error:
            if _status(error) == 416:  # the object ends before `start`
                return b""
            raise

    def _dislikes_checksums(self, error: BaseException | None) -> bool:
        """True once, when a store may have refused the checksum headers that boto3 adds; from then
        on it gets none.
        """
        if self._without_checksums or _status(error) not in (400, 411, 501) or _code(error) in _CLEAR_400:
            return False
        with self._lock:
            self._without_checksums, self._connected = True, None
        return True

    def _connection(self) -> _Connection:
        with self._lock:
            if self._connected is None:
                self._connected = self._connect()
            return self._connected

    def _connect(self) -> _Connection:
        """Find the bucket and its region; raises botocore's errors for missing credentials, no
        network and no such bucket.
        """
        import boto3
        from botocore.config import Config
        from botocore.exceptions import ClientError

        session = boto3.Session()
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
            return session.client("s3", region_name=region, config=config)

        try:
            looking = client(3)
        except ValueError as error:
            if not str(error).startswith("Invalid endpoint"):
                raise
            given = str(error).partition(": ")[2].rpartition("@")[2]
            raise StorageError(
                f"{self.url} cannot be reached: AWS_ENDPOINT_URL is {given!r}, which is no URL; type"
                " https://HOST, or http://HOST:PORT for a server of your own."
            ) from error
        try:
            headers = looking.head_bucket(Bucket=self._bucket)["ResponseMetadata"]["HTTPHeaders"]
        except ClientError as error:
            if _status(error) != 403:  # 403: this user may not look at the bucket, but perhaps at its objects
                raise
            headers = error.response["ResponseMetadata"]["HTTPHeaders"]
        region = headers.get("x-amz-bucket-region") or region
        patient = client(PATIENT_ATTEMPTS)
        return _Connection(patient, client(1), _obstore_reader(self._bucket, session, patient))

    @contextmanager
    def _explaining(self, url: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise _explain_s3_error(error, url, self._bucket) from error


def _obstore_reader(bucket: str, session: Any, client: Any) -> Any:
    """An obstore store with the credentials, region and endpoint of the boto3 client."""
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store as ObstoreS3Store

    provider = Boto3CredentialProvider(session, ttl=CREDENTIAL_TTL)
    provider.config = {}  # else its region stands against the bucket's own
    endpoint = urlsplit(client.meta.endpoint_url)
    virtual = (client.meta.config.s3 or {}).get("addressing_style") == "virtual"
    options: dict[str, Any] = {
        "allow_http": endpoint.scheme == "http",
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
        # of a whole body, which may be large; a silent peer is caught by read_timeout
        "timeout": timedelta(hours=1),
    }
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = Path(bundle).read_bytes()
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


def _unquoted(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _quoted(etag: str) -> str:
    return f'"{_unquoted(etag)}"'


def _status(error: BaseException | None) -> int | None:
    """HTTP status of a botocore ClientError; None for any other."""
    response = getattr(error, "response", None)
    return (
        int(response["ResponseMetadata"].get("HTTPStatusCode", 0))
        if isinstance(response, dict) and "ResponseMetadata" in response
        else None
    )


def _code(error: BaseException | None) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_ambiguous(error: BaseException | None) -> bool:
    """Whether a conditional write may have happened although it ended in this error, or may happen
    when tried again.
    """
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError

    status = _status(error)
    return isinstance(error, (HTTPClientError, NoConnection)) or (
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
_CLEAR_400 = (
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


def _explain_s3_error(error: Exception, url: str, bucket: str) -> StorageError:
    """The one sentence for a botocore error: what failed, why most likely, what to type. Never
    holds a key or a signature.
    """
    from botocore import exceptions as known

    status, code = _status(error), _code(error)
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
            f" AWS_ENDPOINT_URL ({_without_secrets(os.environ.get('AWS_ENDPOINT_URL', 'not set'))}) and the"
            " region.",
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
        else _without_secrets(str(error))
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
