"""A plan as a table for a person, and as JSON for a program."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from emotion_train.config import Config
from emotion_train.console import counted
from emotion_train.data.lengths import Cut, roughly
from emotion_train.sizing.memory import GIB, MemoryEstimate
from launch.gpus import FIRST_WITH_KERNELS, MIB
from launch.plan.choices import Choice, Plan, TooSmall
from launch.plan.faster import larger_steps_words
from launch.plan.prices import Prices, Quote
from launch.plan.spot import Spot
from launch.results.pages import print_whole
from launch.workload import Work

_ROWS = 10  # of the table, unless all are asked for
_NO_GAIN = 0.7  # of the speed that so many GPUs would have if they shared the work evenly


def print_plan(
    plan: Plan,
    config: Config,
    work: Work,
    prices: Prices,
    spot: Spot,
    console: Console,
    whole: bool = False,
) -> None:
    """Prints the prices' source, the run, the table (its ten best rows, or the `whole` table), the
    best choice with its settings, and the assumptions.
    """
    console.print(f"prices: {prices.source}")
    console.print(_what_is_done(config, work, plan.trains_all))
    print_whole(console, _table(plan, whole))
    if not whole and (left_out := _left_out(plan)) is not None:
        console.print(left_out)
    console.print()
    if plan.choices:
        best = plan.choices[0]
        engine = best.engine if work.labelled_posts is None else _workers(best.count)
        console.print(f"best: {best.name}, {engine}: {plan.reason}")
        console.print(f"      memory of each GPU: {best.memory}")
        if work.labelled_posts is None and (words := best.overrides(config)):
            console.print(f"      type: {' '.join(words)}")
    for remark in (
        enough(plan),
        estimated_lengths(work),
        cut_posts(work),
        other_modules(plan),
        fewer_blocks(plan),
        small_steps(plan, work),
        without_units(plan),
    ):
        if remark is not None:
            console.print(remark)
    console.print(
        f"assumed: {spot.preemptions_per_hour:g} preemptions an hour, {_minutes(spot.startup_minutes)} for"
        f" each start and each recovery, a {'checkpoint' if work.labelled_posts is None else 'part'} every"
        f" {_minutes(spot.checkpoint_minutes)}; GPUs"
        " other than H100 and H200 reach the same fractions of their data sheets"
    )


def _what_is_done(config: Config, work: Work, trains_all: bool) -> str:
    if work.labelled_posts is not None:
        return f"{config.model.base}, to label {work.labelled_posts:,} posts of {_lengths(work)}"
    what = "every weight trained" if trains_all else f"LoRA r={config.lora.r}"
    return (
        f"{config.model.base}, {what}, {work.train_posts:,} posts of {_lengths(work)},"
        f" {counted(work.epochs, 'epoch')} in steps of {counted(work.global_batch_size, 'post')}"
    )


def _minutes(count: float) -> str:
    return f"{count:g} minute{'' if count == 1 else 's'}"


def _workers(count: int) -> str:
    return "one worker" if count == 1 else f"{count} workers"


def _lengths(work: Work) -> str:
    """The mean tokens of a post as it is trained, and of the whole post where some are cut."""
    words = f"{work.mean_length:.1f} tokens"
    if work.cut is None or not work.cut.cut_posts:
        return words
    uncut, share = f"{work.cut.mean_tokens:.1f}", work.cut.share_words
    if work.cut_is_estimated:
        uncut, share = roughly(uncut), roughly(share)
    return f"{words} ({uncut} uncut; data.max_length={work.max_length} cuts {share} of the posts)"


def estimated_lengths(work: Work) -> str | None:
    """A remark where the base's tokenizer could not be read."""
    if work.estimate is None:
        return None
    return (
        f"note: the mean of {work.mean_length:.1f} tokens is estimated from the posts' characters, 4 bytes a"
        f" token, without the base's tokenizer: {work.estimate}"
    )


def cut_posts(work: Work) -> str | None:
    """A warning where so many posts are cut that the plan may count less work than was meant."""
    if work.cut is None or not work.cut.is_much:
        return None
    return f"warning: {work.cut.words('training posts', estimated=work.cut_is_estimated)}"


def enough(plan: Plan) -> str | None:
    """A remark on the smallest card that is enough for the run."""
    if not (smallest := plan.smallest):
        return None
    names = ", ".join(choice.name for choice in smallest)
    return f"enough: a {smallest[0].kind.gb} GB card ({names}) trains this, in {smallest[0].precision}"


def other_modules(plan: Plan) -> str | None:
    """A remark where transformers' modules compute the decoder, since the fused one cannot."""
    if not plan.is_stock:
        return None
    return (
        "note: transformers' modules compute this base, and memory and hours here count that; the fused"
        " decoder and fp8 are for Llama, Mistral and Ministral 3"
    )


def fewer_blocks(plan: Plan) -> str | None:
    """A remark on the measured cost of less depth, where the table has rows of it."""
    words = [faster.word for faster in plan.faster if faster.word.startswith("model.layers=")]
    if not words:
        return None
    return (
        f"note: {' and '.join(words)} read only the first blocks of the base; on a 135M base and 15 labels"
        " macro-F1 with 77 or 50 % of the blocks was 0.01 lower, mostly within chance, with several of 28"
        " labels a post it lost 0.02 and 0.04; no other base is measured"
    )


def small_steps(plan: Plan, work: Work) -> str | None:
    """A remark where the steps are too small to fill the GPUs: why more GPUs gain little, and what
    larger steps would gain.
    """
    if not plan.choices or work.labelled_posts is not None:
        return None
    best = plan.choices[0]
    step = min(work.global_batch_size, work.train_posts) * work.mean_length
    remarks = []
    if (more := _more_that_gain_little(plan, best)) is not None:
        times = more.posts_per_second / best.posts_per_second
        gains = f"only {times:.1f} times as fast as" if times >= 1.05 else "no faster than"
        remarks.append(
            f"{more.name} is {gains} {best.name}: a step has {step:,.0f} tokens, {step / more.count:,.0f} for"
            f" each of {more.count} GPUs, and every GPU reads all weights for them, however few they are"
        )
    if step / best.count < 1024:
        remarks.append(
            f"a step has {step / best.count:,.0f} tokens for each GPU, which mostly waits for its weights"
        )
    larger = [faster for faster in plan.faster if faster.word.startswith("train.global_batch_size=")]
    remarks += [larger_steps_words(work, best, faster) for faster in larger]
    if not remarks:
        return None
    return f"note: {'; '.join(remarks)}"


def _more_that_gain_little(plan: Plan, best: Choice) -> Choice | None:
    """The smallest larger number of the best's GPUs, in its precision, that is far slower than its
    number promises; None where there is none.
    """
    more = [
        choice
        for choice in plan.choices
        if choice.kind == best.kind and choice.count > best.count and choice.precision == best.precision
    ]
    little = [
        choice
        for choice in more
        if choice.posts_per_second * best.count < _NO_GAIN * best.posts_per_second * choice.count
    ]
    return min(little, key=lambda choice: choice.count, default=None)


def without_units(plan: Plan) -> str | None:
    """A remark on the kinds without bfloat16 units, and on those that are not planned."""
    emulated = sorted({choice.kind.name for choice in plan.choices if not choice.kind.bf16})
    remarks = [
        f"{name} has no bfloat16 units: PyTorch computes it there in float32, which the hours count"
        for name in emulated
    ]
    if plan.no_kernels:
        names = ", ".join(kind.name for kind in plan.no_kernels)
        first = ".".join(map(str, FIRST_WITH_KERNELS))
        remarks.append(
            f"not planned: {names}, for which PyTorch's default builds have no kernels (they begin at compute"
            f" capability {first})"
        )
    return "\n".join(remarks) or None


def _left_out(plan: Plan) -> str | None:
    more = [f"{len(plan.choices) - _ROWS} more that fit"] if len(plan.choices) > _ROWS else []
    more += [f"{len(plan.too_small)} that are too small"] if plan.too_small else []
    return f"and {' and '.join(more)}: --all shows them" if more else None


def _table(plan: Plan, whole: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("GPUs")
    for name in ("GiB", "of"):
        table.add_column(name, justify="right")
    table.add_column("base in")
    for name in ("tokens", "posts/s", "hours", "$/h spot", "$ spot", "$/h on demand", "$ on demand"):
        table.add_column(name, justify="right")
    table.add_column("")
    for place, choice in enumerate(plan.choices if whole else plan.choices[:_ROWS]):
        words = "; ".join(_words(choice, best=place == 0))
        table.add_row(*_cells(choice), words, style="green" if place == 0 else None)
    for word, choice in plan.faster:
        if word.startswith("model.layers="):
            table.add_row(*_cells(choice), "; ".join([word, *_words(choice, best=False)]), style="dim")
    for small in plan.too_small if whole else ():
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


def _cells(choice: Choice) -> tuple[str, ...]:
    return (
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
    )


def _words(choice: Choice, best: bool) -> list[str]:
    words = ["best"] if best else []
    words += ["recomputes"] if choice.gradient_checkpointing else []
    return words + (["FSDP2"] if choice.shards > 1 else [])


def _dollars(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:.2f}"


def _hourly(quote: Quote | None) -> str:
    return "-" if quote is None else f"{quote.usd_per_hour:.2f}"


def plan_json(plan: Plan, config: Config, work: Work, prices: Prices, spot: Spot) -> str:
    """All facts of the plan as JSON; the first of `choices` is the best."""
    document = {
        "base": config.model.base,
        "train_posts": work.train_posts,
        "mean_tokens": work.mean_length,
        "mean_tokens_estimated": work.estimate,
        "cut": None if work.cut is None else _cut(work.cut, work.cut_is_estimated),
        "labelled_posts": work.labelled_posts,
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
        "faster": [{"type": word, **_choice(choice, config)} for word, choice in plan.faster],
        "too_small": [_too_small(small) for small in plan.too_small],
        "enough": [choice.name for choice in plan.smallest],
        "no_kernels": [kind.name for kind in plan.no_kernels],
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
