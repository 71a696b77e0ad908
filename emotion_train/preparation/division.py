"""Chosen posts are divided into splits: which labels stay, which share is held out, and each post
in the shuffled order of its split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from emotion_train.data.cleaning import NO_SPLIT, SPLIT_CODES
from emotion_train.data.index import SPLITS, has_control
from emotion_train.errors import WrongRequest
from emotion_train.preparation.corrections import Corrector
from emotion_train.preparation.one_of_each import Chosen
from emotion_train.preparation.refusals import no_validation
from emotion_train.preparation.spill import Spill, partition_of
from emotion_train.preparation.stratify import Thresholds, thresholds
from emotion_train.preparation.work import Work
from emotion_train.progress import ProgressLine


class Fractions(NamedTuple):
    """The shares of train that become validation and test; 0 for splits that the source has."""

    validation: float
    test: float


class FinalLabels(NamedTuple):
    """The labels in their final order, and the final id of each code; -1 for a code without a kept
    row.
    """

    names: tuple[str, ...]
    id_of_code: Any


class Divided(NamedTuple):
    """The posts of each split, spilled by their shuffled order, their number, and that of each
    label.
    """

    shuffled: dict[str, Spill]
    rows: dict[str, int]
    label_counts: dict[str, list[float]]


def fractions_of(work: Work, counts_SC: Any) -> Fractions:
    """What is to be held out. Raises `WrongRequest` where that leaves no train or validation posts,
    or where some posts name a split and others do not.
    """
    name = work.source.name
    has = {split: bool(counts_SC[code, -1]) for split, code in SPLIT_CODES.items()}
    undivided = bool(counts_SC[NO_SPLIT, -1])
    if not undivided and not any(has.values()):
        raise WrongRequest(f"{name} holds no posts; give a file with posts.")
    if undivided and any(has.values()):
        raise WrongRequest(
            f"Some posts of {name} name a split and others do not; fill column 'split' everywhere or remove"
            " it."
        )
    if not undivided and not has["train"]:
        present = ", ".join(split for split in SPLITS if has[split])
        raise WrongRequest(
            f"{name} has posts for {present} only; add a file or split named train{work.not_read()}."
        )
    validation = 0.0 if has["validation"] else work.options.validation_fraction
    test = 0.0 if has["test"] or has["validation"] else work.options.test_fraction
    if not validation and not has["validation"]:
        raise no_validation(work, "raise --validation-fraction (now 0)")
    return Fractions(validation, test)


def final_labels(work: Work, counts_SC: Any) -> FinalLabels:
    """The labels that the data set has. Raises `WrongRequest` for fewer than two, and for a name
    with a control character.
    """
    labels = work.labels
    met = {name for name, code in labels.codes.items() if counts_SC[:, code].any()}
    names = tuple(name for name in labels.in_order() if name in met or labels.fixed)
    if len(names) < 2:
        raise WrongRequest(
            f"{work.source.name} has {', '.join(names) or 'no'} as its only label; at least two are needed"
            " to classify."
        )
    if strange := next((name for name in names if has_control(name)), None):
        raise WrongRequest(
            f"{work.source.name} has the label {strange[:80]!r}, which holds a control character, for"
            " example an end of line; mend the label column, or type --label-column with another."
        )
    id_of_code = np.full(counts_SC.shape[1] - 1, -1, np.int32)
    for position, name in enumerate(names):
        id_of_code[labels.codes[name]] = position
    return FinalLabels(names, id_of_code)


def divided(
    work: Work,
    by_text: Spill,
    chosen: Chosen,
    id_of_code: Any,
    fractions: Fractions,
    corrector: Corrector | None,
) -> Divided:
    """The chosen posts in their splits; `by_text` is emptied on the way."""
    codes = len(id_of_code)
    numbers = None if chosen.sets is None else chosen.sets.numbers(*fractions)
    limits = thresholds(chosen.draws, codes if numbers is None else len(numbers), *fractions, numbers)
    shuffled = {split: work.spill(split, len(SPLITS)) for split in SPLITS}
    rows_of = dict.fromkeys(SPLITS, 0)
    counts = {split: np.zeros(codes) for split in SPLITS}
    with ProgressLine("splitting", by_text.partitions, "partitions") as line:
        for partition in range(by_text.partitions):
            keep_N, all_targets = chosen.rows(partition)
            start = post = 0
            for batch in by_text.read(partition):
                rows = batch.filter(pa.array(keep_N[start : start + len(batch)]))
                start += len(batch)
                targets = all_targets.take(np.arange(post, post + len(rows)))
                post += len(rows)
                draw, split = (rows.column(name).to_numpy() for name in ("draw", "split"))
                split = _divided(split, draw, chosen.strata(targets), limits)
                if corrector is not None:  # after splitting: labels before correction decide it
                    targets = corrector.of_rows(rows, targets)
                targets = targets._replace(label_P=id_of_code[targets.label_P])
                names = ("order", "place", "id", "text", *work.options.more_columns)
                columns = {name: rows.column(name) for name in names}
                rows = pa.record_batch(columns | targets.columns(work.options.targets))
                for name, spill in shuffled.items():
                    in_split = split == SPLIT_CODES[name]
                    part = rows.filter(pa.array(in_split))
                    if len(part):
                        spill.add(part, partition_of(part.column("order").to_numpy(), spill.partitions))
                        rows_of[name] += len(part)
                        counts[name] += targets.take(np.flatnonzero(in_split)).label_counts(codes)
            by_text.remove(partition)
            line.update(partition + 1)
    for spill in shuffled.values():
        spill.flush()
    labels = int(id_of_code.max()) + 1
    return Divided(shuffled, rows_of, {split: count.tolist()[:labels] for split, count in counts.items()})


def _divided(split_N: Any, draw_N: Any, stratum_N: Any, limits: Thresholds) -> Any:
    """The final split of each post; those in train or in no split are divided by their draws."""
    divisible_N = split_N >= SPLIT_CODES["train"]
    split_N = np.where(divisible_N, SPLIT_CODES["train"], split_N)
    split_N[divisible_N & (draw_N < limits.validation_C[stratum_N])] = SPLIT_CODES["validation"]
    split_N[divisible_N & (draw_N < limits.test_C[stratum_N])] = SPLIT_CODES["test"]
    return split_N
