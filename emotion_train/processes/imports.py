"""Where interpreters that this program starts import from: never from the current folder, where a
user's `launch.py` or `random.py` would be taken for ours or the library's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def past_current_folder(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables with which `python -m`, or an empty entry of PYTHONPATH as after
    `PYTHONPATH=$PYTHONPATH:/opt/x`, does not mean the current folder. The folder that this program
    itself was imported from stays on the path.
    """
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    # `python -m launch.cli` in a checkout that is not installed
    if not sys.flags.safe_path and sys.path and Path(sys.path[0] or os.curdir).resolve() == _ROOT:
        folders.insert(0, str(_ROOT))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(folders)}
