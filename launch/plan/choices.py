"""Which GPUs would train this run, how long and for how many dollars: memory, then speed, then
price, for each kind and number of GPUs.

Pure arithmetic over a small table (`gpus.py`), the memory page, the speed lines and the catalog's
prices; nothing is started. The price on spot counts preemptions, `preemptions_per_hour` of them.
Each one costs `startup_minutes` for a new machine, which may be preempted too, and repeats the work
since the last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from emotion_train.config import POSTS_PER_SCORING_STEP, Config
from emotion_train.sizing.fit import (
    Layout,
    MicroBatch,
    Request,
    largest_microbatch,
    least_of,
    tokens_to_fill,
    unpacked_blocks,
)
from emotion_train.sizing.memory import MemoryEstimate, uses_fused
from emotion_train.sizing.recipe import Recipe, adapter_of
from emotion_train.sizing.shape import Precision, Shape
from launch.gpus import COUNTS, GPU_KINDS, PLANNED, GpuKind
from launch.plan.prices import Offer, Prices
from launch.plan.speed import Speed, gathers_quickly
from launch.plan.spot import Spot
from launch.workload import Work, config_on, filled

_NEVER_H = 365 * 24  # a year
# by one process with its tokenizer: 26,927 beside MiniLM on an H200 (benchmarks/encoders.py), 28 to
# 31 thousand on two vCPUs (benchmarks/data.md)
_READ_POSTS_PER_S = 28_000
_MOST_EXPONENT = 100.0  # e to this is beyond any run


@dataclass(frozen=True)
class Choice:
    """How one kind and number of GPUs would run it."""

    kind: GpuKind
    count: int
    precision: Precision
    tokens_per_microbatch: int
    gradient_checkpointing: bool
    shards: int
    memory: MemoryEstimate  # of one GPU
    posts_per_second: float
    hours: float  # of work and start-up, without a preemption
    spot_hours: float | None  # with the expected preemptions; None when it would never end
    offer: Offer

    @property
    def name(self) -> str:
        return f"{self.kind.name}:{self.count}"

    def accelerators(self, use_spot: bool) -> str:
        """`NAME:COUNT` as the catalog of the cheapest offer spells it."""
        quote = self.offer.spot if use_spot else self.offer.on_demand
        return f"{(quote and quote.accelerator) or self.kind.name}:{self.count}"

    @property
    def engine(self) -> str:
        if self.shards > 1:
            return "FSDP2"
        return "one GPU" if self.count == 1 else "DDP"

    @property
    def usd_on_demand(self) -> float | None:
        return None if self.offer.on_demand is None else self.offer.on_demand.usd_per_hour * self.hours

    @property
    def usd_spot(self) -> float | None:
        return (
            None
            if self.offer.spot is None or self.spot_hours is None
            else self.offer.spot.usd_per_hour * self.spot_hours
        )

    @property
    def usd(self) -> float | None:
        """The cheaper of the two."""
        known = [usd for usd in (self.usd_spot, self.usd_on_demand) if usd is not None]
        return min(known, default=None)

    def settings(self) -> list[str]:
        """The `section.field=value` words for a task of several kinds of GPU: each takes the
        micro-batch that fits it.
        """
        return [f"model.precision={self.precision}", "train.tokens_per_microbatch=auto"]

    def overrides(self, config: Config) -> list[str]:
        """The overrides that turn this config into this choice."""
        words = [f"model.precision={self.precision}"] if config.model.precision != self.precision else []
        return (
            words
            if config.train.tokens_per_microbatch == "auto"
            else [*words, "train.tokens_per_microbatch=auto"]
        )


@dataclass(frozen=True)
class TooSmall:
    """A kind and number of GPUs on which the base does not fit; `memory` is the least that it needs
    on each.
    """

    kind: GpuKind
    count: int
    precision: Precision
    memory: MemoryEstimate

    @property
    def name(self) -> str:
        return f"{self.kind.name}:{self.count}"


class Faster(NamedTuple):
    """A setting that changes what is learned, as a person would type it, and the choice with it."""

    word: str
    choice: Choice


@dataclass(frozen=True)
class Plan:
    """`choices` from the best to the worst; `reason` is why the first is the best. `no_kernels`:
    kinds for which PyTorch's default builds have no kernels. `faster`: settings shown beside the
    choices. `trains_all`: every weight is trained, without an adapter. `is_stock`: transformers'
    modules compute the decoder, since the fused one does not know its blocks.
    """

    choices: tuple[Choice, ...]
    too_small: tuple[TooSmall, ...]
    reason: str
    no_kernels: tuple[GpuKind, ...] = tuple(kind for kind in GPU_KINDS if not kind.runs)
    faster: tuple[Faster, ...] = ()
    trains_all: bool = False
    is_stock: bool = False

    @property
    def smallest(self) -> tuple[Choice, ...]:
        """The smallest cards that are enough: single GPUs with bfloat16 units and the least
        memory.
        """
        alone = [choice for choice in self.choices if choice.count == 1 and choice.kind.bf16]
        least = min((choice.kind.gb for choice in alone), default=0)
        return tuple(choice for choice in alone if choice.kind.gb == least)


def make_plan(
    config: Config,
    shape: Shape,
    work: Work,
    prices: Prices,
    spot: Spot,
    *,
    precision: Precision | None = None,
    within_hours: float | None = None,
) -> Plan:
    """The plan over every kind and number of GPUs. `precision` None takes the fastest that fits;
    `within_hours` leaves out choices that take longer.
    """
    choices: list[Choice] = []
    too_small: list[TooSmall] = []
    for kind in PLANNED:
        if precision == "fp8" and not kind.fp8:
            continue
        for count in (count for count in COUNTS if count <= kind.most):
            found = best_settings(
                config,
                shape,
                work,
                kind,
                count,
                prices.offers.get((kind.name, count), Offer()),
                spot,
                precision,
            )
            if isinstance(found, TooSmall):
                too_small.append(found)
            elif (in_time := within(found, within_hours)) is not None:
                choices.append(in_time)
    choices.sort(key=_order)
    trains_all = adapter_of(config, shape.is_encoder) is None
    is_stock = not shape.fusable and not shape.is_encoder
    reason = _reason(choices)
    return Plan(tuple(choices), tuple(too_small), reason, trains_all=trains_all, is_stock=is_stock)


def within(choice: Choice, hours: float | None) -> Choice | None:
    """The choice, without its spot offer where only spot would take longer than `hours`; None where
    on demand would take longer too.
    """
    if hours is None or (choice.spot_hours is not None and choice.spot_hours <= hours):
        return choice
    return replace(choice, offer=replace(choice.offer, spot=None)) if choice.hours <= hours else None


def _order(choice: Choice) -> tuple[bool, float, float]:
    """Cheapest first; then choices without a price, the least memory of all GPUs together first,
    since the largest GPUs are the dearest.
    """
    return (
        choice.usd is None,
        choice.usd if choice.usd is not None else choice.count * choice.kind.gb,
        choice.hours,
    )


def _reason(choices: Sequence[Choice]) -> str:
    if not choices:
        return ""
    best, rest = choices[0], choices[1:]
    if best.usd is None:
        return (
            "the smallest that is enough, and the fastest of that size; without prices nothing is known about"
            " dollars"
        )
    how = "on spot, preemptions included" if best.usd == best.usd_spot else "on demand"
    if not rest or rest[0].usd is None:
        return f"the only one with a price, {how}"
    dearer = f"{rest[0].usd / best.usd - 1:.0%} dearer" if rest[0].usd / best.usd >= 1.005 else "as dear"
    times = best.hours / rest[0].hours
    faster = f" and {times:.1f} times as fast" if times >= 1.05 else ""
    return f"the fewest dollars a job {how}; next is {rest[0].name}, {dearer}{faster}"


def best_settings(
    config: Config,
    shape: Shape,
    work: Work,
    kind: GpuKind,
    count: int,
    offer: Offer,
    spot: Spot,
    precision: Precision | None,
) -> Choice | TooSmall:
    """The choice with the fastest precision and micro-batch that fit, with the whole base on each
    GPU where it fits; sharded over them where it does not, or where it leaves so little room that
    recomputing would cost more (`choice.by_memory` decides alike).
    """
    config = config_on(config, kind)
    recipe = Recipe.of(config, shape, work.labels)
    # each GPU takes the micro-batch that fits it, whatever the config says of this machine's
    request = replace(Request.of(config, recipe), tokens=None)
    requests = [
        replace(request, recipe=replace(recipe, precision=one))
        for one in ([precision] if precision is not None else precisions(recipe, kind))
    ]
    shards = count > 1 and work.labelled_posts is None  # workers that label share nothing
    shards = shards and not shape.is_encoder
    fitting: list[Choice] = []
    for layout in (Layout(count), Layout(count, "base")) if shards else (Layout(count),):
        fitting += [
            with_settings(one.recipe, work, kind, layout, offer, spot, found)
            for one in requests
            for found in _microbatches(one, work, kind, layout)
        ]
        best = min(fitting, key=lambda choice: choice.hours, default=None)
        if best is not None and not (best.gradient_checkpointing and gathers_quickly(kind, recipe)):
            return best
    if best is not None:
        return best
    least = [(least_of(one, layout).memory, one.recipe.precision) for one in requests]
    memory, smallest = min(least, key=lambda pair: pair[0].total)
    return TooSmall(kind, count, smallest, memory)


def precisions(recipe: Recipe, kind: GpuKind) -> list[Precision]:
    """The precisions that the trainer offers for this base on this GPU; float32 only where the
    config asks for it, since it is 16 times slower on GPUs with bfloat16 units.
    """
    if recipe.precision == "fp32":
        return ["fp32"]
    if recipe.shape.is_encoder:
        return ["bf16"]
    fp8 = kind.fp8 and uses_fused(replace(recipe, precision="fp8"))
    return [one for one in ("nf4", "bf16", "fp8") if one != "fp8" or fp8]


def _microbatches(request: Request, work: Work, kind: GpuKind, layout: Layout) -> Iterator[MicroBatch]:
    """The largest micro-batch that fits, and no larger than a GPU's share of a step. Where memory
    limits it, also the one with recomputation, unless the config decides that.
    """
    # a worker that labels shares no step with the others
    among = layout.gpus if work.labelled_posts is None else 1
    share = max(sum(posts) for step in work.shares(among) for posts in step)
    most, asked = tokens_to_fill(share, request.max_length), request.gradient_checkpointing
    for recompute in (False, True) if asked is None else (asked,):
        found = largest_microbatch(
            request.recipe,
            kind.memory_bytes,
            layout=layout,
            longest_post=request.max_length,
            most_tokens=most,
            gradient_checkpointing=recompute,
        )
        if found is not None:
            yield found
            if found.tokens >= most:
                return


def with_settings(
    recipe: Recipe, work: Work, kind: GpuKind, layout: Layout, offer: Offer, spot: Spot, found: MicroBatch
) -> Choice:
    """Time and dollars of these settings on these GPUs."""
    # labelling keeps no block unpacked
    kept = unpacked_blocks(recipe, found, layout, kind.memory_bytes) if work.labelled_posts is None else 0
    speed = Speed(kind, recipe, found.gradient_checkpointing, layout, kept)
    step_s = _step_s(speed, work, layout.gpus, found.tokens)
    size = min(work.global_batch_size, work.train_posts)
    scoring_s = _scoring_s(speed, work, layout.gpus, found.tokens)
    hours = (work.steps * step_s + scoring_s) / 3600 + spot.startup_minutes / 60
    posts_per_second = size / step_s if work.labelled_posts is None else work.labelled_posts / scoring_s
    return Choice(
        kind=kind,
        count=layout.gpus,
        precision=recipe.precision,
        tokens_per_microbatch=found.tokens,
        gradient_checkpointing=found.gradient_checkpointing,
        shards=layout.base_shards,
        memory=found.memory,
        posts_per_second=posts_per_second,
        hours=hours,
        spot_hours=hours_with_preemptions(hours, spot),
        offer=offer,
    )


def _step_s(speed: Speed, work: Work, gpus: int, tokens: int) -> float:
    """Mean seconds of some steps; the GPU with most packs sets the pace, and the others run empty
    packs. No GPU trains posts faster than its process reads them.
    """
    seconds, size = [], min(work.global_batch_size, work.train_posts)
    for step, packs in zip(work.shares(gpus), work.packs(gpus, tokens), strict=True):
        # a very large step was laid out in part
        whole = size / sum(len(posts) for posts in step)
        seconds.append(whole * max(sum(speed.microbatch_s(one) for one in gpu) for gpu in packs))
    once = speed.updating_s() + (speed.joining_s() if gpus > 1 else 0.0)
    read_s = size / gpus / _READ_POSTS_PER_S
    return max(sum(seconds) / len(seconds) + once, read_s)


def _scoring_s(speed: Speed, work: Work, gpus: int, tokens: int) -> float:
    posts = [work.lengths[place % len(work.lengths)] for place in range(POSTS_PER_SCORING_STEP)]
    one_step = sum(speed.scoring_s(one) for one in filled(posts, tokens))
    return one_step * work.scored_posts / (POSTS_PER_SCORING_STEP * gpus)


def hours_with_preemptions(hours: float, spot: Spot) -> float | None:
    """Expected hours on spot machines, where `hours` are start-up and work; None for more than a
    year.

    The closed form for machines with exponentially distributed lifetimes: each stretch of work
    between two checkpoints is repeated until a machine outlives it, and so is each start (Daly
    2006, https://doi.org/10.1016/j.future.2004.11.016; checkpoints take no time here).
    """
    rate, startup_h, stretch_h = (
        spot.preemptions_per_hour,
        spot.startup_minutes / 60,
        spot.checkpoint_minutes / 60,
    )
    if rate * (startup_h + stretch_h) > _MOST_EXPONENT:
        return None
    work_h = hours - startup_h
    started_h = startup_h * _growth(rate * startup_h)
    expected = started_h + work_h * math.exp(rate * startup_h) * _growth(rate * stretch_h)
    return expected if expected <= _NEVER_H else None


def _growth(x: float) -> float:
    """(e^x - 1) / x, which is 1 at 0."""
    return math.expm1(x) / x if x else 1.0


def spot_of(config: Config, spot: Spot) -> Spot:
    """The spot machines with the checkpoint interval of the config, where it has one."""
    seconds = config.checkpoint.every_seconds
    return replace(spot, checkpoint_minutes=seconds / 60) if seconds is not None else spot
