"""The work of a run: its base's shape, the number of posts from the index, and their tokens from a
sample.

Some 2,000 posts (0.2 MB) are read and tokenised with the base's own tokenizer; the data set is
shuffled as a whole, so any posts will do. Only config.json and the tokenizer of the base are
fetched, never a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from emotion_train.bases.architecture import text_model
from emotion_train.bases.depth import Layers, blocks_read
from emotion_train.bases.files import BaseFiles
from emotion_train.config import Config, Precision
from emotion_train.data.index import Index, Split, read_index
from emotion_train.data.lengths import Cut, Lengths, estimated, tokens_in
from emotion_train.data.packing import GPU_FILL, bins, deal
from emotion_train.edges import hub
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.sizing.memory import is_fused
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.gpus import GpuKind

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer

_MOST_STEPS_TRIED = 16
_LONGEST_SHARE_TRIED = 20_000  # posts


Step = list[list[int]]  # one list for each GPU


@dataclass(frozen=True)
class Work:
    """The work of a run. `lengths`: tokens of some training posts after the cut, in any order."""

    train_posts: int
    scored_posts: int  # in all evaluations and the final report together
    epochs: int
    global_batch_size: int
    lengths: tuple[int, ...]
    labels: int
    max_length: int
    cut: Cut | None = None  # how much max_length cuts of the posts; None where it is not known
    cut_is_estimated: bool = False  # without the base's tokenizer
    estimate: str | None = None  # why the lengths are estimated from characters; None: by the tokenizer
    max_steps: int | None = None
    labelled_posts: int | None = None  # so many posts are labelled instead of a training

    def to_label(self, posts: int) -> Work:
        """The work of labelling so many posts that are as long as these."""
        return replace(self, epochs=0, scored_posts=posts, labelled_posts=posts)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = -(-self.train_posts // self.global_batch_size) * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    def shares(self, gpus: int) -> list[Step]:
        """Some steps as the lengths of each GPU's posts, made once for each number of GPUs; all
        kinds of GPU share them.
        """
        if gpus not in self._shares:
            self._shares[gpus] = list(self._dealt(gpus))
        return self._shares[gpus]

    def packs(self, gpus: int, tokens: int) -> list[Step]:
        """The same steps as the computed tokens of each GPU's packs."""
        if (gpus, tokens) not in self._packs:
            self._packs[gpus, tokens] = [
                [filled(posts, tokens) for posts in step] for step in self.shares(gpus)
            ]
        return self._packs[gpus, tokens]

    @cached_property
    def _shares(self) -> dict[int, list[Step]]:
        return {}

    @cached_property
    def _packs(self) -> dict[tuple[int, int], list[Step]]:
        return {}

    def _dealt(self, gpus: int) -> Iterator[Step]:
        size = min(self.global_batch_size, self.train_posts, _LONGEST_SHARE_TRIED)
        for step in range(max(1, min(_MOST_STEPS_TRIED, len(self.lengths) // size))):
            posts = [self.lengths[(step * size + place) % len(self.lengths)] for place in range(size)]
            yield [[posts[index] for index in group] for group in deal(posts, gpus)]


def filled(posts: Sequence[int], tokens: int) -> list[int]:
    """Computed tokens of each pack of posts with these lengths."""
    return [
        min(math.ceil(sum(posts[i] for i in group) / GPU_FILL) * GPU_FILL, max(tokens, GPU_FILL))
        for group in bins(posts, tokens)
    ]


_SAMPLE_POSTS = 2048
# shapes of published checkpoints, so that a plan for the default base needs no network
_KNOWN_SHAPES = {
    f"mistralai/Mistral-Small-3.1-24B-{kind}-2503": Shape(5120, 32_768, 40, 32, 8, 128, 131_072)
    for kind in ("Base", "Instruct")
}


def shape_of_base(base: str, layers: Layers | None = None) -> Shape:
    """The shape of the base, or of its first `layers` blocks, from its config.json or GGUF header.
    Raises `WrongRequest` where it cannot be read, or has fewer blocks.
    """
    if (known := _KNOWN_SHAPES.get(base)) is None:
        return Shape.of(text_model(BaseFiles.find(base, layers)).values)
    blocks = known.num_hidden_layers
    return replace(known, num_hidden_layers=blocks_read(base, layers, blocks, blocks))


def config_on(config: Config, kind: GpuKind | None) -> Config:
    """The config with the decoder that the trainer uses on this kind of GPU: without bfloat16 units
    the fused decoder does not run.
    """
    if kind is None or kind.bf16 or config.model.decoder == "stock":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"decoder": "stock"})})


def precision_of_base(base: str, asked: Precision | None) -> Precision | None:
    """The precision to plan with: nf4 where the base is staged in nf4, else the one asked for.
    Raises `WrongRequest` where the two differ.
    """
    staged = None if base in _KNOWN_SHAPES else BaseFiles.find(base).staged
    if staged is None or staged.index.precision != "nf4":
        return asked
    staged.refuse_other_precision(asked or "nf4")
    return "nf4"


def refuse_unfused_fp8(config: Config, shape: Shape, option: str) -> None:
    """Raises `WrongRequest` where the fused decoder, which alone computes fp8, is switched off or
    does not know the base; `option` is the text before `fp8` in the message.
    """
    if config.model.decoder == "stock":
        raise WrongRequest(
            f"{option}fp8 needs the fused decoder and model.decoder is stock; leave model.decoder out, or"
            f" type {option}bf16."
        )
    if not is_fused(shape, "fp8"):
        raise WrongRequest(
            f"{option}fp8 needs a Llama or Mistral base and {config.model.base} is of another kind; type"
            f" {option}bf16, or {option}nf4 for a quarter of its memory."
        )


def work_of(config: Config, index: Index, store: Store, tokens_per_post: float | None) -> Work:
    """The work of the run. With `tokens_per_post` every post counts so many tokens and no post is
    read.

    Raises `WrongRequest` for a base that the trainer would refuse.
    """
    train, most = index.training, config.data.max_length
    estimate = None
    if tokens_per_post is not None:
        whole = [round(tokens_per_post)]
        _refuse_untrainable(config)
    else:
        whole, estimate = sample_lengths(config, train, store)
    known = estimated(index.source) if tokens_per_post is not None else Lengths.of(whole)
    held_out = {name: split.rows for name, split in index.splits.items() if name != "train"}
    return Work(
        train_posts=train.rows,
        scored_posts=_evaluations(config, train.rows) * held_out.get("validation", 0)
        + sum(held_out.values())
        + _old_posts(config),
        epochs=config.train.epochs,
        global_batch_size=config.train.global_batch_size,
        lengths=tuple(min(most, max(1, length)) for length in whole),
        labels=len(index.trained_labels),
        max_length=most,
        cut=None if known is None else Cut.of(known, most),
        cut_is_estimated=tokens_per_post is not None or estimate is not None,
        estimate=estimate,
        max_steps=config.train.max_steps,
    )


def _old_posts(config: Config) -> int:
    """The old posts of the adapter from which the run trains on, which the report scores too."""
    if config.report.old_data is None:
        return 0
    splits = read_index(open_store(config.report.old_data)).splits
    return next((splits[name].rows for name in ("test", "validation") if name in splits), 0)


def _evaluations(config: Config, train_posts: int) -> int:
    """How many evaluations a run makes before its report: at the end of each epoch, at the last
    step, and every so many steps.
    """
    per_epoch = -(-train_posts // config.train.global_batch_size)
    steps, every = config.train.steps(train_posts), config.evaluation.every_steps
    evaluations, last = steps // per_epoch, steps % per_epoch == 0
    if every is not None:  # one that falls on the end of an epoch is made once
        evaluations += steps // every - steps // math.lcm(every, per_epoch)
        last = last or steps % every == 0
    return evaluations if last else evaluations + 1


def _refuse_untrainable(config: Config) -> None:
    """Raises `WrongRequest` for a base that the trainer would refuse before it reads a tokenizer;
    refuses nothing where hub or bucket do not answer.
    """
    from emotion_train.model.trainable import require_trainable_weights

    if config.model.base in _KNOWN_SHAPES:
        return
    try:
        files = BaseFiles.find(config.model.base, config.model.layers)
        require_trainable_weights(files, None, config.data.max_length)
    except StorageError as error:
        if not error.transient:
            raise


def sample_lengths(config: Config, split: Split, store: Store) -> tuple[list[int], str | None]:
    """Tokens of some whole posts, before `data.max_length` cuts them, and None. Where hub or bucket
    do not answer, an estimate from the posts' characters and the reason.
    """
    try:
        return lengths_by(_tokenizer_of(config), split, store), None
    except (WrongRequest, StorageError) as error:
        away = isinstance(error, StorageError) and error.transient
        if away or (isinstance(error, WrongRequest) and hub.is_offline()):
            return [tokens_in(text) for text in _sample(split, store)], str(error)
        error.args = (f"{error} Or type --tokens-per-post N, the mean, to plan without the tokenizer.",)
        raise


def _tokenizer_of(config: Config) -> PostTokenizer:
    """The base's tokenizer; raises where the trainer would refuse the base. For a base of known
    shape only the tokenizer is fetched.
    """
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.trainable import require_trainable_base

    base, most = config.model.base, config.data.max_length
    if base in _KNOWN_SHAPES:
        return PostTokenizer.load(base, most)
    return require_trainable_base(BaseFiles.find(base, config.model.layers), None, most).tokenizer


def lengths_by(tokenizer: PostTokenizer, split: Split, store: Store) -> list[int]:
    """Tokens of some whole posts."""
    return [len(ids) for ids in tokenizer.encode_whole(_sample(split, store))]


def _sample(split: Split, store: Store) -> list[str]:
    from emotion_train.data.reader import sample_texts

    return sample_texts(store, split, _SAMPLE_POSTS)[:_SAMPLE_POSTS]
