"""Every file of a source is found, read by its own names, or named when it is not read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotion_train.cli import main
from emotion_train.data.cleaning import DROPPED, PASSED_OVER, REFUSED
from emotion_train.data.index import read_index
from emotion_train.edges import hub
from emotion_train.errors import WrongRequest
from emotion_train.labelling.job import Reading
from emotion_train.labelling.planning import find_source
from emotion_train.preparation.steps import prepare
from emotion_train.sources.open import Choices, not_read, open_source
from emotion_train.sources.posts import Columns
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store
from tests.emotion_train.test_prepare import all_posts, posts_of, write_csv

NAMES = ["anger", "fear", "joy"]


def told(names: list[str], count: int = 30) -> list[tuple[str, str]]:
    """Posts that say their own label."""
    return [(f"post {i} says {names[i % len(names)]}", names[i % len(names)]) for i in range(count)]


def as_ids(path: Path, rows: list[tuple[str, str]], names: list[str], kind: str = "ClassLabel") -> None:
    """A Parquet file of ids, whose names stand in its schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    feature: Any = {"names": names, "_type": "ClassLabel"}
    ids: list[Any] = [names.index(label) for _, label in rows]
    if kind == "list":
        feature, ids = {"feature": feature, "_type": "Sequence"}, [[label] for label in ids]
    if kind == "newer list":
        feature, ids = [feature], [[label] for label in ids]
    described = {"info": {"features": {"label": feature}}}
    table = pa.table({"text": [text for text, _ in rows], "label": ids})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(described)}), path)


def as_dataset(names: list[str], count: int, start: str, text_column: str = "text") -> Any:
    """Posts that begin with `start`, as `datasets` holds them, their labels as ids."""
    texts, labels = zip(*told(names, count), strict=True)
    features = {text_column: datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    columns = {text_column: [start + text for text in texts], "label": list(labels)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def right(store: Store) -> int:
    """How many posts there are; all of them have the label that they say."""
    posts = all_posts(store)
    assert all(text.endswith(f"says {label}") for _, text, label in posts)
    return len(posts)


# Ids and their names


@pytest.mark.parametrize("kind", ["ClassLabel", "list", "newer list"])
@pytest.mark.parametrize(
    "names",
    [["0", "1", "10", "11", "2", "3"], ["1", "0"], ["1", "2", "3", "4", "5"], ["joy", "2", "anger"]],
    ids=",".join,
)
def test_an_integer_of_a_class_label_is_a_position_whatever_the_names(
    tmp_path: Path, names: list[str], kind: str
) -> None:
    as_ids(tmp_path / "posts.parquet", told(names, 120), names, kind)
    assert prepare(tmp_path / "posts.parquet", str(tmp_path / "out")).index.labels == tuple(names)
    assert right(open_store(str(tmp_path / "out"))) == 120


def test_class_encode_column_comes_out_as_it_went_in(tmp_path: Path) -> None:
    texts, labels = zip(*told([str(i) for i in range(12)], 120), strict=True)
    encoded = datasets.Dataset.from_dict({"text": list(texts), "label": [int(label) for label in labels]})
    encoded = encoded.class_encode_column("label")
    encoded.to_parquet(str(tmp_path / "posts.parquet"))
    prepare(tmp_path / "posts.parquet", str(tmp_path / "out"))
    assert right(open_store(str(tmp_path / "out"))) == 120


@pytest.mark.parametrize(
    "of_validation",
    [["joy", "fear", "anger"], ["anger", "joy"], ["fear", "anger", "joy"], ["joy"]],
    ids=",".join,
)
def test_each_file_is_read_by_its_own_names(tmp_path: Path, of_validation: list[str]) -> None:
    as_ids(tmp_path / "src" / "train.parquet", told(NAMES), NAMES)
    as_ids(tmp_path / "src" / "validation.parquet", told(of_validation, 12)[::-1], of_validation)
    rows = [(text + " ", label) for text, label in told(NAMES, 9)]
    write_csv(tmp_path / "src" / "test.csv", [(f"test {text.strip()}", label) for text, label in rows])
    prepare(tmp_path / "src", str(tmp_path / "out"))
    store = open_store(str(tmp_path / "out"))
    assert read_index(store).labels == tuple(NAMES)
    assert all(text.endswith(f"says {label}") for _, text, label in all_posts(store))
    assert len(posts_of(store, "test")) == 9


def test_splits_of_the_hub_are_read_by_their_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = datasets.DatasetDict(
        train=as_dataset(["2", "0", "1"], 30, "a ", "Text"),
        validation=as_dataset(["0", "1", "2"], 12, "b ", "Text"),
    )
    monkeypatch.setattr(hub, "require_dataset", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: loaded)
    prepare("team/posts", str(tmp_path / "out"))
    assert right(open_store(str(tmp_path / "out"))) == 42


def test_an_id_without_a_name_and_an_unlabelled_post_are_refused(tmp_path: Path) -> None:
    as_ids(tmp_path / "posts.parquet", told(NAMES), NAMES)
    table = pq.read_table(tmp_path / "posts.parquet")
    ids = table["label"].to_pylist()
    ids[4], ids[7], ids[9] = -1, 3, None
    table = table.set_column(1, "label", pa.array(ids))
    pq.write_table(table, tmp_path / "posts.parquet")
    with pytest.raises(WrongRequest) as caught:
        prepare(tmp_path / "posts.parquet", str(tmp_path / "out"))
    assert "no label                              2  posts.parquet:5, posts.parquet:10" in str(caught.value)
    assert "label id that its file gives no name  1  posts.parquet:8" in str(caught.value)


@pytest.mark.parametrize("labels", ["1,2,3,4,5", "0,1,10,11,2"])
def test_given_names_that_are_numbers_are_names_and_no_positions(tmp_path: Path, labels: str) -> None:
    names = labels.split(",")
    write_csv(tmp_path / "posts.csv", told(names))
    prepare(tmp_path / "posts.csv", str(tmp_path / "out"), labels=tuple(names))
    assert right(open_store(str(tmp_path / "out"))) == 30
    write_csv(tmp_path / "posts.csv", [*told(names), ("a post says 7", "7")])
    with pytest.raises(WrongRequest, match="unknown label"):
        prepare(tmp_path / "posts.csv", str(tmp_path / "no"), labels=tuple(names))


# What is missing, doubled or endless


@pytest.mark.parametrize("value", ["NaN", "null", "[null]", "[NaN]", '["joy", null]', "[]"])
def test_a_missing_label_is_no_label(tmp_path: Path, value: str) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in told(NAMES)]
    (tmp_path / "posts.jsonl").write_text("\n".join([*lines, f'{{"text": "x", "label": {value}}}']))
    with pytest.raises(WrongRequest, match=r"no label  1  posts.jsonl:31"):
        prepare(tmp_path / "posts.jsonl", str(tmp_path / "out"))
    assert prepare(tmp_path / "posts.jsonl", str(tmp_path / "out"), on_bad="drop").index.labels == tuple(
        NAMES
    )


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (pa.array([float("nan"), None], pa.float64()), "no label  2"),
        (pa.array([None, None], pa.null()), "no label  2"),
        (pa.array([[None], ["1", None]]), "no label  2"),
        (pa.array([[float("nan")], []], pa.list_(pa.float32())), "no label  2"),
        (pa.array([float("inf"), float("-inf")]), "label that is no finite number  2"),
    ],
)
def test_a_missing_label_of_a_column_is_no_label(tmp_path: Path, labels: Any, words: str) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "posts.parquet")
    with pytest.raises(WrongRequest, match=words):
        prepare(tmp_path / "posts.parquet", str(tmp_path / "out"))


def test_infinite_labels_and_doubled_keys_of_a_line_are_refused(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in told(NAMES)]
    lines += ['{"text": "x", "label": -Infinity}', '{"text": "x", "label": "joy", "text": "y"}']
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    with pytest.raises(WrongRequest) as caught:
        prepare(tmp_path / "posts.jsonl", str(tmp_path / "out"))
    assert "label that is no finite number  1  posts.jsonl:31" in str(caught.value)
    assert "a key twice in one object       1  posts.jsonl:32" in str(caught.value)


def test_a_split_that_comes_late_in_a_file_is_seen(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": f"{text} {i}", "label": label})
        for i in range(1200)
        for text, label in told(NAMES)
    ]
    (tmp_path / "posts.jsonl").write_text(
        "\n".join([*lines, '{"text": "x", "label": "joy", "Split": "test"}'])
    )
    with pytest.raises(WrongRequest, match="split other than train"):
        prepare(tmp_path / "posts.jsonl", str(tmp_path / "out"))


# Files


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["posts.csv", "posts.csv.GZ", "posts.csv.xz", "posts.csv.bz2"])
def test_packed_files_are_known_by_their_bytes(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str
) -> None:
    plain = write_csv(tmp_path / "plain.csv", told(NAMES))
    (tmp_path / name).write_bytes(pack(plain.read_bytes()))
    prepare(tmp_path / name, str(tmp_path / "out"))
    assert right(open_store(str(tmp_path / "out"))) == 30
    (tmp_path / name).write_bytes(pack(plain.read_bytes())[:-20])
    with pytest.raises(WrongRequest, match="cannot be read"):
        prepare(tmp_path / name, str(tmp_path / "no"))


def zstandard(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


PACKS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}


@pytest.mark.parametrize("ending", list(PACKS))
def test_all_streams_of_a_packed_file_are_read_and_nothing_behind_one_is_lost(
    tmp_path: Path, ending: str
) -> None:
    pack = PACKS[ending]
    lines = [f"post {number}" for number in range(40)]
    one, two = ("".join(f"{line}\n" for line in some).encode() for some in (lines[:25], lines[25:]))
    path = tmp_path / f"posts.dat.{ending}"
    path.write_bytes(pack(one) + pack(b"") + pack(two))
    choices = Choices(lines=True)

    def texts() -> list[str]:
        with open_source(str(path), Columns(label=None), choices) as source:
            return [text.decode() for batch in source.batches() for text in batch.texts.to_pylist()]

    assert texts() == lines
    second = bytearray(pack(two))
    second[:4] = b"lost"
    for behind in (two, bytes(second), pack(two)[:9]):
        path.write_bytes(pack(one) + behind)
        with pytest.raises(WrongRequest, match="cannot be read"):
            texts()


def test_zstandard_is_unpacked(tmp_path: Path) -> None:
    plain = write_csv(tmp_path / "plain.csv", told(NAMES))
    with pa.CompressedOutputStream(str(tmp_path / "posts.csv.zst"), "zstd") as out:
        out.write(plain.read_bytes())
    prepare(tmp_path / "posts.csv.zst", str(tmp_path / "out"))
    assert right(open_store(str(tmp_path / "out"))) == 30


def test_a_folder_of_datasets_is_read_without_its_caches(tmp_path: Path) -> None:
    saved = datasets.DatasetDict(
        train=as_dataset(NAMES, 30, "a "),
        validation=as_dataset(NAMES, 9, "b "),
        test=as_dataset(NAMES, 9, "c "),
    )
    saved.save_to_disk(str(tmp_path / "src"))
    cached = tmp_path / "src" / "train" / "cache-0123456789abcdef.arrow"
    cached.write_bytes(next((tmp_path / "src" / "test").glob("data-*.arrow")).read_bytes())
    index = prepare(tmp_path / "src", str(tmp_path / "out")).index
    assert {name: split.rows for name, split in index.splits.items()} == {
        "train": 30,
        "validation": 9,
        "test": 9,
    }
    assert right(open_store(str(tmp_path / "out"))) == 48


@pytest.mark.parametrize(
    ("name", "content", "passed_over"),
    [
        ("labels.json", '{\n "labels": ["joy", "anger"],\n "label2id": {"joy": 0}\n}\n', True),
        ("licence.JSON", '{"name":\n"CC BY 4.0"}', True),
        ("more.json", '{\n "data": [{"text": "so glad", "label": "joy"}]\n}', False),  # posts to convert
        ("more.json", '{"text": "so glad", "label": "joy"}\n', False),  # a JSON Lines file of one post
        ("more.jsonl", '{\n "labels": ["joy"]\n}\n', False),
    ],
)
def test_a_description_beside_posts_is_named_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, *, passed_over: bool
) -> None:
    folder = tmp_path / "src"
    write_csv(folder / "train.csv", told(NAMES))
    write_csv(folder / "validation.csv", told(NAMES, 12))
    (folder / name).write_text(content)
    assert main(["prepare", str(folder), str(tmp_path / "out")]) == (0 if passed_over else 2)
    printed = capsys.readouterr()
    assert f"not read: {name}" in printed.out if passed_over else f"{name} names no split" in printed.err
    found = find_source(str(folder), Reading()).files
    assert (name not in [file.key for file in found]) == passed_over


def test_what_looks_like_data_and_is_not_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "src"
    write_csv(folder / "train.csv", told(NAMES))
    write_csv(folder / "validation.csv", told(NAMES, 12))
    for name in ("test.xlsx", "test.md", "README.md", "more.zip", "LICENSE", ".hidden.zip", "notes.txt"):
        (folder / name).write_bytes(b"x")
    assert main(["prepare", str(folder), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("not read")] == [
        f"not read: {name}" for name in ("more.zip", "notes.txt", "test.md", "test.xlsx")
    ]
    (folder / "train.csv").rename(folder / "train.csv.zip")
    with pytest.raises(
        WrongRequest, match=r"add a file or split named train \(not read: more.zip, .*train.csv.zip\)"
    ):
        prepare(folder, str(tmp_path / "no"))


def test_what_a_reader_of_a_folder_passes_over_is_named_by_prepare_predict_and_label(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "src"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "b.jsonl").write_text('{"text": "b"}\n')
    for name in ("posts.jsonl", "old.csv.bak", "part-00000", "new.jsonl.gz.part", "table.avro"):
        (folder / name).write_text('{"text": "a"}\n')
    for name in ("README.md", "LICENSE", "_SUCCESS", ".hidden", "image.png"):
        (folder / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.jsonl").symlink_to(tmp_path / "none.jsonl")
    names = ("gone.jsonl", "linked", "new.jsonl.gz.part", "old.csv.bak", "part-00000", "table.avro")
    with open_source(str(folder), Columns(label=None)) as source:
        assert source.passed_over == names
    found = find_source(str(folder), Reading())
    assert found.passed_over == names
    assert [file.key for file in found.files] == ["more/b.jsonl", "posts.jsonl"]
    assert not_read(names[:2]) == ["not read: gone.jsonl", "not read: linked"]
    assert not_read(["a"] * 12)[-2:] == ["not read: a", "not read: 2 more files"]


def test_label_reads_no_cache_of_datasets(tmp_path: Path, bucket_url: str) -> None:
    as_dataset(NAMES, 9, "a ").save_to_disk(str(tmp_path / "src" / "own"))
    cached = tmp_path / "src" / "own" / "cache-0123456789abcdef.arrow"
    cached.write_bytes(next((tmp_path / "src" / "own").glob("data-*.arrow")).read_bytes())
    bucket = open_store(f"{bucket_url}/saved")
    for info in open_store(str(tmp_path / "src")).list():
        bucket.write(info.key, tmp_path / "src" / info.key)
    for source, above in ((tmp_path / "src", "own/"), (tmp_path / "src" / "own", ""), (bucket.url, "own/")):
        found = find_source(str(source), Reading())
        assert [file.key for file in found.files] == [f"{above}data-00000-of-00001.arrow"]


def test_a_source_in_a_bucket_is_read_as_a_local_one(tmp_path: Path, s3: LocalS3, bucket_url: str) -> None:
    source = open_store(bucket_url + "/source")
    source.write("train.csv", write_csv(tmp_path / "train.csv", told(NAMES)).read_bytes())
    as_ids(tmp_path / "b.parquet", [(f"b {text}", label) for text, label in told(NAMES, 9)], NAMES[::-1])
    source.write("deep/validation.parquet", (tmp_path / "b.parquet").read_bytes())
    prepare(bucket_url + "/source", str(tmp_path / "folder"))
    assert right(open_store(str(tmp_path / "folder"))) == 39
    result = prepare(bucket_url + "/source/train.csv", bucket_url + "/prepared")
    assert result.index.source["name"] == "train.csv"
    assert right(open_store(bucket_url + "/prepared")) == 30
    with pytest.raises(WrongRequest, match="no object at or below"):
        prepare(bucket_url + "/nothing", str(tmp_path / "no"))


@pytest.mark.parametrize("size", [0, 9])
@pytest.mark.parametrize("relative", [False, True])
def test_no_key_of_a_bucket_names_a_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool, size: int
) -> None:
    mine = write_csv(tmp_path / "mine.csv", told(NAMES))
    before = mine.read_bytes()
    key = "../" * 20 + str(mine).lstrip("/") if relative else str(mine)
    store: Any = SimpleNamespace(
        list=lambda prefix: [ObjectInfo(key, size, "e")], read=lambda *a, **k: b"x" * size
    )
    monkeypatch.setattr("emotion_train.sources.open.open_store", lambda url: store)
    with pytest.raises(WrongRequest, match="cannot name an object"):
        prepare("s3://somebody/posts", str(tmp_path / "no"))
    assert mine.read_bytes() == before


def pair(folder: Path, name: str, rows: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_text.txt").write_text("".join(f"{text}\n" for text, _ in rows))
    (folder / f"{name}_labels.txt").write_text("".join(f"{NAMES.index(label)}\n" for _, label in rows))


def test_pairs_of_text_and_label_files_are_read_with_their_mapping(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 30), ("val", 9), ("test", 9)):
        pair(tmp_path / "src", name, [(f'{name} "{text}', label) for text, label in told(NAMES, count)])
    (tmp_path / "src" / "mapping.txt").write_text("".join(f"{i}\t{name}\n" for i, name in enumerate(NAMES)))
    index = prepare(tmp_path / "src", str(tmp_path / "out")).index
    assert {name: split.rows for name, split in index.splits.items()} == {
        "train": 30,
        "validation": 9,
        "test": 9,
    }
    assert right(open_store(str(tmp_path / "out"))) == 48
    files = [
        "--text-file",
        f"{tmp_path}/src/train_text.txt",
        "--label-file",
        f"{tmp_path}/src/train_labels.txt",
    ]
    assert main(["prepare", *files, str(tmp_path / "alone")]) == 0
    assert right(open_store(str(tmp_path / "alone"))) == 30
    assert main(["prepare", *files[:2], str(tmp_path / "no")]) == 2
    assert main(["prepare", str(tmp_path / "no")]) == 2
    assert "No SOURCE is given" in capsys.readouterr().err


def test_pairs_of_another_length_are_refused(tmp_path: Path) -> None:
    pair(tmp_path, "train", told(NAMES))
    with (tmp_path / "train_labels.txt").open("a") as file:
        file.write("1\n")
    with pytest.raises(WrongRequest, match=r"train_text.txt ends after line 30"):
        prepare(
            None,
            str(tmp_path / "out"),
            text_file=tmp_path / "train_text.txt",
            label_file=tmp_path / "train_labels.txt",
        )


def test_where_all_rows_fail_in_one_way_leaving_them_out_is_no_advice(tmp_path: Path) -> None:
    rows = "\n".join(f"café {text},{label}" for text, label in told(NAMES))
    (tmp_path / "posts.csv").write_bytes(f"text,label\n{rows}".encode("latin-1"))
    with pytest.raises(WrongRequest) as caught:
        prepare(tmp_path / "posts.csv", str(tmp_path / "out"))
    assert "All fail in one way: the file is not UTF-8" in str(caught.value)
    assert "--encoding latin-1" in str(caught.value)
    assert "--on-bad" not in str(caught.value)
    prepare(tmp_path / "posts.csv", str(tmp_path / "out"), encoding="latin-1")
    assert right(open_store(str(tmp_path / "out"))) == 30


# Rows in, rows accounted for


def damaged_csv(folder: Path) -> tuple[Path, int]:
    """A CSV with rows of each kind of trouble, and its rows as pandas counts them in one column."""
    path = write_csv(folder / "posts.csv", told(NAMES, 60))
    with path.open("a") as file:
        file.write(
            'a,b,c\nalone\n"x" y,joy\n,joy\nz,\n\n,\ntext,label\npost 0 says anger,joy\n"two\nlines",joy\n'
        )
    physical = path.read_text().count("\n")
    return path, physical - 1 - 1  # the header, and the second line of the last text


def damaged_jsonl(folder: Path) -> tuple[Path, int]:
    path = folder / "posts.jsonl"
    lines = [json.dumps({"text": text, "label": label}) for text, label in told(NAMES, 60)]
    lines += [
        "",
        "{",
        "7",
        '{"text": 1, "label": "joy"}',
        '{"text": "x", "label": ["joy", "fear"]}',
        '{"label": 1}',
    ]
    path.write_text("\n".join(lines))
    return path, path.read_text().count("\n") + 1


def damaged_parquet(folder: Path) -> tuple[Path, int]:
    rows = [*told(NAMES, 60), (None, "joy"), ("x", None), ("", "joy"), ("post 1 says fear", "fear")]
    table = pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    pq.write_table(table, folder / "posts.parquet")
    return folder / "posts.parquet", pq.read_metadata(folder / "posts.parquet").num_rows


def damaged_pair(folder: Path) -> tuple[Path, int]:
    pair(folder / "src", "train", told(NAMES, 40))
    pair(folder / "src", "val", [*[(f"v {text}", label) for text, label in told(NAMES, 12)], ("", "joy")])
    lines = sum(path.read_text().count("\n") for path in (folder / "src").glob("*_text.txt"))
    return folder / "src", lines


@pytest.mark.parametrize("damaged", [damaged_csv, damaged_jsonl, damaged_parquet, damaged_pair])
def test_every_row_of_a_source_is_accounted_for(
    tmp_path: Path, damaged: Callable[[Path], tuple[Path, int]]
) -> None:
    source, total = damaged(tmp_path)
    result = prepare(source, str(tmp_path / "out"), on_bad="drop")
    counts, kept = result.findings.counts, sum(split.rows for split in result.index.splits.values())
    left_out = {kind: counts[kind] for kind in (*REFUSED, *DROPPED, *PASSED_OVER) if counts[kind]}
    assert kept + sum(left_out.values()) == total, left_out
    assert result.index.source["rows_read"] == total - counts["blank"]
    assert len(left_out) >= 1
