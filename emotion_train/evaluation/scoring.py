"""Probabilities of posts from a trained model, by the same packed forward pass as in training.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike

from emotion_train.data.loader import Encoder, Loader
from emotion_train.data.packing import GPU_FILL, Pack, pack
from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.predictions import AnyPredictions, Predictions, SetPredictions, placed
from emotion_train.model.attention import Segments, on_device
from emotion_train.model.dropout import Counters
from emotion_train.model.loss import probabilities

Probabilities = npt.NDArray[np.float32]


def fill_multiple(device: torch.device) -> int:
    """The number of tokens to a multiple of which packs are filled up.

    The same number in training and in scoring lets an adapter that is read back give bit for bit
    the probabilities that its run published.
    """
    return GPU_FILL if device.type == "cuda" else 1


def forward_pack(
    model: torch.nn.Module, pack: Pack, device: torch.device, dropout_key: int | None = None
) -> torch.Tensor:
    """Logits of the pack's posts, `logits_NC` in float32, by an `EmotionClassifier` or its DDP
    wrapper. `dropout_key`, of `model.dropout.key_of`, is given in training only.
    """
    logits_NC: torch.Tensor = model(
        on_device(pack.tokens_T[None], device),
        on_device(pack.positions_T[None], device),
        Segments.of(pack.boundaries_S.tolist(), device),
        on_device(pack.last_tokens_N, device),
        None if dropout_key is None else Counters.of(pack, dropout_key, device),
    )
    return logits_NC


def score(
    model: torch.nn.Module,
    loader: Loader,
    device: torch.device,
    classes: int,
    tell: Callable[[int], None],
    places_C: ArrayLike | None = None,
) -> AnyPredictions:
    """The predictions for this rank's share of a split, each post once. `places_C` are the places
    of the split's labels among the model's, where the two differ.

    `tell` is called with the number of posts done, equally often on every rank; an error that it
    raises on all ranks ends the scoring on all. Raises `WrongRequest` when a post has no text or no
    known label, and as `require_numbers`.
    """
    ids: list[str] = []
    targets, scores = [], []
    with evaluating(model), closing(loader.steps(0)) as batches:
        for batch in batches:
            if batch.bad_rows:
                raise WrongRequest(
                    f"{batch.bad_rows} posts near {batch.ids[0]} have no text or no known label; the data set"
                    " was not made by `emotion-train prepare` or was changed since. Prepare it again into an"
                    " empty prefix."
                )
            scores.append(_by_slot(model, batch.packs, len(batch.ids), device, classes, loader.targets))
            of_split_NC = batch.targets_NC.astype(np.float32)
            targets.append(of_split_NC if places_C is None else placed(of_split_NC, places_C, classes))
            ids += batch.ids
            tell(len(ids))
    prob_NC = np.concatenate(scores)
    require_numbers(prob_NC)
    return predictions_of(ids, np.concatenate(targets), prob_NC, loader.targets)


def predictions_of(
    ids: Sequence[str], targets_NC: Probabilities, prob_NC: Probabilities, kind: TargetKind
) -> AnyPredictions:
    """The predictions for posts with these targets; with several labels, all thresholds are 0.5."""
    if kind == "several":
        return SetPredictions.of(ids, targets_NC, prob_NC)
    shares_NC = targets_NC if kind == "shares" else None
    return Predictions.of(ids, targets_NC.argmax(axis=1), prob_NC, shares_NC=shares_NC)


def probabilities_of(
    model: torch.nn.Module,
    encoder: Encoder,
    texts: Sequence[str],
    tokens_per_microbatch: int,
    device: torch.device,
    classes: int,
    kind: TargetKind = "one",
) -> Probabilities:
    """Probabilities of texts, `prob_NC`, in their order; raises as `require_numbers`."""
    if not texts:
        return np.zeros((0, classes), np.float32)
    nothing_NC = np.zeros((len(texts), classes))
    packs = pack(
        encoder.encode(texts),
        nothing_NC,
        nothing_NC,
        tokens_per_microbatch,
        encoder.pad_id,
        fill_multiple(device),
    )
    with evaluating(model):
        prob_NC = _by_slot(model, packs, len(texts), device, classes, kind)
    require_numbers(prob_NC)
    return prob_NC


def require_numbers(prob_NC: Probabilities) -> None:
    """Raises `WrongRequest` where a probability is no number: NaN has a largest label too, so a
    damaged base or adapter would answer every post, and no comparison would find a difference.
    """
    if not (finite_N := np.isfinite(prob_NC).all(axis=1)).all():
        raise WrongRequest(
            f"The probabilities of {int((~finite_N).sum()):,} of {len(prob_NC):,} posts are no numbers, so"
            " the weights of the adapter or of its base are damaged or have diverged; pull the adapter"
            " again, give --base a whole copy, or train anew with a lower train.learning_rate."
        )


class evaluating:  # noqa: N801 - reads as a statement
    """No dropout and no gradients inside the with block; the model is as it was after it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._was_training = self._model.training
        self._model.eval()
        self._no_grad.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._no_grad.__exit__(None, None, None)
        self._model.train(self._was_training)


def _by_slot(
    model: torch.nn.Module,
    packs: Sequence[Pack],
    count: int,
    device: torch.device,
    classes: int,
    kind: TargetKind,
) -> Probabilities:
    prob_NC = np.zeros((count, classes), np.float32)
    # an empty pack is computed too: where weights are sharded, each rank takes part in every
    # forward
    scored = [(one.slots_N, probabilities(forward_pack(model, one, device), kind)) for one in packs]
    filled = [(slots_N, some) for slots_N, some in scored if slots_N[0] >= 0]
    if filled:  # brought over at once, so that the GPU waits for the host once a step
        prob_NC[np.concatenate([slots_N for slots_N, _ in filled])] = (
            torch.cat([some for _, some in filled]).cpu().numpy()
        )
    return prob_NC
