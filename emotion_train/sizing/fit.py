"""Decides whether a training fits a GPU, and which setting would fit: one answer, in one sentence,
for plan, check, run, the trainer and predict.

All of them count `usable_bytes` of a GPU. The cheapest remedy comes first: fewer tokens a
micro-batch while `WORTHWHILE_TOKENS` remain, recomputation, still fewer tokens, a base in 4 bits, a
base sharded over the GPUs; at last a smaller base or a larger GPU. The price of one limit: a
setting that exceeds it by less than the estimate's error is refused, though it may have run;
`emotion-launch run --accelerate-config` and `accelerate launch` try a number of tokens all the
same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from emotion_train.config import Config
from emotion_train.sizing.memory import (
    GIB,
    MemoryEstimate,
    estimate,
    is_recorded,
    usable_bytes,
    uses_fused,
    weight_bytes,
)
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Precision, Shape

TOKEN_QUANTUM = 256  # matrix products are fastest with a multiple of so many rows
MOST_TOKENS = 16_384  # more bring no speed: the products reach their rate far below
# with fewer tokens, recomputing a larger micro-batch is faster than reading the weights so often
WORTHWHILE_TOKENS = 1024
SHARDED_BASE = "accelerate_configs/multi_gpu_fsdp2_qlora.yaml"
# the 24B unpacks for 35 ms of a step; with larger packs that is below 7 %, not worth the memory
_UNPACKING_COUNTS_TOKENS = 4096
_LEFT_FREE = 2 * GIB  # beside weights that are kept unpacked
_ERROR = 1.1  # factor on the estimate, where a run was out of memory
_LARGER_GPU = "a larger GPU (emotion-launch plan names those that fit)"


@dataclass(frozen=True)
class Layout:
    """GPUs of a run, one process each, and what is sharded over them."""

    gpus: int = 1
    sharded: Literal["nothing", "optimizer", "base"] = "nothing"

    @property
    def base_shards(self) -> int:
        return self.gpus if self.sharded == "base" else 1

    @property
    def optimizer_shards(self) -> int:
        return 1 if self.sharded == "nothing" else self.gpus

    def memory(self, recipe: Recipe, tokens: int, gradient_checkpointing: bool) -> MemoryEstimate:
        """The memory that each GPU needs."""
        return estimate(recipe, tokens, gradient_checkpointing, self.base_shards, self.optimizer_shards)

    def reserved(self, recipe: Recipe, tokens: int, gradient_checkpointing: bool) -> MemoryEstimate:
        """The memory with a second pool, for shapes that are not recorded yet, where passes are
        recorded.
        """
        memory = self.memory(recipe, tokens, gradient_checkpointing)
        pools = 2 if is_recorded(recipe, self.gpus, gradient_checkpointing) else 1
        return replace(memory, activations=pools * memory.activations, overhead=pools * memory.overhead)


def layouts(gpus: int, is_encoder: bool = False) -> tuple[Layout, ...]:
    """The layouts of so many GPUs, the one that moves least first: the adapter's gradients, the
    gradients sharded, the base in every micro-batch. An encoder is never sharded.
    """
    if gpus == 1 or is_encoder:
        return (Layout(gpus),)
    return Layout(gpus), Layout(gpus, "optimizer"), Layout(gpus, "base")


@dataclass(frozen=True)
class Request:
    """The request of a run. `max_length`: tokens of its longest post. `tokens` of a micro-batch and
    `gradient_checkpointing` are None where the config leaves them open.
    """

    base: str
    recipe: Recipe
    max_length: int
    tokens: int | None = None
    gradient_checkpointing: bool | None = None

    @classmethod
    def of(cls, config: Config, recipe: Recipe) -> Request:
        train = config.train
        asked = "gradient_checkpointing" in train.model_fields_set
        return cls(
            config.model.base,
            recipe,
            config.data.max_length,
            None if train.tokens_per_microbatch == "auto" else train.tokens_per_microbatch,
            train.gradient_checkpointing if asked else None,
        )


@dataclass(frozen=True)
class MicroBatch:
    """`tokens` of one forward pass, and whether the blocks are recomputed in the backward pass."""

    tokens: int
    gradient_checkpointing: bool
    memory: MemoryEstimate


@dataclass(frozen=True)
class Fit:
    """The setting to take, and `least`, the memory that it needs at least: with one post, where the
    tokens are left open. `passed_over` are the layouts tried before, with the memory they would
    need.
    """

    setting: MicroBatch
    layout: Layout
    least: MemoryEstimate
    at_least: bool
    usable: int  # bytes
    passed_over: tuple[tuple[Layout, MemoryEstimate], ...] = ()

    def __str__(self) -> str:
        return (
            f"needs {'at least ' if self.at_least else ''}{self.least} of the {self.usable / GIB:.1f} GiB"
            " usable on each GPU"
        )


@dataclass(frozen=True)
class Misfit:
    """The request, the memory that it needs on each GPU, and the nearest setting that fits.

    `words`: the overrides to type, empty where no setting helps. `ran_out`: the run was tried, and
    the GPU ran out of memory although the estimate fits.
    """

    request: Request
    layout: Layout
    setting: MicroBatch
    gpu_bytes: int
    words: tuple[str, ...]
    ran_out: bool = False

    @property
    def remedy(self) -> str:
        if self.words:
            return f"type {' '.join(self.words)}"
        return f"take a smaller model.base, or {_LARGER_GPU}"

    def __str__(self) -> str:
        request, layout = self.request, self.layout
        if request.tokens is None:
            setting = f"even with one post of {request.max_length:,} tokens at a time"
        else:
            setting = f"with {request.tokens:,} tokens a micro-batch"
        setting += " and recomputation" if self.setting.gradient_checkpointing else ""
        setting += f", the {layout.sharded} sharded," if layout.sharded != "nothing" else ""
        verdict, needs = (
            ("ran out of the memory of", "was to need") if self.ran_out else ("does not fit", "needs")
        )
        return (
            f"{request.base} in {request.recipe.precision} {verdict} {_gpus(layout.gpus, self.gpu_bytes)}:"
            f" {setting} it {needs} {_of_usable(self.setting.memory.total, self.gpu_bytes)}; {self.remedy}."
        )


def fit(
    request: Request, gpu_bytes: int, allowed: Sequence[Layout], most_tokens: int = MOST_TOKENS
) -> Fit | Misfit:
    """The first of the allowed layouts that fits GPUs which report `gpu_bytes`, with its setting:
    the requested one, else the largest micro-batch of up to `most_tokens` tokens.
    """
    usable = usable_bytes(gpu_bytes)
    passed_over: list[tuple[Layout, MemoryEstimate]] = []
    for layout in allowed:
        least = least_of(request, layout)
        if least.memory.total <= usable:
            setting = (
                _largest_asked(request, layout, usable, most_tokens) if request.tokens is None else least
            )
            assert setting is not None, "one post fits"
            return Fit(
                setting,
                layout,
                layout.memory(request.recipe, least.tokens, least.gradient_checkpointing),
                request.tokens is None,
                usable,
                tuple(passed_over),
            )
        passed_over.append((layout, least.memory))
    return Misfit(request, layout, least, gpu_bytes, _words(request, usable, allowed))


def ran_out(request: Request, gpu_bytes: int, layout: Layout) -> Misfit:
    """The answer for a run that was out of memory: the misfit of `fit`, or where the estimate fits,
    a setting that needs less by more than the estimate's error.
    """
    taken, usable = least_of(request, layout), usable_bytes(gpu_bytes)
    fitted = taken.memory.total <= usable
    less = int(taken.memory.total / _ERROR) if fitted else usable
    return Misfit(request, layout, taken, gpu_bytes, _words(request, less, (layout,)), ran_out=fitted)


def least_of(request: Request, layout: Layout) -> MicroBatch:
    """The requested setting; where the tokens are left open, one post, with a second pool where
    passes are recorded.
    """
    recipe, asked = request.recipe, request.gradient_checkpointing
    if request.tokens is not None:
        return MicroBatch(request.tokens, bool(asked), layout.memory(recipe, request.tokens, bool(asked)))
    settings = (
        MicroBatch(
            request.max_length,
            again,
            layout.reserved(recipe, request.max_length, again),
        )
        for again in ((False, True) if asked is None else (asked,))
    )
    return min(settings, key=lambda setting: setting.memory.total)


def _words(request: Request, usable: int, allowed: Sequence[Layout]) -> tuple[str, ...]:
    """The words to type for the nearest setting that fits; empty where none fits."""
    precisions: tuple[Precision, ...] = tuple(dict.fromkeys((request.recipe.precision, "nf4")))
    for precision in precisions:
        if (changes := _changes(request, precision, usable, allowed)) is not None:
            return changes
    sharded = Layout(allowed[0].gpus, "base")
    if sharded.gpus == 1 or sharded in allowed:
        return ()
    for precision in precisions:
        if (changes := _changes(request, precision, usable, (sharded,))) is not None:
            return (f"--config_file {SHARDED_BASE}", *(("and", *changes) if changes else ()))
    return ()


def _changes(
    request: Request, precision: Precision, usable: int, allowed: Sequence[Layout]
) -> tuple[str, ...] | None:
    """The words that make the request fit one of the layouts in this precision; None where none
    do.
    """
    asked, tokens = request.gradient_checkpointing, request.tokens
    changed = replace(
        request,
        recipe=replace(request.recipe, precision=precision),
        gradient_checkpointing=True if asked else None,
    )
    for layout in allowed:
        setting = _largest_asked(changed, layout, usable, tokens or MOST_TOKENS)
        if setting is None:
            continue
        words = [f"model.precision={precision}"] if precision != request.recipe.precision else []
        if setting.gradient_checkpointing and not asked and not (asked is None and tokens is None):
            words.append("train.gradient_checkpointing=true")
        if tokens not in (None, setting.tokens):
            words.append(f"train.tokens_per_microbatch={setting.tokens}")
        return tuple(words)
    return None


def unpacked_blocks(recipe: Recipe, setting: MicroBatch, layout: Layout, gpu_bytes: int) -> int:
    """The number of blocks of an nf4 base that a GPU which reports `gpu_bytes` can also hold in
    bfloat16, beside the memory of training with this setting and `_LEFT_FREE`. 0 where none are
    kept, also with packs so large that it gains little.
    """
    if layout.base_shards > 1 or setting.tokens > _UNPACKING_COUNTS_TOKENS:
        return 0
    if not (recipe.keeps_unpacked and recipe.precision == "nf4" and uses_fused(recipe)):
        return 0
    taken = layout.reserved(recipe, setting.tokens, setting.gradient_checkpointing)
    room = usable_bytes(gpu_bytes) - taken.total - _LEFT_FREE
    blocks = recipe.shape.num_hidden_layers
    return max(0, min(blocks, room // (2 * recipe.shape.linear_parameters // blocks)))


# --- the largest micro-batch ---


def tokens_to_fill(share: int, longest_post: int) -> int:
    """The micro-batch size worth trying: all `share` tokens of a GPU in a step, rounded up to
    `TOKEN_QUANTUM`, within bounds.
    """
    whole = -(-max(share, longest_post) // TOKEN_QUANTUM) * TOKEN_QUANTUM
    return max(longest_post, min(MOST_TOKENS, whole))


def largest_microbatch(
    recipe: Recipe,
    gpu_bytes: int,
    *,
    layout: Layout = Layout(),
    longest_post: int = 128,
    most_tokens: int = MOST_TOKENS,
    gradient_checkpointing: bool | None = None,
) -> MicroBatch | None:
    """The largest micro-batch for a GPU that reports `gpu_bytes`; None when not even one post of
    `longest_post` tokens fits.

    Recorded passes of small models (in one process) have a memory pool of their own, beside the
    pool of shapes that are not recorded yet. Unless `gradient_checkpointing` decides, nothing is
    recomputed where at least `WORTHWHILE_TOKENS` fit: recomputing costs half as much work again,
    and a small micro-batch reads the weights more often. Tokens are multiples of 256 below
    `most_tokens`.
    """
    request = Request("", recipe, longest_post, gradient_checkpointing=gradient_checkpointing)
    return _largest_asked(request, layout, usable_bytes(gpu_bytes), most_tokens)


def _largest_asked(request: Request, layout: Layout, usable: int, most_tokens: int) -> MicroBatch | None:
    asked = request.gradient_checkpointing
    if asked is not None:
        return _largest(request, layout, usable, most_tokens, asked)
    kept, again = (_largest(request, layout, usable, most_tokens, one) for one in (False, True))
    if kept is not None and (kept.tokens >= min(WORTHWHILE_TOKENS, most_tokens) or again is None):
        return kept
    return again or kept


def _largest(
    request: Request, layout: Layout, usable: int, most_tokens: int, again: bool
) -> MicroBatch | None:
    recipe = request.recipe

    def needed(tokens: int) -> int:
        return layout.reserved(recipe, tokens, again).total

    fitting = bisect_left(range(most_tokens + 1), True, key=lambda tokens: needed(tokens) > usable) - 1
    if fitting < request.max_length:
        return None
    whole = fitting // TOKEN_QUANTUM * TOKEN_QUANTUM if fitting >= TOKEN_QUANTUM else fitting
    tokens = max(whole, request.max_length)
    return MicroBatch(tokens, again, layout.memory(recipe, tokens, again))


# --- a trained adapter at work ---


def refusal_of_weights(base: str, shape: Shape, precision: Precision, gpu_bytes: int) -> str | None:
    """The sentence for a base whose weights alone do not fit a GPU that reports this memory; None
    where they fit.
    """
    needed, usable = weight_bytes(shape, precision), usable_bytes(gpu_bytes)
    if needed <= usable:
        return None
    smaller = precision != "nf4" and weight_bytes(shape, "nf4") <= usable
    remedy = "type --precision nf4" if smaller else f"type --device cpu, or take {_LARGER_GPU}"
    return (
        f"{base} in {precision} does not fit {_gpus(1, gpu_bytes)}: even without training it needs"
        f" {_of_usable(needed, gpu_bytes)}; {remedy}."
    )


def _gpus(count: int, gpu_bytes: int) -> str:
    each = f"{gpu_bytes / GIB:.1f} GiB"
    return f"a GPU of {each}" if count == 1 else f"{count} GPUs of {each} each"


def _of_usable(needed: int, gpu_bytes: int) -> str:
    """Both numbers, with enough digits to tell them apart."""
    usable = max(0, usable_bytes(gpu_bytes))
    digits = next(
        (digits for digits in (1, 2) if f"{needed / GIB:.{digits}f}" != f"{usable / GIB:.{digits}f}"), 3
    )
    return f"{needed / GIB:.{digits}f} GiB and {usable / GIB:.{digits}f} are usable"
