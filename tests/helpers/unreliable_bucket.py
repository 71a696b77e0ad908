"""A bucket in memory, behind the real `S3Store`, that answers as badly as a network may.

Each request takes the next fault from `faults`; without one it is served in order:

    lost            done, and the answer never comes
    late            not done yet (`deliver` does it, any time later), and the answer never comes
    twice           done, and a copy of the request arrives once more with `deliver`
    done412         a conditional write that is done and answered as refused, as after a retry on
                    the way; other writes as done500
    done500         done, and answered with an error
    409, 503        not done
    deliver after   done, and then all that is under way arrives
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from hashlib import md5
from typing import Any

from botocore.exceptions import ClientError, ReadTimeoutError

from emotion_train.storage.s3 import S3Store, _Connection

FAULTS = ("lost", "late", "twice", "done412", "done500", "409", "503")


class UnreliableBucket:
    """`objects` is what the bucket holds. With `honours_conditions` off it overwrites where it
    should refuse.
    """

    def __init__(self, *, honours_conditions: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.honours_conditions = honours_conditions
        self._under_way: list[Callable[[], object]] = []

    def store(self) -> S3Store:
        store = S3Store("memory", "")
        # without a reader of its own every read goes through boto3's part
        store._connected = _Connection(self, self, None, lambda: self, lambda: None)
        return store

    def deliver(self, count: int | None = None) -> None:
        """Let the oldest `count` requests that are under way arrive; all when None."""
        arriving, self._under_way = self._under_way[:count], self._under_way[len(self._under_way[:count]) :]
        for request in arriving:
            try:
                request()
            except ClientError:  # nobody waits for this answer any more
                continue

    # the requests of a boto3 client

    def put_object(
        self, *, Key: str, Body: bytes, IfNoneMatch: str | None = None, **_: object
    ) -> dict[str, object]:
        def put() -> dict[str, object]:
            if IfNoneMatch and self.honours_conditions and Key in self.objects:
                raise answer(412, "PutObject")
            self.objects[Key] = bytes(Body)
            return {"ETag": etag(self.objects[Key])}

        return self._request(put, writes=True, conditional=IfNoneMatch is not None)

    def get_object(self, *, Key: str, Range: str | None = None, **_: object) -> dict[str, object]:
        def get() -> dict[str, object]:
            body = self._body(Key, "GetObject")
            if Range is not None:
                first, _, last = Range.removeprefix("bytes=").partition("-")
                if int(first) >= len(body):
                    raise answer(416, "GetObject")
                body = body[int(first) : int(last) + 1 if last else None]
            return {"Body": io.BytesIO(body)}

        return self._request(get)

    def head_object(self, *, Key: str, **_: object) -> dict[str, object]:
        def head() -> dict[str, object]:
            body = self._body(Key, "HeadObject")
            return {"ContentLength": len(body), "ETag": etag(body)}

        return self._request(head)

    def delete_object(self, *, Key: str, **_: object) -> dict[str, object]:
        def delete() -> dict[str, object]:
            self.objects.pop(Key, None)
            return {}

        return self._request(delete, writes=True)

    def close(self) -> None:
        """A client that looks again is closed after each look."""

    def get_paginator(self, _: str) -> UnreliableBucket:
        return self

    def paginate(self, *, Prefix: str, **_: object) -> Iterator[dict[str, object]]:
        def page() -> dict[str, object]:
            found = sorted(key for key in self.objects if key.startswith(Prefix))
            return {
                "Contents": [
                    {"Key": key, "Size": len(self.objects[key]), "ETag": etag(self.objects[key])}
                    for key in found
                ]
            }

        yield self._request(page)

    def _body(self, key: str, operation: str) -> bytes:
        if key not in self.objects:
            raise answer(404, operation)
        return self.objects[key]

    def _request(
        self, serve: Callable[[], dict[str, Any]], *, writes: bool = False, conditional: bool = False
    ) -> dict[str, Any]:
        fault = self.faults.popleft() if self.faults else "none"
        if fault in ("409", "503"):
            raise answer(int(fault), "Request")
        if fault == "late":
            self._under_way += [serve] if writes else []
            raise ReadTimeoutError(endpoint_url="memory")
        if fault == "deliver after":
            try:
                return serve()
            finally:
                self.deliver()
        served = serve()
        if fault == "twice" and writes:
            self._under_way.append(serve)
        if fault in ("done412", "done500") and writes:
            raise answer(412 if fault == "done412" and conditional else 500, "Request")
        if fault == "lost":
            raise ReadTimeoutError(endpoint_url="memory")
        return served


def answer(status: int, operation: str, code: str = "") -> ClientError:
    """What boto3 raises for an answer with that status; the error code is the status where none is
    given.
    """
    return ClientError(
        {
            "Error": {"Code": code or str(status)},
            "ResponseMetadata": {
                "HTTPStatusCode": status,
                "RequestId": "",
                "HostId": "",
                "HTTPHeaders": {},
                "RetryAttempts": 0,
            },
        },
        operation,
    )


def etag(body: bytes) -> str:
    return f'"{md5(body).hexdigest()}"'
