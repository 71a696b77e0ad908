"""The price of a training by the plan, and a person's agreement, before a machine is asked for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from emotion_train.console import require_agreement
from emotion_train.errors import WrongRequest

OPTIONS = ("gpus", "sky", "max_usd", "yes")  # of machines that SkyPilot finds


@dataclass(frozen=True)
class Price:
    """A plan's estimate for the machine that will be asked for; None where the plan does not
    know.
    """

    gpus: str
    hours: float | None
    usd: float | None

    def __str__(self) -> str:
        hours = "a time that is not known" if self.hours is None else f"about {self.hours:.1f} hours"
        usd = "a price that is not known" if self.usd is None else f"about ${self.usd:,.2f}"
        return f"{self.gpus}, {hours}, {usd}"


def price_of(plan: dict[str, Any], gpus: str | None) -> Price:
    """The price in the best row of `plan --json`, or in the row of the given GPUs: the cheaper of
    spot and on demand.
    """
    rows = [row for row in plan["choices"] if gpus is None or row["gpus"].lower() == gpus.lower()]
    if not rows:
        return Price(str(gpus), None, None)
    row = rows[0]
    known = [
        (usd, hours)
        for usd, hours in ((row["usd_spot"], row["hours_on_spot"]), (row["usd_on_demand"], row["hours"]))
        if usd is not None
    ]
    usd, hours = min(known, default=(None, row["hours"]))
    return Price(row["gpus"], hours, usd)


def refuse_wrong_options(arguments: argparse.Namespace, by_jobs: bool, instead: str) -> None:
    """Raises `WrongRequest` for a --max-usd that is no price and, unless the training is `by_jobs`,
    for options of machines that SkyPilot finds; `instead` is the remedy in the message.
    """
    if arguments.max_usd is not None and not 0 < arguments.max_usd < float("inf"):
        raise WrongRequest(f"--max-usd is {arguments.max_usd:g}; give a number of dollars above 0.")
    for option in OPTIONS:
        if not by_jobs and getattr(arguments, option):
            raise WrongRequest(
                f"--{option.replace('_', '-')} is for machines that SkyPilot finds; leave it out, or"
                f" {instead}."
            )


def agree(arguments: argparse.Namespace, price: Price, runs: int = 1) -> None:
    """Raises `WrongRequest` unless the price of so many runs is within `--max-usd` and a person
    agrees to it.
    """
    usd = None if price.usd is None else price.usd * runs
    each = str(price) if runs == 1 else f"{price} each"
    if arguments.max_usd is not None:
        if usd is None:
            raise WrongRequest(
                f"The price of {price.gpus} is not known, so --max-usd {arguments.max_usd:g} cannot be"
                " guaranteed; name other --gpus, or leave --max-usd out."
            )
        if usd > arguments.max_usd:
            all_of_them = "" if runs == 1 else f" for each of {runs} runs, ${usd:,.2f} in all"
            raise WrongRequest(
                f"{price}{all_of_them}: more than --max-usd {arguments.max_usd:g}. `emotion-launch plan"
                " --all` shows what is cheaper; nothing was started."
            )
    question = f"train on {each}" if runs == 1 else f"train {runs} runs on {each}"
    if runs > 1 and usd is not None:
        question += f", at most ${usd:,.2f} in all"
    require_agreement(question, arguments.yes, otherwise="Nothing was started.")
