"""An adapter and its base are written as one plain transformers checkpoint: small files first,
then weights, and the index last, without which nothing reads the export.

Heavy libraries are imported after the checks of the adapter, so that a refusal is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emotion_train.bases.public_names import public_base
from emotion_train.console import tell
from emotion_train.errors import AlreadyExists, WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice
from emotion_train.model.facts import AdapterFacts
from emotion_train.progress import ProgressLine
from emotion_train.storage.document import file_sha256
from emotion_train.storage.open import open_store

if TYPE_CHECKING:
    from emotion_train.evaluation.decision import Decision
    from emotion_train.exporting.change import Change
    from emotion_train.exporting.manifest import ExportFacts
    from emotion_train.exporting.merge import AnyMerge
    from emotion_train.exporting.weights import WeightFile
    from emotion_train.model.load import BaseConfig
    from emotion_train.runs.origin import Origin
    from emotion_train.storage.store import Store

COMPARED = 200  # posts, for an adapter that was trained on nf4
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class ExportResult:
    """`change` is what merging changed, `unmeasured` why it was not measured; both are None where
    no comparison was asked for. `others` are the small files of an export that was there already
    which differ from those that this version writes.
    """

    url: str
    facts: ExportFacts
    created: bool  # False: the same export was there already
    parameters: int
    bytes: int
    change: Change | None = None
    unmeasured: str | None = None
    others: tuple[str, ...] = ()


def export(
    adapter: str | Path,
    to: str | Path,
    *,
    base: str | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    compare: int | None = None,
    data_url: str | None = None,
    device: Literal["auto", "cpu"] = "auto",
    shard_bytes: int = SHARD_BYTES,
) -> ExportResult:
    """Write the merged checkpoint of an adapter to a folder or bucket.

    `compare` None: the default of `--compare`, where this machine can compare. Raises
    `WrongRequest` for an adapter and a base that do not belong together, and for a place that holds
    something else; `StorageError` for a store that fails.
    """
    from emotion_train.exporting.manifest import take_place
    from emotion_train.runs.adapter_cache import find_adapter
    from emotion_train.runs.origin import Origin

    store = open_store(str(to))
    found = find_adapter(str(adapter))
    origin = Origin.of(found.folder, None, data_url)
    prepared = _Prepared.of(found.folder, origin.facts, base, dtype)
    if not take_place(store, prepared.facts, set(prepared.small_files) | {CARD}):
        others = _other_files(store, prepared)
        size = sum(info.size for info in store.list() if info.key.endswith(".safetensors"))
        return ExportResult(store.url, prepared.facts, False, prepared.parameters, size, others=others)
    change, unmeasured = _change(prepared, origin, compare, device)
    written = _write(store, prepared, shard_bytes, change, unmeasured)
    size = sum(one.bytes for one in written)
    return ExportResult(store.url, prepared.facts, True, prepared.parameters, size, change, unmeasured)


CARD = "README.md"


@dataclass(frozen=True)
class _Prepared:
    """All that is known before the first weight is written."""

    folder: Path
    base: BaseConfig
    merge: AnyMerge
    decision: Decision
    facts: ExportFacts
    small_files: dict[str, bytes]
    whole: bool  # every weight was trained, and nothing is merged

    @classmethod
    def of(
        cls, folder: Path, adapter: AdapterFacts, base: str | None, dtype: Literal["bf16", "fp32"]
    ) -> _Prepared:
        from emotion_train.data.tokenization import PostTokenizer
        from emotion_train.evaluation.decision import DECISION, read_decision
        from emotion_train.exporting.base_rows import open_rows
        from emotion_train.exporting.manifest import ExportFacts
        from emotion_train.exporting.merge import merge_of
        from emotion_train.exporting.small_files import config_json, tokenizer_files
        from emotion_train.model.lora import base_config_of, refuse_other_base, refuse_other_tokenizer
        from emotion_train.model.text_document import refuse_other_meaning

        decision = read_decision(folder, adapter)
        found = base_config_of(adapter, base, folder)
        _refuse_rounded(found, dtype)
        refuse_other_base(folder, adapter, found, shape_sha256=found.shape_sha256)
        refuse_other_meaning(found)
        rows = open_rows(found)
        merge = merge_of(folder, adapter, found, rows, dtype)
        tokenizer = PostTokenizer.load(str(folder), adapter.max_length)
        refuse_other_tokenizer(folder, adapter, tokenizer)
        files, pad_id = tokenizer_files(tokenizer, int(found.text.vocab_size))
        if adapter.lora is not None:
            refuse_other_base(folder, adapter, found, weights_sha256=rows.weights_sha256())
        files |= {
            DECISION: decision.to_bytes(),
            "config.json": config_json(found, decision, pad_id, dtype),
        }
        facts = ExportFacts(
            adapter_sha256=file_sha256(folder / adapter.weights_file),
            base=public_base(adapter.base),
            base_weights_sha256=adapter.base_weights_sha256,
            layers=adapter.layers,
            whole_layers=adapter.whole_layers,
            dtype=dtype,
            precision=adapter.precision,
            targets=decision.targets,
            labels=adapter.labels,
            max_length=adapter.max_length,
            run_id=adapter.run_id,
        )
        return cls(folder, found, merge, decision, facts, files, adapter.lora is None)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape, _ in self.merge.formats.values())


def _refuse_rounded(found: BaseConfig, dtype: Literal["bf16", "fp32"]) -> None:
    staged = found.files.staged
    if staged is not None and dtype == "fp32" and staged.index.precision == "bf16" and staged.index.rounded:
        raise WrongRequest(
            f"The base {staged.store.url} was rounded to bfloat16 when it was staged, and --dtype is fp32;"
            f" type --dtype bf16, or --base {staged.index.source}."
        )


def _change(
    prepared: _Prepared, origin: Origin, asked: int | None, device: Literal["auto", "cpu"]
) -> tuple[Change | None, str | None]:
    """What merging changed, or why it was not measured. Raises `WrongRequest` where a comparison
    was asked for and cannot be made.
    """
    from emotion_train.runs.origin import NotInReach

    count = asked
    if count is None:
        count = COMPARED if prepared.facts.precision == "nf4" else 0
    if count == 0:
        return None, "--no-compare" if asked == 0 else None
    try:
        return _measured(prepared, origin, count, device), None
    except NotInReach as error:
        if asked is None:
            return None, str(error)
        raise WrongRequest(
            f"--compare is {asked}, and no posts can be compared here: {error}. Give --data DATA_URL, the"
            " adapter's data set, and a machine that holds the model; or type --no-compare."
        ) from None


def _measured(prepared: _Prepared, origin: Origin, count: int, device: Literal["auto", "cpu"]) -> Change:
    import torch

    from emotion_train.exporting.change import measure, posts_to_compare, require_memory

    texts = posts_to_compare(origin, count)
    facts = prepared.facts
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    require_memory(prepared.parameters, facts.precision, facts.dtype, place)
    tell(f"comparing {len(texts):,} validation posts")
    base = None if prepared.whole else prepared.base.files.lasting_name
    chosen = AdapterChoice(prepared.folder, base, device=device)
    return measure(chosen, prepared.base, prepared.merge, facts.dtype, prepared.decision, texts)


def _write(
    store: Store, prepared: _Prepared, shard_bytes: int, change: Change | None, unmeasured: str | None
) -> list[WeightFile]:
    """Write weights, small files, and last the index, without which nothing reads the export;
    returns the weight files.
    """
    from emotion_train.exporting.weights import INDEX, index_of, is_weight_file, write_weights

    try:
        for key, data in prepared.small_files.items():
            _create(store, key, data)
        with ProgressLine("exporting", 1, "tensors") as line:
            written = write_weights(
                prepared.merge, store, shard_bytes, lambda done, total: line.update(done, total=total)
            )
        store.write(CARD, _card(prepared, change, unmeasured))
        _create(store, INDEX, index_of(written))
    except AlreadyExists as error:
        raise WrongRequest(
            f"Another process, or another version of this program, has exported into {store.url} ({error});"
            " export into another, empty place."
        ) from None
    own = {one.key for one in written}
    for info in list(store.list("model-")):  # of a killed export, whose numbers differed in a last bit
        if info.key not in own and is_weight_file(info.key):
            store.delete(info.key)
    return written


def _other_files(store: Store, prepared: _Prepared) -> tuple[str, ...]:
    """The small files at `store` that differ from the prepared ones: edited, damaged, or of another
    version. Raises `WrongRequest` where the adapter now answers by another decision, since its
    weights do not show that.
    """
    from emotion_train.evaluation.decision import DECISION

    others = tuple(key for key, data in prepared.small_files.items() if not store.holds(key, data))
    if DECISION in others and not _is_decision(store.read(DECISION), prepared.decision):
        raise WrongRequest(
            f"{store.url_of(DECISION)} holds other thresholds, gates or temperatures than the adapter has"
            " now; export into another, empty place."
        )
    return others


def _is_decision(raw: bytes, decision: Decision) -> bool:
    from pydantic import ValidationError

    from emotion_train.edges.bounded import Unreadable, object_in

    try:
        return type(decision).model_validate(object_in(raw)) == decision
    except (Unreadable, ValidationError):
        return False


def _create(store: Store, key: str, data: bytes) -> None:
    from emotion_train.errors import StorageError

    store.create(key, data)
    if not store.holds(key, data):
        raise StorageError(f"{store.url_of(key)} does not hold what was written; export again.")


def _card(prepared: _Prepared, change: Change | None, unmeasured: str | None) -> bytes:
    from emotion_train.exporting.card import ExportCard, results_in
    from emotion_train.model.encoder import is_encoder
    from emotion_train.model.load import skeleton

    old = prepared.folder / CARD
    card = ExportCard(
        facts=prepared.facts,
        decision=prepared.decision,
        architecture=type(skeleton(prepared.base.text, 2)).__name__,
        positions=int(prepared.base.text.max_position_embeddings),
        results=results_in(old.read_text(encoding="utf-8")) if old.is_file() else (),
        change=change,
        unmeasured=unmeasured,
        of_encoder=is_encoder(prepared.base.text),
        whole=prepared.whole,
    )
    return card.text().encode()
