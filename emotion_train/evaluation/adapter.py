"""Makes a saved adapter ready to label posts: the choice of adapter and base, and the model on its
device.

Letters: N posts, C labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from emotion_train.bases.ahead import BaseAhead
from emotion_train.config import DEFAULT_TOKENS_PER_MICROBATCH, Precision
from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.model.facts import read_facts
from emotion_train.processes.machine import gpus_of_machine, room_ahead
from emotion_train.sizing.fit import refusal_of_weights
from emotion_train.sizing.shape import Shape

if TYPE_CHECKING:
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.scoring import Probabilities
    from emotion_train.model.ensemble import LoadedEnsemble
    from emotion_train.model.lora import LoadedAdapter

_MOST = 2**31 - 1
_AT_A_TIME = 1024  # posts


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter and how to load it; None takes the training's value.

    `adapter` is the value of --adapter; `open_classifier` takes a folder, which
    `emotion_train.runs.adapter_cache` makes from a URL.

    `device`: auto takes the GPU where there is one. `decoder`: stock computes by transformers'
    modules. `tokens_per_microbatch` are the tokens of one forward pass. `more` are adapters that
    answer together with this one, by the mean of their logits.
    """

    adapter: str | Path
    base: str | None = None
    precision: Precision | None = None
    decoder: Literal["fused", "stock"] = "fused"
    device: Literal["auto", "cpu"] = "auto"
    tokens_per_microbatch: int = DEFAULT_TOKENS_PER_MICROBATCH
    more: tuple[str | Path, ...] = ()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> AdapterChoice:
        """The choice by the options of `add_adapter_arguments`."""
        given = arguments.adapter if isinstance(arguments.adapter, list) else [arguments.adapter]
        names = [name for name in cls.__dataclass_fields__ if name not in ("adapter", "more")]
        return cls(given[0], more=tuple(given[1:]), **{name: getattr(arguments, name) for name in names})

    @property
    def adapters(self) -> tuple[str | Path, ...]:
        """All adapters that answer together."""
        return (self.adapter, *self.more)


@dataclass(frozen=True)
class Prediction:
    """The answer to a post, and the probability of each of the adapter's labels.

    `labels` is the label of the highest probability; with an adapter of several labels, all labels
    that reach their threshold, the likeliest first, possibly none. Probabilities sum to 1 unless
    there may be several labels. `accepted`: whether the answer can be acted upon at the requested
    precision; None where none was requested.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]
    accepted: bool | None = None

    @property
    def label(self) -> str | None:
        """The likeliest of `labels`; None where there is none."""
        return self.labels[0] if self.labels else None


class Classifier:
    """A loaded adapter, or `members` adapters that answer together. `decision` turns probabilities
    into answers, and `tokenizer` counts how many posts data.max_length cuts.
    """

    def __init__(
        self,
        loaded: LoadedAdapter | LoadedEnsemble,
        decision: Decision,
        tokens_per_microbatch: int,
        members: int = 1,
    ) -> None:
        from emotion_train.data.tokenization import CountingTokenizer

        self.loaded = loaded
        self.decision = decision
        self.members = members
        self.tokenizer = CountingTokenizer(loaded.tokenizer)
        # several adapters may share one pass, each with a repetition of the pack
        self.capacity = max(tokens_per_microbatch // members, loaded.tokenizer.max_length)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in the order of their ids."""
        return tuple(self.loaded.labels)

    @property
    def targets(self) -> TargetKind:
        """What a post is answered with."""
        return self.loaded.facts.targets

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """`prob_NC` of texts that are mended already, in their order."""
        from emotion_train.evaluation.scoring import probabilities_of

        model = self.loaded.model
        return probabilities_of(
            model, self.tokenizer, texts, self.capacity, model.device, len(self.labels), self.targets
        )

    def answers(self, prob_NC: Probabilities) -> list[tuple[int, ...]]:
        """The labels that posts with these probabilities are answered with, the likeliest first."""
        return self.decision.ranked(prob_NC)

    def predict(
        self,
        texts: Sequence[str],
        *,
        unescape_html: bool = False,
        accept_precision: float | None = None,
        raw: bool = False,
    ) -> list[Prediction]:
        """One prediction a text, in their order; texts are mended as the posts of a training are.

        `accept_precision`: also say whether each answer is accepted, as `Decision.accepted` does.
        `raw`: give the probabilities without the temperature; answers stay. Raises `WrongRequest`
        for anything but a list of texts, for one that mending leaves empty, and where
        `Decision.accept_above` does.
        """
        from emotion_train.evaluation.unlabelled import mended

        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise WrongRequest('predict takes a list of texts; type predict(["what a lovely mess"]).')
        posts = list(mended(enumerate(texts), unescape_html=unescape_html))
        if len(posts) < len(texts):
            empty = min(set(range(len(texts))) - {post.row for post in posts})
            raise WrongRequest(f"texts[{empty}] has no text; leave it out.")
        if accept_precision is not None:
            self.decision.accept_above(accept_precision)  # before the model has worked
        predictions: list[Prediction] = []
        for start in range(0, len(posts), _AT_A_TIME):
            prob_NC = self.probabilities([post.text for post in posts[start : start + _AT_A_TIME]])
            accepted_N = self.decision.marks(prob_NC, accept_precision)
            shown_NC = self.decision.raw(prob_NC) if raw else prob_NC
            for prob_C, answer, accepted in zip(shown_NC, self.answers(prob_NC), accepted_N, strict=True):
                named = dict(zip(self.labels, map(float, prob_C), strict=True))
                predictions.append(Prediction(tuple(self.labels[label] for label in answer), named, accepted))
        return predictions

    def remark(self) -> str | None:
        """A sentence on how many texts so far data.max_length cut; None where they are few."""
        from emotion_train.data.lengths import cut_remark

        return cut_remark(self.tokenizer.lengths, self.tokenizer.max_length)


def add_adapter_arguments(
    parser: argparse.ArgumentParser, required: bool = True, several: str | None = None
) -> None:
    """Adds the options of an adapter. With `several`, the noun for what is averaged, --adapter may
    be given several times and is a list.
    """
    parser.add_argument(
        "--adapter",
        required=required,
        action="append" if several else "store",
        metavar="URL",
        help=(
            "published run (OUTPUT_URL/RUN_ID, s3://… or a folder), pulled into a cache and verified; or an"
            " adapter folder written by `emotion-launch pull`, or its copy in a bucket"
            f"{'' if several is None else f'; may be given several times: their {several} are averaged'}"
        ),
    )
    add_base_argument(parser)
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="format of the frozen base (default: as in training)"
    )
    parser.add_argument(
        "--decoder",
        choices=("fused", "stock"),
        default="fused",
        help="like model.decoder of a training: stock = transformers' modules (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="auto takes the GPU where there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-microbatch",
        type=positive,
        default=DEFAULT_TOKENS_PER_MICROBATCH,
        metavar="N",
        help="tokens of one forward pass (default: %(default)s)",
    )


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="BASE",
        help=(
            "folder, .gguf file, hub id or staged copy (s3://bucket/prefix) of the base model (default: the"
            " base of the training)"
        ),
    )


def add_file_arguments(parser: argparse.ArgumentParser, file: str = "--file") -> None:
    """Adds the options on reading a file that `prepare` has too; `file` names it in their help."""
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help=f"column of the post in {file} (default: text)"
    )
    parser.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help=f"encoding of {file} (default: utf-8)"
    )
    parser.add_argument(
        "--quoting",
        choices=("auto", "csv", "none"),
        default="auto",
        help="meaning of quotes in a CSV or TSV: csv, marks around a cell; none, letters (default: auto)",
    )
    parser.add_argument(
        "--max-chars",
        type=positive,
        default=20_000,
        metavar="N",
        help=f"longest post of {file} in characters (default: 20000)",
    )
    parser.add_argument(
        "--unescape-html",
        action="store_true",
        help="replace HTML entities (&amp;) by characters, where the adapter's posts were prepared so",
    )


def positive(word: str) -> int:
    # a longer word is not converted: Python raises its own error for a number of 5,000 digits
    if not word.isdecimal() or len(word) > 10 or not 1 <= int(word) <= _MOST:
        raise argparse.ArgumentTypeError(f"{word[:40]!r} is not a whole number from 1 to {_MOST}")
    return int(word)


def open_classifier(chosen: AdapterChoice, ahead: BaseAhead | None = None) -> Classifier:
    """The classifier of this adapter on its device. Raises as `read_decision` does, before anything
    is loaded, and as `load_with_progress` does, which takes `ahead`.
    """
    from emotion_train.evaluation.decision import read_decision
    from emotion_train.evaluation.members import averaged, facts_together

    folders = [Path(one) for one in chosen.adapters]
    facts = facts_together(folders)
    decisions = [read_decision(folder, one) for folder, one in zip(folders, facts, strict=True)]
    loaded = load_with_progress(chosen, ahead)
    return Classifier(loaded, averaged(decisions), chosen.tokens_per_microbatch, len(folders))


def base_ahead(chosen: AdapterChoice) -> BaseAhead:
    """Starts to read the base of this adapter while libraries are imported. Raises as `read_facts`
    does.
    """
    facts = read_facts(Path(chosen.adapter))
    # as many processes as the machine has GPUs may begin at once
    return BaseAhead(chosen.base or facts.base, facts.layers, room_ahead(gpus_of_machine()))


def load_with_progress(
    chosen: AdapterChoice, ahead: BaseAhead | None = None
) -> LoadedAdapter | LoadedEnsemble:
    """The adapter, or several, on the chosen device. `ahead` is the base where its reading has
    begun; otherwise it begins here. Raises `WrongRequest` for too small a GPU, and for a folder,
    base or precision that do not fit together.
    """
    if ahead is None:
        with base_ahead(chosen) as begun:
            return load_with_progress(chosen, begun)
    import torch

    from emotion_train.model.pieces_on_device import bring_to

    folder = Path(chosen.adapter)
    facts = read_facts(folder)
    device = torch.device("cuda" if chosen.device == "auto" and torch.cuda.is_available() else "cpu")
    precision = chosen.precision or facts.precision
    bring_to(ahead, device, precision)  # before transformers is imported

    from emotion_train.model.ensemble import load_ensemble
    from emotion_train.model.lora import base_config_of, load_adapter
    from emotion_train.processes.machine import memory_of
    from emotion_train.progress import ProgressLine

    base = base_config_of(facts, chosen.base if facts.lora is None else ahead.files(), folder)
    if device.type == "cuda":
        refuse_small_gpu(base.files.name, Shape.of(base.text.to_dict()), precision, memory_of(device))
    load: Callable[..., LoadedAdapter | LoadedEnsemble] = partial(load_adapter, folder)
    if chosen.more:
        load = partial(load_ensemble, [Path(one) for one in chosen.adapters])
    with ProgressLine("loading", 1, "tensors") as line:
        return load(
            base=base,
            precision=chosen.precision,
            fused=chosen.decoder == "fused",
            device=device,
            tell=lambda placed, total: line.update(placed, total=total),
        )


def refuse_small_gpu(base: str, shape: Shape, precision: Precision, gpu_bytes: int) -> None:
    """Raises `WrongRequest` where the base's weights alone do not fit a GPU that reports this
    memory.
    """
    if (refusal := refusal_of_weights(base, shape, precision, gpu_bytes)) is not None:
        raise WrongRequest(refusal)
