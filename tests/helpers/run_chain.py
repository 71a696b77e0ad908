"""The processes of `emotion-launch run`, told apart by their command lines, and a config file by
which it starts a single trainer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from launch.run.choice import HERE, QUIETLY, TRAINER, program_file

# single_gpu_qlora on the CPU, by which the launcher's child is the trainer itself
_ONE_PROCESS = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_machines: 1\n"
    "mixed_precision: 'no'\n"
)


def one_process_config(folder: Path) -> Path:
    """A file in `folder`, written now."""
    path = folder / "one_process.yaml"
    path.write_text(_ONE_PROCESS)
    return path


def is_accelerate(line: Sequence[bytes]) -> bool:
    """Whether this command line is that of accelerate's process, which may be the trainer, too."""
    return _program_of(line) in (program_file(QUIETLY), program_file(HERE))


def is_trainer(line: Sequence[bytes]) -> bool:
    return TRAINER.encode() in line and _program_of(line) != program_file(QUIETLY)


def _program_of(line: Sequence[bytes]) -> str:
    """The file that Python was told to run past the current folder; empty for another line, also
    that of a process which has just ended.
    """
    return os.fsdecode(line[2]) if line[1:2] == [b"-P"] and len(line) > 2 else ""
