"""One decision for several adapters: temperature, thresholds and gates that the validation posts of
their training choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from emotion_train.errors import StorageError
from emotion_train.evaluation.adapter import Classifier
from emotion_train.judging.split_posts import SplitPosts
from emotion_train.runs.origin import NotInReach, Origin

if TYPE_CHECKING:
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.predictions import AnyPredictions
    from emotion_train.model.ensemble import Ensemble


def decide_together(validation: SplitPosts | str, classifier: Classifier) -> list[str]:
    """Choose temperature, thresholds and gates for several adapters together, on the validation
    posts of their training. Returns a remark where these posts cannot be read, else nothing.
    """
    from emotion_train.model.ensemble import Ensemble

    model = classifier.loaded.model
    if not isinstance(model, Ensemble):
        return []
    if isinstance(validation, str):
        own = "their thresholds are the mean of each adapter's own" if classifier.targets == "several" else ""
        return [
            f"No validation posts judged these adapters together: {validation}. Their mean has no"
            f" temperature of its own and there are no gates{own and f'; {own}'}."
        ]
    classifier.decision = _decision_by(validation.predictions(classifier), model, classifier.labels)
    return []


def validation_of(origins: Sequence[Origin], posts: SplitPosts | None = None) -> SplitPosts | str:
    """The validation split of the data set that several adapters were trained on, or why there is
    none; `posts` is the split to score. Raises `StorageError` where its store does not answer,
    since the figures would differ without it.
    """
    first = origins[0]
    if len(origins) == 1:
        return "one adapter has been judged"
    if any(one.index_sha256 != first.index_sha256 for one in origins) or first.index_sha256 is None:
        return "they were trained on several data sets, or on data sets that are not known"
    if posts is not None and posts.index.sha256() == first.index_sha256:
        return replace(posts, name="validation")
    try:
        store, index = first.data_set()
    except NotInReach as error:
        if error.unanswered:
            raise StorageError(
                f"The validation posts that choose one temperature for these adapters cannot be read: {error}"
                ". Type the same command again, or give --training-data DATA_URL, a copy of the data set.",
                transient=True,
            ) from error
        return str(error)
    return SplitPosts(store, index, "validation", np.arange(len(index.labels)))


def _decision_by(validation: AnyPredictions, model: Ensemble, labels: Sequence[str]) -> Decision:
    """The decision that the validation posts choose; the model gets the temperature that they
    choose.
    """
    import torch

    from emotion_train.config import ReportSection
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.predictions import SetPredictions
    from emotion_train.evaluation.temperature import divided, temper

    tempered = temper(validation)
    if tempered.temperature is not None:
        model.temperature = torch.tensor(tempered.temperature, dtype=torch.float32, device=model.device)
        prob_NC = divided(validation.prob_NC, tempered.temperature, validation.targets)
        validation = replace(validation, prob_NC=prob_NC)
    decision = (
        Decision.of(validation, labels)
        if isinstance(validation, SetPredictions)
        else Decision.one(labels, validation.targets)
    )
    return decision.acting(validation, tempered, ReportSection().gates)
