"""Predictions of posts that may have several labels each, made of random numbers."""

from __future__ import annotations

import numpy as np

from emotion_train.evaluation.metrics import FloatArray
from emotion_train.evaluation.predictions import SetPredictions

SHARE_C = np.array([0.3, 0.1, 0.03, 0.01])  # of the posts that have each label


def ids(rows: int) -> list[str]:
    return [f"post {row}" for row in range(rows)]


def scored(rows: int, seed: int, share_C: FloatArray = SHARE_C, knows: float = 1.5) -> SetPredictions:
    """Posts whose probabilities know something of their labels, each label on its own scale."""
    generator = np.random.default_rng(seed)
    truth_NC = generator.random((rows, len(share_C))) < share_C
    logit_NC = generator.normal(size=truth_NC.shape) + knows * truth_NC
    logit_NC += np.linspace(-3, 1, len(share_C))
    return SetPredictions.of(ids(rows), truth_NC, 1 / (1 + np.exp(-logit_NC)))
