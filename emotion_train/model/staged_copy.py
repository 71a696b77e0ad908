"""A base is staged: its text part is copied into a bucket or folder, verified, its index last."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

from emotion_train.bases.depth import Layers
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import (
    BASE_KEY,
    UNFINISHED_KEY,
    StagedBase,
    StagedIndex,
    StagedObject,
    StagedTensor,
    read_staged_index,
)
from emotion_train.edges.paths import typed_path
from emotion_train.errors import AlreadyExists, ObjectNotFound, StorageError, WrongRequest
from emotion_train.progress import ProgressLine
from emotion_train.storage.document import version_of
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    import torch

    from emotion_train.model.load import BaseConfig
    from emotion_train.model.staging import StagedPrecision

SHARD_BYTES = 512 << 20
PIECE_BYTES = 16 << 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tekken.json")
_NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["score"],
}


@dataclass(frozen=True)
class StageResult:
    url: str
    index: StagedIndex
    created: bool  # False: the same base was there already


def stage(
    base: str,
    url: str,
    precision: StagedPrecision = "bf16",
    device: str = "auto",
    *,
    layers: Layers | None = None,
    shard_bytes: int = SHARD_BYTES,
    piece_bytes: int = PIECE_BYTES,
) -> StageResult:
    """Stage `base`, or its first `layers` blocks, at `url`. Raises `WrongRequest` for a base that
    cannot be staged and for a place that holds something else.
    """
    from emotion_train.model.encoder import is_encoder
    from emotion_train.model.load import read_config
    from emotion_train.model.precision import require_bitsandbytes
    from emotion_train.model.text_document import refuse_other_meaning
    from emotion_train.model.trainable import require_trainable_base

    store = open_store(url)
    found = read_config(BaseFiles.find(base, layers))
    _refuse_source(found, store)
    if is_encoder(found.text):
        raise WrongRequest(
            f"The base {base} is an encoder, and only decoders are staged, since any machine reads an encoder"
            " in seconds; give model.base its folder or hub id."
        )
    if precision == "nf4":
        require_bitsandbytes()
    place = _device(device, precision)
    require_trainable_base(found.files)
    refuse_other_meaning(found)
    existing = read_staged_index(store)
    if existing is not None and existing.precision != precision:
        _refuse_other(store, existing, f"precision {existing.precision} there, {precision} now")
    left = _make_room(store, found, precision) if existing is None else set()
    _refuse_misfit(found, store, existing is None and not left)
    index = _make(found, precision, place, store if existing is None else None, shard_bytes, piece_bytes)
    if existing is not None:
        if _content(existing) != _content(index):
            _refuse_other(store, existing, _difference(existing, index))
        _refuse_incomplete(store, existing)
        return StageResult(store.url, existing, False)
    try:
        store.create(BASE_KEY, index.to_bytes())
    except AlreadyExists:
        raise WrongRequest(
            f"Another process has staged a base at {store.url} in the meantime; stage into another, empty"
            " place."
        ) from None
    for key in sorted(left - {one.key for one in (*index.shards, *index.files)}):
        store.delete(key)
    store.delete(UNFINISHED_KEY)
    return StageResult(store.url, index, True)


# --- at the door ---


def _refuse_source(found: BaseConfig, store: Store) -> None:
    files = found.files
    if files.gguf is not None:
        raise WrongRequest(
            f"The base {files.name} is a GGUF file, which is small and used unchanged: copy it to the"
            " machine that trains. To stage, give the folder or hub id of the safetensors checkpoint that it"
            " was made from."
        )
    if files.staged is not None and files.staged.index.precision == "nf4":
        raise WrongRequest(
            f"The base {files.name} is already quantised to nf4; give the checkpoint that it was made from,"
            f" {files.staged.index.source}, or copy its objects unchanged, base.json last."
        )
    if isinstance(store, FolderStore) and files.folder is not None:
        target, source = typed_path(store.url).resolve(), files.folder.resolve()
        if target == source or source in target.parents:
            raise WrongRequest(
                f"URL {store.url} is inside the base {files.name}; name a folder outside of it."
            )


def _device(asked: str, precision: StagedPrecision) -> torch.device:
    """The device that quantises; a copy in bf16 is made on the host."""
    import torch

    if precision == "bf16" or asked == "cpu":
        return torch.device("cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise WrongRequest("--device is cuda and no GPU is visible here; type --device cpu.")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    """The name of the device for base.json: a tensor's sum may differ in its last bit by GPU and
    number of threads.
    """
    import torch

    return (
        str(torch.cuda.get_device_name(device))
        if device.type == "cuda"
        else f"CPU with {torch.get_num_threads()} threads"
    )


def _make_room(store: Store, found: BaseConfig, precision: StagedPrecision) -> set[str]:
    """Take the place for this base; returns the keys that a killed staging of it left.

    Raises `WrongRequest` when other objects are there, or another base is being staged.
    """
    there = {info.key for info in store.list()}
    if there and UNFINISHED_KEY not in there and not _exists(store, UNFINISHED_KEY):
        raise WrongRequest(
            f"{store.url} holds other objects, such as {min(there)}, and no staged base; name an empty folder"
            " or prefix."
        )
    depth = {} if found.layers is None else {"layers": found.layers}
    mine = json.dumps({"source": _source_name(found), "precision": precision, **depth}).encode() + b"\n"
    try:
        store.create(UNFINISHED_KEY, mine)
    except AlreadyExists:
        begun = store.read(UNFINISHED_KEY).decode(errors="replace").strip()[:300]
        raise WrongRequest(
            f"Another base is being staged at {store.url}, or its staging was stopped ({begun}); repeat that"
            " staging, or name another place."
        ) from None
    store.clear_unfinished("")
    return there - {UNFINISHED_KEY}


def _exists(store: Store, key: str) -> bool:
    try:
        store.stat(key)
    except ObjectNotFound:
        return False
    return True


def _source_name(found: BaseConfig) -> str:
    staged = found.files.staged
    return found.files.lasting_name if staged is None else staged.index.source


def _content(index: StagedIndex) -> dict[str, Any]:
    """The index without the fields that may differ although the bytes are the same: after a copy,
    or with another library version, device or place of the source.
    """
    content = index.model_dump(exclude={"versions", "quantised_on", "source"})
    for described in (*content["shards"], *content["files"]):
        del described["etag"]
    for tensor in content["tensors"]:
        del tensor["source"]
    return content


def _refuse_other(store: Store, existing: StagedIndex, difference: str) -> NoReturn:
    raise WrongRequest(
        f"{store.url} holds another staged base, of {existing.source} ({difference}); it is never"
        " overwritten. Type another URL, or repeat the base and options it was made with."
    )


def _refuse_incomplete(store: Store, existing: StagedIndex) -> None:
    if missing := StagedBase(store, existing).missing():
        raise WrongRequest(
            f"{store.url} has lost {missing[0]} ({len(missing)} of its objects) since it was staged; stage"
            " into another, empty place."
        )


def _refuse_misfit(found: BaseConfig, store: Store, untouched: bool) -> None:
    """Raises `WrongRequest` where names or shapes of the checkpoint do not fit, before a weight is
    read; a refused base leaves an empty place empty.
    """
    from emotion_train.model.load import open_checkpoint, skeleton

    if found.files.staged is not None:
        return
    try:
        open_checkpoint(found, skeleton(found.text, 2))
    except (WrongRequest, StorageError):  # the latter: the hub failed
        if untouched:
            store.delete(UNFINISHED_KEY)
        raise


def _difference(one: StagedIndex, other: StagedIndex) -> str:
    for name in (
        "source_layers",
        "parameters",
        "shape_sha256",
        "weights_sha256",
        "quantised_on",
        "piece_bytes",
        "source",
    ):
        old, new = getattr(one, name), getattr(other, name)
        if old != new:
            return f"{name} {old!r} there, {new!r} now"
    return "its bytes differ"


# --- the index ---


def _make(
    found: BaseConfig,
    precision: StagedPrecision,
    device: torch.device,
    store: Store | None,
    shard_bytes: int,
    piece_bytes: int,
) -> StagedIndex:
    """Write every object that base.json names, and return its content. Without a store nothing is
    written, only the content made, for a comparison.
    """
    from emotion_train.model.staging import ObjectWriter, stage_weights

    writer = ObjectWriter(store, piece_bytes)
    with ProgressLine("staging" if store is not None else "comparing", 1, "tensors") as line:
        made = stage_weights(
            found, precision, device, writer, shard_bytes, lambda done, total: line.update(done, total=total)
        )
    files = [
        ("model.safetensors.index.json", _safetensors_index(made.shards, made.tensors)),
        *_small_files(found, precision),
    ]
    return StagedIndex(
        source=_source_name(found),
        precision=precision,
        rounded=made.rounded,
        quantised_on=_device_name(device) if precision == "nf4" else None,
        architecture=found.text.model_type,
        source_layers=found.whole_layers,
        parameters=sum(prod(tensor.shape) for tensor in made.tensors),
        shape_sha256=found.shape_sha256,
        weights_sha256=made.weights_sha256,
        piece_bytes=piece_bytes,
        shards=tuple(made.shards),
        files=tuple(writer.put(key, data) for key, data in files),
        tensors=tuple(made.tensors),
        versions={
            name: version_of(name)
            for name in (
                "emotion-train",
                "torch",
                "transformers",
                *(("bitsandbytes",) if precision == "nf4" else ()),
            )
        },
    )


def _safetensors_index(shards: list[StagedObject], tensors: list[StagedTensor]) -> bytes:
    weight_map = {
        tensor.name + part.suffix: shards[tensor.object].key for tensor in tensors for part in tensor.parts
    }
    total = sum(part.bytes for tensor in tensors for part in tensor.parts)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    ).encode()


# --- the small files ---


def _small_files(found: BaseConfig, precision: StagedPrecision) -> list[tuple[str, bytes]]:
    """Tokenizer files and config.json of the text part; config.json comes last, since nothing reads
    a checkpoint without it.
    """
    from emotion_train.model.text_document import text_document

    paths = {name: found.files.file(name) for name in _TOKENIZER_FILES}
    files = [(name, path.read_bytes()) for name, path in paths.items() if path is not None]
    document = text_document(found)
    if precision == "nf4":
        document["quantization_config"] = _NF4
    return [
        *files,
        ("config.json", (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()),
    ]
