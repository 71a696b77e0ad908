"""Scores an adapter on a split of a prepared data set, or on a file of labelled posts, with the
same figures and floors as the report.

A file is held in memory; a data set's split is streamed, its predictions are held. Posts that the
adapter was trained on are looked up in its run, reported, and left out of the quoted figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from emotion_train.bases.public_names import public_base
from emotion_train.config import POSTS_PER_SCORING_STEP
from emotion_train.console import tell
from emotion_train.data.targets import WORDS, Target, dense
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.evaluation.adapter import (
    AdapterChoice,
    Classifier,
    add_adapter_arguments,
    add_file_arguments,
    open_classifier,
)

if TYPE_CHECKING:
    from emotion_train.data.index import Index
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.predictions import AnyPredictions
    from emotion_train.model.ensemble import Ensemble
    from emotion_train.model.facts import AdapterFacts
    from emotion_train.report.figures import AnyResult
    from emotion_train.report.schema import Member, Scorecard
    from emotion_train.report.scorecard import Seen
    from emotion_train.runs.adapter_cache import FoundAdapter
    from emotion_train.runs.origin import Origin
    from emotion_train.sources.posts import Columns
    from emotion_train.storage.store import Store

_BOOTSTRAP_SAMPLES = 2000
_SEED = 42  # run.seed's default, which gives the figures of a run's report
_FLOOR_MAX_ROWS = 100_000  # also of a training split that stands in for a filter
_LOOKED_UP_AT_A_TIME = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, several="logits")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="DATA_URL", help="data set written by `emotion-train prepare`")
    what.add_argument(
        "--file",
        metavar="FILE",
        help=(
            "labelled posts: a CSV, TSV, JSONL, Parquet or Arrow file or a folder of them, also in a bucket"
            " (s3://…)"
        ),
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="split of --data (default: test)")
    add_file_arguments(parser)
    parser.add_argument(
        "--label-column",
        default="label",
        metavar="NAME",
        help="column of the labels in --file, as `prepare` reads them (default: label)",
    )
    parser.add_argument(
        "--label-columns",
        metavar="A,B,C",
        help=(
            "columns of the labels in --file in place of --label-column, with 0 or 1 in each, or with shares"
            " or numbers of votes; joy..anger are all columns from joy to anger"
        ),
    )
    parser.add_argument(
        "--allow-none",
        action="store_true",
        help="with an adapter of several labels: a post of --file may have none (default: it is refused)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder or s3:// URL for scorecard.json and the predictions (default: only print)",
    )
    parser.add_argument(
        "--with-texts", action="store_true", help="write the texts of the posts into the predictions too"
    )
    parser.add_argument(
        "--run",
        dest="run_url",  # `run` is the verb's own function
        metavar="OUTPUT_URL/RUN_ID",
        help=(
            "run that published the adapter; its filter finds posts that were trained on (default: the"
            " filter pulled by --with-training-filter, else the run that report/report.json names)"
        ),
    )
    parser.add_argument(
        "--training-data",
        metavar="DATA_URL",
        help=(
            "data set that the adapter was trained on, for the TF-IDF floor of a file and, where there is no"
            " filter, to find posts that were trained on (default: the data set in the run's report)"
        ),
    )


@dataclass(frozen=True)
class Question:
    """The posts to score: a split of the data set at `data`, or the labelled posts of `file`, read
    by the rules of `prepare`. `out` is a folder or URL for scorecard and predictions; `run_url` and
    `training_data` say what the adapter was trained on.
    """

    chosen: AdapterChoice
    data: str | None = None
    split: str = "test"
    file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    label_columns: tuple[str, ...] | None = None  # in place of label_column
    allow_none: bool = False
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"
    max_chars: int = 20_000
    unescape_html: bool = False
    out: str | None = None
    with_texts: bool = False
    run_url: str | None = None
    training_data: str | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Question:
        from emotion_train.data.labels_file import names_in

        names = [name for name in cls.__dataclass_fields__ if name not in ("chosen", "label_columns")]
        columns = None if arguments.label_columns is None else names_in(arguments.label_columns)
        return cls(
            AdapterChoice.of(arguments),
            label_columns=columns,
            **{name: getattr(arguments, name) for name in names},
        )


def run(arguments: argparse.Namespace) -> int:
    """Print the figures, and write them to --out; returns 0."""
    from emotion_train.console import Terminal
    from emotion_train.report.terminal import print_scorecard

    print_scorecard(evaluate(Question.of(arguments)), Terminal(highlight=False, soft_wrap=True))
    return 0


def evaluate(asked: Question) -> Scorecard:
    """The figures, which are also written to `out`.

    Raises `WrongRequest` for labels that the adapter does not know, posts that cannot be scored,
    and an adapter, base or run that do not belong together.
    """
    from emotion_train.evaluation.members import facts_together
    from emotion_train.report.scorecard import Seen
    from emotion_train.runs.adapter_cache import find_adapter
    from emotion_train.storage.open import open_store

    # all checks come before torch is imported and the base is loaded
    out = open_store(asked.out) if asked.out else None
    if asked.chosen.more and asked.run_url is not None:
        raise WrongRequest(
            "--run names the run of one adapter, and several are given; leave it out, and give each --adapter"
            " as OUTPUT_URL/RUN_ID."
        )
    all_found = [find_adapter(str(place)) for place in asked.chosen.adapters]
    folders = [found.folder for found in all_found]
    chosen = replace(asked.chosen, adapter=folders[0], more=tuple(folders[1:]))
    origins = [_origin_of(found, asked) for found in all_found]
    facts_together(folders, [str(place) for place in asked.chosen.adapters])
    origin = origins[0]
    train_counts: Sequence[float] | None = None
    remarks: list[str] = []
    chose = False
    if bool(asked.data) == bool(asked.file):
        raise WrongRequest("Give one of --data DATA_URL and --file FILE, and not an empty one.")
    if asked.data:
        posts = _Split.open(asked.data, asked.split, origin.facts)
        validation = _validation_of(origins, posts)
        seen = Seen.by_any([_seen_in_split(one, posts) for one in _apart(origins)])
        classifier = open_classifier(chosen)
        together = _decide_together(validation, classifier)
        # posts that chose thresholds and temperature must not judge them
        chose = asked.split == "validation" and posts.index.sha256() == origin.index_sha256
        result, train_counts = _score_split(posts, classifier, chose)
        if result.tfidf is None:
            rows = posts.index.split("train").rows
            remarks += [
                f"There is no TF-IDF floor to compare with: {rows:,} training posts are more than"
                f" {_FLOOR_MAX_ROWS:,}."
            ]
    else:
        found_posts = labelled_posts(asked, origin.facts)
        validation = _validation_of(origins)
        ids, texts, targets = found_posts
        seen = Seen.by_any([_look_up(one, zip(ids, texts, strict=True)) for one in _apart(origins)])
        remarks += _repeated(texts, targets)
        classifier = open_classifier(chosen)
        together = _decide_together(validation, classifier)
        result, without_floor = _score_file(origin, found_posts, classifier)
        remarks += without_floor
    remarks += together
    if remark := classifier.cut_remark():
        tell(f"emotion-train: {remark}")
    from emotion_train.evaluation.floors import posts as posts_of
    from emotion_train.evaluation.predictions import predictions_key, predictions_to_parquet
    from emotion_train.report.scorecard import build_scorecard

    name, facts = asked.split if asked.data else "file", classifier.loaded.facts
    card = build_scorecard(
        result,
        name=name,
        labels=classifier.labels,
        train_counts=train_counts,
        seen=seen,
        remarks=remarks,
        samples=_BOOTSTRAP_SAMPLES,
        seed=_SEED,
        decision=classifier.decision,
        chose=chose,
        source=str(asked.data or asked.file),
        run_id=facts.run_id,
        members=_members(origins) if len(origins) > 1 else (),
        base=public_base(asked.chosen.base or facts.base),
        layers=facts.layers,
        precision=asked.chosen.precision or facts.precision,
    )
    if out is not None:
        texts_by_id = None
        if asked.with_texts and asked.data:
            texts_by_id = {key: text for key, text, _ in posts_of(posts.store, posts.index.split(name))}
        elif asked.with_texts:
            texts_by_id = dict(zip(ids, texts, strict=True))
        out.write("scorecard.json", card.to_bytes())
        out.write(
            predictions_key(name), predictions_to_parquet(result.predictions, classifier.labels, texts_by_id)
        )
        tell(f"written: {out.url_of('scorecard.json')} and {predictions_key(name)}", sys.stdout)
    return card


def _origin_of(found: FoundAdapter, asked: Question) -> Origin:
    from emotion_train.runs.origin import Origin

    origin = Origin.of(found.folder, asked.run_url, asked.training_data)
    if asked.run_url is None and found.run_url is not None:  # its report may name an earlier place
        return replace(origin, run_url=found.run_url)
    return origin


def _apart(origins: Sequence[Origin]) -> list[Origin]:
    """One origin for each data set that the adapters were trained on."""
    return list({one.index_sha256 or one.folder: one for one in reversed(origins)}.values())


def _members(origins: Sequence[Origin]) -> tuple[Member, ...]:
    from emotion_train.model.facts import WEIGHTS
    from emotion_train.report.schema import Member
    from emotion_train.storage.document import file_sha256

    return tuple(
        Member(
            name=one.facts.run_id or one.folder.resolve().name,
            weights_sha256=file_sha256(one.folder / WEIGHTS),
        )
        for one in origins
    )


@dataclass(frozen=True)
class _Split:
    """A split of a data set whose labels the adapter knows; `places` are the adapter's numbers of
    these labels.
    """

    store: Store
    index: Index
    name: str
    places: npt.NDArray[np.int64]

    @classmethod
    def open(cls, data_url: str, name: str, facts: AdapterFacts) -> _Split:
        from emotion_train.data.index import read_index
        from emotion_train.storage.open import open_store

        store = open_store(data_url)
        index = read_index(store)
        index.split(name)
        labels = facts.labels
        if (index.targets == "several") != (facts.targets == "several"):
            raise WrongRequest(
                f"The posts of {data_url} have {WORDS[index.targets]} and the adapter answers with"
                f" {WORDS[facts.targets]}; give a data set that was prepared with --targets {facts.targets}."
            )
        for label in index.labels:
            if label not in labels:
                raise WrongRequest(
                    f"The data set {data_url} has the label {label!r}, which the adapter does not know; its"
                    f" labels are {', '.join(labels)}."
                )
        return cls(store, index, name, np.array([labels.index(label) for label in index.labels]))


def _seen_in_split(origin: Origin, posts: _Split) -> Seen:
    """The posts of a split that were trained on. `prepare` keeps every text of a data set in one
    split.
    """
    from emotion_train.evaluation.floors import posts as posts_of
    from emotion_train.report.scorecard import Seen

    split = posts.index.split(posts.name)
    if posts.index.sha256() != origin.index_sha256:
        return _look_up(origin, ((post_id, text) for post_id, text, _ in posts_of(posts.store, split)))
    if posts.name != "train":
        return Seen()
    return Seen({post_id for post_id, _, _ in posts_of(posts.store, split)})


def _repeated(texts: list[str], targets: list[Target]) -> list[str]:
    """A remark on the posts of a file that repeat the text of an earlier post; empty without
    any.
    """
    from emotion_train.data.text_filter import keys_of

    first: dict[bytes, Target] = {}
    others = [
        target != first.setdefault(key.tobytes(), target)
        for key, target in zip(keys_of(texts), targets, strict=True)
    ]
    repeated = len(others) - len(first)
    if not repeated:
        return []
    posts = "1 post has" if repeated == 1 else f"{repeated:,} posts have"
    differ = f", {sum(others):,} of them with another label" if any(others) else ""
    return [f"{posts} the text of an earlier post{differ}; each counts."]


def _look_up(origin: Origin, posts: Iterable[tuple[str, str]]) -> Seen:
    """The posts (id, text) that are in the adapter's training split, or why that is not known."""
    from emotion_train.data.text_filter import FALSE_POSITIVES, keys_of
    from emotion_train.report.scorecard import Seen
    from emotion_train.runs.origin import NotInReach

    try:
        trained_on = origin.training_filter(_FLOOR_MAX_ROWS)
    except NotInReach as error:
        return Seen(
            unknown=f"Whether these posts were trained on could not be looked up: {error}. Give --run"
            " OUTPUT_URL/RUN_ID or --training-data DATA_URL, or an adapter pulled with"
            " --with-training-filter."
        )
    ids: set[str] = set()
    posts = iter(posts)
    while chunk := list(islice(posts, _LOOKED_UP_AT_A_TIME)):
        found_N = trained_on.contains(keys_of(text for _, text in chunk))
        ids.update(post_id for (post_id, _), found in zip(chunk, found_N, strict=True) if found)
    return Seen(ids, FALSE_POSITIVES)


def _score_split(posts: _Split, classifier: Classifier, chose: bool) -> tuple[AnyResult, Sequence[float]]:
    """The result, and the training posts of each of the adapter's labels, or the sums of their
    shares; `chose`: these posts chose the thresholds.
    """
    from emotion_train.evaluation.floors import tfidf_predictions
    from emotion_train.evaluation.predictions import placed
    from emotion_train.report.figures import decided

    classes = len(classifier.labels)
    scored = _scored(posts, classifier)
    floor = tfidf_predictions(posts.store, posts.index, [posts.name], _FLOOR_MAX_ROWS, _SEED).get(posts.name)
    if floor is not None:
        floor = floor.relabelled(posts.places, classes)
    train = posts.index.splits.get("train")
    train_counts = placed(
        np.array([train.label_counts if train else posts.places * 0]), posts.places, classes
    )
    return decided(scored.counts(), scored, floor, classifier.decision, chose), train_counts[0].tolist()


def _scored(posts: _Split, classifier: Classifier) -> AnyPredictions:
    """The classifier's predictions for each post of the split."""
    from emotion_train.data.loader import Loader
    from emotion_train.data.order import Order
    from emotion_train.data.reader import RowGroupReader
    from emotion_train.evaluation.predictions import join_predictions
    from emotion_train.evaluation.scoring import fill_multiple, score
    from emotion_train.progress import ProgressLine

    split, classes = posts.index.split(posts.name), len(classifier.labels)
    model = classifier.loaded.model
    loader = Loader(
        RowGroupReader(posts.store, split),
        Order(split.row_counts, split.lanes, seed=0),
        classifier.tokenizer,
        np.ones(len(posts.index.labels)),
        global_batch_size=POSTS_PER_SCORING_STEP,
        tokens_per_microbatch=classifier.capacity,
        fill_multiple=fill_multiple(model.device),
        targets=posts.index.targets_of(posts.name),
    )
    with loader, ProgressLine(f"scoring {posts.name}", split.rows, "posts") as line:
        part = score(model, loader, model.device, classes, line.update, posts.places)
    return join_predictions([part], split.rows)


def _decide_together(validation: _Split | str, classifier: Classifier) -> list[str]:
    """Choose temperature, thresholds and gates for several adapters together, on the validation
    posts of their training. Returns a remark where these posts cannot be read, else nothing.
    """
    from emotion_train.model.ensemble import Ensemble

    model = classifier.loaded.model
    if not isinstance(model, Ensemble):
        return []
    if isinstance(validation, str):
        own = "their thresholds are the mean of each adapter's own" if classifier.targets == "several" else ""
        return [
            f"No validation posts judged these adapters together: {validation}. Their mean has no"
            f" temperature of its own and there are no gates{own and f'; {own}'}."
        ]
    classifier.decision = _decision_by(_scored(validation, classifier), model, classifier.labels)
    return []


def _validation_of(origins: Sequence[Origin], posts: _Split | None = None) -> _Split | str:
    """The validation split of the data set that several adapters were trained on, or why there is
    none; `posts` is the split to score. Raises `StorageError` where its store does not answer,
    since the figures would differ without it.
    """
    from emotion_train.runs.origin import NotInReach

    first = origins[0]
    if len(origins) == 1:
        return "one adapter has been judged"
    if any(one.index_sha256 != first.index_sha256 for one in origins) or first.index_sha256 is None:
        return "they were trained on several data sets, or on data sets that are not known"
    if posts is not None and posts.index.sha256() == first.index_sha256:
        return replace(posts, name="validation")
    try:
        store, index = first.data_set()
    except NotInReach as error:
        if error.unanswered:
            raise StorageError(
                f"The validation posts that choose one temperature for these adapters cannot be read: {error}"
                ". Type the same command again, or give --training-data DATA_URL, a copy of the data set.",
                transient=True,
            ) from error
        return str(error)
    return _Split(store, index, "validation", np.arange(len(index.labels)))


def _decision_by(validation: AnyPredictions, model: Ensemble, labels: Sequence[str]) -> Decision:
    """The decision that the validation posts choose; the model gets the temperature that they
    choose.
    """
    import torch

    from emotion_train.config import ReportSection
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.predictions import SetPredictions
    from emotion_train.evaluation.temperature import divided, temper

    tempered = temper(validation)
    if tempered.temperature is not None:
        model.temperature = torch.tensor(tempered.temperature, dtype=torch.float32, device=model.device)
        prob_NC = divided(validation.prob_NC, tempered.temperature, validation.targets)
        validation = replace(validation, prob_NC=prob_NC)
    decision = (
        Decision.of(validation, labels)
        if isinstance(validation, SetPredictions)
        else Decision.one(labels, validation.targets)
    )
    return decision.acting(validation, tempered, ReportSection().gates)


def _score_file(origin: Origin, posts: LabelledPosts, classifier: Classifier) -> tuple[AnyResult, list[str]]:
    """The result on a file, and a remark where there is no TF-IDF floor. The floor is fitted only
    on the adapter's own training posts, as the report's is.
    """
    from emotion_train.evaluation.floors import tfidf_of_texts
    from emotion_train.evaluation.predictions import join_predictions
    from emotion_train.evaluation.scoring import predictions_of
    from emotion_train.progress import ProgressLine
    from emotion_train.report.figures import decided
    from emotion_train.runs.origin import NotInReach

    ids, texts, targets = posts
    chunks = []
    with ProgressLine("scoring", len(texts), "posts") as line:
        for start in range(0, len(texts), POSTS_PER_SCORING_STEP):
            chunk = texts[start : start + POSTS_PER_SCORING_STEP]
            chunks.append(classifier.probabilities(chunk))
            line.update(start + len(chunk))
    targets_NC = dense(targets, len(classifier.labels)).astype(np.float32)
    predictions = predictions_of(ids, targets_NC, np.concatenate(chunks), classifier.targets)
    scored = join_predictions([predictions], len(ids))
    try:
        store, index = origin.training_data(_FLOOR_MAX_ROWS)
    except NotInReach as error:
        return decided(scored.counts(), scored, None, classifier.decision), [
            f"There is no TF-IDF floor to compare with: {error}. Give --training-data DATA_URL, the data set"
            " that the adapter was trained on."
        ]
    tell("fitting the TF-IDF floor")
    floor = tfidf_of_texts(store, index, ids, texts, targets, _SEED)
    return decided(scored.counts(), scored, floor, classifier.decision), []


class LabelledPosts(NamedTuple):
    """The posts of a file, column by column."""

    ids: list[str]
    texts: list[str]
    targets: list[Target]


def labelled_posts(asked: Question, facts: AdapterFacts) -> LabelledPosts:
    """Every row of --file, duplicates included, with labels read as `prepare` reads them for the
    adapter's kind of targets.

    Raises `WrongRequest` that names the rows which cannot be scored, and for columns of labels that
    the adapter does not know.
    """
    from emotion_train.data.cleaning import REFUSED, Cleaner, Findings, Rules
    from emotion_train.data.labels import LabelNames
    from emotion_train.sources.open import Choices, open_source

    source, labels = str(asked.file), facts.labels
    if asked.allow_none and facts.targets != "several":
        raise WrongRequest(
            f"--allow-none is for several labels, and the adapter answers with {WORDS[facts.targets]}; leave"
            " it out."
        )
    choices = Choices(encoding=asked.encoding, quoting=asked.quoting)
    with open_source(source, _columns(asked, facts), choices) as found:
        findings = Findings(file.name for file in found.files)
        names = LabelNames(labels, found.label_names)
        rules = Rules(asked.max_chars, 0, asked.unescape_html, facts.targets, asked.allow_none)
        cleaner = Cleaner(rules, names, findings)
        rows: list[Any] = [cleaner.clean(batch, None) for batch in found.batches()]
    if lines := findings.lines(REFUSED):
        may_be_none = findings.counts["no_label"] and facts.targets == "several"
        or_none = ", or type --allow-none where a post may have none of the labels" if may_be_none else ""
        raise WrongRequest(
            f"{source} has posts that cannot be scored:\n  "
            + "\n  ".join(lines)
            + f"\nMend them{or_none}; the adapter's labels are {', '.join(labels)}."
        )
    ids, texts = (
        [value for batch in rows for value in batch.column(name).to_pylist()] for name in ("id", "text")
    )
    if not ids:
        raise WrongRequest(
            f"{source} has no posts; give a file with the columns {asked.text_column} and"
            f" {', '.join(asked.label_columns or [asked.label_column])}."
        )
    return LabelledPosts(ids, texts, _targets(rows, names.in_order(), labels, source))


def _targets(rows: Sequence[Any], in_file: Sequence[str], labels: Sequence[str], source: str) -> list[Target]:
    """The targets with the adapter's label ids, from the ids of the file's label columns
    `in_file`.
    """
    from emotion_train.data.target_columns import PostTargets

    if (unknown := next((name for name in in_file if name not in labels), None)) is not None:
        raise WrongRequest(
            f"{source} has a column for the label {unknown!r}, which the adapter does not know; its labels"
            f" are {', '.join(labels)}."
        )
    place_C = np.array([labels.index(name) for name in in_file], np.int32)
    by_batch = [PostTargets.of_rows(batch, place_C) for batch in rows]
    return [of_rows.target(row) for of_rows in by_batch for row in range(of_rows.posts)]


def _columns(asked: Question, facts: AdapterFacts) -> Columns:
    from emotion_train.sources.posts import Columns

    return Columns(
        asked.text_column,
        asked.label_column if asked.label_columns is None else None,
        split=None,
        label_columns=asked.label_columns or (),
        lists=facts.targets != "one",
    )


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
