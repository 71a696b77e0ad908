"""Synthetic posts are made of training posts alone, marked, weighted and without doubles, and
change nothing of the held-out splits nor of the class weights.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")

from emotion_train import cli
from emotion_train.data.cleaning import normalised
from emotion_train.data.index import Index, limited, read_index
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.floors import posts
from emotion_train.hosted.prompts import TrainingPosts
from emotion_train.hosted.similar import Shingles, first_of_near, nearest
from emotion_train.hosted.synthetic import folds, plan, posts_in, wishes
from emotion_train.model.loss import class_weights
from emotion_train.preparation.steps import prepare
from emotion_train.storage.folder import FolderStore
from tests.helpers.fake_llm import KEY, USD_IN, USD_OUT, FakeLLM
from tests.helpers.other_targets import relabel
from tests.helpers.tiny_runs import write_posts

LABELS = ("awe", "calm", "glee", "rage")  # 6, 60, 30, 12 training posts
NEW = [
    "river",
    "cloud",
    "wind",
    "stone",
    "lamp",
    "door",
    "field",
    "paper",
    "hill",
    "boat",
    "glass",
    "road",
    "iron",
    "moss",
    "salt",
    "wool",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("augment")
    prepare(str(write_posts(folder / "source")), str(folder / "data"), rows_per_group=16)
    return folder


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def writes(prompt: str) -> str:
    """Five new posts, none like another."""
    draw = random.Random(prompt)
    return json.dumps({"posts": [" ".join(draw.choices(NEW, k=9)) + f" {draw.random()}" for _ in range(5)]})


def words(home: Path, new: Path, fake: FakeLLM, *more: str) -> list[str]:
    prices = ["--price-in", str(USD_IN), "--price-out", str(USD_OUT), "--max-usd", "1", "--yes"]
    return ["augment", str(home / "data"), str(new), "--llm", fake.word, *prices, *more]


def rows_of(store: FolderStore, split: str = "train") -> list[tuple[Any, ...]]:
    index = read_index(store)
    with RowGroupReader(store, index.split(split)) as reader:
        return [
            row
            for group in range(len(index.split(split).row_groups))
            for row in zip(*reader.rows(group), strict=True)
        ]


def sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for split in ("validation", "test")
        for path in sorted((folder / split).rglob("*.parquet"))
    }


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set with synthetic posts."""
    new = tmp_path_factory.mktemp("made") / "new"
    with pytest.MonkeyPatch.context() as patch, FakeLLM(says=writes) as fake:
        patch.setenv("OPENAI_API_KEY", KEY)
        assert cli.main(words(home, new, fake)) == 0
    return new


def test_rare_labels_are_filled_up_to_the_median_and_three_times_at_most(home: Path, made: Path) -> None:
    old, new = read_index(FolderStore(home / "data")), read_index(FolderStore(made))
    assert old.split("train").label_counts == (6, 60, 30, 12)
    assert new.split("train").label_counts == (18, 60, 30, 21)  # the median is 21
    assert new.split("train").real_label_counts == (6, 60, 30, 12)
    assert new.requires == ("weight", "source")
    assert new.source["augmented_from"] == old.sha256()


def test_validation_and_test_are_the_same_bytes(home: Path, made: Path) -> None:
    assert sums(home / "data") == sums(made)
    old, new = read_index(FolderStore(home / "data")), read_index(FolderStore(made))
    for name in ("validation", "test"):
        assert old.split(name) == new.split(name)


def test_real_posts_stay_in_their_order_and_added_ones_are_marked_weighted_and_mixed_in(
    home: Path, made: Path
) -> None:
    old, new = rows_of(FolderStore(home / "data")), rows_of(FolderStore(made))
    assert [row for row in new if not row[4]] == [(*row[:4], "", (), 0) for row in old]
    added = [row for row in new if row[4]]
    assert {row[3] for row in added} == {0.5}
    assert len({row[0] for row in new}) == len(new)
    for row in added:
        key, _, place = row[4].partition("#")
        call = json.loads((made / key).read_bytes())
        assert json.loads(call["text"])["posts"][int(place)] == row[1]
    places = [number for number, row in enumerate(new) if row[4]]
    assert np.mean(places) == pytest.approx(len(new) / 2, rel=0.4)  # not at the end


def test_class_weights_count_real_posts_only(home: Path, made: Path) -> None:
    """Else the weight of a rare label would go down as its posts go up, which cancels them."""
    old, new = read_index(FolderStore(home / "data")), read_index(FolderStore(made))
    wanted = class_weights(old.split("train").label_counts, 0.5)
    assert class_weights(new.split("train").real_label_counts, 0.5).tolist() == wanted.tolist()
    assert class_weights(new.split("train").label_counts, 0.5)[0] < 0.8 * wanted[0]


def test_a_training_takes_the_real_counts(made: Path) -> None:
    """What `training/start.py` asks for, also of a limited data set."""
    index = read_index(FolderStore(made))
    few = limited(index, 60).split("train")
    assert sum(few.label_counts) == 60
    for real, every in zip(few.real_label_counts, few.label_counts, strict=True):
        assert 0 <= real <= every
    assert few.real_label_counts[0] < few.label_counts[0]
    with RowGroupReader(FolderStore(made), few) as reader:
        held = [source for group in range(len(few.row_groups)) for source in reader.rows(group).sources]
    assert len(held) == 60


def test_an_index_without_marked_posts_has_the_bytes_that_it_had(home: Path) -> None:
    raw = (home / "data" / "index.json").read_bytes()
    assert b"real_counts" not in raw
    assert read_index(FolderStore(home / "data")).to_bytes() == raw


def test_a_wrong_count_of_real_posts_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    index = read_index(FolderStore(made))
    train = index.split("train")
    group = train.row_groups[0]
    assert group.real_counts is not None
    other = tuple(max(0, int(count) - 1) for count in group.real_counts)
    groups = (group.model_copy(update={"real_counts": other}), *train.row_groups[1:])
    splits = {**index.splits, "train": train.model_copy(update={"row_groups": groups})}
    (tmp_path / "copy" / "index.json").write_bytes(index.model_copy(update={"splits": splits}).to_bytes())
    with pytest.raises(WrongRequest, match="real posts of label"):
        rows_of(FolderStore(tmp_path / "copy"))
    more = group.model_copy(update={"real_counts": tuple(count + 9 for count in group.label_counts)})
    splits["train"] = train.model_copy(update={"row_groups": (more, *train.row_groups[1:])})
    (tmp_path / "copy" / "index.json").write_bytes(index.model_copy(update={"splits": splits}).to_bytes())
    with pytest.raises(WrongRequest, match="more real posts than posts"):
        read_index(FolderStore(tmp_path / "copy"))


# --- the plan ---


class _TrainingAlone(FolderStore):
    """Raises on every key but those of the training split."""

    def read(self, key: str, **options: Any) -> bytes:
        assert key.startswith("train/"), key
        return super().read(key, **options)

    def stat(self, key: str) -> Any:
        raise AssertionError(key)

    def list(self, prefix: str = "") -> Iterator[Any]:
        raise AssertionError(prefix)


def _plan(store: FolderStore, index: Index, kind: TargetKind = "one", **other: Any) -> Any:
    training = TrainingPosts.read(store, index)
    wished = wishes(index.labels, index.split("train").label_counts, "median", None)
    options: dict[str, Any] = {
        "definitions": {"awe": "wonder"},
        "shots": 4,
        "per_call": 5,
        "keep": 0.7,
        "seed": 1,
    } | other
    return training, plan(wished, index.labels, training, kind=kind, **options)


def test_the_plan_reads_the_training_split_only(home: Path) -> None:
    index = read_index(FolderStore(home / "data"))
    training, calls = _plan(_TrainingAlone(home / "data"), index)
    texts = {text for _, text, _ in posts(FolderStore(home / "data"), index.split("train"))}
    held = {
        text
        for name in ("validation", "test")
        for _, text, _ in posts(FolderStore(home / "data"), index.split(name))
    }
    fold_of = dict(zip(training.texts, folds(training.ids), strict=True))
    of = dict(zip(training.texts, training.targets, strict=True))
    for call in calls:
        content = call.prompt.messages[0].content
        shown = [line.removeprefix("- ") for line in content.splitlines() if line.startswith("- ")]
        assert shown
        assert set(shown) <= texts
        assert not [text for text in held if text in content]
        assert {of[text] for text in shown} == {((call.label, 1.0),)}
        assert len({fold_of[text] for text in shown}) == 1 or call.label == 0  # awe has 6 posts
        assert ("awe means: wonder" in content) == (call.label == 0)
    assert Counter(call.label for call in calls) == {0: 4, 3: 3}  # 12 and 9 wished, 0.7 kept, 5 a call


def test_the_plan_is_a_function_of_its_seed(home: Path) -> None:
    store = FolderStore(home / "data")
    index = read_index(store)
    assert _plan(store, index)[1] == _plan(store, index)[1] != _plan(store, index, seed=2)[1]
    prompts = [call.prompt.messages[0].content for call in _plan(store, index)[1]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("to", "labels", "words"),
    [
        ("22", None, "from 1 to 21, the median"),
        ("0", None, "--to is '0'"),
        ("many", None, "--to is 'many'"),
        ("median", ["fear"], "'fear', which is no label"),
        ("median", ["calm"], "nothing to augment"),
        ("5", None, "nothing to augment"),
    ],
)
def test_a_target_above_the_median_and_labels_that_are_not_rare_are_refused(
    to: str, labels: list[str] | None, words: str
) -> None:
    with pytest.raises(WrongRequest, match=words):
        wishes(LABELS, (6, 60, 30, 12), to, labels)


def test_wishes_stay_below_target_and_three_times_the_real_posts() -> None:
    assert [tuple(one) for one in wishes(LABELS, (6, 60, 30, 12), "15", None)] == [(0, 6, 9), (3, 12, 3)]
    assert [tuple(one) for one in wishes(LABELS, (2, 60, 30, 12), "median", ["awe"])] == [(0, 2, 4)]


def test_answers_are_lists_of_posts_or_unparseable() -> None:
    assert posts_in('{"posts": ["a", "b", 3, "c"]}', 2) == ["a", "b"]
    assert posts_in('```json\n{"posts": []}\n```', 2) == []
    for text in ("", "[]", '{"posts": "a"}', '{"posts": ["a"', "Here are five posts: a"):
        assert posts_in(text, 5) is None


# --- what stays ---


def test_near_texts_are_those_of_a_brute_force_comparison() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(NEW[:4], k=draw.randint(1, 8))) for _ in range(60)] + ["a", "", "🙂"]

    def groups(text: str) -> set[str]:
        padded = f"\x02\x02{normalised(text)}\x03\x03"
        return {padded[at : at + 5] for at in range(len(padded) - 4)}

    def share(one: str, other: str) -> float:
        both, either = groups(one) & groups(other), groups(one) | groups(other)
        return len(both) / len(either) if either else 0.0

    others = texts[30:]
    found = nearest(Shingles(texts[:30]), Shingles(others))
    assert found.tolist() == pytest.approx(
        [max(share(text, other) for other in others) for text in texts[:30]], abs=1e-6
    )
    kept: list[int] = []
    for row, text in enumerate(texts):
        if not any(share(text, texts[other]) >= 0.6 for other in kept):
            kept.append(row)
    assert first_of_near(texts) == kept


def test_doubles_of_every_split_and_of_one_another_are_dropped_and_counted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FolderStore(home / "data")
    index = read_index(store)
    longest = {
        name: max((text for _, text, _ in posts(store, index.split(name))), key=len)
        for name in ("train", "validation", "test")
    }
    new = " ".join(NEW)
    bad = [
        longest["train"],
        longest["test"].upper(),  # the same text in its normal form
        longest["validation"] + " x",  # nearly
        new + " one",
        new + " two",  # nearly the one before
    ]
    calls = iter([bad])

    def says(prompt: str) -> str:
        return json.dumps({"posts": next(calls, None) or json.loads(writes(prompt))["posts"]})

    with FakeLLM(says=says) as fake:
        assert cli.main(words(home, tmp_path / "new", fake, "--concurrency", "1", "--keep", "1")) == 0
    report = json.loads((tmp_path / "new" / "augment" / "report.json").read_bytes())
    assert report["same_as"] == {"train": 1, "test": 1}
    assert report["near_to"] == {"validation": 1, "synthetic": 1}
    kept = {text for _, text, *_ in rows_of(FolderStore(tmp_path / "new"))}
    assert not kept & {*bad[1:3], bad[4]}
    told = capsys.readouterr().out
    assert "1 as posts of train" in told
    assert "--repeat-of" in told


def test_the_filter_keeps_what_a_classifier_that_has_not_seen_it_takes_for_the_label(
    home: Path, tmp_path: Path
) -> None:
    """Half of the posts speak as the label's real ones do, half as another label's."""
    own = {"awe": "stars vast", "rage": "stop shouting never again"}

    def says(prompt: str) -> str:
        label = "awe" if "express awe" in prompt else "rage"
        draw = random.Random(prompt)
        lines = []
        for number in range(6):
            of = own[label] if number % 2 else "tea rain quiet garden party laugh"
            lines.append(" ".join(draw.choices(of.split(), k=5)) + f" {' '.join(draw.choices(NEW, k=4))}")
        return json.dumps({"posts": lines})

    with FakeLLM(says=says) as fake:
        assert cli.main(words(home, tmp_path / "new", fake, "--per-call", "6", "--keep", "0.4")) == 0
    added = [row for row in rows_of(FolderStore(tmp_path / "new")) if row[4]]
    right = sum(int(row[4].rpartition("#")[2]) % 2 for row in added)
    assert right / len(added) > 0.8
    report = json.loads((tmp_path / "new" / "augment" / "report.json").read_bytes())
    assert len(report["ids_kept"]) == len(added)
    assert report["filtered"] == len(report["ids_dropped"]) > 0


# --- money, and again ---


def test_a_finished_one_asks_nothing_and_an_interrupted_one_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    with FakeLLM(says=writes, plays=["ok", "ok", "quota"]) as fake:
        assert cli.main(words(home, new, fake, "--concurrency", "1")) == 1
        assert "no money or quota left" in capsys.readouterr().err
        assert not (new / "index.json").exists()
        assert cli.main(words(home, new, fake)) == 0
        requests, raw = len(fake.requests), (new / "index.json").read_bytes()
        assert max(fake.whole.values()) == 1
        assert cli.main(words(home, new, fake)) == 0
        assert len(fake.requests) == requests == 8  # 7 calls, one of them refused once
        assert (new / "index.json").read_bytes() == raw
        assert cli.main(words(home, new, fake, "--weight", "0.7")) == 2
        assert "never overwritten" in capsys.readouterr().err
    for path in new.rglob("*.json"):
        assert KEY not in path.read_text()


def test_the_cap_ends_with_1_and_keeps_everything(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeLLM(says=writes) as fake:
        small = [word if word != "1" else "0.01" for word in words(home, tmp_path / "new", fake)]
        assert cli.main(small) == 1
        assert fake.charged_nano <= 10_000_000
        assert "larger --max-usd resumes" in capsys.readouterr().err
        assert cli.main(words(home, tmp_path / "new", fake)) == 0
        assert max(fake.whole.values()) == 1


def test_a_model_that_writes_no_posts_is_stopped_after_five_calls(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeLLM(says=lambda prompt: "https://example.com") as fake:
        assert cli.main(words(home, tmp_path / "new", fake, "--concurrency", "1")) == 1
    assert len(fake.requests) == 5
    assert "'https://example.com'" in capsys.readouterr().err


def asked_for(fake: FakeLLM) -> dict[str, list[int]]:
    """By label, how many posts the calls asked for."""
    found: dict[str, list[int]] = {"awe": [], "rage": []}
    for body in fake.requests:
        match = re.search(r"Write (\d+) new posts that express (\w+),", body["messages"][0]["content"])
        assert match is not None
        found[match[2]].append(int(match[1]))
    return found


def test_cut_answers_make_a_label_s_later_calls_smaller(home: Path, tmp_path: Path) -> None:
    """Of awe only two posts fit into an answer. Interrupted in between, nothing is paid twice."""

    def plays(number: int, prompt: str) -> str:
        if number == 4:
            return "quota"
        many = int(prompt.partition("Write ")[2].partition(" ")[0])
        return "length" if "express awe" in prompt and many > 2 else "ok"

    def says(prompt: str) -> str:
        posts = json.loads(writes(prompt))["posts"]
        return json.dumps({"posts": posts[: int(prompt.partition("Write ")[2].partition(" ")[0])]})

    new = tmp_path / "new"
    with FakeLLM(says=says, plays=plays) as fake:
        assert cli.main(words(home, new, fake, "--concurrency", "1")) == 1
        assert len(fake.requests) == 5
        assert cli.main(words(home, new, fake, "--concurrency", "1")) == 0
        assert max(fake.whole.values()) == 1
        refused = fake.requests.pop(4)
        asked = asked_for(fake)
        assert {body["max_tokens"] for body in [*fake.requests, refused]} == {600}
        requests = len(fake.requests)
        assert cli.main(words(home, new, fake)) == 0
        assert len(fake.requests) == requests
    # 18 posts are wanted of awe and 13 of rage
    assert asked == {"awe": [5, *[2] * 9], "rage": [5, 5, 5]}
    report = json.loads((new / "augment" / "report.json").read_bytes())
    assert report["outcomes"] == {"answered": 12, "cut": 1}
    assert report["kept_by_label"]["awe"] == 12


def test_a_label_whose_answers_are_always_cut_is_given_up(home: Path, tmp_path: Path) -> None:
    with FakeLLM(
        says=writes, plays=lambda number, prompt: "length" if "express awe" in prompt else "ok"
    ) as fake:
        assert cli.main(words(home, tmp_path / "new", fake)) == 0
        assert asked_for(fake)["awe"] == [5, 2, 2, 1, 1, 1, 1]
    report = json.loads((tmp_path / "new" / "augment" / "report.json").read_bytes())
    assert set(report["kept_by_label"]) == {"rage"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--weight", "0"], "--weight is 0"),
        (["--keep", "2"], "--keep is 2"),
        (["--repeat-of", "x"], "Give one of --llm"),
        (["--to", "99"], "the median of the labels"),
        (["--per-call", "99"], "50 at most"),
        (["--llm", "m@http://127.0.0.1:9/v1"], "Give one --llm"),
        (["--key-env", "NOT_THERE_KEY", "--dry-run", "--definitions", "nowhere"], "--definitions nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    with FakeLLM() as fake:
        assert cli.main(words(home, tmp_path / "new", fake, *more)) == 2
    assert sentence in capsys.readouterr().err
    assert fake.requests == []
    assert not (tmp_path / "new").exists()


def test_a_data_set_is_augmented_once_and_never_in_place(
    home: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeLLM() as fake:
        line = words(home, home / "data", fake)
        assert cli.main(line) == 2
        assert "which is never changed" in capsys.readouterr().err
        line[1:3] = [str(made), str(made.parent / "twice")]
        assert cli.main(line) == 2
        assert "was augmented already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["several", "shares"])
def test_other_targets_are_augmented_alike(home: Path, tmp_path: Path, kind: TargetKind) -> None:
    relabel(FolderStore(home / "data"), FolderStore(tmp_path / "data"), kind, True)
    with FakeLLM(says=writes) as fake:
        assert cli.main(words(tmp_path, tmp_path / "new", fake)) == 0
    old, new = rows_of(FolderStore(tmp_path / "data")), rows_of(FolderStore(tmp_path / "new"))
    assert [row[:4] for row in new if not row[4]] == [row[:4] for row in old]
    index = read_index(FolderStore(tmp_path / "new"))
    assert index.targets == kind
    assert index.marked
    assert all(len(row[2]) == 1 for row in new if row[4])


# --- the control ---


def test_the_control_repeats_as_many_real_posts_with_the_same_weight(
    home: Path, made: Path, tmp_path: Path
) -> None:
    line = ["augment", str(home / "data"), str(tmp_path / "again"), "--repeat-of", str(made)]
    assert cli.main(line) == 0
    with_new, again = rows_of(FolderStore(made)), rows_of(FolderStore(tmp_path / "again"))
    added = [row for row in again if row[4]]
    assert Counter(row[2] for row in added) == Counter(row[2] for row in with_new if row[4])
    assert {row[3] for row in added} == {0.5}
    of = {row[1]: row[2] for row in again if not row[4]}
    assert all(of[row[1]] == row[2] for row in added)
    assert sums(tmp_path / "again") == sums(home / "data")
    new, control = read_index(FolderStore(made)), read_index(FolderStore(tmp_path / "again"))
    assert new.split("train").label_counts == control.split("train").label_counts
    assert new.split("train").real_label_counts == control.split("train").real_label_counts
    assert cli.main(line) == 0  # the same again
    assert cli.main([*line[:3], "--repeat-of", str(home / "data")]) == 2
