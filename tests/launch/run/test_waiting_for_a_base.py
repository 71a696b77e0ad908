"""Before it chooses a layout the launcher reads the base's shape, and waits for a bucket that is
away: a layout that was guessed might not fit, and would end the run as a wrong request.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emotion_train.storage import s3 as s3_page
from emotion_train.storage.local_s3 import LocalS3
from launch import cli
from launch.run.topology import Gpu
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.patience import PATIENCE_S

# a request that a store never answers, at the place of the real one
WAITS = """
import sys
from emotion_train.errors import StorageError, exit_code
from emotion_train.storage.patience import StoreRequest
from launch.run.processes import wait_for_answer

def away():
    raise StorageError('s3://bases/one cannot be reached.', transient=True)

request = StoreRequest('the base', 's3://bases/one', away, 600)
sys.exit(exit_code('emotion-launch', lambda: wait_for_answer(request, 3) or 0))
"""


@pytest.mark.parametrize("timeout_s", [0, 3])
def test_an_outage_ends_the_launcher_with_1_and_a_sentence(
    s3: LocalS3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    timeout_s: int,
) -> None:
    monkeypatch.setattr("launch.run.topology.gpus", lambda: [Gpu("0", "GPU-a", "NVIDIA L4", 23_034)])
    monkeypatch.setattr(s3_page, "PATIENT_ATTEMPTS", 1)
    words = ["data.url=d", f"run.output_url={tmp_path}", "model.base=s3://bases/one", "preemption.hold_s=0"]
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.outage = "503"
        assert cli.main(["run", *words, f"run.start_timeout_s={timeout_s}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert ("WAITING for the base at s3://bases/one" in lines[0]) == (timeout_s > 0)
    assert "The run did not start: the base at s3://bases/one was waited for" in lines[-1]


@pytest.mark.parametrize(("number", "held_s"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 3.0)])
def test_a_signal_ends_the_waiting_with_1_and_sigterm_holds_first(
    number: signal.Signals, held_s: float
) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "WAITING for the base" in process.stderr.readline()
        sent_at = time.monotonic()
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 1
        assert held_s - 0.5 <= time.monotonic() - sent_at < held_s + 60
        assert "nothing was trained in it" in process.stderr.read()
