"""`emotion-launch pull`: a published adapter into a folder of this machine, and how to use it."""

from __future__ import annotations

from pathlib import Path

from emotion_train.runs.published import download


def run(run_url: str, folder: Path) -> int:
    """Returns 0 when every file is whole; raises as `download`."""
    entry = download(run_url, folder)
    total = sum(part.bytes for part in entry.parts)
    print(f"{len(entry.parts)} files, {total / 2**20:.1f} MiB, sha256 verified: {folder}")
    print(f'next: emotion-train predict --adapter {folder} "what a lovely mess"')
    return 0
