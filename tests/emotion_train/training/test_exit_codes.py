"""0 is for what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from emotion_train.runs.log import Writer
from emotion_train.storage.open import open_store
from emotion_train.training.job import published


def test_nothing_but_a_final_entry_is_published(tmp_path: Path) -> None:
    writer = Writer(open_store(str(tmp_path)), "run", "a" * 64, "b" * 64)
    for entry in (writer.claim(0, 0), writer.append("note", 0, 0), writer.append("checkpoint", 0, 1)):
        with pytest.raises(AssertionError):
            published(entry)
    assert published(writer.append("final", 1, 1)) == 0
