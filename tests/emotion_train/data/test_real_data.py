"""Real posts through the real path: the single-label GoEmotions set, where EMOTION_DATA_DIR names a
folder that has it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emotion_train.data.index import read_index
from emotion_train.data.preparation import prepare
from emotion_train.evaluation.floors import posts
from emotion_train.storage.open import open_store

DATA = Path(os.environ.get("EMOTION_DATA_DIR", "nowhere"))


@pytest.mark.skipif(
    not (DATA / "goemotions-15").is_dir(), reason="EMOTION_DATA_DIR names no folder with goemotions-15"
)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_goemotions_goes_through_prepare_and_comes_back(tmp_path: Path, ending: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "dev"):
        (source / f"{split}.{ending}").symlink_to(DATA / "goemotions-15" / f"{split}.{ending}")
    labels = json.loads((DATA / "goemotions-15" / "labels.json").read_text())["labels"]
    result = prepare(source, str(tmp_path / "data"), labels=tuple(labels))
    store = open_store(str(tmp_path / "data"))
    index = read_index(store)
    assert index.labels == tuple(labels)
    dropped = sum(result.findings.counts[kind] for kind in ("repeated", "conflicting", "in_two_splits"))
    rows = {name: list(posts(store, index.split(name))) for name in ("train", "validation")}
    assert sum(map(len, rows.values())) == 24_548 + 3_003 - dropped
    assert dropped < 500
    texts = {
        name: {" ".join(text.split()).casefold() for _, text, _ in found} for name, found in rows.items()
    }
    assert not texts["train"] & texts["validation"]
    assert len({post_id for found in rows.values() for post_id, _, _ in found}) == sum(
        map(len, rows.values())
    )
