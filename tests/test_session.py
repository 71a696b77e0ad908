"""Workers of one session, and sessions beside each other: the same tests, no shared folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.parametrize("data", [b"one", b"two"])
def test_bytes_name_no_test(data: bytes, request: pytest.FixtureRequest) -> None:
    assert request.node.name == f"test_bytes_name_no_test[data{[b'one', b'two'].index(data)}]"


def test_temporary_files_lie_in_the_session_s_own_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    code = "import tempfile; print(tempfile.gettempdir())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for folder in (tempfile.gettempdir(), child.stdout.strip()):
        assert tmp_path_factory.getbasetemp() in Path(folder).parents
