"""A strict OpenAI-compatible server on loopback that plays every failure of hosted models, keeps
each request and knows what it would have charged.

    with FakeLLM(says=lambda text: '{"label": "calm"}', plays=["429", "ok"]) as fake:
        fake.word  # MODEL@URL for --llm

Strict: another key, an unknown model, a field that it does not know or a wrong one is an error, as
hosted endpoints have it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

KEY = "sk-fake-0123456789abcdef0123456789abcdef"
MODEL = "fake-1"
FIELDS = {
    "model",
    "messages",
    "temperature",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
}
# dollars of a million tokens, as --price-in and --price-out say them to the client
USD_IN, USD_OUT = 2.0, 8.0


class FakeLLM:
    """`plays` are the steps of the chat requests in their order, then "ok" for ever; a function of
    the request's number and the post is asked for each. `says` makes the answer of a prompt's last
    message. `lacks` are fields that this endpoint refuses, and `models` what it lists.
    """

    def __init__(
        self,
        says: Callable[[str], str] = lambda post: '{"label": "calm"}',
        plays: Iterable[str] | Callable[[int, str], str] = (),
        *,
        lacks: Iterable[str] = (),
        models: Iterable[str] = (MODEL,),
        delay_s: Callable[[], float] = lambda: 0.0,
        echoes_key: bool = True,
    ) -> None:
        self.says, self.delay_s, self.echoes_key = says, delay_s, echoes_key
        self.lacks, self.models = set(lacks), list(models)
        if callable(plays):
            self._step = plays
        else:
            script = list(plays)
            self._step = lambda number, post: script[number] if number < len(script) else "ok"
        self.requests: list[dict[str, Any]] = []
        self.whole: Counter[str] = Counter()  # whole, paid answers by prompt
        self.charged_nano = 0  # for everything that a model may have worked on
        self.most_under_way = 0
        self._under_way = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def word(self) -> str:
        return f"{MODEL}@{self.url}"

    def __enter__(self) -> FakeLLM:
        fake = self

        class Handler(_Handler):
            owner = fake

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- what the handler asks ---

    def begin(self, body: dict[str, Any]) -> tuple[str, str]:
        """The step to play and the prompt, of a request that is in order."""
        prompt = "\n".join(str(one["content"]) for one in body["messages"])
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
            return self._step(number, prompt), prompt

    def end(self) -> None:
        with self._lock:
            self._under_way -= 1

    def charge(self, prompt: str, body: dict[str, Any], text: str, whole: bool) -> dict[str, int]:
        """The usage of an answer, which is charged."""
        tokens_in = len(prompt.encode()) // 4 + 9
        most = body.get("max_tokens", body.get("max_completion_tokens", 16))
        usage = {"prompt_tokens": tokens_in, "completion_tokens": min(most, len(text) // 4 + 1)}
        with self._lock:
            cost = usage["prompt_tokens"] * USD_IN + usage["completion_tokens"] * USD_OUT
            self.charged_nano += round(cost * 1000)
            self.whole[prompt] += whole
        return usage | {"total_tokens": sum(usage.values())}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that is gone


class _Handler(BaseHTTPRequestHandler):
    owner: FakeLLM
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._refused_key():
            return
        if self.path.partition("?")[0] == "/v1/models" and self.owner.models:
            self._json(200, {"object": "list", "data": [{"id": one} for one in self.owner.models]})
        else:
            self._error(404, "no such page", "not_found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused_key():
            return
        if self.path.partition("?")[0] != "/v1/chat/completions":
            return self._error(404, f"Unknown path {self.path}", "not_found")
        if (wrong := self._wrong_in(body)) is not None:
            return self._error(400, wrong, "invalid_request_error")
        if body["model"] != MODEL:
            return self._error(404, f"The model {body['model']!r} does not exist", "model_not_found")
        step, prompt = self.owner.begin(body)
        try:
            time.sleep(self.owner.delay_s())
            self._play(step, prompt, body)
        finally:
            self.owner.end()

    def _refused_key(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {KEY}":
            return False
        said = self.headers.get("Authorization", "")
        self._error(401, f"Incorrect API key provided: {said}", "invalid_api_key")
        return True

    def _wrong_in(self, body: dict[str, Any]) -> str | None:
        for name in body:
            if name not in FIELDS or name in self.owner.lacks:
                return f"Unsupported parameter: '{name}' is not supported with this model."
        messages = body.get("messages")
        if not isinstance(messages, list) or not all({"role", "content"} == one.keys() for one in messages):
            return "messages must be a list of role and content"
        form = body.get("response_format")
        if form is not None and f"response_format.{form['type']}" in self.owner.lacks:
            return f"Invalid parameter: 'response_format' of type '{form['type']}' is not supported."
        if form is not None and form["type"] == "json_schema":
            schema = form["json_schema"]
            if not schema.get("strict") or schema["schema"].get("additionalProperties") is not False:
                return "Invalid schema for response_format: additionalProperties must be false"
        return None

    def _play(self, step: str, prompt: str, body: dict[str, Any]) -> None:
        if step in _ERRORS:
            status, message, code, headers = _ERRORS[step]
            if self.owner.echoes_key:
                message += f" ({self.headers['Authorization']})"
            return self._error(status, message, code, headers() if callable(headers) else headers)
        text = self.owner.says(prompt)
        if step == "cost":
            usage: dict[str, Any] = self.owner.charge(prompt, body, text, True) | {"cost": 0.000123}
        else:
            usage = self.owner.charge(prompt, body, text, step not in ("cut-body", "hang", "trickle", "gone"))
        answer = _answer(text, usage)
        if step == "gone":
            self.close_connection = True
            return None
        if step == "hang":
            time.sleep(3)
            return None
        if step == "html":
            return self._send(200, b"<!doctype html><title>Welcome</title>", "text/html")
        if step == "error-inside":
            answer = {
                "error": {"code": 502, "message": f"provider fell over {self.headers['Authorization']}"}
            }
        elif step == "no-choices":
            answer["choices"] = []
        elif step == "null-choices":
            answer["choices"] = None
        elif step == "no-usage":
            del answer["usage"]
        elif step == "refusal":
            answer["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I cannot."}
        elif step == "filter":
            answer["choices"][0]["message"]["content"] = ""
            answer["choices"][0]["finish_reason"] = "content_filter"
        elif step == "length":
            answer["choices"][0]["message"]["content"] = text[: len(text) // 2]
            answer["choices"][0]["finish_reason"] = "length"
        elif step == "empty":
            answer["choices"][0]["message"]["content"] = None
        elif step == "echo":
            answer["choices"][0]["message"]["content"] = self.headers["Authorization"]
        elif step == "half":
            raw = json.dumps(answer).replace(json.dumps(text), '"\\ud83d {}"')
            return self._send(200, raw.encode())
        raw_bytes = json.dumps(answer).encode()
        if step == "cut-body":
            return self._send(200, raw_bytes, cut=len(raw_bytes) // 2)
        if step == "trickle":
            return self._send(200, raw_bytes, every_s=0.1)
        return self._send(200, raw_bytes)

    def _error(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        kind = "insufficient_quota" if code == "insufficient_quota" else "error"
        self._json(status, {"error": {"message": message, "type": kind, "code": code}}, headers)

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), headers=headers)

    def _send(
        self,
        status: int,
        raw: bytes,
        kind: str = "application/json",
        *,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
        every_s: float = 0.0,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("x-request-id", f"req-{random.randrange(10**9)}")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if every_s:
            for at in range(0, len(raw), 8):
                self.wfile.write(raw[at : at + 8])
                self.wfile.flush()
                time.sleep(every_s)
            return
        self.wfile.write(raw[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _answer(text: str, usage: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": f"{MODEL}-2026-01-01",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }


def _tomorrow() -> dict[str, str]:
    from email.utils import formatdate

    return {"Retry-After": formatdate(time.time() + 1, usegmt=True)}


_ERRORS: dict[str, tuple[int, str, str, Any]] = {
    "429": (429, "Rate limit reached", "rate_limit_exceeded", None),
    "429-after": (429, "Rate limit reached", "rate_limit_exceeded", {"Retry-After": "1"}),
    "429-ms": (429, "Rate limit reached", "rate_limit_exceeded", {"retry-after-ms": "300"}),
    "429-date": (429, "Rate limit reached", "rate_limit_exceeded", _tomorrow),
    "429-long": (429, "Rate limit reached", "rate_limit_exceeded", {"Retry-After": "90"}),
    "quota": (429, "You exceeded your current quota", "insufficient_quota", None),
    "402": (402, "Insufficient credits", "402", None),
    "500": (500, "The server had an error", "server_error", None),
    "503": (503, "Overloaded", "overloaded", {"x-should-retry": "false"}),
    "502": (502, "Bad gateway", "bad_gateway", None),
    "401": (401, "Incorrect API key provided", "invalid_api_key", None),
    "403": (403, "Country not supported", "unsupported_country", None),
    "404": (404, "The model does not exist", "model_not_found", None),
    "400": (400, "This model's maximum context length is 16 tokens", "context_length_exceeded", None),
    "filter-400": (400, "The response was filtered", "content_filter", None),
    "redirect": (307, "moved", "moved", {"Location": "http://127.0.0.1:1/v1?key=1"}),
}
