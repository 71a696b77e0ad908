"""The options of both verbs that ask hosted models: which models, with which keys, for how many
dollars, and whether posts may be sent.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emotion_train.console import require_agreement
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import positive
from emotion_train.hosted.client import Prompt, Rules
from emotion_train.hosted.endpoints import KEY_VARIABLE, Endpoint, Key, endpoint_of, key_of
from emotion_train.hosted.prices import Price, nano_of, price_of, usd_of
from emotion_train.report.units import dollars

_MOST_CONCURRENCY = 256
_BYTES_A_TOKEN = 4.0  # of English, for an estimate


def add_hosted_arguments(parser: argparse.ArgumentParser, *, models: str) -> None:
    add = parser.add_argument
    add("--llm", action="append", required=True, metavar="MODEL@URL", help=models)
    add(
        "--key-env",
        action="append",
        default=[],
        metavar="NAME",
        help=(
            f"environment variable that holds the endpoint's key (default: {KEY_VARIABLE}); once for all,"
            " or once for each --llm in their order"
        ),
    )
    for name, what in (("in", "go in"), ("out", "come out")):
        add(
            f"--price-{name}",
            action="append",
            type=float,
            default=[],
            metavar="USD",
            help=f"dollars of a million tokens that {what} (default: by genai-prices); as --key-env",
        )
    add(
        "--max-usd",
        type=float,
        metavar="USD",
        help="most dollars for all requests, earlier ones included; needed unless the price is 0",
    )
    add("--concurrency", type=positive, default=8, metavar="N", help="most requests at once (default: 8)")
    add(
        "--deadline",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="longest time for one whole answer (default: 120)",
    )
    add(
        "--max-wait",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="longest pause that an endpoint may ask for; a longer pause ends the work (default: 60)",
    )
    add(
        "--extra-body",
        metavar="JSON",
        help='fields for each request, such as \'{"reasoning_effort": "minimal"}\'',
    )
    add("--definitions", metavar="FILE", help="JSON file {label: definition} that explains labels")
    add("--seed", type=int, default=42, metavar="N", help="seed of everything that is drawn (default: 42)")
    add(
        "--ask-again",
        action="store_true",
        help="ask again requests that failed or were under way when a process was killed; may pay twice",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print three prompts and the number of requests, tokens and dollars; nothing is sent",
    )
    add(
        "--yes",
        action="store_true",
        help="agree without being asked that posts are sent to these hosts",
    )


def _seconds(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{word[:40]!r} is no number of seconds from 0 to 86400")
    return value


@dataclass(frozen=True)
class HostedOptions:
    """The options above as they were typed."""

    llm: Sequence[str] | None
    key_env: Sequence[str]
    price_in: Sequence[float]
    price_out: Sequence[float]
    max_usd: float | None
    concurrency: int
    deadline: float
    max_wait: float
    extra_body: str | None
    definitions: str | None
    seed: int
    ask_again: bool
    dry_run: bool
    yes: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> HostedOptions:
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Chosen:
    """The models to ask, with their prices (None: unknown) and the variables of their keys."""

    endpoints: tuple[Endpoint, ...]
    prices: tuple[Price | None, ...]
    variables: tuple[str, ...]
    rules: Rules
    concurrency: int
    max_usd: float | None

    @classmethod
    def of(cls, options: HostedOptions, temperature: float) -> Chosen:
        """The models that the options name. Raises `WrongRequest` for options that do not fit; keys
        are not read yet.
        """
        endpoints = tuple(endpoint_of(word) for word in options.llm or ())
        doubled = next((endpoint for endpoint in endpoints if endpoints.count(endpoint) > 1), None)
        if doubled is not None:
            raise WrongRequest(f"--llm {doubled.name} is given twice; leave one out.")
        variables = _for_each("--key-env", options.key_env or [KEY_VARIABLE], len(endpoints))
        usd_in, usd_out = (
            _for_each(f"--price-{name}", getattr(options, f"price_{name}") or [None], len(endpoints))
            for name in ("in", "out")
        )
        if options.max_usd is not None and not 0 <= options.max_usd <= 1e9:
            raise WrongRequest(f"--max-usd is {options.max_usd:g}; give dollars, such as 5.")
        if options.concurrency > _MOST_CONCURRENCY:
            raise WrongRequest(f"--concurrency is {options.concurrency}; the most is {_MOST_CONCURRENCY}.")
        return cls(
            endpoints,
            tuple(
                price_of(endpoint, *usd) for endpoint, *usd in zip(endpoints, usd_in, usd_out, strict=True)
            ),
            tuple(variables),
            Rules(
                options.deadline,
                options.max_wait,
                temperature,
                options.seed,
                _extra_body(options.extra_body),
            ),
            options.concurrency,
            options.max_usd,
        )

    @property
    def cap(self) -> int | None:
        """The most billionths of a dollar; None where no cap is given."""
        return None if self.max_usd is None else nano_of(self.max_usd)

    def require_payable(self) -> list[Price]:
        """The prices. Raises `WrongRequest` where one is unknown, or above 0 without a cap."""
        for endpoint, price in zip(self.endpoints, self.prices, strict=True):
            if price is None:
                raise WrongRequest(
                    f"The price of {endpoint.name} is unknown, so no cap on dollars can be held; give"
                    " --price-in and --price-out, dollars of a million tokens (0 for your own server)."
                )
            if self.max_usd is None and not price.is_free:
                raise WrongRequest(
                    f"{endpoint.name} costs {price.usd_in:g} and {price.usd_out:g} dollars a million tokens"
                    f" ({price.source}); give --max-usd, the most that may be spent."
                )
        return [price for price in self.prices if price is not None]

    def keys(self, environment: Mapping[str, str] = os.environ) -> list[Key]:
        """The models' keys. Raises as `key_of`."""
        return [
            key_of(endpoint, variable, environment)
            for endpoint, variable in zip(self.endpoints, self.variables, strict=True)
        ]


def _for_each(option: str, given: Sequence[Any], models: int) -> list[Any]:
    """One value per model; a single given value is for all. Raises `WrongRequest` for any other
    number of values.
    """
    if len(given) not in (1, models):
        raise WrongRequest(
            f"{option} is given {len(given)} times for {models} --llm; give it once, or once for each."
        )
    return list(given) * (models if len(given) == 1 else 1)


def _extra_body(word: str | None) -> dict[str, Any]:
    if word is None:
        return {}
    try:
        return object_in(word, 1 << 16)
    except Unreadable as error:
        raise WrongRequest(f"--extra-body is no JSON object ({error}); type '{{\"name\": value}}'.") from None


def agree(endpoints: Sequence[Endpoint], what: str, yes: bool) -> None:
    """Ask for agreement that `what` is sent to these hosts. Raises `WrongRequest` without it."""
    hosts = " and ".join(dict.fromkeys(endpoint.host for endpoint in endpoints))
    models = ", ".join(endpoint.model for endpoint in endpoints)
    require_agreement(f"send {what} to {hosts} ({models})", yes, otherwise="Nothing was sent.")


def dry_run_words(
    endpoints: Sequence[Endpoint], prices: Sequence[Price | None], prompts: Sequence[Prompt], unit: str
) -> str:
    """The first three prompts, and the estimated and the highest cost of all prompts."""
    lines = []
    for number, prompt in enumerate(prompts[:3], start=1):
        text = "\n".join(f"[{message.role}] {message.content}" for message in prompt.messages)
        lines += [f"--- prompt {number} of {len(prompts):,}", text, ""]
    if prompts:
        lines += ["schema of an answer", json.dumps(prompts[0].schema, ensure_ascii=False), ""]
    tokens_in = sum(
        sum(len(message.content.encode()) for message in prompt.messages) / _BYTES_A_TOKEN
        for prompt in prompts
    )
    tokens_out = sum(prompt.max_tokens for prompt in prompts)
    lines.append(
        f"{len(prompts):,} {unit} a model, some {round(tokens_in):,} tokens in, and {tokens_out:,} out at"
        " most"
    )
    for endpoint, price in zip(endpoints, prices, strict=True):
        if price is None:
            lines.append(f"{endpoint.name}: price unknown; give --price-in and --price-out")
            continue
        most = sum(prompt.most_nano(price) for prompt in prompts)
        about = price.nano(round(tokens_in), tokens_out // 4)
        lines.append(
            f"{endpoint.name}: some {dollars(usd_of(about))}, and {dollars(usd_of(most))} at the very most,"
            f" at {price.usd_in:g} and {price.usd_out:g} dollars a million tokens ({price.source})"
        )
    return "\n".join(lines)
