"""The hosted model to ask, typed as `MODEL@URL`, and its key from the environment.

One object holds the key and never shows it. Every text from an endpoint goes through `Key.hidden`
before it is stored or shown, since some endpoints repeat the key in an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlsplit

from emotion_train.console import shown
from emotion_train.errors import WrongRequest

KEY_VARIABLE = "OPENAI_API_KEY"
_WORD = re.compile(r"(?P<model>.+?)@(?P<url>https?://.*)", re.IGNORECASE)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HIDDEN = "…"
_LONGEST = 300  # characters of an endpoint's message


@dataclass(frozen=True)
class Endpoint:
    """A hosted model. `url` has no user, password or query, and is stored and shown. `query` goes
    only to the endpoint.
    """

    model: str
    url: str
    query: tuple[tuple[str, str], ...] = ()

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is a server on this machine."""
        return urlsplit(self.url).hostname in _LOOPBACK

    @property
    def name(self) -> str:
        """The model and its host, for tables and messages."""
        return f"{self.model}@{self.host}"


def endpoint_of(word: str) -> Endpoint:
    """The model that `--llm` names. Raises `WrongRequest` for anything but MODEL@URL, and for a URL
    with a user or password, which the message does not repeat.
    """
    found = _WORD.fullmatch(word.strip())
    if found is None:
        raise WrongRequest(
            f"--llm is {without_secrets(word)!r}; type MODEL@URL, such as gpt-4o-mini@https://api.openai.com/v1."
        )
    parts = _split(found["url"])
    if (
        parts is None
        or not parts.hostname
        or any(not one.isprintable() or one == " " for one in found["url"])
    ):
        raise WrongRequest(
            f"--llm {shown(found['model'])} names no URL that can be reached; type MODEL@https://host/v1."
        )
    if "@" in parts.netloc:
        raise WrongRequest(
            f"The URL of --llm {shown(found['model'])} holds a user or password; put the key into an"
            f" environment variable instead, {KEY_VARIABLE} or the one that --key-env names."
        )
    url = f"{parts.scheme.lower()}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
    return Endpoint(found["model"], url, tuple(parse_qsl(parts.query, keep_blank_values=True)))


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError:
        return None
    return parts


def without_secrets(word: str) -> str:
    """The word without any user and password before an @ and any query after a ?."""
    return re.sub(r"//[^/@]*@", "//…@", word.partition("?")[0])[:200]


class Key:
    """The key of an endpoint, which no message, log or `repr` shows."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return f"Key({_HIDDEN})"

    def reveal(self) -> str:
        """The key itself, for the client only."""
        return self._value

    def hidden(self, text: str) -> str:
        """The text without the key, or either half of it that has 8 characters or more."""
        if self._value == NO_KEY:
            return text
        for part in (self._value, self._value[: len(self._value) // 2], self._value[len(self._value) // 2 :]):
            if len(part) >= 8:
                text = text.replace(part, _HIDDEN)
        return text

    def message(self, text: str) -> str:
        """An endpoint's text without the key, on one line, cut to a length for a message."""
        line = " ".join(self.hidden(text).split())
        return shown(line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …")


NO_KEY = "none"  # sent to a server on this machine that asks for no key


def key_of(endpoint: Endpoint, variable: str, environment: Mapping[str, str]) -> Key:
    """The key in that variable; a server on this machine needs none. Raises `WrongRequest` when the
    key is missing or cannot be sent.
    """
    value = environment.get(variable, "").strip()
    if not value and endpoint.is_local:
        return Key(NO_KEY)
    if not value:
        raise WrongRequest(
            f"The key of {endpoint.host} is missing: {variable} is not set; type `export {variable}=…`, or"
            " name the variable that holds it with --key-env."
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise WrongRequest(
            f"{variable} holds a space, a line break or a letter that no key has; set it to the key alone."
        )
    return Key(value)
