"""Real posts through the real path: the single-label GoEmotions set, where EMOTION_DATA_DIR names a
folder that has it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from emotion_train.data.index import read_index
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.floors import posts
from emotion_train.preparation.steps import prepare
from emotion_train.sources.open import open_source
from emotion_train.sources.posts import Columns
from emotion_train.storage.open import open_store

DATA = Path(os.environ.get("EMOTION_DATA_DIR", "nowhere"))


needs_goemotions = pytest.mark.skipif(
    not (DATA / "goemotions-15").is_dir(), reason="EMOTION_DATA_DIR names no folder with goemotions-15"
)


@needs_goemotions
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


def goemotions() -> list[tuple[str, str]]:
    table = pq.read_table(DATA / "goemotions-15" / "train.parquet")
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def read(path: Path, delimiter: str, row: Callable[[str, str], str], stray: int | None = None) -> list[Any]:
    """What the reader makes of GoEmotions when someone else has written it."""
    lines = ["text" + delimiter + "label", *(row(text, label) for text, label in goemotions())]
    if stray is not None:
        lines[stray] = '"' + lines[stray]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows: list[Any] = []
    with open_source(str(path), Columns()) as source:
        for batch in source.batches():
            assert batch.labels is not None
            assert not batch.broken
            assert not batch.blank
            pairs = zip(batch.texts.to_pylist(), batch.labels.to_pylist(), strict=True)
            rows += [(text.decode(), label.decode()) for text, label in pairs]
    return rows


@needs_goemotions
def test_goemotions_without_quoting_comes_back_row_by_row(tmp_path: Path) -> None:
    rows = goemotions()
    assert len(rows) == 24_548
    assert sum(text.startswith('"') for text, _ in rows) > 100
    assert read(tmp_path / "a.tsv", "\t", lambda text, label: f"{text}\t{label}") == rows
    rows[5000] = ('"' + rows[5000][0], rows[5000][1])
    assert read(tmp_path / "a.tsv", "\t", lambda text, label: f"{text}\t{label}", stray=5001) == rows


@needs_goemotions
def test_goemotions_of_a_csv_writer_comes_back_and_with_a_stray_quote_or_backslashes_is_refused(
    tmp_path: Path,
) -> None:
    def quoted(text: str, label: str) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="").writerow([text, label])
        return out.getvalue()

    def by_spark(text: str, label: str) -> str:
        escaped = text.replace('"', '\\"')
        return f'"{escaped}",{label}' if '"' in text or "," in text else f"{text},{label}"

    assert read(tmp_path / "a.csv", ",", quoted) == goemotions()
    plain = next(
        i for i, (text, _) in enumerate(goemotions(), 1) if i > 5000 and '"' not in text and "," not in text
    )
    with pytest.raises(WrongRequest, match=rf"row {plain + 1} \(line {plain + 1}\)"):
        read(tmp_path / "a.csv", ",", quoted, stray=plain)
    with pytest.raises(WrongRequest, match="escapes quotes by backslashes"):
        read(tmp_path / "a.csv", ",", by_spark)
