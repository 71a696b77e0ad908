"""Columns that are copied beside answers: no two have one name, and no value is lost."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotion_train.errors import WrongRequest
from emotion_train.sources.open import open_source
from emotion_train.sources.posts import Columns, names_beside, readable


def copied(path: Path, *columns: str, **roles: Any) -> dict[str, list[str | None]]:
    with open_source(str(path), Columns(label=None, kept=columns, **roles)) as source:
        return {
            name: [None if value is None else readable(value) for value in column.to_pylist()]
            for batch in source.batches()
            for name, column in batch.kept.items()
        }


def test_a_list_or_an_object_is_copied_as_its_json(tmp_path: Path) -> None:
    values = [["a", "b"], ["a", None], [], None, ["a\x1fb", "é"]]
    objects = [{"k": "v", "n": None}, None, {"k": "é", "n": 2}, {"k": None, "n": 0}, {"k": "", "n": 1}]
    rows = [
        {"text": f"post {n}", "tags": tags, "of": of}
        for n, (tags, of) in enumerate(zip(values, objects, strict=True))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = pa.Table.from_pylist(rows)
    large = table.set_column(1, "tags", table["tags"].cast(pa.large_list(pa.large_string())))
    pq.write_table(large, tmp_path / "large.parquet")
    for name in ("a.jsonl", "a.parquet", "large.parquet"):
        found = copied(tmp_path / name, "tags", "of")
        for column, wanted in (("tags", values), ("of", objects)):
            assert [None if one is None else json.loads(one) for one in found[column]] == wanted


def test_a_map_is_copied_as_an_object(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.int32())
    maps = pa.array([[("x", 1), ("y", 2)], None, [("x", 1), ("x", 2)]], kind)
    pq.write_table(pa.table({"text": ["a", "b", "c"], "counts": maps}), tmp_path / "a.parquet")
    assert copied(tmp_path / "a.parquet", "counts") == {
        "counts": ['{"x": 1, "y": 2}', None, '[["x", 1], ["x", 2]]']
    }


def test_bytes_and_dates_in_a_list_are_spelled_out(tmp_path: Path) -> None:
    days = pa.array([[date(2026, 1, 2)], [None]], pa.list_(pa.date32()))
    raw = pa.array([[b"\xe9"], ["é".encode()]], pa.list_(pa.binary()))
    pq.write_table(pa.table({"text": ["a", "b"], "days": days, "raw": raw}), tmp_path / "a.parquet")
    found = copied(tmp_path / "a.parquet", "days", "raw")
    assert [json.loads(one or "") for one in found["days"]] == [["2026-01-02"], [None]]
    assert [json.loads(one or "") for one in found["raw"]] == [["\\xe9"], ["é"]]


def test_ids_that_are_no_utf_8_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\none,\xe9\ntwo,\xe8\nthree,\xc3\xa9\n")
    assert copied(tmp_path / "a.csv", "n") == {"n": ["\\xe9", "\\xe8", "é"]}


def test_one_column_under_two_spellings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n')
    with pytest.raises(WrongRequest, match=r"--columns names column 'n' of .* twice"):
        copied(tmp_path / "a.jsonl", "n", "N")
    (tmp_path / "b.jsonl").write_text('{"text": "a", "n": 1, "N": 2}\n')
    assert copied(tmp_path / "b.jsonl", "n", "N") == {"n": ["1"], "N": ["2"]}


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["lang", "user"], ["lang", "user"]),
        (["label", "lang"], ["input_label", "lang"]),
        (["label", "input_label"], ["input_input_label", "input_label"]),
        (["input_label", "label"], ["input_label", "input_input_label"]),
        (["Label", "label", "LABEL "], ["input_Label", "input_input_label", "input_input_input_LABEL "]),
        (["n", "N"], ["n", "input_N"]),
        (["id", "ID"], ["input_id", "input_input_ID"]),
    ],
)
def test_no_two_columns_of_an_output_have_one_name(columns: list[str], names: list[str]) -> None:
    assert names_beside(columns, ["id", "label", "error"]) == names
