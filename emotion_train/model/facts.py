"""The facts in an adapter folder, read and checked without torch, so that a wrong folder is refused
before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emotion_train.config import LARGEST_MAX_LENGTH, MOST_LAYERS, LoraSection, Precision
from emotion_train.data.targets import KINDS, TargetKind
from emotion_train.edges.bounded import Unreadable, object_file, phrase
from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.load import BaseInfo

WEIGHTS = "adapter_model.safetensors"
WHOLE_WEIGHTS = "model.safetensors"  # of a base that was trained whole
FACTS = "emotion_train.json"
LABELS = "labels.json"
FORMAT: Literal["emotion-train/adapter/2"] = "emotion-train/adapter/2"
WHOLE: Literal["emotion-train/adapter/3"] = "emotion-train/adapter/3"
_FIRST = "emotion-train/adapter/1"  # knows no targets: a post has one label
_MAX_BYTES = 16 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


class AdapterFacts(BaseModel):
    """The facts of an adapter: `emotion_train.json`, with the labels in `labels.json`.

    `targets` is what a post is answered with: one of the labels, several of them, or shares. `lora`
    is None where every weight was trained: the folder is then a whole checkpoint, of format 3,
    which earlier versions refuse. `layers` are the first blocks of the base's `whole_layers` that
    were read; None: all, as of adapters that do not say. `weights_sha256` is written by
    `save_adapter`; adapters of earlier versions have none.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["emotion-train/adapter/1", "emotion-train/adapter/2", "emotion-train/adapter/3"] = FORMAT
    targets: TargetKind = "one"
    base: str
    architecture: str
    layout: str
    base_shape_sha256: str
    base_weights_sha256: str
    layers: int | None = Field(None, ge=1, le=MOST_LAYERS)
    whole_layers: int | None = Field(None, ge=1, le=MOST_LAYERS)
    precision: Precision
    max_length: int = Field(ge=1, le=LARGEST_MAX_LENGTH)
    tokenizer_sha256: str
    weights_sha256: str | None = None  # of the file of weights beside it
    lora: LoraSection | None
    labels: tuple[str, ...] = Field(min_length=2)
    run_id: str | None = None
    index_sha256: str | None = None  # of the data set that was trained on
    # folders of the machine that trained, for who evaluates there; URLs are in the report
    output_url: str | None = None
    data_url: str | None = None

    @property
    def weights_file(self) -> str:
        """The file of what was trained."""
        return WHOLE_WEIGHTS if self.lora is None else WEIGHTS

    @classmethod
    def of(
        cls,
        base: BaseInfo,
        tokenizer: PostTokenizer,
        *,
        precision: Precision,
        lora: LoraSection | None,
        labels: Sequence[str],
        targets: TargetKind = "one",
        run_id: str | None = None,
        index_sha256: str | None = None,
        output_url: str | None = None,
        data_url: str | None = None,
    ) -> AdapterFacts:
        return cls(
            format=WHOLE if lora is None else FORMAT,
            base=base.name,
            architecture=base.architecture,
            layout=base.layout,
            base_shape_sha256=base.shape_sha256,
            base_weights_sha256=base.weights_sha256,
            layers=base.layers,
            whole_layers=base.whole_layers,
            precision=precision,
            max_length=tokenizer.max_length,
            tokenizer_sha256=tokenizer.sha256(),
            lora=lora,
            labels=tuple(labels),
            targets=targets,
            run_id=run_id,
            index_sha256=index_sha256,
            output_url=output_url,
            data_url=data_url,
        )


def read_facts(folder: Path) -> AdapterFacts:
    """The facts of the adapter in this folder; raises `WrongRequest` for a folder that is no
    adapter or holds pickles, and for an adapter that a later version wrote.
    """
    if not folder.is_dir():
        raise WrongRequest(
            f"There is no adapter folder {folder}; give the folder that `emotion-launch pull` or a run's"
            " final/ wrote."
        )
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            raise WrongRequest(
                f"The adapter {folder} holds {path.name}, a pickle, which could run any program; only"
                " safetensors and JSON are read."
            )
    whole = (folder / WHOLE_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()
    weights = (WHOLE_WEIGHTS, "config.json") if whole else (WEIGHTS,)
    for name in (FACTS, LABELS, *weights, "tokenizer.json"):
        if not (folder / name).is_file():
            raise WrongRequest(
                f"The folder {folder} has no {name}, so it is no adapter of this program; give the"
                " folder that `emotion-launch pull` wrote, or the URL of a run."
            )
    try:
        facts, labels = (object_file(folder / name, _MAX_BYTES) for name in (FACTS, LABELS))
        _refuse_later(folder, facts)
        found = AdapterFacts.model_validate({**facts, "labels": labels.get("labels")})
        if (found.lora is None) != whole:
            raise Unreadable(f"it does not say how {weights[0]} was trained")
        return found
    except (Unreadable, OSError, ValidationError) as error:
        raise WrongRequest(
            f"{folder / FACTS} or {LABELS} beside it cannot be read"
            f" ({phrase(error)}); pull the adapter again."
        ) from None


def refuse_other_weights_file(folder: Path, facts: AdapterFacts, sha256: str) -> None:
    """Raises `WrongRequest` unless the file of weights, which has this sha256, is the one that was
    saved with these facts. A flipped bit mostly leaves numbers that only answer wrongly.
    """
    if facts.weights_sha256 not in (None, sha256):
        raise WrongRequest(
            f"{folder / facts.weights_file} is not the file that was saved with {FACTS} beside it (its sha256"
            " is another), so it was damaged or replaced; pull the adapter again."
        )


def _refuse_later(folder: Path, facts: dict[str, Any]) -> None:
    """Raises `WrongRequest` for a format or targets that this version does not know. What the first
    format says of targets is left out, as its readers did.
    """
    stored, targets = facts.get("format"), facts.get("targets")
    if stored == _FIRST:
        facts.pop("targets", None)
    elif stored not in (FORMAT, WHOLE):
        raise WrongRequest(
            f"The adapter {folder} has the format {str(stored)[:80]!r}, and this version reads {_FIRST} and"
            f" those up to {WHOLE}; use the version that wrote it, or pull the adapter again."
        )
    elif targets not in KINDS:
        raise WrongRequest(
            f"The adapter {folder} answers with {str(targets)[:80]!r}, and this version knows"
            f" {', '.join(KINDS)}; use the version that wrote it."
        )
