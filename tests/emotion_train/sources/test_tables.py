"""What is kept of a table that another program wrote is the table, or the file is refused."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.tables import TABLES_IN_TESTS, WRITERS, check_table, some_table


@pytest.mark.parametrize("start", range(0, TABLES_IN_TESTS, TABLES_IN_TESTS // 4))
def test_a_table_is_kept_as_it_was_meant_or_refused(tmp_path: Path, start: int) -> None:
    ends: Counter[tuple[str, str]] = Counter()
    for seed in range(start, start + TABLES_IN_TESTS // 4):
        draw = random.Random(seed)
        table, writer = some_table(draw), draw.choice(WRITERS)
        folder = tmp_path / str(seed)
        folder.mkdir()
        ends[writer.__name__, check_table(table, writer, folder, draw, f"seed {seed}")] += 1
    kept = sum(count for (_, end), count in ends.items() if end == "kept")
    assert kept > 0.75 * ends.total()  # a reader that refuses everything would be right and useless
    assert any(end == "refused" for _, end in ends)
