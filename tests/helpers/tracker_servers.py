"""A real MLflow server on loopback, and a Python that has W&B and mlflow-skinny beside this
project's packages; `make trackers-env` installs both, each in an environment of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType

ENVIRONMENT = Path(__file__).parents[2] / ".trackers-env"
CLIENT = ENVIRONMENT / "client" / "bin" / "python"
SERVER = ENVIRONMENT / "server" / "bin" / "mlflow"
_START_S = 600  # on a busy machine


def missing() -> str | None:
    """What to type where the environments are not there."""
    ready = (ENVIRONMENT / "ready").exists() and CLIENT.exists() and SERVER.exists()
    return None if ready else "W&B and MLflow are not installed; type make trackers-env"


class MLflowServer:
    """A server with a database and artefacts in `folder`; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> MLflowServer:
        line = [str(SERVER), "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        line += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        line += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": ""}
        with (self._folder / "server.log").open("w") as log:
            self._process = subprocess.Popen(
                line, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return self
            log_so_far = (self._folder / "server.log").read_text(errors="replace")
            assert self._process.poll() is None, log_so_far[-4000:]
            assert time.monotonic() < deadline, log_so_far[-4000:]
            time.sleep(0.5)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
