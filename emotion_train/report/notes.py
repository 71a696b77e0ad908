"""Sentences on a split's figures where its posts have several labels, or shares."""

from __future__ import annotations

from emotion_train.evaluation.thresholds import HALF
from emotion_train.report.schema import AnyFigures, SetFigures
from emotion_train.report.units import signed


def notes(name: str, split: AnyFigures) -> list[str]:
    """The sentences; none where posts have one label."""
    if isinstance(split, SetFigures):
        return [_gain_words(name, split), _answers_words(split)]
    if split.distance is not None:
        far = split.distance
        return [
            f"The probabilities are {far.mean_kl:.3f} nats from the posts' shares (KL divergence, total"
            f" variation {far.total_variation:.3f}); the training split's shares, given to every post, are"
            f" {far.mean_kl_of_prior:.3f} from them ({far.total_variation_of_prior:.3f})."
        ]
    return []


def _gain_words(name: str, split: SetFigures) -> str:
    if all(one.threshold == HALF for one in split.per_label):
        return (
            "0.5 is the threshold of every label: a threshold for each label gained nothing on validation"
            " posts."
        )
    gain = split.macro_f1 - split.macro_f1_at_half
    how = (
        "answered by thresholds that other posts chose"
        if split.folds is None
        else f"each answered by thresholds that the posts of the other {split.folds - 1} of {split.folds}"
        " folds chose"
    )
    return (
        f"A threshold for each label {'costs' if gain < 0 else 'gains'} {abs(gain):.3f} of macro-F1 against"
        f" 0.5 for all ({split.macro_f1_at_half:.3f} to {split.macro_f1:.3f}; 95 % interval"
        f" {signed(split.gain_low)} to {signed(split.gain_high)}) on {split.rows:,} {name} posts, {how}."
    )


def _answers_words(split: SetFigures) -> str:
    has, gets = (
        sum(getattr(one, field) for one in split.per_label) / split.rows for field in ("support", "predicted")
    )
    return (
        f"A post has {has:.2f} labels and is answered with {gets:.2f}; {split.without_label:,} posts have"
        f" none and {split.without_answer:,} are answered with none."
    )
