"""The scorecard of an adapter on one source of posts. Posts that the adapter was trained on are
counted, and left out of the quoted figures.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from emotion_train.report.chances import gate_figures, temperature_figures
from emotion_train.report.figures import AnyResult, label_warnings, split_figures, verdict
from emotion_train.report.schema import AnyFigures, Scorecard, TrainedOn

if TYPE_CHECKING:
    from emotion_train.evaluation.decision import Decision


@dataclass(frozen=True)
class Seen:
    """Ids of the posts whose text is in the training split; `chance` is the largest share of other
    posts that the look-up may put among them. `unknown` says why no look-up was possible.
    """

    ids: Collection[str] = ()
    chance: float = 0.0
    unknown: str | None = None

    @classmethod
    def by_any(cls, looks: Sequence[Seen]) -> Seen:
        """Several look-ups as one: a post counts as trained on where any of them found it."""
        unknown = next((look.unknown for look in looks if look.unknown is not None), None)
        ids = frozenset(post_id for look in looks for post_id in look.ids)
        return cls(ids, sum(look.chance for look in looks), unknown) if len(looks) > 1 else looks[0]


def build_scorecard(
    result: AnyResult,
    *,
    name: str,
    labels: Sequence[str],
    train_counts: Sequence[float] | None,
    seen: Seen,
    remarks: Sequence[str],
    samples: int,
    seed: int,
    decision: Decision | None = None,
    chose: bool = False,
    **facts: Any,
) -> Scorecard:
    """The card of a result. `train_counts` are the training posts of each label, or sums of its
    shares; None takes the counts of the scored posts, which can only raise the floor of a constant
    answer.

    `decision` answered the posts; `chose`: these posts chose it. `facts` are the card's other
    fields.
    """

    def figures(part: AnyResult) -> AnyFigures:
        counts = part.label_counts if train_counts is None else train_counts
        return split_figures(name, part, labels, {"train": counts}, samples, seed)

    ids = result.predictions.ids
    fresh = [row for row, post_id in enumerate(ids) if post_id not in seen.ids]
    trained_on = TrainedOn(posts=len(ids) - len(fresh), of=len(ids), chance=seen.chance)
    divided = 0 < len(fresh) < len(ids)
    counted = result.take(fresh) if divided else result
    shown = figures(counted)
    of_posts = {name: counted.predictions}
    return Scorecard(
        name=name,
        targets=result.targets,
        labels=tuple(labels),
        figures=shown,
        trained_on=trained_on if seen.unknown is None else None,
        not_looked_up=seen.unknown,
        figures_of_all=figures(result) if divided else None,
        temperature=None
        if decision is None
        else temperature_figures(
            decision, of_posts, {name: decision.before_and_after(counted.predictions, chose)}
        ),
        gates=() if decision is None else gate_figures(decision, of_posts),
        warnings=(*remarks, *label_warnings(name, shown)),
        **facts,
    )


def headline(card: Scorecard) -> tuple[str, str]:
    """The outcome and the sentence of the verdict on the card's figures.

    One more outcome is "doubtful": the model beats its floors, but was or may have been trained on
    the scored posts.
    """
    trained_on = card.trained_on
    which = "" if card.figures_of_all is None else " that were not trained on"
    if trained_on is not None and trained_on.posts == trained_on.of:
        which = ", all of which were trained on,"
    told = verdict(card.name, card.figures, which)
    if told.outcome == "beaten" and (trained_on is None or trained_on.matters):
        return "doubtful", told.sentence
    return told.outcome, told.sentence


def of_the_training(card: Scorecard) -> str | None:
    """The sentence on how many posts were trained on and what that does to their score, or why it
    is not known; None for a card of an earlier version.
    """
    trained_on, of_all = card.trained_on, card.figures_of_all
    if trained_on is None:
        return card.not_looked_up
    if not trained_on.posts:
        return f"None of the {trained_on.of:,} posts is in the training split."
    good = "their score is too good"
    if of_all is None:
        return (
            f"All {trained_on.of:,} posts are in the training split: {good}, and says nothing about other"
            " posts."
        )
    counted = (
        f"{trained_on.posts:,} of {trained_on.of:,} posts {'are' if trained_on.posts > 1 else 'is'} in the"
        " training split"
    )
    both = (
        f"Macro-F1 is {card.figures.macro_f1:.3f} on the {card.figures.rows:,} others and"
        f" {of_all.macro_f1:.3f} on all"
    )
    if trained_on.posts <= np.ceil(trained_on.of * trained_on.chance) and not trained_on.matters:
        return f"{counted}, or look so by chance. {both}."
    return f"{counted}: {good}. {both}."
