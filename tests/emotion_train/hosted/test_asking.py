"""Nothing is asked twice and no cap is passed: in any order of answers, by several processes, with
kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from emotion_train.errors import HostedStopped, WrongRequest
from emotion_train.hosted.asking import Asked, Model, Place, ask_all
from emotion_train.hosted.client import Message, Prompt, Rules
from emotion_train.hosted.endpoints import Key, endpoint_of
from emotion_train.hosted.prices import Price
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from tests.helpers.fake_llm import KEY, USD_IN, USD_OUT, FakeLLM
from tests.helpers.patience import PATIENCE_S

SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
PRICE = Price(USD_IN, USD_OUT, "typed")
RULES = Rules(deadline_s=PATIENCE_S, max_wait_s=5)
FAILURES = (
    "refusal",
    "filter",
    "length",
    "no-usage",
    "no-choices",
    "error-inside",
    "html",
    "cut-body",
    "gone",
)


def asked(names: Iterable[str]) -> list[Asked]:
    return [Asked(name, Prompt((Message("user", f"post {name}"),), SCHEMA, 16)) for name in names]


def most(name: str = "fake/000000") -> int:
    return asked([name])[0].prompt.most_nano(PRICE)


def ask(
    fake: FakeLLM, store: Store, posts: int, *, cap: int | None = None, again: bool = False, **other: Any
) -> Place:
    """Ask for so many posts as a command of its own would."""
    place = Place(store, longest_s=RULES.longest_s)
    names = place.requests("fake", [f"{number:06d}" for number in range(posts)], again=again)
    model = Model(endpoint_of(fake.word), Key(KEY), PRICE, RULES, "fake")
    ask_all(model, asked(names), place, concurrency=other.get("concurrency", 8), cap=cap, unit="posts")
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def test_everything_is_asked_once_and_a_second_command_asks_nothing(store: Store) -> None:
    with FakeLLM(delay_s=lambda: 0.05) as fake:
        place = ask(fake, store, 12)
        requests = len(fake.requests)
        again = ask(fake, store, 12)
    assert requests == len(fake.requests) == 12
    assert max(fake.whole.values()) == 1
    assert fake.most_under_way > 1
    assert place.ledger.spent() == again.ledger.spent() == fake.charged_nano


def test_more_posts_ask_only_for_those(folder: Store) -> None:
    with FakeLLM() as fake:
        ask(fake, folder, 5)
        ask(fake, folder, 9)
    assert len(fake.requests) == 9
    assert max(fake.whole.values()) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_cap_is_never_passed_whatever_fails_and_in_whatever_order(folder: Store, seed: int) -> None:
    """Resumed with larger caps until all is done; each outcome of the fake's is charged."""
    draw = random.Random(seed)
    plays = {number: draw.choice(FAILURES) for number in range(400) if draw.random() < 0.4}
    with FakeLLM(
        plays=lambda number, post: plays.get(number, "ok"), delay_s=lambda: draw.random() / 100
    ) as fake:
        for part in (0.0, 0.15, 0.4, 1.2):
            cap = int(part * 24 * most())
            try:
                place = ask(fake, folder, 24, cap=cap)
            except HostedStopped as stopped:
                place = Place(folder)
                place.ledger.refresh()
                told = str(stopped)
                assert "cap of" in told or "in a row failed" in told
                assert part < 1 or "in a row failed" in told
            assert fake.charged_nano <= place.ledger.spent() <= cap
        ended = sum(answer is not None for answer in map(place.answers.known, _names(24)))
    assert max(fake.whole.values()) == 1
    assert len(fake.requests) == ended


def _names(posts: int) -> list[str]:
    return [f"fake/{number:06d}" for number in range(posts)]


def test_without_money_for_one_request_nothing_is_sent(folder: Store) -> None:
    with FakeLLM() as fake, pytest.raises(HostedStopped, match="larger --max-usd") as stopped:
        ask(fake, folder, 3, cap=most() - 1)
    assert fake.requests == []
    assert stopped.value.exit_code == 1


def test_what_failed_is_asked_again_on_request_alone_and_its_money_stays_spent(folder: Store) -> None:
    with FakeLLM(plays=["ok", "cut-body", "ok"]) as fake:
        ask(fake, folder, 3, concurrency=1)
        ask(fake, folder, 3, concurrency=1)
        assert len(fake.requests) == 3
        place = ask(fake, folder, 3, concurrency=1, again=True)
        assert len(fake.requests) == 4
        assert place.ledger.spent() >= fake.charged_nano
        place = ask(fake, folder, 3, concurrency=1)
        assert len(fake.requests) == 4
    names = place.requests("fake", [f"{number:06d}" for number in range(3)])
    assert names == ["fake/000000", "fake/000001-1", "fake/000002"]
    outcomes = [answer.outcome for answer in map(place.answers.known, names) if answer is not None]
    assert outcomes == ["answered"] * 3


def test_an_empty_account_ends_at_once_and_the_same_command_goes_on(folder: Store) -> None:
    with FakeLLM(plays=["ok"] * 4 + ["quota"]) as fake:
        with pytest.raises(HostedStopped, match="no money or quota"):
            ask(fake, folder, 9, concurrency=1)
        assert len(fake.requests) == 5
        place = ask(fake, folder, 9, concurrency=1)
    assert len(fake.requests) == 10
    assert max(fake.whole.values()) == 1
    assert place.ledger.spent() == fake.charged_nano


@pytest.mark.parametrize(
    ("step", "kind"), [("401", WrongRequest), ("404", WrongRequest), ("quota", HostedStopped)]
)
def test_what_is_refused_before_anything_is_paid_is_a_wrong_request(
    folder: Store, step: str, kind: type[Exception]
) -> None:
    with FakeLLM(plays=[step]) as fake, pytest.raises(kind) as refused:
        ask(fake, folder, 3)
    assert type(refused.value) is kind or kind is HostedStopped
    assert len(fake.requests) == 1
    place = Place(folder)
    place.ledger.refresh()
    assert place.ledger.spent() == 0


def test_an_endpoint_that_is_down_does_not_make_wrong_answers(folder: Store) -> None:
    with (
        FakeLLM(plays=lambda number, post: "ok" if number == 0 else "502") as fake,
        pytest.raises(HostedStopped, match="10 requests in a row failed"),
    ):
        ask(fake, folder, 40, concurrency=2)
    assert len(fake.requests) <= 13


def test_the_key_is_in_no_object(folder: Store, tmp_path: Path) -> None:
    with FakeLLM(plays=["echo", "error-inside", "400", "ok", "cut-body"]) as fake:
        ask(fake, folder, 5, concurrency=1)
        fake._step = lambda number, post: "403"
        with pytest.raises(HostedStopped) as stopped:
            ask(fake, folder, 6, concurrency=1)
    assert KEY not in str(stopped.value)
    held = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(held) > 8
    for part in (KEY, KEY[:16], KEY[-16:]):
        assert not [one for one in held if part in one]


# --- processes ---

_CHILD = """
import sys
from pathlib import Path
from emotion_train.errors import exit_code
from emotion_train.storage.open import open_store
from tests.emotion_train.hosted.test_asking import ask_as_a_process
sys.exit(exit_code("child", lambda: ask_as_a_process(*sys.argv[1:])))
"""


def ask_as_a_process(word: str, folder: str, posts: str, cap: str) -> int:
    place = Place(open_store(folder), longest_s=RULES.longest_s)
    names = place.requests("fake", [f"{number:06d}" for number in range(int(posts))])
    model = Model(endpoint_of(word), Key(os.environ["FAKE_KEY"]), PRICE, RULES, "fake")
    ask_all(model, asked(names), place, concurrency=16, cap=int(cap), unit="posts")
    return 0


def start(fake: FakeLLM, folder: Path, posts: int, cap: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", _CHILD, fake.word, str(folder), str(posts), str(cap)]
    root = str(Path(__file__).parents[3])
    environment = os.environ | {
        "FAKE_KEY": KEY,
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def soak(folder: Path, seed: int, posts: int, kills: Sequence[bool] = (True, True, False, False)) -> None:
    """Two processes at once with failures of every kind, killed at a random moment, and again."""
    draw = random.Random(seed)
    plays = {
        number: draw.choice((*FAILURES, "429-ms", "500")) for number in range(999) if draw.random() < 0.2
    }
    delays = random.Random(seed)
    cap = int(posts * most() * draw.choice((0.3, 0.7, 2)))
    with FakeLLM(
        plays=lambda number, post: plays.get(number, "ok") if number else "ok",
        delay_s=lambda: delays.random() / 20,
    ) as fake:
        for kill in kills:
            pair = [start(fake, folder, posts, cap) for _ in range(2)]
            began, moment = len(fake.requests), draw.randrange(1, posts // 2)
            wait_for(lambda: len(fake.requests) >= began + moment or all(p.poll() is not None for p in pair))  # noqa: B023
            if kill:
                pair[0].send_signal(draw.choice((signal.SIGKILL, signal.SIGTERM)))
            codes = [one.wait(PATIENCE_S) for one in pair]
            told = [one.stderr.read().decode() for one in pair if one.stderr is not None]
            for one in pair:
                assert one.stderr is not None
                one.stderr.close()
            assert all("Traceback" not in words and KEY not in words for words in told), told
            assert set(codes) <= {0, 1, -signal.SIGKILL, -signal.SIGTERM}, told
            place = Place(open_store(str(folder)))
            place.ledger.refresh()
            assert fake.charged_nano <= place.ledger.spent() <= cap
        assert max(fake.whole.values()) == 1
    held = [json.loads(path.read_text()) for path in folder.rglob("answers/fake/*.json")]
    assert held


def test_two_processes_and_a_kill_pay_for_nothing_twice(tmp_path: Path) -> None:
    soak(tmp_path / "out", seed=1, posts=16, kills=(True,))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("HOSTED_SOAK_RUNS", "50"))))
def test_many_seeds_pay_for_nothing_twice(tmp_path: Path, seed: int) -> None:
    """Four commands a seed: 200 runs."""
    soak(tmp_path / "out", seed, posts=40)
