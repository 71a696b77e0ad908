"""The files that a finished run leaves in the store: the adapter folder, the report, the
predictions and the filter of its training texts, committed by the log's final entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from emotion_train.data.text_filter import FILE_NAME
from emotion_train.evaluation.predictions import predictions_key, predictions_to_parquet
from emotion_train.report.figures import AnyResult
from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report
from emotion_train.runs.checkpoint import EVENTS
from emotion_train.runs.log import Entry, Writer, upload_part


def publish(
    writer: Writer, epoch: int, step: int, files: Mapping[str, bytes], report: Report, trained_on: bytes
) -> Entry:
    """Upload the files below `final/<incarnation>/`, and the filter `trained_on`, which is not for
    everybody, below `data/<incarnation>/`; then commit them by one log entry.

    Both prefixes are this writer's own, so a fenced writer never touches another's published files.
    """
    parts = (
        *(
            upload_part(writer.store, writer.run_id, f"final/{writer.incarnation:08d}/{name}", data)
            for name, data in files.items()
        ),
        writer.upload(FILE_NAME, trained_on),
    )
    headline = report.splits[report.headline]
    metrics: dict[str, float | int | str | None] = {"macro_f1": headline.macro_f1, **headline.also}
    metrics["split"] = report.headline
    return writer.append("final", epoch, step, parts, metrics)


def final_files(
    adapter: Path,
    report: Report,
    splits: Mapping[str, AnyResult],
    texts: Mapping[str, Mapping[str, str]] | None = None,
    events: bytes = b"",
) -> dict[str, bytes]:
    """All published files by name: the adapter's files below adapter/, report.json, report.html,
    the predictions of each split, with its posts' texts where `texts` has them by split and id, and
    TensorBoard's events if there are any.
    """
    files = {
        f"adapter/{path.relative_to(adapter).as_posix()}": path.read_bytes()
        for path in sorted(adapter.rglob("*"))
        if path.is_file()
    }
    files |= {"report.json": report.to_bytes(), "report.html": render_html(report).encode()}
    files |= {f"tensorboard/{EVENTS}": events} if events else {}
    return files | {
        predictions_key(name): predictions_to_parquet(
            result.predictions, report.labels, None if texts is None else texts[name]
        )
        for name, result in splits.items()
    }
