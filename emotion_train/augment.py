"""Makes a data set with synthetic posts for its rarest labels: a hosted model writes them after
real training posts; they are cleaned, without duplicates, filtered, marked and weighted.

    emotion-train augment s3://team/emotions s3://team/emotions-more \\
        --llm gpt-4o-mini@https://api.openai.com/v1 --max-usd 2

Validation and test posts stay the same bytes. Answers are stored as they come, so the same command
resumes and pays for nothing twice. Only `emotion-launch compare` shows whether synthetic posts
help: with them, without, and with as many real posts repeated (--repeat-of).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from emotion_train.console import counted, tell
from emotion_train.errors import HostedStopped, WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, positive
from emotion_train.hosted.options import add_hosted_arguments

if TYPE_CHECKING:
    from emotion_train.data.index import Index
    from emotion_train.hosted.answers import Answer
    from emotion_train.hosted.asking import Place
    from emotion_train.hosted.options import Chosen
    from emotion_train.hosted.prompts import TrainingPosts
    from emotion_train.hosted.synthetic import Call, Counts, Judge, Made, Wish
    from emotion_train.storage.store import Store

_PREFIX = "augment"  # folder of calls, claims and report below the new data set
_UNUSABLE = 5  # answers in a row that are no posts
_MOST_PER_CALL = 50
_SHOWN = 400  # characters of an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "data_url",
        metavar="DATA_URL",
        help="data set written by `emotion-train prepare`, which stays as it is",
    )
    add("new_data_url", metavar="NEW_DATA_URL", help="where the augmented data set goes")
    add_hosted_arguments(parser, models="hosted model, such as gpt-4o-mini@https://api.openai.com/v1")
    add(
        "--to",
        default="median",
        metavar="median|N",
        help="posts of a label afterwards, at most the median and thrice its real ones (default: median)",
    )
    add("--labels", metavar="A,B", help="only these labels (default: all below --to)")
    add("--weight", type=float, default=0.5, metavar="W", help="weight of a synthetic post (default: 0.5)")
    add("--shots", type=positive, default=5, metavar="N", help="real posts that a call shows (default: 5)")
    add(
        "--per-call",
        type=positive,
        default=5,
        metavar="N",
        help="posts that a call asks for, half as many after cut answers (default: 5)",
    )
    add(
        "--keep",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="share of each label's new posts to keep, the best by a classifier (default: 0.7)",
    )
    add("--adapter", metavar="URL", help="adapter that filters instead of out-of-fold TF-IDF")
    add("--device", choices=("auto", "cpu"), default="auto", help="runs --adapter (default: %(default)s)")
    add(
        "--repeat-of",
        metavar="AUGMENTED_URL",
        help="ask no model: repeat as many real posts of each label as that data set has synthetic ones",
    )
    for action in parser._actions:
        if "--llm" in action.option_strings:
            action.required = False  # --repeat-of asks no model


def run(arguments: argparse.Namespace) -> int:
    """Make the data set and print its summary; returns 0."""
    from emotion_train.data.index import read_index
    from emotion_train.hosted.augmented import require_plain
    from emotion_train.hosted.prompts import TrainingPosts
    from emotion_train.storage.open import open_store

    _require_sane(arguments)
    source, store = open_store(arguments.data_url), open_store(arguments.new_data_url)
    if source.url == store.url:
        raise WrongRequest(
            f"NEW_DATA_URL is DATA_URL, {source.url}, which is never changed; give another URL."
        )
    index = read_index(source)
    require_plain(index, source.url)
    posts = TrainingPosts.read(source, index)
    if arguments.repeat_of is not None:
        return _repeat(arguments, source, store, index, posts)
    return _augment(arguments, source, store, index, posts)


def _require_sane(arguments: argparse.Namespace) -> None:
    if (arguments.llm is None) == (arguments.repeat_of is None):
        raise WrongRequest("Give one of --llm MODEL@URL and --repeat-of AUGMENTED_URL.")
    if arguments.llm is not None and len(arguments.llm) > 1:
        raise WrongRequest("Give one --llm: all synthetic posts of a data set are written by one model.")
    if not 0 < arguments.weight <= 1:
        raise WrongRequest(f"--weight is {arguments.weight:g}; give more than 0, and 1 at most.")
    if not 0 < arguments.keep <= 1:
        raise WrongRequest(f"--keep is {arguments.keep:g}; give a share above 0, and 1 at most.")
    if arguments.per_call > _MOST_PER_CALL or arguments.shots > _MOST_PER_CALL:
        raise WrongRequest(f"--per-call and --shots are {_MOST_PER_CALL} at most.")


def _augment(
    arguments: argparse.Namespace, source: Store, store: Store, index: Index, posts: TrainingPosts
) -> int:
    from emotion_train.hosted.client import require_sdk
    from emotion_train.hosted.options import Chosen, agree, dry_run_words
    from emotion_train.hosted.prompts import read_definitions
    from emotion_train.hosted.synthetic import plan, wishes

    require_sdk()
    chosen = Chosen.of(arguments, temperature=1.0)
    only = None if arguments.labels is None else [one.strip() for one in arguments.labels.split(",")]
    wished = wishes(index.labels, index.split("train").label_counts, arguments.to, only)
    planned = partial(
        plan,
        wished,
        index.labels,
        posts,
        kind=index.targets,
        definitions=read_definitions(arguments.definitions, index.labels),
        shots=arguments.shots,
        per_call=arguments.per_call,
        keep=arguments.keep,
        seed=arguments.seed,
    )
    calls = planned()  # the calls if no answer is cut
    prompts = [call.prompt for call in calls]
    if arguments.dry_run:
        print(_wish_words(wished, index.labels))
        print(dry_run_words(chosen.endpoints, chosen.prices, prompts, "calls"))
        return 0
    made_by = _made_by(arguments, chosen, index, calls)
    if (there := _there_already(store, made_by)) is not None:
        print(_summary(arguments, there, store))
        return 0
    chosen.require_payable()
    chosen.keys()
    calling = _Calling(arguments, chosen, store, planned)
    if missing := calling.missing():
        what = (
            f"{counted(len(missing) * arguments.shots, 'real post')} of the training split, in"
            f" {counted(len(missing), 'call')},"
        )
        agree(chosen.endpoints, what, arguments.yes)
        calling.ask()
    place, calls, requests = calling.place, calling.calls, calling.requests
    answers = [place.answers.known(one) for one in requests]
    kept, counts, ids = _chosen_posts(arguments, source, index, posts, wished, calls, answers)
    facts = made_by | _facts_of(counts, place, requests)
    _write_report(store, index, facts, counts, ids, kept)
    made = _write(arguments, source, store, index, posts, kept, requests, facts)
    print(_summary(arguments, made, store))
    return 0


def _wish_words(wished: Sequence[Wish], labels: Sequence[str]) -> str:
    return "\n".join(
        f"{labels[one.label]}: {one.real:,} real posts, {one.posts:,} to be added" for one in wished
    )


def _made_by(
    arguments: argparse.Namespace, chosen: Chosen, index: Index, calls: Sequence[Call]
) -> dict[str, Any]:
    """The facts for the index that decide the data set: with another value it is another data
    set.
    """
    prompts = json.dumps([[list(one) for one in call.prompt.messages] for call in calls], ensure_ascii=False)
    (endpoint,) = chosen.endpoints
    return {
        "augmented_by": endpoint.model,
        "augmented_at": endpoint.url,
        "augmented_prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "augmented_weight": arguments.weight,
        "augmented_keep": arguments.keep,
        "augmented_filter": "TF-IDF out of fold" if arguments.adapter is None else "adapter",
        "augmented_seed": arguments.seed,
    }


def _there_already(store: Store, made_by: dict[str, Any]) -> Index | None:
    """The finished data set of the same command, None where there is none. Raises `WrongRequest`
    for another data set.
    """
    from emotion_train.preparation.existing import existing_index

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


class _Calling:
    """Plans and makes the calls block by block: cut answers make the calls of later blocks
    smaller.
    """

    def __init__(
        self, arguments: argparse.Namespace, chosen: Chosen, store: Store, planned: Callable[..., list[Call]]
    ) -> None:
        from emotion_train.hosted.answers import digest_of
        from emotion_train.hosted.asking import Place

        self._arguments = arguments
        self._chosen = chosen
        self._planned = planned
        self.place = Place(store, _PREFIX, chosen.rules.longest_s)
        (endpoint,), rules = chosen.endpoints, chosen.rules
        self._folder = digest_of(
            endpoint.model, endpoint.url, rules.temperature, rules.seed, dict(rules.extra_body)
        )
        self._again = arguments.ask_again
        self._look()

    def _look(self) -> None:
        """Plan the calls by the known answers."""
        self._named: dict[int, str] = {}
        self.place.ledger.refresh()
        self.calls = self._planned(is_cut=self._is_cut)
        self.requests = [self._name_of(call) for call in self.calls]

    def _name_of(self, call: Call) -> str:
        from emotion_train.hosted.answers import digest_of

        if call.number not in self._named:
            prompt = [list(one) for one in call.prompt.messages]
            name = f"{call.number:06d}.{digest_of(prompt, call.prompt.max_tokens)}"
            self._named[call.number] = self.place.named(self._folder, name, again=self._again)
        return self._named[call.number]

    def _is_cut(self, call: Call) -> bool:
        answer = self.place.answers.known(self._name_of(call))
        return answer is not None and answer.outcome == "cut"

    def missing(self) -> list[Call]:
        """The calls without an answer; calls of later blocks may still change."""
        return [
            call
            for call, request in zip(self.calls, self.requests, strict=True)
            if self.place.answers.known(request) is None and not self.place.ledger.is_lost(request)
        ]

    def ask(self) -> None:
        """Make calls until every call has its answer. Raises as `ask_all` does."""
        from emotion_train.hosted.asking import Asked, Model, ask_all

        (endpoint,), (key,) = self._chosen.endpoints, self._chosen.keys()
        (price,) = self._chosen.require_payable()
        model = Model(endpoint, key, price, self._chosen.rules, self._folder)
        objection = _unusable_in_a_row(self._arguments.per_call)
        while missing := self.missing():
            block = min(call.block for call in missing)
            ask_all(
                model,
                [Asked(self._name_of(call), call.prompt) for call in missing if call.block == block],
                self.place,
                concurrency=self._chosen.concurrency,
                cap=self._chosen.cap,
                unit="calls",
                objection=objection,
            )
            self._again = False  # a call that failed a second time is not repeated
            self._look()


def _unusable_in_a_row(per_call: int) -> Callable[[Answer], str | None]:
    """A check that stops a model which writes no posts, before all calls are paid. Cut answers do
    not count: later calls ask for less.
    """
    from emotion_train.hosted.synthetic import posts_in

    row = 0

    def objection(answer: Answer) -> str | None:
        nonlocal row
        if answer.outcome == "cut":
            return None
        usable = answer.outcome == "answered" and bool(posts_in(answer.text, per_call))
        row = 0 if usable else row + 1
        if row < _UNUSABLE:
            return None
        said = " ".join((answer.text or answer.reason).split())[:_SHOWN]
        return (
            f"{_UNUSABLE} answers in a row hold no posts; the last is {answer.outcome}: {said!r}."
            " Everything is kept; give another model."
        )

    return objection


def _chosen_posts(
    arguments: argparse.Namespace,
    source: Store,
    index: Index,
    posts: TrainingPosts,
    wished: Sequence[Wish],
    calls: Sequence[Call],
    answers: Sequence[Answer | None],
) -> tuple[list[Made], Counts, dict[str, list[str]]]:
    """The synthetic posts to keep, the counts of all, and the ids that the filter kept and dropped.
    Only here, after all answers, held-out texts are read, to drop posts that are like them.
    """
    from emotion_train.evaluation.floors import posts as posts_of
    from emotion_train.hosted.synthetic import Counts, best_of, made_of, tfidf_judge, without_doubles

    counts = Counts()
    made = made_of(calls, answers, counts)
    held = {"train": list(posts.texts)}
    for name, split in index.stored_splits.items():
        if name != "train" and split.rows:
            held[name] = [text for _, text, _ in posts_of(source, split)]
    made = without_doubles(made, held, counts)
    judge = tfidf_judge(posts, len(index.labels), arguments.seed)
    if arguments.adapter is not None:
        judge = _adapter_judge(arguments, index)
    tell("filtering the new posts")
    kept, dropped = best_of(made, wished, judge, arguments.keep, counts)
    if not kept:
        raise HostedStopped(
            f"None of the {counts.written:,} written posts can be used; every answer is kept below"
            f" {arguments.new_data_url}/{_PREFIX}."
        )
    return kept, counts, {"kept": [*map(_id_of, kept)], "dropped": [*map(_id_of, dropped)]}


def _id_of(one: Made) -> str:
    return f"synthetic-{one.call:06d}-{one.place}"


def _adapter_judge(arguments: argparse.Namespace, index: Index) -> Judge:
    """A judge that scores by an adapter, which must not have been trained on the synthetic
    posts.
    """
    import numpy as np

    from emotion_train.evaluation.adapter import open_classifier
    from emotion_train.runs.adapter_cache import find_adapter

    folder = find_adapter(str(arguments.adapter)).folder
    classifier = open_classifier(AdapterChoice(folder, device=arguments.device))
    if set(classifier.labels) != set(index.labels):
        raise WrongRequest(f"The adapter {arguments.adapter} has other labels than {arguments.data_url}.")
    place_C = [classifier.labels.index(label) for label in index.labels]

    def judge(made: Sequence[Made]) -> Any:
        return np.asarray(classifier.probabilities([one.text for one in made]))[:, place_C]

    return judge


def _facts_of(counts: Counts, place: Place, requests: Sequence[str]) -> dict[str, Any]:
    from emotion_train.hosted.prices import usd_of

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
    store.write(f"{_PREFIX}/report.json", raw.encode())


def _write(
    arguments: argparse.Namespace,
    source: Store,
    store: Store,
    index: Index,
    posts: TrainingPosts,
    kept: Sequence[Made],
    requests: Sequence[str],
    facts: dict[str, Any],
) -> Index:
    from emotion_train.hosted.augmented import Added, write

    added = [
        Added(
            _id_of(one),
            one.text,
            ((one.label, 1.0),),
            arguments.weight,
            f"{_PREFIX}/answers/{requests[one.call]}.json#{one.place}",
        )
        for one in kept
    ]
    return write(source, index, posts, added, store, seed=arguments.seed, facts=facts)


def _repeat(
    arguments: argparse.Namespace, source: Store, store: Store, index: Index, posts: TrainingPosts
) -> int:
    """Make the control: as many real posts of each label repeated, with the same weight; returns
    0.
    """
    from emotion_train.data.index import read_index
    from emotion_train.hosted.augmented import repeated, sources_of, write
    from emotion_train.storage.open import open_store

    like_store = open_store(arguments.repeat_of)
    like = read_index(like_store)
    if not like.marked or like.source.get("augmented_from") != index.sha256():
        raise WrongRequest(
            f"{arguments.repeat_of} is no augmentation of {source.url}; give the data set that"
            f" `emotion-train augment {source.url} …` made."
        )
    added = repeated(posts, sources_of(like_store, like), arguments.seed)
    facts: dict[str, Any] = {"repeated_like": like.sha256(), "augmented_posts": len(added)}
    made = write(source, index, posts, added, store, seed=arguments.seed, facts=facts)
    print(_table_words(made, store))
    return 0


def _table_words(made: Index, store: Store) -> str:
    train = made.split("train")
    rows = [("label", "real", "added")]
    for label, every, real in zip(made.labels, train.label_counts, train.real_label_counts, strict=True):
        rows.append((label, f"{real:,.0f}", f"{every - real:,.0f}" if every > real else ""))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {real:>8}  {added:>6}".rstrip() for name, real, added in rows]
    return "\n".join([*lines, f"data set    {store.url}"])


def _summary(arguments: argparse.Namespace, made: Index, store: Store) -> str:
    """Posts by label, how many written posts were kept or dropped, and the commands that show
    whether they help.
    """
    from emotion_train.edges.bounded import object_in

    report = object_in(store.read(f"{_PREFIX}/report.json"))
    outcomes = ", ".join(f"{count:,} {name}" for name, count in sorted(report["outcomes"].items()))
    lines = [
        _table_words(made, store),
        f"calls       {report['augmented_calls']:,}: {outcomes}; {report['augmented_usd']:.4f} dollars",
        f"written     {report['written']:,}, {report['unclean']:,} of them no post",
        f"the same    {_by_split(report['same_as'])}",
        f"nearly      {_by_split(report['near_to'])}",
        f"filtered    {report['filtered']:,} by {report['augmented_filter']}; {report['augmented_posts']:,}"
        " stay",
        "validation and test are the same bytes; class weights count real posts only",
    ]
    new, old = shlex.quote(arguments.new_data_url), shlex.quote(arguments.data_url)
    control = shlex.quote(f"{arguments.new_data_url.rstrip('/')}-repeated")
    return "\n".join(
        [
            *lines,
            "whether it helps: train on all three with equal steps and three seeds each, and compare",
            f"  emotion-train augment {old} {control} --repeat-of {new}",
            f"  for data in {old} {new} {control}; do for seed in 1 2 3; do emotion-launch run"
            " --config YOUR_RUN.yaml data.url=$data run.seed=$seed train.max_steps=STEPS; done; done",
            "  emotion-launch compare --group-by-config RUN RUN … (9 runs; no difference can be shown where"
            " an interval holds 0)",
        ]
    )


def _by_split(counts: dict[str, int]) -> str:
    found = ", ".join(
        f"{count:,} as {name if name == 'synthetic' else f'posts of {name}'}"
        for name, count in counts.items()
        if count
    )
    return found or "none"
