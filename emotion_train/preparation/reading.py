"""Reads every row of the sources, cleans it, and writes it into partitions by text; annotators'
rows are joined to posts first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emotion_train.data.cleaning import SCHEMA, SPLIT_CODES, Cleaner, Rules
from emotion_train.data.index import SPLITS
from emotion_train.data.labels import LabelNames
from emotion_train.data.targets import WEIGHT
from emotion_train.errors import WrongRequest
from emotion_train.preparation.annotations import joined
from emotion_train.preparation.auxiliary import AuxiliaryPosts, AuxiliarySource, EveryLabel
from emotion_train.preparation.spill import Spill, partition_of
from emotion_train.preparation.work import Work
from emotion_train.progress import ProgressLine
from emotion_train.sources.open import Source

_FORMS = {"list": "lists of labels", "object": "objects of shares", "plain": "labels without brackets"}


class CleanPosts(NamedTuple):
    """All clean rows, in partitions by text; `code_C` maps the label codes of the rows to final
    codes, and `rows_read` counts the rows of all sources.
    """

    by_text: Spill
    code_C: Any
    rows_read: int
    auxiliary: AuxiliaryPosts | None

    def texts_in(self, partition: int) -> Any:
        """The first halves of the hashes of a partition's texts."""
        column = [SCHEMA.get_field_index("key0")]
        batches = self.by_text.read(partition, column)
        return np.concatenate(
            [np.zeros(0, np.uint64), *(batch.column("key0").to_numpy() for batch in batches)]
        )


def read_posts(work: Work) -> CleanPosts:
    """The clean rows of all sources. Bad rows are counted in the findings.

    Raises `WrongRequest` where one split has lists of labels and another single labels.
    """
    auxiliary, every = _auxiliary_of(work)
    if work.options.annotations_by is None:
        by_text = work.spill("by_text")
        rows_read = _read_source(work, by_text, auxiliary, every)
        code_C = _settled_codes(work, by_text)
    else:
        answers = work.spill("answers")
        rows_read = _read_source(work, answers, auxiliary, every)
        by_text = _joined_answers(work, answers, _settled_codes(work, answers))
        code_C = work.labels.ranked()  # posts have the final codes from here on
    _refuse_other_forms(work)
    return CleanPosts(by_text, code_C, rows_read, auxiliary)


def _auxiliary_of(work: Work) -> tuple[AuxiliaryPosts | None, LabelNames | None]:
    """The auxiliary posts, still without rows, and the names for every label of the source if its
    auxiliary posts are kept.
    """
    options = work.options
    if not options.has_auxiliary or options.labels is None:
        return None, None
    names: tuple[str, ...] = work.labels.in_order()
    auxiliary = AuxiliaryPosts(
        options.targets, names, work.folder, work.partitions, work.memory // len(SPLITS)
    )
    of_source = work.source.label_names
    kept = options.auxiliary == "keep"
    every = EveryLabel(names, of_source) if kept else LabelNames(names, of_source)
    auxiliary.sources.append(AuxiliarySource(work.source.name, every, 0))
    return auxiliary, every if kept else None


def _read_source(
    work: Work, rows_by: Spill, auxiliary: AuxiliaryPosts | None, every: LabelNames | None
) -> int:
    """Write clean rows into partitions by text, or annotators' rows into partitions by post;
    returns how many rows all sources have.
    """
    options = work.options
    rules = Rules(
        options.max_chars,
        options.seed,
        options.unescape_html,
        options.targets,
        options.allow_none,
        options.keep_columns,
    )
    key = "draw" if options.annotations_by and options.id_column else "key0"
    cleaner = Cleaner(rules, work.labels, work.findings, every)
    done = 0
    with ProgressLine("reading", max(1, work.source.bytes >> 20), "MiB") as line:
        for batch in work.source.batches():
            rows, others = cleaner.separate(batch, work.source.files[batch.file].split)
            if len(rows):
                rows_by.add(rows, partition_of(rows.column(key).to_numpy(), rows_by.partitions))
            if others is not None and auxiliary is not None:
                auxiliary.add(others)
            done += sum(column.nbytes for column in (batch.texts, batch.labels) if column is not None)
            line.update(min(done, work.source.bytes) >> 20, f"{cleaner.rows_read:,} posts")
    rows_by.flush()
    rows_read = cleaner.rows_read
    if auxiliary is not None:
        files = len(work.source.files)
        for other in work.others:
            rows_read += _read_auxiliary(work, auxiliary, other, files)
            files += len(other.files)
    return rows_read


def _read_auxiliary(work: Work, auxiliary: AuxiliaryPosts, source: Source, earlier_files: int) -> int:
    """Read the posts of an auxiliary source that are in train or in no split; returns how many rows
    it has.
    """
    options = work.options
    names = LabelNames(None, source.label_names)
    auxiliary.sources.append(AuxiliarySource(source.name, names, earlier_files))
    rules = Rules(options.max_chars, options.seed, options.unescape_html, auxiliary.kind)
    cleaner = Cleaner(rules, names, work.findings)
    for batch in source.batches():
        numbered = batch._replace(file=batch.file + earlier_files)
        rows = cleaner.clean(numbered, source.files[batch.file].split)
        rows = rows.filter(pc.greater_equal(rows.column("split"), SPLIT_CODES["train"]))
        auxiliary.add(_weighing_one(rows) if work.weighted else rows)
    return cleaner.rows_read


def _weighing_one(rows: Any) -> Any:
    """Clean rows with a weight of 1 each."""
    columns = {name: rows.column(name) for name in rows.schema.names[:-2]}
    columns[WEIGHT] = pa.array(np.ones(len(rows)))
    return pa.record_batch(columns | {name: rows.column(name) for name in rows.schema.names[-2:]})


def _settled_codes(work: Work, rows_by: Spill) -> Any:
    """The final code of each label code. Rows whose label turned out to be several are counted
    here, and left out from here on.
    """
    if work.options.targets != "one":
        return work.labels.ranked()
    code_C = work.labels.settle()
    if (code_C == LabelNames.SEVERAL).any():
        columns = [SCHEMA.get_field_index(name) for name in ("place", "label")]
        for partition in range(rows_by.partitions):
            for batch in rows_by.read(partition, columns):
                place, label = (batch.column(name).to_numpy() for name in ("place", "label"))
                work.findings.note("several_labels", place[code_C[label] == LabelNames.SEVERAL])
    return code_C


def _joined_answers(work: Work, answers: Spill, code_C: Any) -> Spill:
    """The posts that annotators' rows join to, in partitions by text."""
    options = work.options
    by_text = work.spill("by_text")
    for partition in range(answers.partitions):
        batches = list(answers.read(partition))
        if not batches:
            continue
        table = pa.Table.from_batches(batches).combine_chunks()
        place = table.column("place").to_numpy()
        by_id = options.id_column is not None
        result = joined(table, code_C, options.targets, by_id=by_id, allow_none=options.allow_none)
        for kind in ("answers", "answered_again", "other_text", "no_half"):
            work.findings.note(kind, place[getattr(result, kind)])
        if len(result.posts):
            (posts,) = result.posts.to_batches()
            by_text.add(posts, partition_of(posts.column("key0").to_numpy(), by_text.partitions))
        answers.remove(partition)
    by_text.flush()
    return by_text


def _refuse_other_forms(work: Work) -> None:
    forms = {split: forms for split, forms in work.findings.forms.items() if split}
    for split, here in forms.items():
        for other, there in forms.items():
            if not here & there:
                raise WrongRequest(
                    f"{work.source.name} has {_FORMS[min(here)]} in {split} and {_FORMS[min(there)]} in"
                    f" {other}; write the labels of all splits in one form."
                )
