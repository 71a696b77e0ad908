"""Measures how far an export's answers differ from the adapter's in the training's number format,
on the same validation posts.

Both models are in memory, one after the other, on the GPU where there is one; this is the one part
of an export that needs more than a few blocks of rows.

Letters: N posts, C labels.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from emotion_train.bases.encoders import head_of
from emotion_train.config import Precision
from emotion_train.data.index import INDEX_KEY, read_index
from emotion_train.errors import ObjectNotFound, StorageError, WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, load_with_progress
from emotion_train.evaluation.decision import Decision
from emotion_train.evaluation.floors import posts
from emotion_train.evaluation.scoring import Probabilities, probabilities_of
from emotion_train.exporting.merge import AnyMerge, ExportDtype, InMemory
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import BaseConfig, fill, skeleton
from emotion_train.processes.machine import memory_of, memory_of_host
from emotion_train.runs.origin import NotInReach, Origin
from emotion_train.sizing.memory import GIB
from emotion_train.storage.open import open_store

SPLIT = "validation"
_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 2.0, "nf4": 0.6}  # for each weight


@dataclass(frozen=True)
class Change:
    """The change over `posts` posts: the largest absolute difference of a probability, and how many
    posts got another answer.
    """

    posts: int
    precision: Precision
    dtype: ExportDtype
    largest: float
    answers: int

    @classmethod
    def of(
        cls,
        before_NC: Probabilities,
        after_NC: Probabilities,
        decision: Decision,
        precision: Precision,
        dtype: ExportDtype,
    ) -> Change:
        other_N = (decision.answers(before_NC) != decision.answers(after_NC)).any(axis=1)
        largest = float(np.abs(before_NC - after_NC).max())
        return cls(len(before_NC), precision, dtype, largest, int(other_N.sum()))

    def sentence(self) -> str:
        """The change in words, for the terminal and the card."""
        answers = "1 post got another answer" if self.answers == 1 else f"{self.answers:,} posts got another"
        return (
            f"over {self.posts:,} {SPLIT} posts a probability differs by {self.largest:.2g} at most between"
            f" the adapter on its {self.precision} base and this {self.dtype} export, and"
            f" {answers if self.answers == 1 else answers + ' answer'}"
        )


def posts_to_compare(origin: Origin, count: int) -> list[str]:
    """Texts of the first `count` validation posts of the adapter's data set. Raises `NotInReach`
    where they cannot be read.
    """
    if origin.data_url is None:
        raise NotInReach("the place of its data set is not known")
    try:
        store = open_store(origin.data_url)
        store.stat(INDEX_KEY)
        index = read_index(store)
        if index.sha256() != origin.index_sha256:
            raise NotInReach(f"{origin.data_url} is not the data set that this adapter was trained on")
        return [text for _, text, _ in islice(posts(store, index.split(SPLIT)), count)]
    except ObjectNotFound as error:
        raise NotInReach(f"there is no data set at {origin.data_url}") from error
    except (WrongRequest, StorageError) as error:
        raise NotInReach(str(error).rstrip(".")) from error


def require_memory(parameters: int, precision: Precision, dtype: ExportDtype, device: torch.device) -> None:
    """Raises `NotInReach` unless each of the two models fits the machine's GPU, or its memory."""
    needed = int(1.1 * parameters * max(_BYTES[precision], _BYTES[dtype])) + GIB
    there = memory_of(device) if device.type == "cuda" else memory_of_host()
    if there is not None and needed > there:
        what = "GPU" if device.type == "cuda" else "machine"
        raise NotInReach(f"this {what} has {there / GIB:.1f} GiB, and the models need {needed / GIB:.1f} GiB")


def measure(
    chosen: AdapterChoice,
    base: BaseConfig,
    merge: AnyMerge,
    dtype: ExportDtype,
    decision: Decision,
    texts: Sequence[str],
) -> Change:
    """The change from the `chosen` adapter to its merged weights."""
    loaded = load_with_progress(chosen)
    tokenizer, device, precision = loaded.tokenizer, loaded.model.device, loaded.model.precision
    capacity = max(chosen.tokens_per_microbatch, tokenizer.max_length)

    def answers(model: nn.Module) -> Probabilities:
        labels, targets = len(decision.labels), decision.targets
        return probabilities_of(model, tokenizer, texts, capacity, device, labels, targets)

    before_NC = answers(loaded.model)
    del loaded  # the merged model needs its memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    after_NC = answers(_merged_model(base, merge, dtype, device))
    return Change.of(before_NC, after_NC, decision, precision, dtype)


def _merged_model(base: BaseConfig, merge: AnyMerge, dtype: ExportDtype, device: torch.device) -> nn.Module:
    if isinstance(merge, InMemory):
        state = {one.name: one.whole().float() for one in merge.tensors()}
        network = skeleton(base.text, len(state[f"{head_of(base.text.model_type)}.weight"]))
        fill(network, state.items(), dtype, device)
        return EmotionClassifier(network, dtype).eval()
    network = skeleton(base.text, len(merge.head))
    tensors = merge.tensors()
    next(tensors)  # the head, which is not a part of the base
    fill(network, ((one.name, one.whole()) for one in tensors), dtype, device)
    with torch.no_grad():
        network.score.weight.copy_(merge.head)
    return EmotionClassifier(network, dtype).eval()
