"""The facts of a training on which its memory and speed depend: the base's shape and precision, the
adapter, the number of labels and the decoder.

Settings that vary from GPU to GPU (tokens of a micro-batch, recomputation, sharding) are no part of
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from emotion_train.config import Config, LoraSection
from emotion_train.errors import WrongRequest
from emotion_train.sizing.shape import Precision, Shape, target_names

_LABELS = 28  # where no index was read; with any number the head is a thousandth of the adapter


@dataclass(frozen=True)
class Recipe:
    """`labels`: outputs of the head. `decoder`: `fused` where it fits the base, as for
    `model.decoder`.

    `lora` is None where every weight is trained.

    `repeated_keys`: the attention kernel of transformers' modules needs as many key heads as query
    heads, as before PyTorch 2.12. `averaged`: a mean of adapter and head is kept. `keeps_unpacked`:
    4-bit weights are also held in bfloat16 where there is room.
    """

    shape: Shape
    precision: Precision
    lora: LoraSection | None = LoraSection()  # noqa: RUF009
    labels: int = _LABELS
    decoder: Literal["fused", "stock"] = "fused"
    repeated_keys: bool = False
    averaged: bool = False
    keeps_unpacked: bool = False

    @classmethod
    def of(cls, config: Config, shape: Shape, labels: int = _LABELS) -> Recipe:
        """The recipe of a config on a base of this shape, for the PyTorch installed here. Raises
        `WrongRequest` where `adapter_of` does.
        """
        model, lora = config.model, adapter_of(config, shape.is_encoder)
        averaged, kept = config.train.ema > 0, model.keep_unpacked
        return cls(shape, model.precision, lora, labels, model.decoder, repeats_keys(), averaged, kept)

    @property
    def lora_r(self) -> int:
        """Rank of the adapter; 0 where there is none."""
        return 0 if self.lora is None else self.lora.r

    @property
    def lora_dropout(self) -> float:
        """Dropout before the adapter; 0 where there is none."""
        return 0.0 if self.lora is None else self.lora.dropout

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """Names of the linear layers of a block that have an adapter."""
        if self.lora is None:
            return ()
        names = target_names(self.lora.targets)
        return tuple(name for name in names if name in self.shape.linear_layers)

    @property
    def trained_parameters(self) -> int:
        """Parameters of adapter and head, or all parameters."""
        if self.lora is None:
            return self.shape.all_parameters(self.labels)
        return self.shape.trained_parameters(self.lora.r, self.adapted_layers, self.labels)


def adapter_of(config: Config, is_encoder: bool) -> LoraSection | None:
    """The adapter to train on a base of this kind; None where every weight is trained. Raises
    `WrongRequest` where every weight of a decoder should be trained.
    """
    method = config.train.method
    if method == "full" and not is_encoder:
        raise WrongRequest(
            f"train.method is full and the base {config.model.base} is a decoder, which is trained by an"
            " adapter only; type train.method=lora, or give an encoder such as FacebookAI/roberta-base."
        )
    return None if method == "full" or (method == "auto" and is_encoder) else config.lora


@cache
def repeats_keys() -> bool:
    """Whether the installed PyTorch is older than 2.12, by its package's version. False where none
    is installed: the machine that trains will have a newer one.
    """
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (2, 12)
