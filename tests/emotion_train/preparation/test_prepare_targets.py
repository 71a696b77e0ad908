"""Several labels and shares go in as people have them, and come out as what they mean."""

from __future__ import annotations

import io
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotion_train.cli import main
from emotion_train.data.index import read_index
from emotion_train.data.labels import LabelNames
from emotion_train.data.target_values import form_of
from emotion_train.preparation import work
from emotion_train.preparation.steps import prepare
from emotion_train.preparation.stratify import DRAW, quotas, thresholds
from emotion_train.sources.posts import SEVERAL
from emotion_train.storage.open import open_store
from tests.emotion_train.test_prepare import contents, refusal, write_csv

DATA = Path(os.environ.get("EMOTION_DATA_DIR", "nowhere"))
LABELS = ("anger", "joy", "sad")
SETS = (("joy",), ("anger",), ("anger", "joy"), ("sad",), ("joy", "sad"))
Post = tuple[str, dict[str, float]]


def some_sets(count: int = 60) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"post {i}", SETS[i % len(SETS)]) for i in range(count)]


def posts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """By text: its split, its shares by name and what else its row has."""
    store = open_store(str(folder))
    index = read_index(store)
    found = {}
    for name, split in index.splits.items():
        for described in split.objects:
            table = pq.read_table(io.BytesIO(store.read(described.key, if_match=described.etag)))
            for row in table.to_pylist():
                ids = row.get("labels", [row.get("label")])
                assert all(a < b for a, b in pairwise(ids))
                shares = row.get("shares", [1.0] * len(ids))
                named = {index.labels[i]: share for i, share in zip(ids, shares, strict=True)}
                found[row["text"]] = row | {"split": name, "named": named}
    return found


def sets_of(folder: Path) -> dict[str, tuple[str, ...]]:
    return {text: tuple(sorted(row["named"])) for text, row in posts_of(folder).items()}


SPELLINGS = {
    "comma": ",".join,
    "bar": "|".join,
    "semicolon": "; ".join,
    "python": lambda names: str(list(names)),
    "tuple": lambda names: str(tuple(names)),
    "numpy": lambda names: str(np.array(names)),
    "json": lambda names: json.dumps(list(names)),
    "ids": lambda names: ",".join(str(LABELS.index(name)) for name in names),
    "numpy_ids": lambda names: str(np.array([LABELS.index(name) for name in names])),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_several_labels_in_a_cell_are_read_as_people_spell_them(tmp_path: Path, spelling: str) -> None:
    rows = [(text, SPELLINGS[spelling](names)) for text, names in some_sets()]
    source = write_csv(tmp_path / "posts.csv", rows)
    labels = LABELS if "ids" in spelling else None
    index = prepare(source, str(tmp_path / "out"), targets="several", labels=labels).index
    assert index.requires == ("targets:several",)
    assert index.labels == LABELS
    assert sets_of(tmp_path / "out") == dict(some_sets())
    counts = Counter(name for _, names in some_sets() for name in names)
    totals = [sum(split.label_counts[i] for split in index.splits.values()) for i in range(3)]
    assert totals == [counts[name] for name in LABELS]


def listed(folder: Path) -> Iterator[Path]:
    texts, sets = zip(*some_sets(), strict=True)
    table = pa.table({"text": texts, "label": [list(names) for names in sets]})
    pq.write_table(table, folder / "posts.parquet")
    yield folder / "posts.parquet"
    with pa.OSFile(str(folder / "posts.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    yield folder / "posts.arrow"
    lines = [json.dumps({"text": text, "label": list(names)}) for text, names in some_sets()]
    (folder / "posts.jsonl").write_text("\n".join(lines))
    yield folder / "posts.jsonl"
    ids = pa.table({"text": texts, "label": [[LABELS.index(name) for name in names] for names in sets]})
    described = {"info": {"features": {"label": {"feature": {"names": LABELS, "_type": "ClassLabel"}}}}}
    ids = ids.replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(ids, folder / "ids.parquet")
    yield folder / "ids.parquet"


def test_lists_of_every_format_are_read_and_their_items_are_taken_as_they_are(tmp_path: Path) -> None:
    for number, source in enumerate(listed(tmp_path)):
        out = tmp_path / f"out{number}"
        prepare(source, str(out), targets="several")
        assert sets_of(out) == dict(some_sets())
    strange = [(f"p{i}", [["sad, blue"], ["sad, blue", "joy"]][i % 2]) for i in range(40)]
    pq.write_table(
        pa.table({"text": [t for t, _ in strange], "label": [names for _, names in strange]}),
        tmp_path / "strange.parquet",
    )
    index = prepare(tmp_path / "strange.parquet", str(tmp_path / "strange"), targets="several").index
    assert index.labels == ("joy", "sad, blue")


COLUMNS = ("text", "anger", "joy", "sad")


@pytest.mark.parametrize("spelled", ["anger,joy,sad", "anger..sad", "anger,joy..sad"])
@pytest.mark.parametrize("values", [("0", "1"), ("0.0", "1.0"), ("False", "True")])
def test_one_column_a_label(tmp_path: Path, spelled: str, values: tuple[str, str]) -> None:
    rows = [(text, *(values[name in names] for name in LABELS)) for text, names in some_sets()]
    source = write_csv(tmp_path / "posts.csv", rows, COLUMNS)
    words = ["--targets", "several", "--label-columns", spelled]
    assert main(["prepare", str(source), str(tmp_path / "out"), *words]) == 0
    assert read_index(open_store(str(tmp_path / "out"))).labels == LABELS
    assert sets_of(tmp_path / "out") == dict(some_sets())


def test_one_column_a_label_of_which_each_post_has_one(tmp_path: Path) -> None:
    rows = [(f"p{i}", *(int(i % 3 == at) for at in range(3))) for i in range(30)]
    source = write_csv(tmp_path / "posts.csv", rows, COLUMNS)
    index = prepare(source, str(tmp_path / "out"), label_columns=LABELS).index
    assert (index.targets, index.labels) == ("one", LABELS)
    assert {text: row["named"] for text, row in posts_of(tmp_path / "out").items()} == {
        f"p{i}": {LABELS[i % 3]: 1.0} for i in range(30)
    }
    source = write_csv(tmp_path / "two.csv", [*rows, ("both", 1, 1, 0)], COLUMNS)
    assert "several labels  1  two.csv:32" in (text := refusal(source, tmp_path / "no", label_columns=LABELS))
    assert "--targets several" in text


SHARES = ({"joy": 0.67, "anger": 0.33}, {"joy": 1.0}, {"anger": 1.0}, {"sad": 0.5, "joy": 0.5}, {"sad": 1.0})


def some_shares(count: int = 60) -> list[tuple[str, dict[str, float]]]:
    return [(f"post {i}", SHARES[i % len(SHARES)]) for i in range(count)]


def shared(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    yield write_csv(folder / "json.csv", [(text, json.dumps(shares)) for text, shares in some_shares()]), {}
    yield write_csv(folder / "python.csv", [(text, str(shares)) for text, shares in some_shares()]), {}
    lines = [json.dumps({"text": text, "label": shares}) for text, shares in some_shares()]
    (folder / "posts.jsonl").write_text("\n".join(lines))
    yield folder / "posts.jsonl", {}
    texts, shares = zip(*some_shares(), strict=True)
    structs = pa.array(shares, pa.struct([(name, pa.float64()) for name in LABELS]))
    pq.write_table(pa.table({"text": texts, "label": structs}), folder / "structs.parquet")
    yield folder / "structs.parquet", {}
    maps = pa.array([list(one.items()) for one in shares], pa.map_(pa.string(), pa.float64()))
    pq.write_table(pa.table({"text": texts, "label": maps}), folder / "maps.parquet")
    yield folder / "maps.parquet", {}
    rows = [(text, *(one.get(name, 0) for name in LABELS)) for text, one in some_shares()]
    yield write_csv(folder / "columns.csv", rows, COLUMNS), {"label_columns": ("anger..sad",)}


def test_shares_are_read_as_people_spell_them(tmp_path: Path) -> None:
    for number, (source, options) in enumerate(shared(tmp_path)):
        index = prepare(source, str(tmp_path / f"out{number}"), targets="shares", **options).index
        assert index.requires == ("targets:shares",)
        found = {text: row["named"] for text, row in posts_of(tmp_path / f"out{number}").items()}
        assert found == {text: pytest.approx(shares) for text, shares in some_shares()}, source


def test_votes_are_shares_of_the_raters(tmp_path: Path) -> None:
    rows = [(f"p{i}", *[(2, 1, 0), (0, 3, 0), (0, 1, 2)][i % 3]) for i in range(30)]
    source = write_csv(tmp_path / "columns.csv", rows, COLUMNS)
    prepare(source, str(tmp_path / "a"), targets="shares", label_columns=LABELS)
    lists = [(text, str(["anger"] * a + ["joy"] * b + ["sad"] * c)) for text, a, b, c in rows]
    prepare(write_csv(tmp_path / "lists.csv", lists), str(tmp_path / "b"), targets="shares")
    for folder in ("a", "b"):
        found = posts_of(tmp_path / folder)
        assert found["p0"]["named"] == {"anger": 2 / 3, "joy": 1 / 3}
        assert found["p1"]["named"] == {"joy": 1.0}


def test_a_one_hot_table_of_shares_has_whole_label_counts_and_the_splits_of_one_label(tmp_path: Path) -> None:
    rows = [(f"p{i}", LABELS[i % 7 % 3]) for i in range(70)]
    source = write_csv(tmp_path / "one.csv", rows)
    hot = [(text, json.dumps({label: 1})) for text, label in rows]
    write_csv(tmp_path / "hot" / "one.csv", hot)
    one = prepare(source, str(tmp_path / "a")).index
    shares = prepare(tmp_path / "hot" / "one.csv", str(tmp_path / "b"), targets="shares").index
    for name, split in one.splits.items():
        assert shares.splits[name].label_counts == split.label_counts
        assert all(isinstance(count, float) for count in shares.splits[name].label_counts)
    a, b = (
        {text: (row["split"], row["named"], row["id"]) for text, row in posts_of(tmp_path / name).items()}
        for name in "ab"
    )
    assert a == b


# annotators


def answers(seed: int = 0) -> list[tuple[str, str, str, str]]:
    """Id, text, annotator and labels, in any order; four annotators a post."""
    draw = random.Random(seed)
    rows = [
        (f"id{post}", f"post {post}", f"a{rater}", ",".join(draw.choice(SETS)))
        for post in range(60)
        for rater in range(4)
    ]
    draw.shuffle(rows)
    return rows


@pytest.mark.parametrize("by_id", [True, False])
def test_annotators_become_shares_or_the_labels_that_half_gave(tmp_path: Path, by_id: bool) -> None:
    source = write_csv(tmp_path / "posts.csv", answers(), ("id", "text", "who", "label"))
    options: dict[str, Any] = {"annotations_by": "who", "id_column": "id" if by_id else None}
    said: dict[str, list[list[str]]] = defaultdict(list)
    for _, text, _, labels in answers():
        said[text].append(labels.split(","))
    result = prepare(source, str(tmp_path / "shares"), targets="shares", **options)
    found = posts_of(tmp_path / "shares")
    assert found.keys() == said.keys()
    for text, votes in said.items():
        meant: Counter[str] = Counter()
        for vote in votes:
            for label in vote:
                meant[label] += 1 / len(vote) / 4  # type: ignore[assignment]
        assert found[text]["named"] == pytest.approx(dict(meant))
    assert result.findings.counts["answers"] == 240
    assert result.index.source["rows_read"] == 240
    prepare(source, str(tmp_path / "several"), targets="several", on_bad="drop", **options)
    half = {
        text: tuple(sorted(label for label in LABELS if sum(label in labels for labels in votes) >= 2))
        for text, votes in said.items()
    }
    assert sets_of(tmp_path / "several") == {text: labels for text, labels in half.items() if labels}


def test_an_annotator_has_one_vote(tmp_path: Path) -> None:
    rows = [(f"p{i}", who, "joy" if (i + who) % 2 else "sad") for i in range(30) for who in range(3)]
    source = write_csv(
        tmp_path / "posts.csv", [*rows, ("p0", 0, "joy"), ("p0", 0, "joy")], ("text", "who", "label")
    )
    result = prepare(source, str(tmp_path / "out"), targets="shares", annotations_by="who")
    assert posts_of(tmp_path / "out")["p0"]["named"] == {"joy": 1 / 3, "sad": 2 / 3}
    assert result.findings.counts["answered_again"] == 2


def test_annotator_rows_whose_texts_differ_are_refused(tmp_path: Path) -> None:
    rows = [(f"id{i}", f"p{i}", who, LABELS[i % 2]) for i in range(30) for who in range(2)]
    rows += [("id7", "another text", 9, "joy")]
    source = write_csv(tmp_path / "posts.csv", rows, ("id", "text", "who", "label"))
    options: dict[str, Any] = {"targets": "shares", "annotations_by": "who", "id_column": "id"}
    text = refusal(source, tmp_path / "out", **options)
    assert "annotators of one id with different texts  3  posts.csv:16, posts.csv:17, posts.csv:62" in text
    prepare(source, str(tmp_path / "out"), on_bad="drop", **options)
    assert posts_of(tmp_path / "out").keys() == {f"p{i}" for i in range(30) if i != 7}


# bad input


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ('{"joy": 0.6, "sad": 0.3}', "shares that do not add up to 1  1  posts.csv:62"),
        ('{"joy": 1.5, "sad": -0.5}', "share that is negative or no number  1  posts.csv:62"),
        ('{"joy": "much", "sad": 0.5}', "share that is negative or no number  1"),
        ('{"joy": NaN}', "share that is negative or no number  1"),
        ('{"joy": 0.5, "joy": 0.5}', "share that is negative or no number  1"),
        ('{"joy": 1e308, "sad": 1e308}', "share that is negative or no number  1"),
        ('{"joy": 0.5', "share that is negative or no number  1"),
        ('{"joy": 0, "sad": 0}', "no label  1"),
        ("{}", "no label  1"),
        ("", "no label  1"),
    ],
)
def test_shares_that_are_none_are_refused(tmp_path: Path, shares: str, words: str) -> None:
    rows = [(text, json.dumps(one)) for text, one in some_shares()]
    source = write_csv(tmp_path / "posts.csv", [*rows, ("bad", shares)])
    assert words in refusal(source, tmp_path / "out", targets="shares")
    prepare(source, str(tmp_path / "out"), targets="shares", on_bad="drop")
    assert posts_of(tmp_path / "out").keys() == dict(some_shares()).keys()


@pytest.mark.parametrize("kind", ["several", "shares"])
@pytest.mark.parametrize("value", ["2.5", "-1", "yes", "", "nan"])
def test_a_label_column_that_is_no_number_of_its_kind_is_refused(
    tmp_path: Path, value: str, kind: str
) -> None:
    rows: list[Any] = [(text, *(int(name in names) for name in LABELS)) for text, names in some_sets()]
    source = write_csv(tmp_path / "posts.csv", [*rows, ("bad", 1, value, 0)], COLUMNS)
    words = "no number" if value != "2.5" else "do not add up to 1"
    words = "neither 0 nor 1" if kind == "several" else words
    text = refusal(source, tmp_path / "out", targets=kind, label_columns=LABELS)
    assert f"{words}  1  posts.csv:62" in text


@pytest.mark.parametrize("kind", ["several", "shares"])
def test_labels_that_are_hidden_are_refused_by_what_they_are(tmp_path: Path, kind: str) -> None:
    """SemEval-2018's test file says NONE in place of 0 and 1."""
    rows: list[Any] = [(text, *(int(name in names) for name in LABELS)) for text, names in some_sets()]
    hidden = [(f"hidden {i}", "NONE", "NONE", "NONE") for i in range(9)]
    write_csv(tmp_path / "in" / "train.csv", rows, COLUMNS)
    write_csv(tmp_path / "in" / "test.csv", hidden, COLUMNS)
    options: dict[str, Any] = {"targets": kind, "label_columns": LABELS}
    text = refusal(tmp_path / "in", tmp_path / "out", **options)
    assert "label columns that say NONE, so that the labels are hidden  9  test.csv:2" in text
    assert "type --on-bad drop to leave them out" in text
    assert "give the file that has the labels of these posts" in text
    assert "neither 0 nor 1" not in text
    alone = refusal(write_csv(tmp_path / "alone.csv", hidden, COLUMNS), tmp_path / "out", **options)
    assert "All fail in one way: the labels of this file are hidden; or give the file" in alone


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("joy,rage", "unknown label  1  posts.csv:62"),
        ("['joy', 'rage']", "unknown label  1  posts.csv:62"),
        ("3,10", "unknown label  1"),
        ("['joy', '']", "list of labels with an empty one  1"),
        ("['joy', None]", "list of labels with an empty one  1"),
        ("[nan]", "list of labels with an empty one  1"),
        ("[0 0 1]", "list with a label twice  1"),
        ('{"joy": 1}', "label that is an object  1"),
        ("", "no label  1"),
        ("[]", "no label  1"),
    ],
)
def test_a_list_with_something_else_in_it_is_refused(tmp_path: Path, cell: str, words: str) -> None:
    source = write_csv(tmp_path / "posts.csv", [*((t, ",".join(s)) for t, s in some_sets()), ("bad", cell)])
    text = refusal(source, tmp_path / "out", targets="several", labels=LABELS)
    assert words in text
    if "rage" in cell:
        assert "'rage' 1 time" in text


@pytest.mark.parametrize("weight", ["0", "nan", "much", "-1", "inf", "", "true", "1_0"])
def test_a_weight_that_is_no_number_above_0_is_refused(tmp_path: Path, weight: str) -> None:
    rows: list[Any] = [(f"p{i}", LABELS[i % 3], 0.5 + i) for i in range(30)]
    source = write_csv(tmp_path / "posts.csv", [*rows, ("bad", "joy", weight)], ("text", "label", "w"))
    assert "weight that is no number above 0  1  posts.csv:32" in refusal(
        source, tmp_path / "no", weight_column="w"
    )
    index = prepare(source, str(tmp_path / "out"), weight_column="w", on_bad="drop").index
    assert index.requires == ("weight",)
    assert {text: row["weight"] for text, row in posts_of(tmp_path / "out").items()} == {
        f"p{i}": 0.5 + i for i in range(30)
    }


@pytest.mark.parametrize("other", ["plain", "object"])
def test_lists_in_one_split_and_something_else_in_another_are_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / "source").mkdir()
    for name, form in (("train", "list"), ("validation", other)):
        rows = [(f"{name} {i}", ["joy", "sad"][i % 2]) for i in range(20)]
        lines = [
            json.dumps({"text": text, "label": {"list": [one], "plain": one, "object": {one: 1}}[form]})
            for text, one in rows
        ]
        (tmp_path / "source" / f"{name}.jsonl").write_text("\n".join(lines))
    text = refusal(tmp_path / "source", tmp_path / "out", targets="shares")
    assert "lists of labels in train" in text
    assert "in one form" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "many"}, "type one of one, several, shares"),
        ({"allow_none": True}, "--targets several"),
        ({"annotations_by": "who"}, "--targets shares"),
        ({"label_columns": ("a", "b"), "labels": ("a", "b")}, "leave --labels and --labels-file out"),
        ({"targets": "several", "multi_label": "drop"}, "--multi-label is for one label"),
        ({"targets": "shares", "on_conflict": "union"}, "first, mean, drop, refuse with --targets shares"),
        ({"label_columns": ("joy", "rage")}, "has no column 'rage'"),
        ({"label_columns": ("sad..anger",)}, "type anger..sad"),
        ({"label_columns": ("text..sad",)}, "'text' of"),
        ({"weight_column": "w"}, "Type --weight-column with one of these"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    source = write_csv(tmp_path / "posts.csv", [("p", 1, 0, 0, "joy")], (*COLUMNS, "label"))
    assert words in refusal(source, tmp_path / "out", **options)


# none of the labels, the same text again


def test_a_post_without_a_label_is_legal_where_it_is_allowed(tmp_path: Path) -> None:
    rows = [
        *((text, ",".join(names)) for text, names in some_sets()),
        *((f"none {i}", "") for i in range(20)),
    ]
    source = write_csv(tmp_path / "posts.csv", rows)
    text = refusal(source, tmp_path / "out", targets="several")
    assert "no label  20" in text
    assert "--allow-none" in text
    index = prepare(source, str(tmp_path / "out"), targets="several", allow_none=True).index
    assert sets_of(tmp_path / "out") == dict(some_sets()) | {f"none {i}": () for i in range(20)}
    assert index.source["without_label"] == 20
    none = Counter(row["split"] for row in posts_of(tmp_path / "out").values() if not row["named"])
    assert none == {"train": 16, "validation": 2, "test": 2}


AGAIN = ("anger,joy", "joy", "joy,sad", "joy")


@pytest.mark.parametrize(
    ("policy", "meant"),
    [
        (None, ("joy",)),
        ("majority", ("joy",)),
        ("union", ("anger", "joy", "sad")),
        ("first", ("anger", "joy")),
        ("drop", None),
    ],
)
def test_the_same_text_with_other_labels(tmp_path: Path, policy: Any, meant: Any) -> None:
    rows = [*((text, ",".join(names)) for text, names in some_sets()), *(("again", cell) for cell in AGAIN)]
    source = write_csv(tmp_path / "posts.csv", rows)
    result = prepare(source, str(tmp_path / "out"), targets="several", on_conflict=policy)
    assert sets_of(tmp_path / "out").get("again") == meant
    assert result.findings.counts["conflicting_texts"] == 1
    left_out = result.findings.counts["conflicting"] + result.findings.counts["repeated"]
    assert left_out == (4 if meant is None else 3)
    winner = "" if meant is None else ": " + " + ".join(meant)
    assert str(result.findings.conflicts[0]) == f"'again' anger + joy 1, joy 2, joy + sad 1{winner}"
    assert "same text with another label" in refusal(
        source, tmp_path / "no", targets="several", on_conflict="refuse"
    )


def test_the_same_text_with_other_shares_gets_their_mean(tmp_path: Path) -> None:
    again = [{"joy": 1.0}, {"joy": 0.5, "sad": 0.5}, {"anger": 1.0}]
    rows = [(text, json.dumps(one)) for text, one in [*some_shares(), *(("again", one) for one in again)]]
    prepare(write_csv(tmp_path / "posts.csv", rows), str(tmp_path / "out"), targets="shares")
    assert posts_of(tmp_path / "out")["again"]["named"] == pytest.approx(
        {"anger": 1 / 3, "joy": 0.5, "sad": 1 / 6}
    )


# the same bytes, and the labels' shares of the splits


@pytest.mark.parametrize("kind", ["several", "shares"])
def test_little_memory_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = [(text, who, labels) for _, text, who, labels in answers()] + [
        ("post 3 ", "b", "joy"),
        ("extra", "a", "sad"),
    ]
    source = write_csv(tmp_path / "posts.csv", rows, ("text", "who", "label"))
    for name, options in (("joined", {"annotations_by": "who"}), ("plain", {})):
        results = []
        for partitions in (1, 16):
            monkeypatch.setattr(work, "partitions_for", lambda *_, partitions=partitions: partitions)
            out = tmp_path / f"{name}{partitions}"
            prepare(source, str(out), targets=kind, on_bad="drop", **options)
            results.append(contents(out))
        assert results[0] == results[1]


def test_thresholds_take_so_many_of_each_set_as_are_wanted_and_also_all(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    record = np.empty(3000, DRAW)
    record["label"], record["draw"] = draw.integers(0, 900, 3000), draw.integers(0, 2**63, 3000)
    record.tofile(tmp_path / "draws")
    counts = np.bincount(record["label"], minlength=900)
    test = draw.integers(0, counts + 1)
    numbers = list(zip((counts - test).tolist(), test.tolist(), strict=True))
    found = thresholds(tmp_path / "draws", 900, 0.1, 0.1, numbers)
    here = record["draw"] < found.test_C[record["label"]]
    assert np.bincount(record["label"][here], minlength=900).tolist() == test.tolist()
    assert (record["draw"] < found.validation_C[record["label"]]).all()


def test_a_thousand_labels_in_columns_go_through(tmp_path: Path) -> None:
    names = [f"l{i:03}" for i in range(1000)]
    rows = 3000
    columns = {name: np.zeros(rows, np.int8) for name in names}
    for row in range(rows):
        columns[names[row % 1000]][row] = columns[names[row * 7 % 1000]][row] = 1
    table = pa.table({"text": [f"p{i}" for i in range(rows)], **columns})
    pq.write_table(table, tmp_path / "posts.parquet")
    options: dict[str, Any] = {"targets": "several", "label_columns": ("l000..l999",)}
    index = prepare(tmp_path / "posts.parquet", str(tmp_path / "out"), **options).index
    assert index.labels == tuple(names)
    assert sum(sum(split.label_counts) for split in index.splits.values()) == sum(
        int(column.sum()) for column in columns.values()
    )


@pytest.mark.parametrize(
    ("cell", "form", "items"),
    [
        (f"{SEVERAL}a,b", "list", ["a,b"]),
        (f"{SEVERAL}a{SEVERAL}b", "list", ["a", "b"]),
        ("""["it's", 'b']""", "list", ["it's", "b"]),
        ("['a'\n 'b']", "list", ["a", "b"]),
        ("[3. 10.]", "list", ["3.", "10."]),
        ("a,,b;", "plain", ["a", "b"]),
        ("(a)", "plain", ["(a)"]),
        ("", "", []),
    ],
)
def test_what_a_cell_is_taken_apart_into(cell: str, form: str, items: list[str]) -> None:
    found = form_of(cell, LabelNames(None, None))
    assert (found.name, [name for name, _ in found.pairs]) == (form, items)


@pytest.mark.parametrize(("end", "mark"), [("tsv", "\t"), ("csv", ";")])
def test_a_table_without_a_header_is_read_by_the_names_that_are_given(
    tmp_path: Path, end: str, mark: str
) -> None:
    lines = [mark.join((text, ",".join(names), "rater")) for text, names in some_sets()]
    source = tmp_path / f"posts.{end}"
    source.write_text("\n".join(lines))
    words = ["--targets", "several", "--header", "text,label,rater"]
    assert main(["prepare", str(source), str(tmp_path / "out"), *words]) == 0
    assert sets_of(tmp_path / "out") == dict(some_sets())
    assert posts_of(tmp_path / "out")["post 0"]["id"] == f"posts.{end}:1"
    assert "first line of" in refusal(source, tmp_path / "no", header=("text", "label"))


@pytest.mark.skipif(not (DATA / "goemotions").is_dir(), reason="EMOTION_DATA_DIR has no goemotions")
def test_goemotions_with_28_labels_is_counted_as_pandas_counts_it(tmp_path: Path) -> None:
    import pandas as pd

    names = (DATA / "goemotions" / "emotions.txt").read_text().split()
    frame = pd.read_parquet(DATA / "goemotions" / "dev.parquet")
    ids = frame["labels"].map(lambda cell: ",".join(str(names.index(name)) for name in cell.split(",")))
    lines = [f"{text}\t{cell}\trater" for text, cell in zip(frame["text"], ids, strict=True)]
    source = tmp_path / "dev.tsv"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = prepare(
        source,
        str(tmp_path / "out"),
        targets="several",
        labels=tuple(names),
        header=("text", "label", "rater"),
        on_conflict="first",
    )
    index = result.index
    kept = frame.drop_duplicates("text")
    hot = kept["labels"].str.get_dummies(",")
    rows = sum(split.rows for split in index.splits.values())
    assert 0 <= len(kept) - rows < 20  # texts that differ in case and space only
    for place, name in enumerate(index.labels):
        count = sum(split.label_counts[place] for split in index.splits.values())
        assert 0 <= hot[name].sum() - count < 20
        for split in ("validation", "test"):
            wanted = quotas(int(count), 0.1, 0.1)[split == "test"]
            assert abs(index.splits[split].label_counts[place] - wanted) <= 1
