"""The first state of adapter and head in a run that trains on from a published adapter.

Labels are matched by name: a shared label keeps its row of the head, a new label keeps the row that
the run's seed drew, and a label that the run no longer has is left out. The published head's
temperature is multiplied back: training resumes from the logits where it ended, and the run fits a
temperature of its own at its end.

Letters: C labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from emotion_train.model.lora import refuse_misfits


def warm_state(
    fresh: Mapping[str, torch.Tensor],
    parent: Mapping[str, torch.Tensor],
    places_C: Sequence[int | None],
    temperature: Sequence[float] | None,
) -> dict[str, torch.Tensor]:
    """The first state of a model that was drawn as `fresh`. `places_C` holds the place of each of
    its labels in the parent's head, None for a new one; `temperature` is the parent's, one number
    or one for each of its labels.

    Raises `WrongRequest` unless the parent has the model's layers and rank.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    head = next(name for name in shapes if name.endswith(".score.weight"))
    its_labels = len(parent[head]) if head in parent else 0
    refuse_misfits({**shapes, head: (its_labels, *shapes[head][1:])}, parent)
    trained_CH = parent[head].to(torch.float32)
    if temperature is not None:
        trained_CH = trained_CH * torch.tensor(temperature, dtype=torch.float32)[:, None]
    weight_CH = fresh[head].to("cpu", torch.float32, copy=True)
    for label, place in enumerate(places_C):
        if place is not None:
            weight_CH[label] = trained_CH[place]
    return {**parent, head: weight_CH}
