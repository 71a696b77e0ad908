"""The report of posts that have several labels: figures against scikit-learn, counts that must
agree, and pages that show what a confusion matrix cannot.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console
from sklearn import metrics as sk

from emotion_train.evaluation.decision import Decision
from emotion_train.evaluation.floors import PRIOR, TFIDF
from emotion_train.evaluation.predictions import Inconsistent, SetPredictions
from emotion_train.evaluation.thresholds import cross_fit
from emotion_train.report.advice import next_steps
from emotion_train.report.card_lines import card_lines
from emotion_train.report.figures import SetResult, SplitResult, decided, split_figures
from emotion_train.report.notes import notes
from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report, Scorecard, SetFigures
from emotion_train.report.scorecard import Seen, build_scorecard, of_the_training
from emotion_train.report.terminal import print_scorecard
from tests.emotion_train.report.test_report import HOSTILE, parsed, predictions, printed, report, result
from tests.helpers.scored_sets import scored

LABELS = ["joy", "anger", "awe", "grief"]


def set_result(model: SetPredictions, chose: bool = False, tfidf: SetPredictions | None = None) -> SetResult:
    """The result of a split whose answers are those of thresholds that 400 other posts chose, or
    that these `chose`.
    """
    decision = Decision.of(model if chose else scored(400, 99), LABELS)
    made = decided(at_half(model).counts(), model, tfidf, decision, chose)
    assert isinstance(made, SetResult)
    return made


def at_half(model: SetPredictions) -> SetPredictions:
    return model.answered(model.prob_NC >= 0.5)


def both_splits() -> Report:
    test, floor = scored(500, 1), scored(500, 5, knows=0.5)
    floor = SetPredictions(test.ids, test.truth_NC, floor.prob_NC >= 0.3, floor.prob_NC)
    return report(
        {"validation": set_result(scored(400, 2), chose=True), "test": set_result(test, tfidf=floor)},
        list(LABELS),
    )


@pytest.fixture(scope="module")
def made() -> Report:
    return both_splits()


def figures(one: Report, split: str = "test") -> SetFigures:
    found = one.splits[split]
    assert isinstance(found, SetFigures)
    return found


# ---- figures


def test_figures_are_those_of_scikit_learn(made: Report) -> None:
    model, split = scored(500, 1), figures(made)
    truth_NC, answers_NC = model.truth_NC, set_result(model).predictions.predicted_NC
    posts: dict[str, Any] = {"average": "samples", "zero_division": 1}
    expected = {
        "macro_f1": sk.f1_score(truth_NC, answers_NC, average="macro", zero_division=0),
        "macro_f1_at_half": sk.f1_score(truth_NC, model.prob_NC >= 0.5, average="macro", zero_division=0),
        "micro_f1": sk.f1_score(truth_NC, answers_NC, average="micro"),
        "samples_f1": sk.f1_score(truth_NC, answers_NC, **posts),
        "jaccard": sk.jaccard_score(truth_NC, answers_NC, **posts),
        "exact_match": sk.accuracy_score(truth_NC, answers_NC),
        "mean_average_precision": sk.average_precision_score(truth_NC, model.prob_NC, average="macro"),
    }
    assert {name: getattr(split, name) for name in expected} == pytest.approx(expected)
    assert split.macro_f1_low < split.macro_f1 < split.macro_f1_high
    assert split.gain_low <= split.macro_f1 - split.macro_f1_at_half <= split.gain_high
    by_label = sk.precision_recall_fscore_support(truth_NC, answers_NC, zero_division=0)
    rows = [(one.precision, one.recall, one.f1, one.support) for one in split.per_label]
    np.testing.assert_allclose(rows, np.stack(by_label, axis=1))
    assert [one.predicted for one in split.per_label] == answers_NC.sum(axis=0).tolist()
    np.testing.assert_allclose(
        [one.average_precision for one in split.per_label],
        sk.average_precision_score(truth_NC, model.prob_NC, average=None),
    )
    assert split.without_label == (~truth_NC.any(axis=1)).sum() > 0
    assert split.without_answer == (~answers_NC.any(axis=1)).sum() > 0


def test_the_headline_of_validation_is_out_of_fold_and_that_of_test_by_the_decision(made: Report) -> None:
    model = scored(400, 2)
    truth_NC, answers_NC = model.truth_NC, cross_fit(model).predicted_NC
    split, decision = figures(made, "validation"), Decision.of(model, LABELS)
    assert split.macro_f1 == pytest.approx(sk.f1_score(truth_NC, answers_NC, average="macro"))
    assert split.macro_f1 == pytest.approx(decision.macro_f1)
    assert (split.folds, figures(made).folds) == (decision.folds, None)
    assert tuple(one.threshold for one in split.per_label) == decision.thresholds
    told = notes("validation", split)[0]
    gain = split.macro_f1 - split.macro_f1_at_half
    assert told.startswith(f"A threshold for each label gains {gain:.3f} of macro-F1 against 0.5 for all (")
    assert "each answered by thresholds that the posts of the other 4 of 5 folds chose" in told
    assert notes("test", figures(made))[0].endswith(" posts, answered by thresholds that other posts chose.")


def test_thresholds_that_gain_nothing_are_said_to_be_half() -> None:
    model = scored(60, 3)
    decision = Decision(targets="several", labels=tuple(LABELS), thresholds=(0.5,) * 4)
    half = decided(at_half(model).counts(), model, None, decision, chose=True)
    split = figures(report({"test": half}, list(LABELS)))
    assert (split.macro_f1, split.folds) == (split.macro_f1_at_half, None)
    assert notes("test", split)[0].startswith("0.5 is the threshold of every label")


def test_the_floors_are_every_label_that_is_trained_on_and_tf_idf(made: Report) -> None:
    prior, tfidf = figures(made).floors
    truth_NC, share_C = scored(500, 1).truth_NC, scored(500, 1).truth_NC.mean(axis=0)
    assert (prior.name, tfidf.name) == (PRIOR, TFIDF)
    assert prior.macro_f1 == pytest.approx((2 * share_C / (1 + share_C)).mean())
    floor_NC = scored(500, 5, knows=0.5).prob_NC >= 0.3
    assert tfidf.macro_f1 == pytest.approx(sk.f1_score(truth_NC, floor_NC, average="macro"))
    assert tfidf.jaccard == pytest.approx(
        sk.jaccard_score(truth_NC, floor_NC, average="samples", zero_division=1)
    )
    assert tfidf.difference == pytest.approx(figures(made).macro_f1 - tfidf.macro_f1)
    assert tfidf.difference_low <= tfidf.difference <= tfidf.difference_high


def test_what_is_missed_added_and_had_together_is_counted() -> None:
    truth_NC = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]], bool)
    answers_NC = np.array([[0, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 0]], bool)
    prob_NC = np.where(answers_NC, 0.9, 0.1)
    model = SetPredictions.of("abcd", truth_NC, prob_NC)
    split = figures(report({"test": SetResult(model.counts(), model)}, ["x", "y", "z"]))
    # post a misses x and y and gets z; post b misses x and gets y and z
    assert [(one.missed, one.added, one.posts) for one in split.mistaken] == [
        ("x", "z", 2),
        ("x", "y", 1),
        ("y", "z", 1),
    ]
    assert [(one.first, one.second, one.posts, one.answered) for one in split.together] == [
        ("x", "y", 1, 1),
        ("y", "z", 0, 1),
    ]


def test_a_perfect_model_misses_nothing_and_its_page_says_so() -> None:
    truth_NC = np.eye(3, dtype=bool)[[0, 1, 2] * 5]
    perfect = SetPredictions.of(map(str, range(15)), truth_NC, truth_NC.astype(float))
    split = figures(one := report({"test": SetResult(perfect.counts(), perfect)}, ["x", "y", "z"]))
    assert (split.macro_f1, split.exact_match, split.mistaken, split.together) == (1, 1, (), ())
    text = parsed(render_html(one)).text
    assert "No post misses a label and gets another" in text
    assert "No post has two labels" in text


# ---- disagreement


@pytest.mark.parametrize(
    ("what", "says"),
    [(0, "with label 2 that get it at 0.5 are"), (1, "with label 2 are"), (2, "that get label 2 at 0.5 are")],
)
def test_counts_that_differ_from_the_predictions_stop_the_report(what: int, says: str) -> None:
    good = set_result(scored(100, 1))
    counts_3C = good.counts.copy()
    counts_3C[what, 2] += 1
    with pytest.raises(Inconsistent, match=says):
        report({"test": SetResult(counts_3C, good.predictions)})


def test_other_label_counts_than_the_index_has_stop_the_report() -> None:
    model, other = scored(100, 1), scored(100, 2)
    counts = model.truth_NC.sum(axis=0).tolist()
    with pytest.raises(Inconsistent, match="in the index"):
        split_figures(
            "test", SetResult(other.counts(), other), LABELS, {"train": counts, "test": counts}, 100, 1
        )


def test_figures_of_other_targets_are_refused(made: Report) -> None:
    several = made.model_dump()
    with pytest.raises(ValidationError, match="figures are not those of targets 'one'"):
        Report.model_validate(several | {"targets": "one"})
    with pytest.raises(ValidationError, match="report/1 knows no targets 'several'"):
        Report.model_validate(several | {"schema_version": "emotion-train/report/1"})
    with pytest.raises(ValidationError, match="per_label names other labels"):
        Report.model_validate(several | {"labels": LABELS[::-1]})
    with pytest.raises(ValidationError, match="the headline is of 'train', which was not scored"):
        Report.model_validate(several | {"headline": "train"})
    one = report({"test": result(predictions())}).model_dump()
    with pytest.raises(ValidationError, match="figures are not those of targets 'several'"):
        Report.model_validate(one | {"targets": "several"})


# ---- what follows


def test_the_report_survives_its_file(made: Report) -> None:
    assert Report.model_validate_json(made.to_bytes()) == made
    assert (made.targets, made.headline) == ("several", "test")
    assert made.to_bytes() == both_splits().to_bytes()


def test_verdict_warnings_and_advice_speak_of_several_labels_too(made: Report) -> None:
    assert made.verdict.outcome == "beaten"
    assert made.verdict.sentence.startswith(f"Macro-F1 {figures(made).macro_f1:.3f} (")
    assert any("Labels with fewer than 10 test posts" in warning for warning in made.warnings)
    idle = scored(200, 4, knows=0.0)
    poor = report({"test": set_result(idle)}, list(LABELS))
    assert poor.verdict.outcome != "beaten"
    assert PRIOR in poor.verdict.sentence
    assert "labels that a person agrees with" in str(next_steps(poor.splits["test"], (), {"train": {}}))


def test_one_label_for_all_posts_is_no_reason_for_class_weights() -> None:
    posts = scored(200, 4)
    same_NC = np.tile(np.array([0.99, 0.001, 0.001, 0.001]), (200, 1))
    lazy = report({"test": set_result(SetPredictions(posts.ids, posts.truth_NC, same_NC > 0.5, same_NC))})
    assert figures(lazy).per_label[0].predicted == 200
    advice = next_steps(lazy.splits["test"], (), {"train": {"epochs": 2}, "loss": {"class_weights": 0.25}})
    assert str(advice).startswith("Try next: ")
    assert "class_weights" not in str(advice)


@pytest.mark.parametrize(("width", "bars"), [(80, False), (120, True)])
def test_a_terminal_of_80_columns_shows_every_label_and_figure_whole(
    made: Report, width: int, bars: bool
) -> None:
    shown = printed(made, width)
    for words in (*LABELS, "precision", "recall", "threshold"):
        assert words in shown
    assert ("█" in shown) == bars
    split = figures(made)
    long = [one.model_copy(update={"label": one.label * 5}) for one in split.per_label]
    splits = made.splits | {"test": split.model_copy(update={"per_label": tuple(long)})}
    assert "…" not in printed(made.model_copy(update={"splits": splits}), width).partition("also ")[0]


def test_a_card_on_posts_of_which_some_were_trained_on() -> None:
    whole = set_result(scored(300, 6))
    seen = Seen(set(whole.predictions.ids[::3]), 0.001)
    card = build_scorecard(
        whole,
        name="file",
        labels=LABELS,
        train_counts=None,
        seen=seen,
        remarks=(),
        samples=100,
        seed=1,
        source="posts.csv",
        run_id=None,
        base="some/base",
        precision="nf4",
    )
    rest = [row for row in range(300) if row % 3]
    truth_NC, answers_NC = whole.predictions.truth_NC[rest], whole.predictions.predicted_NC[rest]
    assert card.targets == "several"
    assert card.figures.macro_f1 == pytest.approx(
        sk.f1_score(truth_NC, answers_NC, average="macro", zero_division=0)
    )
    assert card.figures_of_all is not None
    assert card.figures_of_all.rows == 300
    assert Scorecard.model_validate_json(card.to_bytes()) == card
    out = io.StringIO()
    print_scorecard(card, Console(file=out, width=300, highlight=False))
    assert str(of_the_training(card)) in out.getvalue()
    assert "samples-F1" in out.getvalue()


# ---- pages


def test_page_terminal_and_card_show_labels_thresholds_and_what_they_gain(made: Report) -> None:
    split, page = figures(made), parsed(render_html(made))
    text, shown, card = " ".join(page.text.split()), printed(made, 300), "\n".join(card_lines(made))
    for words in notes("test", split):
        assert words in text
        assert words in shown
        assert words in card
    assert notes("validation", figures(made, "validation"))[0] in text
    for one in split.per_label:
        assert f"{one.threshold:.2f}" in shown
        assert one.label in text
    for words in ("micro-F1", "samples-F1", "Jaccard", "exact match", "mean AP", "macro-F1 at 0.5"):
        assert words in text
        assert words in shown
        assert words in card
    assert f"| test | {split.macro_f1:.3f} |" in card
    assert "Confusions: labels missed where others are added" in text
    assert "Labels that occur together" in text
    assert "Confusion matrix" not in text


def test_plots_have_words_and_tables_have_heads(made: Report) -> None:
    found = parsed(render_html(made))
    assert found.tags.count("svg") == 5
    assert len([value for name, value in found.attributes if name == "aria-label" and value]) == 6
    assert found.tags.count("thead") == found.tags.count("table")


def test_hostile_labels_stay_text() -> None:
    labels = [HOSTILE, "joy & co", 'a"b', "[red]e[/red]"]
    hostile = report({"test": set_result(scored(300, 7))}, labels)
    page = render_html(hostile)
    found = parsed(page)
    assert "<script" not in page
    assert HOSTILE in found.text
    assert "[red]e[/red]" in printed(hostile)


def test_many_labels_are_shown_and_their_pairs_are_bounded() -> None:
    generator = np.random.default_rng(0)
    truth_NC = generator.random((300, 60)) < 0.1
    model = SetPredictions.of(map(str, range(300)), truth_NC, generator.random((300, 60)))
    many = report({"test": SetResult(model.counts(), model)}, [f"label {i}" for i in range(60)])
    split = figures(many)
    assert (len(split.mistaken), len(split.together)) == (1000, 1000)
    page = render_html(many)
    assert all(label in page for label in many.labels)
    assert len(page) < 1_000_000


def test_posts_without_labels_are_right_when_they_are_answered_with_none() -> None:
    nothing_NC = np.zeros((20, 4), bool)
    model = SetPredictions.of(map(str, range(20)), nothing_NC, np.full((20, 4), 0.1))
    one = report({"test": SetResult(model.counts(), model)}, list(LABELS))
    split = figures(one)
    assert (split.exact_match, split.macro_f1, split.labels_without_support) == (1, 0, 4)
    assert "20 posts have none and 20 are answered with none" in parsed(render_html(one)).text


def test_a_result_of_one_label_is_decided_as_it_was() -> None:
    model = predictions()
    same = decided(model.counts(), model, None, Decision.one([f"label {i}" for i in range(5)]))
    assert isinstance(same, SplitResult)
    assert same.predictions is model
