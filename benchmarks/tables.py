"""Does `prepare` read what others write? Tables with all that breaks readers, written by Python's
csv, pandas, pyarrow, `datasets`, json, by Spark's rules and by hand, each kept as meant or refused.

    python benchmarks/tables.py [--tables 10000] [--first-seed 0]

Ends with 1 and names the seed when a table came back as something else.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.tables import WRITERS, check_table, some_table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    ends: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.tables):
        draw = random.Random(seed)
        table, writer = some_table(draw), draw.choice(WRITERS)
        with tempfile.TemporaryDirectory() as folder:
            try:
                end = check_table(table, writer, Path(folder), draw, f"seed {seed}")
            except Exception as error:  # a traceback is as wrong as a wrong row
                end = "WRONG"
                wrong.append(f"seed {seed}: {type(error).__name__}: {error}")
        ends[writer.__name__.removeprefix("by_"), end] += 1
    for name, end in sorted(ends):
        print(f"{name:10} {end:8} {ends[name, end]:6,}")
    print(*wrong[:20], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
