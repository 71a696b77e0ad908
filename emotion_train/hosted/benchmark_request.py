"""The request of `benchmark`: which adapter, which posts, and how hosted models are asked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from emotion_train.hosted.options import HostedOptions


@dataclass(frozen=True)
class BenchmarkRequest:
    """An adapter and hosted models on the posts of one split of the data set at `data`. The adapter
    is that of the published run at `run_url`, or `adapter`, which is scored here.
    """

    run_url: str | None
    adapter: str | None
    data: str
    split: str
    hosted: HostedOptions
    rows: int | None  # None: all posts of the split
    shots: int
    prompt: str | None  # file of a prompt
    max_tokens: int
    usd_per_hour: float | None
    base: str | None
    device: Literal["auto", "cpu"]
    out: str

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> BenchmarkRequest:
        names = [name for name in cls.__dataclass_fields__ if name != "hosted"]
        return cls(hosted=HostedOptions.of(arguments), **{name: getattr(arguments, name) for name in names})
