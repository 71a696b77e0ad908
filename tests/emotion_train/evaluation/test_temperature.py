"""The temperature: what was planted comes back, scikit-learn finds the same, and it is kept only
where posts that did not choose it gain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.metrics import FloatArray, log_loss
from emotion_train.evaluation.predictions import AnyPredictions, Predictions, SetPredictions
from emotion_train.evaluation.temperature import (
    COLDEST,
    FEWEST,
    best_temperature,
    divided,
    fit_temperature,
    logits,
    losses,
    probabilities,
    targets_of,
    temper,
)
from emotion_train.evaluation.thresholds import folds_of
from tests.helpers.scored_sets import ids

ROWS = 4000


def too_sure(kind: TargetKind, planted: Any, rows: int = ROWS, seed: int = 0) -> AnyPredictions:
    """Posts whose labels are drawn by probabilities of logits z, and predictions by logits
    planted · z.
    """
    generator = np.random.default_rng(seed)
    logit_NC = 1.5 * generator.normal(size=(rows, 4))
    chance_NC = probabilities(logit_NC, kind, np.float64)
    said_NC = probabilities(logit_NC * planted, kind)
    if kind == "several":
        return SetPredictions.of(ids(rows), generator.random(chance_NC.shape) < chance_NC, said_NC)
    votes_NC = generator.multinomial(1 if kind == "one" else 20, chance_NC)
    shares_NC = votes_NC / votes_NC.sum(axis=1, keepdims=True) if kind == "shares" else None
    return Predictions.of(ids(rows), votes_NC.argmax(axis=1), said_NC, shares_NC=shares_NC)


@pytest.mark.parametrize(
    ("kind", "planted"), [("one", 2.5), ("shares", 2.5), ("one", 0.4), ("several", (2.5, 0.5, 1.7, 4.0))]
)
def test_a_planted_temperature_comes_back_within_3_percent(kind: TargetKind, planted: Any) -> None:
    posts = too_sure(kind, np.asarray(planted), rows=20_000)
    found = temper(posts)
    assert found.temperature is not None
    np.testing.assert_allclose(found.temperature, np.atleast_1d(planted), rtol=0.03)
    assert all(one == float(f"{one:.3g}") for one in found.temperature)
    assert 0 < found.gain.low < found.gain.difference < found.gain.high
    # and the posts have the probabilities that their labels were drawn by
    again = temper(type(posts)(**vars(posts) | {"prob_NC": divided(posts.prob_NC, found.temperature, kind)}))
    assert again.temperature is None or np.abs(np.log(again.temperature)).max() < 0.03


class _Says:
    """A fitted classifier with these probabilities of posts 0, 1, 2 …"""

    def __init__(self, prob_NC: FloatArray) -> None:
        self.prob_NC = prob_NC
        self.classes_ = np.arange(prob_NC.shape[1])
        self._estimator_type = "classifier"

    def fit(self, *_: Any) -> _Says:
        return self

    def predict(self, rows_N1: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self.predict_proba(rows_N1).argmax(axis=1), np.int64)

    def predict_proba(self, rows_N1: NDArray[np.int64]) -> FloatArray:
        return self.prob_NC[np.asarray(rows_N1)[:, 0]]

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            "classifier", TargetTags(required=True), None, ClassifierTags(), None, input_tags=InputTags()
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"prob_NC": self.prob_NC}


def of_scikit_learn(
    prob_NC: FloatArray, truth_N: NDArray[np.int64], weight_N: FloatArray | None = None
) -> float:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    judge = CalibratedClassifierCV(FrozenEstimator(_Says(prob_NC)), method="temperature")
    judge.fit(np.arange(len(truth_N))[:, None], truth_N, sample_weight=weight_N)
    return 1 / float(judge.calibrated_classifiers_[0].calibrators[0].beta_)


@pytest.mark.filterwarnings("ignore:Since FrozenEstimator does not appear to accept sample_weight")
def test_scikit_learn_finds_the_same_temperature() -> None:
    posts = too_sure("one", 2.5)
    assert isinstance(posts, Predictions)
    prob_NC, truth_NC = posts.prob_NC.astype(np.float64), targets_of(posts)
    logit_NC = logits(posts.prob_NC, "one")
    judged = of_scikit_learn(prob_NC, posts.truth_N.astype(np.int64))
    assert best_temperature(logit_NC, truth_NC, "one", more=0) == pytest.approx(judged, rel=1e-5)
    # one post more: each post once more with every label, so light that all of these weigh 1
    light = np.full(4 * ROWS, 1 / (4 * ROWS))
    judged = of_scikit_learn(
        np.tile(prob_NC, (5, 1)),
        np.concatenate([posts.truth_N, np.repeat(np.arange(4), ROWS)]).astype(np.int64),
        np.concatenate([np.ones(ROWS), light]),
    )
    assert best_temperature(logit_NC, truth_NC, "one") == pytest.approx(judged, rel=1e-5)
    assert fit_temperature(logit_NC, truth_NC, "one") == pytest.approx(judged, rel=2e-3)


def test_scikit_learn_finds_the_same_temperature_of_each_of_several_labels() -> None:
    posts = too_sure("several", np.array([2.5, 0.5, 1.0, 4.0]))
    logit_NC, truth_NC = logits(posts.prob_NC, "several"), targets_of(posts)
    found_C = best_temperature(logit_NC, truth_NC, "several", more=0)
    for label in range(4):
        # a sigmoid is a softmax of half the logit and minus that
        pair_N2 = probabilities(np.stack([-logit_NC[:, label], logit_NC[:, label]], 1) / 2, "one", np.float64)
        judged = of_scikit_learn(pair_N2, truth_NC[:, label].astype(np.int64))
        assert found_C[label] == pytest.approx(judged, rel=1e-4)


def test_posts_are_judged_by_the_temperature_of_the_other_folds() -> None:
    posts = too_sure("one", 2.5, rows=300)
    found, fold_N = temper(posts), folds_of(posts.ids, 5)
    logit_NC, truth_NC = logits(posts.prob_NC, "one"), targets_of(posts)
    temperatures = set()
    for fold in range(5):
        others_N = fold_N != fold
        own = fit_temperature(logit_NC[others_N], truth_NC[others_N], "one")
        temperatures.add(float(own[0]))
        np.testing.assert_array_equal(
            found.held_out_NC[~others_N], divided(posts.prob_NC[~others_N], own, "one")
        )
    assert len(temperatures) > 1
    assert isinstance(posts, Predictions)
    gain = log_loss(posts.prob_NC, posts.truth_N) - log_loss(found.held_out_NC, posts.truth_N)
    assert found.gain.difference == pytest.approx(gain)
    # the interval is that of a mean
    gained_N = (losses(posts.prob_NC, truth_NC, "one") - losses(found.held_out_NC, truth_NC, "one"))[:, 0]
    error = gained_N.std() / np.sqrt(len(gained_N))
    assert found.gain.low == pytest.approx(gain - 1.96 * error, abs=0.3 * error)
    assert found.gain.high == pytest.approx(gain + 1.96 * error, abs=0.3 * error)


@pytest.mark.parametrize("kind", ["one", "shares", "several"])
def test_chances_need_no_temperature(kind: TargetKind) -> None:
    posts = too_sure(kind, 1.0, rows=3000, seed=5)
    found = temper(posts)
    assert found.temperature is None
    assert found.gain.low <= 0
    assert found.held_out_NC is posts.prob_NC


def test_few_posts_choose_no_temperature() -> None:
    assert temper(too_sure("one", 4.0, rows=FEWEST - 1)).temperature is None
    assert temper(too_sure("one", 4.0, rows=10 * FEWEST)).temperature is not None
    assert temper(too_sure("one", 4.0, rows=1)).temperature is None


def test_of_several_labels_each_is_kept_or_not() -> None:
    posts = too_sure("several", np.array([1.0, 1.0, 3.0, 1.0]), seed=2)
    found = temper(posts)
    assert found.temperature is not None
    assert found.temperature[2] == pytest.approx(3, rel=0.06)
    assert [found.temperature[label] for label in (0, 1, 3)] == [1.0] * 3
    same = [label for label in range(4) if label != 2]
    np.testing.assert_array_equal(found.held_out_NC[:, same], posts.prob_NC[:, same])
    assert found.gain.difference == pytest.approx(
        (
            losses(posts.prob_NC, targets_of(posts), "several")
            - losses(found.held_out_NC, targets_of(posts), "several")
        ).mean()
    )


def test_a_label_of_few_posts_lies_near_the_temperature_of_all() -> None:
    posts = too_sure("several", 2.0, rows=2000)
    logit_NC, truth_NC = logits(posts.prob_NC, "several"), targets_of(posts)
    truth_NC[:, 0] = 0
    truth_NC[:5, 0] = 1
    own_C = best_temperature(logit_NC, truth_NC, "several")
    common = best_temperature(logit_NC.reshape(-1, 1), truth_NC.reshape(-1, 1), "several")[0]
    found_C = fit_temperature(logit_NC, truth_NC, "several")
    assert found_C[0] == pytest.approx(common * (own_C[0] / common) ** (5 / 15), rel=5e-3)
    truth_NC[:, 0] = 0
    common = best_temperature(logit_NC.reshape(-1, 1), truth_NC.reshape(-1, 1), "several")[0]
    assert fit_temperature(logit_NC, truth_NC, "several")[0] == pytest.approx(common, rel=5e-3)


def test_posts_that_are_all_right_ask_for_no_boundless_certainty() -> None:
    truth_N = np.arange(200) % 4
    prob_NC = np.where(np.eye(4)[truth_N] > 0, 0.7, 0.1)
    found = temper(Predictions.of(ids(200), truth_N, prob_NC))
    assert found.temperature is not None
    assert found.temperature[0] > 2 * COLDEST
    sure = divided(prob_NC.astype(np.float32), found.temperature, "one").max()
    assert 0.99 < sure < 0.999  # one post of 201 is wrong three times out of four


@pytest.mark.parametrize("kind", ["one", "several"])
def test_probabilities_of_0_and_1_stay_numbers_and_raw_ones_come_back(kind: TargetKind) -> None:
    edge_NC = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    assert np.isfinite(divided(edge_NC, 2.5, kind)).all()
    assert np.isfinite(losses(edge_NC, 1 - edge_NC.astype(np.float64), kind)).all()
    logit_NC = np.random.default_rng(0).normal(size=(500, 3)) * 3
    temperature = np.array([2.5, 0.7, 1.0]) if kind == "several" else 2.5
    published_NC = probabilities(logit_NC / temperature, kind)
    np.testing.assert_allclose(
        divided(published_NC, 1 / np.asarray(temperature), kind), probabilities(logit_NC, kind), atol=1e-6
    )
