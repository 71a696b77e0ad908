"""What a finished run leaves in the store: the adapter folder, the report and the predictions,
committed by the log's final entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.evaluation.predictions import predictions_key, predictions_to_parquet
from emotion_train.report.figures import SplitResult
from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report
from emotion_train.runs.log import Entry, Writer, upload_part

if TYPE_CHECKING:
    pass


def publish(writer: Writer, epoch: int, step: int, files: Mapping[str, bytes], report: Report) -> Entry:
    """Upload the files below `final/<incarnation>/`, then commit them by one log entry.

    The prefix is this writer's own, so that a fenced one never touches what another has published.
    """
    parts = tuple(
        upload_part(writer.store, writer.run_id, f"final/{writer.incarnation:08d}/{name}", data)
        for name, data in files.items()
    )
    headline = report.splits[report.headline]
    metrics: dict[str, float | int | str | None] = {
        "macro_f1": headline.macro_f1,
        "weighted_f1": headline.weighted_f1,
        "accuracy": headline.accuracy,
    }
    metrics["split"] = report.headline
    return writer.append("final", epoch, step, parts, metrics)


def final_files(adapter: Path, report: Report, splits: Mapping[str, SplitResult]) -> dict[str, bytes]:
    """All that is published, by name: the files of the adapter below adapter/, report.json,
    report.html, the predictions of each split.
    """
    files = {
        f"adapter/{path.relative_to(adapter).as_posix()}": path.read_bytes()
        for path in sorted(adapter.rglob("*"))
        if path.is_file()
    }
    files |= {"report.json": report.to_bytes(), "report.html": render_html(report).encode()}
    return files | {
        predictions_key(name): predictions_to_parquet(result.predictions) for name, result in splits.items()
    }
