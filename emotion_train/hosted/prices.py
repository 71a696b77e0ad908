"""The price of a million tokens: as typed, else by the table of genai-prices, else unknown.

The table is part of that package and read offline. An unknown price is None and never 0, since no
cap on dollars can be held without a price.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite

from emotion_train.errors import WrongRequest
from emotion_train.hosted.endpoints import Endpoint

NANO = 10**9  # money is counted in whole billionths of a dollar, so that sums do not depend on their order
_MOST_USD = 1e6


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens in and out; `source` says where the price comes from."""

    usd_in: float
    usd_out: float
    source: str

    @property
    def is_free(self) -> bool:
        return self.usd_in == self.usd_out == 0

    def nano(self, tokens_in: int, tokens_out: int) -> int:
        """Billionths of a dollar for so many tokens, rounded up.

        >>> Price(0.15, 0.60, "typed").nano(200, 10)
        36000
        """
        usd = Fraction(str(self.usd_in)) * tokens_in + Fraction(str(self.usd_out)) * tokens_out
        return ceil(usd * NANO / 10**6)


def nano_of(usd: float) -> int:
    """Billionths of a dollar, rounded down: what a cap allows."""
    return int(Fraction(str(usd)) * NANO)


def usd_of(nano: int) -> float:
    return nano / NANO


def price_of(endpoint: Endpoint, usd_in: float | None, usd_out: float | None) -> Price | None:
    """The price of a model; None where it is unknown. Raises `WrongRequest` for only one of the two
    prices, and for a price out of range.
    """
    if (usd_in is None) != (usd_out is None):
        raise WrongRequest("Give both --price-in and --price-out, dollars of a million tokens, or neither.")
    if usd_in is not None and usd_out is not None:
        if not all(isfinite(usd) and 0 <= usd <= _MOST_USD for usd in (usd_in, usd_out)):
            raise WrongRequest(
                f"--price-in {usd_in:g} and --price-out {usd_out:g} are no dollars of a million tokens;"
                " type for example --price-in 0.15 --price-out 0.60."
            )
        return Price(usd_in, usd_out, "typed")
    return _of_table(endpoint)


def _of_table(endpoint: Endpoint) -> Price | None:
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return None
    try:
        priced = calc_price(
            Usage(input_tokens=1000, output_tokens=1000),
            model_ref=endpoint.model,
            provider_api_url=endpoint.url,
        )
    except LookupError:
        return None
    usd_in, usd_out = (float(1000 * usd) for usd in (priced.input_price, priced.output_price))
    return Price(round(usd_in, 9), round(usd_out, 9), "genai-prices")
