"""The plan: predictions against what was measured, the choice against its own arithmetic, and the
verb on a real data set.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from emotion_train.bases.encoders import with_defaults
from emotion_train.config import Config, LoraSection, example_config, load_config
from emotion_train.data.index import read_index
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.staged_copy import stage
from emotion_train.preparation.steps import prepare
from emotion_train.sizing.fit import Layout, MicroBatch, largest_microbatch
from emotion_train.sizing.memory import cut_bytes, estimate, usable_bytes
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from emotion_train.training.engines import Kind
from emotion_train.training.microbatch import setting_for
from launch.cli import main
from launch.gpus import COUNTS, GPU_KINDS, PLANNED, GpuKind, kind_of, named
from launch.plan.choices import (
    Choice,
    Plan,
    best_settings,
    hours_with_preemptions,
    make_plan,
    precisions,
    with_settings,
)
from launch.plan.faster import faster_than
from launch.plan.prices import NO_PRICES, Offer, Prices, Quote
from launch.plan.speed import Speed
from launch.plan.spot import Spot
from launch.plan.table import enough, small_steps, without_units
from launch.plan.task_file import TEMPLATE, rewritten, what_the_list_is, write_task_file
from launch.workload import Work, config_on, shape_of_base, work_of
from tests.helpers import fake_hub
from tests.helpers.fake_hub import FakeHub
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_config
from tests.launch.plan.test_task_files import run_lines, tool, variables

MISTRAL_SMALL = Shape(5120, 32_768, 40, 32, 8, 128, 131_072)
LLAMA_70B = Shape(8192, 28_672, 80, 64, 8, 128, 131_072)
SMOLLM2 = Shape(576, 1536, 30, 9, 3, 64, 49_152)
KINDS = {kind.name: kind for kind in GPU_KINDS}
WITH_BFLOAT16 = tuple(kind for kind in PLANNED if kind.bf16)


def some_work(batch: int = 448, posts: int = 24_430, epochs: int = 3, mean: float = 17.8) -> Work:
    """Lengths as those of GoEmotions: a skewed spread around their mean."""
    draw = random.Random(0)
    lengths = [max(3, min(128, round(draw.gammavariate(3.2, mean / 3.2)))) for _ in range(2048)]
    return Work(posts, 3 * 3001, epochs, batch, tuple(lengths), 15, 128)


def some_config(*words: str) -> Config:
    return load_config(None, ["data.url=d", "run.output_url=o", *words])


def offers(**dollars: float) -> Prices:
    """`H100_8=20` is a spot price of $20 and an on-demand price of $50 for eight."""
    found = {}
    for name, usd in dollars.items():
        kind, _, count = name.rpartition("_")
        found[kind, int(count)] = Offer(
            Quote(2.5 * usd, "aws", "us-east-1", "x"), Quote(usd, "aws", "us-east-1", "x")
        )
    return Prices(found, "test")


# --- speed ---


@pytest.mark.parametrize(
    ("gpu", "precision", "tokens", "measured"),
    [
        *(("H100", "nf4", 8192, 381), ("H100", "bf16", 4096, 383), ("H100", "fp8", 4096, 633)),
        *(("H200", "nf4", 8192, 388), ("H200", "bf16", 8192, 398), ("H200", "fp8", 8192, 683)),
    ],
)
def test_the_measured_speed_of_the_real_size_is_predicted(
    gpu: str, precision: Any, tokens: int, measured: float
) -> None:
    """880 posts a step on one GPU, posts/s; benchmarks/speed.py shows the same comparison beside
    each run.
    """
    recipe = Recipe(MISTRAL_SMALL, precision)
    taken = MicroBatch(tokens, False, estimate(recipe, tokens, False))
    found = with_settings(recipe, some_work(880), KINDS[gpu], Layout(), Offer(), Spot(), taken)
    assert found.posts_per_second == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "precision", "measured"),
    [
        *((MISTRAL_SMALL, "bf16", 715), (MISTRAL_SMALL, "fp8", 1180), (MISTRAL_SMALL, "nf4", 697)),
        *((LLAMA_70B, "nf4", 228), (LLAMA_70B, "bf16", 233)),
    ],
)
def test_the_measured_speed_of_a_base_sharded_over_two_gpus_is_predicted(
    shape: Shape, precision: Any, measured: float
) -> None:
    """800 posts a step on two H200s, as benchmarks/many_gpus.py measures it."""
    recipe, layout = Recipe(shape, precision), Layout(2, "base")
    taken = MicroBatch(4096, False, estimate(recipe, 4096, False, 2))
    found = with_settings(recipe, some_work(800), KINDS["H200"], layout, Offer(), Spot(), taken)
    assert found.posts_per_second == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "tokens", "measured_s"),
    [
        *(
            ("nf4", 512, 0.108),
            ("nf4", 1024, 0.178),
            ("nf4", 2048, 0.322),
            ("nf4", 4096, 0.604),
            ("nf4", 9728, 1.387),
        ),
        *(("bf16", 1024, 0.151), ("bf16", 2048, 0.293), ("bf16", 4096, 0.577), ("bf16", 9728, 1.355)),
        *(
            ("fp8", 512, 0.092),
            ("fp8", 1024, 0.092),
            ("fp8", 2048, 0.177),
            ("fp8", 4096, 0.340),
            ("fp8", 9728, 0.794),
        ),
    ],
)
def test_measured_speeds_by_tokens_a_micro_batch_are_predicted(
    precision: Any, tokens: int, measured_s: float
) -> None:
    """The 24B on one H200, as `benchmarks/memory_plan.py --curve` measures it."""
    found = Speed(KINDS["H200"], Recipe(MISTRAL_SMALL, precision), False, Layout(2)).microbatch_s(tokens)
    assert found == pytest.approx(measured_s, rel=0.12)


@pytest.mark.parametrize(
    ("precision", "tokens", "measured_ms"),
    [("nf4", 7680, 551.1 - 6.3), ("bf16", 3840, 273.6 - 3.3), ("fp8", 3584, 156.1 - 3.2)],
)
def test_measured_speeds_of_twenty_fused_blocks_are_predicted(
    precision: Any, tokens: int, measured_ms: float
) -> None:
    """Forward and backward pass on one H100; less what the attention's backward pass has gained
    since, by its kernels alone.
    """
    blocks = replace(MISTRAL_SMALL, num_hidden_layers=20)
    found = Speed(KINDS["H100"], Recipe(blocks, precision), False, Layout(2)).microbatch_s(tokens)
    assert 1000 * found == pytest.approx(measured_ms, rel=0.05)


def test_the_measured_speed_of_the_stock_modules_is_predicted() -> None:
    """448 posts a step in packs of 8,192 tokens, nf4, one H200: 291 posts/s, 5,172 tokens/s."""
    work, config = some_work(), some_config("train.global_batch_size=448", "model.decoder=stock")
    found = best_settings(config, MISTRAL_SMALL, work, KINDS["H200"], 1, Offer(), Spot(), "nf4")
    assert isinstance(found, Choice)
    assert found.posts_per_second * work.mean_length == pytest.approx(5172, rel=0.15)
    seconds = Speed(KINDS["H200"], Recipe(MISTRAL_SMALL, "nf4", decoder="stock"), False).microbatch_s(8192)
    assert 448 / seconds == pytest.approx(291, rel=0.15)


def test_a_small_model_is_bound_by_launching_its_kernels_unless_they_are_recorded() -> None:
    """SmolLM2-135M with adapters on all linear layers: 216 ms a step by the stock modules, 15.0 ms
    recorded.
    """
    recipe = Recipe(SMOLLM2, "bf16", LoraSection(targets="all-linear"))
    stock = Speed(KINDS["H100"], replace(recipe, decoder="stock"), False, Layout(1))
    fused, several = (
        Speed(KINDS["H100"], replace(recipe, decoder="fused"), False, Layout(gpus)) for gpus in (1, 2)
    )
    assert stock.microbatch_s(3460) == pytest.approx(0.216, rel=0.15)
    assert fused.microbatch_s(3460) == pytest.approx(0.0150, rel=0.15)
    assert several.microbatch_s(128) == several.microbatch_s(3460) == pytest.approx(0.145, rel=0.15)
    minilm = Shape(384, 1536, 6, 12, 12, 32, 30_522, fusable=False, is_encoder=True)
    one, two = (
        Speed(KINDS["H100"], Recipe(minilm, "bf16", None), False, Layout(gpus)).microbatch_s(1536)
        for gpus in (1, 2)
    )
    assert one < two / 3


ENCODERS_MEASURED: dict[str, dict[str, Any]] = {
    "minilm": {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "bert-base": {"model_type": "bert"},
    "roberta-large": {
        **{"model_type": "roberta", "hidden_size": 1024, "intermediate_size": 4096},
        **{"num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 514},
    },
    "modernbert-base": {"model_type": "modernbert"},
}


@pytest.mark.parametrize(
    ("name", "lora", "batch", "measured"),
    [
        ("minilm", None, 32, 10_041),
        ("minilm", None, 256, 26_927),  # it waits for its posts
        ("bert-base", None, 32, 4_399),
        ("bert-base", None, 256, 11_751),
        ("bert-base", LoraSection(), 32, 5_463),
        ("roberta-large", None, 32, 1_778),
        ("roberta-large", None, 256, 4_776),
        ("modernbert-base", None, 32, 2_940),
        ("modernbert-base", None, 256, 6_701),
    ],
)
def test_the_measured_speed_of_an_encoder_is_predicted(
    name: str, lora: LoraSection | None, batch: int, measured: float
) -> None:
    """One H200, as benchmarks/encoders.py measures it."""
    sizes = ENCODERS_MEASURED[name]
    shape = Shape.of(with_defaults(str(sizes["model_type"]), sizes))
    recipe = Recipe(shape, "bf16", lora, labels=15)
    taken = MicroBatch(8192, False, estimate(recipe, 8192, False))
    work = some_work(batch, mean=18.7)
    found = with_settings(recipe, work, KINDS["H200"], Layout(), Offer(), Spot(), taken)
    assert found.posts_per_second == pytest.approx(measured, rel=0.12)


def test_recomputing_takes_half_as_long_again() -> None:
    once, again = (
        Speed(KINDS["L4"], Recipe(MISTRAL_SMALL, "nf4"), one).microbatch_s(4096) for one in (False, True)
    )
    assert again == pytest.approx(1.5 * once)


# --- settings ---


def test_whatever_is_chosen_fits_its_gpu() -> None:
    work, config = some_work(), some_config()
    for kind in PLANNED:
        for count in COUNTS:
            found = best_settings(config, MISTRAL_SMALL, work, kind, count, Offer(), Spot(), None)
            if isinstance(found, Choice):
                assert found.memory.total <= usable_bytes(kind.memory_bytes)
                assert found.tokens_per_microbatch >= work.max_length
            else:
                assert found.memory.total > usable_bytes(kind.memory_bytes)


def test_a_base_larger_than_one_gpu_is_spread_over_several() -> None:
    config, work = some_config(), some_work()
    alone = best_settings(config, MISTRAL_SMALL, work, KINDS["L40S"], 1, Offer(), Spot(), "bf16")
    assert not isinstance(alone, Choice)
    spread = best_settings(config, MISTRAL_SMALL, work, KINDS["L40S"], 4, Offer(), Spot(), "bf16")
    assert isinstance(spread, Choice)
    assert spread.engine == "FSDP2"
    assert spread.shards == 4
    assert spread.memory.weights == cut_bytes(MISTRAL_SMALL, "bf16", 4)
    assert isinstance(
        best_settings(config, MISTRAL_SMALL, work, KINDS["L40S"], 4, Offer(), Spot(), "fp8"), Choice
    )


def test_a_base_is_spread_rather_than_recomputed_where_that_is_faster() -> None:
    """Llama 3.3 70B's shape in bf16 leaves an H200 so little room that it would recompute; two
    train 233 posts/s with half of the base each. PCIe is too slow for that.
    """
    config, work = some_config(), some_work(800)
    kinds = KINDS["H200"], replace(KINDS["H200"], nvlink=False)
    linked, apart = (
        best_settings(config, LLAMA_70B, work, kind, 2, Offer(), Spot(), "bf16") for kind in kinds
    )
    assert isinstance(linked, Choice)
    assert isinstance(apart, Choice)
    assert (linked.engine, linked.gradient_checkpointing) == ("FSDP2", False)
    assert (apart.engine, apart.gradient_checkpointing) == ("DDP", True)
    assert linked.posts_per_second > 1.3 * apart.posts_per_second


def test_a_micro_batch_is_no_larger_than_what_a_step_fills() -> None:
    found = best_settings(
        some_config(), MISTRAL_SMALL, some_work(batch=64), KINDS["H200"], 1, Offer(), Spot(), None
    )
    assert isinstance(found, Choice)
    most = max(sum(posts) for step in some_work(batch=64).shares(1) for posts in step)
    assert most <= found.tokens_per_microbatch < most + 256


def test_whether_to_recompute_is_decided_by_the_time_it_takes() -> None:
    """Of 24 GB cards the one with the slower memory, for which unpacking the weights often costs
    more than computing twice.
    """
    config, work = some_config("train.global_batch_size=448"), some_work()
    for kind in ("L4", "A10G"):
        chosen = best_settings(config, MISTRAL_SMALL, work, KINDS[kind], 1, Offer(), Spot(), "nf4")
        assert isinstance(chosen, Choice)
        for again in (False, True):
            recipe = Recipe(MISTRAL_SMALL, "nf4")
            found = largest_microbatch(
                recipe, KINDS[kind].memory_bytes, most_tokens=8192, gradient_checkpointing=again
            )
            assert found is not None
            other = with_settings(recipe, work, KINDS[kind], Layout(), Offer(), Spot(), found)
            assert chosen.hours <= other.hours


@pytest.mark.parametrize("given", ["true", "false"])
def test_a_config_that_says_whether_to_recompute_is_planned_so(given: str) -> None:
    config = some_config(f"train.gradient_checkpointing={given}")
    for kind in WITH_BFLOAT16:
        chosen = best_settings(config, MISTRAL_SMALL, some_work(), kind, 1, Offer(), Spot(), "nf4")
        assert isinstance(chosen, Choice)
        assert chosen.gradient_checkpointing == (given == "true")


@pytest.mark.parametrize("batch", [64, 448, 4096])
def test_a_run_takes_the_micro_batch_of_the_plan(batch: int) -> None:
    config, work = some_config(f"train.global_batch_size={batch}"), some_work(batch)
    for kind, count in product(PLANNED, (1, 4)):
        planned = best_settings(config, MISTRAL_SMALL, work, kind, count, Offer(), Spot(), "nf4")
        assert isinstance(planned, Choice)
        share = max(sum(posts) for step in work.shares(count) for posts in step)
        engine: Kind = "one process" if count == 1 else "FSDP2" if planned.shards > 1 else "DDP"
        here = config_on(config, kind)
        taken = setting_for(here, MISTRAL_SMALL, 15, kind.memory_bytes, share, engine, count)
        assert (taken.tokens, taken.gradient_checkpointing) == (
            planned.tokens_per_microbatch,
            planned.gradient_checkpointing,
        )


def test_every_post_of_a_step_has_one_gpu() -> None:
    work = some_work(batch=101)
    for one, four in zip(work.shares(1), work.shares(4), strict=True):
        assert sorted(length for gpu in four for length in gpu) == sorted(one[0])
        assert max(map(sum, four)) - min(map(sum, four)) <= max(one[0])


def test_twice_the_gpus_take_about_half_the_time_of_large_steps() -> None:
    config, work = some_config(), some_work(batch=4096)
    hours = [
        one.hours - 10 / 60 for one in (choice(config, work, "H100", 1), choice(config, work, "H100", 2))
    ]
    assert hours[0] / hours[1] == pytest.approx(2, rel=0.06)


def choice(config: Config, work: Work, kind: str, count: int) -> Choice:
    found = best_settings(config, MISTRAL_SMALL, work, KINDS[kind], count, Offer(), Spot(), None)
    assert isinstance(found, Choice)
    return found


def test_hours_add_up_from_posts_a_second() -> None:
    config, work = some_config("train.global_batch_size=448"), some_work()
    found = choice(config, work, "H100", 1)
    training_s = 3 * -(-24_430 // 448) * 448 / found.posts_per_second
    # the rest is scoring, which has no backward pass
    assert training_s < (found.hours - 10 / 60) * 3600 < 1.2 * training_s


# --- dollars ---


@pytest.mark.parametrize("rate", [0.1, 0.5, 2, 6])
def test_expected_hours_on_spot_agree_with_a_simulation(rate: float) -> None:
    """Machines that live for random times, each start taking a while and each end losing half a
    checkpoint interval on average.
    """
    draw, spot = random.Random(1), Spot(preemptions_per_hour=rate, startup_minutes=12, checkpoint_minutes=6)
    work_h, took = 5.0, []
    for _ in range(4000):
        clock, done = 0.0, 0.0
        while True:
            life = draw.expovariate(spot.preemptions_per_hour)
            useful = max(0.0, life - 0.2)
            if done + useful >= work_h:
                took.append(clock + 0.2 + work_h - done)
                break
            clock, done = clock + life, max(done, done + useful - draw.uniform(0, 0.1))
    expected = hours_with_preemptions(work_h + 0.2, spot)
    assert expected == pytest.approx(statistics.mean(took), rel=0.03)


def test_a_machine_that_is_always_taken_too_soon_has_no_price() -> None:
    assert hours_with_preemptions(3.0, Spot(preemptions_per_hour=6, startup_minutes=100)) is None
    assert hours_with_preemptions(20.0, Spot(preemptions_per_hour=59, startup_minutes=999)) is None


def test_choices_are_sorted_by_dollars_and_the_best_is_explained() -> None:
    plan = made(offers(L4_1=0.27, H100_1=2.5, H200_8=23, L40S_1=0.85))
    dollars = [one.usd for one in plan.choices if one.usd is not None]
    assert dollars == sorted(dollars)
    assert len(dollars) == 4
    assert all(one.usd is None for one in plan.choices[4:])
    best, second = plan.choices[:2]
    assert best.usd == best.usd_spot
    assert f"next is {second.name}" in plan.reason
    assert best.usd is not None
    assert second.usd is not None
    assert f"{second.usd / best.usd - 1:.0%} dearer" in plan.reason


def test_without_prices_the_plan_has_hours_and_says_so() -> None:
    plan = unpriced()
    sizes = [one.count * one.kind.gb for one in plan.choices]
    assert sizes == sorted(sizes)
    # larger ones would be faster, and nobody knows at what price
    assert plan.choices[0].kind == min((one.kind for one in plan.choices), key=lambda kind: kind.gb)
    assert plan.choices[0].count == 1
    assert "without prices" in plan.reason


def test_what_has_no_price_stands_after_what_has_one_the_smallest_first() -> None:
    plan = made(offers(H100_8=20, B200_8=50))
    assert [one.name for one in plan.choices[:2]] == ["H100:8", "B200:8"]
    sizes = [one.count * one.kind.gb for one in plan.choices[2:]]
    assert sizes == sorted(sizes)


def test_the_smallest_card_that_is_enough_is_named() -> None:
    plan = unpriced()
    assert {one.name for one in plan.smallest} == {"L4:1", "A10G:1", "RTX4090:1"}
    said = enough(plan)
    assert said is not None
    assert said.startswith("enough: a 24 GB card (")
    whole = make_plan(some_config(), MISTRAL_SMALL, some_work(), NO_PRICES, Spot(), precision="bf16")
    assert {one.kind.gb for one in whole.smallest} == {48}


def test_a_gpu_without_bfloat16_units_is_planned_by_the_stock_modules_at_its_float32_rate() -> None:
    config, work = some_config("train.global_batch_size=448"), some_work()
    found = best_settings(config, SMOLLM2, work, KINDS["T4"], 1, Offer(), Spot(), None)
    assert isinstance(found, Choice)
    recipe = Recipe.of(config_on(config, KINDS["T4"]), SMOLLM2, 15)
    assert recipe.decoder == "stock"
    assert found.memory == estimate(
        replace(recipe, precision=found.precision), found.tokens_per_microbatch, found.gradient_checkpointing
    )
    products_s = 4 * MISTRAL_SMALL.linear_parameters * 2048 / KINDS["T4"].bf16_flops
    large = replace(recipe, shape=MISTRAL_SMALL)
    seconds = Speed(KINDS["T4"], large, False).microbatch_s(2048)
    assert 1.5 * products_s < seconds < 3 * products_s
    assert "fp8" not in precisions(recipe, KINDS["T4"])
    said = without_units(unpriced())
    assert said is not None
    assert said.splitlines() == [
        "T4 has no bfloat16 units: PyTorch computes it there in float32, which the hours count",
        "not planned: V100, for which PyTorch's default builds have no kernels (they begin at compute"
        " capability 7.5)",
    ]


def test_why_more_gpus_gain_little_is_said_for_small_steps_only() -> None:
    few, many = (
        small_steps(make_plan(some_config(), MISTRAL_SMALL, work, offers(L40S_1=0.9), Spot()), work)
        for work in (some_work(batch=64), some_work(batch=4096))
    )
    assert few is not None
    named_first = re.match(r"note: (L40S:\d) is (?:only )?\S+", few)
    assert named_first is not None
    assert "every GPU reads all weights" in few
    assert many is None


def test_what_takes_too_long_is_left_out() -> None:
    plan = made(offers(L4_1=0.27, H100_8=20), within_hours=0.5)
    assert all((one.spot_hours or 9) <= 0.5 for one in plan.choices)
    assert plan.choices[0].name == "H100:8"


def test_what_is_in_time_on_demand_alone_stays_without_its_spot_machines() -> None:
    prices = Prices({("H100", 1): Offer(Quote(4.0, "a", "r", "x"), Quote(1.0, "a", "r", "x"))}, "test")
    config, work, often = (
        some_config("train.global_batch_size=448"),
        some_work(),
        Spot(preemptions_per_hour=6),
    )
    hours = choice(config, work, "H100", 1).hours
    best = make_plan(config, MISTRAL_SMALL, work, prices, often, within_hours=1.1 * hours).choices[0]
    assert (best.name, best.usd_spot, best.usd) == ("H100:1", None, 4.0 * best.hours)
    assert made(prices, within_hours=1.1 * hours).choices[0].usd_spot is not None


def test_labelling_is_planned_by_the_time_of_scoring_and_in_workers() -> None:
    work, prices = some_work().to_label(10_000_000), offers(H100_1=4.0, H100_8=32.0, L4_1=0.8)
    plan = make_plan(some_config(), MISTRAL_SMALL, work, prices, Spot(startup_minutes=10))
    assert all(one.shards == 1 for one in plan.choices)
    one, eight = (next(c for c in plan.choices if c.name == name) for name in ("H100:1", "H100:8"))
    assert one.hours == pytest.approx(10_000_000 / one.posts_per_second / 3600 + 1 / 6)
    assert eight.posts_per_second == pytest.approx(8 * one.posts_per_second)
    training = make_plan(some_config(), MISTRAL_SMALL, some_work(), prices, Spot())
    trained = next(c for c in training.choices if c.name == "H100:1" and c.precision == one.precision)
    assert one.posts_per_second > 1.5 * trained.posts_per_second  # no backward pass
    assert small_steps(plan, work) is None


def made(prices: Prices, **more: Any) -> Plan:
    return make_plan(
        some_config("train.global_batch_size=448"), MISTRAL_SMALL, some_work(), prices, Spot(), **more
    )


@cache
def unpriced() -> Plan:
    return made(NO_PRICES)


@cache
def two_priced() -> Plan:
    return made(offers(H100_1=2.5, H200_1=3.5))


# --- names ---


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000"),
        ("Quadro RTX 6000", None),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
    ],
)
def test_the_driver_s_names_are_understood(device: str, name: str | None) -> None:
    found = kind_of(device)
    assert (found.name if isinstance(found, GpuKind) else None) == name


def test_no_name_stands_for_two_kinds() -> None:
    names = [name.lower() for kind in GPU_KINDS for name in (kind.name, *kind.also)]
    assert len(names) == len(set(names))
    assert all(named(name.upper()) is not None for name in names)


# --- the task file ---

TASK = """# how to type it
name: emotion-train

resources:
  # cheapest first
  ordered:
    - {accelerators: "L4:1", use_spot: true}   # small
    # a word between
    - accelerators: H100:1
      use_spot: false
  disk_size: 150             # GB
  job_recovery:
    recover_on_exit_codes: [33]

# given by --env
envs:
  DATA_URL: null
  CONFIG: a.yaml
  OVERRIDES: ""              # values
run: |
  echo "resources:"
"""


def test_a_task_file_gets_the_plan_s_gpus_and_keeps_everything_else() -> None:
    plan = two_priced()
    text = rewritten(TASK, plan.choices[:2], ["model.precision=bf16"], "b.yaml")
    before, after = yaml.safe_load(TASK), yaml.safe_load(text)
    first, second = (one.name for one in plan.choices[:2])
    assert after["resources"].pop("ordered") == [
        {"accelerators": name, "use_spot": spot} for spot in (True, False) for name in (first, second)
    ]
    assert after["envs"].pop("OVERRIDES") == "model.precision=bf16"
    assert after["envs"].pop("CONFIG") == "b.yaml"
    del before["resources"]["ordered"], before["envs"]["OVERRIDES"], before["envs"]["CONFIG"]
    assert after == before
    for comment in ("# how to type it", "# GB", "# given by --env", "# values"):
        assert comment in text
    assert "# cheapest first" not in text  # it was said of another list
    assert f"${plan.choices[0].usd_spot:.2f}" in text


def test_the_comment_above_a_written_list_is_of_that_list() -> None:
    plan = two_priced()
    about = what_the_list_is(plan.choices[0], offers(H100_1=2.5, H200_1=3.5), 24_430)
    text = rewritten(TASK, plan.choices[:2], ["lora.r=8"], "b.yaml", about)
    above = text.partition("resources:\n")[2].partition("  ordered:")[0]
    assert above.startswith("  # In the order of dollars a job, not an hour; prices: test. All in fp8, for")
    assert rewritten(text, plan.choices[:2], ["lora.r=8"], "b.yaml", about) == text
    unknown = what_the_list_is(unpriced().choices[0], NO_PRICES, 9)
    assert unknown.startswith("The smallest GPUs that are enough, since no prices were known.")
    shipped = TEMPLATE.read_text(encoding="utf-8")
    assert "A 24 GB card" in shipped
    assert "A 24 GB card" not in rewritten(shipped, plan.choices[:2], [], "b.yaml", about)


def test_the_shipped_list_is_in_the_order_that_its_comment_gives_reasons_for() -> None:
    """Posts a second are those that a plan says in nf4 with the shipped config."""
    text = TEMPLATE.read_text(encoding="utf-8")
    said = re.search(
        r"estimates ([\d, ]+) posts a second, at \$([\d., ]+) an hour", text.replace("\n  #", "")
    )
    assert said is not None
    speeds, dollars = ([float(word) for word in words.split(",")] for words in said.groups())
    listed = [one for one in yaml.safe_load(text)["resources"]["ordered"] if one["use_spot"]]
    values = [speed / usd for speed, usd in zip(speeds, dollars, strict=True)]
    assert values == sorted(values, reverse=True)
    work = some_work(batch=64)
    for one, speed in zip(listed, speeds, strict=True):
        name, _, count = one["accelerators"].partition(":")
        found = best_settings(
            some_config(), MISTRAL_SMALL, work, KINDS[name], int(count), Offer(), Spot(), "nf4"
        )
        assert isinstance(found, Choice)
        assert found.posts_per_second == pytest.approx(speed, rel=0.05)


def test_a_written_task_takes_the_prices_of_its_list_to_the_machine() -> None:
    plan = made(offers(H100_1=2.5, L40S_2=1.8))
    text = rewritten(TEMPLATE.read_text(encoding="utf-8"), plan.choices[:2], [], "b.yaml")
    found = yaml.safe_load(text)["envs"]["PRICES"].split()
    assert sorted(found) == ["H100:1:spot=2.5000", "H100:1=6.2500", "L40S:2:spot=1.8000", "L40S:2=4.5000"]


def test_where_spot_prices_are_not_known_spot_is_tried_all_the_same() -> None:
    prices = Prices({("L40S", 1): Offer(Quote(1.09, "runpod", "", "x"), None)}, "list", complete=False)
    text = rewritten(TASK, made(prices).choices[:1], [], "a.yaml", complete=False)
    assert yaml.safe_load(text)["resources"]["ordered"] == [
        {"accelerators": "L40S:1", "use_spot": spot} for spot in (True, False)
    ]


def test_a_written_task_names_gpus_as_the_catalog_of_the_offer_does() -> None:
    other = Quote(0.8, "verda", "FIN-03", "x", "RTX-6000-Ada")
    prices = Prices({("RTX6000-Ada", 1): Offer(other, replace(other, accelerator="RTX6000Ada"))}, "test")
    text = rewritten(TASK, made(prices).choices[:1], [], "a.yaml")
    assert [one["accelerators"] for one in yaml.safe_load(text)["resources"]["ordered"]] == [
        "RTX6000Ada:1",
        "RTX-6000-Ada:1",
    ]


def test_a_task_file_written_twice_is_the_same() -> None:
    plan = two_priced()
    once = rewritten(TASK, plan.choices[:2], ["lora.r=8"], "my runs/b.yaml")
    assert rewritten(once, plan.choices[:2], ["lora.r=8"], "my runs/b.yaml") == once


def test_nothing_stays_of_the_last_plan(tmp_path: Path) -> None:
    choices, target = two_priced().choices[:2], tmp_path / "mine.yaml"
    write_task_file(target, choices, ["lora.r=8"], "my runs/b.yaml")
    assert envs(target) == {"OVERRIDES": "lora.r=8", "CONFIG": "my runs/b.yaml"}
    write_task_file(target, choices, [])
    assert envs(target) == {"OVERRIDES": "", "CONFIG": "emotion_train/configs/mistral_small_3_1.yaml"}
    write_task_file(tmp_path / "new.yaml", choices, [])
    assert target.read_text() == (tmp_path / "new.yaml").read_text()


def envs(task: Path) -> dict[str, str]:
    return {name: yaml.safe_load(task.read_text())["envs"][name] for name in ("OVERRIDES", "CONFIG")}


@pytest.mark.parametrize(
    "word", ["lora.targets=[q_proj, v_proj]", 'run.id="a"', "run.id='a'", "data.url=C:\\posts"]
)
def test_a_value_that_the_task_s_shell_would_take_apart_is_refused(word: str) -> None:
    with pytest.raises(WrongRequest, match=r"write it without them, such as lora.targets=\[q_proj,v_proj\]"):
        rewritten(TASK, unpriced().choices[:1], [word], "a.yaml")


def test_only_what_is_on_offer_is_written() -> None:
    prices = Prices({("H100", 1): Offer(Quote(3.0, "lambda", "us", "x"), None)}, "test")
    text = rewritten(TASK, made(prices).choices[:1], [], "a.yaml")
    assert yaml.safe_load(text)["resources"]["ordered"] == [{"accelerators": "H100:1", "use_spot": False}]


def test_a_task_of_another_layout_is_refused() -> None:
    with pytest.raises(WrongRequest, match="no `resources:`"):
        rewritten("name: x\n", unpriced().choices[:1], [], "a.yaml")
    for text in (
        "resources: {cpus: 2}\n",
        TASK.replace("  OVERRIDES:", "    OVERRIDES:"),
        TASK.replace("  OVERRIDES:", "  OTHERS:"),
    ):
        with pytest.raises(WrongRequest, match="not laid out"):
            rewritten(text, unpriced().choices[:1], [], "a.yaml")


def test_a_task_file_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task.yaml").write_text(TASK)

    def full(path: Path, text: str, encoding: str) -> None:
        with path.open("w") as file:
            file.write(text[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(WrongRequest, match=r"task\.yaml cannot be written \(No space left"):
            write_task_file(tmp_path / "task.yaml", unpriced().choices[:1], [])
    assert (tmp_path / "task.yaml").read_text() == TASK
    write_task_file(tmp_path / "task.yaml", unpriced().choices[:1], [])
    assert (tmp_path / "task.yaml").read_text() != TASK
    assert [path.name for path in tmp_path.iterdir()] == ["task.yaml"]


def test_a_file_that_is_no_text_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF\xf4\x28")
    with pytest.raises(WrongRequest, match=r"weights\.gguf is no task file"):
        write_task_file(tmp_path / "weights.gguf", unpriced().choices[:1], [])
    assert (tmp_path / "weights.gguf").read_bytes() == b"GGUF\xf4\x28"


# --- the verb ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_config(folder)
    return folder


def words(folder: Path, *more: str) -> list[str]:
    prices = folder / "prices.csv"
    prices.write_text("AcceleratorName,AcceleratorCount,Price,SpotPrice\nL4,1,0.8,0.3\nH100,1,4,2\n")
    home = ["--data", str(folder / "data"), "--prices", str(prices)]
    return ["plan", *home, f"model.base={folder / 'base'}", *more]


def test_the_verb_plans_a_prepared_data_set_with_the_base_s_tokenizer(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["choices"][0]["gpus"] == "L4:1"
    assert document["choices"][0]["usd_spot"] < document["choices"][1]["usd_spot"]
    store = open_store(str(prepared / "data"))
    tokenizer = PostTokenizer.load(str(prepared / "base"), 128)
    lengths = [len(ids) for ids in tokenizer.encode(texts_of(prepared))]
    assert store.read("index.json")
    assert document["mean_tokens"] == pytest.approx(statistics.mean(lengths))


@pytest.mark.parametrize("more", [(), ("--tokens-per-post", "70")])
def test_a_plan_has_both_lengths_and_the_share_that_is_cut(
    more: tuple[str, ...], prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(prepared, "data.max_length=32", *more)
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    tokenizer = PostTokenizer.load(str(prepared / "base"), 8192)
    lengths = [len(ids) for ids in tokenizer.encode(texts_of(prepared))]
    cut = document["cut"]
    assert cut["estimated"] == bool(more)
    if not more:
        assert document["mean_tokens"] == pytest.approx(statistics.mean(min(32, one) for one in lengths))
        assert cut["mean_tokens_uncut"] == pytest.approx(statistics.mean(lengths))
        assert cut["share_of_posts"] == pytest.approx(sum(one > 32 for one in lengths) / len(lengths))
        lost = sum(max(0, one - 32) for one in lengths) / sum(lengths)
        assert cut["share_of_tokens"] == pytest.approx(lost)
        assert cut["longest_tokens"] == max(lengths)
    else:  # four bytes a token: about a quarter of what this tokenizer makes
        assert document["mean_tokens"] == 32
        assert cut["mean_tokens_uncut"] == pytest.approx(statistics.mean(lengths) / 4, rel=0.1)
    assert main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    about = "about " if more else ""
    mean, share = f"posts of {document['mean_tokens']:.1f} tokens", f"{100 * cut['share_of_posts']:.1f} %"
    if cut["share_of_posts"]:
        assert (
            f"{mean} ({about}{cut['mean_tokens_uncut']:.1f} uncut;"
            f" data.max_length=32 cuts {about}{share} of the posts), 3 epochs"
        ) in out
    else:
        assert f"{mean}, 3 epochs" in out
    assert ("warning: data.max_length=32" in out) == (cut["share_of_posts"] > 0.05)


@pytest.mark.parametrize("more", [(), ("--tokens-per-post", "12"), ("--label", "1000")])
def test_a_plan_has_one_length_where_no_post_is_cut(
    more: tuple[str, ...], prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(prepared, "data.max_length=512", *more)
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cut"]["share_of_posts"] == 0
    assert main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"posts of {document['mean_tokens']:.1f} tokens(,| |$)", out)
    assert "uncut" not in out
    assert ("a part every 2 minutes;" if "--label" in more else "a checkpoint every 1 minute;") in out


def test_a_base_staged_as_nf4_is_planned_in_nf4_only(
    prepared: Path, bucket_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(str(prepared / "base"), f"{bucket_url}/base", "nf4", "cpu")
    staged = words(prepared, "--json", f"model.base={bucket_url}/base")
    assert main(staged) == 0
    assert {choice["precision"] for choice in json.loads(capsys.readouterr().out)["choices"]} == {"nf4"}
    assert main([*staged, "--precision", "bf16"]) == 2
    assert "staged as nf4, which cannot be turned back" in capsys.readouterr().err
    assert shape_of_base(f"{bucket_url}/base") == shape_of_base(str(prepared / "base"))


@pytest.mark.parametrize("every", [1, 2, 5, 7, 9, 100])
def test_evaluations_are_counted_as_the_trainer_makes_them(prepared: Path, every: int) -> None:
    store = open_store(str(prepared / "data"))
    index = read_index(store)
    config = load_config(
        None,
        ["data.url=d", "run.output_url=o", "train.global_batch_size=16", f"evaluation.every_steps={every}"],
    )
    per_epoch = -(-index.split("train").rows // 16)
    made = sum(step % per_epoch == 0 or step % every == 0 for step in range(1, 3 * per_epoch + 1))
    held_out = sum(split.rows for name, split in index.splits.items() if name != "train")
    assert (
        work_of(config, index, store, 20.0).scored_posts == made * index.split("validation").rows + held_out
    )


def test_a_data_set_in_a_bucket_is_planned_like_its_copy_in_a_folder(
    prepared: Path, bucket_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(str(prepared / "source"), f"{bucket_url}/data")
    mean = []
    for data in (str(prepared / "data"), f"{bucket_url}/data"):
        assert main([*words(prepared, "--json"), "--data", data]) == 0
        mean.append(json.loads(capsys.readouterr().out)["mean_tokens"])
    assert mean[0] == mean[1]


def test_planning_imports_neither_torch_nor_transformers(prepared: Path) -> None:
    code = (
        f"import sys\nfrom launch.cli import main\nassert main({words(prepared)}) == 0\n"
        "print('loaded', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("loaded []\n")


@pytest.mark.parametrize("away", ["503", "offline"])
def test_without_the_hub_the_mean_length_is_estimated_and_said_to_be(
    away: str,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The default base's shape is known; its tokenizer is on the hub."""
    texts = [len(text.encode()) for text in texts_of(prepared)]
    expected = statistics.mean(1 + round(size / 4) for size in texts)
    asked = [word for word in words(prepared, "model.precision=nf4") if not word.startswith("model.base")]
    with FakeHub() as server:
        server.failure = 503
        fake_hub.use(monkeypatch, server.endpoint, tmp_path)
        if away == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert main([*asked, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["mean_tokens"] == pytest.approx(expected)
        assert document["cut"]["estimated"]
        assert main(asked) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"the mean of {expected:.1f} tokens is estimated from the posts' characters" in out
        assert {"503": "hub answered 503", "offline": "HF_HUB_OFFLINE forbids"}[away] in out
        server.failure = "gated"
        if away == "503":  # what a person can mend is not estimated around
            assert main(asked) == 2
            assert "is gated: accept its licence at" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--tokens-per-post", "20")])
def test_a_base_that_the_trainer_would_refuse_is_not_planned(
    more: tuple[str, ...], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(prepared / "base", base)
    shard = max(base.glob("*.safetensors"))
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert main(words(prepared, *more, f"model.base={base}")) == 2
    assert "it is a Git LFS pointer" in capsys.readouterr().err


def test_small_steps_are_remarked_upon(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(prepared, "train.global_batch_size=8")) == 0
    assert re.search(r"train\.global_batch_size=\d+ would train", " ".join(capsys.readouterr().out.split()))


def texts_of(folder: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [
        text
        for path in sorted((folder / "data" / "train").iterdir())
        for text in pq.read_table(path)["text"].to_pylist()
    ]


def test_the_table_marks_the_best_and_names_the_prices(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, "--tokens-per-post", "17.8")) == 0
    out = capsys.readouterr().out
    assert "best: L4:1, one GPU: the fewest dollars a job on spot" in out
    assert f"prices: {prepared / 'prices.csv'}" in out
    assert "0.1 preemptions an hour" in out
    assert out.startswith("prices: ")


def test_ten_rows_are_shown_and_all_on_request(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = words(prepared, "--tokens-per-post", "17.8")
    assert main(asked) == 0
    few = capsys.readouterr().out
    assert main([*asked, "--all"]) == 0
    every = capsys.readouterr().out
    assert few.count(" model.layers=1") == every.count(" model.layers=1") == 2  # its row, and a note on it
    rows = [len(re.findall(r"^\S+:\d ", out, re.MULTILINE)) - 1 for out in (few, every)]
    assert rows[0] == 10
    assert rows[1] == sum(min(kind.most, 8).bit_length() for kind in PLANNED)
    assert f"and {rows[1] - 10} more that fit: --all shows them" in few
    assert "--all" not in every


def test_without_a_catalog_the_first_line_says_whose_prices_and_of_when(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(prepared / "nobody"))
    monkeypatch.setenv("PATH", "")
    asked = ["plan", "--data", str(prepared / "data"), f"model.base={prepared / 'base'}"]
    assert main(asked) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"prices: list prices .*, read from 20\d\d-\d\d-\d\d to 20\d\d-\d\d-\d\d ", first)
    assert main([*asked, "data.url=other"]) == 2
    assert "and data.url=other name the data set twice; give one of them" in capsys.readouterr().err
    assert main([*asked, "--cloud", "oci"]) == 2
    assert "--cloud names oci, without a price in list prices" in capsys.readouterr().err


def test_the_plan_writes_a_task(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = prepared / "task.yaml"
    task.write_text(TASK)
    assert main(words(prepared, "--write", str(task), "train.epochs=2")) == 0
    written = yaml.safe_load(task.read_text())
    assert written["resources"]["ordered"][0] == {"accelerators": "L4:1", "use_spot": True}
    assert "train.epochs=2" in written["envs"]["OVERRIDES"]
    assert "data.url" not in written["envs"]["OVERRIDES"]


def test_a_task_is_written_although_nobody_reads_the_plan(prepared: Path, tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "launch.cli",
        *words(prepared, "--json", "--write", str(tmp_path / "task.yaml")),
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 0
    assert yaml.safe_load((tmp_path / "task.yaml").read_text())["resources"]["ordered"]


def test_what_does_not_travel_with_a_written_task_is_told(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = words(
        prepared,
        "--config",
        str(example_config()),
        "model.precision=nf4",
        "--write",
        str(tmp_path / "task.yaml"),
    )
    assert main(asked) == 0
    told = capsys.readouterr().err
    assert f"model.base is {prepared / 'base'}, which is outside" in told
    assert "--config" not in told
    monkeypatch.setattr("launch.plan.verb.PROJECT", prepared.resolve())
    assert main(asked) == 0
    told = capsys.readouterr().err
    assert f"--config is {example_config()}, which is outside" in told
    assert "model.base" not in told.partition("\n")[2]


def test_a_written_task_lets_each_of_its_gpus_take_what_fits_it(prepared: Path, tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    asked = ["train.tokens_per_microbatch=512", "train.global_batch_size=8"]
    assert main(words(prepared, "--precision", "bf16", "--write", str(task), *asked)) == 0
    tool(tmp_path / ".venv" / "bin" / "emotion-launch")
    read = yaml.safe_load(task.read_text())
    environment = variables(read, RECORD=str(tmp_path / "record"), DATA_URL="d", OUTPUT_URL="o")
    assert run_lines(read["run"], tmp_path, environment).returncode == 0
    run = load_config(None, (tmp_path / "record.words").read_text().splitlines()[4:])
    assert (run.model.precision, run.train.tokens_per_microbatch, run.train.global_batch_size) == (
        "bf16",
        "auto",
        8,
    )


def test_a_written_task_names_no_gpu_that_takes_longer_than_asked_for(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("train.epochs=10000", "train.global_batch_size=2")  # which no reading of posts bounds
    asked = words(prepared, *steps, "--precision", "bf16", "--startup-minutes", "0")
    (prepared / "prices.csv").write_text(
        "AcceleratorName,AcceleratorCount,Price,SpotPrice\nL4,1,0.8,0.3\nA10G,1,0.8,0.3\n"
    )
    assert main([*asked, "--json"]) == 0
    hours = {one["gpus"]: one["hours_on_spot"] for one in json.loads(capsys.readouterr().out)["choices"]}
    faster, slower = sorted(("L4:1", "A10G:1"), key=lambda name: hours[name])
    limit = (hours[faster] + hours[slower]) / 2
    assert main([*asked, "--within-hours", str(limit), "--write", str(tmp_path / "task.yaml")]) == 0
    ordered = yaml.safe_load((tmp_path / "task.yaml").read_text())["resources"]["ordered"]
    assert {one["accelerators"] for one in ordered} == {faster}


def test_a_base_that_fits_nowhere_ends_in_2_with_the_nearest_remedy(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, "--within-hours", "0.0001")) == 2
    assert "--within-hours" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--within-hours", "--tokens-per-post"])
@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf"])
def test_a_number_that_makes_no_sense_is_refused(
    option: str, number: str, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, option, number)) == 2
    assert f"{option} is {number}; give" in capsys.readouterr().err


def test_a_precision_that_the_trainer_does_not_offer_is_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, "--precision", "int3")) == 2
    assert "--precision is 'int3'; allowed are nf4, bf16" in capsys.readouterr().err


def test_fp8_that_only_the_fused_decoder_computes_is_refused_without_it(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, "--precision", "fp8", "model.decoder=stock")) == 2
    assert (
        "--precision fp8 needs the fused decoder and model.decoder is stock; leave model.decoder out, or type"
        in capsys.readouterr().err
    )
    qwen = causal_checkpoint(tmp_path / "base", "qwen2")
    assert main(words(prepared, "--precision", "fp8", f"model.base={qwen}")) == 2
    assert (
        f"--precision fp8 needs a Llama or Mistral base and {qwen} is of another kind"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("kind", "told"), [("gemma3_text", True), ("llama", False)])
def test_a_plan_says_what_computes_a_base_that_the_fused_decoder_does_not(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, told: bool
) -> None:
    base = causal_checkpoint(tmp_path / "base", kind)
    assert main(words(prepared, f"model.base={base}")) == 0
    assert ("note: transformers' modules compute this base" in capsys.readouterr().out) == told


def test_a_precision_that_is_asked_for_is_the_only_one(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prepared, "--precision", "bf16", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert {one["precision"] for one in document["choices"]} == {"bf16"}


def test_fp8_is_planned_for_gpus_that_have_it() -> None:
    plan = made(NO_PRICES, precision="fp8")
    assert {one.kind.name for one in plan.choices} | {one.kind.name for one in plan.too_small} == {
        "L4",
        "L40S",
        "H100",
        "H200",
        "B200",
        "B300",
        "GH200",
        "RTX4090",
        "RTX5090",
        "RTX6000-Ada",
        "RTXPRO6000",
    }


@pytest.mark.parametrize("method", ["auto", "lora"])
def test_an_encoder_is_planned_whole_on_each_gpu(method: str) -> None:
    sizes = {"vocab_size": 50_265, "hidden_size": 768, "intermediate_size": 3072}
    roberta = Shape.of(
        {**sizes, "model_type": "roberta", "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"max_position_embeddings": 514, "type_vocab_size": 1}
    )
    assert round(roberta.parameters / 1e6) == 125
    config = some_config("model.base=FacebookAI/roberta-base", f"train.method={method}")
    found = make_plan(config, roberta, some_work(), NO_PRICES, Spot())
    assert found.trains_all == (method == "auto")
    assert {(choice.precision, choice.shards) for choice in found.choices} == {("bf16", 1)}
    assert found.choices[0].overrides(config)[0] == "model.precision=bf16"
    assert not found.too_small
    faster = faster_than(config, roberta, some_work(), found.choices[0], Spot())
    assert {"model.layers=9", "model.layers=6"} <= {one.word for one in faster}
    with pytest.raises(
        WrongRequest, match=r"is a decoder, which is trained by an adapter only; type train\.method=lora"
    ):
        make_plan(some_config("train.method=full"), SMOLLM2, some_work(), NO_PRICES, Spot())


def test_fp8_is_not_planned_for_what_only_the_stock_modules_compute() -> None:
    recipe = Recipe(MISTRAL_SMALL, "nf4")
    assert "fp8" in precisions(recipe, KINDS["H100"])
    unlike = Recipe(replace(MISTRAL_SMALL, fusable=False), "nf4")
    assert "fp8" not in precisions(unlike, KINDS["H100"])
    assert "fp8" not in precisions(replace(recipe, decoder="stock"), KINDS["H100"])


def test_the_default_base_is_planned_without_a_network() -> None:
    shape = shape_of_base(some_config().model.base)
    assert shape == MISTRAL_SMALL
    assert largest_microbatch(Recipe(shape, "nf4"), KINDS["L4"].memory_bytes) is not None
