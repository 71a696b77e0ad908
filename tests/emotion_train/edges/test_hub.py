"""A hub that is away, refuses or fails gives one sentence within seconds, once for a verb; the
client is the real one, the hub a server that plays it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emotion_train.bases.files import BaseFiles
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.edges import hub
from emotion_train.errors import EmotionTrainError, StorageError, WrongRequest
from emotion_train.model.load import load_base
from emotion_train.sources.open import open_source
from emotion_train.sources.posts import Columns
from tests.helpers import fake_hub
from tests.helpers.fake_hub import FakeHub
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_checkpoint(tmp_path_factory.mktemp("bases") / "base", "llama")


@pytest.fixture
def server(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the model owner/small and an empty cache; nobody is logged in."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub({"owner/small": base}) as one:
        fake_hub.use(monkeypatch, one.endpoint, tmp_path / "cache")
        yield one


def refusal(name: str = "owner/small", file: str = "config.json") -> EmotionTrainError:
    with pytest.raises(EmotionTrainError) as caught:
        BaseFiles.find(name).file(file)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_model_of_the_hub_is_downloaded_once_and_then_read_without_it(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = load_base("owner/small", "fp32", 2, "cpu")
    assert found.config.hidden_size == 64
    assert PostTokenizer.load("owner/small", 16).bos_id == 1
    assert BaseFiles.find("owner/small").file("tekken.json") is None
    downloads = [path for method, path, _ in server.asked if method == "GET"]
    assert len(downloads) == len(set(downloads))
    monkeypatch.setattr(hub, "ANSWER_S", 0.3)
    server.failure = "silent"
    assert PostTokenizer.load("owner/small", 16).bos_id == 1
    assert load_base("owner/small", "fp32", 2, "cpu")[1].name == "owner/small"


@pytest.mark.parametrize(
    ("failure", "words", "kind", "code"),
    [
        (
            "gated",
            r"owner/small is gated: accept its licence at http\S+/owner/small, then set HF_TOKEN",
            0,
            2,
        ),
        (
            401,
            r"answered 401 for the base owner/small: it wants a valid token \(none is set\); set HF_TOK",
            0,
            2,
        ),
        (
            403,
            r"gated or private \(403\): accept its licence at http\S+/owner/small, then set HF_TOKEN",
            0,
            2,
        ),
        (404, r"neither a folder here nor on the Hugging Face hub, unless it is private and HF_TOKEN", 0, 2),
        (400, r"answered 400 for the base owner/small; try again later, or give a folder", 1, 2),
        (429, r"answered 429 for the base owner/small; try again later, or give a folder", 1, 1),
        (500, r"answered 500 for the base owner/small", 1, 1),
        (503, r"answered 503 for the base owner/small", 1, 1),
        ("login", r"cannot be reached \(what answers there is no Hugging Face hub: a login page", 1, 1),
        ("silent", r"cannot be reached \(it did not answer within", 1, 1),
    ],
)
def test_what_a_hub_answers_is_said_with_what_to_do(
    server: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    failure: str | int,
    words: str,
    kind: int,
    code: int,
) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 1.0 if failure == "silent" else 30.0)
    server.failure = failure
    error = refusal()
    assert isinstance(error, (WrongRequest, StorageError)[kind])
    assert error.exit_code == code
    assert re.search(words, str(error)), str(error)
    assert len(server.asked) == 1  # without the client's retries
    assert capfd.readouterr() == ("", "")  # and without its lines about them


def test_a_token_that_is_set_is_told_from_none(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    server.failure = "gated"
    assert "(the one that is set may not)" in str(refusal())


@pytest.mark.parametrize("address", ["refused", "http://no-such-host.invalid"])
def test_no_connection_is_a_sentence_that_may_be_waited_for(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = fake_hub.refusing_endpoint() if address == "refused" else address
    fake_hub.use(monkeypatch, endpoint, tmp_path)
    error = refusal()
    assert isinstance(error, StorageError)
    assert error.transient
    assert f"the Hugging Face hub at {endpoint} cannot be reached (" in str(error)


@pytest.mark.parametrize("address", ["localhost:80", "https://[::1", "ftp://hub"])
def test_an_endpoint_that_is_no_address_is_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.use(monkeypatch, address, tmp_path)
    assert f"HF_ENDPOINT is {address!r}, which is no address of a web server" in str(refusal())


def test_a_silent_hub_is_waited_for_once_in_a_verb_and_asked_again_later(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 0.5)
    server.failure = "silent"
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        refusal(file=file)
    assert len(server.asked) == 1
    monkeypatch.setattr(hub, "REMEMBERED_S", 0.0)
    monkeypatch.setattr(hub, "ANSWER_S", 30.0)
    server.failure = None
    assert BaseFiles.find("owner/small").file("config.json") is not None


def test_a_hub_that_sends_no_bytes_is_away_too(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 1.0)
    server.failure, server.only = "silent", "GET"
    assert "cannot be reached (it did not answer within" in str(refusal())


def test_a_part_of_a_file_is_fetched_alone(server: FakeHub, base: Path) -> None:
    whole = (base / "model-00001-of-00002.safetensors").read_bytes()
    assert hub.start_of_file("owner/small", "model-00001-of-00002.safetensors", 100) == (
        whole[:100],
        len(whole),
    )
    assert server.asked == [
        ("GET", "/owner/small/resolve/main/model-00001-of-00002.safetensors", "bytes=0-99")
    ]
    assert hub.start_of_file("owner/small", "config.json", 1 << 20)[0] == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("failure", "words", "code"),
    [
        ("gated", r"The data set team/posts is gated: accept its licence at http\S+/datasets/team/posts,", 2),
        (401, "answered 401 for the data set team/posts: it wants a valid token", 2),
        (404, "neither a file or folder here nor on the Hugging Face hub, unless it is private", 2),
        (503, "answered 503 for the data set team/posts; try again later, or give a CSV", 1),
        ("silent", r"cannot be reached \(it did not answer within 1 s\)", 1),
    ],
)
def test_a_data_set_of_a_hub_that_fails_is_said_alike(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, failure: str | int, words: str, code: int
) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 1.0 if failure == "silent" else 30.0)
    server.failure = failure
    with pytest.raises(EmotionTrainError, match=words) as caught:
        open_source("team/posts", Columns("text", "label"))
    assert caught.value.exit_code == code
    assert len(server.asked) == 1


def test_a_verb_ends_within_seconds_and_with_one_line(tmp_path: Path) -> None:
    """Seconds of work: on a busy machine the clock says little, so the client's own time is left
    to the other tests.
    """
    environment = os.environ | fake_hub.environment(fake_hub.refusing_endpoint(), tmp_path)
    command: list[Any] = [sys.executable, "-m", "emotion_train.prepare", "team/posts", tmp_path / "out"]
    began = time.monotonic()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - began < PATIENCE_S
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "cannot be reached (" in ended.stderr
