"""Makes index_1.zip: a base, a data set of schema emotion-train/index/1, a run that was stopped in
the middle and the same run published, all small.

It was made by the last version that wrote this schema, in a checkout of its commit b92908b, by
`python tests/earlier/make.py`; a later version writes its own schema. What is in it must stay
readable: tests/earlier/test_index_1.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

os.environ["ACCELERATE_USE_CPU"] = "true"  # as accelerate_configs/cpu.yaml asks for

from emotion_train import cli
from emotion_train.config import load_config
from emotion_train.errors import Preempted
from emotion_train.processes.notices import Notice
from emotion_train.runs.checkpoint import Progress
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import start_trainer, tiny_words, write_posts

ARCHIVE = Path(__file__).parent / "index_1.zip"
STOPPED_AT = 5  # of 14 steps
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def words(folder: Path, run_id: str) -> list[str]:
    """The command line of a run in this folder."""
    return tiny_words(folder, f"run.id={run_id}", "lora.r=2", "data.max_length=64")


def make(folder: Path) -> None:
    causal_checkpoint(folder / "base", "llama", dtype=torch.bfloat16, **SMALL)
    source = write_posts(folder / "source")
    assert cli.main(["prepare", str(source), str(folder / "data"), "--rows-per-group", "32"]) == 0
    shutil.rmtree(source)
    assert cli.main(["train", *words(folder, "whole")]) == 0
    now: list[Notice] = []

    def tell(progress: Progress, words: str) -> None:
        if progress.step == STOPPED_AT and not now:
            now.append(Notice("sigterm", "The machine goes", None, 1))

    with ExitStack() as stack, suppress(Preempted):
        trainer = start_trainer(
            load_config(None, words(folder, "stopped")), stack, lambda: now[0] if now else None
        )
        trainer.tell = tell
        trainer.fit()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        make(Path(name))
        for path in sorted(Path(name).rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(name))


if __name__ == "__main__":
    main()
