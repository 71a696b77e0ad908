"""The report of posts that have shares of labels: figures on the largest share, and the distance of
the probabilities from the shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import rel_entr

from emotion_train.evaluation.predictions import Inconsistent, Predictions
from emotion_train.report.card_lines import card_lines
from emotion_train.report.figures import SplitResult, split_figures
from emotion_train.report.notes import notes
from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report
from tests.emotion_train.report.test_report import of_one_answer, parsed, predictions, printed, report, result


def shared(rows: int = 400, seed: int = 0, one_hot: bool = False) -> Predictions:
    """What a model says of posts with shares by three annotators, or by one."""
    model = predictions(rows, seed=seed)
    draw = np.random.default_rng(seed)
    votes_N3 = np.where(draw.random((rows, 3)) < 0.3, draw.integers(0, 5, (rows, 3)), model.truth_N[:, None])
    shares_NC = np.eye(5)[model.truth_N] if one_hot else np.eye(5)[votes_N3].mean(axis=1)
    return Predictions.of(model.ids, shares_NC.argmax(axis=1), model.prob_NC, shares_NC=shares_NC)


def made() -> Report:
    return report({"test": result(shared()), "validation": result(shared(seed=3))})


def test_figures_are_on_the_largest_share_and_distances_those_of_scipy() -> None:
    one, model = made(), shared()
    figures = of_one_answer(one)
    largest = Predictions.of(model.ids, model.truth_N, model.prob_NC)
    of_one = of_one_answer(report({"test": result(largest)}))
    assert one.targets == "shares"
    assert figures.confusion == of_one.confusion
    assert (figures.macro_f1, figures.accuracy) == (of_one.macro_f1, of_one.accuracy)
    assert model.shares_NC is not None
    shares_NC, prob_NC = model.shares_NC.astype(float), model.prob_NC.astype(float)
    assert figures.distance is not None
    assert figures.distance.mean_kl == pytest.approx(rel_entr(shares_NC, prob_NC).sum(axis=1).mean())
    assert figures.distance.total_variation == pytest.approx(
        np.abs(shares_NC - prob_NC).sum(axis=1).mean() / 2
    )
    assert figures.log_loss == pytest.approx(-(shares_NC * np.log(prob_NC)).sum(axis=1).mean())
    sums_C = np.array(one.dataset.label_counts["train"])
    prior_C = (sums_C + 0.2) / (sums_C.sum() + 1)
    assert figures.distance.mean_kl_of_prior == pytest.approx(rel_entr(shares_NC, prior_C).sum(axis=1).mean())


def test_a_table_of_one_label_as_shares_has_the_figures_of_one_label() -> None:
    as_shares = of_one_answer(report({"test": result(shared(one_hot=True))}))
    of_one = of_one_answer(report({"test": result(predictions())}))
    same = {"distance", "log_loss"}
    assert as_shares.model_dump(exclude=same) == of_one.model_dump(exclude=same)
    assert as_shares.log_loss == pytest.approx(of_one.log_loss)
    assert as_shares.distance is not None
    assert as_shares.distance.mean_kl == pytest.approx(of_one.log_loss)


def test_sums_of_shares_that_differ_from_the_index_stop_the_report() -> None:
    found = result(shared())
    sums = found.label_counts
    known: dict[str, Any] = {"train": sums, "test": [sums[0] - 0.5, sums[1] + 0.5, *sums[2:]]}
    with pytest.raises(Inconsistent, match="in the index"):
        split_figures("test", found, [f"label {i}" for i in range(5)], known, 100, 1)


def test_page_terminal_and_card_say_how_far_the_probabilities_are_from_the_shares() -> None:
    one = made()
    assert Report.model_validate_json(one.to_bytes()) == one
    (told,) = notes("test", one.splits["test"])
    page = " ".join(parsed(render_html(one)).text.split())
    for shown in (page, printed(one, 300), "\n".join(card_lines(one))):
        assert told in shown
        assert "KL divergence" in shown
    assert "How far from the shares?" in page
    assert f"{one.dataset.label_counts['train'][0]:,.1f}" in page


def test_a_result_on_some_posts_keeps_their_shares() -> None:
    whole = result(shared())
    assert isinstance(whole, SplitResult)
    some = whole.take([3, 5, 7])
    assert some.targets == "shares"
    assert sum(some.label_counts) == pytest.approx(3)
