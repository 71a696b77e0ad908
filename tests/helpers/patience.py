"""How long a test waits for what must come. It is no measure of speed: a busy machine is no defect,
and where all is well nothing waits that long. The variable PATIENCE_S shortens it where tests are
expected to fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PATIENCE_S = float(os.environ.get("PATIENCE_S", "240"))


def eventually(claim: Callable[[], bool]) -> None:
    """Return once `claim` is true; fails where it does not become so in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.005)
