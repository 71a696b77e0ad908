"""How long a test waits for what must come. It is no measure of speed: a busy machine is no defect,
and where all is well nothing waits that long. The variable PATIENCE_S shortens it where tests are
expected to fail.
"""

from __future__ import annotations

import os

PATIENCE_S = float(os.environ.get("PATIENCE_S", "240"))
