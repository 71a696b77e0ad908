"""Settings that would be faster than a plan's best, at a price in quality that no plan knows: fewer
blocks of the base, and more posts a step.

Both change what is learned, so a plan shows them and never chooses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from emotion_train.config import Config
from emotion_train.sizing.shape import Shape
from launch.plan.choices import Choice, Faster, best_settings
from launch.plan.spot import Spot
from launch.workload import Work

SHARES = (0.77, 0.5)  # of the blocks; benchmarks/quality.md
_TIMES = (2, 4, 8, 16)  # as many posts a step
_NEAR = 0.95  # of the fastest; still larger steps change the training and gain nothing
_WORTH_TELLING = 1.1  # times the speed


def faster_than(config: Config, shape: Shape, work: Work, best: Choice, spot: Spot) -> tuple[Faster, ...]:
    """Fewer blocks on the best choice's GPUs, and larger steps where they gain; nothing for
    labelling.
    """
    if work.labelled_posts is not None:
        return ()
    larger = larger_steps(config, shape, work, best, spot)
    return (*_fewer_blocks(config, shape, work, best, spot), *([larger] if larger is not None else []))


def _fewer_blocks(config: Config, shape: Shape, work: Work, best: Choice, spot: Spot) -> Iterator[Faster]:
    if config.model.layers is not None:
        return
    for share in SHARES:
        layers = round(share * shape.num_hidden_layers)
        if 1 <= layers < shape.num_hidden_layers:
            found = _on_its_gpus(config, replace(shape, num_hidden_layers=layers), work, best, spot)
            if found is not None:
                yield Faster(f"model.layers={layers}", found)


def larger_steps(config: Config, shape: Shape, work: Work, best: Choice, spot: Spot) -> Faster | None:
    """The smallest step size that is nearly as fast as any larger one; None where it gains
    little.
    """
    sizes = [times * work.global_batch_size for times in _TIMES]
    choices = {
        size: _on_its_gpus(config, shape, replace(work, global_batch_size=size), best, spot)
        for size in sizes
        if size <= work.train_posts
    }
    speeds = {size: found.posts_per_second for size, found in choices.items() if found is not None}
    near = [size for size, speed in speeds.items() if speed >= _NEAR * max(speeds.values())]
    found = choices[min(near)] if near else None
    if found is None or found.posts_per_second < _WORTH_TELLING * best.posts_per_second:
        return None
    return Faster(f"train.global_batch_size={min(near)}", found)


def _on_its_gpus(config: Config, shape: Shape, work: Work, best: Choice, spot: Spot) -> Choice | None:
    found = best_settings(config, shape, work, best.kind, best.count, best.offer, spot, best.precision)
    return found if isinstance(found, Choice) else None


def larger_steps_words(work: Work, best: Choice, larger: Faster) -> str:
    """`… would train 388 posts/s on H100:1 in place of …`."""
    return (
        f"{larger.word} would train {larger.choice.posts_per_second:,.0f} posts/s on {best.name} in place of"
        f" {best.posts_per_second:,.0f} with steps of {work.global_batch_size} (it changes the training)"
    )
