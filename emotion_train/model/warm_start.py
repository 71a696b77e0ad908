"""The first state of adapter and head, or of a whole encoder, in a run that trains on from a
published adapter.

Labels are matched by name: a shared label keeps its row of the head, a new label keeps the row that
the run's seed drew, and a label that the run no longer has is left out. The published head's
temperature is multiplied back: training resumes from the logits where it ended, and the run fits a
temperature of its own at its end.

Letters: C labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from emotion_train.model.lora import is_of_head, refuse_misfits


def warm_state(
    fresh: Mapping[str, torch.Tensor],
    parent: Mapping[str, torch.Tensor],
    labels: int,
    places_C: Sequence[int | None],
    temperature: Sequence[float] | None,
) -> dict[str, torch.Tensor]:
    """The first state of a model that was drawn as `fresh`, where the parent has so many labels.
    `places_C` holds the place of each of the model's labels in the parent's head, None for a new
    one; `temperature` is the parent's, one number or one for each of its labels.

    Raises `WrongRequest` unless the parent has the model's layers and rank, and a row of the head
    for each of its labels.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    head = [name for name in shapes if is_of_head(name)]  # of an encoder a bias, too
    refuse_misfits({**shapes, **{name: (labels, *shapes[name][1:]) for name in head}}, parent)
    state = dict(parent)
    for name in head:
        trained = parent[name].to(torch.float32)
        if temperature is not None:
            by = torch.tensor(temperature, dtype=torch.float32)
            trained = trained * (by if trained.ndim == 1 else by[:, None])
        state[name] = fresh[name].to("cpu", torch.float32, copy=True)
        for label, place in enumerate(places_C):
            if place is not None:
                state[name][label] = trained[place]
    return state
