"""What is trained, as far as its memory and speed depend on it: the base's shape and precision, the
adapter, the number of labels and the decoder.

What varies from GPU to GPU (tokens of a micro-batch, recomputation, sharding) is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from emotion_train.config import Config, LoraSection
from emotion_train.sizing.shape import Precision, Shape, target_names

_LABELS = 28  # where no index was read; the head is a thousandth of the adapter, whatever the number


@dataclass(frozen=True)
class Recipe:
    """`labels`: outputs of the head. `decoder`: `fused` is used where it fits the base, as
    `model.decoder` says.

    `repeated_keys`: the attention kernel of transformers' modules wants as many key heads as query
    heads, as PyTorch before 2.12 does. `averaged`: a mean of adapter and head is kept.
    """

    shape: Shape
    precision: Precision
    lora: LoraSection = LoraSection()  # noqa: RUF009
    labels: int = _LABELS
    decoder: Literal["fused", "stock"] = "fused"
    repeated_keys: bool = False
    averaged: bool = False

    @classmethod
    def of(cls, config: Config, shape: Shape, labels: int = _LABELS) -> Recipe:
        """The config's, on a base of this shape, for the PyTorch that is installed here."""
        model = config.model
        averaged = config.train.ema > 0
        return cls(shape, model.precision, config.lora, labels, model.decoder, repeats_keys(), averaged)

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """Names of the linear layers of a block that have an adapter."""
        return target_names(self.lora.targets)

    @property
    def trained_parameters(self) -> int:
        """Adapter and head."""
        return self.shape.trained_parameters(self.lora.r, self.lora.targets, self.labels)


@cache
def repeats_keys() -> bool:
    """Whether the installed PyTorch is older than 2.12, told by its package alone. False where none
    is installed: the machine that trains will have a newer one.
    """
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (2, 12)
