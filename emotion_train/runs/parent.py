"""The parent: the published adapter that a run's training starts from, whether it fits the run, and
its answers for its own held-out posts.

It is read once, before the claim of a run without a checkpoint. From the first checkpoint on, the
run's own state holds everything, and the adapter may be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emotion_train.bases.depth import blocks_words
from emotion_train.bases.encoders import ENCODERS
from emotion_train.config import Config
from emotion_train.data.index import Index, read_index
from emotion_train.data.targets import WORDS
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import read_decision
from emotion_train.evaluation.predictions import (
    AnyPredictions,
    any_predictions_from_parquet,
    predictions_key,
)
from emotion_train.model.facts import AdapterFacts, read_facts, refuse_other_weights_file
from emotion_train.report.schema import Parent
from emotion_train.runs.adapter_cache import FoundAdapter, find_adapter
from emotion_train.runs.log import final_entry, read_part
from emotion_train.runs.published import split_run_url
from emotion_train.sizing.recipe import adapter_of
from emotion_train.sizing.shape import target_names
from emotion_train.storage.document import file_sha256
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store


@dataclass(frozen=True)
class ParentAdapter:
    """An adapter to start training from. `weights` is its file of tensors, and `temperature`
    divided its head.
    """

    place: str
    facts: AdapterFacts
    temperature: tuple[float, ...] | None
    sha256: str
    weights: bytes

    @property
    def light(self) -> ParentAdapter:
        """This adapter without its weights."""
        return replace(self, weights=b"")

    def described(self, labels: Sequence[str]) -> Parent:
        """Its description in the checkpoints and report of a run with these labels."""
        return Parent(
            name=self.facts.run_id or Path(self.place).name,
            weights_sha256=self.sha256,
            index_sha256=self.facts.index_sha256,
            labels=self.facts.labels,
            new_labels=tuple(label for label in labels if label not in self.facts.labels),
            dropped_labels=tuple(label for label in self.facts.labels if label not in labels),
        )

    def places(self, labels: Sequence[str]) -> list[int | None]:
        """The row of each label in the parent's head; None for a new label."""
        own = self.facts.labels
        return [own.index(label) if label in own else None for label in labels]


def read_parent(place: str) -> ParentAdapter:
    """The adapter at a run's URL or in a folder. Raises `WrongRequest` and `StorageError` as
    `find_adapter`, `read_facts` and `read_decision`.
    """
    folder = find_adapter(place).folder
    facts = read_facts(folder)
    decision = read_decision(folder, facts)
    path = folder / facts.weights_file
    sha256 = file_sha256(path)
    refuse_other_weights_file(folder, facts, sha256)
    return ParentAdapter(place, facts, decision.temperature, sha256, path.read_bytes())


def weights_sha256(place: str) -> str:
    """The sha256 of the weights of the adapter at this place; raises as `read_parent`."""
    folder = find_adapter(place).folder
    return file_sha256(folder / read_facts(folder).weights_file)


def refuse_unfit(
    parent: ParentAdapter,
    config: Config,
    index: Index,
    *,
    shape_sha256: str | None = None,
    tokenizer_sha256: str | None = None,
) -> None:
    """Raises `WrongRequest` where a run of this config on these posts cannot start from the parent.
    A sha256 that is None is not compared.
    """
    facts = parent.facts
    several = facts.targets == "several"
    wanted: list[tuple[bool, str, str]] = [
        (
            shape_sha256 in (None, facts.base_shape_sha256),
            f"was made for the base {facts.base}, whose layers have other shapes than {config.model.base}",
            f"give model.base={facts.base}",
        ),
        *_of_what_is_trained(facts, config),
        (
            tokenizer_sha256 in (None, facts.tokenizer_sha256),
            "was trained with another tokenizer than that of the base",
            "give the base that it was trained on",
        ),
        (
            several == (index.targets == "several"),
            f"answers with {WORDS[facts.targets]} and the posts have {WORDS[index.targets]}",
            "give an adapter of the same kind of labels",
        ),
        (
            any(label in facts.labels for label in index.labels),
            f"knows none of the labels {_named(index.labels)}",
            "give an adapter that knows one of them, or leave model.adapter out",
        ),
    ]
    for fits, problem, remedy in wanted:
        if not fits:
            raise WrongRequest(f"model.adapter is {parent.place}, which {problem}; {remedy}.")


def _of_what_is_trained(facts: AdapterFacts, config: Config) -> list[tuple[bool, str, str]]:
    """What must be alike where an adapter is trained, and that one is."""
    own, lora = facts.lora, adapter_of(config, facts.architecture in ENCODERS)
    if own is None or lora is None:
        was, now, method = (
            ("every weight", "an adapter", "full") if own is None else ("an adapter", "every weight", "lora")
        )
        words = f"was made by training {was}, and this run trains {now}"
        return [(own is lora, words, f"give train.method={method}")]
    return [
        (own.r == lora.r, f"has lora.r {own.r}, not {lora.r}", f"give lora.r={own.r}"),
        (
            own.alpha == lora.alpha,
            f"has lora.alpha {own.alpha:g}, not {lora.alpha:g}",
            f"give lora.alpha={own.alpha:g}",
        ),
        (
            set(target_names(own.targets)) == set(target_names(lora.targets)),
            f"has adapters on {_named(target_names(own.targets))}, not on"
            f" {_named(target_names(lora.targets))}",
            f"give lora.targets=[{','.join(target_names(own.targets))}]",
        ),
    ]


def refuse_other_depth(parent: ParentAdapter, layers: int | None) -> None:
    """Raises `WrongRequest` unless the run reads as many blocks of its base as the parent; None
    means all blocks.
    """
    own = parent.facts.layers
    if own != layers:
        raise WrongRequest(
            f"model.adapter is {parent.place}, which was made for {blocks_words(own)} of its base, and this"
            f" run reads {blocks_words(layers)}; give model.layers={'null' if own is None else own}."
        )


def refuse_other_weights(parent: ParentAdapter, base: str, base_weights_sha256: str | None) -> None:
    """Raises `WrongRequest` unless the base is the one that the parent was made for; a sha256 of
    None is not compared.
    """
    if base_weights_sha256 not in (None, parent.facts.base_weights_sha256):
        raise WrongRequest(
            f"model.adapter is {parent.place}, which was made for the base {parent.facts.base}, and the"
            f" weights of {base} differ; give model.base={parent.facts.base}."
        )


def label_sentences(parent: Parent) -> list[str]:
    """One sentence on labels new against the parent, and one on its dropped labels."""
    sentences = []
    if parent.new_labels:
        sentences.append(
            f"New against the adapter {parent.name} that this run trained on from:"
            f" {_named(parent.new_labels)}; their rows of the head were drawn from run.seed."
        )
    if parent.dropped_labels:
        sentences.append(
            f"Labels of the adapter {parent.name} that the posts do not have any more were dropped:"
            f" {_named(parent.dropped_labels)}."
        )
    return sentences


def _named(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- the posts that the parent was scored on ---


def old_posts(data_url: str, parent: Parent) -> tuple[Store, Index, str]:
    """The parent's data set and its held-out split: test, else validation. Raises `WrongRequest`
    for another data set.
    """
    store = open_store(data_url)
    index = read_index(store)
    if parent.index_sha256 is not None and index.sha256() != parent.index_sha256:
        raise WrongRequest(
            f"report.old_data is {data_url}, which is not the data set that {parent.name} was trained on;"
            " give that one, or leave it out."
        )
    name = "test" if "test" in index.splits and index.splits["test"].rows else "validation"
    index.split(name)
    return store, index, name


def said_of_old_posts(place: str, split: str) -> AnyPredictions:
    """The parent's predictions for its held-out posts when it was published. Raises `WrongRequest`
    where they were not pulled with it.
    """
    adapter = find_adapter(place)
    content = _published(adapter, predictions_key(split))
    if content is None:
        raise WrongRequest(
            f"report.old_data needs the predictions of {place} for its {split} posts, and"
            f" {predictions_key(split)} is not beside it; give model.adapter=OUTPUT_URL/RUN_ID, or a folder"
            " that `emotion-launch pull` wrote."
        )
    return any_predictions_from_parquet(content)


def _published(found: FoundAdapter, name: str) -> bytes | None:
    for path in (found.folder / "report" / name, found.folder.parent / name):
        if path.is_file():
            return path.read_bytes()
    if found.run_url is None:
        return None
    output_url, run_id = split_run_url(found.run_url)
    store = open_store(output_url)
    entry = final_entry(store, run_id)
    key = f"final/{entry.incarnation:08d}/{name}"
    part = next((part for part in entry.parts if part.key == key), None)
    return None if part is None else read_part(store, run_id, part)


def require_old_posts(config: Config, parent: ParentAdapter, labels: Sequence[str]) -> None:
    """Raises `WrongRequest`, before anything is trained, where `report.old_data` cannot be used."""
    if config.report.old_data is not None:
        split = old_posts(config.report.old_data, parent.described(labels))[2]
        said_of_old_posts(parent.place, split)
