"""Prompts are a function of labels, seed and training posts, and answers are read exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emotion_train.data.index import read_index
from emotion_train.errors import WrongRequest
from emotion_train.hosted.prompts import (
    TrainingPosts,
    labels_in,
    question_of,
    read_definitions,
    read_template,
)
from emotion_train.preparation.steps import prepare
from emotion_train.storage.folder import FolderStore
from tests.helpers.tiny_runs import write_posts

LABELS = ["anger", "Joy", "no emotion"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    folder = tmp_path_factory.mktemp("data")
    prepare(str(write_posts(folder / "source")), str(folder / "data"))
    return FolderStore(folder / "data")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('{"label": "Joy"}', 1),
        ('{"label":"JOY"}', 1),
        (' "joy" \n', 1),
        ("“no emotion”", 2),
        ("ＪＯＹ", 1),  # full width
        ('```json\n{"label": "anger"}\n```', 0),
        ('{"label": "joy", "why": "tea"}', 1),
        ("joy.", None),
        ("joyful", None),
        ("The label is joy", None),
        ('{"label": "fear"}', None),
        ('{"label": ["joy"]}', None),
        ('{"label": null}', None),
        ('{"label": "joy"', None),
        ('{"label": "joy", "label": "anger"}', None),
        ("[" * 500, None),
        ("", None),
    ],
)
def test_one_label_is_read_exactly(text: str, label: int | None) -> None:
    assert labels_in(text, LABELS, "one") == (None if label is None else {label})


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('{"labels": ["joy", "anger"]}', {0, 1}),
        ('{"labels": []}', set()),
        ('["joy", "joy"]', {1}),
        ('{"label": "joy"}', {1}),
        ("joy", {1}),
        ('{"labels": ["joy", "fear"]}', None),
        ('{"labels": [1]}', None),
        ("joy, anger", None),
        ("{}", None),
    ],
)
def test_several_labels_are_a_set_of_which_each_is_known(text: str, labels: set[int] | None) -> None:
    assert labels_in(text, LABELS, "several") == labels


def test_labels_that_are_alike_are_told_apart_as_they_are_written() -> None:
    assert labels_in("Joy", ["joy", "Joy"], "one") == frozenset({1})
    assert labels_in("JOY", ["joy", "Joy"], "one") is None


def test_a_prompt_lists_labels_in_an_order_of_the_seed_and_shows_training_posts_alone(
    data: FolderStore,
) -> None:
    index = read_index(data)
    posts = TrainingPosts.read(data, index)
    orders, prompts = set(), set()
    for seed in range(6):
        question = question_of(
            index,
            seed=seed,
            definitions={"awe": "wonder at what is vast"},
            template=None,
            max_tokens=16,
            shots=2,
            posts=posts,
        )
        orders.add(question.labels)
        assert sorted(question.labels) == sorted(index.labels)
        assert len(question.examples) == 2 * len(index.labels)
        of = dict(zip(posts.texts, posts.targets, strict=True))
        for text, own in question.examples:
            assert own == (index.labels[of[text][0][0]],)
        prompt = question.prompt("a {post} of {labels}")
        text = prompt.messages[0].content
        assert text.endswith("Post: a {post} of {labels}")
        assert "awe: wonder at what is vast" in text
        assert ", ".join(question.labels) in text
        assert prompt.schema["properties"]["label"]["enum"] == list(question.labels)
        prompts.add(text)
    assert len(orders) > 1
    assert len(prompts) == 6


def test_files_of_definitions_and_prompts_are_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content, words in (
        ('{"fear": "dread"}', "no label of the data set"),
        ('{"Joy": 1}', "no text"),
        ("[]", "cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(WrongRequest, match=words):
            read_definitions(str(file), LABELS)
    file.write_text(json.dumps({"Joy": "gladness\nof heart"}))
    assert read_definitions(str(file), LABELS) == {"Joy": "gladness of heart"}
    file.write_text("Which of {labels}?")
    with pytest.raises(WrongRequest, match=r"has no \{post\}"):
        read_template(str(file))
    with pytest.raises(WrongRequest, match="cannot be read"):
        read_template(str(tmp_path / "none"))
    file.write_text("Which of {labels}? {post}")
    assert read_template(str(file)) == "Which of {labels}? {post}"
