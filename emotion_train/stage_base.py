"""Puts the text part of a base into a bucket or folder once, so that runs read it from there in parallel and need no hub.

    emotion-train stage-base mistralai/Mistral-Small-3.1-24B-Base-2503 s3://team/bases/mistral-small
    emotion-launch run --config run.yaml model.base=s3://team/bases/mistral-small

The result is a checkpoint that transformers reads as well. Host memory: some eight objects of half a GiB, or of the largest tensor. Every
object is read back once, so staging moves the base's bytes twice; a second staging reads the source again to compare and writes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from emotion_train.errors import AlreadyExists, ObjectNotFound, WrongRequest
from emotion_train.progress import ProgressLine
from emotion_train.staged import INDEX_KEY, UNFINISHED_KEY, Part, StagedBase, StagedIndex, StagedObject, StagedTensor, read_index
from emotion_train.storage import FolderStore, Store, open_store

if TYPE_CHECKING:
    import torch

    from emotion_train.model.load import BaseConfig
    from emotion_train.model.precision import Codes4bit

SHARD_BYTES = 512 << 20
PIECE_BYTES = 16 << 20
_WRITERS = 4
_WHEN_IT_PAYS = """when it pays:
  Runs on machines that start empty, such as spot GPUs: each start reads 12 GiB (nf4) or 43 GiB (bf16) of Mistral Small from a bucket in
  its own region instead of 48 GB from the hub, needs no token, and goes on when the hub is away. nf4 serves runs with
  model.precision=nf4 only and is a quarter of the bytes; bf16 serves nf4, bf16 and fp8. On a machine that keeps its hub cache there is
  little to gain."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tekken.json")
_SAFETENSORS_NAMES = {"torch.bfloat16": "BF16", "torch.float32": "F32", "torch.uint8": "U8"}
_NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["score"],
}
_NOT_OF_THE_TEXT = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "quantization_config", "architectures")

StagedPrecision = Literal["bf16", "nf4"]


@dataclass(frozen=True)
class StageResult:
    url: str
    index: StagedIndex
    created: bool  # False: the same base was there already


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{_WHEN_IT_PAYS}\n\n{parser.epilog}"
    parser.add_argument("base", metavar="BASE", help="hub id or folder of a safetensors checkpoint (not .gguf, not quantised)")
    parser.add_argument("url", metavar="URL", help="where it goes: s3://bucket/prefix or a folder, empty or of a killed staging")
    parser.add_argument(
        "--precision", choices=("bf16", "nf4"), default="bf16", help="how the linear layers are stored; nf4 serves nf4 runs only (default: bf16)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where nf4 is made; auto takes a GPU that is there (default: auto)"
    )


def run(arguments: argparse.Namespace) -> int:
    result = stage(arguments.base, arguments.url, arguments.precision, arguments.device)
    index = result.index
    words = f"{index.precision}, {index.bytes / 2**30:.2f} GiB in {len(index.shards)} objects, {index.parameters:,} parameters"
    print(f"base    {result.url} ({words}){'' if result.created else ': already there, the same'}")
    print(f"next    model.base={result.url}" + (" model.precision=nf4" if index.precision == "nf4" else ""))
    return 0


def stage(
    base: str,
    url: str,
    precision: StagedPrecision = "bf16",
    device: str = "auto",
    *,
    shard_bytes: int = SHARD_BYTES,
    piece_bytes: int = PIECE_BYTES,
) -> StageResult:
    """Stage `base` at `url`. Raises `WrongRequest` for a base that cannot be staged and for a place that holds something else."""
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.load import read_config
    from emotion_train.model.precision import require_bitsandbytes

    store = open_store(url)
    found = read_config(base)
    _refuse_source(found, store)
    if precision == "nf4":
        require_bitsandbytes()
    place = _device(device, precision)
    PostTokenizer.load(base, 128)
    existing = read_index(store)
    left = _make_room(store, found, precision) if existing is None else set()
    with TemporaryDirectory(prefix="emotion-train-stage-") as folder:
        files = _small_files(found, precision, Path(folder))
        job = _Job(found, precision, place, store if existing is None else None, shard_bytes, piece_bytes)
        index = job.run(files)
    if existing is not None:
        _refuse_other(store, existing, index)
        return StageResult(store.url, existing, False)
    try:
        store.create(INDEX_KEY, index.to_bytes())
    except AlreadyExists:
        raise WrongRequest(f"Another process has staged a base at {store.url} in the meantime; stage into another, empty place.") from None
    for key in sorted(left - {one.key for one in (*index.shards, *index.files)}):
        store.delete(key)
    store.delete(UNFINISHED_KEY)
    return StageResult(store.url, index, True)


# --- at the door ---


def _refuse_source(found: BaseConfig, store: Store) -> None:
    files = found.files
    if files.gguf is not None:
        raise WrongRequest(
            f"The base {files.name} is a GGUF file, which is one small file that is read as it is: copy it to the machine that trains. "
            "To stage, give the folder or hub id of the safetensors checkpoint that it was made from."
        )
    if files.staged is not None and files.staged.index.precision == "nf4":
        raise WrongRequest(
            f"The base {files.name} is already quantised to nf4; give the checkpoint that it was made from, {files.staged.index.source}, or "
            "copy the objects as they are, base.json last."
        )
    source = files.folder or (Path(files.lasting_name) if files.staged is not None else None)
    if isinstance(store, FolderStore) and source is not None:
        target, source = Path(store.url).expanduser().resolve(), source.expanduser().resolve()
        if target == source or source in target.parents:
            raise WrongRequest(f"URL {store.url} lies in the base {files.name}; name a folder outside of it.")


def _device(asked: str, precision: StagedPrecision) -> torch.device:
    """Where to quantise; a copy in bf16 is made on the host."""
    import torch

    if precision == "bf16" or asked == "cpu":
        return torch.device("cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise WrongRequest("--device is cuda and no GPU is visible here; type --device cpu.")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _make_room(store: Store, found: BaseConfig, precision: StagedPrecision) -> set[str]:
    """Mark the place as being written; returns the keys that a killed staging left. Raises `WrongRequest` when others are there."""
    there = {info.key for info in store.list()}
    if there and UNFINISHED_KEY not in there:
        raise WrongRequest(
            f"{store.url} holds {len(there)} other objects, such as {min(there)}, and no staged base; name an empty folder or prefix."
        )
    store.write(UNFINISHED_KEY, json.dumps({"source": found.files.lasting_name, "precision": precision}).encode() + b"\n")
    store.delete("config.json")  # without it no other program takes the rest for a checkpoint
    return there - {UNFINISHED_KEY}


def _content(index: StagedIndex) -> dict[str, Any]:
    """The index without what a copy or another library version changes although the base is the same."""
    content = index.model_dump(exclude={"versions"})
    for described in (*content["shards"], *content["files"]):
        del described["etag"]
    return content


def _refuse_other(store: Store, existing: StagedIndex, index: StagedIndex) -> None:
    old, new = _content(existing), _content(index)
    for name in ("source", "precision", "shape_sha256", "weights_sha256", "quantised_on", *old):
        if old[name] != new[name]:
            short = isinstance(old[name], str | int | None)
            words = f"{name} {old[name]!r} there, {new[name]!r} now" if short else f"its {name} differ"
            raise WrongRequest(
                f"{store.url} holds another staged base ({words}); it is never overwritten. Type another URL, or repeat the base and options "
                "it was made with."
            )
    if missing := StagedBase(store, existing).missing():
        raise WrongRequest(
            f"{store.url} has lost {missing[0]} ({len(missing)} objects in all) since it was staged; delete {INDEX_KEY} there and stage again."
        )


# --- the small files ---


def _small_files(found: BaseConfig, precision: StagedPrecision, folder: Path) -> list[tuple[str, bytes]]:
    """Tokenizer and configuration of the text part, the latter last: nothing reads a checkpoint without it."""
    paths = {name: found.files.file(name) for name in _TOKENIZER_FILES}
    files = [(name, path.read_bytes()) for name, path in paths.items() if path is not None]
    document = _text_config(found)
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    _refuse_changed_config(found, folder)
    if precision == "nf4":
        document["quantization_config"] = _NF4
    return [*files, ("config.json", (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())]


def _text_config(found: BaseConfig) -> dict[str, Any]:
    """As it was published, so that it does not depend on the version of transformers; without the parts that are not staged."""
    from emotion_train.model.load import skeleton

    published = json.loads(found.files.required("config.json").read_text(encoding="utf-8"))
    text = published["text_config"] if found.layout == "multimodal" else published
    kept = {name: value for name, value in text.items() if name not in _NOT_OF_THE_TEXT}
    backbone = type(skeleton(found.text, 2).model).__name__
    return kept | {"model_type": found.text.model_type, "architectures": [backbone], "dtype": "bfloat16"}


def _refuse_changed_config(found: BaseConfig, folder: Path) -> None:
    """The text part alone must mean what it means within the whole configuration."""
    from emotion_train.model.load import read_config

    old, new = (text.to_dict() for text in (found.text, read_config(str(folder)).text))
    different = sorted(name for name in (old.keys() | new.keys()) - set(_NOT_OF_THE_TEXT) if old.get(name) != new.get(name))
    if different:
        raise WrongRequest(
            f"The text part of {found.files.name} does not stand alone: its {', '.join(different)} come from the rest of config.json; "
            "read this base from where it is."
        )


# --- the weights ---


@dataclass
class _Shard:
    """Tensors for one object, collected until there are enough."""

    key: str
    tensors: list[tuple[str, str, tuple[int, ...], dict[str, torch.Tensor]]] = field(default_factory=list)  # name, source, shape, parts
    size: int = 0


class _Job:
    """One pass over the source. Without a store nothing is written and the index says what would have been."""

    def __init__(
        self, found: BaseConfig, precision: StagedPrecision, device: torch.device, store: Store | None, shard_bytes: int, piece_bytes: int
    ) -> None:
        self._found = found
        self._precision = precision
        self._device = device
        self._store = store
        self._shard_bytes = shard_bytes
        self._piece_bytes = piece_bytes
        self._rounded = False

    def run(self, files: list[tuple[str, bytes]]) -> StagedIndex:
        from emotion_train.model.load import Fingerprint, parameters_of, skeleton

        found = self._found
        model = skeleton(found.text, 2)
        shapes = parameters_of(model)
        fingerprint = Fingerprint(found)
        shards: list[StagedObject] = []
        tensors: list[StagedTensor] = []
        working: deque[Future[tuple[StagedObject, list[StagedTensor]]]] = deque()
        with ThreadPoolExecutor(_WRITERS) as pool, ProgressLine("staging", len(shapes), "tensors") as line:
            try:
                for number, shard in enumerate(self._shards(model, fingerprint, line)):
                    working.append(pool.submit(self._finish, shard, number))
                    while len(working) > _WRITERS:
                        _collect(working.popleft().result(), shards, tensors)
                while working:
                    _collect(working.popleft().result(), shards, tensors)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        named = ("model.safetensors.index.json", _safetensors_index(shards, tensors))
        return StagedIndex(
            source=found.files.staged.index.source if found.files.staged is not None else found.files.lasting_name,
            precision=self._precision,
            rounded=self._rounded,
            quantised_on=self._device.type if self._precision == "nf4" else None,
            architecture=found.text.model_type,
            parameters=sum(_count(shape) for shape in shapes.values()),
            shape_sha256=found.shape_sha256,
            weights_sha256=fingerprint.hexdigest(),
            piece_bytes=self._piece_bytes,
            shards=tuple(shards),
            files=tuple(self._put(key, data) for key, data in (named, *files)),
            tensors=tuple(tensors),
            versions=_versions(self._precision),
        )

    def _shards(self, model: Any, fingerprint: Any, line: ProgressLine) -> Iterator[_Shard]:
        from torch import nn

        names = self._sources(model)
        shard = _Shard("model-00001.safetensors")
        for done, (name, tensor) in enumerate(self._tensors(model), 1):
            fingerprint.add(name, tensor)
            is_linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name.endswith(".weight")
            parts = self._parts(tensor, is_linear)
            shard.tensors.append((name, names[name], tuple(tensor.shape), parts))
            shard.size += sum(part.nbytes for part in parts.values())
            line.update(done)
            if shard.size >= self._shard_bytes:
                yield shard
                shard = _Shard(f"model-{int(shard.key[6:11]) + 1:05}.safetensors")
        if shard.tensors:
            yield shard

    def _tensors(self, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        from emotion_train.model.load import open_checkpoint, stream
        from emotion_train.model.staged_weights import staged_tensors

        if self._found.files.staged is None:
            yield from stream(open_checkpoint(self._found, model))
            return
        self._rounded = self._found.files.staged.index.rounded
        for name, tensor in staged_tensors(self._found.files.staged, torch.device("cpu")):
            assert isinstance(tensor, torch.Tensor)  # nf4 was refused as a source
            yield name, tensor

    def _sources(self, model: Any) -> dict[str, str]:
        from emotion_train.model.load import open_checkpoint

        staged = self._found.files.staged
        if staged is not None:
            return {tensor.name: tensor.source for tensor in staged.index.tensors}
        return open_checkpoint(self._found, model).sources

    def _parts(self, tensor: torch.Tensor, is_linear: bool) -> dict[str, torch.Tensor]:
        """What is stored of a tensor, by suffix, on the host."""
        import torch

        from emotion_train.model.precision import Codes4bit, linear_4bit

        if tensor.dtype != torch.bfloat16:
            self._rounded = self._rounded or not torch.equal(tensor.to(torch.bfloat16).to(tensor.dtype), tensor)
        if self._precision == "nf4" and is_linear:
            return _parts_4bit(Codes4bit.of(linear_4bit(tensor.to(self._device), None, self._device)))
        return {"": tensor.to(torch.bfloat16).contiguous()}

    def _finish(self, shard: _Shard, number: int) -> tuple[StagedObject, list[StagedTensor]]:
        header, tensors = _layout(shard, number)
        arrays = [tensor.view(-1).view(_uint8()).numpy().data for *_, parts in shard.tensors for tensor in parts.values()]
        data = b"".join([header, *arrays])
        return self._put(shard.key, data), tensors

    def _put(self, key: str, data: bytes) -> StagedObject:
        """Write and read back, unless the same bytes stand there already."""
        view = memoryview(data)
        pieces = tuple(hashlib.sha256(view[at : at + self._piece_bytes]).hexdigest() for at in range(0, len(data), self._piece_bytes))
        described = StagedObject(key=key, bytes=len(data), etag=None, sha256=hashlib.sha256(data).hexdigest(), pieces=pieces)
        if self._store is None:
            return described
        if (standing := self._stands(described)) is not None:
            return standing
        self._store.write(key, data)
        written = self._stands(described)
        if written is None:
            raise WrongRequest(f"{self._store.url_of(key)} does not hold what was written; is another program writing there? Stage again.")
        return written

    def _stands(self, described: StagedObject) -> StagedObject | None:
        """With its ETag when the store holds exactly these bytes, else None."""
        assert self._store is not None
        try:
            info = self._store.stat(described.key)
        except ObjectNotFound:
            return None
        if info.size != described.bytes:
            return None
        buffer = bytearray(min(self._piece_bytes, described.bytes))
        for place, digest in enumerate(described.pieces):
            start = place * self._piece_bytes
            view = memoryview(buffer)[: min(self._piece_bytes, described.bytes - start)]
            self._store.read_into(described.key, view, start=start, if_match=info.etag)
            if hashlib.sha256(view).hexdigest() != digest:
                return None
        return described.model_copy(update={"etag": info.etag})


def _parts_4bit(made: Codes4bit) -> dict[str, torch.Tensor]:
    """Wide types first and the JSON filled up with spaces, so that every tensor of a file starts at a multiple of its type's size."""
    import torch

    from emotion_train.model.staged_weights import PACKED_STATE

    state = {suffix: tensor.cpu().contiguous() for suffix, tensor in made.state.items()}
    packed = state.pop(PACKED_STATE)
    wide = {suffix: tensor for suffix, tensor in sorted(state.items()) if tensor.dtype == torch.float32}
    narrow = {suffix: tensor for suffix, tensor in sorted(state.items()) if tensor.dtype != torch.float32}
    parts = wide | {"": made.codes.cpu().contiguous()} | narrow
    spaces = -(sum(part.nbytes for part in parts.values()) + len(packed)) % 8
    return parts | {PACKED_STATE: torch.cat([packed, torch.full((spaces,), ord(" "), dtype=torch.uint8)])}


def _layout(shard: _Shard, number: int) -> tuple[bytes, list[StagedTensor]]:
    """Header of the safetensors file, and where its tensors lie. https://github.com/huggingface/safetensors#format"""
    at, header, places = 0, dict[str, Any]({"__metadata__": {"format": "pt"}}), []
    for name, _, _, parts in shard.tensors:
        for suffix, tensor in parts.items():
            dtype, shape = _SAFETENSORS_NAMES[str(tensor.dtype)], tuple(tensor.shape)
            header[name + suffix] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + tensor.nbytes)}
            places.append({"suffix": suffix, "dtype": dtype, "shape": shape, "start": at})
            at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    tensors, rest = [], iter(places)
    for name, source, shape, parts in shard.tensors:
        mine = [next(rest) for _ in parts]
        described = tuple(Part.model_validate(place | {"start": place["start"] + len(raw)}) for place in mine)
        tensors.append(StagedTensor(name=name, source=source, shape=shape, object=number, parts=described))
    return raw, tensors


def _collect(finished: tuple[StagedObject, list[StagedTensor]], shards: list[StagedObject], tensors: list[StagedTensor]) -> None:
    shards.append(finished[0])
    tensors += finished[1]


def _safetensors_index(shards: list[StagedObject], tensors: list[StagedTensor]) -> bytes:
    weight_map = {tensor.name + part.suffix: shards[tensor.object].key for tensor in tensors for part in tensor.parts}
    total = sum(part.bytes for tensor in tensors for part in tensor.parts)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def _count(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


def _uint8() -> Any:
    import torch

    return torch.uint8


def _versions(precision: StagedPrecision) -> dict[str, str]:
    found = {}
    for name in ("emotion-train", "torch", "transformers", *(("bitsandbytes",) if precision == "nf4" else ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source folder
            found[name] = "unknown"
    return found


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["stage-base", *sys.argv[1:]]))
