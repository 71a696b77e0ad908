"""What a plan tells beside its best: fewer blocks and larger steps, with their own arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from emotion_train.sizing.fit import Layout, MicroBatch
from emotion_train.sizing.memory import GIB, estimate, usable_bytes
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Precision, Shape
from launch.check.checks import run_checks
from launch.cli import main
from launch.plan.choices import Choice, Plan, best_settings, make_plan, with_settings
from launch.plan.faster import faster_than, larger_steps
from launch.plan.prices import Offer
from launch.plan.spot import Spot
from launch.plan.table import fewer_blocks, small_steps
from launch.workload import Work
from tests.launch.plan.test_plan import (
    KINDS,
    MISTRAL_SMALL,
    WITH_BFLOAT16,
    offers,
    prepared,  # noqa: F401
    some_config,
    some_work,
    words,
)


def planned(work: Work, *overrides: str, precision: Precision | None = None) -> Plan:
    config = some_config(*overrides)
    plan = make_plan(config, MISTRAL_SMALL, work, offers(H100_1=4.0), Spot(), precision=precision)
    return replace(plan, faster=faster_than(config, MISTRAL_SMALL, work, plan.choices[0], Spot()))


def test_fewer_blocks_are_what_a_base_of_so_many_would_be_on_the_best_gpus() -> None:
    plan = planned(some_work(880))
    best = plan.choices[0]
    assert [word for word, _ in plan.faster] == ["model.layers=31", "model.layers=20"]
    for (_, found), blocks in zip(plan.faster, (31, 20), strict=True):
        shape = replace(MISTRAL_SMALL, num_hidden_layers=blocks)
        alone = best_settings(
            some_config(), shape, some_work(880), best.kind, 1, best.offer, Spot(), best.precision
        )
        assert found == alone
        assert found.memory.weights < best.memory.weights  # what is left, larger packs may take
        assert found.posts_per_second / best.posts_per_second == pytest.approx(40 / blocks, rel=0.06)
    said = fewer_blocks(plan)
    assert said is not None
    assert "model.layers=31 and model.layers=20" in said
    assert "on a 135M base" in said
    assert "no other base is measured" in said


@pytest.mark.parametrize("precision", ["nf4", "bf16", "fp8"])
def test_tokens_a_second_go_with_one_over_the_depth(precision: Precision) -> None:
    """On one GPU in packs of 8,192, where products take nearly all of the time."""
    speeds = []
    for blocks in (40, 31, 20):
        recipe = Recipe(replace(MISTRAL_SMALL, num_hidden_layers=blocks), precision)
        taken = MicroBatch(8192, False, estimate(recipe, 8192, False))
        found = with_settings(recipe, some_work(880), KINDS["H200"], Layout(), Offer(), Spot(), taken)
        speeds.append(found.posts_per_second)
    assert speeds[1] / speeds[0] == pytest.approx(40 / 31, rel=0.04)
    assert speeds[2] / speeds[0] == pytest.approx(2, rel=0.06)


def test_half_of_the_24b_trains_in_nf4_on_16_gb() -> None:
    recipes = {n: Recipe(replace(MISTRAL_SMALL, num_hidden_layers=n), "nf4") for n in (40, 20)}
    room = usable_bytes(16 * GIB)
    assert estimate(recipes[20], 1152, False).total < room
    assert estimate(recipes[40], 1152, False).total > room


def test_what_is_already_cut_and_what_labels_is_told_of_no_other_depth() -> None:
    assert [word for word, _ in planned(some_work(880), "model.layers=0.5").faster] == []
    assert planned(some_work(880).to_label(10**6)).faster == ()
    assert fewer_blocks(planned(some_work(880), "model.layers=20")) is None


def test_an_encoder_is_told_of_less_depth_as_a_decoder_is() -> None:
    work, best = some_work(880), planned(some_work(880), precision="bf16").choices[0]
    encoder = Shape(1024, 2624, 28, 16, 16, 64, 50_368, fusable=False, is_encoder=True)
    for shape in (encoder, replace(encoder, is_encoder=False)):
        assert [word for word, _ in faster_than(some_config(), shape, work, best, Spot())][:2] == [
            "model.layers=22",
            "model.layers=14",
        ]


def test_larger_steps_are_as_fast_as_a_run_of_such_steps() -> None:
    plan = planned(some_work(64), precision="nf4")
    best, (word, found) = plan.choices[0], plan.faster[-1]
    size = int(word.removeprefix("train.global_batch_size="))
    assert size in (128, 256, 512, 1024)

    def speed(batch: int) -> float:
        alone = best_settings(
            some_config(),
            MISTRAL_SMALL,
            some_work(batch),
            best.kind,
            1,
            best.offer,
            Spot(),
            best.precision,
        )
        assert isinstance(alone, Choice)
        return alone.posts_per_second

    speeds = {batch: speed(batch) for batch in (128, 256, 512, 1024)}
    assert found.posts_per_second == speeds[size] >= 1.1 * best.posts_per_second
    enough = [batch for batch, one in speeds.items() if one >= 0.95 * max(speeds.values())]
    assert size == min(enough)
    said = small_steps(plan, some_work(64))
    assert said is not None
    assert (
        f"train.global_batch_size={size} would train {found.posts_per_second:,.0f} posts/s on {best.name} in"
        f" place of {best.posts_per_second:,.0f} with steps of 64 (it changes the training)"
    ) in said


def test_small_steps_are_nearly_as_fast_where_the_weights_are_kept_unpacked() -> None:
    for batch, kept_gains in ((64, 1.2), (1024, 1.0)):  # a large pack leaves no room
        kept, unpacking = (
            planned(some_work(batch), f"model.keep_unpacked={word}", precision="nf4").choices[0]
            for word in ("true", "false")
        )
        assert kept.posts_per_second >= kept_gains * unpacking.posts_per_second
        assert kept.memory == unpacking.memory  # what it needs
    nothing_else = planned(some_work(64), "model.keep_unpacked=true", precision="nf4").faster
    assert nothing_else[-1].word.startswith("model.layers=")


def test_nothing_is_said_where_larger_steps_gain_nothing_or_there_are_no_more_posts() -> None:
    for work in (some_work(4096), some_work(64, posts=100)):
        best = planned(work).choices[0]
        assert larger_steps(some_config(), MISTRAL_SMALL, work, best, Spot()) is None


def test_rows_and_notes_are_printed_and_in_the_json(
    prepared: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = words(prepared, "train.global_batch_size=8")
    assert main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "model.layers=1" in out
    assert "note: model.layers=1 read" in out or "note: model.layers=2" in out
    assert "train.global_batch_size=" in out
    assert main([*asked, "--json"]) == 0
    faster = json.loads(capsys.readouterr().out)["faster"]
    assert any(one["type"].startswith("model.layers=") and one["posts_per_second"] > 0 for one in faster)


def test_check_says_what_larger_steps_would_gain_on_the_machine_that_is_asked_for(
    prepared: Path,  # noqa: F811
) -> None:
    config = some_config(
        f"data.url={prepared / 'data'}",
        f"run.output_url={prepared / 'check-runs'}",
        f"model.base={prepared / 'base'}",
        "train.global_batch_size=8",
    )
    found = {one.name: one for one in run_checks(config, (), None, wanted_gpus="H100:1")}
    assert found["steps"].ok
    assert "train.global_batch_size=" in found["steps"].finding
    assert "(it changes the training)" in found["steps"].finding
    assert "steps" not in {one.name for one in run_checks(config, (), None)}


def test_every_kind_says_something_true_of_its_own_steps() -> None:
    """More posts a step are never planned to be slower by much: packs only get fuller."""
    for kind in WITH_BFLOAT16:
        found = best_settings(some_config(), MISTRAL_SMALL, some_work(64), kind, 1, Offer(), Spot(), "nf4")
        if isinstance(found, Choice):
            larger = larger_steps(some_config(), MISTRAL_SMALL, some_work(64), found, Spot())
            assert larger is None or larger.choice.posts_per_second > found.posts_per_second
