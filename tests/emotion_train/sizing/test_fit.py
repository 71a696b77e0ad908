"""The order of remedies, one by one, on pretended GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emotion_train.config import LoraSection
from emotion_train.sizing.fit import (
    SHARDED_BASE,
    Fit,
    Layout,
    MicroBatch,
    Misfit,
    Request,
    fit,
    largest_microbatch,
    layouts,
    ran_out,
    unpacked_blocks,
)
from emotion_train.sizing.memory import GIB, estimate, usable_bytes
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape

MISTRAL_SMALL = Shape(5120, 32_768, 40, 32, 8, 128, 131_072)
NF4 = Request("the base", Recipe(MISTRAL_SMALL, "nf4"), max_length=128)
BF16 = replace(NF4, recipe=replace(NF4.recipe, precision="bf16"))


def gpu_of(usable: int) -> int:
    """Bytes that a GPU reports of which so many are usable."""
    return next(size for size in range(usable, 2 * usable, 1 << 20) if usable_bytes(size) >= usable)


@pytest.mark.parametrize(
    ("asked", "gpu_gib", "gpus", "words"),
    [
        # fewer tokens while a thousand remain
        (replace(NF4, tokens=8192), 44.4, 1, "type train.tokens_per_microbatch=4352"),
        # recomputation, with as many tokens as were asked for where they fit
        (replace(NF4, tokens=2048), 18, 1, "type train.gradient_checkpointing=true"),
        # none of this helps in bf16
        (BF16, 44.4, 1, "type model.precision=nf4"),
        (
            replace(NF4, gradient_checkpointing=False, max_length=512),
            16,
            1,
            "type train.gradient_checkpointing=true",
        ),
        # a layout that was given does not fit, another of as many GPUs does
        (NF4, 12, 4, f"type --config_file {SHARDED_BASE}"),
        (NF4, 8, 1, "take a smaller model.base, or a larger GPU (emotion-launch plan names those that fit)"),
    ],
)
def test_the_cheapest_remedy_that_helps_is_named(
    asked: Request, gpu_gib: float, gpus: int, words: str
) -> None:
    found = fit(asked, int(gpu_gib * GIB), (Layout(gpus),))
    assert isinstance(found, Misfit)
    assert found.remedy == words
    assert str(found).endswith(f" are usable; {words}.")


def test_the_first_layout_that_fits_is_taken() -> None:
    assert [one.sharded for one in layouts(4)] == ["nothing", "optimizer", "base"]
    assert layouts(1) == (Layout(),)
    found = fit(BF16, 45 * GIB, layouts(4))
    assert isinstance(found, Fit)
    assert found.layout == Layout(4, "base")
    assert [layout.sharded for layout, _ in found.passed_over] == ["nothing", "optimizer"]


def test_the_limit_is_met_to_the_byte() -> None:
    asked = replace(NF4, tokens=4096)
    need = estimate(NF4.recipe, 4096, False).total
    enough = gpu_of(need)
    assert isinstance(fit(asked, enough, (Layout(),)), Fit)
    short = next(size for size in range(enough, 0, -1) if usable_bytes(size) < need)
    misfit = fit(asked, short, (Layout(),))
    assert isinstance(misfit, Misfit)
    assert misfit.words == ("train.tokens_per_microbatch=3840",)


def test_a_long_post_fits_though_no_whole_quantum_of_tokens_does() -> None:
    """300 tokens fit and 512 do not: 256, the next number below, would not hold the post."""
    recipe = replace(NF4.recipe, lora=LoraSection(r=8))
    gpu_bytes = gpu_of(estimate(recipe, 320, False).total)
    found = largest_microbatch(recipe, gpu_bytes, longest_post=300, gradient_checkpointing=False)
    assert found is not None
    assert found.tokens == 300


def test_a_run_that_finds_no_memory_left_is_told_what_needs_a_tenth_less() -> None:
    asked = replace(NF4, tokens=4096)
    misfit = ran_out(asked, 80 * GIB, Layout())
    assert "ran out of the memory of a GPU of 80.0 GiB: with 4,096 tokens a micro-batch" in str(misfit)
    (word,) = misfit.words
    tokens = int(word.removeprefix("train.tokens_per_microbatch="))
    taken, less = (estimate(NF4.recipe, one, False).total for one in (4096, tokens))
    assert less <= taken / 1.1 < estimate(NF4.recipe, tokens + 256, False).total


KEEPING = replace(NF4.recipe, keeps_unpacked=True)


@pytest.mark.parametrize(
    ("recipe", "gpu_gib", "tokens", "layout", "blocks"),
    [
        # 1.04 GiB a block: all beside a step of 64 posts on an H100, some beside a larger one
        (KEEPING, 79.6, 1536, Layout(), 40),
        (KEEPING, 79.6, 4096, Layout(), 33),
        (KEEPING, 139.8, 4352, Layout(), 0),  # large packs hardly wait for it
        (KEEPING, 44.4, 1536, Layout(), 16),
        (KEEPING, 22.3, 1024, Layout(), 0),
        (KEEPING, 139.8, 4096, Layout(2), 40),
        (KEEPING, 139.8, 1536, Layout(2, "base"), 0),
        (NF4.recipe, 139.8, 1536, Layout(), 0),
        (replace(KEEPING, precision="bf16"), 139.8, 1536, Layout(), 0),
        (replace(KEEPING, decoder="stock"), 139.8, 1536, Layout(), 0),
    ],
)
def test_as_many_blocks_are_kept_unpacked_as_training_leaves_room_for(
    recipe: Recipe, gpu_gib: float, tokens: int, layout: Layout, blocks: int
) -> None:
    gpu_bytes = int(gpu_gib * GIB)
    memory = layout.memory(recipe, tokens, False)
    kept = unpacked_blocks(recipe, MicroBatch(tokens, False, memory), layout, gpu_bytes)
    assert kept == blocks
    held = 2 * recipe.shape.linear_parameters // recipe.shape.num_hidden_layers * kept
    assert kept == 0 or memory.total + held + 2 * GIB <= usable_bytes(gpu_bytes)
