"""A data set with added posts is written once, whoever writes it, and trains with the class weights
of its real posts.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from emotion_train.data.index import Index, read_index
from emotion_train.errors import WrongRequest
from emotion_train.hosted.augmented import Added, write
from emotion_train.hosted.prompts import TrainingPosts
from emotion_train.model.loss import class_weights
from emotion_train.storage.folder import FolderStore
from tests.helpers.auxiliary_posts import auxiliary_config
from tests.helpers.tiny_runs import start_trainer, tiny_config

ADDED = [Added(f"new-{number}", f"a new post {number}", ((0, 1.0),), 0.5, "here") for number in range(9)]


def written(folder: Path, name: str, added: list[Added] = ADDED) -> Index:
    """The tiny run's data set with these posts, at that name."""
    source = FolderStore(folder / "data")
    index = read_index(source)
    posts = TrainingPosts.read(source, index)
    return write(source, index, posts, added, FolderStore(folder / name), seed=1, facts={})


def test_a_training_weights_classes_by_real_posts(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    made = written(tmp_path, "more")
    assert made.split("train").label_counts == (15, 60, 30, 12)
    config = tiny_config(tmp_path, f"data.url={tmp_path / 'more'}", "loss.class_weights=0.5")
    with ExitStack() as stack:
        trainer = start_trainer(config, stack)
        assert trainer.train_loader.weights_C.tolist() == class_weights((6, 60, 30, 12), 0.5).tolist()
        batch = next(trainer.train_loader.steps(0))
    assert batch.bad_rows == 0


def test_auxiliary_posts_stay_and_count_as_real_ones(tmp_path: Path) -> None:
    auxiliary_config(tmp_path)
    index, made = read_index(FolderStore(tmp_path / "data")), written(tmp_path, "more")
    assert index.auxiliary is not None
    assert made.auxiliary == index.auxiliary
    assert made.requires == ("weight", "source", "auxiliary")
    assert made.training.rows == index.training.rows + len(ADDED)
    assert made.training.real_label_counts == index.training.label_counts
    with ExitStack() as stack:
        config = auxiliary_config(tmp_path, f"data.url={tmp_path / 'more'}", "run.id=more")
        trainer = start_trainer(config, stack)
        batches = list(trainer.train_loader.steps(0))
    assert sum(len(batch.ids) for batch in batches) == made.training.rows
    assert sum(batch.bad_rows for batch in batches) == 0


def test_the_same_posts_give_the_same_data_set_and_others_are_refused(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    assert written(tmp_path, "more") == written(tmp_path, "more")
    raw = (tmp_path / "more" / "index.json").read_bytes()
    with pytest.raises(WrongRequest, match="never overwritten"):
        written(tmp_path, "more", ADDED[:3])
    assert (tmp_path / "more" / "index.json").read_bytes() == raw
