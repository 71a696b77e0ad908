"""Buckets and folders behave alike, and every failure says in one sentence what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from emotion_train.errors import (
    AlreadyExists,
    EmotionTrainError,
    ObjectChanged,
    ObjectNotFound,
    StorageError,
    WrongRequest,
)
from emotion_train.storage import s3 as s3_page
from emotion_train.storage import store as store_page
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.s3_errors import explain
from emotion_train.storage.store import ObjectInfo, Store
from tests.helpers.unreliable_bucket import answer


def sentence(action: Callable[[], object], kind: type[EmotionTrainError] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def counts_parts(store: Store) -> bool:
    """Whether ETags end in the number of parts, as those of AWS; the second server's do not."""
    return store.url.startswith("s3:") and not store.url.startswith("s3://second/")


# Objects


def test_what_was_written_is_read_back(store: Store) -> None:
    info = store.write("a/b c/ü+%20.bin", b"hello world")
    assert info == store.stat("a/b c/ü+%20.bin")
    assert (info.key, info.size) == ("a/b c/ü+%20.bin", 11)
    assert store.read("a/b c/ü+%20.bin") == b"hello world"
    assert store.url_of("a") == f"{store.url}/a"


def test_writing_again_replaces_the_object(store: Store) -> None:
    store.write("a", b"first")
    store.write("a", b"")
    assert store.read("a") == b""
    assert [info.size for info in store.list()] == [0]


def test_a_file_is_uploaded_whole_in_several_parts(store: Store, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 18  # boto3 cuts at 8 MiB
    source = tmp_path / "source"
    source.write_bytes(content)
    assert store.write("big", source) == store.stat("big")
    assert store.read("big") == content
    assert store.read("big", start=9 << 20, length=100) == content[9 << 20 : (9 << 20) + 100]


def test_bytes_that_are_too_many_for_one_request_are_sent_in_parts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_page, "WRITTEN_AT_ONCE", 9 << 20)
    content = os.urandom(1 << 20) * 18
    assert store.write("big", content) == store.stat("big")
    assert store.read("big") == content
    if counts_parts(store):
        assert (store.stat("big").etag or "").endswith("-3")
        assert "-" not in (store.write("small", content[: 9 << 20]).etag or "")


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 5, b"hello"),
        (6, None, b"world"),
        (6, 100, b"world"),
        (3, 0, b""),
        (11, 5, b""),
        (50, None, b""),
        (0, None, b"hello world"),
    ],
)
def test_a_range_ends_where_the_object_ends(
    store: Store, start: int, length: int | None, expected: bytes
) -> None:
    store.write("a", b"hello world")
    assert store.read("a", start=start, length=length) == expected
    if length is not None:
        buffer = bytearray(b"?" * length)
        count = store.read_into("a", memoryview(buffer), start=start)
        assert buffer == expected + b"?" * (length - count)


def test_a_missing_object_is_named(store: Store) -> None:
    for action in (
        lambda: store.read("no/such"),
        lambda: store.stat("no/such"),
        lambda: store.read_into("no/such", memoryview(bytearray(2))),
    ):
        assert f"{store.url}/no/such" in sentence(action, ObjectNotFound)


def test_deleting_twice_is_fine(store: Store) -> None:
    store.write("a", b"1")
    store.delete("a")
    store.delete("a")
    assert list(store.list()) == []


def test_list_is_sorted_and_takes_a_prefix_of_the_key(store: Store) -> None:
    keys = ["a-b", "a/b", "a/b/c", "a.b", "ab", "ä", "b"]
    keys.remove("a/b")  # a folder cannot hold a/b beside a/b/c
    for key in reversed(keys):
        store.write(key, key.encode())
    assert [info.key for info in store.list()] == sorted(keys)
    assert [info.key for info in store.list("a")] == ["a-b", "a.b", "a/b/c", "ab"]
    assert [info.key for info in store.list("a/b/")] == ["a/b/c"]
    assert list(store.list("nothing/here")) == []
    assert list(store.list("a")) == [store.stat(info.key) for info in store.list("a")]


def test_listing_goes_on_after_the_first_page(own_bucket_url: str) -> None:
    store = open_store(own_bucket_url)
    for i in range(12):
        store.write(f"many/{i:02}", b"")
    pages: list[int] = []

    def small_pages(params: dict[str, object], **_: object) -> None:
        params["MaxKeys"] = 5
        pages.append(1)

    store._connection().patient.meta.events.register("before-parameter-build.s3.ListObjectsV2", small_pages)  # type: ignore[attr-defined]
    assert [info.key for info in store.list("many/")] == [f"many/{i:02}" for i in range(12)]
    assert len(pages) == 3


def test_a_store_does_not_see_a_neighbour_whose_name_begins_alike(own_bucket_url: str) -> None:
    open_store(f"{own_bucket_url}/run-10").write("a", b"")
    assert list(open_store(f"{own_bucket_url}/run-1").list()) == []


def test_many_threads_read_at_once(store: Store) -> None:
    content = os.urandom(100_000)
    store.write("a", content)
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda i: store.read("a", start=i * 1000, length=1000), range(100)))
    assert b"".join(parts) == content


def test_a_read_is_refused_when_the_etag_is_another(bucket_url: str) -> None:
    store = open_store(bucket_url)
    first = store.write("a", b"1")
    assert first.etag is not None
    assert '"' not in first.etag
    assert store.read("a", if_match=first.etag) == b"1"
    assert store.read("a", if_match=f'"{first.etag}"') == b"1"
    store.write("a", b"2")
    assert "has changed" in sentence(lambda: store.read("a", if_match=first.etag), ObjectChanged)
    assert "has changed" in sentence(
        lambda: store.read("a", start=0, length=1, if_match=first.etag), ObjectChanged
    )
    assert "has changed" in sentence(
        lambda: store.read_into("a", memoryview(bytearray(1)), if_match=first.etag), ObjectChanged
    )


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\0b", ".writing-1"]
)
def test_a_key_cannot_leave_the_store(store: Store, key: str) -> None:
    for action in (
        lambda: store.read(key),
        lambda: store.write(key, b""),
        lambda: store.create(key, b""),
        lambda: store.delete(key),
    ):
        assert "cannot name an object" in sentence(action, WrongRequest)


def test_a_deleted_object_leaves_no_empty_folders(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b/c/d", b"")
    store.write("a/e", b"")
    store.delete("a/b/c/d")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "e"]
    store.delete("a/e")
    assert list(tmp_path.iterdir()) == []


def test_writing_beside_deleting_never_misses_its_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def write_and_delete(i: int) -> None:
        for _ in range(30):
            store.write(f"a/b/{i}", b"")
            store.delete(f"a/b/{i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))
    assert list(store.list()) == []


# Create-only writes


def test_create_refuses_other_bytes_and_accepts_its_own(store: Store) -> None:
    info = store.create("log/0", b"mine")
    assert info == store.stat("log/0") == store.create("log/0", b"mine")
    assert "exists already" in sentence(lambda: store.create("log/0", b"yours"), AlreadyExists)
    assert store.read("log/0") == b"mine"


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_file_is_created_and_never_put_in_place_of_another(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    if in_parts:
        monkeypatch.setattr(s3_page, "ONE_REQUEST", 1 << 20)
        monkeypatch.setattr(s3_page, "PART_BYTES", 5 << 20)
    mine, yours = tmp_path / "mine", tmp_path / "yours"
    mine.write_bytes(os.urandom(1 << 20) * 6)
    yours.write_bytes(mine.read_bytes()[:-1] + b"!")
    info = store.create("data/0", mine)
    assert info == store.stat("data/0") == store.create("data/0", mine)
    assert info.size == 6 << 20
    for other in (yours, yours.read_bytes(), mine.read_bytes()[:-1]):
        assert "exists already" in sentence(partial(store.create, "data/0", other), AlreadyExists)
    assert store.read("data/0") == mine.read_bytes()
    if in_parts and counts_parts(store):
        assert (info.etag or "").endswith("-2")


def test_what_a_store_holds_is_compared_to_the_last_byte(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_page, "_COMPARED_BYTES", 4)
    store.write("a", b"hello world")
    (tmp_path / "file").write_bytes(b"hello world")
    assert store.holds("a", b"hello world")
    assert store.holds("a", tmp_path / "file")
    for other in (b"hello worlD", b"Hello world", b"hello world!", b"hello worl", b""):
        assert not store.holds("a", other)
    sentence(lambda: store.holds("none", b""), ObjectNotFound)


def test_of_many_creators_exactly_one_wins(store: Store) -> None:
    for round_ in range(2):
        barrier = threading.Barrier(4)

        def attempt(i: int, key: str = f"log/{round_}", barrier: threading.Barrier = barrier) -> bytes | None:
            barrier.wait()
            try:
                store.create(key, b"writer %d" % i)
            except AlreadyExists:
                return None
            return b"writer %d" % i

        with ThreadPoolExecutor(4) as pool:
            winners = [content for content in pool.map(attempt, range(4)) if content]
        assert winners == [store.read(f"log/{round_}")]


def test_create_knows_its_own_write_when_the_answer_was_lost(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ReadTimeoutError

    store = open_store(bucket_url)
    store.write("warm", b"")
    client = store._connection().single  # type: ignore[attr-defined]
    send = client.put_object
    sent = []

    def lose_the_answer(**request: object) -> None:
        sent.append(send(**request))
        raise ReadTimeoutError(endpoint_url="http://127.0.0.1")

    monkeypatch.setattr(client, "put_object", lose_the_answer)
    assert store.create("log/0", b"mine") == store.stat("log/0")
    assert "exists already" in sentence(lambda: store.create("warm", b"mine"), AlreadyExists)
    assert len(sent) == 1


def test_create_tries_again_when_the_store_did_not_take_it(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(bucket_url)
    store.write("warm", b"")
    client = store._connection().single  # type: ignore[attr-defined]
    send, answers = client.put_object, [503, 409]

    def fail_twice(**request: object) -> object:
        if answers:
            status = answers.pop(0)
            raise answer(status, "PutObject")
        return send(**request)

    monkeypatch.setattr(client, "put_object", fail_twice)
    monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0, 0, 0))
    store.create("log/0", b"mine")
    assert store.read("log/0") == b"mine"
    assert answers == []


def test_a_store_that_refuses_checksums_is_written_without_them(bucket_url: str) -> None:
    store = open_store(bucket_url)
    seen: list[bool] = []

    def refuse_checksums(request: object, **_: object) -> None:
        with_checksum = any(name.lower().startswith("x-amz-checksum") for name in request.headers)  # type: ignore[attr-defined]
        seen.append(with_checksum)
        if with_checksum:
            raise answer(501, "PutObject", "NotImplemented")

    connect = store._connect  # type: ignore[attr-defined]

    def connect_through() -> object:
        connection = connect()
        for client in (connection.patient, connection.single):
            client.meta.events.register("before-send.s3.PutObject", refuse_checksums)
        return connection

    store._connect = connect_through  # type: ignore[attr-defined]
    store.write("a", b"1")
    store.create("b", b"2")
    assert (store.read("a"), store.read("b")) == (b"1", b"2")
    assert seen == [True, False, False]


# Folders


def test_a_killed_write_leaves_nothing_that_a_reader_sees(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from emotion_train.storage.open import open_store\n"
        "os.replace = os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store = open_store(sys.argv[1]); getattr(store, sys.argv[2])('sub/a', b'new')"
    )
    store = open_store(str(tmp_path))
    for verb in ("write", "create"):
        ended = subprocess.run([sys.executable, "-c", program, str(tmp_path), verb], check=False)
        assert ended.returncode == -9
    assert len(list((tmp_path / "sub").iterdir())) == 2
    assert list(store.list()) == []
    store.create("sub/a", b"whole")
    assert list(store.list()) == [ObjectInfo("sub/a", 5, None)]


def test_a_full_disk_is_named_and_leaves_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "disk is full" in sentence(lambda: store.write("a", b"new"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert store.read("a") == b"old"


def test_a_mount_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    assert "without hard links" in sentence(lambda: open_store(str(tmp_path)).create("a", b"1"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o700)
    store = open_store(str(tmp_path / "locked"))
    if os.geteuid() != 0:
        (tmp_path / "locked").chmod(0o500)
        assert "No permission" in sentence(lambda: store.write("a", b"1"))
        return
    tmp_path.chmod(0o755)
    os.seteuid(65534)  # root may write anywhere
    try:
        assert "No permission" in sentence(lambda: store.write("a", b"1"))
        assert "No permission" in sentence(lambda: store.read("a"))
    finally:
        os.seteuid(0)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(str(tmp_path / "file"))
    for action in (
        lambda: store.write("a", b""),
        lambda: store.read("a"),
        lambda: store.list(),
        lambda: store.create("a/b", b""),
    ):
        assert "there is a file where a folder is needed" in sentence(action)


def test_a_folder_can_be_given_as_a_file_url(tmp_path: Path) -> None:
    open_store((tmp_path / "a b").as_uri()).write("x", b"1")
    assert open_store(str(tmp_path / "a b")).read("x") == b"1"


def test_a_link_out_of_the_folder_is_refused_and_one_inside_or_to_the_folder_is_followed(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "store").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "store")
    store = open_store(str(tmp_path / "alias"))
    store.write("a", b"1")
    (tmp_path / "store" / "inside").symlink_to("a")
    (tmp_path / "store" / "file").symlink_to(outside / "secret")
    (tmp_path / "store" / "folder").symlink_to(outside)
    assert store.read("inside") == b"1"
    for action in (
        lambda: store.read("file"),
        lambda: store.stat("file"),
        lambda: store.read("folder/secret"),
        lambda: store.write("folder/new", b""),
        lambda: store.create("folder/new", b""),
        lambda: store.delete("folder/secret"),
        lambda: store.list("folder/"),
    ):
        assert "leads out of" in sentence(action)
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_a_prefix_cannot_leave_the_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "secret").write_bytes(b"")
    sentence(lambda: store.list("../"), WrongRequest)


def test_a_pipe_is_no_object_and_blocks_nobody(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    sentence(lambda: store.read("pipe"), ObjectNotFound)


# URLs


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("", "type s3://bucket/prefix"),
        ("s3:/bucket/x", "type s3://bucket/x"),
        ("s3://", "type s3://bucket/prefix"),
        ("s3:///x", "malformed"),
        ("s3://b", "3 to 63"),
        ("s3://bucket/a//b", "single slashes"),
        ("s3://bucket/../b", "without '.'"),
        ("gs://bucket/x", "AWS_ENDPOINT_URL"),
        ("https://bucket.s3.amazonaws.com/x", "allowed are s3://bucket/prefix and folders"),
        ("hdfs://x", "allowed are s3://bucket/prefix and folders"),
        ("file://host/x", "file:///folder"),
        ("file:x", "file:///folder"),
    ],
)
def test_a_malformed_url_says_what_to_type(url: str, remedy: str) -> None:
    assert remedy in sentence(lambda: open_store(url), WrongRequest)


@pytest.mark.parametrize(
    "url",
    ["s3://AKIAKEY:hunter2@bucket/x", "gs://AKIAKEY:hunter2@bucket/x", "https://AKIAKEY:hunter2@host/x"],
)
def test_keys_in_a_url_are_not_repeated(url: str) -> None:
    text = sentence(lambda: open_store(url), WrongRequest)
    assert "hunter2" not in text
    assert "AKIAKEY" not in text


# Failures of a bucket


def everything(url: str) -> list[Callable[[], object]]:
    """Each request against a store of its own, so that each is the first."""
    return [
        lambda: open_store(url).read("a"),
        lambda: open_store(url).stat("a"),
        lambda: open_store(url).write("a", b""),
        lambda: open_store(url).create("a", b""),
        lambda: list(open_store(url).list()),
        lambda: open_store(url).delete("a"),
    ]


def test_missing_credentials_are_named(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for action in everything(bucket_url):
        text = sentence(action)
        assert f"No credentials for {bucket_url}" in text
        assert "aws configure" in text


def test_an_unknown_profile_is_named(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    for action in everything(bucket_url):
        text = sentence(action)
        assert "nobody" in text
        assert "aws configure list-profiles" in text


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_named_but_not_shown(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "WRONGKEY")
    for action in everything(bucket_url):
        text = sentence(action)
        assert bucket_url in text
        assert "aws sts get-caller-identity" in text
        for secret in ("WRONGKEY", os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in text


def test_a_missing_bucket_is_named(s3: LocalS3) -> None:
    for action in everything("s3://no-such-bucket/x"):
        text = sentence(action)
        assert "There is no bucket no-such-bucket" in text
        assert "aws s3 mb s3://no-such-bucket" in text


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9", "minio.lan", "user:hunter2@127.0.0.1:9", "http//127.0.0.1:9"]
)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_no_url_is_named(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, name: str, endpoint: str
) -> None:
    monkeypatch.setenv(name, endpoint)
    for action in everything(bucket_url):
        text = sentence(action)
        assert (
            f"AWS_ENDPOINT_URL is {endpoint.rpartition('@')[2]!r}, which is no URL; type https://HOST" in text
        )
        assert "hunter2" not in text


def test_an_unreachable_endpoint_is_named_soon(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    began = time.monotonic()
    text = sentence(lambda: open_store(bucket_url).read("a"))
    assert "http://127.0.0.1:9 does not answer" in text
    assert "AWS_ENDPOINT_URL" in text
    assert "hunter2" not in text
    assert time.monotonic() - began < 60  # boto3 alone would try for minutes


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_an_expired_login_is_named(bucket_url: str, code: str) -> None:
    store = open_store(bucket_url)

    def refuse(**_: object) -> None:
        raise answer(400, "PutObject", code)

    store._connection().patient.meta.events.register("before-send.s3.PutObject", refuse)  # type: ignore[attr-defined]
    text = sentence(lambda: store.write("a", b""))
    assert "has expired" in text
    assert "aws sso login" in text


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [
        (500, "InternalError", True),
        (503, "SlowDown", True),
        (409, "ConditionalRequestConflict", True),
        (429, "TooManyRequests", True),
        (400, "RequestTimeout", True),
        (400, "ExpiredToken", True),
        (507, "XMinioStorageFull", True),
        (501, "NotImplemented", False),
        (400, "InvalidArgument", False),
        (403, "AccessDenied", False),
        (403, "InvalidAccessKeyId", False),
        (404, "NoSuchBucket", False),
        (404, "NoSuchKey", False),
    ],
)
def test_an_error_of_a_bucket_says_whether_waiting_may_help(status: int, code: str, transient: bool) -> None:
    assert explain(answer(status, "PutObject", code), "s3://bucket/a", "bucket").transient is transient


def test_an_unreachable_endpoint_may_come_back(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for action in everything(bucket_url):
        with pytest.raises(StorageError) as caught:
            action()
        assert caught.value.transient


@pytest.mark.parametrize(
    ("number", "transient"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, True), (errno.EACCES, False)],
)
def test_an_error_of_a_folder_says_whether_waiting_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, transient: bool
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        open_store(str(tmp_path)).create("a", b"1")
    assert caught.value.transient is transient


def test_the_local_server_is_reached_past_a_proxy(
    s3: LocalS3, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    variables = s3.env()
    assert variables["NO_PROXY"] == variables["no_proxy"] == "127.0.0.1,localhost,intranet.example"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store = open_store(bucket_url)
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_the_profile_leads_to_keys_endpoint_and_region(
    s3: LocalS3, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads (obstore) and writes (boto3) both follow ~/.aws/config."""
    config = tmp_path / "config"
    config.write_text(
        f"[profile team]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
        f"endpoint_url = {s3.endpoint}\nregion = eu-north-1\n"
    )
    for name in s3.env():
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "team")
    store = open_store(bucket_url)
    store.write("a", b"1")
    monkeypatch.setattr(type(store), "_get_by_boto3", None)  # obstore must do it alone
    assert store.read("a") == b"1"


def test_a_process_that_has_only_the_local_server_follows_no_profile_and_no_other_key(
    s3: LocalS3, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\nregion = eu-north-1\n[profile team]\nendpoint_url = http://127.0.0.1:9\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    environment = s3.environment()
    assert environment["PATH"] == os.environ["PATH"]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(bucket_url)
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_importing_the_module_imports_no_client() -> None:
    program = (
        "import sys, emotion_train.storage.store\n"
        "print(sorted({'boto3', 'botocore', 'obstore', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.mark.parametrize(
    ("url", "meant"), [("s3//team/runs", "s3://team/runs"), ("https//x/y", "https://x/y")]
)
def test_a_url_without_its_colon_is_not_taken_for_a_folder(url: str, meant: str) -> None:
    with pytest.raises(WrongRequest, match=f"did you mean {meant}"):
        open_store(url)
