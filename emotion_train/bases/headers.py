"""The tensors in a base's files, by their headers: a few KiB of each file, from a folder, the hub
or a bucket.

A file in the hub's cache is read there; otherwise its first bytes are fetched, without keeping
them. No weights are read, so damage within them is not seen here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from emotion_train.bases import gemma
from emotion_train.bases.architecture import already_quantised, kind_of, text_name
from emotion_train.bases.depth import is_read
from emotion_train.bases.files import INSTEAD, BaseFiles
from emotion_train.bases.staged import StagedBase
from emotion_train.edges import hub
from emotion_train.edges.bounded import (
    MAX_HEADER_BYTES,
    Unreadable,
    object_in,
    require_tensors_header,
)
from emotion_train.errors import ObjectNotFound, WrongRequest

_FIRST_BYTES = 64 << 10  # a header of 400 tensors has 40 KiB
_AT_ONCE = 8
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Tensors beside or in place of a weight in quantised checkpoints, whatever their config.json says:
# GPTQ and AWQ, bitsandbytes, fp8 and compressed-tensors.
_CODES = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_zero_point|weight_packed|weight_shape"
    r"|input_scale|activation_scale|SCB|weight_format|weight\.(absmax|quant_map|nested_\w+|quant_state\..*))$"
)
_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES_BY_KIND = {"llama": _GGUF_NAMES, "gemma3_text": gemma.GGUF_NAMES}
_NOT_OF_THE_TEXT = ("output.weight", "rope_freqs.weight")


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor; `dtype` is safetensors' name of its type."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFile:
    """One file of weights. `here`: it need not be downloaded. `tensors` are the text part's
    tensors, by the classifier's names.
    """

    name: str
    bytes: int
    here: bool
    tensors: Mapping[str, StoredTensor]


def weight_files(files: BaseFiles, layers: int | None = None) -> tuple[WeightFile, ...]:
    """The files of a base's weights, by their headers; with `layers`, only files and tensors of
    that many first blocks.

    Raises `WrongRequest` for a file that is missing, cut short, a Git LFS pointer or no safetensors
    file, and for quantised weights; `StorageError` where hub or bucket do not answer.
    """
    if files.gguf is not None:
        return (WeightFile(files.gguf.name, files.gguf.stat().st_size, True, {}),)
    if files.staged is not None:
        return _of_staged(files.staged, layers)
    names, kind = names_of_files(files, layers), kind_of(files)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = tuple(pool.map(lambda name: _weight_file(files, kind, name, names[name], layers), names))
    return found


def names_of_files(files: BaseFiles, layers: int | None = None) -> dict[str, set[str] | None]:
    """The safetensors files that hold text tensors of the first `layers` blocks (None: all), each
    with the keys of these tensors (None: all of its keys).
    """
    if (found := files.weight_map()) is None:
        return {"model.safetensors": None}
    kind, by_file = kind_of(files), dict[str, set[str]]()
    for key, file in found[0].items():
        if (name := text_name(key, kind)) is not None and is_read(name, layers):
            by_file.setdefault(file, set()).add(key)
    return {file: by_file[file] for file in sorted(by_file)}


def files_of_weights(files: BaseFiles, layers: int | None = None) -> dict[Path, set[str] | None]:
    """The files of `names_of_files` by their local paths, downloaded where they are missing."""
    return {files.required(name): keys for name, keys in names_of_files(files, layers).items()}


def shapes_in(found: tuple[WeightFile, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of each text tensor, by the classifier's names."""
    return {name: tensor.shape for file in found for name, tensor in file.tensors.items()}


def damaged(path: object, base: str, why: str) -> WrongRequest:
    """The refusal of a file of weights that cannot be read."""
    return WrongRequest(f"{path} of the base {base} is damaged ({why}); download it again.")


def gguf_shapes(
    kind: str, tensors: Mapping[str, Any], layers: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a GGUF file's tensors of the first `layers` blocks, as by `shapes_in`."""
    return {name: tensors[key].shape for name, key in gguf_places(kind, tensors, layers).items()}


def gguf_places(kind: str, keys: Iterable[str], layers: int | None = None) -> dict[str, str]:
    """The GGUF keys of the tensors of the first `layers` blocks, by the classifier's names."""
    found = {gguf_name(kind, key): key for key in keys if key not in _NOT_OF_THE_TEXT}
    return {name: key for name, key in found.items() if is_read(name, layers)}


def gguf_name(kind: str, key: str) -> str:
    """The classifier's name of a GGUF tensor of a base of this kind; an unknown name is returned
    unchanged.

    >>> gguf_name("gemma3_text", "blk.3.ffn_norm.weight")
    'model.layers.3.pre_feedforward_layernorm.weight'
    """
    names = _GGUF_NAMES_BY_KIND[kind]
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", key)
    if block and block[2] in names:
        return f"model.layers.{block[1]}.{names[block[2]]}.{block[3]}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(
        key, key
    )


# --- one file ---


def _weight_file(
    files: BaseFiles, kind: str, name: str, keys: set[str] | None, layers: int | None
) -> WeightFile:
    path = files.folder / name if files.folder is not None else hub.in_cache(files.name, name)
    if files.folder is not None and not (files.folder / name).is_file():
        files.required(name)  # which says so
    place = str(path) if path is not None else name
    try:
        start, size = _start_of_path(path) if path is not None else _start_at_hub(files.name, name)
        header = _header(start, size)
    except (Unreadable, OSError) as error:
        raise damaged(place, files.name, str(error)) from None
    _refuse_codes(files.name, kind, header)
    wanted = {key: tensor for key, tensor in header.items() if keys is None or key in keys}
    named = {text_name(key, kind): tensor for key, tensor in wanted.items()}
    return WeightFile(
        name,
        size,
        path is not None,
        {key: tensor for key, tensor in named.items() if key is not None and is_read(key, layers)},
    )


def _start_of_path(path: Path) -> tuple[bytes, int]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(_FIRST_BYTES)
        if (more := _missing(start)) is not None:
            start += file.read(more)
    return start, size


def _start_at_hub(repo: str, name: str) -> tuple[bytes, int]:
    try:
        start, size = hub.start_of_file(repo, name, _FIRST_BYTES)
        if (more := _missing(start)) is not None:
            start, size = hub.start_of_file(repo, name, len(start) + more)
    except Exception as error:  # the hub's client raises errors of many families
        if _status(error) == 404:
            raise WrongRequest(
                f"The base {repo} has no {name}, which its index or its configuration needs; {INSTEAD}."
            ) from None
        raise hub.refusal(error, "base", repo, INSTEAD) from None
    return start, size


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _missing(start: bytes) -> int | None:
    """The number of the header's bytes that `start` lacks; None where it has them all, or where
    there is no valid header.
    """
    if len(start) < 8:
        return None
    (length,) = struct.unpack("<Q", start[:8])
    more = 8 + int(length) - len(start)
    return more if 0 < more <= MAX_HEADER_BYTES else None


def _header(start: bytes, size: int) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file of `size` bytes. Raises `Unreadable` unless they fill the
    file to its last byte.
    """
    require_tensors_header(start, size)
    (length,) = struct.unpack("<Q", start[:8])
    found: dict[str, StoredTensor] = {}
    places: list[tuple[int, int]] = []
    for key, entry in object_in(start[8 : 8 + length], MAX_HEADER_BYTES).items():
        if key != "__metadata__":
            found[key], place = _entry(key, entry)
            places.append(place)
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise Unreadable("its tensors overlap or leave a gap")
        end = last
    if 8 + length + end != size:
        raise Unreadable(f"its tensors end at byte {8 + length + end:,} and it has {size:,} bytes")
    return found


def _entry(key: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """One tensor of the header, and its first and last byte after the header."""
    try:
        dtype, shape = entry["dtype"], tuple(int(one) for one in entry["shape"])
        first, last = (int(one) for one in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise Unreadable(f"its header does not describe {key[:80]}") from None
    if (
        min((0, *shape)) < 0
        or first > last
        or (dtype in _FLOATS and last - first != _FLOATS[dtype] * prod(shape))
    ):
        raise Unreadable(f"its header gives {key[:80]} a place of another size than its shape has")
    return StoredTensor(str(dtype), shape), (first, last)


def _refuse_codes(base: str, kind: str, header: Mapping[str, StoredTensor]) -> None:
    """Raises `WrongRequest` for text weights that are codes, whatever config.json says."""
    for key, tensor in header.items():
        if text_name(key, kind) is None:
            continue
        if _CODES.search(key):
            raise already_quantised(base, f"its weights have {key.rpartition('.')[2]}")
        if key.endswith((".weight", ".bias")) and tensor.dtype not in _FLOATS:
            raise already_quantised(base, f"{key[-80:]} is {tensor.dtype[:20]}")


# --- a staged base ---


def _of_staged(staged: StagedBase, layers: int | None) -> tuple[WeightFile, ...]:
    """The files of a staged base, whose headers must fit base.json. The bytes after the headers are
    verified piece by piece when they are read.
    """
    index = staged.index

    def weight_file(number: int) -> WeightFile:
        shard = index.shards[number]
        tensors = [tensor for tensor in index.tensors if tensor.object == number]
        parts = {tensor.name + part.suffix: part for tensor in tensors for part in tensor.parts}

        def verify(start: bytes) -> None:
            header = _header(start, shard.bytes)
            if header.keys() != parts.keys() or any(header[key].shape != parts[key].shape for key in parts):
                raise Unreadable("it holds other tensors than base.json says")

        url = staged.store.url_of(shard.key)
        try:
            first = min(part.start for part in parts.values())
            staged.store.read_verified(shard.key, verify, length=first)
        except ObjectNotFound:
            raise WrongRequest(
                f"{url} is missing or cut short; stage the base again into an empty place."
            ) from None
        except Unreadable as error:
            raise WrongRequest(
                f"{url} is damaged ({error}); stage the base again into an empty place."
            ) from None
        shapes = {
            tensor.name: StoredTensor(tensor.parts[0].dtype, tensor.shape)
            for tensor in tensors
            if is_read(tensor.name, layers)
        }
        return WeightFile(shard.key, shard.bytes, False, shapes)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return tuple(pool.map(weight_file, index.shards_read(layers)))
