"""Each request is claimed once, and no cap is passed, by any number of writers."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from emotion_train.hosted import money
from emotion_train.hosted.answers import Answer
from emotion_train.hosted.asking import Place
from emotion_train.hosted.money import Ledger, Session, Wanted
from emotion_train.hosted.prices import Price, nano_of
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def test_of_many_writers_each_request_is_claimed_by_one_and_the_cap_holds(store: Store) -> None:
    claimed: list[str] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        ledger = Place(store).ledger
        names = [f"fake/{number:06d}" for number in range(30)]
        random.Random(seed).shuffle(names)
        for name in names:
            own = ledger.claim([Wanted(name, 10)], cap=255)
            with lock:
                claimed.extend(own)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(claimed) == len(set(claimed)) == 25
    ledger = Place(store).ledger
    ledger.refresh()
    assert ledger.spent() == 250


def test_a_session_is_alive_as_long_as_its_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = Session.of_this_process()
    theirs = own.model_copy(update={"process": child.pid, "began": money._began(child.pid), "token": "t"})
    another = own.model_copy(update={"machine": "elsewhere"})
    assert own.is_alive(0)
    assert theirs.is_alive(0)
    assert not theirs.model_copy(update={"began": "1"}).is_alive(time.time() + 99)  # its number again
    child.kill()
    child.communicate()
    assert not theirs.is_alive(time.time() + 99)
    assert another.is_alive(time.time() + 1)
    assert not another.is_alive(time.time() - 3600)
    own.end()
    assert not own.is_alive(time.time() + 99)


def test_money_is_counted_exactly() -> None:
    assert Price(0.1, 0.2, "typed").nano(3, 7) == 1700
    assert Price(0.15, 0.6, "typed").nano(1, 0) == 150
    assert Price(0.0001, 0, "typed").nano(1, 0) == 1  # rounded up
    assert nano_of(0.1) * 3 == nano_of(0.3) == 300_000_000


def test_an_answer_gives_back_what_was_reserved_for_more(folder: Store) -> None:
    place = Place(folder)
    ledger: Ledger = place.ledger
    assert ledger.claim([Wanted("a/0", 60), Wanted("a/1", 60)], cap=100) == ["a/0"]
    place.answers.keep("a/0", Answer(outcome="answered", nano_usd=40))
    assert ledger.claim([Wanted("a/1", 60)], cap=100) == ["a/1"]
    assert ledger.spent() == 100
    ledger.release(["a/1"])
    assert ledger.spent() == 40
    other = Place(folder).ledger
    other.refresh()
    assert other.claim([Wanted("a/1", 60)], cap=100) == ["a/1"]


def test_of_a_cap_as_much_as_it_allows_is_claimed_and_nothing_more(folder: Store) -> None:
    wanted = [Wanted(f"a/{number}", 30) for number in range(5)]
    assert Place(folder).ledger.claim(wanted, cap=100) == ["a/0", "a/1", "a/2"]
    assert Place(folder).ledger.claim(wanted, cap=100) == []
    assert Place(folder).ledger.claim(wanted, cap=120) == ["a/3"]
    assert Place(folder).ledger.claim(wanted, cap=None) == ["a/4"]


def test_what_a_process_that_is_gone_had_under_way_counts_in_full_and_is_lost(folder: Store) -> None:
    gone = Place(folder)
    gone.ledger.claim([Wanted("a/0", 30), Wanted("a/1", 30)], cap=100)
    gone.answers.keep("a/1", Answer(outcome="answered", nano_usd=5))
    other = Place(folder)
    other.ledger.refresh()
    assert not other.ledger.is_lost("a/0")
    gone.ledger.end()
    assert other.ledger.is_lost("a/0")
    assert not other.ledger.is_lost("a/1")
    assert other.ledger.spent() == 35
    assert other.requests("a", ["0", "1"]) == ["a/0", "a/1"]
    assert other.requests("a", ["0", "1"], again=True) == ["a/0-1", "a/1"]
    assert other.ledger.spent_on(["a/0-1"]) == 30
