"""The rows to paste after `benchmarks/first_24b.sh`, from what it left in a folder.

python benchmarks/first_24b_rows.py first-24b
"""

from __future__ import annotations

import sys
from pathlib import Path

from emotion_train.hosted.figures import Benchmark
from emotion_train.report.schema import Report

RUNS = ("recipe", "tutorial")


def training_rows(folder: Path) -> list[str]:
    """A row a run: the figures of its headline split, and what it took."""
    rows = [
        "| run | base | split | macro-F1 [95 %] | TF-IDF | posts/s | hours | $ |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for run in RUNS:
        path = folder / run / "adapter" / "report" / "report.json"
        report = Report.model_validate_json(path.read_text(encoding="utf-8"))
        figures, speed = report.splits[report.headline], report.speed
        floor = next((one.macro_f1 for one in figures.floors if "TF-IDF" in one.name), None)
        cells = [
            run,
            report.identity.base,
            f"{report.headline}, {figures.rows:,} posts",
            f"{figures.macro_f1:.3f} [{figures.macro_f1_low:.3f}, {figures.macro_f1_high:.3f}]",
            "-" if floor is None else f"{floor:.3f}",
            f"{speed.posts_per_second:,.0f}",
            f"{speed.train_seconds / 3600:.2f}",
            "-" if speed.usd is None else f"{speed.usd:,.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def hosted_rows(folder: Path) -> list[str]:
    """A row a system that labelled the same posts; none where no hosted model was asked."""
    path = folder / "benchmark" / "benchmark.json"
    if not path.exists():
        return []
    found = Benchmark.model_validate_json(path.read_text(encoding="utf-8"))
    rows = [
        f"{found.rows} of {found.of} posts of {found.split}:",
        "",
        "| labelled by | macro-F1 [95 %] | minus the adapter | not answered | $ a million posts |",
        "|---|--:|--:|--:|--:|",
    ]
    for one in (found.own, *found.hosted, *found.floors):
        apart = one.difference
        cells = [
            one.name,
            f"{one.macro_f1:.3f} [{one.low:.3f}, {one.high:.3f}]",
            "-" if apart is None else f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]",
            f"{found.rows - one.answered}",
            "-" if one.money is None else f"{one.money.usd_per_million_posts:,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> int:
    folder = Path(sys.argv[1])
    print("\n".join([*training_rows(folder), "", *hosted_rows(folder)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
