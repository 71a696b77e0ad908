"""A scored split as a person names it: a published run, a folder, a report.json or a scorecard,
with its predictions.

Others wrote these documents, so they are read within bounds, and predictions must be those that the
report counted. The predictions of one split are held in memory, 4 bytes a post and label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emotion_train.edges.bounded import Unreadable, object_in, parquet_errors, phrase, require_footer
from emotion_train.errors import ObjectNotFound, WrongRequest
from emotion_train.evaluation.predictions import (
    AnyPredictions,
    Inconsistent,
    SetPredictions,
    any_predictions_from_parquet,
    predictions_key,
    texts_from_parquet,
)
from emotion_train.evaluation.sets import SetCounts
from emotion_train.report.schema import AnyFigures, Report, Scorecard, SetFigures, SplitFigures
from emotion_train.runs.log import entry_key, final_entry, read_part
from emotion_train.runs.published import split_run_url
from emotion_train.storage.open import open_store

_REPORT, _CARD = "report.json", "scorecard.json"
_PULLED = f"report/{_REPORT}"  # where `emotion-launch pull` puts it
_MAX_JSON_BYTES = 64 << 20
_MAX_PREDICTIONS_BYTES = 4 << 30
_FILE = "file"  # a scorecard's name for posts that are no split


@dataclass(frozen=True)
class Source:
    """A report or scorecard with its place; `read` gives the bytes of an object beside it."""

    word: str
    document: Report | Scorecard
    read: Callable[[str], bytes]

    @property
    def name(self) -> str:
        if isinstance(self.document, Report):
            return self.document.identity.run_id
        return self.document.run_id or self.word

    @property
    def splits(self) -> tuple[str, ...]:
        if isinstance(self.document, Report):
            return tuple(self.document.splits)
        return (self.document.name,)


@dataclass(frozen=True, eq=False)
class Scored:
    """One model's predictions for one split. `texts` are the posts' texts by id, where the
    predictions hold them.
    """

    name: str
    word: str
    split: str
    document: Report | Scorecard
    predictions: AnyPredictions
    texts: Mapping[str, str] | None

    @property
    def report(self) -> Report | None:
        """None for a scorecard, which knows neither config nor versions."""
        return self.document if isinstance(self.document, Report) else None

    @property
    def labels(self) -> tuple[str, ...]:
        return self.document.labels

    @property
    def data_url(self) -> str | None:
        """The prepared data set that was scored; None for a file of posts."""
        if isinstance(self.document, Report):
            return self.document.identity.data_url
        return None if self.document.name == _FILE else self.document.source

    @property
    def index_sha256(self) -> str | None:
        """None for a scorecard, which does not hold it."""
        return self.report.identity.index_sha256 if self.report is not None else None

    @property
    def config(self) -> dict[str, Any] | None:
        return self.report.identity.config if self.report is not None else None

    @property
    def seed(self) -> int | None:
        run = (self.config or {}).get("run", {})
        return run.get("seed") if isinstance(run, dict) and isinstance(run.get("seed"), int) else None


def open_source(word: str, output_url: str | None = None) -> Source:
    """The report or scorecard that `word` names: OUTPUT_URL/RUN_ID, a run id below `output_url`, a
    folder or bucket prefix that holds one, or the JSON itself.

    Raises `WrongRequest` where there is none, where a run is not published, and for a document that
    is damaged or of another version.
    """
    if "/" not in word and "\\" not in word and not Path(word).exists():
        if output_url is None:
            raise WrongRequest(
                f"{word!r} is neither a file nor a folder here; give OUTPUT_URL/RUN_ID, or the run's id with"
                " --output-url OUTPUT_URL."
            )
        return _of_run(f"{output_url.rstrip('/')}/{word}")
    if word.endswith(".json"):
        folder, _, name = word.rpartition("/")
        return _of_folder(word, folder or ".", name)
    store = open_store(word)
    held = [key for key in (_REPORT, _PULLED, _CARD) if store.find(key) is not None]
    if len(held) > 1:
        raise WrongRequest(f"{word} holds {' and '.join(held)}; name one of them: {word}/{held[0]}.")
    if held:
        folder, _, name = f"{word.rstrip('/')}/{held[0]}".rpartition("/")
        return _of_folder(word, folder, name)
    if Path(word).is_dir() and not Path(word, entry_key(".", 0)).exists():
        raise WrongRequest(
            f"{word} holds neither {_REPORT}, {_PULLED}, {_CARD} nor the log of a run; give a run"
            " (OUTPUT_URL/RUN_ID), the folder of a pulled adapter, or what `emotion-train evaluate"
            " --out` wrote."
        )
    return _of_run(word)


def _of_run(url: str) -> Source:
    output_url, run_id = split_run_url(url)
    store = open_store(output_url)
    entry = final_entry(store, run_id)
    parts = {part.key.removeprefix(f"final/{entry.incarnation:08d}/"): part for part in entry.parts}

    def read(key: str) -> bytes:
        if key not in parts:
            raise ObjectNotFound(f"Run {url} published no {key}.")
        _require_size(parts[key].bytes, key, url)
        return read_part(store, run_id, parts[key])

    return Source(url, parse_document(read(_REPORT), f"{url} ({_REPORT})"), read)


def _of_folder(word: str, folder: str, name: str) -> Source:
    store = open_store(folder)

    def read(key: str) -> bytes:
        _require_size(store.stat(key).size, key, folder)
        return store.read(key)

    return Source(word, parse_document(read(name), store.url_of(name)), read)


def _require_size(size: int, key: str, place: str) -> None:
    if size > (_MAX_JSON_BYTES if key.endswith(".json") else _MAX_PREDICTIONS_BYTES):
        raise WrongRequest(f"{key} of {place} has {size:,} bytes, which is no such document; pull it again.")


def parse_document(raw: bytes, place: str) -> Report | Scorecard:
    """The report or scorecard; raises `WrongRequest` for a document that is neither, or damaged."""
    try:
        content = object_in(raw, _MAX_JSON_BYTES)
        schema = str(content.get("schema_version"))[:80]
        if schema.startswith("emotion-train/scorecard/"):
            return Scorecard.model_validate(content)
        if schema.startswith("emotion-train/report/"):
            return Report.model_validate(content)
    except ValidationError as error:
        raise WrongRequest(
            f"{place} cannot be read ({phrase(error)}); it is damaged, or a later version wrote it:"
            " use that version, or pull it again."
        ) from None
    except Unreadable as error:
        raise WrongRequest(f"{place} cannot be read ({error}); pull it again.") from None
    raise WrongRequest(f"{place} is neither a report nor a scorecard: its schema_version is {schema!r}.")


# --- the predictions of a split ---


def common_split(sources: list[Source], wanted: str | None) -> str:
    """The split to compare on: the `wanted` one, else the first scorecard's, else the first
    report's headline. Raises `WrongRequest` when a source was not scored on it.
    """
    cards = [source for source in sources if isinstance(source.document, Scorecard)]
    first = sources[0].document
    split = wanted or (
        cards[0].splits[0] if cards else first.headline if isinstance(first, Report) else first.name
    )
    for source in sources:
        if split not in source.splits:
            have = ", ".join(f"{other.name}: {' '.join(other.splits)}" for other in sources)
            raise WrongRequest(
                f"{source.word} was not scored on {split!r}; there are {have}. Give --split a split that all"
                " have."
            )
    return split


def read_scored(source: Source, split: str, name: str) -> Scored:
    """The predictions of the split, checked against the figures of the document.

    Raises `WrongRequest` when the predictions are missing, damaged or another model's.
    """
    key = predictions_key(split)
    try:
        raw = source.read(key)
    except ObjectNotFound:
        raise WrongRequest(
            f"There is no {key} beside {source.word}, and without predictions no post can be compared; give"
            " the run (OUTPUT_URL/RUN_ID) or the whole pulled or written folder."
        ) from None
    try:
        require_footer(raw[-8:], len(raw))
        with parquet_errors():
            predictions, texts = any_predictions_from_parquet(raw), texts_from_parquet(raw)
    except (Unreadable, Inconsistent) as error:
        raise WrongRequest(f"{key} of {source.word} cannot be read ({error}); pull it again.") from None
    _require_own(source, split, predictions)
    return Scored(name, source.word, split, source.document, predictions, texts)


def _require_own(source: Source, split: str, predictions: AnyPredictions) -> None:
    """Raises `WrongRequest` unless the document counted these very predictions."""
    if (
        predictions.prob_NC.shape[1] != len(source.document.labels)
        or len(set(predictions.ids)) < len(predictions.ids)
        or not _are_counted(predictions, _figures(source.document, split))
    ):
        raise WrongRequest(
            f"{predictions_key(split)} of {source.word} is not what its report counted; pull it again."
        )


def _are_counted(predictions: AnyPredictions, figures: AnyFigures) -> bool:
    """Whether the figures were counted from these predictions: the same confusion matrix or, with
    several labels, the same support, answers and F1 of each label.
    """
    try:
        counts = predictions.counts()
    except ValueError:  # a label number that does not exist
        return False
    if not isinstance(predictions, SetPredictions):
        return isinstance(figures, SplitFigures) and counts.tolist() == [*map(list, figures.confusion)]
    set_counts = SetCounts(counts)
    columns = (set_counts.support_C.tolist(), set_counts.predicted_C.tolist(), set_counts.f1_C.tolist())
    reported = [(one.support, one.predicted, one.f1) for one in figures.per_label]
    return isinstance(figures, SetFigures) and reported == list(zip(*columns, strict=True))


def _figures(document: Report | Scorecard, split: str) -> AnyFigures:
    """The figures over all posts; a scorecard's own `figures` leave out posts that were trained
    on.
    """
    if isinstance(document, Report):
        return document.splits[split]
    return document.figures_of_all or document.figures


def names_of(sources: list[Source]) -> list[str]:
    """A different name for each source: the run's name, the typed words where two runs have one
    name, and these with a number where they are the same too.
    """
    names, words = [source.name for source in sources], [source.word for source in sources]
    chosen = [
        word if names.count(name) > 1 and words.count(word) == 1 else name
        for name, word in zip(names, words, strict=True)
    ]
    return [
        name if chosen.count(name) == 1 else f"{name} ({chosen[: place + 1].count(name)})"
        for place, name in enumerate(chosen)
    ]


def labels_in_order(scored: Scored, labels: tuple[str, ...]) -> AnyPredictions:
    """The predictions with label numbers and columns in the order of `labels`, the same names in
    another order.
    """
    places_C = [labels.index(label) for label in scored.labels]
    return scored.predictions.relabelled(places_C, len(labels))
