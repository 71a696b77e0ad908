"""A plan as a table for a person, and as JSON for a program."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from emotion_train.config import Config
from emotion_train.data.lengths import Cut, roughly
from emotion_train.sizing.memory import GIB, MemoryEstimate
from launch.gpus import MIB
from launch.plan.choices import Choice, Plan, TooSmall
from launch.plan.prices import Prices, Quote
from launch.plan.spot import Spot
from launch.results.pages import print_whole
from launch.workload import Work


def print_plan(plan: Plan, config: Config, work: Work, prices: Prices, spot: Spot, console: Console) -> None:
    """What would be run, the table, the best and its settings, and what was assumed."""
    console.print(
        f"{config.model.base}, LoRA r={config.lora.r}, {work.train_posts:,} posts of {_lengths(work)},"
        f" {work.epochs} epochs in steps of {work.global_batch_size} posts",
        markup=False,
    )
    print_whole(console, _table(plan))
    console.print()
    if plan.choices:
        best = plan.choices[0]
        console.print(f"best: {best.name}, {best.engine}: {plan.reason}", markup=False)
        console.print(f"      memory of each GPU: {best.memory}", markup=False)
        if words := best.overrides(config):
            console.print(f"      type: {' '.join(words)}", markup=False)
    for remark in (estimated_lengths(work), cut_posts(work), small_steps(plan, work)):
        if remark is not None:
            console.print(remark, markup=False)
    console.print(f"prices: {prices.source}", markup=False)
    console.print(
        f"assumed: {spot.preemptions_per_hour:g} preemptions an hour, {spot.startup_minutes:g} minutes for"
        f" each start and each recovery, a checkpoint every {spot.checkpoint_minutes:g} minutes; of GPUs"
        " other than H100 and H200 the same fractions of their data sheets",
        markup=False,
    )


def _lengths(work: Work) -> str:
    """The mean tokens of a post as it is trained, and what they were of whole posts."""
    words = f"{work.mean_length:.1f} tokens"
    if work.cut is None:
        return words
    uncut, share = f"{work.cut.mean_tokens:.1f}", work.cut.share_words
    if work.cut_is_estimated:
        uncut, share = roughly(uncut), roughly(share)
    return f"{words} ({uncut} uncut; data.max_length={work.max_length} cuts {share} of the posts)"


def estimated_lengths(work: Work) -> str | None:
    """A remark where the base's tokenizer could not be asked."""
    if work.estimate is None:
        return None
    return (
        f"note: the mean of {work.mean_length:.1f} tokens is estimated from the posts' characters, 4 bytes a"
        f" token, without the base's tokenizer: {work.estimate}"
    )


def cut_posts(work: Work) -> str | None:
    """A remark where so many posts are cut that the plan may be for less than was meant."""
    if work.cut is None or not work.cut.is_much:
        return None
    return f"warning: {work.cut.words('training posts', estimated=work.cut_is_estimated)}"


def small_steps(plan: Plan, work: Work) -> str | None:
    """A remark when the steps are too small to fill the best GPU."""
    if not plan.choices:
        return None
    best = plan.choices[0]
    tokens = work.global_batch_size * work.mean_length / best.count
    if tokens >= 1024 or work.global_batch_size >= work.train_posts:
        return None
    return (
        f"note: a step has {tokens:,.0f} tokens for each GPU, which mostly waits for its weights; a larger"
        " train.global_batch_size (it changes the training) is faster"
    )


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("GPUs")
    for name in ("GiB", "of"):
        table.add_column(name, justify="right")
    table.add_column("base in")
    for name in ("tokens", "posts/s", "hours", "$/h spot", "$ spot", "$/h on demand", "$ on demand"):
        table.add_column(name, justify="right")
    table.add_column("")
    for place, choice in enumerate(plan.choices):
        table.add_row(
            choice.name,
            f"{choice.memory.total / GIB:.1f}",
            f"{choice.kind.memory_bytes / GIB:.1f}",
            choice.precision,
            f"{choice.tokens_per_microbatch:,}",
            f"{choice.posts_per_second:,.0f}",
            f"{choice.hours:.2f}",
            _hourly(choice.offer.spot),
            _dollars(choice.usd_spot),
            _hourly(choice.offer.on_demand),
            _dollars(choice.usd_on_demand),
            "; ".join(_words(choice, best=place == 0)),
            style="green" if place == 0 else None,
        )
    for small in plan.too_small:
        table.add_row(
            small.name,
            f"{small.memory.total / GIB:.1f}",
            f"{small.kind.memory_bytes / GIB:.1f}",
            small.precision,
            *("-",) * 7,
            "too small",
            style="dim",
        )
    return table


def _words(choice: Choice, best: bool) -> list[str]:
    words = ["best"] if best else []
    words += ["recomputes"] if choice.gradient_checkpointing else []
    return words + (["FSDP2"] if choice.shards > 1 else [])


def _dollars(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:.2f}"


def _hourly(quote: Quote | None) -> str:
    return "-" if quote is None else f"{quote.usd_per_hour:.2f}"


def plan_json(plan: Plan, config: Config, work: Work, prices: Prices, spot: Spot) -> str:
    """The same facts, all of them, with `best` first in `choices`."""
    document = {
        "base": config.model.base,
        "train_posts": work.train_posts,
        "mean_tokens": work.mean_length,
        "mean_tokens_estimated": work.estimate,
        "cut": None if work.cut is None else _cut(work.cut, work.cut_is_estimated),
        "epochs": work.epochs,
        "global_batch_size": work.global_batch_size,
        "prices": prices.source if prices.offers else None,
        "assumed": {
            "preemptions_per_hour": spot.preemptions_per_hour,
            "startup_minutes": spot.startup_minutes,
            "checkpoint_minutes": spot.checkpoint_minutes,
        },
        "reason": plan.reason,
        "choices": [_choice(choice, config) for choice in plan.choices],
        "too_small": [_too_small(small) for small in plan.too_small],
    }
    return json.dumps(document, indent=2)


def _cut(cut: Cut, is_estimated: bool) -> dict[str, Any]:
    return {
        "estimated": is_estimated,
        "share_of_posts": cut.share,
        "share_of_tokens": cut.lost_share,
        "mean_tokens_uncut": cut.mean_tokens,
        **cut.model_dump(exclude={"posts", "cut_posts", "tokens", "lost_tokens"}),
    }


def _choice(choice: Choice, config: Config) -> dict[str, Any]:
    return {
        "gpus": choice.name,
        "engine": choice.engine,
        "precision": choice.precision,
        "tokens_per_microbatch": choice.tokens_per_microbatch,
        "gradient_checkpointing": choice.gradient_checkpointing,
        "overrides": choice.overrides(config),
        "memory_bytes": _memory(choice.memory),
        "gpu_memory_bytes": choice.kind.memory_mib * MIB,
        "posts_per_second": choice.posts_per_second,
        "hours": choice.hours,
        "hours_on_spot": choice.spot_hours,
        "spot": _quote(choice.offer.spot),
        "on_demand": _quote(choice.offer.on_demand),
        "usd_spot": choice.usd_spot,
        "usd_on_demand": choice.usd_on_demand,
    }


def _too_small(small: TooSmall) -> dict[str, Any]:
    return {
        "gpus": small.name,
        "precision": small.precision,
        "memory_bytes": _memory(small.memory),
        "gpu_memory_bytes": small.kind.memory_mib * MIB,
    }


def _memory(memory: MemoryEstimate) -> dict[str, int]:
    parts = {name: getattr(memory, name) for name in ("weights", "optimizer", "activations", "overhead")}
    return {**parts, "total": memory.total}


def _quote(quote: Quote | None) -> dict[str, Any] | None:
    return None if quote is None else vars(quote)
