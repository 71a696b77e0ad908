"""An adapter and hosted models are asked the same posts; figures are written beside the answers.

All checks come before the first request, and answered posts are not asked again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

from emotion_train.bases.public_names import public_place
from emotion_train.console import tell
from emotion_train.data.index import Index, read_index
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice
from emotion_train.hosted.answers import digest_of
from emotion_train.hosted.asking import Asked, Model, Place, ask_all
from emotion_train.hosted.benchmark_floors import floors_of
from emotion_train.hosted.benchmark_page import render_html
from emotion_train.hosted.benchmark_request import BenchmarkRequest
from emotion_train.hosted.client import Prompt, require_sdk
from emotion_train.hosted.endpoints import Key
from emotion_train.hosted.figures import (
    Benchmark,
    SystemFigures,
    differences,
    expected_interval,
    facts_of,
    money_of,
    outcomes_of,
    read_answers,
    sentences_of,
    speed_of,
    system,
)
from emotion_train.hosted.options import Chosen, agree, dry_run_words
from emotion_train.hosted.own_answers import OwnAnswers, own_of_adapter, own_of_run
from emotion_train.hosted.prices import Price
from emotion_train.hosted.prompts import (
    Question,
    TrainingPosts,
    question_of,
    read_definitions,
    read_template,
)
from emotion_train.hosted.rows import Rows, rows_of
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

_MOST_SHOTS = 50


class Benchmarked(NamedTuple):
    """A benchmark and the URL of its figures."""

    figures: Benchmark
    url: str


@dataclass(frozen=True)
class _Requests:
    """A hosted model's requests, in the order of the posts."""

    folder: str
    prompts: list[Prompt]
    names: list[str]


def benchmark(asked: BenchmarkRequest) -> Benchmarked | str:
    """Ask the models and write the figures; for a dry run, what it would ask and cost. Raises
    `WrongRequest` for a request that cannot be met, before anything is paid, and `HostedStopped`
    where the asking ends early.
    """
    out = open_store(asked.out)
    require_sdk()
    chosen = Chosen.of(asked.hosted, temperature=0.0)
    if not 0 <= asked.shots <= _MOST_SHOTS:
        raise WrongRequest(f"--shots is {asked.shots}; give 0 to {_MOST_SHOTS}.")
    store = open_store(asked.data)
    index = read_index(store)
    rows = rows_of(store, index, asked.split, asked.rows, asked.hosted.seed)
    question = _question(asked, store, index)
    prompts = [question.prompt(text) for text in rows.texts]
    if asked.hosted.dry_run:
        return dry_run_words(chosen.endpoints, chosen.prices, prompts, "requests")
    prices = chosen.require_payable()
    keys = chosen.keys()
    own = _own(asked, rows, out)
    tell(expected_interval(rows, own.answers(len(rows.labels))))
    place = Place(out, longest_s=chosen.rules.longest_s)
    requests = _requests(chosen, prompts, place, again=asked.hosted.ask_again)
    missing = max((len(_missing(place, one)) for one in requests), default=0)
    if missing:
        agree(chosen.endpoints, f"{missing:,} posts of {rows.split}", asked.hosted.yes)
    _ask(chosen, prices, keys, place, requests)
    hosted = _hosted(chosen, prices, place, requests, rows, own)
    figures = _figures(asked, index, store, rows, prompts, own, hosted)
    out.write("benchmark.json", figures.to_bytes())
    out.write("benchmark.html", render_html(figures).encode())
    return Benchmarked(figures, out.url_of("benchmark.json"))


def _question(asked: BenchmarkRequest, store: Store, index: Index) -> Question:
    return question_of(
        index,
        seed=asked.hosted.seed,
        definitions=read_definitions(asked.hosted.definitions, index.labels),
        template=read_template(asked.prompt),
        max_tokens=asked.max_tokens,
        shots=asked.shots,
        posts=TrainingPosts.read(store, index) if asked.shots else None,
    )


def _own(asked: BenchmarkRequest, rows: Rows, out: Store) -> OwnAnswers:
    if asked.run_url is not None:
        own = own_of_run(asked.run_url, rows)
    else:
        assert asked.adapter is not None, "the command line takes one of --run and --adapter"
        own = own_of_adapter(AdapterChoice(asked.adapter, base=asked.base, device=asked.device), rows, out)
    if asked.usd_per_hour is not None:
        if not 0 <= asked.usd_per_hour <= 1e6:
            raise WrongRequest(f"--usd-per-hour is {asked.usd_per_hour:g}; give dollars, such as 2.5.")
        own = own.model_copy(update={"usd_per_hour": asked.usd_per_hour})
    return own


def _requests(chosen: Chosen, prompts: list[Prompt], place: Place, *, again: bool) -> list[_Requests]:
    """The requests of each model. Their names are hashes of their content, so that another choice
    of rows finds the stored answers of the same posts.
    """
    names = [
        digest_of([list(message) for message in one.messages], one.schema, one.max_tokens) for one in prompts
    ]
    requests = []
    for endpoint in chosen.endpoints:
        rules = chosen.rules
        folder = digest_of(
            endpoint.model, endpoint.url, rules.temperature, rules.seed, dict(rules.extra_body)
        )
        requests.append(_Requests(folder, prompts, place.requests(folder, names, again=again)))
    return requests


def _missing(place: Place, requests: _Requests) -> list[str]:
    return [
        name
        for name in requests.names
        if place.answers.known(name) is None and not place.ledger.is_lost(name)
    ]


def _ask(
    chosen: Chosen, prices: list[Price], keys: list[Key], place: Place, requests: list[_Requests]
) -> None:
    for endpoint, price, key, one in zip(chosen.endpoints, prices, keys, requests, strict=True):
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
    chosen: Chosen, prices: list[Price], place: Place, requests: list[_Requests], rows: Rows, own: OwnAnswers
) -> list[SystemFigures]:
    read = []
    for one in requests:
        answers = [place.answers.known(name) for name in one.names]
        read.append((answers, *read_answers(answers, rows)))
    against = differences(rows, own.answers(len(rows.labels)), [predicted for _, predicted, _, _ in read])
    figures = []
    for endpoint, price, one, (answers, predicted_NC, outcomes, answered_N), difference in zip(
        chosen.endpoints, prices, requests, read, against, strict=True
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


def _figures(
    asked: BenchmarkRequest,
    index: Index,
    store: Store,
    rows: Rows,
    prompts: list[Prompt],
    own: OwnAnswers,
    hosted: list[SystemFigures],
) -> Benchmark:
    sent = json.dumps([[list(message) for message in one.messages] for one in prompts], ensure_ascii=False)
    return Benchmark(
        data_url=public_place(asked.data),
        index_sha256=index.sha256(),
        split=rows.split,
        rows=len(rows.ids),
        of=rows.of,
        labels=rows.labels,
        targets=rows.kind,
        shots=asked.shots,
        seed=asked.hosted.seed,
        prompt_sha256=hashlib.sha256(sent.encode()).hexdigest(),
        own=system(own.name, rows, own.answers(len(rows.labels))),
        own_facts=dict(facts_of(own)),
        hosted=tuple(hosted),
        floors=tuple(floors_of(store, index, rows, asked.hosted.seed)),
        sentences=tuple(sentences_of(rows, own, hosted)),
    )
