"""What every step of one preparation needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emotion_train.data.cleaning import Findings, schema_of
from emotion_train.data.labels import LabelNames
from emotion_train.preparation.options import Options
from emotion_train.preparation.spill import Spill, partitions_for
from emotion_train.sources.open import Source


@dataclass(frozen=True)
class Work:
    """One preparation: the source, the auxiliary sources, and what is asked of them; `labels` and
    `findings` grow while posts are read. Rows on their way lie in `folder`.
    """

    source: Source
    others: Sequence[Source]
    options: Options
    labels: LabelNames
    findings: Findings
    folder: Path

    @property
    def memory(self) -> int:
        """The memory budget in bytes."""
        return self.options.memory_mb << 20

    @property
    def partitions(self) -> int:
        """How many partitions rows are spilled into."""
        return partitions_for(self.source.bytes + sum(other.bytes for other in self.others), self.memory)

    @property
    def weighted(self) -> bool:
        """Whether each post has a weight."""
        return self.options.weight_column is not None

    def spill(self, name: str, side_by_side: int = 1) -> Spill:
        """An empty spill, one of so many that share the memory."""
        return Spill(self.folder / name, self.partitions, self.memory // side_by_side)

    def positions(self, *names: str) -> list[int]:
        """The positions of columns of clean rows."""
        schema = schema_of(self.options.targets, weighted=self.weighted, kept=self.options.keep_columns)
        return [schema.get_field_index(name) for name in names]

    def not_read(self) -> str:
        """The files that were passed over, for the end of a sentence; else nothing."""
        names = self.source.passed_over
        return f" (not read: {', '.join(names[:5])})" if names else ""
