"""Between a writer and a real S3 server answers get lost, cut and changed: each is survived or
refused, and nothing is taken for whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import pytest

from emotion_train.errors import StorageError
from emotion_train.runs.log import Writer, read_log, read_part
from emotion_train.runs.retention import collect
from emotion_train.storage import s3 as s3_page
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from tests.helpers.fault_proxy import Fault, FaultProxy

CONTENT = os.urandom(100_000)


@pytest.fixture
def proxy(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(s3_page, "READ_TIMEOUT_S", 1)
        monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0, 0.1, 0.2, 0.4))
        yield proxy


@pytest.fixture
def writer(bucket_url: str, proxy: FaultProxy) -> Writer:
    writer = Writer(open_store(bucket_url), "run", "a" * 64, "b" * 64)
    writer.claim(0, 0)
    return writer


def behind(bucket_url: str, s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The bucket as it is, past the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    return open_store(bucket_url)


@pytest.mark.parametrize("kind", ["no answer", "reset", "503", "slow", "truncated", "flipped", "twice"])
def test_an_entry_is_committed_once_whatever_happens_to_its_answers(
    writer: Writer,
    proxy: FaultProxy,
    bucket_url: str,
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    proxy.faults += [Fault(kind, "PUT", "/log/00000001"), Fault(kind, "PUT", "/log/00000001")]
    saved = writer.append("checkpoint", 0, 1)
    assert proxy.struck
    assert writer.append("checkpoint", 0, 2).seq == 2
    assert saved.seq == 1
    assert tuple(read_log(behind(bucket_url, s3, monkeypatch), "run")) == writer.log


def test_an_entry_is_sent_once_an_attempt(
    writer: Writer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that repeats it in secret would be refused by its own first try."""
    monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0, 0))
    proxy.faults += [Fault("503", "PUT", "/log/00000001")] * 20
    with pytest.raises(StorageError):
        writer.append("checkpoint", 0, 1)
    assert len(proxy.struck) == 2


@pytest.mark.parametrize("kind", ["no answer", "503"])
def test_an_entry_that_cannot_be_read_back_is_found_by_the_next_append(
    writer: Writer,
    proxy: FaultProxy,
    bucket_url: str,
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(s3_page, "READ_PATIENCE", timedelta(seconds=1))
    store = open_store(bucket_url)
    writer.store = store
    unread = [Fault("503", method, "/log/00000001") for method in ("HEAD", "GET")]
    proxy.faults += [Fault(kind, "PUT", "/log/00000001"), *(unread * 40)]
    with pytest.raises(StorageError) as caught:
        writer.append("checkpoint", 0, 1)
    assert caught.value.transient
    proxy.faults.clear()
    assert writer.append("checkpoint", 0, 1).seq == 1
    assert tuple(read_log(behind(bucket_url, s3, monkeypatch), "run")) == writer.log


@pytest.mark.parametrize("kind", ["no answer", "reset", "503", "slow"])
def test_a_part_is_uploaded_whole_whatever_happens_to_its_answers(
    writer: Writer,
    proxy: FaultProxy,
    bucket_url: str,
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    proxy.faults += [Fault(kind, "PUT", "/data/")] * 2
    part = writer.upload("step-1/x.safetensors", CONTENT)
    assert len(proxy.struck) == 2
    assert read_part(behind(bucket_url, s3, monkeypatch), "run", part) == CONTENT


def test_a_part_that_is_changed_on_its_way_to_the_server_is_never_committed(
    writer: Writer, proxy: FaultProxy, bucket_url: str, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.faults.append(Fault("spoiled", "PUT", "/data/"))
    with pytest.raises(StorageError):
        writer.upload("step-1/x.safetensors", CONTENT)
    assert list(behind(bucket_url, s3, monkeypatch).list("run/data/")) == []


@pytest.mark.parametrize("kind", ["no answer", "reset", "503", "slow", "truncated"])
def test_a_part_is_read_whole_whatever_happens_to_its_answers(
    writer: Writer, proxy: FaultProxy, kind: str
) -> None:
    part = writer.upload("step-1/x.safetensors", CONTENT)
    proxy.faults += [Fault(kind, "GET", "/data/")] * 2
    assert read_part(writer.store, "run", part) == CONTENT
    assert len(proxy.struck) == 2


def test_a_part_with_a_flipped_bit_is_refused(writer: Writer, proxy: FaultProxy) -> None:
    part = writer.upload("step-1/x.safetensors", CONTENT)
    proxy.faults += [Fault("flipped", "GET", "/data/")] * 20
    with pytest.raises(StorageError):
        read_part(writer.store, "run", part)
    proxy.faults[:] = [Fault("flipped", "GET", "/data/")]
    assert read_part(writer.store, "run", part) == CONTENT  # one read says nothing


@pytest.mark.parametrize("kind", ["no answer", "reset", "503", "slow", "truncated"])
def test_a_log_is_read_whole_whatever_happens_to_its_answers(
    writer: Writer, proxy: FaultProxy, kind: str
) -> None:
    writer.append("checkpoint", 0, 1)
    proxy.faults += [Fault(kind, "GET", "/log/00000001"), Fault(kind, "GET", "list-type=2")]
    assert tuple(read_log(writer.store, "run")) == writer.log
    assert len(proxy.struck) == 2


@pytest.mark.parametrize("kind", ["no answer", "reset", "503", "slow"])
def test_claiming_and_clearing_away_survive_lost_answers(
    writer: Writer,
    proxy: FaultProxy,
    bucket_url: str,
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    orphan = writer.upload("step-1/x.json", b"{}")
    new = Writer(writer.store, "run", "a" * 64, "b" * 64)
    proxy.faults += [Fault(kind, "PUT", "/log/00000001"), Fault(kind, "DELETE", "/data/")]
    new.claim(0, 0)
    assert collect(new, None) == [orphan.key]
    assert len(proxy.struck) == 2
    store = behind(bucket_url, s3, monkeypatch)
    assert list(store.list("run/data/")) == []
    assert tuple(read_log(store, "run")) == new.log
