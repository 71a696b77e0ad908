"""Compares a fine-tuned adapter with hosted models on the same posts: scores with paired intervals,
dollars, latency, and unanswered posts.

    emotion-train benchmark --run s3://team/runs/RUN_ID --data s3://team/emotions \\
        --llm gpt-4o-mini@https://api.openai.com/v1 --max-usd 1 --out benchmark

One request a post. Answers are stored below --out as they come, so the same command resumes and
pays for nothing twice; after the last answer it makes no request.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emotion_train.console import tell
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, positive
from emotion_train.hosted.options import add_hosted_arguments

if TYPE_CHECKING:
    from emotion_train.data.index import Index
    from emotion_train.hosted.asking import Place
    from emotion_train.hosted.client import Prompt
    from emotion_train.hosted.figures import Benchmark, SystemFigures
    from emotion_train.hosted.options import Chosen
    from emotion_train.hosted.own_answers import OwnAnswers
    from emotion_train.hosted.prompts import Question
    from emotion_train.hosted.rows import Rows
    from emotion_train.storage.store import Store

_FLOOR_MAX_ROWS = 100_000
_MOST_SHOTS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    own = parser.add_mutually_exclusive_group(required=True)
    own.add_argument(
        "--run",
        dest="run_url",
        metavar="RUN_URL",
        help="published run, OUTPUT_URL/RUN_ID, whose published predictions are used, without a GPU",
    )
    own.add_argument(
        "--adapter",
        metavar="URL",
        help="a run, an adapter's folder or its copy in a bucket, which is scored and measured here",
    )
    add("--data", required=True, metavar="DATA_URL", help="data set written by `emotion-train prepare`")
    add("--split", default="validation", metavar="NAME", help="split that is asked (default: validation)")
    add_hosted_arguments(
        parser, models="hosted model, such as gpt-4o-mini@https://api.openai.com/v1; any number"
    )
    add(
        "--rows",
        type=positive,
        metavar="N",
        help="ask for N posts, with each label in its share (default: all)",
    )
    add(
        "--shots",
        type=int,
        default=0,
        metavar="N",
        help="training posts of each label in the prompt (default: 0)",
    )
    add(
        "--prompt",
        metavar="FILE",
        help="file of a prompt with {labels}, {post} and, optionally, {definitions}, {examples}",
    )
    add(
        "--max-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="most tokens of an answer, a model's reasoning included (default: 64)",
    )
    add(
        "--usd-per-hour",
        type=float,
        metavar="USD",
        help="price of the machine that labels (default: the price of --run's machine)",
    )
    add("--base", metavar="BASE", help="base of --adapter (default: the one it was trained on)")
    add("--device", choices=("auto", "cpu"), default="auto", help="runs --adapter (default: %(default)s)")
    add("--out", required=True, metavar="FOLDER", help="folder or s3:// URL for answers and report")


@dataclass(frozen=True)
class _Asked:
    """A hosted model's requests, in the order of the posts."""

    folder: str
    prompts: list[Prompt]
    names: list[str]


def run(arguments: argparse.Namespace) -> int:
    """Ask the models, write and print the figures; returns 0."""
    from emotion_train.console import Terminal
    from emotion_train.hosted.benchmark_page import print_benchmark, render_html
    from emotion_train.storage.open import open_store

    out = open_store(arguments.out)
    benchmark = _benchmark(arguments, out)
    if benchmark is None:
        return 0
    out.write("benchmark.json", benchmark.to_bytes())
    out.write("benchmark.html", render_html(benchmark).encode())
    print_benchmark(benchmark, Terminal(highlight=False, soft_wrap=True))
    tell(f"written: {out.url_of('benchmark.json')} and benchmark.html", sys.stdout)
    return 0


def _benchmark(arguments: argparse.Namespace, out: Store) -> Benchmark | None:
    """The figures; None for a dry run. All checks come before the first request."""
    from emotion_train.data.index import read_index
    from emotion_train.hosted.client import require_sdk
    from emotion_train.hosted.figures import expected_interval
    from emotion_train.hosted.options import Chosen, HostedOptions, agree, dry_run_words
    from emotion_train.hosted.rows import rows_of
    from emotion_train.storage.open import open_store

    require_sdk()
    chosen = Chosen.of(HostedOptions.of(arguments), temperature=0.0)
    if not 0 <= arguments.shots <= _MOST_SHOTS:
        raise WrongRequest(f"--shots is {arguments.shots}; give 0 to {_MOST_SHOTS}.")
    store = open_store(arguments.data)
    index = read_index(store)
    rows = rows_of(store, index, arguments.split, arguments.rows, arguments.seed)
    question = _question(arguments, store, index)
    prompts = [question.prompt(text) for text in rows.texts]
    if arguments.dry_run:
        print(dry_run_words(chosen.endpoints, chosen.prices, prompts, "requests"))
        return None
    prices = chosen.require_payable()
    keys = chosen.keys()
    own = _own(arguments, rows, out)
    tell(expected_interval(rows, own.answers(len(rows.labels))))
    place, asked = _asked(arguments, chosen, prompts, out)
    missing = max((len(_missing(place, one)) for one in asked), default=0)
    if missing:
        agree(chosen.endpoints, f"{missing:,} posts of {rows.split}", arguments.yes)
    _ask(chosen, prices, keys, place, asked)
    hosted = _hosted(chosen, prices, place, asked, rows, own)
    return _document(arguments, index, store, rows, prompts, own, hosted)


def _question(arguments: argparse.Namespace, store: Store, index: Index) -> Question:
    from emotion_train.hosted.prompts import TrainingPosts, question_of, read_definitions, read_template

    return question_of(
        index,
        seed=arguments.seed,
        definitions=read_definitions(arguments.definitions, index.labels),
        template=read_template(arguments.prompt),
        max_tokens=arguments.max_tokens,
        shots=arguments.shots,
        posts=TrainingPosts.read(store, index) if arguments.shots else None,
    )


def _own(arguments: argparse.Namespace, rows: Rows, out: Store) -> OwnAnswers:
    from emotion_train.hosted.own_answers import own_of_adapter, own_of_run

    if arguments.run_url is not None:
        own = own_of_run(arguments.run_url, rows)
    else:
        own = own_of_adapter(
            AdapterChoice(arguments.adapter, base=arguments.base, device=arguments.device), rows, out
        )
    if arguments.usd_per_hour is not None:
        if not 0 <= arguments.usd_per_hour <= 1e6:
            raise WrongRequest(f"--usd-per-hour is {arguments.usd_per_hour:g}; give dollars, such as 2.5.")
        own = own.model_copy(update={"usd_per_hour": arguments.usd_per_hour})
    return own


def _asked(
    arguments: argparse.Namespace, chosen: Chosen, prompts: list[Prompt], out: Store
) -> tuple[Place, list[_Asked]]:
    """The requests of each model. Their names are hashes of their content, so that another choice
    of rows finds the stored answers of the same posts.
    """
    from emotion_train.hosted.answers import digest_of
    from emotion_train.hosted.asking import Place

    place = Place(out, longest_s=chosen.rules.longest_s)
    names = [
        digest_of([list(message) for message in one.messages], one.schema, one.max_tokens) for one in prompts
    ]
    asked = []
    for endpoint in chosen.endpoints:
        rules = chosen.rules
        folder = digest_of(
            endpoint.model, endpoint.url, rules.temperature, rules.seed, dict(rules.extra_body)
        )
        asked.append(_Asked(folder, prompts, place.requests(folder, names, again=arguments.ask_again)))
    return place, asked


def _missing(place: Place, asked: _Asked) -> list[str]:
    return [
        name for name in asked.names if place.answers.known(name) is None and not place.ledger.is_lost(name)
    ]


def _ask(chosen: Chosen, prices: list[Any], keys: list[Any], place: Place, asked: list[_Asked]) -> None:
    from emotion_train.hosted.asking import Asked, Model, ask_all

    for endpoint, price, key, one in zip(chosen.endpoints, prices, keys, asked, strict=True):
        model = Model(endpoint, key, price, chosen.rules, one.folder)
        ask_all(
            model,
            [Asked(name, prompt) for name, prompt in zip(one.names, one.prompts, strict=True)],
            place,
            concurrency=chosen.concurrency,
            cap=chosen.cap,
            unit="posts",
        )


def _hosted(
    chosen: Chosen, prices: list[Any], place: Place, asked: list[_Asked], rows: Rows, own: OwnAnswers
) -> list[SystemFigures]:
    from emotion_train.hosted.figures import (
        differences,
        money_of,
        outcomes_of,
        read_answers,
        speed_of,
        system,
    )

    read = []
    for one in asked:
        answers = [place.answers.known(name) for name in one.names]
        read.append((answers, *read_answers(answers, rows)))
    against = differences(rows, own.answers(len(rows.labels)), [predicted for _, predicted, _, _ in read])
    figures = []
    for endpoint, price, one, (answers, predicted_NC, outcomes, answered_N), difference in zip(
        chosen.endpoints, prices, asked, read, against, strict=True
    ):
        form = place.answers.form(one.folder)
        figures.append(
            system(
                endpoint.name,
                rows,
                predicted_NC,
                answered_N,
                host=endpoint.host,
                returned_models=tuple(sorted({str(a.model) for a in answers if a is not None and a.model})),
                difference=difference,
                outcomes=outcomes_of(outcomes),
                lost=sum(answer is None for answer in answers),
                form=None if form is None else form.model_dump(mode="json", exclude={"schema_version"}),
                money=money_of(answers, place.ledger.spent_on(one.names), price),
                speed=speed_of(answers),
            )
        )
    return figures


def _floors(store: Store, index: Index, rows: Rows, seed: int) -> list[SystemFigures]:
    """The floors of a training's report on these posts: the commonest label or, with several
    labels, the labels by their share in training; and TF-IDF.
    """
    import numpy as np

    from emotion_train.evaluation.floors import (
        MAJORITY,
        PRIOR,
        TFIDF,
        VALIDATION,
        majority_floor,
        prior_floor,
        tfidf_predictions,
    )
    from emotion_train.evaluation.predictions import Predictions
    from emotion_train.hosted.figures import system

    if "train" not in index.splits or not index.splits["train"].rows:
        return []
    counts, classes = index.split("train").label_counts, np.arange(len(rows.labels))
    if index.targets == "several":
        floor_figures = [system(PRIOR, rows, prior_floor(counts, len(rows.ids)))]
    else:
        majority_N = majority_floor(counts, len(rows.ids))
        floor_figures = [system(MAJORITY, rows, majority_N[:, None] == classes)]
    if index.targets == "several" and VALIDATION not in index.splits:
        tell("there are no validation posts to choose the thresholds of the TF-IDF floor by; it is left out")
        return floor_figures
    tell("fitting the TF-IDF floor")
    floors = tfidf_predictions(store, index, [rows.split], _FLOOR_MAX_ROWS, seed)
    if rows.split in floors:
        floor = floors[rows.split]
        row_of = {post_id: row for row, post_id in enumerate(floor.ids)}
        taken = floor.take([row_of[post_id] for post_id in rows.ids])
        tfidf_NC = (
            taken.predicted_N[:, None] == classes if isinstance(taken, Predictions) else taken.predicted_NC
        )
        floor_figures.append(system(TFIDF, rows, tfidf_NC))
    return floor_figures


def _document(
    arguments: argparse.Namespace,
    index: Index,
    store: Store,
    rows: Rows,
    prompts: list[Prompt],
    own: OwnAnswers,
    hosted: list[SystemFigures],
) -> Benchmark:
    import json

    from emotion_train.bases.public_names import public_place
    from emotion_train.hosted.figures import Benchmark, facts_of, sentences_of, system

    asked = json.dumps([[list(message) for message in one.messages] for one in prompts], ensure_ascii=False)
    return Benchmark(
        data_url=public_place(arguments.data),
        index_sha256=index.sha256(),
        split=rows.split,
        rows=len(rows.ids),
        of=rows.of,
        labels=rows.labels,
        targets=rows.kind,
        shots=arguments.shots,
        seed=arguments.seed,
        prompt_sha256=hashlib.sha256(asked.encode()).hexdigest(),
        own=system(own.name, rows, own.answers(len(rows.labels))),
        own_facts=dict(facts_of(own)),
        hosted=tuple(hosted),
        floors=tuple(_floors(store, index, rows, arguments.seed)),
        sentences=tuple(sentences_of(rows, own, hosted)),
    )
