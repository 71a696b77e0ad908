"""Several adapters over one base: the mean of their logits, as one model answers.

The base is on the device once. The fused decoder computes all adapters in one pass over its
weights, each on its own repetition of the pack, so a pass has K times the pack's tokens;
transformers' modules compute one adapter after the other. Either way the work is K times that of
one adapter.

Letters: K adapters, N posts, C labels, H hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from emotion_train.data.tokenization import PostTokenizer
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import Counters
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.fused import FusedInputs
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import BaseConfig, Tell, tell_nobody
from emotion_train.model.lora import adapter_parameters, load_adapter, read_weights, refuse_misfits
from emotion_train.model.precision import Precision


class Ensemble(nn.Module):
    """`forward` takes a pack, as `EmotionClassifier` does, and returns the mean of the members'
    logits, divided by `temperature`, one number or one a label, where there is one.

    Raises `WrongRequest` for a state that does not fit the model.
    """

    def __init__(self, model: EmotionClassifier, states: Sequence[Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.temperature: torch.Tensor | None = None
        self._own = adapter_parameters(model.network)
        shapes = {name: tuple(parameter.shape) for name, parameter in self._own.items()}
        for state in states:
            refuse_misfits(shapes, state)
        self._states = [
            {name: tensor.to(model.device, torch.float32) for name, tensor in state.items()}
            for state in states
        ]
        self._head_KCH: torch.Tensor | None = None
        if model.decoder is not None:
            model.decoder.hold(len(states), self._put)
            head = next(name for name in self._own if name.endswith(".score.weight"))
            self._head_KCH = torch.stack([state[head] for state in self._states])
            self._states = []  # the decoder has them in its own format

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def precision(self) -> Precision:
        return self.model.precision

    def forward(
        self,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        segments: Segments,
        last_token_idx_N: torch.Tensor,
        counters: Counters | None = None,
    ) -> torch.Tensor:
        """Logits of shape NC, float32. `counters` are for training, which this is not."""
        pack = input_ids_1T, position_ids_1T, segments, last_token_idx_N
        if self._head_KCH is not None:
            logits_KNC = self._together(self._head_KCH, self.model.fused_inputs(*pack))
        else:
            logits_KNC = torch.stack([self._one(member, pack) for member in range(len(self._states))])
        logits_NC = logits_KNC.mean(dim=0)
        return logits_NC if self.temperature is None else logits_NC / self.temperature

    def _together(self, head_KCH: torch.Tensor, inputs: FusedInputs) -> torch.Tensor:
        decoder = self.model.decoder
        assert decoder is not None
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            hidden = decoder(inputs.repeated(len(head_KCH)), False)
            hidden_KNH = hidden.view(len(head_KCH), -1, hidden.shape[1]).float()
            return hidden_KNH @ head_KCH.mT

    def _one(
        self, member: int, pack: tuple[torch.Tensor, torch.Tensor, Segments, torch.Tensor]
    ) -> torch.Tensor:
        self._put(member)
        logits_NC: torch.Tensor = self.model(*pack)
        return logits_NC

    def _put(self, member: int) -> None:
        """Point the model's parameters at this member's tensors; nothing is copied."""
        for name, parameter in self._own.items():
            parameter.data = self._states[member][name]


@dataclass(frozen=True)
class LoadedEnsemble:
    """The ensemble with the first member's tokenizer, labels and facts, which all members share."""

    model: Ensemble
    tokenizer: PostTokenizer
    labels: tuple[str, ...]
    facts: AdapterFacts


def load_ensemble(
    folders: Sequence[Path],
    *,
    device: torch.device | str,
    base: str | BaseConfig | None = None,
    precision: Precision | None = None,
    fused: bool = True,
    tell: Tell = tell_nobody,
) -> LoadedEnsemble:
    """Adapters that may answer together (`emotion_train.evaluation.members`) over one base; else as
    `load_adapter`.
    """
    states = [read_weights(folder) for folder in folders]  # damaged ones are refused before the base is read
    first = load_adapter(folders[0], device=device, base=base, precision=precision, fused=fused, tell=tell)
    ensemble = Ensemble(first.model, states).requires_grad_(False).eval()
    return LoadedEnsemble(ensemble, first.tokenizer, first.labels, first.facts)
