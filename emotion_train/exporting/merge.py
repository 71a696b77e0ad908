"""Merges an adapter into its base: W + (alpha / r) B A, in float32, converted to the export's
format at the very end. An encoder is small, so its weights are merged in memory once its adapter is
loaded, or taken as they were trained.

Each block of rows is made by itself, so memory holds only a few blocks, whatever the base. Where
the training used 4-bit codes, the adapter is merged into the unrounded weights: the sum differs
from the training's by as much as the codes differ from the weights (`change.py` measures it).

Letters: O outputs, I inputs and R rank of an adapter, C labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from emotion_train.bases.encoders import pooling_modules
from emotion_train.config import LoraSection
from emotion_train.exporting.base_rows import BaseRows
from emotion_train.model.encoder import is_encoder
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.load import HEAD, BaseConfig
from emotion_train.model.lora import load_adapter, read_weights, refuse_misfits
from emotion_train.sizing.shape import layer_names

ExportDtype = Literal["bf16", "fp32"]
DTYPES: dict[ExportDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PEFT = "base_model.model."


@dataclass(frozen=True)
class MergedTensor:
    """`blocks` are the tensor's rows in its format, from the first to the last; they can be read
    once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Iterator[torch.Tensor]

    def whole(self) -> torch.Tensor:
        return torch.cat(list(self.blocks))


class Merge:
    """An adapter merged into its base: every tensor of the classifier once, first its head, which
    is float32 in every export.

    Raises `WrongRequest` unless the adapter's tensors are exactly those that its layers need.
    """

    def __init__(
        self,
        base: BaseRows,
        state: Mapping[str, torch.Tensor],
        lora: LoraSection,
        labels: int,
        dtype: ExportDtype,
        kind: str,
    ) -> None:
        refuse_misfits(adapter_shapes(base.shapes, kind, lora, labels), state)
        self._base, self._state = base, state
        self._scale = lora.alpha / lora.r
        self._dtype = DTYPES[dtype]

    @property
    def formats(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and format of each tensor, in the order of `tensors`."""
        head: dict[str, tuple[tuple[int, ...], torch.dtype]] = {HEAD: (tuple(self.head.shape), torch.float32)}
        return head | {name: (shape, self._dtype) for name, shape in self._base.shapes.items()}

    @property
    def head(self) -> torch.Tensor:
        """The head, `head_CH`, float32."""
        return self._state[_PEFT + HEAD]

    def tensors(self) -> Generator[MergedTensor]:
        """Every tensor; read the blocks of each before the next tensor."""
        yield MergedTensor(HEAD, tuple(self.head.shape), torch.float32, iter([self.head]))
        for name, blocks in self._base.stream():
            shape = self._base.shapes[name]
            yield MergedTensor(name, shape, self._dtype, self._merged(name, blocks))

    def _merged(self, name: str, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        start = 0
        for block in blocks:
            values = block.to(torch.float32)
            if (a_RI := self._state.get(_factor(name, "A"))) is not None:
                b_OR = self._state[_factor(name, "B")]
                rows_OR = b_OR[start : start + len(values)]
                values = torch.addmm(values, rows_OR, a_RI, alpha=self._scale)
            start += len(block)
            yield values.to(self._dtype)


class InMemory:
    """An encoder, like `Merge` for a decoder: every tensor once. Its head and the layers between
    head and pooled token are float32 in every export.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], kind: str, dtype: ExportDtype) -> None:
        self._state, self._kind, self._dtype = state, kind, DTYPES[dtype]

    @property
    def formats(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and format of each tensor, in the order of `tensors`."""
        return {name: (tuple(tensor.shape), self._format(name)) for name, tensor in self._state.items()}

    def tensors(self) -> Generator[MergedTensor]:
        """Every tensor."""
        for name, tensor in self._state.items():
            rounded = tensor.to(self._format(name))
            yield MergedTensor(name, tuple(tensor.shape), rounded.dtype, iter([rounded]))

    def _format(self, name: str) -> torch.dtype:
        parts = name.split(".")
        return torch.float32 if set(parts) & set(pooling_modules(self._kind)) else self._dtype


AnyMerge = Merge | InMemory


def merge_of(
    folder: Path, adapter: AdapterFacts, found: BaseConfig, rows: BaseRows, dtype: ExportDtype
) -> AnyMerge:
    """The merge of the adapter in this folder with its base, where `rows` are the base's tensors.
    Raises `WrongRequest` for a damaged file and where `Merge` does.
    """
    if not is_encoder(found.text) and adapter.lora is not None:
        kind, labels = found.text.model_type, len(adapter.labels)
        return Merge(rows, read_weights(folder), adapter.lora, labels, dtype, kind)
    if adapter.lora is None:
        return InMemory(read_weights(folder), found.text.model_type, dtype)
    network: Any = load_adapter(folder, device="cpu", base=found, precision="fp32").model.network
    merged = network.merge_and_unload()
    state = {name: tensor.detach() for name, tensor in merged.named_parameters()}
    return InMemory(state, found.text.model_type, dtype)


def adapter_shapes(
    base: Mapping[str, tuple[int, ...]], kind: str, lora: LoraSection, labels: int
) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the PEFT file of an adapter, for a base of this kind with these
    tensors.
    """
    shapes: dict[str, tuple[int, ...]] = {_PEFT + HEAD: (labels, *base["model.norm.weight"])}
    adapted = layer_names(lora.targets, kind)
    for name, shape in base.items():
        if name.endswith(".weight") and name.split(".")[-2] in adapted:
            outputs, inputs = shape
            shapes |= {_factor(name, "A"): (lora.r, inputs), _factor(name, "B"): (outputs, lora.r)}
    return shapes


def _factor(name: str, letter: str) -> str:
    """The name in a PEFT file of the adapter's matrix `letter` for a layer.

    >>> _factor("model.layers.0.mlp.up_proj.weight", "A")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"{_PEFT}{name.removesuffix('.weight')}.lora_{letter}.weight"
