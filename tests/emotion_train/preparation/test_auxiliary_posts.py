"""Auxiliary posts: which ones are kept, what they are labelled with, and that they change nothing
else.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from emotion_train.cli import main
from emotion_train.data.index import Index, limited, read_index
from emotion_train.data.reader import RowGroupReader
from emotion_train.errors import WrongRequest
from emotion_train.preparation import work
from emotion_train.preparation.derived import read_split
from emotion_train.preparation.existing import existing_index
from emotion_train.preparation.folds import write_fold, write_soft
from emotion_train.preparation.steps import prepare
from emotion_train.storage.document import digest_of
from emotion_train.storage.open import open_store
from tests.emotion_train.test_prepare import contents, refusal, write_csv
from tests.helpers.auxiliary_posts import ELSEWHERE, OTHERS, prepare_auxiliary
from tests.helpers.tiny_runs import SIZES

MAIN = ("calm", "joy")
ROWS = [
    *((f"calm {number}", "calm") for number in range(8)),
    *((f"joy {number}", "joy") for number in range(8)),
]
HELD_OUT = [("a calm one", "calm"), ("a joyful one", "joy")]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The auxiliary posts by text: their shares by name, and the labels that their source knows."""
    store = open_store(str(folder))
    index = read_index(store)
    assert index.auxiliary is not None
    names = index.trained_labels
    found = {}
    for described in index.auxiliary.split.objects:
        for row in pq.read_table(io.BytesIO(store.read(described.key))).to_pylist():
            shares = row.get("shares") or [1.0] * len(row["labels"])
            row["named"] = {names[label]: share for label, share in zip(row["labels"], shares, strict=True)}
            row["knows"] = {names[label] for label in index.auxiliary.sources[row["known"]].labels}
            found[row["text"]] = row
    return found


def write_source(folder: Path, *more: tuple[str, str]) -> str:
    folder.mkdir()
    write_csv(folder / "train.csv", [*ROWS, *more])
    write_csv(folder / "validation.csv", HELD_OUT)
    return str(folder)


def keep(source: str, out: Path, **options: Any) -> Index:
    return prepare(source, str(out), labels=MAIN, auxiliary="keep", **options).index


def test_training_posts_of_other_labels_and_with_several_become_shares_over_all_labels(
    tmp_path: Path,
) -> None:
    source = write_source(
        tmp_path / "posts",
        ("thank you", "gratitude"),
        ("so glad", "joy,gratitude"),
        ("calm and glad", "['calm', 'joy']"),
        ("all of it", "calm|joy|pride|gratitude"),
    )
    index = keep(source, tmp_path / "out")
    assert index.labels == MAIN
    assert index.trained_labels == (*MAIN, "gratitude", "pride")
    assert index.requires == ("auxiliary",)
    every = {*MAIN, "gratitude", "pride"}
    rows = rows_of(tmp_path / "out")
    assert {text: row["named"] for text, row in rows.items()} == {
        "thank you": {"gratitude": 1.0},
        "so glad": {"gratitude": 0.5, "joy": 0.5},
        "calm and glad": {"calm": 0.5, "joy": 0.5},
        "all of it": {"calm": 0.25, "joy": 0.25, "gratitude": 0.25, "pride": 0.25},
    }
    assert all(row["knows"] == every for row in rows.values())
    assert index.training.label_counts == (8.75, 9.25, 1.75, 0.25)
    assert index.training.rows == 20


def test_all_other_posts_are_those_of_a_data_set_without_them_to_the_byte(tmp_path: Path) -> None:
    kept = prepare_auxiliary(tmp_path, "kept")
    dropped = prepare_auxiliary(tmp_path, "dropped", auxiliary="drop", auxiliary_sources=(), on_bad="drop")
    assert dropped.auxiliary is None
    assert kept.splits == dropped.splits
    of_kept = {name: raw for name, raw in contents(tmp_path / "kept").items() if "auxiliary" not in name}
    of_dropped = contents(tmp_path / "dropped")
    del of_kept["index.json"], of_dropped["index.json"]
    assert of_kept == of_dropped


def test_posts_of_another_source_know_its_labels_alone(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path)
    rows = rows_of(tmp_path / "data")
    elsewhere = [row for row in rows.values() if "elsewhere" in row["text"]]
    assert len(elsewhere) == 24
    assert all(row["knows"] == set(ELSEWHERE) for row in elsewhere)
    others = [row for row in rows.values() if "elsewhere" not in row["text"]]
    assert all(row["knows"] == {*SIZES, *OTHERS} for row in others)
    known_SC = index.known_labels
    assert known_SC is not None
    assert known_SC.tolist() == [[True] * 6 + [False], [True] + [False] * 5 + [True]]
    assert index.splits["train"].label_counts == tuple(SIZES.values())


def test_a_source_alone_adds_its_posts_and_the_first_one_drops_its_others(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path, auxiliary="drop", on_bad="drop")
    assert index.auxiliary is not None
    assert index.auxiliary.split.rows == 24
    assert index.auxiliary.labels == ("spite",)


def test_a_text_that_stands_elsewhere_is_no_auxiliary_post_and_of_its_own_rows_the_mean_stays(
    tmp_path: Path,
) -> None:
    source = write_source(
        tmp_path / "posts",
        ("A CALM  one", "gratitude"),  # in validation
        ("Joy 3", "pride"),  # in train
        ("twice", "gratitude"),
        ("Twice", "pride,joy"),
        ("twice", "gratitude"),
    )
    more = write_csv(
        tmp_path / "more.csv", [("TWICE", "glum"), ("joy 1", "glum"), ("new", "glum"), ("odd", "wry")]
    )
    out = tmp_path / "out"
    index = keep(source, out, auxiliary_sources=(str(more),))
    rows = rows_of(out)
    assert {text: row["named"] for text, row in rows.items()} == {
        "twice": {
            "gratitude": pytest.approx(2 / 3),
            "joy": pytest.approx(1 / 6),
            "pride": pytest.approx(1 / 6),
        },
        "new": {"glum": 1.0},
        "odd": {"wry": 1.0},
    }
    assert index.source["auxiliary"] == 3
    assert index.source["auxiliary_repeated"] == 6


def test_without_splits_all_auxiliary_posts_go_to_training(tmp_path: Path) -> None:
    rows = [*ROWS, *((f"thanks {number}", "gratitude") for number in range(9))]
    index = keep(str(write_csv(tmp_path / "posts.csv", rows)), tmp_path / "out")
    assert index.auxiliary is not None
    assert index.auxiliary.split.rows == 9
    assert sum(split.rows for split in index.splits.values()) == len(ROWS)


def test_held_out_posts_of_other_labels_stand_under_the_usual_rules(tmp_path: Path) -> None:
    source = write_source(tmp_path / "posts", ("thank you", "gratitude"))
    write_csv(
        tmp_path / "posts" / "validation.csv", [*HELD_OUT, ("thanks", "gratitude"), ("both", "joy,calm")]
    )
    words = refusal(source, tmp_path / "out", labels=MAIN, auxiliary="keep")
    assert "validation.csv:4" in words
    assert "validation.csv:5" in words
    assert "train.csv" not in words
    index = keep(source, tmp_path / "out", on_bad="drop")
    assert index.auxiliary is not None
    assert (index.auxiliary.split.rows, index.splits["validation"].rows) == (1, 2)


def test_what_means_no_label_is_none_of_the_auxiliary_ones(tmp_path: Path) -> None:
    source = write_source(
        tmp_path / "posts", ("one", "n/a"), ("two", "-1"), ("three", "joy,NaN"), ("four", "awe")
    )
    words = refusal(source, tmp_path / "out", labels=MAIN, auxiliary="keep")
    assert "train.csv:18, train.csv:19, train.csv:20" in words
    index = keep(source, tmp_path / "out", on_bad="drop")
    assert index.trained_labels == (*MAIN, "awe")


def test_of_several_labels_and_of_shares_posts_with_other_ones_are_auxiliary(tmp_path: Path) -> None:
    several = write_source(
        tmp_path / "several", ("both", "calm,joy"), ("more", "joy,pride"), ("proud", "pride")
    )
    index = keep(several, tmp_path / "of-several", targets="several")
    assert {text: row["named"] for text, row in rows_of(tmp_path / "of-several").items()} == {
        "more": {"joy": 1.0, "pride": 1.0},
        "proud": {"pride": 1.0},
    }
    assert (index.trained_targets, index.splits["train"].rows) == ("several", 17)
    shares = write_source(tmp_path / "shares", ("more", '{"joy": 0.75, "pride": 0.25}'))
    index = keep(shares, tmp_path / "of-shares", targets="shares")
    assert rows_of(tmp_path / "of-shares")["more"]["named"] == {"joy": 0.75, "pride": 0.25}
    assert index.requires == ("targets:shares", "auxiliary")


def test_numbers_of_another_source_are_names_of_its_own(tmp_path: Path) -> None:
    source = write_source(tmp_path / "posts")
    more = [
        str(write_csv(tmp_path / f"{name}.csv", [(f"{name} a", "0"), (f"{name} b", "1")])) for name in "pq"
    ]
    index = keep(source, tmp_path / "out", auxiliary_sources=tuple(more))
    assert index.trained_labels == (*MAIN, "p.csv 0", "p.csv 1", "q.csv 0", "q.csv 1")
    known_SC = index.known_labels
    assert known_SC is not None
    assert known_SC.sum(axis=1).tolist() == [2, 2, 2]


def test_weights_come_along_and_posts_of_other_sources_weigh_one(tmp_path: Path) -> None:
    rows = [(*row, "2") for row in (*ROWS, ("thanks", "gratitude"))]
    source = write_csv(tmp_path / "posts.csv", rows, header=("text", "label", "w"))
    more = write_csv(tmp_path / "more.csv", [("a", "wry"), ("b", "glum")])
    keep(str(source), tmp_path / "out", weight_column="w", auxiliary_sources=(str(more),))
    assert {text: row["weight"] for text, row in rows_of(tmp_path / "out").items()} == {
        "thanks": 2.0,
        "a": 1.0,
        "b": 1.0,
    }


def test_memory_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "partitions_for", lambda total, memory: 8)
    prepare_auxiliary(tmp_path, "many")
    monkeypatch.setattr(work, "partitions_for", lambda total, memory: 1)
    prepare_auxiliary(tmp_path, "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_object_that_is_lost_is_written_again_and_another_data_set_is_refused(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path)
    assert index.auxiliary is not None
    lost = tmp_path / "data" / index.auxiliary.split.objects[0].key
    raw = lost.read_bytes()
    lost.unlink()
    prepare_auxiliary(tmp_path)
    assert lost.read_bytes() == raw
    with pytest.raises(WrongRequest, match="another prepared data set"):
        prepare_auxiliary(tmp_path, auxiliary="drop", on_bad="drop")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"auxiliary": "keep"}, "type --labels with the"),
        ({"auxiliary_sources": ("more.csv",)}, "--auxiliary-source is for posts"),
        ({"auxiliary": "often", "labels": MAIN}, "type drop or keep"),
        (
            {"auxiliary": "keep", "labels": MAIN, "targets": "shares", "annotations_by": "who"},
            "leave one of them out",
        ),
    ],
)
def test_wrong_options_end_in_a_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    assert words in refusal(write_source(tmp_path / "posts"), tmp_path / "out", **options)


def test_a_source_of_one_label_is_refused(tmp_path: Path) -> None:
    more = write_csv(tmp_path / "more.csv", [("a", "wry"), ("b", "wry")])
    words = refusal(
        write_source(tmp_path / "posts"), tmp_path / "out", labels=MAIN, auxiliary_sources=(str(more),)
    )
    assert "more.csv adds posts of fewer than two labels" in words


def test_the_command_tells_what_is_trained_on_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "posts", ("thank you", "gratitude"), ("so", "joy,gratitude"))
    words = ["--labels", ",".join(MAIN), "--auxiliary", "keep"]
    assert main(["prepare", source, str(tmp_path / "out"), *words]) == 0
    said = capsys.readouterr().out
    assert "2 more posts are trained on and never scored; labels of training alone: gratitude 1.5" in said


def test_an_index_of_some_posts_keeps_as_many_auxiliary_ones(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path)
    some = limited(index, 10)
    assert some.auxiliary is not None
    assert (some.split("train").rows, some.auxiliary.split.rows, some.training.rows) == (10, 10, 20)
    assert some.sha256() == index.sha256()


def test_an_index_that_lies_about_auxiliary_posts_is_refused(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path)
    path = tmp_path / "data" / "index.json"

    def refused(change: Any) -> str:
        document = json.loads(index.to_bytes())
        change(document)
        document["digest"] = digest_of(document)
        path.write_text(json.dumps(document))
        with pytest.raises(WrongRequest) as caught:
            read_index(open_store(str(tmp_path / "data")))
        return str(caught.value)

    assert "listed but not required" in refused(lambda one: one.update(requires=[]))
    assert "knows a label" in refused(lambda one: one["auxiliary"]["sources"][1].update(labels=[0, 9]))
    assert "does not know all" in refused(lambda one: one["auxiliary"]["sources"][0].update(labels=[1, 2, 3]))
    assert "twice" in refused(lambda one: one["auxiliary"].update(labels=["calm", "hope", "spite"]))
    path.write_bytes(index.to_bytes())
    assert existing_index(open_store(str(tmp_path / "data"))) == index


def test_folds_and_what_teachers_say_are_trained_on_beside_the_auxiliary_posts(tmp_path: Path) -> None:
    more = [(f"sad {number}", "sad") for number in range(3)]
    index = keep(write_source(tmp_path / "source", *more), tmp_path / "data")
    store = open_store(str(tmp_path / "data"))
    rows = read_split(store, index, "train")
    fold = open_store(str(tmp_path / "fold"))
    soft = open_store(str(tmp_path / "soft"))
    half = {post_id: np.array([0.5, 0.5]) for post_id in rows.ids}
    for made, place in (
        (write_fold(store, index, rows, 0, 2, fold, "--folds"), fold),
        (write_soft(store, index, rows, half, 0.3, {}, soft, "--own"), soft),
    ):
        assert made.trained_labels == index.trained_labels == ("calm", "joy", "sad")
        assert made.trained_targets == "shares"
        with RowGroupReader(place, made.training) as reader:
            groups = [reader.rows(group) for group in range(len(made.training.row_groups))]
        texts = [text for group in groups for text in group.texts]
        assert {text for text, _ in more} <= set(texts)
        assert len(texts) == made.split("train").rows + len(more) > len(more)


def test_derived_data_sets_that_differ_in_auxiliary_posts_or_labels_alone_are_not_the_same(
    tmp_path: Path,
) -> None:
    made = {}
    for name, others in (("few", 3), ("more", 4)):
        more = [(f"sad {number}", "sad") for number in range(others)]
        made[name] = keep(write_source(tmp_path / f"{name}-source", *more), tmp_path / name)
    few, more_of_them = (open_store(str(tmp_path / name)) for name in made)
    assert made["few"].splits == made["more"].splits
    rows = read_split(few, made["few"], "train")
    half = {post_id: np.array([0.5, 0.5]) for post_id in rows.ids}
    fold, soft = (open_store(str(tmp_path / name)) for name in ("fold", "soft"))
    first = write_fold(few, made["few"], rows, 0, 2, fold, "--to")
    write_soft(few, made["few"], rows, half, 0.3, {}, soft, "--to")
    assert write_fold(few, made["few"], rows, 0, 2, fold, "--to") == first
    with pytest.raises(WrongRequest, match="holds another data set, which is never overwritten"):
        write_fold(more_of_them, made["more"], rows, 0, 2, fold, "--to")
    with pytest.raises(WrongRequest, match="give another --own"):
        write_soft(more_of_them, made["more"], rows, half, 0.3, {}, soft, "--own")
    renamed = made["few"].model_copy(update={"labels": ("quiet", "joy")})
    with pytest.raises(WrongRequest, match="holds another data set"):
        write_fold(few, renamed, rows, 0, 2, fold, "--to")


def test_a_comparison_tells_auxiliary_posts_that_differ(tmp_path: Path) -> None:
    from launch.results.differences import _data_cells
    from launch.results.same_posts import OpenData

    data = []
    for name, others in (("none", 0), ("few", 3), ("more", 4)):
        more = [(f"sad {number}", "sad") for number in range(others)]
        index = keep(write_source(tmp_path / f"{name}-source", *more), tmp_path / name)
        data.append(OpenData(open_store(str(tmp_path / name)), index))
    cells = _data_cells([SimpleNamespace(data_url="data")] * 3, data)  # type: ignore[list-item]
    assert len({one["training split"] for one in cells}) == 1
    told = [one["auxiliary posts"] for one in cells]
    assert told[0] == "–"
    assert [words.split(",")[0] for words in told[1:]] == ["3 posts", "4 posts"]
