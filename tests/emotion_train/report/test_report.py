"""The report's figures against scikit-learn, its honesty, and pages that survive hostile labels."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn import metrics as sk
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from emotion_train.config import ReportSection
from emotion_train.data.lengths import Cut, Lengths, recorded
from emotion_train.evaluation import floors
from emotion_train.evaluation.floors import MAJORITY, TFIDF, majority_floor, tfidf_floor
from emotion_train.evaluation.metrics import confusion
from emotion_train.evaluation.predictions import (
    Inconsistent,
    Predictions,
    join_predictions,
    predictions_from_parquet,
    predictions_key,
    predictions_to_parquet,
)
from emotion_train.model.loss import class_weights
from emotion_train.report.advice import next_steps
from emotion_train.report.figures import (
    AnyResult,
    Measured,
    SplitResult,
    build_report,
    cut_sentences,
    decisive,
    verdict,
)
from emotion_train.report.pages import render_html
from emotion_train.report.plots import nice_ticks
from emotion_train.report.schema import Dataset, Evaluation, Floor, Identity, Report, SplitFigures
from emotion_train.report.terminal import print_report
from emotion_train.report.units import dollars, duration, memory, round_up, short_count, signed

HOSTILE = "<script>alert('\"&')</script>"

NAMES = [f"label {i}" for i in range(10)]


def predictions(rows: int = 400, classes: int = 5, skill: float = 2.0, seed: int = 0) -> Predictions:
    """Skewed labels and a softmax whose true logit is `skill` higher; the same seed gives the same
    truth for any skill.
    """
    generator = np.random.default_rng(seed)
    share_C = 1 / np.arange(1, classes + 1)
    truth_N = generator.choice(classes, rows, p=share_C / share_C.sum())
    logits_NC = generator.normal(size=(rows, classes))
    logits_NC[np.arange(rows), truth_N] += skill
    prob_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    return Predictions.of([f"post-{row:05d}" for row in range(rows)], truth_N, prob_NC)


def result(model: Predictions, tfidf: Predictions | None = None) -> SplitResult:
    return SplitResult(confusion(model.truth_N, model.predicted_N, model.prob_NC.shape[1]), model, tfidf)


def report(
    splits: Mapping[str, AnyResult],
    labels: list[str] | None = None,
    evaluations: int = 3,
    cuts: dict[str, Cut] | None = None,
    **section: Any,
) -> Report:
    first = next(iter(splits.values())).predictions
    classes = first.prob_NC.shape[1]
    rows = {"train": 10 * len(first.ids), **{name: len(one.predictions.ids) for name, one in splits.items()}}
    counts = {name: tuple(one.label_counts) for name, one in splits.items()}
    counts["train"] = tuple(10 * count for count in next(iter(counts.values())))
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return build_report(
        labels=labels or [f"label {i}" for i in range(classes)],
        splits=splits,
        history=[
            Evaluation(
                step=100 * i, epoch=i / 2, train_loss=2 / i, macro_f1=0.3 + 0.1 * i, learning_rate=1e-4
            )
            for i in range(1, evaluations + 1)
        ],
        best_step=100 * evaluations,
        dataset=Dataset(
            rows=rows,
            label_counts=counts,
            cleaning={"source": "posts.csv", "seed": 1},
        ),
        measured=Measured(
            posts=12_000,
            real_tokens=210_000,
            computed_tokens=280_000,
            train_seconds=40.0,
            evaluation_seconds=3.0,
            wall_seconds=60.0,
            saves=4,
            stall_seconds=0.2,
            upload_seconds=6.0,
            peak_memory_bytes=3 * 2**30,
            memory_kind="GPU",
        ),
        identity=Identity(
            run_id="run-1",
            config={"train": {"epochs": 3}},
            config_sha256="c" * 64,
            index_sha256="i" * 64,
            data_url="s3://team/emotions",
            base="some/base",
            precision="nf4",
            versions={"torch": "2"},
            git_commit=None,
            device="GPU",
            world_size=2,
            started_utc=when,
            ended_utc=when,
        ),
        settings=ReportSection(bootstrap_samples=200, **section),
        seed=1,
        cuts=cuts,
    )


def of_one_answer(written: Report, split: str = "test") -> SplitFigures:
    """The figures of a split whose posts are answered with one label."""
    figures = written.splits[split]
    assert isinstance(figures, SplitFigures)
    return figures


class Wellformed(HTMLParser):
    """Raises on a tag that is not closed in order; collects tags, attributes and text."""

    VOID = frozenset({"meta", "br", "rect", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Wellformed:
    parser = Wellformed()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def printed(written: Report, width: int = 120) -> str:
    """What a terminal of that width shows."""
    page = io.StringIO()
    print_report(written, Console(file=page, width=width))
    return page.getvalue()


# ---- figures


def test_figures_are_those_of_scikit_learn() -> None:
    model = predictions()
    split = of_one_answer(report({"test": result(model)}))
    truth_N, predicted_N = model.truth_N, model.predicted_N
    assert split.macro_f1 == pytest.approx(sk.f1_score(truth_N, predicted_N, average="macro"))
    assert split.weighted_f1 == pytest.approx(sk.f1_score(truth_N, predicted_N, average="weighted"))
    assert split.accuracy == pytest.approx(sk.accuracy_score(truth_N, predicted_N))
    assert split.log_loss == pytest.approx(sk.log_loss(truth_N, model.prob_NC), rel=1e-5)
    assert split.macro_f1_low < split.macro_f1 < split.macro_f1_high
    np.testing.assert_array_equal(split.confusion, sk.confusion_matrix(truth_N, predicted_N))
    np.testing.assert_allclose(
        [one.f1 for one in split.per_label], sk.f1_score(truth_N, predicted_N, average=None)
    )


def test_speed_and_cost_are_derived_from_clock_and_counters() -> None:
    speed = report({"test": result(predictions())}, usd_per_hour=6.0).speed
    assert (speed.posts_per_second, speed.tokens_per_second) == (300, 5250)
    assert speed.padding_share == pytest.approx(0.25)
    assert speed.usd == pytest.approx(0.1)
    assert report({"test": result(predictions())}).speed.usd is None


def test_report_survives_its_file() -> None:
    written = report({"test": result(predictions()), "validation": result(predictions(seed=3))})
    assert Report.model_validate_json(written.to_bytes()) == written
    assert (
        written.to_bytes()
        == report({"test": result(predictions()), "validation": result(predictions(seed=3))}).to_bytes()
    )


def test_test_split_is_quoted_before_validation() -> None:
    both = report({"validation": result(predictions(seed=3)), "test": result(predictions())})
    assert both.headline == "test"
    assert not any("no test split" in warning for warning in both.warnings)
    alone = report({"validation": result(predictions())})
    assert alone.headline == "validation"
    assert any("no test split" in warning for warning in alone.warnings)


def test_a_loss_that_is_not_finite_does_not_stop_the_report() -> None:
    assert (
        Evaluation(step=1, epoch=1, train_loss=float("nan"), macro_f1=0.1, learning_rate=0.1).train_loss
        is None
    )


# ---- posts that were cut


def cut_at(max_length: int, long: int) -> Cut:
    """Of 400 posts of 20 tokens, `long` of 100."""
    return Cut.of(Lengths.of([20] * (400 - long) + [100] * long), max_length)


@pytest.mark.parametrize(("long", "warned"), [(0, False), (20, False), (21, True)])
def test_more_than_5_percent_of_cut_posts_are_a_warning(long: int, warned: bool) -> None:
    both = report({"test": result(predictions())}, cuts={"train": cut_at(64, 3), "test": cut_at(64, long)})
    (*_, last) = both.warnings
    assert ("cuts" in last) == warned
    if warned:
        lost = 21 * 36 / (379 * 20 + 21 * 100)
        assert last == (
            f"data.max_length=64 cuts 5.2 % of the 400 test posts and {100 * lost:.1f} % of their tokens (20"
            " tokens at the median, 100 at most); data.max_length=100 would cut at most 2 %."
        )


def test_what_is_cut_is_on_every_page_and_survives_its_file() -> None:
    cuts = {"train": cut_at(64, 3), "test": cut_at(64, 30)}
    made = report({"test": result(predictions())}, cuts=cuts)
    assert Report.model_validate_json(made.to_bytes()) == made
    assert made.cuts == cuts
    page = " ".join(parsed(render_html(made)).text.split())
    assert "Lengths in tokens" in page
    assert "cuts 7.5 % of the 400 test posts" in page
    out = io.StringIO()
    print_report(made, Console(file=out, width=200))
    shown = out.getvalue()
    both = {"train": cut_at(64, 40), "test": cut_at(64, 30)}
    warnings = report({"test": result(predictions())}, cuts=both).warnings
    told = [one for one in warnings if "max_length" in one]
    assert ["cuts 10.0 % of the 400 training posts" in one for one in told] == [True]  # once is enough
    assert "7.5 % of the test posts" in shown
    assert "! data.max_length=64 cuts 7.5 % of the 400 test posts" in shown
    # of 400 posts, 3 are below one in 100 and "training" is a sample of more
    assert cut_sentences(made)[0].startswith(
        "data.max_length=64 cuts 0.8 % of the 400 training posts looked at"
    )


def test_a_report_of_an_earlier_version_is_shown_without_lengths() -> None:
    made = report({"test": result(predictions())}, cuts={"test": cut_at(64, 30)})
    document = json.loads(made.to_bytes())
    del document["cuts"]
    old = Report.model_validate(document)
    assert old.cuts == {}
    assert cut_sentences(old) == []
    assert "Lengths in tokens" not in render_html(old)
    print_report(old, Console(file=io.StringIO()))


def test_the_page_leaves_out_what_the_index_keeps_for_estimates() -> None:
    made = report({"test": result(predictions())})
    kept = recorded(Lengths.of([1, 2]), Lengths.of([1, 2]))
    made = made.model_copy(
        update={"dataset": made.dataset.model_copy(update={"cleaning": {"format": "csv", **kept}})}
    )
    page = parsed(render_html(made)).text
    assert "characters longest" in page
    assert "bytes p" not in page


# ---- disagreement


def test_counts_that_differ_from_the_predictions_stop_the_report() -> None:
    good = result(predictions())
    counts_CC = good.counts.copy()
    counts_CC[0, 1] += 1
    with pytest.raises(Inconsistent, match=r"401 posts and the predictions are 400; label 0 predicted as 1"):
        report({"test": SplitResult(counts_CC, good.predictions)})


def test_a_post_that_is_predicted_twice_stops_the_report() -> None:
    once = predictions()
    twice = Predictions.of(("post-00001", *once.ids[1:]), once.truth_N, once.prob_NC)
    with pytest.raises(Inconsistent, match="400 predictions of 399 posts"):
        report({"test": result(twice)})


def test_other_label_counts_than_the_index_has_stop_the_report() -> None:
    model, other = result(predictions()), result(predictions(seed=5))
    good = report({"test": model})
    with pytest.raises(Inconsistent, match="in the index"):
        build_report(
            labels=good.labels,
            splits={"test": other},
            history=[],
            best_step=None,
            dataset=good.dataset,
            measured=Measured(1, 1, 1, 1.0, 1.0, 1.0, 1, "RSS"),
            identity=good.identity,
            settings=ReportSection(bootstrap_samples=100),
            seed=0,
        )


def test_floor_predictions_of_other_posts_stop_the_report() -> None:
    model = predictions()
    with pytest.raises(Inconsistent, match="missing: 'post-00399'"):
        report({"test": result(model, model.take(range(399)))})


@pytest.mark.parametrize("prob", [[0.5, 0.4], [float("nan"), 1.0], [0.9, 0.1]])
def test_probabilities_that_do_not_fit_their_prediction_are_refused(prob: list[float]) -> None:
    with pytest.raises(Inconsistent, match=r"1 of 1 posts .* 'a'"):
        Predictions.of(["a"], [0], [prob], [1])


def test_tied_probabilities_allow_either_prediction() -> None:
    assert Predictions.of(["a"], [0], [[0.5, 0.5]], [1]).predicted_N.tolist() == [1]


# ---- verdict


def test_a_model_above_the_floors_beats_the_strongest() -> None:
    model = predictions(skill=4)
    verdict = report({"test": result(model, predictions(skill=1))}).verdict
    assert verdict.outcome == "beaten"
    assert f"beats the {TFIDF} floor" in verdict.sentence


def test_a_model_below_the_floor_is_said_to_be_worse() -> None:
    found = report({"test": result(predictions(skill=1), predictions(skill=4))})
    assert found.verdict.outcome == "not beaten"
    assert f"does not beat the {TFIDF} floor" in found.verdict.sentence
    assert "worse by" in found.verdict.sentence
    assert any(warning.startswith(f"The model does not beat the {TFIDF} floor") for warning in found.warnings)


def test_the_page_of_many_labels_shows_those_that_most_posts_have_in_its_square() -> None:
    found = report({"test": result(predictions(3000, 300, skill=1.0))})
    page = render_html(found)
    assert all(label in page for label in found.labels)  # the table has them all
    assert "Shown are the 32 most frequent labels." in page
    assert page.count('class="heat"') <= 32**2
    assert len(page) < 1_000_000


def test_a_model_equal_to_the_floor_is_not_said_to_beat_it() -> None:
    found = report({"test": result(predictions(), predictions())})
    assert found.verdict.outcome == "open"
    assert "cannot be told apart" in found.verdict.sentence
    assert any("may be chance" in warning for warning in found.warnings)


def test_a_lead_whose_interval_holds_zero_is_open() -> None:
    scores: dict[str, Any] = {"name": TFIDF, "macro_f1": 0.5, "weighted_f1": 0.5, "accuracy": 0.5}
    assert Floor(**scores, difference=0.01, difference_low=-0.01, difference_high=0.03).outcome == "open"
    assert Floor(**scores, difference=-0.01, difference_low=-0.03, difference_high=0.01).outcome == "open"
    assert Floor(**scores, difference=0.01, difference_low=0.005, difference_high=0.03).outcome == "beaten"


def test_within_noise_of_a_floor_there_is_no_check_mark() -> None:
    """Also of a floor that is not the strongest, and of a lead that a few more posts might make."""
    lead = report({"test": result(predictions(60, skill=2.0), predictions(60, skill=1.9, seed=0))})
    worse = report({"test": result(predictions(skill=1), predictions(skill=4))})
    for found in (lead, worse):
        assert found.verdict.outcome != "beaten"
        assert str(found.verdict.advice).startswith("Try next: ")
        assert "✓" not in printed(found) + render_html(found)
    better = report({"test": result(predictions(skill=4), predictions(skill=1))})
    assert better.verdict.advice is None
    assert "✓" in printed(better)


def floor_of(low: float, difference: float, high: float, macro_f1: float = 0.5) -> Floor:
    scores: dict[str, Any] = {"name": f"floor {macro_f1}", "weighted_f1": 0.5, "accuracy": 0.5}
    return Floor(**scores, macro_f1=macro_f1, difference=difference, difference_low=low, difference_high=high)


def test_a_weaker_floor_that_is_not_beaten_for_certain_takes_the_check_mark() -> None:
    split = report({"test": result(predictions())}).splits["test"]
    floors = (floor_of(0.01, 0.1, 0.2, 0.55), floor_of(-0.01, 0.15, 0.3, 0.5))
    assert verdict("test", split.model_copy(update={"floors": floors})).outcome == "open"
    assert decisive((floor_of(0.1, 0.2, 0.3, 0.4), floors[0])) == floors[0]


@pytest.mark.parametrize(
    ("low", "difference", "posts"),
    [
        (-0.02, 0.033, 930),  # 360 * (0.053 / 0.033)^2
        (-0.02, 0.001, None),  # 160,000 posts
        (-0.05, -0.01, None),  # no lead
    ],
)
def test_more_posts_are_proposed_where_they_would_make_a_lead_certain(
    low: float, difference: float, posts: int | None
) -> None:
    figures = report({"test": result(predictions())}).splits["test"]
    floors = (floor_of(low, difference, 0.09),)
    advice = str(next_steps(figures.model_copy(update={"rows": 360, "floors": floors}), (), CONFIG))
    assert ("more held-out posts (" in advice) == (posts is not None)
    assert posts is None or f"({posts} would show such a lead)" in advice


def test_always_guessing_the_majority_is_no_achievement() -> None:
    model = predictions()
    lazy_NC = np.tile(np.array([0.9, 0.025, 0.025, 0.025, 0.025]), (len(model.ids), 1))
    found = report({"test": result(Predictions.of(model.ids, model.truth_N, lazy_NC))})
    assert found.verdict.outcome == "open"
    assert MAJORITY in found.verdict.sentence
    assert "Labels the model never predicts: label 1, label 2, label 3, label 4." in found.warnings


# ---- what to try next


def split_against(outcome: str, floor: str = MAJORITY) -> SplitFigures:
    """Figures of a model that stands so against that floor."""
    figures = of_one_answer(report({"test": result(predictions(skill=3), predictions(skill=0))}))
    low, high = {"beaten": (0.1, 0.2), "open": (-0.1, 0.1), "not beaten": (-0.2, -0.1)}[outcome]
    ends = {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}
    floors = [one.model_copy(update=ends) if one.name == floor else one for one in figures.floors]
    return figures.model_copy(update={"floors": tuple(floors)})


def losses(*values: float, steps: int = 500) -> list[Evaluation]:
    told: dict[str, Any] = {"epoch": 1, "macro_f1": 0.1, "learning_rate": 1e-4}
    return [Evaluation(step=steps * i, train_loss=value, **told) for i, value in enumerate(values, 1)]


CONFIG: dict[str, Any] = {
    "train": {"learning_rate": 2e-4, "epochs": 3},
    "lora": {"targets": ["q_proj"]},
    "loss": {"class_weights": "none"},
}


@pytest.mark.parametrize("outcome", ["open", "not beaten"])
@pytest.mark.parametrize(
    ("history", "first"),
    [
        (losses(2.0, 1.99), "train.learning_rate=0.001 (the training loss hardly fell, from 2.00 to 1.99)"),
        (losses(2.0, 2.5), "train.learning_rate=4e-05 (the training loss rose from 2.00 to 2.50)"),
        (losses(2.0, 0.5), "fewer epochs or a smaller lora.r (the training loss fell from 2.00 to 0.50, and"),
        (
            losses(2.0, steps=20),
            "train.epochs=6 (there were only 20 steps); labels that a person",
        ),
        ([], "train.epochs=6; labels that a person"),
    ],
)
def test_a_model_that_is_no_better_than_chance_is_told_what_to_try(
    outcome: str, history: list[Evaluation], first: str
) -> None:
    advice = next_steps(split_against(outcome), history, CONFIG, (900, 200))
    assert advice is not None
    assert advice.startswith(f"Try next: {first}")


def test_a_run_that_max_steps_ended_is_told_to_take_more_of_these() -> None:
    ended = CONFIG | {"train": CONFIG["train"] | {"max_steps": 20}}
    for history in (losses(2.0, steps=20), []):
        advice = str(next_steps(split_against("open"), history, ended, (900, 200)))
        assert "train.max_steps=40" in advice
        assert "train.epochs" not in advice


def test_a_model_that_beats_its_floors_is_told_nothing() -> None:
    assert next_steps(split_against("beaten"), losses(2.0, 1.99), CONFIG) is None


def test_a_model_between_the_floors_is_led_to_more_capacity() -> None:
    advice = next_steps(split_against("open", TFIDF), losses(2.0, 1.0), CONFIG, (900, 12))
    assert str(advice).endswith("; a larger model.base; lora.targets=all-linear.")
    everywhere = CONFIG | {"lora": {"targets": "all-linear"}}
    advice = next_steps(split_against("open", TFIDF), losses(2.0, 1.0), everywhere, (900, 12))
    assert str(advice).endswith("; more posts (the rarest label has 12 for training).")


def test_one_answer_for_all_posts_is_answered_by_class_weights() -> None:
    model = predictions()
    lazy_NC = np.tile(np.array([0.9, 0.025, 0.025, 0.025, 0.025]), (len(model.ids), 1))
    found = report({"test": result(Predictions.of(model.ids, model.truth_N, lazy_NC))})
    advice = str(next_steps(found.splits["test"], losses(2.0, 1.99), CONFIG))
    assert "Try next: loss.class_weights=balanced (100 % of the posts are taken for label 0); tra" in advice
    balanced = CONFIG | {"loss": {"class_weights": "balanced"}}
    assert "class_weights" not in str(next_steps(found.splits["test"], losses(2.0, 1.99), balanced))
    out = io.StringIO()
    print_report(found, Console(file=out, width=400))
    assert found.verdict.advice is not None
    assert f"→ {found.verdict.advice}" in out.getvalue()
    assert "<p>Try next: " in render_html(found)


def test_a_scorecard_s_advice_is_about_its_posts() -> None:
    assert "posts of another source are another task" in str(next_steps(split_against("open")))


def test_a_report_without_advice_stays_readable() -> None:
    written = json.loads(report({"test": result(predictions(skill=4), predictions(skill=1))}).to_bytes())
    assert written["verdict"].pop("advice") is None
    assert Report.model_validate(written).verdict.advice is None


def test_a_floor_in_another_order_is_aligned_by_id() -> None:
    model, floor = predictions(), predictions(skill=1)
    order = np.random.default_rng(0).permutation(len(model.ids)).tolist()
    assert report({"test": result(model, floor.take(order))}) == report({"test": result(model, floor)})


def test_few_and_absent_labels_are_named() -> None:
    truth_N = np.array([0] * 50 + [1] * 3)
    model = Predictions.of([str(i) for i in range(53)], truth_N, np.eye(3)[truth_N])
    found = report({"test": result(model)}, labels=["common", "rare", "absent"])
    assert "Labels without a test post, which count 0 in macro-F1: absent." in found.warnings
    assert any("rare (3)" in warning and "common" not in warning for warning in found.warnings)
    assert found.splits["test"].macro_f1 == pytest.approx(2 / 3)


def test_probabilities_that_are_too_high_are_named() -> None:
    model = predictions(skill=0)
    sharp_NC = np.where(np.arange(5) == model.predicted_N[:, None], 0.96, 0.01)
    warnings = report({"test": result(Predictions.of(model.ids, model.truth_N, sharp_NC))}).warnings
    assert any(warning.startswith("Probabilities are too high") for warning in warnings)


def test_a_missing_floor_says_why() -> None:
    def reason(**section: Any) -> str:
        return next(
            line
            for line in report({"test": result(predictions())}, **section).warnings
            if "no TF-IDF floor" in line
        )

    assert "floor_max_rows is 0" in reason(floor_max_rows=0)
    assert "4,000 training posts are more than" in reason(floor_max_rows=3999)
    assert "not fitted" in reason()


# ---- floors


def test_majority_floor_is_the_most_frequent_training_label() -> None:
    assert majority_floor([3, 9, 2], 4).tolist() == [1, 1, 1, 1]


def test_tfidf_floor_learns_words_and_emoji_and_knows_no_absent_label() -> None:
    train = [("I love this", 0), ("so lovely 😀", 0), ("I hate this", 2), ("awful 😡", 2)] * 5
    prob_NC = tfidf_floor(iter(train), ["love", "hate", "😀", "😡"], 4, seed=0)
    assert prob_NC.shape == (4, 4)
    assert prob_NC.argmax(axis=1).tolist() == [0, 2, 0, 2]
    assert (prob_NC[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(prob_NC.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(prob_NC, tfidf_floor(train, ["love", "hate", "😀", "😡"], 4, seed=0))


def test_the_floor_s_setting_is_the_best_by_scikit_learn_s_cross_validation() -> None:
    rng = np.random.default_rng(1)
    words = [[f"w{label}{n}" for n in range(6)] + [f"all{n}" for n in range(20)] for label in range(3)]
    labels_N = np.repeat(np.arange(3), [120, 40, 12])
    texts = [" ".join(rng.choice(words[label], 4)) for label in labels_N]
    features = TfidfVectorizer().fit_transform(texts)
    chosen, fold_N = floors._folds(labels_N, 3)
    assert sorted(chosen) == list(range(172))
    # each label in each fold as often, to one post
    counts = np.array([np.bincount(labels_N[chosen][fold_N == fold]) for fold in range(floors._FOLDS)])
    assert (np.ptp(counts, axis=0) <= 1).all()
    scores = []
    for c, power in floors._SETTINGS:
        predicted = np.empty(172, int)
        for fold in range(floors._FOLDS):
            fitted, held_out = chosen[fold_N != fold], chosen[fold_N == fold]
            weights_C = class_weights(np.bincount(labels_N[fitted]).tolist(), power)
            model = LinearSVC(C=c, class_weight=dict(enumerate(weights_C)), tol=1e-2, random_state=3)
            predicted[held_out] = model.fit(features[fitted], labels_N[fitted]).predict(features[held_out])
        scores.append(sk.f1_score(labels_N, predicted, average="macro", zero_division=0))
    assert len({round(score, 6) for score in scores}) > 1
    assert floors._best_setting(features, labels_N, 3) == floors._SETTINGS[int(np.argmax(scores))]


def test_tfidf_floor_of_two_labels_has_scores_that_add_up_to_1() -> None:
    train = [("so good", 0), ("so bad", 2)] * 20
    prob_NC = tfidf_floor(train, ["good", "bad"], 3, seed=0)
    assert prob_NC.argmax(1).tolist() == [0, 2]
    np.testing.assert_allclose(prob_NC.sum(1), 1, rtol=1e-6)
    assert (prob_NC[:, 1] == 0).all()


def test_tfidf_floor_of_one_label_is_certain() -> None:
    assert tfidf_floor([("a", 1), ("b", 1)], ["c"], 3, seed=0).tolist() == [[0, 1, 0]]


# ---- predictions file


def test_predictions_survive_their_file() -> None:
    model = predictions()
    back = predictions_from_parquet(predictions_to_parquet(model, NAMES))
    assert back.ids == model.ids
    for name in ("truth_N", "predicted_N", "prob_NC"):
        np.testing.assert_array_equal(getattr(back, name), getattr(model, name))
        assert getattr(back, name).dtype == getattr(model, name).dtype
    assert predictions_key("test") == "predictions_test.parquet"


def test_predictions_file_has_the_promised_columns() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = predictions()
    schema = pq.read_schema(io.BytesIO(predictions_to_parquet(model, NAMES)))
    assert schema.names == ["id", "label", "predicted", "probabilities", "label_name", "predicted_name"]
    assert [schema.field(i).type for i in range(3)] == [pa.string(), pa.int32(), pa.int32()]
    assert schema.field(3).type.value_type == pa.float32()
    texts = {key: f"text of {key}" for key in reversed(model.ids)}
    table = pq.read_table(io.BytesIO(predictions_to_parquet(model, NAMES, texts)))
    assert table["text"].to_pylist() == [f"text of {key}" for key in model.ids]
    assert table["label_name"].to_pylist() == [NAMES[label] for label in model.truth_N]
    assert table["predicted_name"].to_pylist() == [NAMES[label] for label in model.predicted_N]


@given(st.integers(1, 30), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_any_split_over_ranks_gives_the_same_file(rows: int, ranks: int, random: Random) -> None:
    model = predictions(rows)
    order = list(range(rows))
    random.shuffle(order)
    parts = [model.take(order[rank::ranks]) for rank in range(ranks)]
    expected = predictions_to_parquet(model, NAMES)
    assert predictions_to_parquet(join_predictions(parts, rows), NAMES) == expected
    assert predictions_to_parquet(join_predictions(parts, model.ids), NAMES) == expected


@pytest.mark.parametrize(
    ("rows", "expected", "says"),
    [
        ([0, 1, 1, 2], 3, "4 predictions of 3 posts for 3 posts; 1 there more than once: 'post-00001'"),
        ([0, 2], 3, "2 predictions of 2 posts for 3 posts"),
        ([0, 2], ["post-00000", "post-00001", "post-00002"], "1 missing: 'post-00001'"),
        ([0, 1, 2], ["post-00000", "post-00001"], "1 not of this split: 'post-00002'"),
        ([], 3, "no rank has handed in a prediction"),
    ],
)
def test_joining_names_what_is_missing_or_there_twice(rows: list[int], expected: Any, says: str) -> None:
    model = predictions(3)
    with pytest.raises(Inconsistent, match=says):
        join_predictions([model.take([row]) for row in rows], expected)


def test_parts_with_other_numbers_of_labels_are_refused() -> None:
    with pytest.raises(Inconsistent, match=r"\[4, 5\] labels"):
        join_predictions([predictions(3, classes=5), predictions(3, classes=4)], 6)


# ---- pages


def hostile_report() -> Report:
    return report({"test": result(predictions())}, labels=[HOSTILE, "joy & co", 'a"b', "c'd", "[red]e[/red]"])


def test_hostile_labels_stay_text() -> None:
    page = render_html(hostile_report())
    found = parsed(page)
    assert "script" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "<script" not in page
    assert HOSTILE in found.text
    assert 'a"b' in found.text


def test_page_refers_to_nothing_outside() -> None:
    page = render_html(hostile_report())
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in parsed(page).attributes}


@pytest.mark.parametrize("classes", [2, 15, 40])
def test_page_and_terminal_show_every_label(classes: int) -> None:
    written = report(
        {"test": result(predictions(800, classes)), "validation": result(predictions(300, classes, seed=2))}
    )
    text = parsed(render_html(written)).text
    shown = printed(written)
    for label in written.labels:
        assert label in text
        assert label in shown


def test_page_and_terminal_say_what_checkpoints_cost() -> None:
    written = report({"test": result(predictions())})
    for text in (parsed(render_html(written)).text, printed(written, 200)):
        assert "4, each a stall of 50.0 ms (0.5 % of the training), 6.0 s upload" in text


def test_plots_have_words_and_tables_have_heads() -> None:
    found = parsed(render_html(report({"test": result(predictions())})))
    assert found.tags.count("svg") == 4
    assert len([value for name, value in found.attributes if name == "aria-label" and value]) == 5
    assert found.tags.count("thead") == found.tags.count("table")
    assert "scope" in dict(found.attributes)


@pytest.mark.parametrize("evaluations", [0, 1, 200])
def test_page_takes_any_number_of_evaluations(evaluations: int) -> None:
    parsed(render_html(report({"test": result(predictions())}, evaluations=evaluations)))


def test_page_takes_a_flat_curve_and_a_perfect_model() -> None:
    truth_N = np.array([0, 1] * 10)
    perfect = Predictions.of([str(i) for i in range(20)], truth_N, np.eye(2)[truth_N])
    assert "There is no mistake" in parsed(render_html(report({"test": result(perfect)}, evaluations=1))).text


def test_page_says_what_the_verdict_says() -> None:
    for floor in (predictions(skill=1), predictions(skill=4), predictions()):
        written = report({"test": result(predictions(), floor)}, usd_per_hour=2.0)
        text = parsed(render_html(written)).text
        assert written.verdict.sentence in text
        for warning in written.warnings:
            assert warning in text


def test_terminal_takes_hostile_labels_as_they_are() -> None:
    shown = printed(hostile_report(), 140)
    assert HOSTILE in shown
    assert "[red]e[/red]" in shown


# ---- words


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (signed(0.1234), "+0.123"),
        (signed(-0.5), "−0.500"),
        (signed(-0.0001), "+0.000"),
        (duration(12.34), "12.3 s"),
        (duration(330), "5.5 min"),
        (duration(3570), "1 h 00 min"),
        (duration(11_520), "3 h 12 min"),
        (memory(76 * 2**30), "76.0 GiB"),
        (memory(300 * 2**20), "300 MiB"),
        (dollars(1234.5), "$1,234.50"),
        (dollars(0.0123), "$0.0123"),
        (str(round_up(1234.5)), "1300"),
        (str(round_up(0.2)), "1"),
        (short_count(999), "999"),
        (short_count(1234), "1.2k"),
        (short_count(9960), "10k"),
        (short_count(5_600_000), "5.6M"),
    ],
)
def test_numbers_are_written_for_people(found: str, expected: str) -> None:
    assert found == expected


@given(st.floats(-100, 100), st.floats(0, 100))
def test_ticks_are_round_few_and_hold_the_data(low: float, width: float) -> None:
    ticks = nice_ticks(low, low + width)
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + width - slack
    assert 2 <= len(ticks) <= 7
