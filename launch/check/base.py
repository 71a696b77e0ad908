"""Checks of the base: its config, and every file of its weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import StagedBase
from emotion_train.config import Config, Precision
from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer


def check_base(config: Config, load: Callable[[], PostTokenizer]) -> str:
    """The base's small files are read, its tokenizer by `load`; the hub is asked where they are not
    in its cache.
    """
    base = BaseFiles.find(config.model.base)
    if base.gguf is not None:
        if find_spec("gguf") is None:
            raise WrongRequest(
                "model.base is a .gguf file and the package gguf is missing; type pip install"
                " 'emotion-train[gguf]'."
            )
        words = f"{base.gguf.name}, {base.gguf.stat().st_size / 2**20:.0f} MiB"
    elif base.staged is not None:
        words = _staged(base.staged, config.model.precision)
    else:
        base.config()
        words = _weights(base)
    load()
    return f"{words}, tokenizer loads{_of_code(base)}"


def _of_code(base: BaseFiles) -> str:
    """Says that programs which the base names are not run."""
    names = base.names_code()
    return (
        f"; the auto_map of its {' and '.join(names)} is ignored: no program of a base is run"
        if names
        else ""
    )


def _staged(base: StagedBase, precision: Precision) -> str:
    """All objects are there in their size, and the staged numbers serve the run's precision."""
    base.refuse_other_precision(precision)
    if missing := base.missing():
        raise WrongRequest(
            f"{base.store.url_of(missing[0])} is missing or cut short; stage the base again into an empty"
            " place."
        )
    index = base.index
    return (
        f"{index.source}, staged at {base.store.url} as {index.precision}, {index.bytes / 1e9:.1f} GB, all"
        " objects there"
    )


def _weights(base: BaseFiles) -> str:
    """All files of weights are in the folder, in the hub's cache, or still to be downloaded."""
    if (found := base.weight_map()) is None:
        if base.folder is not None:
            base.required("model.safetensors")
        return f"{base.name}, one file of weights"
    files, total = found
    names = sorted(set(files.values()))
    if base.folder is not None:
        for name in names:
            base.required(name)
        return f"{base.name}, {len(names)} files of weights"
    from huggingface_hub import try_to_load_from_cache

    cached = [name for name in names if isinstance(try_to_load_from_cache(base.name, name), str)]
    if len(cached) == len(names):
        return f"{base.name}, all {len(names)} files of weights are in this machine's hub cache"
    return (
        f"{base.name}, the hub has it: {len(names)} files of weights, {total / 1e9:.0f} GB to download where"
        " it trains"
    )
