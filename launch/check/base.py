"""Checks of the base: the trainer's own refusals, and every file of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from emotion_train.bases.depth import depth_words
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import StagedBase
from emotion_train.config import Config
from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.trainable import TrainableBase


def look_at_base(config: Config, load: Callable[[], PostTokenizer]) -> TrainableBase:
    """The base as the trainer would read it; raises what the trainer would. `load` gives the
    tokenizer.
    """
    from emotion_train.model.trainable import require_trainable_base

    files = BaseFiles.find(config.model.base, config.model.layers)
    return require_trainable_base(files, config.model.precision, config.data.max_length, load)


def check_base(look: Callable[[], TrainableBase]) -> str:
    """The finding on the base that `look` reads; all objects of a staged base have to be stored."""
    trainable = look()
    base = trainable.files
    if base.gguf is not None:
        finding = f"{base.gguf.name}, {base.gguf.stat().st_size / 2**20:.0f} MiB"
    elif base.staged is not None:
        finding = _staged(base.staged, trainable.model.layers)
    else:
        finding = _weights(trainable)
    if (depth := depth_words(trainable.model.layers, trainable.model.whole_layers)) is not None:
        finding += f", of which {depth} are read"
    return f"{finding}, tokenizer loads{_of_code(base)}"


def _of_code(base: BaseFiles) -> str:
    """A remark that programs which the base names are not run; empty where it names none."""
    names = base.names_code()
    return (
        f"; the auto_map of its {' and '.join(names)} is ignored: no program of a base is run"
        if names
        else ""
    )


def _staged(base: StagedBase, layers: int | None) -> str:
    """The finding on a staged base. Raises `WrongRequest` unless every object that `layers` blocks
    need is stored in its size.
    """
    if missing := base.missing(layers):
        raise WrongRequest(
            f"{base.store.url_of(missing[0])} is missing or cut short; stage the base again into an empty"
            " place."
        )
    index = base.index
    return (
        f"{index.source}, staged at {base.store.url} as {index.precision},"
        f" {index.bytes_read(layers) / 1e9:.1f} GB, all objects there"
    )


def _weights(found: TrainableBase) -> str:
    """Where the files of weights are: in the folder, in the hub's cache, or still to be
    downloaded.
    """
    name, count = found.files.name, len(found.weights)
    files = "one file" if count == 1 else f"{count} files"
    if found.files.folder is not None:
        return f"{name}, {files} of weights"
    if not (left := found.bytes_to_download):
        return f"{name}, all {files} of weights are in this machine's hub cache"
    return f"{name}, the hub has it: {files} of weights, {left / 1e9:.1f} GB to download where it trains"
