"""What a finished run leaves in the store: the adapter folder, the report and the predictions,
committed by the log's final entry.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emotion_train.data.index import Index, Split
from emotion_train.data.reader import RowGroupReader
from emotion_train.evaluation.floors import tfidf_floor
from emotion_train.evaluation.predictions import Predictions, predictions_key, predictions_to_parquet
from emotion_train.report.figures import SplitResult
from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report
from emotion_train.runs.log import Entry, Writer, upload_part
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "emotion-train",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "numpy",
    "scikit-learn",
    "pyarrow",
)


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


def tfidf_predictions(
    store: Store, index: Index, names: Sequence[str], max_train_rows: int, seed: int, patience_s: float = 0.0
) -> dict[str, Predictions]:
    """The TF-IDF floor's predictions of these splits; empty when the training split is larger than
    `max_train_rows`.

    A store that does not answer is asked again for `patience_s` seconds.
    """
    train = index.split("train")
    if train.rows > max_train_rows:
        return {}
    # ids, texts, labels
    columns = {name: list(zip(*posts(store, index.split(name), patience_s), strict=True)) for name in names}
    every_text = [text for _, texts, _ in columns.values() for text in texts]
    prob_NC = tfidf_floor(
        ((text, label) for _, text, label in posts(store, train, patience_s)),
        every_text,
        len(index.labels),
        seed,
    )
    found, at = {}, 0
    for name, (ids, _, labels) in columns.items():
        found[name] = Predictions.of(ids, labels, prob_NC[at : at + len(ids)])
        at += len(ids)
    return found


def posts(store: Store, split: Split, patience_s: float = 0.0) -> Iterator[tuple[str, str, int]]:
    """(id, text, label) of a split, in the order in which it is stored."""
    with RowGroupReader(store, split, capacity=16, patience_s=patience_s) as reader:
        for group in range(len(split.row_groups)):
            reader.ask(range(group, min(group + 8, len(split.row_groups))))
            rows = reader.rows(group)
            yield from zip(rows.ids, rows.texts, rows.labels, strict=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of this program's checkout, with + when files differ from it; None outside a
    checkout.
    """
    here = Path(__file__).parents[1]
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__],
            cwd=here,
            capture_output=True,
            timeout=10,
            check=True,
        )
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed.strip() else "")


def peak_memory(device: torch.device) -> tuple[int, Literal["GPU", "RSS"]]:
    """Bytes at the fullest moment: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device), "GPU"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "RSS"
