"""Checks which adapters may answer together, and makes a decision for them from their own ones.

Their logits are averaged label by label, so they need the same labels in the same order, the same
posts' tokens and, since the base is loaded once, the same base with the same layers adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import Decision
from emotion_train.model.facts import AdapterFacts, read_facts
from emotion_train.sizing.shape import target_names
from emotion_train.storage.document import file_sha256


def _refuse_strangers(places: Sequence[str], facts: Sequence[AdapterFacts]) -> None:
    """Raises `WrongRequest` where the adapters cannot answer together over one base."""
    first = _compared(facts[0])
    for place, other in zip(places[1:], facts[1:], strict=True):
        its = _compared(other)
        if (what := next((name for name in first if first[name] != its[name]), None)) is not None:
            raise WrongRequest(
                f"The adapters {places[0]} and {place} differ in their {what}, so their answers cannot be"
                " averaged; give adapters of one data set, base and config, such as several seeds."
            )


def _compared(facts: AdapterFacts) -> dict[str, object]:
    return {
        "labels": facts.labels,
        "targets": facts.targets,
        "tokenizer": facts.tokenizer_sha256,
        "data.max_length": facts.max_length,
        "model.layers": facts.layers,
        "base": (facts.base_shape_sha256, facts.base_weights_sha256),
        "model.precision": facts.precision,
        "train.method": "full" if facts.lora is None else "lora",
        "lora.r": facts.lora and facts.lora.r,
        "lora.alpha": facts.lora and facts.lora.alpha,
        "lora.targets": facts.lora and set(target_names(facts.lora.targets)),
    }


def facts_together(folders: Sequence[Path], places: Sequence[str] | None = None) -> list[AdapterFacts]:
    """The facts of the adapters in these folders, which messages call `places`. Raises
    `WrongRequest` where `read_facts` does, and where the adapters cannot answer together.
    """
    named = [str(folder) for folder in folders] if places is None else places
    facts = [read_facts(folder) for folder in folders]
    refuse_doubles(named, folders, facts)
    _refuse_strangers(named, facts)
    return facts


def refuse_doubles(places: Sequence[str], folders: Sequence[Path], facts: Sequence[AdapterFacts]) -> None:
    """Raises `WrongRequest` for an adapter that is given twice, and would count twice: by one
    folder, or as a run and a pulled copy of it, which have the same weights.
    """
    if len(folders) == 1:
        return
    seen: dict[str, str] = {}
    for place, folder, own in zip(places, folders, facts, strict=True):
        weights = own.weights_sha256 or file_sha256(folder / own.weights_file)
        if weights in seen:
            raise WrongRequest(f"{place} is {seen[weights]} once more; give each --adapter once.")
        seen[weights] = place


def averaged(decisions: Sequence[Decision]) -> Decision:
    """The decision for averaged adapters that no validation posts have judged together: their
    thresholds are averaged too. It has no temperature and no gates.
    """
    first = decisions[0]
    if len(decisions) == 1:
        return first
    if first.thresholds is None:
        return Decision.one(first.labels, first.targets)
    mean_C = np.mean([one.thresholds or () for one in decisions], axis=0).astype(np.float32)
    return Decision(
        targets=first.targets, labels=first.labels, thresholds=tuple(float(str(one)) for one in mean_C)
    )
