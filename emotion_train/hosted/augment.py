"""A data set gets synthetic posts for its rarest labels, or repeated real posts for the comparison.

Every check comes before the first call, and held-out texts are read only after the last answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from emotion_train.console import counted, tell
from emotion_train.data.index import Index, read_index
from emotion_train.errors import HostedStopped, WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, open_classifier
from emotion_train.evaluation.floors import posts as posts_of
from emotion_train.hosted.asking import Place
from emotion_train.hosted.augmentation import Augmentation
from emotion_train.hosted.augmentation_summary import summary, table_words, wish_words
from emotion_train.hosted.augmented import Added, repeated, require_plain, sources_of, write
from emotion_train.hosted.calling import PREFIX, Calling
from emotion_train.hosted.client import require_sdk
from emotion_train.hosted.options import Chosen, agree, dry_run_words
from emotion_train.hosted.prices import usd_of
from emotion_train.hosted.prompts import TrainingPosts, read_definitions
from emotion_train.hosted.synthetic import (
    Call,
    Counts,
    Judge,
    Made,
    Wish,
    best_of,
    made_of,
    plan,
    tfidf_judge,
    wishes,
    without_doubles,
)
from emotion_train.preparation.existing import existing_index
from emotion_train.runs.adapter_cache import find_adapter
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store


@dataclass(frozen=True)
class _Real:
    """The data set that gets posts; `posts` are those of its training split."""

    store: Store
    index: Index
    posts: TrainingPosts


def augment(asked: Augmentation) -> str:
    """Make the data set; returns what to print. Raises `WrongRequest` for a request that cannot be
    met, before anything is paid, and `HostedStopped` where the asking ends early.
    """
    asked.require_sane()
    source, store = open_store(asked.data_url), open_store(asked.new_data_url)
    if source.url == store.url:
        raise WrongRequest(
            f"NEW_DATA_URL is DATA_URL, {source.url}, which is never changed; give another URL."
        )
    index = read_index(source)
    require_plain(index, source.url)
    real = _Real(source, index, TrainingPosts.read(source, index))
    if asked.repeat_of is not None:
        return _repeat(asked, asked.repeat_of, real, store)
    return _with_synthetic_posts(asked, real, store)


def _with_synthetic_posts(asked: Augmentation, real: _Real, store: Store) -> str:
    require_sdk()
    options, labels = asked.hosted, real.index.labels
    chosen = Chosen.of(options, temperature=1.0)
    wished = wishes(labels, real.index.split("train").label_counts, asked.to, asked.labels)
    planned = partial(
        plan,
        wished,
        labels,
        real.posts,
        kind=real.index.targets,
        definitions=read_definitions(options.definitions, labels),
        shots=asked.shots,
        per_call=asked.per_call,
        keep=asked.keep,
        seed=options.seed,
    )
    calls = planned()  # the calls if no answer is cut
    if options.dry_run:
        prompts = [call.prompt for call in calls]
        cost = dry_run_words(chosen.endpoints, chosen.prices, prompts, "calls")
        return f"{wish_words(wished, labels)}\n{cost}"
    made_by = _made_by(asked, chosen, calls)
    if (there := _there_already(store, made_by)) is not None:
        return summary(asked, there, store)
    chosen.require_payable()
    chosen.keys()
    calling = Calling(chosen, store, planned, per_call=asked.per_call, again=options.ask_again)
    _ask(asked, chosen, calling)
    kept, counts, ids = _chosen_posts(asked, real, wished, calling)
    facts = made_by | _facts_of(counts, calling.place, calling.requests)
    _write_report(store, real.index, facts, counts, ids, kept)
    return summary(asked, _write(asked, real, store, kept, calling.requests, facts), store)


def _ask(asked: Augmentation, chosen: Chosen, calling: Calling) -> None:
    if missing := calling.missing():
        what = (
            f"{counted(len(missing) * asked.shots, 'real post')} of the training split, in"
            f" {counted(len(missing), 'call')},"
        )
        agree(chosen.endpoints, what, asked.hosted.yes)
        calling.ask()


def _made_by(asked: Augmentation, chosen: Chosen, calls: Sequence[Call]) -> dict[str, Any]:
    """The facts for the index that decide the data set: with another value it is another data
    set.
    """
    prompts = json.dumps([[list(one) for one in call.prompt.messages] for call in calls], ensure_ascii=False)
    (endpoint,) = chosen.endpoints
    return {
        "augmented_by": endpoint.model,
        "augmented_at": endpoint.url,
        "augmented_prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "augmented_weight": asked.weight,
        "augmented_keep": asked.keep,
        "augmented_filter": "TF-IDF out of fold" if asked.adapter is None else "adapter",
        "augmented_seed": asked.hosted.seed,
    }


def _there_already(store: Store, made_by: dict[str, Any]) -> Index | None:
    """The finished data set of the same command, None where there is none. Raises `WrongRequest`
    for another data set.
    """
    there = existing_index(store)
    if there is None:
        return None
    for name, value in made_by.items():
        if there.source.get(name) != value:
            raise WrongRequest(
                f"{store.url} holds another data set ({name} {there.source.get(name)!r} there, {value!r}"
                " now), which is never overwritten; give another NEW_DATA_URL."
            )
    return there


def _chosen_posts(
    asked: Augmentation, real: _Real, wished: Sequence[Wish], calling: Calling
) -> tuple[list[Made], Counts, dict[str, list[str]]]:
    """The synthetic posts to keep, the counts of all, and the ids that the filter kept and dropped.
    Only here, after all answers, held-out texts are read, to drop posts that are like them.
    """
    counts = Counts()
    answers = [calling.place.answers.known(one) for one in calling.requests]
    made = made_of(calling.calls, answers, counts)
    held = {"train": list(real.posts.texts)}
    for name, split in real.index.stored_splits.items():
        if name != "train" and split.rows:
            held[name] = [text for _, text, _ in posts_of(real.store, split)]
    made = without_doubles(made, held, counts)
    judge = tfidf_judge(real.posts, len(real.index.labels), asked.hosted.seed)
    if asked.adapter is not None:
        judge = _adapter_judge(asked, asked.adapter, real.index)
    tell("filtering the new posts")
    kept, dropped = best_of(made, wished, judge, asked.keep, counts)
    if not kept:
        raise HostedStopped(
            f"None of the {counts.written:,} written posts can be used; every answer is kept below"
            f" {asked.new_data_url}/{PREFIX}."
        )
    return kept, counts, {"kept": [*map(_id_of, kept)], "dropped": [*map(_id_of, dropped)]}


def _id_of(one: Made) -> str:
    return f"synthetic-{one.call:06d}-{one.place}"


def _adapter_judge(asked: Augmentation, adapter: str, index: Index) -> Judge:
    """A judge that scores by an adapter, which must not have been trained on the synthetic
    posts.
    """
    folder = find_adapter(adapter).folder
    classifier = open_classifier(AdapterChoice(folder, device=asked.device))
    if set(classifier.labels) != set(index.labels):
        raise WrongRequest(f"The adapter {adapter} has other labels than {asked.data_url}.")
    place_C = [classifier.labels.index(label) for label in index.labels]

    def judge(made: Sequence[Made]) -> Any:
        return np.asarray(classifier.probabilities([one.text for one in made]))[:, place_C]

    return judge


def _facts_of(counts: Counts, place: Place, requests: Sequence[str]) -> dict[str, Any]:
    return {
        "augmented_calls": counts.asked,
        "augmented_posts": counts.kept,
        "augmented_usd": usd_of(place.ledger.spent_on(requests)),
    }


def _write_report(
    store: Store,
    index: Index,
    facts: dict[str, Any],
    counts: Counts,
    ids: dict[str, list[str]],
    kept: Sequence[Made],
) -> None:
    by_label = {label: sum(one.label == place for one in kept) for place, label in enumerate(index.labels)}
    content = {
        "schema_version": "emotion-train/augmentation/1",
        **facts,
        "outcomes": dict(counts.outcomes or {}),
        "written": counts.written,
        "unclean": counts.unclean,
        "same_as": dict(counts.same or {}),
        "near_to": dict(counts.near or {}),
        "filtered": counts.filtered,
        "kept_by_label": {label: count for label, count in by_label.items() if count},
        **{f"ids_{name}": found for name, found in ids.items()},
    }
    raw = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    store.write(f"{PREFIX}/report.json", raw.encode())


def _write(
    asked: Augmentation,
    real: _Real,
    store: Store,
    kept: Sequence[Made],
    requests: Sequence[str],
    facts: dict[str, Any],
) -> Index:
    added = [
        Added(
            _id_of(one),
            one.text,
            ((one.label, 1.0),),
            asked.weight,
            f"{PREFIX}/answers/{requests[one.call]}.json#{one.place}",
        )
        for one in kept
    ]
    return write(real.store, real.index, real.posts, added, store, seed=asked.hosted.seed, facts=facts)


def _repeat(asked: Augmentation, repeat_of: str, real: _Real, store: Store) -> str:
    """Make the control: as many real posts of each label repeated, with the same weight."""
    like_store = open_store(repeat_of)
    like = read_index(like_store)
    if not like.marked or like.source.get("augmented_from") != real.index.sha256():
        raise WrongRequest(
            f"{repeat_of} is no augmentation of {real.store.url}; give the data set that"
            f" `emotion-train augment {real.store.url} …` made."
        )
    added = repeated(real.posts, sources_of(like_store, like), asked.hosted.seed)
    facts: dict[str, Any] = {"repeated_like": like.sha256(), "augmented_posts": len(added)}
    made = write(real.store, real.index, real.posts, added, store, seed=asked.hosted.seed, facts=facts)
    return table_words(made, store)
