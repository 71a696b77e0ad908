"""A second implementation of S3 on loopback, `localbucket`: what holds for one server only shows
there. It checks no credentials.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.helpers.patience import PATIENCE_S

PACKAGE = "localbucket==1.2.1"


def program() -> str | None:
    """Where it is installed: beside this Python or on the PATH; None where it is not."""
    return shutil.which("localbucket", path=sysconfig.get_path("scripts")) or shutil.which("localbucket")


class SecondS3:
    """One server over `folder`, of which each folder is a bucket; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])

    def env(self) -> dict[str, str]:
        """The variables that lead boto3's standard chain here."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": ",".join(filter(None, ["127.0.0.1,localhost", os.environ.get("NO_PROXY")])),
        }

    def __enter__(self) -> Self:
        found = program()
        assert found is not None, f"type `pip install {PACKAGE}`"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [found, str(self.folder), "--port", str(self._port)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                ended = self._process.poll() is not None or time.monotonic() > deadline
                assert not ended, (self.folder / "log.txt").read_text(errors="replace")
                time.sleep(0.05)
            else:
                return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
