"""What `check` says of labels where a post may have several, none, or shares of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from emotion_train.config import load_config
from emotion_train.data.index import read_index
from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.preparation.auxiliary import AuxiliaryPosts
from emotion_train.storage.open import open_store
from launch.check.dataset import Doubt, check_data, check_labels, check_overlap
from launch.workload import work_of
from tests.helpers.auxiliary_posts import prepare_auxiliary
from tests.helpers.target_data import Post, having, write_targets

ALL = [("tea", having(0)), ("boo", having(1)), ("party", having(2)), ("tea party", having(0, 2))]


def found(folder: Path, kind: TargetKind, train: list[Post], held_out: list[Post]) -> str | Doubt:
    url = str(folder / "data")
    store = write_targets(url, kind, {"train": train, "validation": held_out}, folder)
    config = load_config(None, [f"data.url={url}", f"run.output_url={folder / 'runs'}"])
    return check_labels(config, read_index(store), store)


def test_posts_without_labels_are_counted(tmp_path: Path) -> None:
    words = found(tmp_path, "several", [*ALL * 5, *[("hm", having())] * 30], ALL * 5)
    assert words == "largest class 2.0 times the smallest (5 posts); 30 of 50 training posts have no label"


def test_a_label_that_every_post_has_is_doubtful(tmp_path: Path) -> None:
    always = [(text, having(0, *(label for label, _ in target if label))) for text, target in ALL]
    doubt = found(tmp_path, "several", always * 5, always * 5)
    assert isinstance(doubt, Doubt)
    assert "every train post has the label calm, so that nothing is learned of it: prepare" in doubt.words
    assert "every validation post has the label calm, so that no score tells anything of it" in doubt.words
    assert "0 of 20 training posts have no label" in doubt.words


@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        ([0, 2], [0, 1, 2], "No training post has the label 'fear'"),
        ([0, 1, 2], [0, 2], "No validation post has the label fear, which counts 0 in macro-F1"),
    ],
)
def test_a_label_without_positives_in_a_split_is_refused(
    tmp_path: Path, train: list[int], held_out: list[int], words: str
) -> None:
    def posts(labels: list[int]) -> list[Post]:
        return [("tea", having(label)) for label in labels] + [("tea party", having(0, 2)), ("hm", having())]

    with pytest.raises(WrongRequest, match=words):
        found(tmp_path, "several", posts(train), posts(held_out))


def test_shares_are_added_up(tmp_path: Path) -> None:
    posts: list[Post] = [("tea", ((0, 0.75), (1, 0.25))), ("party", ((2, 1.0),))]
    words = found(tmp_path, "shares", posts * 10, posts * 20)
    assert words == "largest class 4.0 times the smallest (2.5 posts)"


def test_auxiliary_posts_are_counted_and_planned(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path)
    config = load_config(None, [f"data.url={tmp_path / 'data'}", "run.output_url=r"])
    assert "auxiliary 94 posts, 4 labels" in check_data(config, index)
    work = work_of(config, index, open_store(str(tmp_path / "data")), 20.0)
    assert (work.train_posts, work.labels) == (108 + 94, 4 + 3)
    assert "(all 202 training posts)" in check_overlap(open_store(str(tmp_path / "data")), index)


def test_an_auxiliary_post_whose_text_is_scored_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AuxiliaryPosts.settle
    monkeypatch.setattr(
        AuxiliaryPosts, "settle", lambda self, keys_of, note: honest(self, lambda partition: [], note)
    )
    prepare_auxiliary(tmp_path)
    scored = (tmp_path / "source" / "validation.csv").read_text().splitlines()[1].rsplit(",", 1)[0]
    with (tmp_path / "source" / "train.csv").open("a", encoding="utf-8") as file:
        file.write(f"{scored.upper()},hope\n")
    index = prepare_auxiliary(tmp_path, "leaky")
    with pytest.raises(WrongRequest, match="1 text is in train and in validation"):
        check_overlap(open_store(str(tmp_path / "leaky")), index)
