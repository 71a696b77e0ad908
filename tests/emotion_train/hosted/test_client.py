"""Every way in which an endpoint answers or fails is one counted outcome, or one sentence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("openai")

from emotion_train.errors import WrongRequest
from emotion_train.hosted.answers import Answer, Form
from emotion_train.hosted.client import Client, Message, Pace, Prompt, Rules, Stopped
from emotion_train.hosted.endpoints import Key, endpoint_of
from emotion_train.hosted.prices import Price
from tests.helpers.fake_llm import KEY, MODEL, USD_IN, USD_OUT, FakeLLM
from tests.helpers.patience import PATIENCE_S

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["calm", "rage"]}},
    "required": ["label"],
    "additionalProperties": False,
}
PROMPT = Prompt((Message("system", "Answer with a label."), Message("user", "tea and rain")), SCHEMA, 16)
PRICE = Price(USD_IN, USD_OUT, "typed")
RULES = Rules(deadline_s=PATIENCE_S, max_wait_s=5)
QUICK = replace(RULES, deadline_s=0.7)


def asked(
    fake: FakeLLM, *, prompt: Prompt = PROMPT, form: Form | None = None, rules: Rules = RULES, **other: Any
) -> tuple[Answer, list[float], Pace]:
    """The outcome of one request, the pauses that were made, and the pace after it."""
    pace, pauses = Pace(8), list[float]()
    price, key = other.get("price", PRICE), other.get("key", KEY)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def ask() -> Answer:
        async with Client(endpoint_of(fake.word), Key(key), price, rules, pace) as client:
            client._pause = pause
            return await client.ask(prompt, form or Form())

    return asyncio.run(ask()), pauses, pace


def played(*steps: str, **options: Any) -> tuple[Answer, list[float], FakeLLM]:
    with FakeLLM(plays=steps) as fake:
        answer, pauses, _ = asked(fake, **options)
    return answer, pauses, fake


def most() -> int:
    return PROMPT.most_nano(PRICE)


def test_an_answer_has_its_text_tokens_dollars_and_latency() -> None:
    answer, _, fake = played("ok")
    assert (answer.outcome, answer.text) == ("answered", '{"label": "calm"}')
    assert answer.nano_usd == fake.charged_nano > 0
    assert not answer.estimated
    assert answer.latency_s is not None
    assert answer.latency_s > 0
    assert (answer.model, answer.fingerprint, answer.attempts) == (f"{MODEL}-2026-01-01", "fp_1", 1)
    assert answer.request_id is not None
    body = fake.requests[0]
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("step", "outcome", "paid"),
    [
        ("refusal", "refused", "usage"),
        ("filter", "filtered", "usage"),
        ("filter-400", "filtered", "nothing"),
        ("length", "cut", "usage"),
        ("empty", "unparseable", "usage"),
        ("half", "answered", "usage"),
        ("no-usage", "answered", "most"),
        ("no-choices", "failed", "usage"),
        ("null-choices", "failed", "usage"),
        ("error-inside", "failed", "most"),
        ("html", "failed", "most"),
        ("cut-body", "failed", "most"),
        ("gone", "failed", "most"),
        ("hang", "failed", "most"),
        ("trickle", "failed", "most"),
        ("502", "failed", "most"),
        ("400", "failed", "nothing"),
    ],
)
def test_each_failure_is_one_counted_outcome(step: str, outcome: str, paid: str) -> None:
    """What nobody can know to be unpaid counts with the most that it can cost, and is sent once."""
    answer, _, fake = played(step, rules=QUICK if step in ("hang", "trickle") else RULES)
    assert answer.outcome == outcome
    assert len(fake.requests) == 1
    wanted = {"usage": fake.charged_nano, "most": most(), "nothing": 0}[paid]
    assert answer.nano_usd == wanted
    assert answer.nano_usd >= fake.charged_nano
    assert answer.estimated == (paid == "most")
    assert KEY not in answer.to_bytes().decode()
    assert outcome == "answered" or answer.reason


def test_the_deadline_is_for_the_whole_answer_and_not_for_each_piece() -> None:
    """A piece each 0.1 s never exceeds a timeout of reads."""
    answer, _, _ = played("trickle", rules=QUICK)
    assert "no whole answer within 0.7 s" in answer.reason


@pytest.mark.parametrize(
    ("steps", "pauses"),
    [
        (("429", "429", "ok"), [0.5, 1.0]),
        (("429-after", "ok"), [1.0]),
        (("429-ms", "ok"), [0.3]),
        (("500", "503", "ok"), [0.5, 1.0]),
    ],
)
def test_what_cost_nothing_is_sent_again(steps: tuple[str, ...], pauses: list[float]) -> None:
    answer, waited, fake = played(*steps)
    assert answer.outcome == "answered"
    assert waited == pytest.approx(pauses)
    assert answer.attempts == len(steps)
    assert answer.nano_usd == fake.charged_nano


def test_a_date_in_retry_after_is_a_pause() -> None:
    _, waited, _ = played("429-date", "ok")
    assert 0 <= waited[0] <= 1


def test_a_server_that_goes_on_failing_is_a_failed_outcome_that_cost_nothing() -> None:
    answer, waited, _ = played(*["500"] * 9)
    assert (answer.outcome, answer.nano_usd, answer.attempts) == ("failed", 0, 5)
    assert waited == [0.5, 1, 2, 4]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("429-long",), "asks to wait 90 s, longer than --max-wait"),
        (("429",) * 5, "5 times for its rate limit"),
        (("quota",), "no money or quota left"),
        (("402",), "no money or quota left"),
        (("401",), "refuses the key"),
        (("403",), "does not allow this request"),
        (("404",), "has no model 'fake-1'"),
        (("redirect",), "redirects to http://127.0.0.1:1/v1; type"),
    ],
)
def test_what_no_further_request_would_mend_ends_all_work(steps: tuple[str, ...], words: str) -> None:
    with FakeLLM(plays=steps) as fake, pytest.raises(Stopped, match=words) as stopped:
        asked(fake)
    assert len(fake.requests) == len(steps)
    assert KEY not in str(stopped.value)
    assert stopped.value.exit_code == 1


def test_an_endpoint_that_is_not_there_fails_without_cost() -> None:
    with FakeLLM() as fake:
        word = fake.word

    async def ask() -> Answer:
        async with Client(endpoint_of(word), Key(KEY), PRICE, RULES, Pace(1)) as client:
            client._pause = lambda seconds: asyncio.sleep(0)
            with pytest.raises(WrongRequest, match="cannot be reached"):
                await client.require_model()
            return await client.ask(PROMPT, Form())

    answer = asyncio.run(ask())
    assert (answer.outcome, answer.nano_usd) == ("failed", 0)


@pytest.mark.parametrize(
    ("models", "key", "words"),
    [
        (["other-1", "fake-2"], KEY, "has no model 'fake-1'; it has fake-2"),
        ([MODEL], "sk-wrong-0123456789abcdef0123456789abcdef", "refuses the key"),
    ],
)
def test_a_model_or_key_that_is_wrong_is_refused_before_anything_is_paid(
    models: list[str], key: str, words: str
) -> None:
    with FakeLLM(models=models) as fake, pytest.raises(WrongRequest, match=words) as refused:
        asyncio.run(_require(fake, key))
    assert key not in str(refused.value)
    assert fake.requests == []


def test_an_endpoint_that_lists_no_models_is_believed() -> None:
    with FakeLLM(models=[]) as fake:
        asyncio.run(_require(fake, KEY))
    with FakeLLM(models=[f"models/{MODEL}"]) as fake:
        asyncio.run(_require(fake, KEY))


async def _require(fake: FakeLLM, key: str) -> None:
    async with Client(endpoint_of(fake.word), Key(key), PRICE, RULES, Pace(1)) as client:
        await client.require_model()


@pytest.mark.parametrize(
    ("lacks", "form"),
    [
        ((), Form()),
        (("temperature",), Form(temperature=False)),
        (
            ("max_tokens", "temperature", "seed"),
            Form(temperature=False, seed=False, max_tokens="max_completion_tokens"),
        ),
        (("response_format.json_schema",), Form(response_format="json_object")),
        (("response_format",), Form(response_format="none")),
    ],
)
def test_what_an_endpoint_takes_is_found_out(lacks: Iterable[str], form: Form) -> None:
    async def find(fake: FakeLLM) -> tuple[Form, Answer]:
        async with Client(endpoint_of(fake.word), Key(KEY), PRICE, RULES, Pace(1)) as client:
            return await client.find_form(PROMPT)

    with FakeLLM(lacks=lacks) as fake:
        found, answer = asyncio.run(find(fake))
    assert found == form
    assert answer.outcome == "answered"
    assert len(fake.requests) == 1  # refusals are no requests of the model


def test_a_request_that_no_form_mends_stops() -> None:
    async def find(fake: FakeLLM) -> None:
        async with Client(endpoint_of(fake.word), Key(KEY), PRICE, RULES, Pace(1)) as client:
            await client.find_form(PROMPT)

    with FakeLLM(plays=["400"] * 9) as fake, pytest.raises(Stopped, match="maximum context length"):
        asyncio.run(find(fake))


def test_the_endpoint_s_own_account_counts_where_no_price_was_typed() -> None:
    answer, _, _ = played("cost", price=Price(USD_IN, USD_OUT, "genai-prices"))
    assert answer.nano_usd == 123_000
    answer, _, fake = played("cost")
    assert answer.nano_usd == fake.charged_nano


def test_the_key_is_in_no_answer_although_the_model_repeats_it() -> None:
    answer, _, _ = played("echo")
    assert answer.outcome == "answered"
    assert "…" in answer.text
    for part in (KEY, KEY[: len(KEY) // 2], KEY[len(KEY) // 2 :]):
        assert part not in answer.to_bytes().decode()


def test_concurrency_halves_at_a_rate_limit_and_grows_again() -> None:
    with FakeLLM(plays=["429-ms"]) as fake:
        _, _, pace = asked(fake)
    assert 4 <= pace.limit < 4.5
    for _ in range(100):
        pace.answered()
    assert pace.limit == 8
    sent = time.monotonic()
    pace.refused(sent, 0.0)
    pace.refused(sent, 0.0)  # sent before the halving
    assert pace.limit == 4


def test_the_most_that_a_request_can_cost_is_more_than_any_charge() -> None:
    for content in ("tea", "naïve 🙂" * 50, "x" * 4000):
        prompt = replace(PROMPT, messages=(Message("user", content),))
        with FakeLLM(says=lambda text: "y" * 400) as fake:
            answer, _, _ = asked(fake, prompt=prompt)
        assert answer.nano_usd <= prompt.most_nano(PRICE)
