"""The number of blocks of a base to read: all, or only the first ones. The head then reads their
output behind the final norm, or as an encoder pools the output of its last block.

A cut base is a model of its own: its identity differs from the whole base's, and its adapters fit
no other depth. Blocks above are never read, so they are not checked either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emotion_train.errors import WrongRequest

Layers = int | float  # a number of blocks, or a share of them below 1
_BLOCK = re.compile(r"(?:model\.layers|(?:bert|roberta)\.encoder\.layer)\.(\d+)\.")


def blocks_read(base: str, asked: Layers | None, there: int, whole: int) -> int:
    """The number of blocks to read of a base whose files hold `there` of the model's `whole`
    blocks; a share counts from the whole. Raises `WrongRequest` for more blocks than the files
    hold.

    >>> blocks_read("base", 0.77, 30, 30), blocks_read("base", None, 20, 40)
    (23, 20)
    """
    if asked is None:
        return there
    count = asked if isinstance(asked, int) else max(1, round(asked * whole))
    if count <= there:
        return count
    has = f"has {there} blocks" if there == whole else f"was staged with {there} of its {whole} blocks"
    share = "" if isinstance(asked, int) else f", which is {count} blocks"
    raise WrongRequest(
        f"The base {base} {has} and model.layers is {asked}{share}; type model.layers={there} or less, or"
        " give a base that has so many."
    )


def is_read(name: str, layers: int | None) -> bool:
    """Whether a tensor, by the classifier's name, belongs to a base of `layers` blocks; None means
    all blocks.

    >>> is_read("model.layers.23.mlp.up_proj.weight", 23), is_read("model.norm.weight", 23)
    (False, True)
    >>> is_read("bert.encoder.layer.3.output.dense.bias", 3), is_read("bert.pooler.dense.bias", 3)
    (False, True)
    """
    block = _BLOCK.match(name)
    return layers is None or block is None or int(block[1]) < layers


def cut_configuration(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The text configuration of the first `layers` blocks: their number, and the kind of each if
    kinds are listed.
    """
    kinds = values.get("layer_types")
    listed = {"layer_types": kinds[:layers]} if isinstance(kinds, list) else {}
    return {**values, "num_hidden_layers": layers, **listed}


def blocks_words(layers: int | None) -> str:
    """`the first 23 blocks`; None is `all blocks`."""
    if layers is None:
        return "all blocks"
    return "the first block" if layers == 1 else f"the first {layers} blocks"


def depth_words(layers: int | None, whole: int | None) -> str | None:
    """`the first 23 of 30 blocks`; None for a whole base."""
    return None if layers is None else f"the first {layers} of {whole} blocks"
