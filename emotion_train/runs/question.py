"""Is a run that was started or published asked for again with the same request? It may be on other
machines, with other packing or precision, but not with another question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from emotion_train.config import Config
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import WrongRequest
from emotion_train.report.schema import Parent
from emotion_train.runs.log import Entry
from emotion_train.runs.parent import weights_sha256
from emotion_train.runs.published import MAX_REPORT_BYTES, published_report
from emotion_train.storage.store import Store

# what makes the result another one
_FIXED = (
    "data.limit",
    "data.max_length",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.targets",
    "loss.class_weights",
    "model.layers",
    "run.seed",
    "train.ema",
    "train.epochs",
    "train.global_batch_size",
    "train.max_steps",
    "train.method",
)
# may change from start to start, but a run that is over had its own
_FIXED_AT_THE_END = (
    "train.learning_rate",
    "train.max_grad_norm",
    "train.warmup_ratio",
    "train.weight_decay",
)
# the values of runs that are older than the key
_BEFORE_KEY = {"train.ema": 0.0, "train.method": "auto", "model.keep_unpacked": False}


def same_question(
    run_id: str,
    old: Mapping[str, Any],
    parent: Parent | None,
    config: Config,
    problems: Sequence[str] = (),
    *,
    published: bool = False,
) -> list[str]:
    """The settings of `config` that differ from the run's `old` ones and may, each as `section.key
    (was …, is …)`. `parent` is the adapter that it began with.

    Raises `WrongRequest` where the result would be another one, or where there are `problems`
    already.
    """
    fixed = (*_FIXED, *_FIXED_AT_THE_END) if published else _FIXED
    different = {}
    for section, fields in config.model_dump(mode="json").items():
        for key, value in fields.items():
            name = f"{section}.{key}"
            was = old.get(section, {}).get(key, _BEFORE_KEY.get(name))
            if was != value:
                different[name] = f"{name} (was {was!r}, is {value!r})"
    problems = [*problems, *(change for name, change in different.items() if name in fixed)]
    if not _same_parent(parent, old, config):
        problems.append(different["model.adapter"])
    if problems:
        listed = "; ".join(problems)
        new = "or another run.id to start a new run."
        if published:
            raise WrongRequest(
                f"Run {run_id} was published with another request; different now: {listed}. Give the old"
                f" values to use it, {new}"
            )
        raise WrongRequest(
            f"Run {run_id} was started with another request; different now: {listed}. Give the old values"
            f" to continue it, {new}"
        )
    return list(different.values())


def _same_parent(parent: Parent | None, old: Mapping[str, Any], config: Config) -> bool:
    """Whether `model.adapter` names the adapter that the run began with, or none. The run holds all
    that was taken from it, so the adapter is read only if it has another name now.
    """
    asked = config.model.adapter
    if parent is None or asked in (None, old.get("model", {}).get("adapter")):
        return parent is not None or asked is None
    return weights_sha256(asked) == parent.weights_sha256


def same_question_as_published(store: Store, run_id: str, final: Entry, config: Config) -> list[str]:
    """The setting `model.base` if a published run has another by its report, which may be the same
    base elsewhere. Nothing where no report can be read.

    Raises `WrongRequest` as `same_question`, and `StorageError`.
    """
    if (report := published_report(store, run_id, final)) is None:
        return []
    try:
        identity = object_in(report, MAX_REPORT_BYTES)["identity"]
        old = {section: dict(fields) for section, fields in identity["config"].items()}
        parent = None if identity.get("parent") is None else Parent.model_validate(identity["parent"])
    except (Unreadable, ValidationError, LookupError, TypeError, ValueError, AttributeError):
        return []
    differing = same_question(run_id, old, parent, config, published=True)
    return [words for words in differing if words.startswith("model.base ")]
