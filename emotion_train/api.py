"""The verbs for notebooks and other programs: the same functions with typed arguments.

    from emotion_train import api

    api.prepare_posts("posts.csv", "s3://team/emotions")
    run = api.train_run(overrides=["data.url=s3://team/emotions", "run.output_url=s3://team/runs"])
    api.pull_run(run.url, "adapter")
    api.load_adapter("adapter").predict(["what a lovely mess"])

Nothing is printed unless `show=True`, which prints what the verb prints. The functions raise the
errors of `emotion_train.errors`; their sentences name options of the command line, and the
arguments here have the same names. Libraries are loaded by the first call that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emotion_train.command_line import quiet_libraries
from emotion_train.config import Config, Precision, load_config
from emotion_train.console import silence
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, Classifier, Prediction, open_classifier
from emotion_train.processes.borrowed import borrowed
from emotion_train.processes.systems import require_system

if TYPE_CHECKING:
    from emotion_train.preparation.steps import PrepareResult
    from emotion_train.report.schema import Scorecard

__all__ = [
    "Classifier",
    "Config",
    "Prediction",
    "PublishedRun",
    "evaluate_adapter",
    "load_adapter",
    "load_config",
    "prepare_posts",
    "pull_run",
    "train_run",
]

quiet_libraries()

# variables that a launcher sets for its processes; a call trains in one process
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class PublishedRun:
    """A run that is published at `url`, with the scores of the split that its report quotes.
    `scores` are the scores beside macro-F1, such as `accuracy`, or `micro_f1` where posts have
    several labels.
    """

    url: str
    run_id: str
    step: int
    split: str
    macro_f1: float
    scores: dict[str, float]


def prepare_posts(
    source: str | Path | None, data_url: str | Path, *, show: bool = False, **options: Any
) -> PrepareResult:
    """Turn posts into a data set, as `emotion-train prepare` does, and return its index and
    findings.

    `options` are the fields of `emotion_train.preparation.options.Options`: those of the verb, with
    underscores, and `labels` as a tuple of names. Raises `WrongRequest` for posts that cannot
    be used, and for another data set at `data_url`; `StorageError` for a store that refuses or does
    not answer.
    """
    from emotion_train.preparation.options import Options
    from emotion_train.preparation.steps import prepare

    if unknown := sorted(options.keys() - Options.__dataclass_fields__.keys()):
        raise WrongRequest(
            f"prepare_posts has no option {unknown[0]}; it has {', '.join(Options.__dataclass_fields__)}."
        )
    for name, value in options.items():
        if isinstance(value, str) and "tuple" in str(Options.__dataclass_fields__[name].type):
            raise WrongRequest(f"{name} is the text {value!r}; give a list, such as {value.split(',')}.")
    with _spoken(show):
        return prepare(source, str(data_url), **options)


def train_run(
    config: Config | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    device: Literal["auto", "cpu"] = "auto",
    allow_unfenced: bool = False,
    show: bool = False,
) -> PublishedRun:
    """Train in this process until the run is published, as `emotion-train train` does.

    `config` is a YAML file or a `Config` of `load_config`; `overrides` are `section.field=value`
    words. A call with the `run.id` of a stopped run resumes it, and of a published run returns it.
    `device`: auto requires a GPU.

    Raises `WrongRequest`; `Preempted` after a preemption notice or one Ctrl-C, once the step is
    saved (a second Ctrl-C raises `KeyboardInterrupt`); `Fenced` when another writer owns the run;
    `Diverged`; and others of `emotion_train.errors`.
    """
    require_system("train")
    from emotion_train.train import train

    if isinstance(config, Config):
        if overrides:
            raise WrongRequest("overrides are for a file; give them to load_config.")
        asked = config
    else:
        asked = load_config(config, overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WrongRequest(
            "train_run trains in one process, and a launcher started this one as one of several; use"
            " emotion-launch run."
        )
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    if device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    with _spoken(show), borrowed():
        run_id, final = train(asked, allow_unfenced, _resume_words, environment)
    url = f"{asked.run.output_url.rstrip('/')}/{run_id}"
    scores = {name: float(value) for name, value in final.metrics.items() if isinstance(value, int | float)}
    split = str(final.metrics.get("split") or "test")
    return PublishedRun(url, run_id, final.step, split, scores.pop("macro_f1", 0.0), scores)


def evaluate_adapter(
    adapter: str | Path | Sequence[str | Path],
    data_url: str | Path | None = None,
    *,
    split: str = "test",
    file: str | Path | None = None,
    text_column: str = "text",
    label_column: str = "label",
    label_columns: Sequence[str] | None = None,
    allow_none: bool = False,
    encoding: str = "utf-8",
    quoting: Literal["auto", "csv", "none"] = "auto",
    max_chars: int = 20_000,
    unescape_html: bool = False,
    out: str | Path | None = None,
    with_texts: bool = False,
    run_url: str | None = None,
    training_data: str | Path | None = None,
    base: str | None = None,
    precision: Precision | None = None,
    decoder: Literal["fused", "stock"] = "fused",
    device: Literal["auto", "cpu"] = "auto",
    show: bool = False,
) -> Scorecard:
    """Score an adapter on a split of a data set or on a file of labelled posts, as `emotion-train
    evaluate` does. `adapter` is one or several, as in `load_adapter`; the defaults are the verb's
    and the training's.

    Raises `WrongRequest` for labels or posts that cannot be scored, and for an adapter, base or run
    that do not belong together.
    """
    from emotion_train.judging.judge import evaluate
    from emotion_train.judging.question import Question

    first, *more = _all_of(adapter)
    asked = Question(
        AdapterChoice(first, base, precision, decoder, device, more=tuple(more)),
        data=_text(data_url),
        split=split,
        file=_text(file),
        text_column=text_column,
        label_column=label_column,
        label_columns=None if label_columns is None else tuple(label_columns),
        allow_none=allow_none,
        encoding=encoding,
        quoting=quoting,
        max_chars=max_chars,
        unescape_html=unescape_html,
        out=_text(out),
        with_texts=with_texts,
        run_url=run_url,
        training_data=_text(training_data),
    )
    with _spoken(show):
        return evaluate(asked)


def load_adapter(
    adapter: str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    precision: Precision | None = None,
    decoder: Literal["fused", "stock"] = "fused",
    device: Literal["auto", "cpu"] = "auto",
    show: bool = False,
) -> Classifier:
    """The classifier of an adapter; its `predict(texts)` labels posts. `adapter` is a run's URL, an
    adapter's folder or its copy in a bucket, like --adapter of the verbs; several answer together,
    by the mean of their logits. Base and precision default to the training's.

    Raises `WrongRequest` where no adapter is found, for another base than it was trained on, and
    for too small a GPU; `StorageError` for a store that refuses or does not answer.
    """
    from emotion_train.runs.adapter_cache import find_adapter

    with _spoken(show):
        folder, *more = (find_adapter(place).folder for place in _all_of(adapter))
        return open_classifier(AdapterChoice(folder, base, precision, decoder, device, more=tuple(more)))


def pull_run(
    run_url: str, folder: str | Path, *, with_training_filter: bool = False, show: bool = False
) -> Path:
    """Download a published run's adapter and report, as `emotion-launch pull` does, into a new or
    empty folder, and return the folder. Every byte is verified.

    Raises `WrongRequest` where no run is published, and `StorageError`.
    """
    from emotion_train.runs.published import download

    with _spoken(show):
        download(run_url, Path(folder), with_training_filter)
    return Path(folder)


def _resume_words(run_id: str, device: str) -> str:
    return f'train_run(…, device="{"cpu" if device == "cpu" else "auto"}") with run.id={run_id}'


def _all_of(adapter: str | Path | Sequence[str | Path]) -> list[str]:
    places = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    if not places:
        raise WrongRequest("No adapter is given; give a run's URL or a folder, or a list of them.")
    return list(map(str, places))


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


@contextmanager
def _spoken(show: bool) -> Iterator[None]:
    quiet: Callable[[], Any] = nullcontext if show else silence
    with quiet():
        yield
