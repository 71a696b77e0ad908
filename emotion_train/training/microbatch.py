"""Chooses the tokens of a forward pass for `train.tokens_per_microbatch: auto`: as many as fit the
GPU, by arithmetic.

The choice is made once, before weights and loaders, the same on all ranks; nothing is tried until a
memory error comes. On a CPU it is the default. Learning does not depend on it, so that a resumed
run may take another number on another GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from emotion_train.config import DEFAULT_TOKENS_PER_MICROBATCH, Config
from emotion_train.data.index import Index
from emotion_train.data.reader import sample_texts
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.load import BaseConfig
from emotion_train.processes.machine import memory_of
from emotion_train.processes.ranks import Ranks
from emotion_train.sizing.fit import (
    Layout,
    Misfit,
    Request,
    fit,
    least_of,
    tokens_to_fill,
    unpacked_blocks,
)
from emotion_train.sizing.memory import GIB
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.storage.store import Store
from emotion_train.training.engines import Kind, shards_weights

if TYPE_CHECKING:
    from emotion_train.training.job import Job

_SAMPLE_POSTS = 512
_UNUSUAL_STEP = 3.0  # standard deviations above the mean up to which a step still fits one micro-batch


@dataclass(frozen=True)
class Setting:
    """The choice, and the reason in words for a person."""

    tokens: int
    gradient_checkpointing: bool
    why: str


def settle(
    config: Config,
    base: BaseConfig,
    index: Index,
    store: Store,
    tokenizer: PostTokenizer,
    engine: Kind,
    ranks: Ranks,
    device: torch.device,
    say: Callable[[str], None],
    on_main: Callable[[Callable[[], Setting]], Setting] | None = None,
    read: Callable[[torch.device], int] = memory_of,
) -> Config:
    """The config with a number in place of `auto`, the same on all ranks; a config with a number
    comes back unchanged.

    `on_main` runs the choice on rank 0 with patience for the data set, from which some posts are
    read. `read` returns how many bytes of this rank's GPU the run may use. Raises `WrongRequest` on
    all ranks, with the nearest setting that fits, where the base does not fit the smallest GPU.
    """
    if config.train.tokens_per_microbatch != "auto":
        return config
    available = ranks.gather(read(device) if device.type == "cuda" else None)

    def choose() -> Setting:
        gpus = [one for one in available if one is not None]
        if not gpus:
            tokens = max(DEFAULT_TOKENS_PER_MICROBATCH, config.data.max_length)
            return Setting(
                tokens, config.train.gradient_checkpointing, "the default, since there is no GPU to fill"
            )
        shape = Shape.of(base.text.to_dict())
        split = index.training
        lengths = [len(ids) for ids in tokenizer.encode(sample_texts(store, split, _SAMPLE_POSTS))]
        share = tokens_of_a_step(config, lengths, split.rows, ranks.world_size)
        return setting_for(
            config, shape, len(index.trained_labels), min(gpus), share, engine, ranks.world_size
        )

    setting = (on_main or ranks.on_main)(choose)
    if ranks.is_main:
        again = "with" if setting.gradient_checkpointing else "without"
        say(
            f"micro-batches of {setting.tokens:,} tokens {again} recomputation (tokens_per_microbatch is"
            f" auto): {setting.why}"
        )
    update = {
        "tokens_per_microbatch": setting.tokens,
        "gradient_checkpointing": setting.gradient_checkpointing,
    }
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def tokens_of_a_step(config: Config, lengths: Sequence[int], posts: int, world_size: int) -> int:
    """What one rank has to compute in a step, in nearly all of them."""
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    share = math.ceil(min(config.train.global_batch_size, posts) / world_size)
    return math.ceil(share * mean + _UNUSUAL_STEP * math.sqrt(share) * spread)


def setting_for(
    config: Config, shape: Shape, labels: int, gpu_bytes: int, share: int, engine: Kind, world_size: int
) -> Setting:
    """The setting for a GPU that reports `gpu_bytes` and has `share` tokens to compute a step.
    Raises `WrongRequest` where nothing fits.
    """
    request = Request.of(config, _recipe(config, shape, labels, engine))
    most = tokens_to_fill(share, config.data.max_length)
    found = fit(request, gpu_bytes, (_layout(engine, world_size),), most)
    if isinstance(found, Misfit):
        raise WrongRequest(str(found))
    setting = found.setting
    fills = "all that a step has here" if setting.tokens >= share else f"a step has {share:,} here"
    return Setting(
        setting.tokens,
        setting.gradient_checkpointing,
        f"{setting.memory} of the GPU's {gpu_bytes / GIB:.1f}; {fills}",
    )


def sizes_of(job: Job, config: Config | None = None) -> tuple[Request, Layout]:
    """What the run asks of each GPU, by its own config or another one, and what its engine shards
    over them.
    """
    config, shape = config or job.config, Shape.of(job.base.text.to_dict())
    recipe = _recipe(config, shape, len(job.index.trained_labels), job.engine)
    return Request.of(config, recipe), _layout(job.engine, job.ranks.world_size)


def blocks_to_unpack(job: Job, gpu_bytes: int) -> int:
    """The number of blocks that the run keeps unpacked on a GPU which reports `gpu_bytes`."""
    request, layout = sizes_of(job)
    return unpacked_blocks(request.recipe, least_of(request, layout), layout, gpu_bytes)


def _recipe(config: Config, shape: Shape, labels: int, engine: Kind) -> Recipe:
    """The recipe as the engine computes it: ZeRO-3 by transformers' modules."""
    recipe = Recipe.of(config, shape, labels)
    return replace(recipe, decoder="stock") if engine == "DeepSpeed ZeRO-3" else recipe


def _layout(engine: Kind, world_size: int) -> Layout:
    if shards_weights(engine):
        return Layout(world_size, "base")
    return Layout(world_size, "optimizer" if engine == "DeepSpeed ZeRO-2" else "nothing")
