"""Which row of each text is kept, and so which label, where several rows have the same text.

Arithmetic on arrays only: one call's arrays hold all rows of a text. Costs one sort of all rows and
one of the rows whose text has several labels.

Array shapes: N rows, T texts that have several labels, P pairs of such a text and one of its
labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from emotion_train.data.target_columns import Joint, PostTargets
from emotion_train.data.targets import Target, TargetKind

Policy = Literal["first", "majority", "union", "mean", "drop", "refuse"]
# policies for several rows of a text, by kind of targets
POLICIES: dict[TargetKind, tuple[Policy, ...]] = {
    "one": ("first", "majority", "drop", "refuse"),
    "several": ("first", "majority", "union", "drop", "refuse"),
    "shares": ("first", "mean", "drop", "refuse"),
}
BY_DEFAULT: dict[TargetKind, Policy] = {"one": "majority", "several": "majority", "shares": "mean"}
# policies that make one target from all rows of a text
_JOINT: dict[tuple[TargetKind, Policy], Joint] = {
    ("several", "majority"): "half",
    ("several", "union"): "union",
    ("shares", "mean"): "mean",
}
EXAMPLES_SHOWN = 3
_CHARS_SHOWN = 60


class Conflict(NamedTuple):
    """A text with several labels."""

    place: int  # of its first row
    votes: dict[int, int]  # rows of each label code, in the order of their first rows
    winner: int | None  # label code; None when no row of the text is kept


class Example(NamedTuple):
    """A text with several labels, with names for a person to read."""

    text: str
    votes: list[tuple[str, int]]
    winner: str | None

    def __str__(self) -> str:
        """The text's beginning and its labels, like `'good morning' love 6, worry 2: love`."""
        beginning = self.text if len(self.text) <= _CHARS_SHOWN else f"{self.text[: _CHARS_SHOWN - 1]}…"
        votes = ", ".join(f"{label} {rows:,}" for label, rows in self.votes)
        return f"{beginning!r} {votes}" + ("" if self.winner is None else f": {self.winner}")


class Choice(NamedTuple):
    """The outcome of each row: one of four cases that exclude each other."""

    keep_N: Any
    repeated_N: Any  # same text and label as the kept row
    conflicting_N: Any  # same text, but another label than the kept row, or no row is kept
    in_two_splits_N: Any  # a row of a later split has the text
    texts: int  # texts with several labels
    examples: list[Conflict]  # the conflicts with the earliest rows
    text_N: Any  # the number of the row's text where the row takes part in a conflict, else -1


def choose(
    key0_N: Any, key1_N: Any, split_N: Any, place_N: Any, label_N: Any, policy: Policy = "majority"
) -> Choice:
    """Keep one of the rows with equal keys, in the lowest split code that has one.

    Among that split's rows, `first` keeps the first by place, and `majority` the first row of the
    label with the most rows; on a tie, the label of the earliest row wins. `drop` and `refuse` keep
    no row of a text that has several labels in that split: all its rows there count as conflicting.
    """
    order_N = np.lexsort((place_N, split_N, key1_N, key0_N))
    first_N = np.ones(len(order_N), bool)  # in order: the first row of its text
    first_N[1:] = (np.diff(key0_N[order_N]) != 0) | (np.diff(key1_N[order_N]) != 0)
    text_N = np.cumsum(first_N) - 1  # in order: the number of its text
    kept = order_N[first_N]  # the kept row, by text
    inside_N = split_N[order_N] == split_N[kept][text_N]
    other_N = inside_N & (label_N[order_N] != label_N[kept][text_N])
    mixed = np.zeros(len(kept), bool)  # by text: whether it has several labels
    mixed[text_N[other_N]] = True
    at_P, votes_P, begins_T = _count_votes(order_N, text_N, inside_N & mixed[text_N], label_N)
    winner_T = _winners(votes_P, begins_T) if policy == "majority" else begins_T
    kept[mixed] = at_P[winner_T]

    keep_N, repeated_N, conflicting_N, in_two_splits_N = np.zeros((4, len(label_N)), bool)
    in_two_splits_N[order_N[~inside_N]] = True
    none_stays_N = mixed[text_N] & (policy in ("drop", "refuse"))
    wrong_N = inside_N & (none_stays_N | (label_N[order_N] != label_N[kept][text_N]))
    conflicting_N[order_N[wrong_N]] = True
    keep_N[kept[~mixed] if policy in ("drop", "refuse") else kept] = True
    repeated_N[order_N] = ~(keep_N | conflicting_N | in_two_splits_N)[order_N]
    text_of_row_N = np.full(len(label_N), -1)
    taking_part_N = inside_N & mixed[text_N]
    text_of_row_N[order_N[taking_part_N]] = text_N[taking_part_N]
    pairs = _Pairs(at_P, votes_P, begins_T, winner_T if policy in ("first", "majority") else None)
    return Choice(
        keep_N,
        repeated_N,
        conflicting_N,
        in_two_splits_N,
        int(mixed.sum()),
        list(_examples(pairs, place_N, label_N)),
        text_of_row_N,
    )


def spelled(target: Target, names: Mapping[int, str]) -> str:
    """A target for a person to read: joy, joy + anger, or joy 0.67 + anger 0.33."""
    if not target:
        return "no label"
    return " + ".join(names[code] if share == 1 else f"{names[code]} {share:.2g}" for code, share in target)


class Dispute(NamedTuple):
    """A text with several targets."""

    place: int  # of its first row
    votes: list[tuple[Target, int]]  # rows of each target, in the order of their first rows
    winner: Target | None  # None when no row of the text is kept


class Settled(NamedTuple):
    """The choice among rows, the targets of all rows after it, and examples."""

    choice: Choice
    targets: PostTargets
    disputes: list[Dispute]


def settle(
    keys: tuple[Any, Any, Any, Any],
    targets: PostTargets,
    kind: TargetKind,
    policy: Policy,
    labels: int,
    *,
    allow_none: bool = False,
) -> Settled:
    """The outcome of rows with any kind of targets, by the rules of `choose`; `keys` are its first
    four arrays. Where a policy makes one target from all rows of a text, the first row gets it, and
    is kept without a label only if `allow_none` is set.
    """
    number_N = targets.label_P if kind == "one" else targets.numbered(labels)
    joint = _JOINT.get((kind, policy))
    choice = choose(*keys, number_N, policy if joint is None else "first")
    settled = targets
    if joint is not None and choice.texts:
        settled = _with_joint_targets(targets, choice, joint)
        none_N = (choice.text_N >= 0) & choice.keep_N & (settled.counts == 0)
        if not allow_none:
            choice.keep_N[none_N], choice.conflicting_N[none_N] = False, True
    disputes = [_dispute(of, keys[3], number_N, targets, settled, choice) for of in choice.examples]
    return Settled(choice, settled, disputes)


def _with_joint_targets(targets: PostTargets, choice: Choice, joint: Joint) -> PostTargets:
    """The targets, where each conflicting text's kept row has the joint target of all its rows."""
    rows = np.flatnonzero(choice.text_N >= 0)
    _, group = np.unique(choice.text_N[rows], return_inverse=True)
    made = targets.take(rows).joined(group, choice.texts, joint)
    stays = choice.keep_N[rows]
    source_N = np.arange(targets.posts)
    source_N[rows[stays]] = targets.posts + group[stays]
    return targets.followed_by(made).take(source_N)


def _dispute(
    conflict: Conflict, place_N: Any, number_N: Any, said: PostTargets, settled: PostTargets, choice: Choice
) -> Dispute:
    (first,) = np.flatnonzero(place_N == conflict.place)
    rows = np.flatnonzero(choice.text_N == choice.text_N[first])
    votes = [
        (said.target(int(rows[number_N[rows] == number][0])), count)
        for number, count in conflict.votes.items()
    ]
    staying = rows[choice.keep_N[rows]]
    return Dispute(conflict.place, votes, settled.target(int(staying[0])) if len(staying) else None)


class _Pairs(NamedTuple):
    """Pairs of text and label; pairs of one text are neighbours, in the order of first rows."""

    at_P: Any  # the pair's first row
    votes_P: Any
    begins_T: Any  # first pair of each text
    winner_T: Any | None  # winning pair of each text


def _count_votes(order_N: Any, text_N: Any, counted_N: Any, label_N: Any) -> tuple[Any, Any, Any]:
    """The first row and the number of rows of each pair, and the first pair of each text."""
    rows, text = order_N[counted_N], text_N[counted_N]  # by text and place
    by_pair = np.lexsort((label_N[rows], text))  # stable: by place within a pair
    new = np.ones(len(rows), bool)
    new[1:] = (np.diff(text[by_pair]) != 0) | (np.diff(label_N[rows[by_pair]]) != 0)
    begins = np.flatnonzero(new)
    earliest = by_pair[begins]  # positions in `rows`, which are in the order of places
    by_place = np.argsort(earliest)  # also by text, as `rows` are
    votes_P = np.diff(np.append(begins, len(rows)))[by_place]
    text_P = text[earliest[by_place]]
    begins_T = np.flatnonzero(np.diff(text_P, prepend=-1))
    return rows[earliest[by_place]], votes_P, begins_T


def _winners(votes_P: Any, begins_T: Any) -> Any:
    """The pair with the most votes of each text; on a tie, the first."""
    if not len(begins_T):
        return begins_T
    most_T = np.maximum.reduceat(votes_P, begins_T)
    pairs_T = np.diff(np.append(begins_T, len(votes_P)))
    best_P = np.where(votes_P == np.repeat(most_T, pairs_T), np.arange(len(votes_P)), len(votes_P))
    return np.minimum.reduceat(best_P, begins_T)


def _examples(pairs: _Pairs, place_N: Any, label_N: Any) -> Iterator[Conflict]:
    first_T = place_N[pairs.at_P[pairs.begins_T]]
    ends_T = np.append(pairs.begins_T[1:], len(pairs.at_P))
    for text in np.argsort(first_T, kind="stable")[:EXAMPLES_SHOWN]:
        at = pairs.at_P[pairs.begins_T[text] : ends_T[text]]
        votes = pairs.votes_P[pairs.begins_T[text] : ends_T[text]]
        winner = None if pairs.winner_T is None else int(label_N[pairs.at_P[pairs.winner_T[text]]])
        yield Conflict(
            int(first_T[text]), dict(zip(label_N[at].tolist(), votes.tolist(), strict=True)), winner
        )
