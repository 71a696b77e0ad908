"""Models are named without secrets, and prices are typed, known, or unknown."""

from __future__ import annotations

import pytest

from emotion_train.errors import WrongRequest
from emotion_train.hosted.endpoints import Key, endpoint_of, key_of
from emotion_train.hosted.prices import price_of

SECRET = "sk-0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("word", "model", "url", "host"),
    [
        (
            "gpt-4o-mini@https://api.openai.com/v1/",
            "gpt-4o-mini",
            "https://api.openai.com/v1",
            "api.openai.com",
        ),
        ("@cf/meta/llama@https://a.b/v1", "@cf/meta/llama", "https://a.b/v1", "a.b"),
        ("m:free@HTTP://127.0.0.1:8093/v1", "m:free", "http://127.0.0.1:8093/v1", "127.0.0.1:8093"),
        (f"m@https://a.b/v1?api-version=1&key={SECRET}", "m", "https://a.b/v1", "a.b"),
    ],
)
def test_a_model_and_its_url(word: str, model: str, url: str, host: str) -> None:
    found = endpoint_of(word)
    assert (found.model, found.url, found.host) == (model, url, host)
    assert SECRET not in found.name + found.url


def test_the_query_goes_to_the_endpoint_alone() -> None:
    assert endpoint_of("m@https://a.b/v1?api-version=1").query == (("api-version", "1"),)


@pytest.mark.parametrize(
    "word",
    [
        "gpt-4o-mini",
        "gpt-4o-mini@api.openai.com",
        "@https://a.b/v1",
        "m@https://",
        "m@https://a.b:port/v1",
        "m@https://a.b/v 1",
        f"m@https://user:{SECRET}@a.b/v1",
        f"https://user:{SECRET}@a.b/v1?key={SECRET}",
    ],
)
def test_what_is_no_model_at_a_url_is_refused_without_its_secrets(word: str) -> None:
    with pytest.raises(WrongRequest) as refused:
        endpoint_of(word)
    assert SECRET not in str(refused.value)


def test_a_key_comes_from_the_environment_and_shows_itself_nowhere() -> None:
    hosted, local = endpoint_of("m@https://a.b/v1"), endpoint_of("m@http://127.0.0.1:1/v1")
    key = key_of(hosted, "NAME", {"NAME": f" {SECRET}\n"})
    assert key.reveal() == SECRET
    assert SECRET not in f"{key!r} {key}"
    assert SECRET not in key.hidden(f"Bearer {SECRET}")
    assert key.message("Incorrect key: " + SECRET[:20] + "*****").count(SECRET[:16]) == 0
    assert isinstance(key_of(local, "NAME", {}), Key)
    with pytest.raises(WrongRequest, match="NAME is not set"):
        key_of(hosted, "NAME", {})
    with pytest.raises(WrongRequest, match="no key has") as refused:
        key_of(hosted, "NAME", {"NAME": f"{SECRET} {SECRET}"})
    assert SECRET not in str(refused.value)


def test_a_typed_price_wins_and_an_unknown_one_is_not_0() -> None:
    pytest.importorskip("genai_prices")
    known = endpoint_of("gpt-4o-mini@https://api.openai.com/v1")
    price = price_of(known, None, None)
    assert price is not None
    assert price.source == "genai-prices"
    assert 0 < price.usd_in < price.usd_out
    typed = price_of(known, 1.0, 2.0)
    assert typed is not None
    assert (typed.usd_in, typed.usd_out, typed.source) == (1.0, 2.0, "typed")
    assert price_of(endpoint_of("no-such-model@https://api.n1n.ai/v1"), None, None) is None
    assert price_of(endpoint_of("gpt-4o-mini@https://api.n1n.ai/v1"), None, None) is None
    for half in ((1.0, None), (None, 1.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(WrongRequest):
            price_of(known, *half)
