"""Asks a hosted model all requests that have no answer yet, many at once, within a cap on dollars.

A request is sent only once its claim is in the store, and claimed only if it fits under the cap and
no other process has claimed it. After SIGINT or SIGTERM, requests under way are still answered and
kept; a second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from emotion_train.console import tell
from emotion_train.errors import AlreadyExists, HostedStopped, WrongRequest
from emotion_train.hosted.answers import Answer, Answers, Form
from emotion_train.hosted.client import Client, Pace, Prompt, Rules, Stopped
from emotion_train.hosted.endpoints import Endpoint, Key
from emotion_train.hosted.money import Ledger, Wanted
from emotion_train.hosted.prices import Price, usd_of
from emotion_train.progress import ProgressLine
from emotion_train.report.units import dollars
from emotion_train.storage.store import Store

_LOOK_S = 0.3  # between looks at other processes' claims
_MOST_FAILED = 10  # in a row before it stops: an endpoint that is down must not count as wrong answers


@dataclass(frozen=True)
class Asked:
    """A request: its name in the store, FOLDER/NUMBER, and its prompt."""

    request: str
    prompt: Prompt


@dataclass(frozen=True)
class Model:
    """A hosted model with all that asking it needs. `folder` is the digest of all that decides its
    answers.
    """

    endpoint: Endpoint
    key: Key
    price: Price
    rules: Rules
    folder: str


class Place:
    """The answers and claims of one command and all its models."""

    def __init__(self, store: Store, prefix: str = "", longest_s: float = 600.0) -> None:
        self.answers = Answers(store, prefix)
        self.ledger = Ledger(store, self.answers, prefix, longest_s)

    def requests(self, folder: str, names: Sequence[str], *, again: bool = False) -> list[str]:
        """The names of requests, FOLDER/NAME; the last one for a request that was sent more than
        once. `again` gives failed and lost requests a new name, so they may be paid for twice.
        """
        self.ledger.refresh()
        return [self.named(folder, own, again=again) for own in names]

    def named(self, folder: str, own: str, *, again: bool = False) -> str:
        """The name of one request, as in `requests`, by the state of the last `ledger.refresh`."""
        name, times = f"{folder}/{own}", 0
        while self.ledger.is_claimed(following := f"{folder}/{own}-{times + 1}"):
            name, times = following, times + 1
        answer = self.answers.known(name)
        failed = answer.outcome == "failed" if answer is not None else self.ledger.is_lost(name)
        return following if again and failed else name


def ask_all(
    model: Model,
    asked: Sequence[Asked],
    place: Place,
    *,
    concurrency: int,
    cap: int | None,
    unit: str,
    objection: Callable[[Answer], str | None] = lambda answer: None,
) -> None:
    """Ask until each request has an answer in the store, except those lost with an earlier process.

    `cap` limits all claims at this place, in billionths of a dollar; None is no limit. `objection`
    gets each new answer, and ends the asking by returning a sentence.

    Raises `WrongRequest` for an endpoint that cannot be asked, before anything is paid, and
    `HostedStopped` when the endpoint, the cap or a signal ends it early.
    """
    place.ledger.refresh()
    missing = [request for request in asked if place.answers.known(request.request) is None]
    missing = [request for request in missing if not place.ledger.is_lost(request.request)]
    if not missing:
        return
    place.ledger.begin()
    try:
        asyncio.run(_Work(model, missing, place, concurrency, cap, unit, objection).run())
    finally:
        place.ledger.end()


class _Work:
    """One model and the requests that it has yet to answer."""

    def __init__(
        self,
        model: Model,
        missing: Sequence[Asked],
        place: Place,
        concurrency: int,
        cap: int | None,
        unit: str,
        objection: Callable[[Answer], str | None],
    ) -> None:
        self._model = model
        self._prompts = {asked.request: asked.prompt for asked in missing}
        self._pending = deque(asked.request for asked in missing)
        self._place = place
        self._pace = Pace(concurrency)
        self._cap = cap
        self._unit = unit
        self._objection = objection
        self._stop: BaseException | None = None
        self._failed_in_a_row = 0
        self._done = 0
        self._wake = asyncio.Event()

    async def run(self) -> None:
        answers = self._place.answers
        paid_before = any(map(answers.known, self._prompts)) or self._place.ledger.spent() > 0
        with _signals(self._interrupted), ProgressLine("asking", len(self._prompts), self._unit) as line:
            self._line = line
            async with Client(
                self._model.endpoint, self._model.key, self._model.price, self._model.rules, self._pace
            ) as client:
                await client.require_model()
                await self._ask_everything(client)
        if isinstance(self._stop, Stopped) and self._stop.of_request and not paid_before and not self._done:
            raise WrongRequest(str(self._stop))
        if self._stop is not None:
            raise self._stop

    async def _ask_everything(self, client: Client) -> None:
        under_way: set[asyncio.Task[None]] = set()
        form = await asyncio.to_thread(self._place.answers.form, self._model.folder)
        while self._stop is None:
            # the first request, alone, finds out which form the endpoint takes
            room = self._pace.room if form is not None else min(1, self._pace.room)
            claimed = await self._claim(room - len(under_way))
            for request in claimed:
                under_way.add(asyncio.create_task(self._ask(client, request, form)))
            if not under_way and not claimed and self._pace.hold_s == 0:
                if not await self._has_more():
                    break
                await self._pause(_LOOK_S)
            elif under_way:
                pause_s = self._pace.hold_s or None
                done, under_way = await asyncio.wait(
                    under_way, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED
                )
                self._heed(done)
            else:
                await self._pause(min(self._pace.hold_s, _LOOK_S))
            if form is None:
                form = await asyncio.to_thread(self._place.answers.form, self._model.folder)
        if under_way:
            self._heed((await asyncio.wait(under_way))[0])

    async def _claim(self, room: int) -> list[str]:
        while self._pending and self._place.ledger.is_claimed(self._pending[0]):
            self._pending.popleft()
        if room <= 0 or not self._pending:
            return []
        chosen = [one for one in list(self._pending)[: 4 * room] if not self._place.ledger.is_claimed(one)]
        wanted = [Wanted(one, self._prompts[one].most_nano(self._model.price)) for one in chosen[:room]]
        return await asyncio.to_thread(self._place.ledger.claim, wanted, self._cap)

    async def _has_more(self) -> bool:
        """Whether to wait for requests of other processes: they may be answered, or cost less than
        they reserve. If none is under way and requests are unclaimed, the cap is reached.
        """
        ledger = self._place.ledger
        await asyncio.to_thread(ledger.refresh)
        unclaimed = [one for one in self._pending if not ledger.is_claimed(one)]
        if unclaimed and not self._cannot_pay(unclaimed[0]):
            return True  # others claimed requests in between, or money came back
        open_requests = await asyncio.to_thread(
            lambda: [one for one in ledger.open_requests() if not ledger.is_lost(one)]
        )
        if open_requests:
            return True
        if unclaimed:
            self._stop = self._cap_reached(len(unclaimed))
        return False

    def _cannot_pay(self, request: str) -> bool:
        most = self._prompts[request].most_nano(self._model.price)
        return self._cap is not None and self._place.ledger.spent() + most > self._cap

    async def _ask(self, client: Client, request: str, form: Form | None) -> None:
        prompt = self._prompts[request]
        try:
            if form is None:
                found, answer = await client.find_form(prompt)
                with suppress(AlreadyExists):
                    await asyncio.to_thread(self._place.answers.keep_form, self._model.folder, found)
            else:
                answer = await client.ask(prompt, form)
        except Stopped as stopped:
            # it cost nothing; left claimed without an answer it would count as lost for good
            await asyncio.to_thread(self._place.ledger.release, [request])
            raise stopped
        await asyncio.to_thread(self._place.answers.keep, request, answer)
        self._count(request, answer)

    def _count(self, request: str, answer: Answer) -> None:
        self._done += 1
        spent = usd_of(self._place.ledger.spent())
        self._line.update(self._done, f"{dollars(spent)} spent or reserved" if self._cap is not None else "")
        self._failed_in_a_row = self._failed_in_a_row + 1 if answer.outcome == "failed" else 0
        most = self._prompts[request].most_nano(self._model.price)
        if self._stop is not None:
            return
        if self._cap is not None and answer.nano_usd > most:
            self._stop = HostedStopped(
                f"{self._model.endpoint.host} charged {dollars(usd_of(answer.nano_usd))} for a request that"
                f" may cost {dollars(usd_of(most))} at most, so no cap can be held; all answers are kept."
                " Give another --price-in and --price-out, or another endpoint."
            )
        elif self._failed_in_a_row >= _MOST_FAILED:
            self._stop = HostedStopped(
                f"{_MOST_FAILED} requests in a row failed at {self._model.endpoint.host} (the last:"
                f" {answer.reason}); all answers are kept, and the same command resumes from there."
            )
        elif (objection := self._objection(answer)) is not None:
            self._stop = HostedStopped(objection)

    def _heed(self, done: set[asyncio.Task[None]]) -> None:
        for task in done:
            if (error := task.exception()) is not None and self._stop is None:
                self._stop = error

    def _cap_reached(self, left: int) -> HostedStopped:
        assert self._cap is not None
        return HostedStopped(
            f"The cap of {dollars(usd_of(self._cap))} is reached with {left:,} {self._unit} left;"
            f" {dollars(usd_of(self._place.ledger.spent()))} are spent and everything is kept. The same"
            " command with a larger --max-usd resumes from there."
        )

    def _interrupted(self) -> None:
        if self._stop is None:
            tell("stopping: requests under way are still answered and kept; a second signal stops at once")
            self._stop = HostedStopped(
                "Stopped; every answer is kept, and the same command resumes from there."
            )
        self._wake.set()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.01)):
                await self._wake.wait()


@contextmanager
def _signals(act: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM in the block calls `act`; later ones act as by default."""
    loop, names = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def heard() -> None:
        for name in names:
            loop.remove_signal_handler(name)
        act()

    # other threads and Windows have no such handlers; there Ctrl-C ends the process at once
    usable = threading.current_thread() is threading.main_thread() and os.name != "nt"
    try:
        for name in names if usable else ():
            loop.add_signal_handler(name, heard)
        yield
    finally:
        for name in names if usable else ():
            loop.remove_signal_handler(name)
