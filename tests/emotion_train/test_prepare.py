"""Posts go in, and exactly the good ones come out once each, in bytes that depend on nothing but
source and options.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emotion_train.cli import main
from emotion_train.data.index import read_index
from emotion_train.data.labels import LabelNames
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import largest
from emotion_train.edges import hub
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.preparation import work
from emotion_train.preparation.shards import balanced
from emotion_train.preparation.spill import partitions_for
from emotion_train.preparation.steps import prepare
from emotion_train.preparation.stratify import DRAW, quotas, thresholds
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store
from tests.helpers.edited_index import index_of

Row = tuple[str, str]
LABELS = ["anger", "joy", "neutral"]


def some_rows(count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    return [
        (f"post {i} {' '.join(draw.choices('abcdefgh', k=6))}", draw.choices(LABELS, [1, 3, 6])[0])
        for i in range(count)
    ]


def write_csv(path: Path, rows: list[Any], header: tuple[str, ...] = ("text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def posts_of(store: Store, split: str) -> list[tuple[str, str, str]]:
    """(id, text, label) of every post of a split, read as the index says."""
    index = read_index(store)
    found: list[tuple[str, str, str]] = []
    for described in index.splits[split].objects:
        table = pq.read_table(io.BytesIO(store.read(described.key, if_match=described.etag)))
        found += [
            (key, text, index.labels[label])
            for key, text, label in zip(*table.to_pydict().values(), strict=True)
        ]
    return found


def all_posts(store: Store) -> list[tuple[str, str, str]]:
    return [post for split in read_index(store).splits for post in posts_of(store, split)]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def refusal(source: Path | str, target: Path, **options: Any) -> str:
    with pytest.raises(WrongRequest) as caught:
        prepare(source, str(target), **options)
    assert not (target / "index.json").exists()
    return str(caught.value)


# What comes out


def test_every_post_comes_out_once_with_its_text_and_label(tmp_path: Path, store: Store) -> None:
    rows = some_rows(3000)
    result = prepare(write_csv(tmp_path / "posts.csv", rows), store.url)
    assert result.created
    assert sorted((text, label) for _, text, label in all_posts(store)) == sorted(rows)
    assert {int(key.removeprefix("posts.csv:")) for key, _, _ in all_posts(store)} == set(range(2, 3002))
    for key, text, _ in posts_of(store, "test"):  # an id names the row that a spreadsheet shows
        assert rows[int(key.split(":")[1]) - 2][0] == text


def test_the_index_describes_the_bytes(tmp_path: Path, store: Store) -> None:
    prepare(
        write_csv(tmp_path / "posts.csv", some_rows(5000)),
        store.url,
        rows_per_group=600,
        rows_per_object=1200,
    )
    index = read_index(store)
    assert {name: len(split.objects) for name, split in index.splits.items()} == {
        "train": 4,
        "validation": 1,
        "test": 1,
    }
    for split in index.splits.values():
        for group in split.row_groups:
            raw = store.read(split.objects[group.object].key, start=group.start, length=group.length)
            assert hashlib.sha256(raw).hexdigest() == group.sha256
        for described in split.objects:
            assert (store.stat(described.key).size, store.stat(described.key).etag) == (
                described.bytes,
                described.etag,
            )
            footer = store.read(described.key, start=described.bytes - described.footer_bytes)
            assert (len(footer), footer[-4:], hashlib.sha256(footer).hexdigest()) == (
                described.footer_bytes,
                b"PAR1",
                described.footer_sha256,
            )


def test_the_reader_finds_every_row_group(tmp_path: Path, store: Store) -> None:
    prepare(
        write_csv(tmp_path / "posts.csv", some_rows(3000)),
        store.url,
        rows_per_group=512,
        rows_per_object=1024,
    )
    split = read_index(store).splits["train"]
    found: list[tuple[str, str | None]] = []
    with RowGroupReader(store, split) as reader:
        for number, group in enumerate(split.row_groups):
            rows = reader.rows(number)
            labels = [largest(target or ()) for target in rows.targets]
            assert tuple(np.bincount(labels, minlength=3)) == group.label_counts
            found += zip(rows.ids, rows.texts, strict=True)
    assert found == [(key, text) for key, text, _ in posts_of(store, "train")]


@given(rows=st.integers(1, 100_000), largest=st.integers(1, 2048))
def test_row_groups_are_even_and_never_small(rows: int, largest: int) -> None:
    sizes = balanced(rows, largest)
    assert sum(sizes) == rows
    assert max(sizes) <= largest
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(rows, largest // 2)


def test_the_order_is_shuffled_and_depends_on_the_seed(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", some_rows(500))
    for seed in (1, 2):
        prepare(source, str(tmp_path / str(seed)), seed=seed)
    one, two = (
        [int(key.split(":")[1]) for key, _, _ in posts_of(open_store(str(tmp_path / str(seed))), "train")]
        for seed in (1, 2)
    )
    assert set(one) != set(two)
    for order in (one, two):
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2


# The same bytes


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", some_rows(2000))
    for name in ("one", "two"):
        prepare(source, str(tmp_path / name))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_bucket_holds_the_bytes_of_a_folder(tmp_path: Path, own_bucket_url: str) -> None:
    source = write_csv(tmp_path / "posts.csv", some_rows(2000))
    prepare(source, str(tmp_path / "folder"))
    prepare(source, own_bucket_url)
    in_bucket = {
        info.key: open_store(own_bucket_url).read(info.key) for info in open_store(own_bucket_url).list()
    }
    in_folder = contents(tmp_path / "folder")
    indexes = [index_of(files.pop("index.json")).model_dump() for files in (in_bucket, in_folder)]
    assert in_bucket == in_folder
    for index in indexes:
        for split in index["splits"].values():
            for described in split["objects"]:
                del described["etag"]
    assert indexes[0] == indexes[1]


def test_little_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "posts.csv", [(text * 10, label) for text, label in some_rows(20_000)])
    assert partitions_for(source.stat().st_size, 16 << 20) > 2
    for memory_mb in (16, 1024):
        prepare(source, str(tmp_path / str(memory_mb)), memory_mb=memory_mb)
    assert contents(tmp_path / "16") == contents(tmp_path / "1024")


def reference_key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


variants = st.sampled_from(
    [
        "{}",
        " {}",
        "{}  ",
        "\t{}!",
        "{}\u00a0x",
        "STRASSE {}",
        "straße {}",
        "ﬁne {}",
        "fine {}",
        "Fine\n{}",
        "I {}",
        "i {}",
        "🙂{}",
    ]
)
texts = st.builds(lambda form, number: form.format(number), variants, st.integers(0, 12))
split_names = st.sampled_from(
    [("train",), ("train", "validation"), ("train", "test"), ("train", "validation", "test"), ("",)]
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data(), names=split_names)
def test_splits_are_disjoint_complete_and_the_same_for_any_memory(
    data: st.DataObject, names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = data.draw(
        st.lists(
            st.tuples(texts, st.sampled_from(["a", "b"]), st.sampled_from(names)), min_size=4, max_size=60
        )
    )
    # two labels in train that nothing else can take away, and enough of each to share with
    # validation
    rows += [(f"sure {i}", "ab"[i % 2], names[0]) for i in range(6)]
    folder = tmp_path_factory.mktemp("property")
    header = ("text", "label", "split") if names[0] else ("text", "label")
    source = write_csv(folder / "p.csv", [row if names[0] else row[:2] for row in rows], header)
    with pytest.MonkeyPatch.context() as patch:
        for partitions in (1, 8):
            patch.setattr(work, "partitions_for", lambda *_, partitions=partitions: partitions)
            prepare(source, str(folder / str(partitions)))
    assert contents(folder / "1") == contents(folder / "8")

    stays: dict[str, tuple[int, str]] = {}  # normalised text -> row, and split it comes from
    for rank in ("test", "validation", "train", ""):
        inside: dict[str, list[int]] = {}
        for number, (text, _, split) in enumerate(rows, start=2):
            if split == rank:
                inside.setdefault(reference_key(text), []).append(number)
        for key, numbers in inside.items():
            (most, _), *_ = Counter(rows[number - 2][1] for number in numbers).most_common(1)  # first of ties
            first = next(number for number in numbers if rows[number - 2][1] == most)
            stays.setdefault(key, (first, rank))
    store = open_store(str(folder / "1"))
    found = {
        (split, int(key.split(":")[1]))
        for split in read_index(store).splits
        for key, _, _ in posts_of(store, split)
    }
    assert {number for _, number in found} == {number for number, _ in stays.values()}
    assert len(found) == len(stays)
    for split, number in found:
        given = rows[number - 2][2]
        assert split == given or given in ("", "train")
    divided = [rows[number - 2][1] for number, split in stays.values() if split in ("", "train")]
    fractions = (
        0.0 if "validation" in {s for _, s in stays.values()} else 0.1,
        0.1 if {s for _, s in stays.values()} <= {"", "train"} else 0.0,
    )
    for label, count in Counter(divided).items():
        train = sum(1 for split, number in found if split == "train" and rows[number - 2][1] == label)
        assert count - train == sum(quotas(count, *fractions))


def test_normalised_texts_equal_those_of_the_plain_definition() -> None:
    from emotion_train.data.cleaning import text_keys

    samples = [
        "Hello  World",
        " hello world",
        "hello\tworld\n",
        "HELLO WORLD",
        "ﬁ",
        "fi",
        "ẞ",
        "ss",
        "x\u2003y",
        "x y",
        "a\x0bb",
        "A B",
        "",
        "İ",
        "i̇",
    ]
    keys = [tuple(key) for key in text_keys(pa.array(samples))]
    for i, one in enumerate(samples):
        for j, other in enumerate(samples):
            assert (keys[i] == keys[j]) == (reference_key(one) == reference_key(other))


# Splitting


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, (0, 0)),
        (2, (0, 0)),
        (3, (1, 1)),
        (4, (1, 1)),
        (10, (1, 1)),
        (100, (10, 10)),
        (104, (10, 10)),
        (106, (11, 11)),
    ],
)
def test_each_label_gives_its_share_and_at_least_one_of_three(count: int, expected: tuple[int, int]) -> None:
    assert quotas(count, 0.1, 0.1) == expected


@given(st.integers(3, 1000), st.floats(0.001, 0.6), st.floats(0.001, 0.39))
def test_train_always_keeps_a_post(count: int, validation: float, test: float) -> None:
    numbers = quotas(count, validation, test)
    assert min(numbers) >= (1 if count >= 3 else 0)
    assert sum(numbers) < count


def test_thresholds_cut_off_exactly_the_smallest_draws(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    record = np.empty(20_000, DRAW)
    record["label"] = draw.choice(3, len(record), p=[0.9, 0.0999, 0.0001])
    record["draw"] = draw.integers(0, 2**64, len(record), dtype=np.uint64)
    record.tofile(tmp_path / "draws")
    limits = thresholds(tmp_path / "draws", 4, 0.2, 0.1)
    for label in range(3):
        draws = record["draw"][record["label"] == label]
        validation, test = quotas(len(draws), 0.2, 0.1)
        assert (draws < limits.test_C[label]).sum() == test
        assert (draws < limits.validation_C[label]).sum() == test + validation


def test_files_named_for_splits_are_kept_as_they_are(tmp_path: Path) -> None:
    rows = some_rows(90)
    write_csv(tmp_path / "src" / "train_1.csv", rows[:30])
    write_csv(tmp_path / "src" / "train" / "more.csv", rows[30:60])
    write_csv(tmp_path / "src" / "dev.csv", rows[60:75])
    write_csv(tmp_path / "src" / "Test-set.csv", rows[75:])
    prepare(tmp_path / "src", str(tmp_path / "out"))
    store = open_store(str(tmp_path / "out"))
    for split, expected in (("train", rows[:60]), ("validation", rows[60:75]), ("test", rows[75:])):
        assert sorted((text, label) for _, text, label in posts_of(store, split)) == sorted(expected)


def test_a_source_with_train_and_validation_gets_no_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "src" / "train.csv", some_rows(60))
    write_csv(tmp_path / "src" / "valid.csv", some_rows(99)[60:])
    assert main(["prepare", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert "no test" in capsys.readouterr().out
    assert list(read_index(open_store(str(tmp_path / "out"))).splits) == ["train", "validation"]


def test_a_set_without_validation_posts_which_no_run_could_use_is_refused(tmp_path: Path) -> None:
    posts = write_csv(tmp_path / "posts.csv", some_rows(60))
    text = refusal(posts, tmp_path / "out", validation_fraction=0.0)
    assert (
        "no validation posts, which every run needs: raise --validation-fraction (now 0), or add a file named"
        " validation" in text
    )
    few = write_csv(
        tmp_path / "few.csv", [("one", "joy"), ("two", "joy"), ("three", "anger"), ("four", "anger")]
    )
    assert "no validation posts, which every run needs: add posts, at least three of each label" in refusal(
        few, tmp_path / "out"
    )
    assert not (tmp_path / "out" / "index.json").exists()


def test_without_a_test_share_nobody_is_told_of_a_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    posts = write_csv(tmp_path / "posts.csv", some_rows(60))
    assert main(["prepare", str(posts), str(tmp_path / "out"), "--test-fraction", "0"]) == 0
    assert "no test" not in capsys.readouterr().out


def test_a_source_with_train_and_test_gives_validation_from_train(tmp_path: Path) -> None:
    write_csv(tmp_path / "src" / "train.csv", some_rows(60))
    write_csv(tmp_path / "src" / "test.csv", some_rows(99)[60:])
    index = prepare(tmp_path / "src", str(tmp_path / "out")).index
    assert (index.splits["train"].rows + index.splits["validation"].rows, index.splits["test"].rows) == (
        60,
        39,
    )


def test_a_text_in_two_splits_stays_in_the_later_one(tmp_path: Path) -> None:
    rows = some_rows(40)
    write_csv(
        tmp_path / "src" / "train.csv", [*rows, ("  SHARED text", "joy"), ("both", "joy"), ("both ", "anger")]
    )
    write_csv(tmp_path / "src" / "validation.csv", [("shared TEXT", "joy"), ("x", "anger")])
    write_csv(tmp_path / "src" / "test.csv", [("Shared text", "neutral"), ("y", "anger")])
    result = prepare(tmp_path / "src", str(tmp_path / "out"))
    store = open_store(str(tmp_path / "out"))
    assert [
        (key, label) for key, text, label in all_posts(store) if text.strip().lower() == "shared text"
    ] == [("test.csv:2", "neutral")]
    assert [label for _, text, label in all_posts(store) if text.strip() == "both"] == ["joy"]
    assert {kind: result.index.source[kind] for kind in ("in_two_splits", "conflicting")} == {
        "in_two_splits": 2,
        "conflicting": 1,
    }


# Formats


def formats(folder: Path, rows: list[Row]) -> Iterator[Path]:
    yield write_csv(folder / "posts.csv", rows)
    packed = folder / "posts.csv.gz"
    packed.write_bytes(gzip.compress((folder / "posts.csv").read_bytes()))
    yield packed
    for name, mark in (("posts.tsv", "\t"), ("semicolons.csv", ";")):
        with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=mark).writerows(
                [
                    ("n", "text", "", "", "label"),
                    *((i, text, "", "", label) for i, (text, label) in enumerate(rows)),
                ]
            )
        yield folder / name
    lines = [
        json.dumps({"label": [label], "other": {"x": i}, "text": text})
        for i, (text, label) in enumerate(rows)
    ]
    (folder / "posts.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]))
    yield folder / "posts.jsonl"
    for name, column in (
        ("strings", [label for _, label in rows]),
        ("lists", [[label] for _, label in rows]),
    ):
        pq.write_table(
            pa.table({"text": [text for text, _ in rows], "label": column}), folder / f"{name}.parquet"
        )
        yield folder / f"{name}.parquet"
    numbers = pa.table(
        {
            "text": pa.array([text for text, _ in rows]).dictionary_encode(),
            "label": [sorted(LABELS).index(label) for _, label in rows],
        }
    )
    names = {"info": {"features": {"label": {"names": sorted(LABELS), "_type": "ClassLabel"}}}}
    pq.write_table(
        numbers.replace_schema_metadata({"huggingface": json.dumps(names)}), folder / "numbers.parquet"
    )
    yield folder / "numbers.parquet"


def test_every_format_gives_the_same_posts(tmp_path: Path) -> None:
    rows = [
        *some_rows(50),
        ('said "hi",\nand left', "joy"),
        ("naïve 🙂 post", "anger"),
        ("  spaces kept  ", "joy"),
    ]
    for number, source in enumerate(formats(tmp_path, rows)):
        result = prepare(source, str(tmp_path / f"out{number}"))
        assert result.index.labels == ("anger", "joy", "neutral"), source
        assert sorted(
            (text, label) for _, text, label in all_posts(open_store(str(tmp_path / f"out{number}")))
        ) == sorted(rows), source


def test_a_hub_data_set_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = some_rows(60)
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": [datasets.ClassLabel(names=["neutral", "joy", "anger"])]}
    )
    columns = {"text": [text for text, _ in rows], "labels": [[label] for _, label in rows]}
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))
    monkeypatch.setattr(hub, "require_dataset", lambda name: None)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, subset: loaded if (name, subset) == ("team/posts", "small") else None,
    )
    index = prepare("team/posts", str(tmp_path / "out"), label_column="labels", subset="small").index
    assert index.labels == ("neutral", "joy", "anger")
    assert index.source["name"] == "team/posts:small"
    assert sorted((text, label) for _, text, label in all_posts(open_store(str(tmp_path / "out")))) == sorted(
        rows
    )


def test_an_unreachable_hub_is_named(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "emotion_train.prepare", "team/no-such-posts", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "The data set team/no-such-posts is neither a file or folder here nor in the local" in ended.stderr
    assert "HF_HUB_OFFLINE forbids to ask the Hugging Face hub; unset it" in ended.stderr


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_any_line_end_is_read(tmp_path: Path, end: str) -> None:
    rows = some_rows(30)
    source = tmp_path / "posts.csv"
    source.write_text(end.join(["text,label", *(f"{text},{label}" for text, label in rows)]), newline="")
    prepare(source, str(tmp_path / "out"))
    assert sorted((text, label) for _, text, label in all_posts(open_store(str(tmp_path / "out")))) == sorted(
        rows
    )


def test_arrow_types_are_read_or_named(tmp_path: Path) -> None:
    rows = some_rows(30)
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    structs = pa.table({"text": texts, "label": [{"name": label} for label in labels]})
    pq.write_table(structs, tmp_path / "structs.parquet")
    assert "Column 'label' of" in (text := refusal(tmp_path / "structs.parquet", tmp_path / "out"))
    assert "holds struct<name: string>" in text
    assert "type --label-column" in text
    views = pa.table({"text": pa.array(texts, pa.string_view()), "label": pa.array(labels, pa.string_view())})
    pq.write_table(views, tmp_path / "views.parquet")
    prepare(tmp_path / "views.parquet", str(tmp_path / "out"))
    assert sorted((text, label) for _, text, label in all_posts(open_store(str(tmp_path / "out")))) == sorted(
        rows
    )


def test_an_id_column_is_kept_and_must_be_unique(tmp_path: Path) -> None:
    rows = [(f"p{i}", "ab"[i % 2], f"id-{i}") for i in range(30)]
    prepare(
        write_csv(tmp_path / "posts.csv", rows, ("text", "label", "key")),
        str(tmp_path / "out"),
        id_column="key",
    )
    assert sorted(key for key, _, _ in all_posts(open_store(str(tmp_path / "out")))) == sorted(
        key for _, _, key in rows
    )
    doubled = write_csv(
        tmp_path / "doubled.csv",
        [(f"p{i}", "ab"[i % 2], "same") for i in range(30)],
        ("text", "label", "key"),
    )
    assert "Two posts of one split have the id 'same'" in refusal(doubled, tmp_path / "no", id_column="key")


# Trouble in the posts

GOOD = b"".join(b"good %d,%s\n" % (i, [b"joy", b"anger"][i % 2]) for i in range(20))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"caf\xe9,joy", "bytes that are not UTF-8"),
        (b"fine,jo\xff", "bytes that are not UTF-8"),
        (b" \t,joy", "no text"),
        (b'"\x00",joy', "no text"),
        ("\u200b\ufeff \u00a0\u00ad,joy".encode(), "no text"),
        ("\u2800\u3164,joy".encode(), "no text"),
        (b"fine,", "no label"),
        (b"one,two,joy", "more or fewer cells than the header"),
        (b"alone", "more or fewer cells than the header"),
        (b"x" * 101 + b",joy", "text too long"),
        (b"fine,jooy", "unknown label"),
        (b'fine,"joy,anger"', "several labels"),
        (b"fine,\"['joy', 'anger']\"", "several labels"),
    ],
)
def test_a_bad_csv_row_is_refused_by_number_or_dropped(tmp_path: Path, line: bytes, words: str) -> None:
    source = tmp_path / "posts.csv"
    source.write_bytes(
        b"text,label\n"
        + GOOD[: GOOD.index(b"good 3")]
        + line
        + b"\n"
        + GOOD[GOOD.index(b"good 3") :]
        + line
        + b"\n"
    )
    options: dict[str, Any] = {"labels": ("joy", "anger"), "max_chars": 100}
    text = refusal(source, tmp_path / "out", **options)
    assert "2 of 22 posts cannot be used" in text
    assert f"{words}  2  posts.csv:5, posts.csv:23" in text
    assert "--on-bad drop" in text
    assert ("--multi-label drop" in text) == (words == "several labels")
    assert ("--auxiliary keep" in text) == (words == "unknown label")
    if words == "unknown label":
        assert "'jooy' 2 times, did you mean 'joy'?" in text
    result = prepare(source, str(tmp_path / "out"), on_bad="drop", multi_label="drop", **options)
    assert sum(split.rows for split in result.index.splits.values()) == 20
    assert {key.split(":")[1] for key, _, _ in all_posts(open_store(str(tmp_path / "out")))} == {
        str(i) for i in range(2, 23) if i != 5
    }


def test_what_drops_bad_posts_drops_those_with_several_labels_unless_they_have_a_word_of_their_own(
    tmp_path: Path,
) -> None:
    source = tmp_path / "posts.csv"
    source.write_bytes(b"text,label\n" + GOOD + b'fine,"joy,anger"\n')
    options: dict[str, Any] = {"labels": ("joy", "anger")}
    text = refusal(source, tmp_path / "out", on_bad="drop", multi_label="refuse", **options)
    assert text.endswith(
        "\nMend them; or type --multi-label drop to leave out posts with several labels; or type --targets"
        " several to train on several labels a post."
    )
    assert "type --on-bad drop to leave them out" in refusal(source, tmp_path / "out", **options)
    index = prepare(source, str(tmp_path / "out"), on_bad="drop", **options).index
    assert sum(split.rows for split in index.splits.values()) == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x", "label": ["joy", "anger"]}', "several labels"),
        ('{"text": "x", "label": []}', "no label"),
        ('{"text": "x"}', "no label"),
        ('{"text": null, "label": "joy"}', "no text"),
        ('{"text": 7, "label": "joy"}', "text that is not a string"),
        ('{"text": "x", "label": "joy"', "not a JSON object"),
        ('["x", "joy"]', "not a JSON object"),
        ('{"text": "x", "label": "joy", "split": "holdout"}', "split other than train, validation and test"),
    ],
)
def test_a_bad_json_line_is_refused_by_number_or_dropped(tmp_path: Path, line: str, words: str) -> None:
    good = [json.dumps({"text": f"good {i}", "label": "ab"[i % 2], "split": "train"}) for i in range(20)]
    source = tmp_path / "posts.jsonl"
    source.write_text("\n".join([*good[:3], line, *good[3:]]))
    text = refusal(source, tmp_path / "out")
    assert "1 of 21 posts cannot be used" in text
    assert f"{words}  1  posts.jsonl:4" in text
    result = prepare(source, str(tmp_path / "out"), on_bad="drop", multi_label="drop")
    assert sum(split.rows for split in result.index.splits.values()) == 20


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    source = write_csv(
        tmp_path / "posts.csv", [*some_rows(20), ("", "joy"), ("x", ""), ("y", "sorrow"), *[("", "joy")] * 7]
    )
    text = refusal(source, tmp_path / "out", labels=tuple(LABELS))
    assert "10 of 30 posts cannot be used" in text
    assert "no text        8  posts.csv:22, posts.csv:25, posts.csv:26, posts.csv:27, posts.csv:28, …" in text
    assert "no label       1  posts.csv:23" in text
    assert "unknown label  1  posts.csv:24" in text


def test_characters_that_break_things_are_mended_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"good {i}", "label": "ab"[i % 2]} for i in range(20)]
    rows += [
        {"text": "nul\0 and \x1b[1m", "label": "a"},
        {"text": "half \ud83d here", "label": " a "},
        {"text": "c1 \u0085", "label": "b"},
    ]
    rows += [{"text": "whole 🙂", "label": "a"}, {"text": "two\tlines\n", "label": "a"}]
    source = tmp_path / "posts.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    result = prepare(source, str(tmp_path / "out"))
    found = {text for _, text, _ in all_posts(open_store(str(tmp_path / "out")))}
    assert {"nul  and  [1m", "half \ufffd here", "c1  ", "whole 🙂", "two\tlines\n"} <= found
    assert {
        kind: result.index.source[kind] for kind in ("control_characters", "surrogates", "label_spaces")
    } == {
        "control_characters": 2,
        "surrogates": 1,
        "label_spaces": 1,
    }


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    source = tmp_path / "posts.csv"
    source.write_bytes(b"text,label\n" + GOOD + b'"open,joy\n' + GOOD)
    for options in ({}, {"on_bad": "drop"}):  # the rest of a file is no bad row
        text = refusal(source, tmp_path / "out", **options)
        assert "the quote that opens in row 22 (line 22) is never closed: it takes in 21 lines" in text
        assert "--on-bad" not in text
    source.write_bytes(b"text,label\n" + GOOD + b'"open,joy\n' + b"x" * 63 + b",joy\n" * 2_000_000)
    assert "takes in 2,000,001 lines" in refusal(source, tmp_path / "out")


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def given(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refusal(tmp_path / name, tmp_path / "out")

    assert "no column 'text'; it has 'post', 'label'. Type --text-column" in given(
        "a.csv", b"post,label\nx,joy\n"
    )
    assert "2 columns named 'text'" in given("b.csv", b"text,text,label\nx,y,joy\n")
    assert "no column 'label'" in given("c.jsonl", b'{"text": "x"}\n')
    assert "is empty" in given("d.csv", b"")
    assert "is empty" in given("d.csv", b"\xef\xbb\xbf")
    assert "holds no posts" in given("e.csv", b"text,label\n")
    assert "UTF-16" in given("f.csv", "text,label\nx,joy\n".encode("utf-16"))
    assert "one JSON array" in given("g.jsonl", b'[{"text": "x"}]')
    assert "not a whole Parquet file" in given("h.parquet", b"PAR1")
    assert "no known ending" in given("i.dat", b"x")
    assert "There is no file or folder" in refusal(tmp_path / "none.csv", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "pipe.csv is a pipe or a device" in refusal(tmp_path / "pipe.csv", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no CSV" in refusal(tmp_path / "empty", tmp_path / "out")
    write_csv(tmp_path / "mixed" / "train.csv", some_rows(9))
    write_csv(tmp_path / "mixed" / "labels.csv", some_rows(9))
    assert "labels.csv names no split" in refusal(tmp_path / "mixed", tmp_path / "out")
    write_csv(tmp_path / "only" / "test.csv", some_rows(9))
    assert "posts for test only" in refusal(tmp_path / "only", tmp_path / "out")


def test_a_label_without_training_posts_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "src" / "train.csv", some_rows(40))
    write_csv(tmp_path / "src" / "test.csv", [("x", "pride"), ("y", "pride")])
    text = refusal(tmp_path / "src", tmp_path / "out")
    assert "'pride' has no post to train on (train 0, validation 0, test 2)" in text
    assert "--labels anger,joy,neutral" in text
    single = write_csv(tmp_path / "single.csv", [(f"p{i}", "joy") for i in range(9)])
    assert "joy as its only label" in refusal(single, tmp_path / "out")
    unused = write_csv(tmp_path / "unused.csv", [(f"p{i}", "ab"[i % 2]) for i in range(9)])
    assert "'c' has no post to train on" in refusal(unused, tmp_path / "out", labels=("a", "b", "c"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leave nothing to train on"),
        ({"validation_fraction": 10}, "--validation-fraction is 10; give a share from 0 to below 1"),
        ({"test_fraction": -0.1}, "--test-fraction is -0.1; give a share from 0 to below 1"),
        ({"memory_mb": 1}, "--memory-mb is 1; the smallest allowed is 16"),
        ({"labels": ("a",)}, "at least two"),
        ({"labels": ("a", "b", "a")}, "'a' twice"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    assert words in refusal(write_csv(tmp_path / "posts.csv", some_rows(20)), tmp_path / "out", **options)


# The target


def test_an_existing_data_set_is_recognised_and_never_overwritten(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_csv(tmp_path / "posts.csv", some_rows(200))
    assert main(["prepare", str(source), store.url]) == 0
    before = {info.key: (info, store.read(info.key)) for info in store.list()}
    assert main(["prepare", str(source), store.url, "--memory-mb", "16"]) == 0
    assert "already there" in capsys.readouterr().out
    assert main(["prepare", str(source), store.url, "--seed", "7"]) == 2
    assert "seed 42 there, 7 now" in capsys.readouterr().err
    write_csv(source, [*some_rows(199), ("changed", "joy")])
    assert main(["prepare", str(source), store.url]) == 2
    assert {info.key: (info, store.read(info.key)) for info in store.list()} == before


def test_a_killed_run_is_repeated_over_its_leftovers(tmp_path: Path, bucket_url: str) -> None:
    source = write_csv(tmp_path / "posts.csv", some_rows(3000))
    program = (
        "import os, signal, sys, emotion_train.storage.s3 as s\ncreate = s.S3Store.create\n"
        "s.S3Store.create = lambda store, key, data: os.kill(os.getpid(), signal.SIGKILL)"
        " if key == 'index.json' else create(store, key, data)\n"
        "from emotion_train.preparation.steps import prepare;"
        " prepare(sys.argv[1], sys.argv[2], rows_per_group=512, rows_per_object=512)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program, str(source), bucket_url], check=False).returncode
        == -signal.SIGKILL
    )
    store = open_store(bucket_url)
    leftovers = [info.key for info in store.list()]
    assert leftovers
    assert "index.json" not in leftovers
    with pytest.raises(WrongRequest, match="written last"):
        read_index(store)
    torn, whole = leftovers[0], store.read(leftovers[0])
    store.write(torn, whole[:-1])
    with pytest.raises(WrongRequest, match=f"{torn} is damaged.*delete it and type the same command again"):
        prepare(source, bucket_url, rows_per_group=512, rows_per_object=512)
    store.delete(torn)
    prepare(source, bucket_url, rows_per_group=512, rows_per_object=512)
    assert store.read(torn) == whole
    prepare(source, str(tmp_path / "whole"), rows_per_group=512, rows_per_object=512)
    assert all_posts(store) == all_posts(open_store(str(tmp_path / "whole")))


def test_a_store_that_loses_a_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(store: FolderStore, key: str, data: Any) -> ObjectInfo:
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        return honest(store, key, bytes(raw))

    honest = FolderStore.create
    monkeypatch.setattr(FolderStore, "create", create)
    with pytest.raises(StorageError, match="does not hold what was written"):
        prepare(write_csv(tmp_path / "posts.csv", some_rows(50)), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_source_folder_is_no_target(tmp_path: Path) -> None:
    write_csv(tmp_path / "posts.csv", some_rows(50))
    assert "lies in the source" in refusal(tmp_path, tmp_path / "prepared")


def test_the_summary_ends_with_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_csv(tmp_path / "posts.csv", [*some_rows(100), ("Post 0", "joy"), ("post  0", "joy")])
    assert main(["prepare", str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "102 posts read from posts.csv (csv)\ndropped\n  same text again  1  posts.csv:103\n"
    )
    assert "label    train  validation  test\n" in out
    assert (
        f"next        emotion-launch check --config YOUR_RUN.yaml data.url={tmp_path / 'out'} "
        in out.splitlines()[-1]
    )


def test_sources_that_are_no_posts_are_refused_with_what_they_are(tmp_path: Path) -> None:
    posts = write_csv(tmp_path / "posts.csv", some_rows(40))
    prepare(posts, str(tmp_path / "data"))
    assert "is a data set that `emotion-train prepare` wrote" in refusal(tmp_path / "data", tmp_path / "out")
    for name, words in (
        ("a.xlsx", "save the sheet as CSV"),
        ("a.ods", "a spreadsheet"),
        ("a.zip", "unpack it"),
    ):
        (tmp_path / name).write_bytes(b"PK")
        told = refusal(tmp_path / name, tmp_path / "out")
        assert words in told
        assert "--format" not in told


def test_a_file_url_is_a_source_as_its_path_is(tmp_path: Path) -> None:
    posts = write_csv(tmp_path / "posts.csv", some_rows(40))
    by_path, by_url = (
        prepare(source, str(tmp_path / str(number)))
        for number, source in enumerate((str(posts), posts.as_uri()))
    )
    assert by_path.index.split("train").rows == by_url.index.split("train").rows > 0


@pytest.mark.parametrize(
    ("first", "is_told"),
    [
        (("0", "1467810369", "so tired of this"), True),
        (("0.5", "anger", "x" * 80), True),
        (("what a lovely mess", "joy"), True),
        (("Text of post", "Label given by"), False),
        (("target", "Post ", "a_user"), False),
    ],
)
def test_a_first_line_that_is_a_post_is_taken_for_a_missing_header(
    tmp_path: Path, first: tuple[str, ...], is_told: bool
) -> None:
    path = tmp_path / "posts.csv"
    path.write_text("\n".join(map(",".join, [first] * 5)))
    assert ("put a line with the names of the columns above it" in refusal(path, tmp_path / "out")) == is_told


@pytest.mark.parametrize(
    ("label", "names", "advice"),
    [
        ("sadness", ("joy", "anger"), None),
        ("sadnes", ("joy", "sadness"), "sadness"),
        ("joy", ("JOY", "ANGER"), "JOY"),
        ("FEAR", ("anger", "fear"), "fear"),
    ],
)
def test_a_label_is_led_to_one_that_is_near_whatever_its_case(
    label: str, names: tuple[str, ...], advice: str | None
) -> None:
    told = LabelNames(names, None).advice(label)
    assert told == ("" if advice is None else f", did you mean {advice!r}?")


def test_a_file_of_posts_in_place_of_a_data_set_is_told_apart_from_one(tmp_path: Path) -> None:
    posts = write_csv(tmp_path / "posts.csv", some_rows(9))
    with pytest.raises(WrongRequest, match=r"is a file, and a data set is what `emotion-train prepare .*` w"):
        read_index(open_store(str(posts)))


def test_a_missing_data_set_is_told_with_the_whole_path_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongRequest, match=rf"data set at emotions \({tmp_path}/emotions\): index.json is"):
        read_index(open_store("emotions"))
