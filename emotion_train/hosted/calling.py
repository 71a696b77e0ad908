"""The calls that write synthetic posts, made block by block; answered calls are not repeated."""

from __future__ import annotations

from collections.abc import Callable

from emotion_train.hosted.answers import Answer, digest_of
from emotion_train.hosted.asking import Asked, Model, Place, ask_all
from emotion_train.hosted.options import Chosen
from emotion_train.hosted.synthetic import Call, posts_in
from emotion_train.storage.store import Store

PREFIX = "augment"  # folder of calls, claims and report below the new data set
_UNUSABLE = 5  # answers in a row that are no posts
_SHOWN = 400  # characters of an answer


class Calling:
    """Plans and makes the calls block by block: cut answers make the calls of later blocks
    smaller.
    """

    def __init__(
        self, chosen: Chosen, store: Store, planned: Callable[..., list[Call]], *, per_call: int, again: bool
    ) -> None:
        self._chosen = chosen
        self._planned = planned
        self._per_call = per_call
        self.place = Place(store, PREFIX, chosen.rules.longest_s)
        (endpoint,), rules = chosen.endpoints, chosen.rules
        self._folder = digest_of(
            endpoint.model, endpoint.url, rules.temperature, rules.seed, dict(rules.extra_body)
        )
        self._again = again
        self._look()

    def _look(self) -> None:
        """Plan the calls by the known answers."""
        self._named: dict[int, str] = {}
        self.place.ledger.refresh()
        self.calls = self._planned(is_cut=self._is_cut)
        self.requests = [self._name_of(call) for call in self.calls]

    def _name_of(self, call: Call) -> str:
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
        (endpoint,), (key,) = self._chosen.endpoints, self._chosen.keys()
        (price,) = self._chosen.require_payable()
        model = Model(endpoint, key, price, self._chosen.rules, self._folder)
        objection = _unusable_in_a_row(self._per_call)
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
