"""Posts that were trained on are told, left out of what is quoted, and take the check mark away."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import f1_score

from emotion_train.evaluation.floors import TFIDF
from emotion_train.evaluation.metrics import confusion
from emotion_train.evaluation.predictions import Predictions
from emotion_train.report.figures import SplitResult
from emotion_train.report.schema import Scorecard
from emotion_train.report.scorecard import Seen, build_scorecard, headline, of_the_training
from emotion_train.report.terminal import print_scorecard

LABELS = ("calm", "glee", "rage")


def scored(rows: int, skill: float = 6.0, seed: int = 0) -> SplitResult:
    """A model of that skill on posts with three labels, and a floor that knows nothing, its posts
    in another order.
    """
    draw = np.random.default_rng(seed)
    ids, truth_N = [f"posts.csv:{row + 2}" for row in range(rows)], draw.integers(0, 3, rows)
    made = []
    for right in (skill, 0.0):
        logits_NC = draw.normal(size=(rows, 3))
        logits_NC[np.arange(rows), truth_N] += right
        prob_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
        made.append(Predictions.of(ids, truth_N, prob_NC))
    model, floor = made
    return SplitResult(
        confusion(model.truth_N, model.predicted_N, 3), model, floor.take(list(reversed(range(rows))))
    )


def card(result: SplitResult, seen: Seen, remarks: tuple[str, ...] = (), **changed: Any) -> Scorecard:
    facts = {"source": "posts.csv", "run_id": "tiny", "base": "some/base", "precision": "nf4"}
    return build_scorecard(
        result,
        name="file",
        labels=LABELS,
        train_counts=None,
        seen=seen,
        remarks=remarks,
        samples=200,
        seed=1,
        **(facts | changed),
    )


def printed(one: Scorecard) -> str:
    out = io.StringIO()
    print_scorecard(one, Console(file=out, width=200, highlight=False))
    return out.getvalue()


def macro_f1(found: Predictions, rows: list[int]) -> float:
    return float(
        f1_score(
            found.truth_N[rows], found.predicted_N[rows], average="macro", labels=range(3), zero_division=0
        )
    )


def test_the_quoted_figures_are_those_of_posts_that_were_not_trained_on() -> None:
    result = scored(300, skill=1.5)
    ids = result.predictions.ids
    one = card(result, Seen(set(ids[::3]), 0.001))
    rest = [row for row in range(300) if row % 3]
    assert one.figures.macro_f1 == pytest.approx(macro_f1(result.predictions, rest))
    assert one.figures_of_all is not None
    assert one.figures_of_all.macro_f1 == pytest.approx(macro_f1(result.predictions, list(range(300))))
    assert (one.figures.rows, one.figures_of_all.rows) == (200, 300)
    assert result.tfidf is not None
    floor = {floor.name: floor.macro_f1 for floor in one.figures.floors}
    assert floor[TFIDF] == pytest.approx(macro_f1(result.tfidf, [299 - row for row in rest]))
    told = of_the_training(one)
    assert told is not None
    assert told.startswith("100 of 300 posts are in the training split: their score is too good. Macro-F1 ")
    assert f"{one.figures.macro_f1:.3f} on the 200 others" in told
    assert f"{one.figures_of_all.macro_f1:.3f} on all" in told
    assert "on 200 file posts that were not trained on " in printed(one)


@pytest.mark.parametrize(
    ("seen", "outcome", "mark"),
    [
        (Seen(), "beaten", "✓ "),
        (Seen({"posts.csv:2"}, 0.001), "beaten", "✓ "),
        (Seen({f"posts.csv:{row}" for row in range(2, 12)}, 0.001), "doubtful", "? "),
        (Seen({f"posts.csv:{row}" for row in range(2, 402)}, 0.001), "doubtful", "? "),
        (Seen(unknown="nobody knows"), "doubtful", "? "),
    ],
)
def test_only_posts_that_were_looked_up_and_not_trained_on_earn_a_check_mark(
    seen: Seen, outcome: str, mark: str
) -> None:
    one = card(scored(400), seen)
    assert headline(one)[0] == outcome
    assert printed(one).startswith(mark)
    assert ("✓" in printed(one)) == (outcome == "beaten")


@pytest.mark.parametrize(("skill", "outcome"), [(0.0, "open"), (-4.0, "not beaten")])
def test_a_model_that_does_not_beat_its_floors_is_not_called_doubtful(skill: float, outcome: str) -> None:
    assert headline(card(scored(400, skill, seed=3), Seen(unknown="nobody knows")))[0] == outcome


def test_a_file_of_training_posts_alone_says_nothing_of_others() -> None:
    result = scored(30)
    one = card(result, Seen(set(result.predictions.ids), 0.001))
    assert one.figures_of_all is None
    assert one.figures.rows == 30
    assert "30 file posts, all of which were trained on, beats the" in printed(one)
    good = "their score is too good, and says nothing about other posts."
    assert f"! All 30 posts are in the training split: {good}\n" in printed(one)


def test_what_chance_may_name_is_told_as_such() -> None:
    result = scored(2000)
    told = of_the_training(card(result, Seen(set(result.predictions.ids[:2]), 0.001)))
    assert told is not None
    assert "2 of 2,000 posts are in the training split, or look so by chance." in told
    for named in (
        card(result, Seen(set(result.predictions.ids[:3]), 0.001)),
        card(result, Seen(set(result.predictions.ids[:2]))),  # known for certain
        card(scored(29), Seen({"posts.csv:2"}, 0.001)),  # one of few is no chance
    ):
        told = of_the_training(named)
        assert told is not None
        assert "their score is too good" in told


def test_a_clean_file_and_one_that_could_not_be_looked_up_are_told_apart() -> None:
    assert "  None of the 30 posts is in the training split.\n" in printed(card(scored(30), Seen()))
    assert "\n! nobody knows\n" in printed(card(scored(30), Seen(unknown="nobody knows")))


def test_absent_labels_and_remarks_are_told_and_kept() -> None:
    result = scored(200)
    first = [row for row in range(200) if result.predictions.truth_N[row] != 2]
    taken = result.predictions.take(first)
    one = card(
        SplitResult(confusion(taken.truth_N, taken.predicted_N, 3), taken), Seen(), remarks=("No floor.",)
    )
    assert "! No floor.\n" in printed(one)
    assert "! Labels without a file post, which count 0 in macro-F1: rage.\n" in printed(one)
    assert one.warnings[:2] == ("No floor.", "Labels without a file post, which count 0 in macro-F1: rage.")
    assert Scorecard.model_validate_json(one.to_bytes()) == one


def test_a_card_of_an_earlier_version_is_read_and_printed() -> None:
    written = json.loads(card(scored(200), Seen()).to_bytes())
    for name in ("trained_on", "not_looked_up", "figures_of_all", "warnings"):
        del written[name]
    old = Scorecard.model_validate_json(json.dumps(written))
    assert old.trained_on is None
    assert of_the_training(old) is None
    assert "Macro-F1" in printed(old)
