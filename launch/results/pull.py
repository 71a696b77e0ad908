"""`emotion-launch pull`: a published adapter into a folder of this machine, and how to use it."""

from __future__ import annotations

import shlex
from pathlib import Path

from emotion_train.console import counted
from emotion_train.runs.published import TRAINING_FILTER, download


def run(run_url: str, folder: Path, with_training_filter: bool = False) -> int:
    """Returns 0 when every file is whole; raises as `download`."""
    parts = download(run_url, folder, with_training_filter)
    total = sum(part.bytes for part in parts)
    print(f"{counted(len(parts), 'file')}, {total / 2**20:.1f} MiB, sha256 verified: {folder}")
    if with_training_filter:
        print(f"{folder}/{TRAINING_FILTER} tells whoever has it which texts were trained on")
    print(f'next: emotion-train predict --adapter {shlex.quote(str(folder))} "what a lovely mess"')
    return 0
