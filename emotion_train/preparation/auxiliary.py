"""Auxiliary posts in preparation: posts with other labels than the named ones, or with several
labels where a post has one. They are trained on and never scored.

Each text is kept once: a post with the named labels wins over an auxiliary post, whatever its
split, and an earlier source over a later one; several auxiliary rows of one source become one with
the mean of their shares. Auxiliary posts go through temporary files of their own, so that the other
posts are byte for byte as without them.

Letters: N rows, C codes of labels, S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from emotion_train.data.cleaning import files_of
from emotion_train.data.conflicts import BY_DEFAULT, settle
from emotion_train.data.index import Auxiliary, KnownLabels, has_control
from emotion_train.data.labels import MAX_LABELS, LabelNames, means_missing, number, trimmed
from emotion_train.data.target_columns import PostTargets
from emotion_train.data.targets import KNOWN, WEIGHT, TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.preparation.shards import SplitWriter, schema_of
from emotion_train.preparation.spill import Spill, partition_of

Note = Callable[[str, Any], None]


class EveryLabel(LabelNames):
    """The named labels and, with codes after theirs, every other label in a source, except values
    that mean no label (NaN, the hub's -1).
    """

    def single(self, raw: str) -> int:
        code, value = super().single(raw), trimmed(raw)
        if code != self.UNKNOWN or means_missing(value) or number(value) == -1:
            return code
        if len(self.codes) >= MAX_LABELS:
            raise WrongRequest(
                f"With the auxiliary ones there are more than {MAX_LABELS:,} labels, such as {value[:40]!r};"
                " type --label-column with another, or leave --auxiliary keep out."
            )
        self.codes[value] = len(self.codes)
        return self.codes[value]


class AuxiliarySource(NamedTuple):
    """A source of labelled posts: its name, its labels by code, and its first file's number."""

    name: str
    names: LabelNames
    first_file: int


class AuxiliaryPosts:
    """Takes rows of all sources by `add`, decides by `settle` which rows to keep, and writes them
    by `write`. The first source has the named labels.
    """

    def __init__(
        self, kind: TargetKind, labels: tuple[str, ...], folder: Path, partitions: int, memory: int
    ) -> None:
        self.kind: TargetKind = "several" if kind == "several" else "shares"
        self.sources: list[AuxiliarySource] = []
        self.rows = 0
        self._main = labels
        self._names = labels  # of all codes, once it is settled
        self._folder = folder
        self._by_text = Spill(folder / "auxiliary-by-text", partitions, memory)
        self._shuffled = Spill(folder / "auxiliary-shuffled", partitions, memory)
        self._met_SC: Any = None  # which labels the posts of each source have

    def add(self, rows: Any) -> None:
        """Take clean rows, with the label codes of their source."""
        if len(rows):
            self._by_text.add(rows, partition_of(rows.column("key0").to_numpy(), self._by_text.partitions))

    def settle(self, keys_of: Callable[[int], Any], note: Note) -> None:
        """Decide which rows to keep. `keys_of` gives the hashes of the other posts' texts in a
        partition; `note` gets kinds of findings with the places of their rows.
        """
        self._by_text.flush()
        code_SC = self._joined_labels()
        self._met_SC = np.zeros((len(self.sources), len(self._names)), bool)
        for partition in range(self._by_text.partitions):
            batches = list(self._by_text.read(partition))
            self._by_text.remove(partition)
            if batches:
                table = pa.Table.from_batches(batches).combine_chunks()
                for source, rows, targets in self._staying(table, keys_of(partition), code_SC, note):
                    self._met_SC[source, targets.label_P] = True
                    self._shuffle(rows, targets, source)
        self._shuffled.flush()

    def _joined_labels(self) -> list[Any]:
        """The code of each source's labels in a list of all labels: the named ones in their order,
        then the others by name. A number is a label name only within its own source.
        """
        spelled = [
            {
                code: f"{source.name} {name}" if place and number(name) is not None else name
                for name, code in source.names.codes.items()
            }
            for place, source in enumerate(self.sources)
        ]
        others = {name for names in spelled for name in names.values()} - set(self._main)
        if strange := next((name for name in sorted(others) if has_control(name)), None):
            raise WrongRequest(
                f"An auxiliary post has the label {strange[:80]!r}, which holds a control character, for"
                " example an end of line; mend the label column."
            )
        self._names = (*self._main, *sorted(others))
        place_of = {name: place for place, name in enumerate(self._names)}
        code_SC = []
        for names in spelled:
            code_C = np.zeros(len(names), np.int32)
            code_C[list(names)] = [place_of[name] for name in names.values()]
            code_SC.append(code_C)
        return code_SC

    def _staying(
        self, table: Any, taken: Any, code_SC: list[Any], note: Note
    ) -> Iterator[tuple[int, Any, PostTargets]]:
        """The kept rows of a partition and their targets, source by source."""
        first_files = [source.first_file for source in self.sources]
        file_N = files_of(table.column("place").to_numpy())
        source_N = np.searchsorted(first_files, file_N, side="right") - 1
        for source in np.unique(source_N).tolist():
            rows = table.filter(pa.array(source_N == source))
            # half of a text's hash: two texts that share it cost one auxiliary post
            new_N = ~np.isin(rows.column("key0").to_numpy(), taken)
            note("auxiliary_repeated", rows.column("place").to_numpy()[~new_N])
            rows = rows.filter(pa.array(new_N)).combine_chunks()
            key0, key1, split, place = (
                rows.column(name).to_numpy() for name in ("key0", "key1", "split", "place")
            )
            taken = np.union1d(taken, key0)
            targets = PostTargets.of_rows(rows, code_SC[source])
            policy = BY_DEFAULT[self.kind]
            choice, targets, _ = settle(
                (key0, key1, split, place), targets, self.kind, policy, len(self._names)
            )
            note("auxiliary_repeated", place[~choice.keep_N])
            note("auxiliary", place[choice.keep_N])
            stays = np.flatnonzero(choice.keep_N)
            yield source, rows.take(pa.array(stays)), targets.take(stays)

    def _shuffle(self, rows: Any, targets: PostTargets, source: int) -> None:
        if not len(rows):
            return
        self.rows += len(rows)
        names = ("order", "place", "id", "text", *([WEIGHT] if WEIGHT in rows.column_names else []))
        columns = {name: rows.column(name).combine_chunks() for name in names}
        columns[KNOWN] = pa.array(np.full(len(rows), source, np.int32))
        batch = pa.record_batch(columns | targets.columns(self.kind))
        order_N = rows.column("order").to_numpy()
        self._shuffled.add(batch, partition_of(order_N, self._shuffled.partitions))

    def write(self, new_writer: Callable[[int, int, TargetKind], SplitWriter], weighted: bool) -> Auxiliary:
        """Write the kept posts in their shuffled order; returns their entry in the index. Labels
        without a kept post are dropped. `new_writer` makes a writer for a number of rows and
        labels.

        Raises `WrongRequest` for a source with fewer than two labels.
        """
        first = len(self._main)
        self._met_SC[0, :first] = True
        for source, met_C in zip(self.sources, self._met_SC, strict=True):
            if met_C.sum() < 2:
                raise WrongRequest(
                    f"The auxiliary source {source.name} adds posts of fewer than two labels, which teach"
                    " nothing; give another, or leave it out."
                )
        stays_C = self._met_SC.any(axis=0)
        id_C = np.cumsum(stays_C, dtype=np.int32) - 1
        schema = schema_of(self.kind, weighted, auxiliary=True)
        with new_writer(self.rows, int(stays_C.sum()), self.kind) as writer:
            for partition in range(self._shuffled.partitions):
                batches = list(self._shuffled.read(partition))
                self._shuffled.remove(partition)
                if batches:
                    writer.add(_in_order(pa.Table.from_batches(batches), id_C, self.kind, schema))
            split = writer.finish()
        known = tuple(
            KnownLabels(name=source.name, labels=tuple(id_C[met_C].tolist()))
            for source, met_C in zip(self.sources, self._met_SC, strict=True)
        )
        others = tuple(name for place, name in enumerate(self._names) if place >= first and stays_C[place])
        return Auxiliary(labels=others, sources=known, split=split)


def _in_order(table: Any, id_C: Any, kind: TargetKind, schema: Any) -> Any:
    """Rows of a partition in shuffled order, with final label ids, as the data set stores them."""
    order = np.lexsort((table.column("place").to_numpy(), table.column("order").to_numpy()))
    table = table.combine_chunks().take(pa.array(order))
    targets = PostTargets.of_rows(table, id_C)
    made = targets.columns(kind)
    return pa.table({name: made[name] if name in made else table.column(name) for name in schema.names}).cast(
        schema
    )
