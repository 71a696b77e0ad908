"""The check of the adapter that a run trains on from: what the trainer would refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from emotion_train.bases.architecture import text_model
from emotion_train.bases.files import BaseFiles
from emotion_train.config import Config
from emotion_train.data.index import Index
from emotion_train.runs.parent import (
    label_sentences,
    read_parent,
    refuse_other_depth,
    refuse_unfit,
    require_old_posts,
)

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer


def check_parent(config: Config, index: Index, tokenizer: Callable[[], PostTokenizer]) -> str:
    """What is taken from `model.adapter`, and what not. The base's weights are compared once they
    are loaded.
    """
    parent = read_parent(str(config.model.adapter))
    refuse_other_depth(parent, text_model(BaseFiles.find(config.model.base, config.model.layers)).layers)
    refuse_unfit(parent, config, index, tokenizer_sha256=tokenizer().sha256())
    require_old_posts(config, parent, index.labels)
    described = parent.described(index.labels)
    kept = len(index.labels) - len(described.new_labels)
    words = f"{described.name}, {kept} of {len(index.labels)} labels with its rows of the head"
    return "; ".join([words, *(one.rstrip(".") for one in label_sentences(described))])
