"""One request to an OpenAI-compatible endpoint and its one outcome: answered, refused, filtered,
cut, unparseable or failed, with tokens, dollars and latency.

The SDK sends once, and this module decides what is sent again: the SDK would wait for any
Retry-After in silence, retry an empty account, and hide both in its latency. Only a request that
cost nothing is sent again: after a rate limit, a server's error, or a refused connection. After a
body that stops in the middle, or no answer in time, nobody knows whether the request was paid for:
it counts as failed, with the most that it can have cost.

An endpoint that refuses the key, the model or the account ends all work at once by `Stopped`.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import HostedStopped, WrongRequest
from emotion_train.hosted.answers import Answer, Form, Outcome
from emotion_train.hosted.endpoints import Endpoint, Key
from emotion_train.hosted.prices import Price

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_MAX_BODY_BYTES = 8 << 20
_ATTEMPTS = 5  # of a request that costs nothing when it fails
_FIRST_PAUSE_S = 0.5
_PROBES = 8
_EMPTY_ACCOUNT = (
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "insufficient_balance",
)
_FILTERED = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
_MAY_BE_PAID = (502, 504, 520, 522, 524)  # a proxy gave up; the model may have answered
_PROMPT_TOKENS = 64  # beside the messages' own bytes: roles, and what a template adds
_SCHEMA_TIMES = 2  # some endpoints count a schema as a part of the prompt


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A question: messages, the JSON schema of the answer, and the answer's most tokens."""

    messages: tuple[Message, ...]
    schema: Mapping[str, Any]
    max_tokens: int

    @property
    def most_tokens_in(self) -> int:
        """The most tokens that the prompt can have: no tokenizer makes more tokens than bytes."""
        of_messages = sum(len(message.content.encode()) + _PROMPT_TOKENS for message in self.messages)
        return of_messages + _SCHEMA_TIMES * len(json.dumps(self.schema).encode())

    def most_nano(self, price: Price) -> int:
        """The most that the request can cost, in billionths of a dollar."""
        return price.nano(self.most_tokens_in, self.max_tokens)


@dataclass(frozen=True)
class Rules:
    """The settings of all requests. `deadline_s` limits one whole answer; a longer Retry-After than
    `max_wait_s` ends all work.
    """

    deadline_s: float = 120.0
    max_wait_s: float = 60.0
    temperature: float = 0.0
    seed: int = 42
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def longest_s(self) -> float:
        """The longest time from a claim to its answer."""
        return _ATTEMPTS * (self.deadline_s + self.max_wait_s) + 60


class Stopped(HostedStopped):
    """The endpoint will answer no further request. `of_request`: the request itself has to change,
    so the exit code is 2 if nothing was paid yet.
    """

    def __init__(self, message: str, *, of_request: bool = False) -> None:
        super().__init__(message)
        self.of_request = of_request


class _Refused(Exception):
    """A request that cost nothing and may be sent again, after `wait_s` if the endpoint asks so."""

    def __init__(self, why: str, *, wait_s: float | None = None, is_rate: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.is_rate = is_rate


class _OtherForm(Exception):
    """A 400 that names something that the endpoint does not take."""


class Pace:
    """How many requests may be under way at once: halved at a rate limit, then one more after each
    round of answers (additive increase, multiplicative decrease).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._halved = float("-inf")
        self._held_until = 0.0

    @property
    def room(self) -> int:
        """How many may be under way now; 0 while the endpoint wants to be left alone."""
        return 0 if self.hold_s > 0 else max(1, int(self.limit))

    @property
    def hold_s(self) -> float:
        return max(0.0, self._held_until - time.monotonic())

    def answered(self) -> None:
        self.limit = min(float(self.most), self.limit + 1 / self.limit)

    def refused(self, sent: float, wait_s: float) -> None:
        """Note a rate limit for a request sent at `sent`. A request sent before the last halving
        does not halve again.
        """
        now = time.monotonic()
        if sent > self._halved:
            self.limit, self._halved = max(1.0, self.limit / 2), now
        self._held_until = max(self._held_until, now + wait_s)


class Client:
    """Asks one hosted model; used in an `async with` statement."""

    def __init__(self, endpoint: Endpoint, key: Key, price: Price, rules: Rules, pace: Pace) -> None:
        self.endpoint = endpoint
        self.price = price
        self.rules = rules
        self.pace = pace
        self._key = key
        self._pause: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def __aenter__(self) -> Client:
        openai = _sdk()
        self._sdk = openai
        self._client: AsyncOpenAI = openai.AsyncOpenAI(
            api_key=self._key.reveal(),
            base_url=self.endpoint.url,
            default_query=dict(self.endpoint.query),
            max_retries=0,
            timeout=self.rules.deadline_s,
            # a redirect would send the posts to a host that nobody agreed to
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def require_model(self) -> None:
        """Raises `WrongRequest` for an endpoint that cannot be reached, refuses the key, or lists
        its models without this one. Costs nothing.
        """
        sdk, host = self._sdk, self.endpoint.host
        try:
            async with asyncio.timeout(self.rules.deadline_s):
                raw = await self._client.models.with_raw_response.list()
            models = _model_ids(raw.http_response.content)
        except sdk.APIStatusError as error:
            if error.status_code in (401, 403):
                raise WrongRequest(str(self._stop_of(error.status_code, _body_of(error)))) from None
            return  # an endpoint that lists no models may still have this one
        except (sdk.APIConnectionError, TimeoutError) as error:
            raise WrongRequest(self._unreachable(error)) from None
        except Unreadable:
            return
        own = self.endpoint.model
        if models and not any(name in (own, f"models/{own}") or name.endswith(f"/{own}") for name in models):
            near = _nearest(own, models)
            raise WrongRequest(
                f"{host} has no model {own!r}; it has {self._key.message(', '.join(near))}"
                f"{' and others' if len(models) > len(near) else ''}."
            )

    async def find_form(self, prompt: Prompt) -> tuple[Form, Answer]:
        """The form that the endpoint takes, and the answer to the request that found it. Raises as
        `ask`, and `Stopped` where it takes no form.
        """
        form = Form()
        for _ in range(_PROBES):
            try:
                return form, await self._attempts(prompt, form)
            except _OtherForm as refused:
                other = _other_form(form, str(refused))
                if other is None:
                    raise Stopped(
                        f"{self.endpoint.name} refuses the request: {self._key.message(str(refused))}",
                        of_request=True,
                    ) from None
                form = other
        raise Stopped(f"{self.endpoint.name} refuses every form of request that is known.", of_request=True)

    async def ask(self, prompt: Prompt, form: Form) -> Answer:
        """The outcome of a request, sent again while that costs nothing. Raises `Stopped` when the
        endpoint will answer no further request.
        """
        try:
            return await self._attempts(prompt, form)
        except _OtherForm as refused:  # only this prompt is refused, for example as too long
            return Answer(outcome="failed", reason=self._key.message(str(refused)))

    async def _attempts(self, prompt: Prompt, form: Form) -> Answer:
        why = ""
        for attempt in range(1, _ATTEMPTS + 1):
            sent = time.monotonic()
            try:
                answer = await self._attempt(prompt, form)
                self.pace.answered()
                return answer.model_copy(
                    update={"attempts": attempt, "concurrency": max(1, int(self.pace.limit))}
                )
            except _Refused as refused:
                why = self._key.message(str(refused))
                wait_s = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), self.rules.max_wait_s)
                if refused.wait_s is not None:
                    wait_s = refused.wait_s
                if wait_s > self.rules.max_wait_s:
                    raise Stopped(
                        f"{self.endpoint.host} asks to wait {wait_s:,.0f} s, longer than"
                        f" --max-wait {self.rules.max_wait_s:g}; all answers are kept."
                    ) from None
                if refused.is_rate:
                    self.pace.refused(sent, wait_s)
                is_rate = refused.is_rate
            if attempt < _ATTEMPTS:
                await self._pause(wait_s)
        if is_rate:
            raise Stopped(
                f"{self.endpoint.host} refused a request {_ATTEMPTS} times for its rate limit ({why});"
                " all answers are kept: give a smaller --concurrency."
            )
        return Answer(outcome="failed", reason=why, attempts=_ATTEMPTS)

    async def _attempt(self, prompt: Prompt, form: Form) -> Answer:
        sdk, began = self._sdk, time.monotonic()
        most = prompt.most_nano(self.price)
        try:
            async with asyncio.timeout(self.rules.deadline_s):
                raw = await self._client.chat.completions.with_raw_response.create(**self._body(prompt, form))
            latency_s = time.monotonic() - began
            headers, content = raw.http_response.headers, raw.http_response.content
        except sdk.APIStatusError as error:
            status, headers, content = error.status_code, error.response.headers, _body_of(error)
            return self._of_error(status, content, headers, most, time.monotonic() - began)
        except TimeoutError:
            return _failed(f"no whole answer within {self.rules.deadline_s:g} s", most)
        except sdk.APITimeoutError:
            return _failed(f"no answer within {self.rules.deadline_s:g} s", most)
        except sdk.APIConnectionError as error:
            if _was_not_connected(error):
                raise _Refused(self._unreachable(error)) from None
            return _failed("the answer stopped in the middle", most)
        answer = self._of_body(content, prompt, most)
        return answer.model_copy(
            update={
                "latency_s": round(latency_s, 4),
                "request_id": self._short(headers.get("x-request-id")),
            }
        )

    def _body(self, prompt: Prompt, form: Form) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": one.role, "content": one.content} for one in prompt.messages],
            form.max_tokens: prompt.max_tokens,
        }
        if form.temperature:
            body["temperature"] = self.rules.temperature
        if form.seed:
            body["seed"] = self.rules.seed
        if form.response_format == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": prompt.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        if self.rules.extra_body:
            body["extra_body"] = dict(self.rules.extra_body)
        return body

    # --- what came back ---

    def _of_error(
        self, status: int, content: bytes, headers: Mapping[str, str], most: int, latency_s: float
    ) -> Answer:
        """The outcome of an error's status. Raises `_Refused` or `_OtherForm` where the request may
        be sent again, and `Stopped`.
        """
        code, message = _error_in(content)
        if status == 402 or code in _EMPTY_ACCOUNT:
            raise self._stop_of(402, content)
        if code in _FILTERED:
            reason = self._key.message(message)
            return Answer(outcome="filtered", reason=reason, latency_s=round(latency_s, 4))
        if status in (401, 403, 404) or 300 <= status < 400:
            raise self._stop_of(status, content, headers.get("location"))
        if status in (408, 409, 425, 429):
            raise _Refused(f"{status}: {message}", wait_s=_retry_after_s(headers), is_rate=status == 429)
        if status in _MAY_BE_PAID:
            return _failed(f"a proxy on the way gave up ({status})", most)
        if status >= 500:
            raise _Refused(f"{status}: {message}", wait_s=_retry_after_s(headers))
        raise _OtherForm(f"{status}: {message}")

    def _stop_of(self, status: int, content: bytes, location: str | None = None) -> Stopped:
        host, why = self.endpoint.host, self._key.message(_error_in(content)[1])
        if status == 402:
            return Stopped(f"The account at {host} has no money or quota left ({why}).")
        if status == 401:
            return Stopped(f"{host} refuses the key ({why}); set the variable of --key-env.", of_request=True)
        if status == 403:
            return Stopped(f"{host} does not allow this request with this key ({why}).", of_request=True)
        if status == 404:
            return Stopped(
                f"{host} has no model {self.endpoint.model!r}, or no chat completions below"
                f" {self.endpoint.url} ({why}).",
                of_request=True,
            )
        there = "" if location is None else f" to {self._key.message(location.partition('?')[0])}"
        return Stopped(f"{host} redirects{there}; type that URL if you mean it.", of_request=True)

    def _of_body(self, content: bytes, prompt: Prompt, most: int) -> Answer:
        """The outcome of a 200, whatever its body. Raises as `_of_error` for an error in it."""
        try:
            body = object_in(content, _MAX_BODY_BYTES, whole_characters=False)
        except Unreadable as error:
            is_page = content.lstrip()[:1] == b"<"
            why = "a web page" if is_page else f"no JSON ({error})"
            return _failed(self._key.message(f"the answer is {why}"), most)
        if isinstance(body.get("error"), dict | str) and not body.get("choices"):
            return self._of_error_inside(content, most)
        facts = self._facts(body, prompt, most)
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return Answer(outcome="failed", reason="the answer holds no choices", **facts)
        return self._of_choice(choices[0], facts)

    def _of_error_inside(self, content: bytes, most: int) -> Answer:
        """The outcome of a 200 with an error in it. The model may have begun, so the request may
        have been paid for.
        """
        code, message = _error_in(content)
        if code in _EMPTY_ACCOUNT or code == "402":
            raise self._stop_of(402, content)
        if code in ("401", "403"):
            raise self._stop_of(int(code), content)
        if code == "429":
            raise _Refused(f"429: {message}", is_rate=True)
        if code in _FILTERED:
            reason = self._key.message(message)
            return Answer(outcome="filtered", reason=reason, nano_usd=most, estimated=True)
        return _failed(f"an error in the answer: {self._key.message(message)}", most)

    def _of_choice(self, choice: Mapping[str, Any], facts: dict[str, Any]) -> Answer:
        message = choice.get("message")
        fields: Mapping[str, Any] = message if isinstance(message, dict) else {}
        content, refusal = fields.get("content"), fields.get("refusal")
        text = self._key.hidden(content) if isinstance(content, str) else ""
        text = text.encode("utf-8", "replace").decode()  # half a character cannot be stored
        finish = choice.get("finish_reason")
        outcome: Outcome = "answered" if text.strip() else "unparseable"
        reason = "" if text.strip() else "the answer is empty"
        if isinstance(refusal, str) and refusal:
            outcome, reason = "refused", self._key.message(refusal)
        elif finish == "content_filter":
            outcome, reason = "filtered", "the endpoint's filter took the answer"
        elif finish == "length":
            outcome, reason = "cut", "the answer reached the most tokens that it may have"
        return Answer(outcome=outcome, text=text, reason=reason, **facts)

    def _facts(self, body: Mapping[str, Any], prompt: Prompt, most: int) -> dict[str, Any]:
        """Model, tokens and dollars of an answer. Dollars: the endpoint's own figure where it gives
        one and no price was typed, else by tokens, else the most that it can have cost.
        """
        usage = body.get("usage")
        used: Mapping[str, Any] = usage if isinstance(usage, dict) else {}
        tokens_in, tokens_out = (_count(used.get(f"{name}_tokens")) for name in ("prompt", "completion"))
        cost = used.get("cost")
        known = tokens_in is not None and tokens_out is not None
        nano = self.price.nano(tokens_in or 0, tokens_out or 0) if known else most
        if self.price.source != "typed" and isinstance(cost, int | float) and isfinite(cost) and cost >= 0:
            nano, known = round(cost * 10**9), True
        return {
            "model": self._short(body.get("model")),
            "fingerprint": self._short(body.get("system_fingerprint")),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "nano_usd": nano,
            "estimated": not known,
        }

    def _short(self, value: Any) -> str | None:
        return self._key.message(value)[:200] if isinstance(value, str) else None

    def _unreachable(self, error: BaseException) -> str:
        cause = error.__cause__ or error
        why = self._key.message(str(cause)) or type(cause).__name__
        return f"{self.endpoint.url} cannot be reached ({why}); check the URL of --llm and the network."


def require_sdk() -> None:
    """Raises `WrongRequest` where the packages of the extra are not installed."""
    _sdk()


def _sdk() -> Any:
    try:
        import openai
    except ImportError:
        raise WrongRequest(
            "Hosted models need the package openai; type `pip install 'emotion-train[hosted]'`."
        ) from None
    return openai


def _failed(why: str, most: int) -> Answer:
    """A failed request that may have been paid for, so the most that it can cost counts."""
    return Answer(outcome="failed", reason=why, nano_usd=most, estimated=True)


def _was_not_connected(error: BaseException) -> bool:
    """Whether nothing was sent, so nothing was paid."""
    cause = error.__cause__
    return type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")


def _body_of(error: Any) -> bytes:
    try:
        return bytes(error.response.content)
    except Exception:  # a body that was not read
        return b""


def _error_in(content: bytes) -> tuple[str, str]:
    """The code and message of an error's body; for a body that is no JSON, its beginning."""
    try:
        body = object_in(content, _MAX_BODY_BYTES, whole_characters=False)
    except Unreadable:
        return "", content[:200].decode("utf-8", "replace")
    error = body.get("error", body)
    if not isinstance(error, dict):
        return "", str(error)
    code = str(error.get("code") or error.get("type") or "")
    kind = str(error.get("type") or "")
    return (kind if kind in _EMPTY_ACCOUNT else code), str(error.get("message") or error)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait, by `retry-after-ms`, or `Retry-After` as seconds or a
    date; None where neither can be read.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        when = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, when.timestamp() - time.time())


def _other_form(form: Form, message: str) -> Form | None:
    """The next form to try after a refusal with this message; None where it names nothing that
    could be left out.
    """
    refusal = message.lower()
    if "max_completion_tokens" in refusal and form.max_tokens == "max_tokens":
        return form.model_copy(update={"max_tokens": "max_completion_tokens"})
    if "max_tokens" in refusal and form.max_tokens == "max_tokens":
        return form.model_copy(update={"max_tokens": "max_completion_tokens"})
    if "temperature" in refusal and form.temperature:
        return form.model_copy(update={"temperature": False})
    if "seed" in refusal and form.seed:
        return form.model_copy(update={"seed": False})
    if any(name in refusal for name in ("response_format", "json_schema", "schema", "json_object")):
        following = {"json_schema": "json_object", "json_object": "none"}.get(form.response_format)
        return form.model_copy(update={"response_format": following}) if following else None
    return None


def _model_ids(content: bytes) -> list[str]:
    data = object_in(content, _MAX_BODY_BYTES, whole_characters=False).get("data")
    if not isinstance(data, list):
        return []
    return [one["id"] for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]


def _nearest(name: str, names: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, names, n=5, cutoff=0.3) or sorted(names)[:5]


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12 else None
