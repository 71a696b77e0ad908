"""Advice on what to try next, from a model's figures and the course of its training: for a model
that beats its floors, and for one that does not.

The steps are a start and no promise: each names its evidence. There are at most three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emotion_train.console import counted
from emotion_train.data.lengths import Cut
from emotion_train.evaluation.comparison import MOST_TIMES
from emotion_train.evaluation.floors import MAJORITY, PRIOR
from emotion_train.report.schema import (
    AnyFigures,
    Evaluation,
    Floor,
    Mislabelled,
    Mistakes,
    SetFigures,
    SetFloor,
)
from emotion_train.report.units import posts_of, round_up

_ONE_ANSWER = 0.9  # share of the posts that get one label
_HARDLY = 0.95  # of the first training loss
_ROSE = 1.05
_FEW_STEPS = 100
_FEW_POSTS = 50  # of the rarest label
_MANY_POSTS = 1000  # of a label, from which on more of them help little
_MOST = 3


def next_steps(
    split: AnyFigures,
    history: Sequence[Evaluation] = (),
    config: Mapping[str, Any] | None = None,
    train_counts: Sequence[float] = (),
) -> str | None:
    """The sentence; None for a model that beats every floor.

    `config` is the run's config in its report; without it, as for a scorecard, the advice says
    nothing about training. `train_counts` are the training posts of each label.
    """
    behind = [floor for floor in split.floors if floor.outcome != "beaten"]
    if not behind:
        return None
    if config is None:
        return (
            "Try next: what the report of the adapter's run advises; if these posts are not of its data set,"
            " check whether their labels mean the same: posts of another source are another task."
        )
    chance = any(floor.name in (MAJORITY, PRIOR) for floor in behind)
    tries = _of_the_loss(history, config)
    if chance:
        tries = _of_one_answer(split, config) + tries
    else:
        tries.append("a larger model.base")
        if config.get("lora", {}).get("targets") != "all-linear" and not _is_whole(config):
            tries.append("lora.targets=all-linear")
    if train_counts and min(train_counts) < _FEW_POSTS:
        tries.append(f"more posts (the rarest label has {posts_of(min(train_counts))} for training)")
    if chance and len(tries) < _MOST:
        tries.append("labels that a person agrees with (read 50 posts of the training split)")
    if (posts := _posts_that_would_tell(behind, split.rows)) is not None:
        tries = [f"more held-out posts ({posts:,} would show such a lead)", *tries]
    return f"Try next: {'; '.join(tries[:_MOST])}."


def _is_whole(config: Mapping[str, Any]) -> bool:
    """Whether every weight was trained, so that there is no adapter to change."""
    return bool(config.get("train", {}).get("method") == "full")


def worth_trying(
    split: AnyFigures,
    mistakes: Sequence[Mistakes],
    mislabelled: Mislabelled | None,
    cuts: Mapping[str, Cut],
    history: Sequence[Evaluation],
    best_step: int | None,
    train_counts: Mapping[str, float],
) -> str:
    """The sentence on what would improve a model that beats its floors, the likeliest step first.
    `train_counts` are the training posts of each label.
    """
    tries = []
    if cut := next((one for one in cuts.values() if one.is_much), None):
        tries.append(
            f"data.max_length={cut.max_length_for_2_percent} ({cut.share_words} of the posts are cut)"
        )
    if history and len(history) > 1 and best_step == history[-1].step:
        tries.append("a larger train.epochs (the last evaluation was the best)")
    if mislabelled is not None and mislabelled.posts:
        tries.append(
            "look through the posts that look mislabelled, correct them in mislabelled.csv and prepare the"
            " data again with --corrections"
        )
    worst = min((one for one in split.per_label if one.support), key=lambda one: one.f1, default=None)
    if worst is not None and train_counts.get(worst.label, _MANY_POSTS) < _MANY_POSTS:
        tries.append(
            f"more posts of {worst.label}, whose F1 is {worst.f1:.2f}"
            f" ({posts_of(train_counts[worst.label])} for training)"
        )
    pair = next((one for one in mistakes if one.missed is not None and one.added is not None), None)
    if pair is not None:
        tries.append(
            f"one label for {pair.missed} and {pair.added}, or a clearer rule to tell them apart"
            f" ({counted(pair.posts, 'post')} of the first got the second)"
        )
    tries.append("a larger model.base")
    return f"Try next: {'; '.join(tries[:_MOST])}."


def _posts_that_would_tell(behind: Sequence[Floor | SetFloor], rows: int) -> int | None:
    """The number of held-out posts with which the lead over the strongest of these floors would be
    certain, since intervals shrink with the root of the posts; None without a lead, or where far
    too many posts would be needed.
    """
    floor = max(behind, key=lambda one: one.macro_f1)
    if floor.difference <= 0:
        return None
    needed = rows * ((floor.difference - floor.difference_low) / floor.difference) ** 2
    return round_up(needed) if rows < needed < MOST_TIMES * rows else None


def _of_one_answer(split: AnyFigures, config: Mapping[str, Any]) -> list[str]:
    """The step for a model that gives most posts the same label; empty for others, and for several
    labels, whose thresholds do what weights would do.
    """
    if isinstance(split, SetFigures):
        return []
    most = max(split.per_label, key=lambda one: one.predicted)
    weights = config.get("loss", {}).get("class_weights")
    if not split.rows or most.predicted / split.rows < _ONE_ANSWER or weights == "balanced":
        return []
    share = f"{100 * most.predicted // split.rows} %"
    return [f"loss.class_weights=balanced ({share} of the posts are taken for {most.label})"]


def _of_the_loss(history: Sequence[Evaluation], config: Mapping[str, Any]) -> list[str]:
    """The steps that the course of the training loss suggests."""
    train = config.get("train", {})
    rate, epochs = train.get("learning_rate"), train.get("epochs")
    # where max_steps ends the run, more epochs change nothing
    longer = (
        f"train.max_steps={2 * most}"
        if (most := train.get("max_steps"))
        else f"train.epochs={2 * epochs}"
        if epochs
        else ""
    )
    losses = [one.train_loss for one in history if one.train_loss is not None]
    tries = []
    if history and history[-1].step < _FEW_STEPS and longer:
        were, steps = "was" if history[-1].step == 1 else "were", counted(history[-1].step, "step")
        tries.append(f"{longer} (there {were} only {steps})")
    if len(losses) > 1:
        course = f"from {losses[0]:.2f} to {losses[-1]:.2f}"
        if losses[-1] > _ROSE * losses[0]:
            if rate:
                tries.insert(0, f"train.learning_rate={rate / 5:.2g} (the training loss rose {course})")
        elif losses[-1] > _HARDLY * losses[0]:
            if rate and rate <= 0.2:
                tries.append(f"train.learning_rate={rate * 5:.2g} (the training loss hardly fell, {course})")
        elif not tries:
            smaller = "" if _is_whole(config) else " or a smaller lora.r"
            tries.append(
                f"fewer epochs{smaller} (the training loss fell {course}, and held-out posts did not follow)"
            )
    if not tries and longer:
        tries.append(longer)
    return tries
