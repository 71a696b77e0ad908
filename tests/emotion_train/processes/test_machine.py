"""What a report says of the machine."""

from __future__ import annotations

import platform

import numpy as np
import pytest

from emotion_train.processes import machine
from emotion_train.storage.document import version_of


def test_versions_are_those_of_the_packages_and_leave_out_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("numpy", "no-such-package"))
    assert machine.versions() == {"python": platform.python_version(), "numpy": np.__version__}
    assert version_of("no-such-package") == "unknown"
