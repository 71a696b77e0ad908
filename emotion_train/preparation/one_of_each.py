"""One row of each text: the row of the later split stays (test, then validation, then train), and
within a split the row that `--on-conflict` chooses.

One partition is in memory at a time. What is chosen goes to a file of flags and targets for each
partition, and the draws of the chosen posts to one file, by which posts are held out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emotion_train.data.cleaning import NO_SPLIT, SPLIT_CODES
from emotion_train.data.conflicts import EXAMPLES_SHOWN, Choice, Dispute, Example, settle, spelled
from emotion_train.data.labels import LabelNames
from emotion_train.data.target_columns import FIELDS, PostTargets
from emotion_train.preparation.label_sets import LabelSets
from emotion_train.preparation.reading import CleanPosts
from emotion_train.preparation.stratify import DRAW
from emotion_train.preparation.work import Work


class Chosen:
    """The chosen rows of all partitions. `counts_SC` counts posts, or adds up shares, by split code
    and label code; its last column counts posts, whatever their labels.
    """

    def __init__(self, work: Work, posts: CleanPosts) -> None:
        self._work = work
        self._posts = posts
        self._kind = work.options.targets
        self.draws: Path = work.folder / "draws"
        self.sets: LabelSets | None = None  # the strata of posts with several labels
        self._labels = max(1, len(work.labels.codes))
        self.counts_SC: Any = np.zeros(
            (NO_SPLIT + 1, self._labels + 1), np.float64 if self._kind == "shares" else np.int64
        )

    @classmethod
    def of(cls, work: Work, posts: CleanPosts) -> Chosen:
        """Choose among the rows of each text; texts that contradict themselves are findings."""
        chosen = cls(work, posts)
        disputes: list[tuple[Dispute, int]] = []  # with the partition of each
        with chosen.draws.open("wb") as draws:
            for partition in range(posts.by_text.partitions):
                new = [(dispute, partition) for dispute in chosen._choose(partition, draws)]
                disputes = sorted(disputes + new, key=lambda item: item[0].place)[:EXAMPLES_SHOWN]
        work.findings.conflicts = [chosen._example(*item) for item in disputes]
        if chosen._kind == "several":
            chosen.sets = chosen._count_sets()
            chosen._draw_sets(chosen.sets)
        return chosen

    def rows(self, partition: int) -> tuple[Any, PostTargets]:
        """A flag for each row of a partition, set where the row stays, and the targets of the rows
        that stay.
        """
        path = self._path(partition)
        if not path.exists():
            return np.zeros(0, bool), PostTargets.of_one(np.zeros(0, np.int32))
        with path.open("rb") as file:
            keep_N = np.load(file)
            if self._kind == "one":
                return keep_N, PostTargets.of_one(np.load(file))
            return keep_N, PostTargets(*(np.load(file) for _ in PostTargets._fields))

    def strata(self, targets: PostTargets) -> Any:
        """The stratum of each post: its largest label, or its set of labels."""
        return targets.largest() if self.sets is None else self.sets.of(targets)

    def _path(self, partition: int) -> Path:
        return self._work.folder / f"kept-{partition:04}"

    def _choose(self, partition: int, draws: Any) -> list[Dispute]:
        """Choose among the rows of a partition; returns the conflicts to show."""
        options = self._work.options
        keys = ["key0", "key1", "split", "place", "draw"]
        columns = [*keys, *(name for name, _ in FIELDS[self._kind])]
        batches = list(self._posts.by_text.read(partition, self._work.positions(*columns)))
        if not batches:
            return []
        table = pa.Table.from_batches(batches)
        targets = PostTargets.of_rows(table, self._posts.code_C)
        flags = np.ones(targets.posts, bool)
        if self._kind == "one":
            flags = targets.label_P != LabelNames.SEVERAL
            targets = PostTargets.of_one(targets.label_P[flags])
        key0, key1, split, place, draw = (table.column(name).to_numpy()[flags] for name in keys)
        choice, targets, disputes = settle(
            (key0, key1, split, place),
            targets,
            self._kind,
            options.policy,
            self._labels,
            allow_none=options.allow_none,
        )
        self._note(choice, place)
        kept = np.flatnonzero(choice.keep_N)
        flags[flags] = choice.keep_N
        targets, split = targets.take(kept), split[kept]
        self._write(partition, flags, targets)
        at = split[targets.posts_of_pairs], targets.label_P
        np.add.at(self.counts_SC, at, targets.share_P.astype(self.counts_SC.dtype))
        self.counts_SC[:, -1] += np.bincount(split, minlength=len(self.counts_SC))
        if self._kind == "several":
            self._work.findings.note("without_label", place[kept[targets.counts == 0]])
        else:
            _add_draws(draws, self.strata(targets), draw[kept], split)
        return list(disputes) if choice.texts else []

    def _note(self, choice: Choice, place_N: Any) -> None:
        findings = self._work.findings
        findings.note("in_two_splits", place_N[choice.in_two_splits_N])
        findings.note("conflicting", place_N[choice.conflicting_N])
        findings.note("repeated", place_N[choice.repeated_N])
        if choice.texts:
            findings.counts["conflicting_texts"] += choice.texts

    def _write(self, partition: int, keep_N: Any, targets: PostTargets) -> None:
        with self._path(partition).open("wb") as file:
            for array in (keep_N, *([targets.label_P] if self._kind == "one" else targets)):
                np.save(file, array)

    def _count_sets(self) -> LabelSets:
        """The sets of labels that posts in train or in no split have, each a stratum."""
        sets = LabelSets(self.counts_SC[:, :-1].sum(axis=0))
        for targets, _, split in self._with_draws():
            sets.add(targets.take(np.flatnonzero(split >= SPLIT_CODES["train"])))
        sets.freeze()
        return sets

    def _draw_sets(self, sets: LabelSets) -> None:
        with self.draws.open("wb") as draws:
            for targets, draw, split in self._with_draws():
                _add_draws(draws, sets.of(targets), draw, split)

    def _with_draws(self) -> Any:
        """The targets, draws and splits of the chosen posts, partition by partition."""
        for partition in range(self._posts.by_text.partitions):
            keep_N, targets = self.rows(partition)
            if not targets.posts:
                continue
            batches = self._posts.by_text.read(partition, self._work.positions("draw", "split"))
            table = pa.Table.from_batches(batches)
            draw, split = (table.column(name).to_numpy()[keep_N] for name in ("draw", "split"))
            yield targets, draw, split

    def _example(self, dispute: Dispute, partition: int) -> Example:
        """The conflict with its text, read from that partition, and with names of labels."""
        names = {code: name for name, code in self._work.labels.codes.items()}
        (text,) = (
            text.as_py()
            for batch in self._posts.by_text.read(partition, self._work.positions("place", "text"))
            for text in batch.column("text").filter(pc.equal(batch.column("place"), dispute.place))
        )
        votes = [(spelled(target, names), rows) for target, rows in dispute.votes]
        return Example(text, votes, None if dispute.winner is None else spelled(dispute.winner, names))


def _add_draws(draws: Any, stratum_N: Any, draw_N: Any, split_N: Any) -> None:
    """Record the draws of posts in train or in no split, some of which go to validation and
    test.
    """
    divisible_N = split_N >= SPLIT_CODES["train"]
    record = np.empty(int(divisible_N.sum()), DRAW)
    record["label"], record["draw"] = stratum_N[divisible_N], draw_N[divisible_N]
    record.tofile(draws)
