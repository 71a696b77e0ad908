"""The check of the adapter from which a run trains on: the trainer's own refusals."""

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
    refuse_other_weights,
    refuse_unfit,
    require_old_posts,
)

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer


def check_parent(config: Config, index: Index, tokenizer: Callable[[], PostTokenizer]) -> str:
    """What the run takes from `model.adapter`, and what not. The weights of a base that is not
    staged are compared by the trainer, before it claims the run, since reading them takes torch.
    """
    parent = read_parent(str(config.model.adapter))
    files = BaseFiles.find(config.model.base, config.model.layers)
    layers = text_model(files).layers
    refuse_other_depth(parent, layers)
    if files.staged is not None and layers is None:
        refuse_other_weights(parent, config.model.base, files.staged.index.weights_sha256)
    refuse_unfit(parent, config, index, tokenizer_sha256=tokenizer().sha256())
    require_old_posts(config, parent, index.labels)
    described = parent.described(index.labels)
    kept = len(index.labels) - len(described.new_labels)
    words = f"{described.name}, {kept} of {len(index.labels)} labels with its rows of the head"
    return "; ".join([words, *(one.rstrip(".") for one in label_sentences(described))])
