"""Of rows with the same text the one stays that `--on-conflict` says, and every row is accounted
for; the expected answers are made by plain loops over the rows and by pandas.
"""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emotion_train.cli import main
from emotion_train.data.cleaning import DROPPED, REFUSED, SPLIT_CODES
from emotion_train.data.conflicts import POLICIES, Choice, Policy, choose
from emotion_train.data.index import read_index
from emotion_train.errors import WrongRequest
from emotion_train.preparation.steps import PrepareResult, prepare
from emotion_train.storage.open import open_store

Row = tuple[int, int, int]  # text, split code, label code; its place is its position


def chosen(rows: list[Row], policy: Policy) -> Choice:
    columns = np.array(rows, np.int64).reshape(-1, 3)
    key0, key1 = (columns[:, 0] // 3).astype(np.uint64), (columns[:, 0] % 3).astype(np.uint64)
    return choose(key0, key1, columns[:, 1].astype(np.int8), 7 + np.arange(len(rows)), columns[:, 2], policy)


def expected(rows: list[Row], policy: Policy) -> dict[str, set[int]]:
    """The rows of each case, by loops."""
    cases: dict[str, set[int]] = {name: set() for name in Choice._fields[:4]}
    for text in {text for text, _, _ in rows}:
        numbers = [number for number, row in enumerate(rows) if row[0] == text]
        latest = min(rows[number][1] for number in numbers)
        inside = [number for number in numbers if rows[number][1] == latest]
        cases["in_two_splits_N"] |= set(numbers) - set(inside)
        votes = Counter(rows[number][2] for number in inside)  # in the order of their first rows
        if len(votes) > 1 and policy in ("drop", "refuse"):
            cases["conflicting_N"] |= set(inside)
            continue
        winner = next(iter(votes)) if policy == "first" else max(votes, key=lambda label: votes[label])
        winning = [number for number in inside if rows[number][2] == winner]
        cases["keep_N"].add(winning[0])
        cases["repeated_N"] |= set(winning[1:])
        cases["conflicting_N"] |= set(inside) - set(winning)
    return cases


some_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 4)), max_size=40)


@example(rows=[(0, 0, 1), (0, 0, 0), (0, 0, 0)], policy="majority")  # the most rows, not the first
@given(rows=some_rows, policy=st.sampled_from(POLICIES["one"]))
def test_each_row_has_the_fate_that_loops_over_the_rows_give_it(rows: list[Row], policy: Policy) -> None:
    choice = chosen(rows, policy)
    found = {name: set(np.flatnonzero(getattr(choice, name)).tolist()) for name in Choice._fields[:4]}
    assert found == expected(rows, policy)
    assert sum(map(len, found.values())) == len(rows)


@given(rows=some_rows, policy=st.sampled_from(POLICIES["one"]))
def test_examples_are_the_first_conflicts_with_the_votes_of_each_label(
    rows: list[Row], policy: Policy
) -> None:
    choice = chosen(rows, policy)
    mixed = {}
    for text in {text for text, _, _ in rows}:
        latest = min(split for other, split, _ in rows if other == text)
        inside = [
            (number, label)
            for number, (other, split, label) in enumerate(rows)
            if (other, split) == (text, latest)
        ]
        if len({label for _, label in inside}) > 1:
            mixed[inside[0][0]] = Counter(label for _, label in inside)
    assert choice.texts == len(mixed)
    assert [(one.place - 7, one.votes) for one in choice.examples] == sorted(mixed.items())[:3]
    for one in choice.examples:
        assert list(one.votes) == list(mixed[one.place - 7])  # by first row
        most = max(one.votes, key=lambda label: one.votes[label])
        assert one.winner == {"first": next(iter(one.votes)), "majority": most}.get(policy)


# Through prepare


def write_posts(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def posts_of(folder: Path) -> pd.DataFrame:
    store = open_store(str(folder))
    index = read_index(store)
    objects = [described for split in index.splits.values() for described in split.objects]
    posts = pd.concat([pq.read_table(io.BytesIO(store.read(one.key))).to_pandas() for one in objects])
    posts["label"] = [index.labels[label] for label in posts["label"]]
    return posts


LABELS = ["anger", "joy", "love", "worry"]
GOOD = [(f"good {i}", LABELS[i % 4]) for i in range(40)]
GREETING = [
    ("Hi  there" if at % 2 == 0 else "hi there", label)
    for at, label in enumerate(["worry", *["love"] * 6, "worry"])
]
TIED = [("meh", "joy"), ("meh", "anger"), ("MEH", "anger"), ("meh", "joy"), ("meh", "love")]


@pytest.mark.parametrize(
    ("policy", "kept", "words"),
    [
        ("majority", {"hi there": "love", "meh": "joy"}, "the label of most rows stays"),
        ("first", {"hi there": "worry", "meh": "joy"}, "the label of the first row stays"),
        ("drop", {}, "none of their rows stays"),
    ],
)
def test_a_text_gets_the_label_that_was_asked_for_and_the_summary_says_so(
    policy: str, kept: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_posts(tmp_path / "posts.csv", [*TIED, *GOOD, *GREETING])
    target = tmp_path / "out"
    given = [] if policy == "majority" else ["--on-conflict", policy]
    assert main(["prepare", str(source), str(target), *given]) == 0
    out = capsys.readouterr().out
    posts = posts_of(target)
    texts = posts["text"].str.lower().str.split().str.join(" ")
    assert dict(zip(texts, posts["label"], strict=True)) == dict(GOOD) | kept
    assert len(posts) == len(GOOD) + len(kept)
    assert f"conflicts   2 texts have several labels; {words}" in out
    assert f"(--on-conflict {policy})\n" in out
    winners = {"majority": (": joy", ": love"), "first": (": joy", ": worry"), "drop": ("", "")}[policy]
    assert f"            'meh' joy 2, anger 2, love 1{winners[0]}\n" in out
    assert f"            'Hi  there' worry 2, love 6{winners[1]}\n" in out
    source_of = read_index(open_store(str(target))).source
    assert (source_of["on_conflict"], source_of["conflicting_texts"]) == (policy, 2)
    rows_of_loser = {"majority": 3 + 2, "first": 3 + 6, "drop": 5 + 8}[policy]
    assert source_of["conflicting"] == rows_of_loser
    assert source_of.get("repeated", 0) == 13 - rows_of_loser - len(kept)


def test_the_row_that_stays_is_the_first_one_with_the_winning_label(tmp_path: Path) -> None:
    write_posts(tmp_path / "posts.csv", [*GREETING, *GOOD])
    prepare(tmp_path / "posts.csv", str(tmp_path / "out"))
    posts = posts_of(tmp_path / "out")
    assert posts[posts["label"] == "love"]["id"].isin(["posts.csv:3"]).sum() == 1


def test_conflicts_that_are_refused_are_listed_like_other_bad_posts(tmp_path: Path) -> None:
    source = write_posts(tmp_path / "posts.csv", [*TIED, *GOOD, *GREETING, ("", "joy")])
    with pytest.raises(WrongRequest) as caught:
        prepare(source, str(tmp_path / "out"), on_conflict="refuse")
    text = str(caught.value)
    assert "14 of 54 posts cannot be used" in text
    assert "same text with another label  13  posts.csv:2, posts.csv:3, posts.csv:4, posts.csv:5" in text
    assert "no text                        1  posts.csv:55" in text
    assert "'meh' joy 2, anger 2, love 1\n" in text
    assert "type --on-bad drop to leave them out" in text
    assert "type --on-conflict majority, first or drop for texts with several labels" in text
    with pytest.raises(WrongRequest) as caught:
        prepare(source, str(tmp_path / "out"), on_conflict="refuse", on_bad="drop")
    assert "13 of 54 posts cannot be used" in str(caught.value)
    assert "--on-bad" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    without = write_posts(tmp_path / "posts.csv", [*GOOD, *GOOD])
    prepare(without, str(tmp_path / "out"), on_conflict="refuse")
    assert len(posts_of(tmp_path / "out")) == len(GOOD)


def test_a_policy_that_does_not_exist_is_named(tmp_path: Path) -> None:
    source = write_posts(tmp_path / "posts.csv", GOOD)
    with pytest.raises(
        WrongRequest, match="--on-conflict is 'last'; type one of first, majority, drop, refuse"
    ):
        prepare(source, str(tmp_path / "out"), on_conflict="last")


def test_votes_are_counted_in_the_split_that_keeps_the_text(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write_posts(folder / "train.csv", [*GOOD, *[("hi there", "anger")] * 9])
    write_posts(folder / "validation.csv", [("fine", "joy"), *GREETING])
    result = prepare(folder, str(tmp_path / "out"))
    posts = posts_of(tmp_path / "out")
    assert posts[posts["text"].str.lower().str.startswith("hi")]["label"].tolist() == ["love"]
    assert {kind: result.index.source[kind] for kind in DROPPED if "auxiliary" not in kind} == {
        "repeated": 5,
        "conflicting": 2,
        "in_two_splits": 9,
    }
    (example,) = result.findings.conflicts
    assert str(example) == "'Hi  there' worry 2, love 6: love"


def crowd(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Rows as several annotators leave them: most texts several times, in any order, with bad rows
    among them.
    """
    draw = random.Random(seed)
    words = [f"post {i} {'x' * draw.randrange(60)}" for i in range(rows // 4)]
    found = [(draw.choice(words), draw.choices(LABELS, [4, 3, 2, 1])[0]) for _ in range(rows)]
    for at in range(0, rows, 97):
        found[at] = draw.choice([("", "joy"), (" ", "love"), ("no label", "")])
    return found


def by_pandas(rows: list[tuple[str, str]], policy: str) -> pd.DataFrame:
    """Text and label of the rows that stay, and the row of each."""
    posts = pd.DataFrame(rows, columns=["text", "label"])
    posts["row"] = np.arange(2, len(posts) + 2)
    posts = posts[(posts["text"].str.strip() != "") & (posts["label"] != "")]
    posts["key"] = posts["text"].str.lower()
    posts["votes"] = posts.groupby(["key", "label"])["row"].transform("size")
    if policy == "drop":
        posts = posts[posts.groupby("key")["label"].transform("nunique") == 1]
    if policy == "majority":
        posts = posts.sort_values(["votes", "row"], ascending=[False, True])
    return posts.drop_duplicates("key")


@pytest.mark.parametrize("policy", ["first", "majority", "drop"])
def test_kept_and_dropped_rows_by_reason_add_up_to_the_rows_of_the_file(policy: str, tmp_path: Path) -> None:
    rows = crowd(4000)
    source = write_posts(tmp_path / "posts.csv", rows)
    result = prepare(source, str(tmp_path / "out"), on_conflict=policy, on_bad="drop")
    posts, meant = posts_of(tmp_path / "out"), by_pandas(rows, policy)
    assert set(zip(posts["id"], posts["text"], posts["label"], strict=True)) == {
        (f"posts.csv:{row}", text, label)
        for row, text, label in zip(meant["row"], meant["text"], meant["label"], strict=True)
    }
    with source.open(newline="", encoding="utf-8") as file:
        records = sum(1 for _ in csv.reader(file)) - 1
    left_out = sum(result.findings.counts[kind] for kind in (*REFUSED, *DROPPED))
    assert len(posts) + left_out == records == result.index.source["rows_read"]
    assert result.findings.counts["conflicting_texts"] > 100
    assert result.findings.counts["empty_text"] + result.findings.counts["no_label"] == len(
        range(0, 4000, 97)
    )


def of(result: PrepareResult) -> tuple[Any, ...]:
    return result.index.to_bytes(), [str(example) for example in result.findings.conflicts]


def test_little_memory_counts_the_same_votes_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emotion_train.preparation import work

    source = write_posts(tmp_path / "posts.csv", crowd(3000, seed=5))
    results = []
    for partitions in (1, 16):
        monkeypatch.setattr(work, "partitions_for", lambda *_, partitions=partitions: partitions)
        results.append(prepare(source, str(tmp_path / str(partitions)), on_bad="drop"))
    one, many = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "16")
    )
    assert one == many
    assert of(results[0]) == of(results[1])
    assert len(results[0].findings.conflicts) == 3


def test_split_codes_are_in_the_order_that_the_choice_relies_on() -> None:
    assert SPLIT_CODES["test"] < SPLIT_CODES["validation"] < SPLIT_CODES["train"]
