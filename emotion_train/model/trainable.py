"""Whether a base can be trained here, told before any weight is read: the one answer of the trainer
before its claim, of `check`, `plan` and `stage-base`.

It reads config.json, the tokenizer, and a few KiB of each file of weights, also from the hub and a
bucket; of a GGUF file its header. torch is not loaded. The price: one request for each file of
weights, some 2 s for a base of 20 files on the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emotion_train.bases.architecture import TextModel, refuse_other_tensors, text_model
from emotion_train.bases.encoders import ENCODER_PRECISIONS
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.headers import WeightFile, gguf_shapes, shapes_in, weight_files
from emotion_train.config import Precision
from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer


@dataclass(frozen=True)
class TrainableBase:
    """A base that can be trained. `weights` are the files that hold its text part."""

    files: BaseFiles
    model: TextModel
    weights: tuple[WeightFile, ...]
    tokenizer: PostTokenizer

    @property
    def bytes_to_download(self) -> int:
        """Bytes of weights to fetch before they are read; those of a bucket are never kept."""
        if self.files.staged is not None:
            return 0
        return sum(file.bytes for file in self.weights if not file.here)


def require_trainable_base(
    base: str | BaseFiles,
    precision: Precision | None = None,
    max_length: int | None = None,
    load_tokenizer: Callable[[], PostTokenizer] | None = None,
) -> TrainableBase:
    """The base, where it can be trained in this precision on posts of up to `max_length` tokens
    (None: of any length).

    Raises `WrongRequest` as `require_trainable_weights`, and for a tokenizer that cannot be read,
    whose ids go beyond the embedding or whose BOS token does not exist. Raises `StorageError` for
    hub and bucket, as `BaseFiles.file`.
    """
    files = BaseFiles.find(base) if isinstance(base, str) else base
    model, weights = require_trainable_weights(files, precision, max_length)
    tokenizer = _tokenizer(files, max_length) if load_tokenizer is None else load_tokenizer()
    if "roberta" in model.kind and tokenizer.pad_id != model.values["pad_token_id"]:
        first = model.values["pad_token_id"]
        raise WrongRequest(
            f"The base {files.name} counts positions from its pad_token_id {first}, and its tokenizer's"
            f" padding has the id {tokenizer.pad_id}; download both again."
        )
    _refuse_ids_beyond(files.name, tokenizer, model.vocab_size)
    return TrainableBase(files, model, weights, tokenizer)


def require_trainable_weights(
    files: BaseFiles, precision: Precision | None = None, max_length: int | None = None
) -> tuple[TextModel, tuple[WeightFile, ...]]:
    """The checks of `require_trainable_base` without the tokenizer.

    Raises `WrongRequest` for another architecture, quantised weights, a broken config.json, files
    that are missing, damaged or Git LFS pointers, tensors that do not fit the configuration, a
    staged copy in another precision, and posts longer than the base's positions.
    """
    model = text_model(files)
    if max_length is not None and max_length > model.positions:
        raise WrongRequest(
            f"data.max_length is {max_length} and the base {files.name} was made for texts of up to"
            f" {model.positions} tokens; type data.max_length={model.positions} or less, or take another"
            " base."
        )
    if model.is_encoder and precision not in (None, *ENCODER_PRECISIONS):
        raise WrongRequest(
            f"model.precision is {precision} and the base {files.name} is an encoder, which is held in"
            " float32 whatever it is computed in; type model.precision=bf16, or fp32 on a CPU."
        )
    if files.staged is not None and precision is not None:
        files.staged.refuse_other_precision(precision)
    weights = weight_files(files, model.layers)
    shapes = shapes_in(weights)
    if model.gguf is not None:
        model.gguf.require_readable()
        shapes = gguf_shapes(model.kind, model.gguf.tensors, model.layers)
    refuse_other_tensors(files.name, model, shapes)
    return model, weights


def _tokenizer(files: BaseFiles, max_length: int | None) -> PostTokenizer:
    from emotion_train.config import LARGEST_MAX_LENGTH
    from emotion_train.data.tokenization import PostTokenizer

    return PostTokenizer.load(files, max_length or LARGEST_MAX_LENGTH)


def _refuse_ids_beyond(base: str, tokenizer: PostTokenizer, rows: int) -> None:
    if (found := tokenizer.beyond(rows)) is None:
        return
    token, id_ = found
    raise WrongRequest(
        f"The tokenizer of the base {base} has the token {token[:40]!r} with the id {id_}, and the base has"
        f" {rows} rows of embedding, 0 to {rows - 1}; give the checkpoint that was enlarged for this"
        " tokenizer, or the tokenizer without its added tokens."
    )
