"""The posts that a report shows, and its first and last sentences: chosen by hand-counted
predictions, escaped, left out where texts are not wanted.
"""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from sklearn import metrics as sk

from emotion_train.config import ReportSection
from emotion_train.evaluation.metrics import bootstrap_macro_f1
from emotion_train.evaluation.predictions import Predictions, SetPredictions
from emotion_train.report.figures import AnyResult, Measured, SetResult, build_report
from emotion_train.report.pages import in_order, render_html
from emotion_train.report.plain import averages, plain_sentence
from emotion_train.report.posts import Chosen
from emotion_train.report.schema import LossPoint, Report
from emotion_train.report.slices import slices
from tests.emotion_train.report.test_report import HOSTILE, parsed, predictions, printed, report, result
from tests.helpers.scored_sets import scored

LABELS = ["joy", "anger", "fear"]
TRUTH = [0, 0, 0, 1, 1, 2, 2, 0]
SURE = [(1, 0.9), (1, 0.6), (1, 0.7), (1, 0.8), (0, 0.5), (1, 0.95), (2, 0.7), (0, 0.4)]  # answer, how sure


def small() -> Predictions:
    """Three posts of joy are taken for anger, one of anger for joy, one of fear for anger."""
    prob_NC = np.full((len(TRUTH), 3), 0.0)
    for row, (answer, sure) in enumerate(SURE):
        prob_NC[row] = (1 - sure) / 2
        prob_NC[row, answer] = sure
    return Predictions.of([f"id-{row}" for row in range(len(TRUTH))], TRUTH, prob_NC)


def texts_for(splits: dict[str, AnyResult]) -> dict[str, dict[str, str]]:
    return {name: {post: f"text of {post}" for post in one.predictions.ids} for name, one in splits.items()}


def with_posts(splits: dict[str, AnyResult], examples: int = 2, labels: list[str] | None = None) -> Report:
    """The report of the splits with their posts, whose texts are hostile for every third."""
    made = report(splits, labels or list(LABELS))
    chosen = Chosen.of(splits, made.headline, examples)
    texts = texts_for(splits) if examples else {}
    return made.model_copy(
        update={
            "mistakes": chosen.mistakes(splits, made.labels, texts),
            "mislabelled": chosen.mislabelled(splits, made.labels, texts),
        }
    )


def test_the_surest_mistakes_stand_under_the_most_frequent_pairs() -> None:
    made = with_posts({"test": result(small())})
    found = [(one.missed, one.added, one.posts, [post.id for post in one.examples]) for one in made.mistakes]
    assert found == [
        ("joy", "anger", 3, ["id-0", "id-2"]),
        ("anger", "joy", 1, ["id-4"]),
        ("fear", "anger", 1, ["id-5"]),
    ]
    first = made.mistakes[0].examples[0]
    assert (first.text, first.labels, first.answer) == ("text of id-0", ("joy",), ("anger",))
    assert first.probability == pytest.approx(0.9)
    text = parsed(render_html(made)).text
    assert "joy → anger 3 posts, 75.0 % of those with joy" in text
    assert "text of id-2" in text
    assert "text of id-1" not in text.partition("Posts that look mislabelled")[0]


def test_of_several_labels_what_is_missed_stands_with_what_is_added() -> None:
    truth_NC = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
    prob_NC = np.array([[0.2, 0.1, 0.8], [0.1, 0.1, 0.7], [0.1, 0.1, 0.9], [0.6, 0.2, 0.1], [0.3, 0.1, 0.1]])
    model = SetPredictions.of("abcde", truth_NC, prob_NC)
    made = with_posts({"test": SetResult(model.counts(), model)})
    found = {(one.missed, one.added): [post.id for post in one.examples] for one in made.mistakes}
    # a misses joy and anger and gets fear, b misses joy and gets fear, d only gets, e only misses
    assert found == {
        ("joy", "fear"): ["a", "b"],
        (None, "joy"): ["d"],
        ("joy", None): ["e"],
        ("anger", "fear"): ["a"],
    }
    assert made.mistakes[0].examples[0].probability == pytest.approx(0.8)  # the less sure half
    text = parsed(render_html(made)).text
    assert "joy added" in text
    assert "joy missed" in text
    assert "has joy, anger; answered fear 0.80" in text


def test_texts_are_escaped_and_what_would_be_obeyed_is_spelled_out() -> None:
    splits: dict[str, AnyResult] = {"test": result(small())}
    chosen = Chosen.of(splits, "test", 5)
    evil = f"{HOSTILE} \x1b[31m \u202e \n end"
    texts = {"test": dict.fromkeys(splits["test"].predictions.ids, evil)}
    made = report(splits, list(LABELS)).model_copy(
        update={
            "mistakes": chosen.mistakes(splits, LABELS, texts),
            "mislabelled": chosen.mislabelled(splits, LABELS, texts),
        }
    )
    page = render_html(made)
    found = parsed(page)
    assert "script" not in found.tags
    assert HOSTILE in found.text
    assert "\\x1b[31m \\u202e \\n end" in found.text
    assert not {"\x1b", "\u202e"} & set(page)


def test_without_examples_no_text_is_anywhere() -> None:
    splits: dict[str, AnyResult] = {
        "test": result(small()),
        "validation": result(predictions(80, 3, skill=1)),
    }
    chosen = Chosen.of(splits, "test", 0)
    assert chosen.wanted(splits) == {"test": set(), "validation": set()}
    made = with_posts(splits, 0)
    assert made.mislabelled is not None
    assert made.mislabelled.posts > 0
    assert [one.examples for one in made.mistakes] == [()] * len(made.mistakes)
    rows = list(csv.reader(io.StringIO((chosen.to_csv(splits, LABELS, {}) or b"").decode())))
    assert rows[0] == ["id", "label", "suggested", "probability", "corrected"]
    for words in (render_html(made), made.to_bytes().decode(), str(rows)):
        assert "text of" not in words
    assert "Most confident mistakes" not in render_html(made)


def test_only_the_texts_of_chosen_posts_are_wanted() -> None:
    splits: dict[str, AnyResult] = {"test": result(predictions(400, 3, skill=2))}
    chosen = Chosen.of(splits, "test", 1)
    wanted = chosen.wanted(splits)["test"]
    mistaken = {row for pair in chosen.pairs for row, _ in pair.rows}
    assert len(wanted) == len(mistaken | {doubt.row for doubt in chosen.doubts}) < 400


def test_doubted_posts_come_from_all_held_out_splits_and_go_into_a_csv() -> None:
    splits: dict[str, AnyResult] = {
        "validation": result(predictions(200, 3, skill=2, seed=1)),
        "test": result(predictions(200, 3, skill=2, seed=2)),
    }
    chosen = Chosen.of(splits, "test", 3)
    texts = texts_for(splits)
    texts["test"] = {post: f"=1+1 {post}" for post in texts["test"]}
    made = chosen.mislabelled(splits, LABELS, texts)
    assert made is not None
    assert (made.of, len(made.examples)) == (400, min(12, made.posts))
    assert {doubt.split for doubt in chosen.doubts} == {"validation", "test"}
    raw = chosen.to_csv(splits, LABELS, texts)
    assert raw is not None
    rows = list(csv.DictReader(io.StringIO(raw.decode(), newline="")))
    assert len(rows) == made.posts == len(chosen.doubts)
    for row, doubt in zip(rows, chosen.doubts, strict=True):
        model = splits[doubt.split].predictions
        assert isinstance(model, Predictions)
        assert row["id"] == model.ids[doubt.row]
        assert row["label"] == LABELS[model.truth_N[doubt.row]]
        assert row["suggested"] == LABELS[model.predicted_N[doubt.row]] != row["label"]
        assert float(row["probability"]) == pytest.approx(model.prob_NC[doubt.row].max(), abs=1e-4)
        assert row["corrected"] == ""
        assert row["text"].startswith("'=1+1" if doubt.split == "test" else "text of")
    assert chosen.to_csv(splits, LABELS, texts) == raw


def test_a_long_text_is_cut_in_the_report_and_whole_in_the_csv() -> None:
    splits: dict[str, AnyResult] = {"test": result(small())}
    chosen = Chosen.of(splits, "test", 1)
    texts = {"test": dict.fromkeys(splits["test"].predictions.ids, "x" * 5000)}
    assert len(chosen.mistakes(splits, LABELS, texts)[0].examples[0].text) == 1000
    assert "x" * 5000 in (chosen.to_csv(splits, LABELS, texts) or b"").decode()


# ---- sentences, order, averages


def test_the_first_sentence_counts_posts_as_scikit_learn_does() -> None:
    model, floor = predictions(500, skill=3), predictions(500, skill=1)
    made = report({"test": result(model, floor)})
    right, by_words, majority = (
        f"{100 * sk.accuracy_score(model.truth_N, answers):.0f}"
        for answers in (model.predicted_N, floor.predicted_N, np.zeros(500, int))
    )
    sentence = plain_sentence(made.splits["test"])
    assert sentence == (
        f"Of 100 posts that it did not learn from, this model labels {right} as people did; always giving the"
        f" most frequent label gets {majority} right, counting words gets {by_words} right."
    )
    text = parsed(render_html(made)).text
    assert text.index(sentence) < text.index(made.verdict.sentence)
    assert sentence in " ".join(printed(made, 400).split())


def test_the_first_sentence_of_several_labels_is_micro_precision_and_recall() -> None:
    model = scored(500, 1)
    made = report({"test": SetResult(model.counts(), model)}, ["joy", "anger", "awe", "grief"])
    found = sk.recall_score(model.truth_NC, model.predicted_NC, average="micro")
    good = sk.precision_score(model.truth_NC, model.predicted_NC, average="micro")
    sentence = plain_sentence(made.splits["test"])
    assert f"finds {100 * found:.0f}, and of 100 that it gives, {100 * good:.0f} are right" in sentence


@pytest.mark.parametrize("skill", [4, 0])
def test_the_last_sentence_says_what_to_try_next(skill: int) -> None:
    made = with_posts({"test": result(predictions(skill=skill), predictions(skill=1))}, 2, NAMES)
    assert made.try_next is not None
    assert made.try_next.startswith("Try next: ")
    assert (made.try_next == made.verdict.advice) == (made.verdict.outcome != "beaten")
    text = " ".join(parsed(render_html(made)).text.split())
    assert text.endswith(made.try_next)
    assert made.try_next in " ".join(printed(made, 600).split())


NAMES = [f"label {i}" for i in range(5)]


def test_averages_are_those_of_scikit_learn() -> None:
    model = predictions()
    split = report({"test": result(model)}).splits["test"]
    expected = sk.classification_report(model.truth_N, model.predicted_N, output_dict=True, zero_division=0)
    for name, ours in (("macro avg", "macro average"), ("weighted avg", "weighted average")):
        wanted = [expected[name][field] for field in ("precision", "recall", "f1-score")]
        assert averages(split)[ours] == pytest.approx(tuple(wanted))
    assert "weighted average" in parsed(render_html(report({"test": result(model)}))).text


def test_splits_stand_in_the_order_in_which_posts_meet_them() -> None:
    assert in_order(["test", "validation", "train"]) == ["train", "validation", "test"]
    made = report({"test": result(predictions()), "validation": result(predictions(seed=3))})
    tags = render_html(made).partition("<h2>Data</h2>")[2]
    assert tags.index("train</th>") < tags.index("validation</th>") < tags.index("test</th>")


def test_what_people_search_for_is_in_the_headings() -> None:
    page = render_html(with_posts({"test": result(small()), "validation": result(small())}))
    for heading in (
        "Baselines",
        "Per-label report",
        "Confusion matrix",
        "Calibration",
        "Learning curve",
        "Posts that look mislabelled",
        "Most confident mistakes",
        "What to try next",
    ):
        assert f"<h2>{heading}" in page


def test_cells_name_their_heads_for_narrow_screens() -> None:
    page = render_html(with_posts({"test": result(small()), "validation": result(small())}))
    assert 'class="stack"' in page
    assert '<td class="bar" data-head="F1">' in page
    assert 'data-head="95 % interval"' in page


def test_the_curve_has_the_training_loss_by_step_and_the_validation_loss() -> None:
    made = report({"test": result(predictions())})
    history = [one.model_copy(update={"validation_loss": 1.5}) for one in made.history]
    losses = [LossPoint(step=step, loss=2 - step / 100) for step in range(1, 100)]
    page = render_html(made.model_copy(update={"history": tuple(history), "losses": tuple(losses)}))
    found = parsed(page)
    (told,) = (
        value for name, value in found.attributes if name == "aria-label" and "training loss" in str(value)
    )
    assert told is not None
    assert "training loss over steps 1 to 99, last 1.0100" in told
    assert "validation loss over steps 100 to 300, last 1.5000" in told
    parsed(render_html(made))  # of an earlier version: neither is known


def test_an_earlier_report_is_shown_without_what_it_lacks() -> None:
    made = with_posts({"test": result(small())})
    document = json.loads(made.to_bytes())
    for name in ("losses", "mistakes", "mislabelled", "slices", "try_next"):
        del document[name]
    for one in document["splits"]["test"]["per_label"]:
        del one["f1_low"], one["f1_high"]
    for one in document["history"]:
        del one["validation_loss"]
    page = render_html(Report.model_validate(document))
    assert "95 % interval" not in page.partition("Per-label report")[2].partition("<h2>")[0]
    assert "Posts that look mislabelled" not in page


# ---- slices


def test_a_slice_is_scored_over_the_labels_that_its_posts_have() -> None:
    model = predictions(300, 4, skill=2)
    value_of = {post: ("en", "de", "")[row % 3] for row, post in enumerate(model.ids)}
    (found,) = slices(model, {"lang": value_of}, 200, 1)
    assert [(one.value, one.rows) for one in found.values] == [("", 100), ("de", 100), ("en", 100)]
    for one in found.values:
        rows = [row for row, post in enumerate(model.ids) if value_of[post] == one.value]
        part = model.take(rows)
        labels = sorted(set(part.truth_N.tolist()))
        assert one.macro_f1 == pytest.approx(
            sk.f1_score(part.truth_N, part.predicted_N, labels=labels, average="macro", zero_division=0)
        )
        assert one.macro_f1_low <= one.macro_f1 <= one.macro_f1_high
        assert one.labels == len(labels)


def test_a_label_that_a_slice_lacks_does_not_count_against_it() -> None:
    truth_N = np.array([0, 1] * 30 + [2] * 5)
    model = Predictions.of([f"{row:03}" for row in range(65)], truth_N, np.eye(3)[truth_N])
    (found,) = slices(model, {"lang": {post: "a" if post < "060" else "b" for post in model.ids}}, 100, 1)
    assert [(one.value, one.labels, one.macro_f1, one.macro_f1_high) for one in found.values] == [
        ("a", 2, 1.0, 1.0),
        ("b", 1, 1.0, 1.0),
    ]
    counted_C = np.array([True, True, False])
    assert bootstrap_macro_f1(truth_N, truth_N, 3, 100, 0, counted_C).high == 1.0


def test_rare_values_are_taken_together_and_small_slices_are_told() -> None:
    model = predictions(400, 3)
    value_of = {
        post: f"v{row % 7}" if row < 350 else f"rare {row % 20}" for row, post in enumerate(model.ids)
    }
    (found,) = slices(model, {"source": value_of}, 100, 1)
    assert len(found.values) == 11
    rest = found.values[-1]
    assert (rest.value, rest.values) == (None, 17)
    assert sum(one.rows for one in found.values) == 400
    made = report({"test": result(model)}).model_copy(update={"slices": (found,)})
    text = parsed(render_html(made)).text
    assert "17 other values" in text
    assert "few posts" in text


def test_build_report_slices_the_headline_split() -> None:
    good = report({"test": result(small())}, list(LABELS))
    made = build_report(
        labels=good.labels,
        splits={"test": result(small())},
        history=good.history,
        best_step=good.best_step,
        dataset=good.dataset,
        measured=_measured(),
        identity=good.identity,
        settings=ReportSection(bootstrap_samples=100),
        seed=0,
        slice_values={"lang": dict.fromkeys(small().ids, "en")},
    )
    assert [(one.column, one.values[0].value, one.values[0].rows) for one in made.slices] == [
        ("lang", "en", 8)
    ]
    assert Report.model_validate_json(made.to_bytes()) == made


def _measured() -> Measured:
    return Measured(1, 1, 1, 1.0, 1.0, 1.0, 1, "RSS")
