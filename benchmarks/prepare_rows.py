"""How fast `emotion-train prepare` is and how much memory it takes, at several sizes of a synthetic
CSV file.

    python benchmarks/prepare_rows.py --rows 1000000 10000000 --targets one several

Writes about 150 bytes a post below TMPDIR, needs three times that while it runs, and removes
everything at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LABELS = 15
WORDS = 20_000
CHUNK = 100_000


def write_posts(path: Path, rows: int, seed: int, targets: str) -> None:
    """Posts of 5 to 40 words in Zipf's frequencies, a third with an emoji, one in 100 repeated; 15
    labels with a ratio of 20, of which a post has one, or of several up to three.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 9, WORDS)
    words = np.array(["".join(chr(97 + c) for c in draw.integers(0, 26, n)) for n in lengths], object)
    chance = 20.0 ** -np.linspace(0, 1, LABELS)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            sizes = draw.integers(5, 40, count)
            ends = np.cumsum(sizes)
            text = words[np.minimum(draw.zipf(1.3, ends[-1]) - 1, WORDS - 1)]
            posts = [" ".join(text[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
            posts[::3] = [f"{post} 🙂" for post in posts[::3]]
            posts[1::100] = posts[0 : len(posts[1::100]) * 100 : 100]
            labels = draw.choice(LABELS, count, p=chance / chance.sum())
            if targets == "one":
                cells = [f"emotion{label:02}" for label in labels]
            else:
                more = draw.choice(LABELS, (count, 2), p=chance / chance.sum()).tolist()
                many = draw.choice(3, count, p=(0.7, 0.2, 0.1)).tolist()
                sets = zip(labels.tolist(), more, many, strict=True)
                cells = [
                    "|".join(f"emotion{label:02}" for label in sorted({own, *others[:several]}))
                    for own, others, several in sets
                ]
            file.writelines(f'"{post}",{cell}\n' for post, cell in zip(posts, cells, strict=True))


def measure(rows: int, seed: int, memory_mb: int, targets: str) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory(prefix="prepare-rows-") as folder:
        posts = Path(folder, "posts.csv")
        write_posts(posts, rows, seed, targets)
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "emotion_train.prepare",
            str(posts),
            str(Path(folder, "data")),
            "--memory-mb",
            str(memory_mb),
            "--targets",
            targets,
        ]
        code, used = run(command)
        if code:
            raise SystemExit(f"prepare ended with {code}")
        took = time.perf_counter() - began
        cpu = used.ru_utime + used.ru_stime  # a busy machine does not stretch it as it does `took`
        peak_mib = used.ru_maxrss / 1024
        megabytes = posts.stat().st_size / 1e6
        return (
            f"| {targets} | {rows:,} | {megabytes:,.0f} | {took:,.0f} | {cpu:,.0f} | {rows / took:,.0f}"
            f" | {peak_mib:,.0f} |"
        )


def run(command: list[str]) -> tuple[int, resource.struct_rusage]:
    """Exit code of a child, and what it has used itself."""
    child = subprocess.Popen(command, stdout=sys.stderr)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000_000, 10_000_000],
        help="sizes, rising (default: 1 and 10 million)",
    )
    parser.add_argument("--targets", nargs="+", choices=("one", "several"), default=["one", "several"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mb", type=int, default=512)
    args = parser.parse_args()
    lines = [
        measure(rows, args.seed, args.memory_mb, targets)
        for targets in args.targets
        for rows in sorted(args.rows)
    ]
    print(
        "| labels | posts | CSV, MB | seconds | CPU seconds | posts/s | peak memory, MiB |\n"
        "|---|--:|--:|--:|--:|--:|--:|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
