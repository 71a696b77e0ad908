"""A command that ends by itself, with what it needs still there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emotion_train.processes.command import call
from tests.helpers.patience import PATIENCE_S

OUTER = "import sys; from emotion_train.processes.command import call; sys.exit(call(sys.argv[1:], {}))"
# says that it listens, and ends with what it heard
INNER = """
import os, signal, sys, time
def heard(number, frame):
    time.sleep(0.2)
    os.write(1, b"saved\\n")  # the signal may come within the print below
    sys.exit(33)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, heard)
print("listening", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_command_save_before_this_process_goes_on(sent: signal.Signals) -> None:
    words = [sys.executable, "-c", OUTER, sys.executable, "-c", INNER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        if sent is signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            process.send_signal(sent)
        assert process.stdout.read() == "saved\n"
        assert process.wait(PATIENCE_S) == 33


def test_the_code_of_a_command_that_a_signal_ended_is_that_of_a_shell(tmp_path: Path) -> None:
    kill = "import os; os.kill(os.getpid(), 9)"
    assert call([sys.executable, "-c", kill], dict(os.environ)) == 128 + 9
    here = "import os, sys; sys.exit(os.getcwd() != sys.argv[1])"
    assert call([sys.executable, "-c", here, str(tmp_path.resolve())], dict(os.environ), tmp_path) == 0
