"""Warnings are errors in tests, and stay warnings in pytest's plugins."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_warning_is_an_error() -> None:
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)


@pytest.mark.filterwarnings("ignore:old")
def test_a_test_may_name_a_warning_that_is_none() -> None:
    warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_a_plugin_that_warns_ends_no_session() -> None:
    pages = ["-p", "tests.helpers.warning_plugin", "tests/emotion_train/test_errors.py"]
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pages]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "a plugin has something to say" in done.stdout + done.stderr
