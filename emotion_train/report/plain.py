"""The report's first sentence: how often the model is right, for readers who do not know F1."""

from __future__ import annotations

from emotion_train.evaluation.floors import MAJORITY, TFIDF
from emotion_train.evaluation.metrics import ratio
from emotion_train.report.schema import AnyFigures, SetFigures, SplitFigures

_WORDS = {
    MAJORITY: "always giving the most frequent label gets {} right",
    TFIDF: "counting words gets {} right",
}


def plain_sentence(split: AnyFigures) -> str:
    """How many of 100 held-out posts the model gets right, and how many a simple classifier
    does.
    """
    if isinstance(split, SetFigures):
        return _of_sets(split)
    what = (
        "labels {} as people did"
        if split.distance is None
        else "gives {} the label that most annotators gave"
    )
    floors = [
        _WORDS[floor.name].format(_of_100(floor.accuracy)) for floor in split.floors if floor.name in _WORDS
    ]
    against = f"; {', '.join(floors)}" if floors else ""
    right = what.format(_of_100(split.accuracy))
    return f"Of 100 posts that it did not learn from, this model {right}{against}."


def _of_sets(split: SetFigures) -> str:
    posts = {name: sum(getattr(one, name) for one in split.per_label) for name in ("support", "predicted")}
    right = round(sum(one.recall * one.support for one in split.per_label))
    found, good = (float(ratio(right, posts[name])) for name in ("support", "predicted"))
    return (
        f"Of 100 labels that posts have, this model finds {_of_100(found)}, and of 100 that it gives,"
        f" {_of_100(good)} are right, on posts that it did not learn from."
    )


def _of_100(share: float) -> str:
    return f"{100 * share:.0f}"


def averages(split: SplitFigures | SetFigures) -> dict[str, tuple[float, float, float]]:
    """Precision, recall and F1 over all labels, each counting once (macro) or as its posts do
    (weighted).
    """
    supports = [one.support for one in split.per_label]
    columns = [[getattr(one, name) for one in split.per_label] for name in ("precision", "recall", "f1")]
    weighted = [
        float(ratio(sum(value * n for value, n in zip(column, supports, strict=True)), sum(supports)))
        for column in columns
    ]
    macro = [sum(column) / len(column) for column in columns]
    return {
        "macro average": (macro[0], macro[1], macro[2]),
        "weighted average": (weighted[0], weighted[1], weighted[2]),
    }
