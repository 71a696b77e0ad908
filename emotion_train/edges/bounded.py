"""The one door for documents from outside: JSON, YAML, CSV, Parquet and safetensors are read within
bounds of size, depth and type, so that a damaged or hostile document ends in a sentence.

Sizes are checked before anything is allocated, and depth before a parser recurses. A refused
document raises `Unreadable`, with a phrase for the caller's sentence. Nothing that a document names
is run, fetched or unpickled. The price: one scan for brackets in a text with many of them, 0.1 s
for the 15 MB of a tekken.json.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 64
# Digits of a whole number; 2**63 has 19. transformers writes int(1e30), which has 31, for a
# tokenizer without a longest text.
MAX_DIGITS = 40
MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 256 << 10  # a parser in Python takes a quarter of a second for them
MAX_CSV_BYTES = 64 << 20
MAX_FOOTER_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as in its library
_MAX_NODES = 100_000  # of a YAML document with every alias written out
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # possessive: one pass, whatever the text
_BRACKETS = re.compile(r"[\[\]{}]")
_UNCLEAR = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_MAGIC = b"PAR1"


class Unreadable(ValueError):
    """A document cannot be read; the message is a phrase that says why, on one line."""


class DoubledKey(Unreadable):
    """An object has a key twice."""


def phrase(error: BaseException) -> str:
    """Why a document cannot be read, on one line. Pydantic's errors span a page with a link for
    programmers; the first of them is told by its field.
    """
    from pydantic import ValidationError

    words = str(error)
    if isinstance(error, ValidationError):
        first, *others = error.errors(include_url=False)
        where = ".".join(map(str, first["loc"]))
        more = f", and {len(others)} more" if others else ""
        words = f"{where}: {first['msg']}{more}".removeprefix(": ").replace("Value error, ", "")
    return " ".join(words.split())[:200] or type(error).__name__


@contextmanager
def _within_bounds(*errors: type[Exception]) -> Iterator[None]:
    """Turns a parser's errors for damage, or for a document too large for the machine, into
    `Unreadable`.
    """
    try:
        yield
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except MemoryError:
        raise Unreadable("it needs more memory than there is") from None
    except errors as error:
        raise Unreadable(phrase(error)) from None


def bytes_of(path: Path, most_bytes: int) -> bytes:
    """The file's bytes; raises `OSError`, and `Unreadable` when there are more than `most_bytes`,
    as on an endless device.
    """
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    require_size(len(raw), most_bytes)
    return raw


def require_size(size: int, most_bytes: int) -> None:
    """Raises `Unreadable` for more bytes than are allowed."""
    if size > most_bytes:
        raise Unreadable(f"it has more than {most_bytes:,} bytes, which no such file has")


def _decoded(raw: bytes | str) -> str:
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} is not UTF-8") from None


# --- JSON ---


def json_in(
    raw: bytes | str,
    most_bytes: int = MAX_JSON_BYTES,
    *,
    finite: bool = True,
    once: bool = False,
    whole_characters: bool = True,
) -> Any:
    """The value of a JSON document. Raises `Unreadable`.

    `finite` refuses NaN, Infinity and numbers that become infinite; `once` refuses a key that an
    object has twice, where a parser would silently keep the last; `whole_characters` refuses half
    an emoji, which no text file can hold.
    """
    require_size(len(raw), most_bytes)
    if isinstance(raw, bytes):
        require_no_lfs_pointer(raw)
    text = _decoded(raw)
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_depth(_BRACKETS.findall(_STRINGS.sub("", text)))
    with _within_bounds(ValueError):
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite if finite else None,
            parse_constant=_no_number if finite else None,
            object_pairs_hook=_each_once if once else None,
        )
    if whole_characters and _HALF.search(text):
        _refuse_halves(value)
    return value


def line_in(text: str) -> Any:
    """The value of one line of posts. Any numbers are allowed, and half characters, which `prepare`
    mends. Raises `Unreadable`, and `DoubledKey` for a key that an object has twice.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_depth(_BRACKETS.findall(_STRINGS.sub("", text)))
    try:
        return _LINE.decode(text)
    except (ValueError, RecursionError, MemoryError):
        with _within_bounds(ValueError):  # entered for a bad line only: it costs as much as a good one
            raise


def object_in(raw: bytes | str, most_bytes: int = MAX_JSON_BYTES, **rules: bool) -> dict[str, Any]:
    """The object in a JSON document, by the rules of `json_in`; raises `Unreadable` for another
    value.
    """
    value = json_in(raw, most_bytes, **rules)
    if not isinstance(value, dict):
        raise Unreadable(f"it holds {_kind(value)} and not an object")
    return value


def object_file(path: Path, most_bytes: int = MAX_JSON_BYTES, **rules: bool) -> dict[str, Any]:
    """The object in a JSON file, as by `object_in`; also raises `OSError`."""
    return object_in(bytes_of(path, most_bytes), most_bytes, **rules)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_depth(brackets: Iterable[str]) -> None:
    depth = 0
    for bracket in brackets:
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Unreadable(f"{digits[:40]} is too large a number")
    return number


def _no_number(word: str) -> float:
    raise Unreadable(f"it has {word} for a number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    by_name = dict(pairs)
    if len(by_name) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise DoubledKey(f"{double[:80]!r} stands there twice")
    return by_name


_LINE = json.JSONDecoder(object_pairs_hook=_each_once)  # `json.loads` makes one for each call


def _refuse_halves(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Unreadable("it has half a character (a surrogate without its other half)") from None


# --- YAML ---


class UnclearNumber(str):
    """A typed number that YAML 1.1 reads differently from a person: 010, which is 8 in YAML, and
    1:30, which is 90. `reading` says so in a phrase.
    """

    reading: str

    def __new__(cls, typed: str, value: float) -> UnclearNumber:
        self = super().__new__(cls, typed)
        base = "a number to base 60" if ":" in typed else "an octal number"
        self.reading = f"{typed} is {base} in YAML, {value}"
        return self


class _Plain(yaml.SafeLoader):
    """YAML's safe loader, with numbers of a sane length and `UnclearNumber`s."""

    def clear_int(self, node: yaml.ScalarNode) -> int | UnclearNumber:
        if len(node.value) > MAX_DIGITS:
            raise Unreadable(f"it has a number of {len(node.value):,} digits")
        value = int(self.construct_yaml_int(node))
        return UnclearNumber(node.value, value) if _UNCLEAR.fullmatch(node.value) else value

    def clear_float(self, node: yaml.ScalarNode) -> float | UnclearNumber:
        value = float(self.construct_yaml_float(node))
        return UnclearNumber(node.value, value) if _UNCLEAR.fullmatch(node.value) else value


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.clear_int)
_Plain.add_constructor("tag:yaml.org,2002:float", _Plain.clear_float)


class _OnceEach(_Plain):
    """Refuses a key that a mapping has twice, where YAML's own loader would silently keep the
    last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice; leave one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def yaml_in(raw: bytes | str, most_bytes: int = MAX_YAML_BYTES, *, once: bool = False) -> Any:
    """The value of a YAML document of plain values; raises `Unreadable`, also for an impossible
    date. `once` as in `json_in`. Octal numbers and numbers to base 60 become `UnclearNumber`s.
    """
    require_size(len(raw), most_bytes)
    text = _decoded(raw)
    _refuse_depth(_BRACKETS.findall(text))  # the scanner would take seconds to refuse it
    with _within_bounds(yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        loader = (_OnceEach if once else _Plain)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_expansion(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()


def yaml_file(path: Path, most_bytes: int = MAX_YAML_BYTES, *, once: bool = False) -> Any:
    """The value of a YAML file, as by `yaml_in`; also raises `OSError`."""
    return yaml_in(bytes_of(path, most_bytes), most_bytes, once=once)


def _refuse_expansion(root: yaml.Node) -> None:
    """Raises `Unreadable` for too many values: aliases within aliases let a short text stand for
    more than any memory holds.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            parts = (
                node.value
                if isinstance(node, yaml.SequenceNode)
                else [p for pair in node.value for p in pair]
            )
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        return sizes[id(node)]

    if size(root, 0) > _MAX_NODES:
        raise Unreadable(f"its aliases stand for more than {_MAX_NODES:,} values")


# --- CSV ---


def csv_rows(path: Path, most_bytes: int = MAX_CSV_BYTES) -> list[dict[str, str | None]]:
    """The rows of a small CSV file by the names in its first row, without any further cells; raises
    `Unreadable` and `OSError`.
    """
    text = _decoded(bytes_of(path, most_bytes)).removeprefix("\ufeff")  # spreadsheets write one
    with _within_bounds(csv.Error, ValueError):
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [{name: cell for name, cell in row.items() if isinstance(name, str)} for row in rows]


# --- Parquet ---


def require_footer(tail: bytes, size: int, most_bytes: int = MAX_FOOTER_BYTES) -> None:
    """Raises `Unreadable` unless the last 8 bytes of a Parquet file of `size` bytes name a footer
    that fits in the file and has a sane size.
    """
    if size < 12 or len(tail) < 8 or tail[-4:] != _MAGIC:
        raise Unreadable("it does not end as a Parquet file")
    length = int.from_bytes(tail[-8:-4], "little")
    if not 0 < length <= size - 12:
        raise Unreadable(f"its footer of {length:,} bytes does not lie in its {size:,} bytes")
    require_size(length, most_bytes)


@contextmanager
def parquet_errors() -> Iterator[None]:
    """Turns pyarrow's errors for damaged bytes, of all its families, into `Unreadable`."""
    import pyarrow as pa

    with _within_bounds(
        pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError
    ):
        yield


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`. Damage found on opening, or while the block reads its
    rows, raises `Unreadable`; a file that cannot be opened raises `OSError`.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        require_footer(file.read(8), size)
    with parquet_errors():
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as parquet:
            yield parquet


# --- Git LFS ---


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file begins as a pointer that Git LFS left in place of its content."""
    return start.startswith(b"version https://git-lfs.github.com/spec/")


def require_no_lfs_pointer(start: bytes) -> None:
    """Raises `Unreadable` for the beginning of a Git LFS pointer."""
    if is_lfs_pointer(start):
        raise Unreadable("it is a Git LFS pointer and not the file itself: type git lfs pull in its folder")


# --- safetensors ---


def require_tensors_header(start: bytes, size: int) -> None:
    """Raises `Unreadable` unless a safetensors file of `size` bytes, which begins with `start`, has
    a header that fits in it, and that is JSON within bounds if `start` holds the whole header.
    """
    require_no_lfs_pointer(start)
    if len(start) < 8:
        raise Unreadable("it has no safetensors header")
    (length,) = struct.unpack("<Q", start[:8])
    if length > size - 8:
        raise Unreadable(f"its header of {length:,} bytes does not lie in its {size:,} bytes")
    require_size(length, MAX_HEADER_BYTES)
    if len(start) >= 8 + length:
        object_in(start[8 : 8 + length], MAX_HEADER_BYTES)


def require_tensors_file(path: Path) -> None:
    """Does for a file what `require_tensors_header` does for bytes; also raises `OSError`."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        if len(start) == 8 and (length := struct.unpack("<Q", start)[0]) <= min(size, MAX_HEADER_BYTES):
            start += file.read(length)
    require_tensors_header(start, size)


def tensors_in(data: bytes | memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; they share the memory of a buffer that can be written to,
    and of other bytes they are copies. Raises `Unreadable` unless each is float32 without NaN and
    infinity, as in an adapter and an optimizer's moments.
    """
    from safetensors.torch import load

    if isinstance(data, memoryview) and not data.readonly:
        tensors = _views(data)
    else:
        data = bytes(data)
        require_tensors_header(data, len(data))
        with tensor_errors():
            tensors = load(data)
    require_finite(tensors)
    return tensors


def _views(buffer: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a file in this buffer, not copied. As in the safetensors library they lie one
    after the other and fill the file.
    """
    import numpy as np
    import torch

    length = int.from_bytes(buffer[:8], "little")
    start = bytes(buffer[: 8 + min(length, MAX_HEADER_BYTES)])
    require_tensors_header(start, len(buffer))
    header = object_in(start[8:], MAX_HEADER_BYTES)
    header.pop("__metadata__", None)
    content = buffer[8 + length :]
    tensors, at = {}, 0
    with tensor_errors():
        for name, facts in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            dtype, shape, (begin, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
            if dtype != "F32":
                raise Unreadable(f"{name[:120]} is {str(dtype)[:20]} and not float32")
            if begin != at or end - begin != 4 * math.prod(shape) or min(shape, default=1) < 0:
                raise Unreadable(f"{name[:120]} has a shape or a place that does not fit the file")
            at = end
            flat = np.frombuffer(content[begin:end], np.float32)
            aligned = flat if flat.flags.aligned else flat.copy()
            tensors[name] = torch.from_numpy(aligned).reshape(shape)
    if at != len(content):
        raise Unreadable(f"its tensors end at byte {at:,} of {len(content):,}")
    return tensors


def tensors_to_buffers(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """The buffers that, one after the other, are the safetensors file of these float32 tensors; all
    but the first share the tensors' memory. The bytes are those that the library writes.
    """
    import numpy as np
    import torch

    header, buffers, at = {}, list[bytes | memoryview](), 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        buffers.append(tensor.reshape(-1).numpy().view(np.uint8).data)
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *buffers]


def tensors_of_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, read once, as by `tensors_in`; also raises `OSError`."""
    from safetensors.torch import load_file

    require_tensors_file(path)
    with tensor_errors():
        tensors: dict[str, torch.Tensor] = load_file(path)
    require_finite(tensors)
    return tensors


@contextmanager
def tensor_errors() -> Iterator[None]:
    """Turns the safetensors library's errors for damaged bytes into `Unreadable`."""
    from safetensors import SafetensorError

    with _within_bounds(SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        yield


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `Unreadable` for a tensor that is not float32, or that holds NaN or infinity."""
    import torch

    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise Unreadable(f"{name[:120]} is {str(tensor.dtype).removeprefix('torch.')} and not float32")
        if not bool(torch.isfinite(tensor).all()):
            raise Unreadable(f"{name[:120]} holds NaN or infinity")
