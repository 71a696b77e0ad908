"""What the filter of the training texts costs when a run publishes, and how often it is wrong.

    python benchmarks/training_filter.py    # a million synthetic posts, 0.5 GB below TMPDIR

The posts are those of prepare_rows.py, prepared into a folder. CPU time is that of all threads,
which a busy machine does not stretch. Texts that were not trained on are posts of another seed
without those that both hold; the filter is asked for each of them.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
from prepare_rows import write_posts

from emotion_train.data.index import read_index
from emotion_train.data.text_filter import TextFilter, filter_of_split, keys_of
from emotion_train.preparation.steps import prepare
from emotion_train.storage.open import open_store


def measure(rows: int) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory(prefix="training-filter-") as name:
        folder = Path(name)
        write_posts(folder / "posts.csv", rows, seed=0, targets="one")
        prepare(str(folder / "posts.csv"), str(folder / "data"))
        store = open_store(str(folder / "data"))
        index = read_index(store)
        split = index.split("train")
        began, cpu_before_s = time.perf_counter(), time.process_time()
        made = filter_of_split(store, split, index.sha256())
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before_s
        known_N2 = keys_of_file(folder / "posts.csv")
        write_posts(folder / "others.csv", rows, seed=1, targets="one")
        others_N2 = keys_of_file(folder / "others.csv")
        fresh_N2 = others_N2[~np.isin(others_N2[:, 0], known_N2[:, 0])]
        wrong = int(made.contains(fresh_N2).sum())
        size = len(TextFilter.from_bytes(made.to_bytes(), "here").to_bytes())
        return (
            f"| {split.rows:,} | {seconds:,.1f} | {cpu_s:,.1f} | {split.rows / cpu_s:,.0f}"
            f" | {size / split.rows:.2f} | {len(fresh_N2):,} | {wrong / len(fresh_N2):.3%} |"
        )


def keys_of_file(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8") as file:
        return keys_of(row["text"] for row in csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="sizes (default: a million)")
    lines = [measure(rows) for rows in parser.parse_args().rows]
    print(
        "| training posts | seconds | CPU seconds | posts a CPU second | bytes a post | texts not trained on"
        " | of these taken for trained on |\n|--:|--:|--:|--:|--:|--:|--:|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
