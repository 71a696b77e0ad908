"""The one door for documents that others wrote: JSON, YAML, CSV, Parquet and safetensors are read
within bounds of size, depth and type, so that a damaged or hostile one ends in a sentence.

Sizes are looked at before anything is allocated, depth before a parser recurses. What is refused
raises `Unreadable`, whose message is a phrase for the caller's sentence. Nothing that a document
names is run, fetched or unpickled. The price: one scan for brackets where a text has many of them,
0.1 s for the 15 MB of a tekken.json.
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
# tokenizer whose longest text nobody has named.
MAX_DIGITS = 40
MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 256 << 10  # a parser in Python takes a quarter of a second for them
MAX_CSV_BYTES = 64 << 20
MAX_FOOTER_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its library has it
_MAX_NODES = 100_000  # of a YAML document with every alias written out
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # possessive: one pass, whatever the text
_BRACKETS = re.compile(r"[\[\]{}]")
_UNCLEAR = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_MAGIC = b"PAR1"


class Unreadable(ValueError):
    """A document cannot be read; the message is a phrase that says why, on one line."""


class DoubledKey(Unreadable):
    """A key stands twice in an object."""


def _phrase(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _within_bounds(*errors: type[Exception]) -> Iterator[None]:
    """What a parser raises for damage, and for what needs too much of the machine, as
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
        raise Unreadable(_phrase(error)) from None


def bytes_of(path: Path, most_bytes: int) -> bytes:
    """The file's bytes; raises `Unreadable` when there are more than `most_bytes`, also of a device
    without an end, and `OSError`.
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

    `finite` refuses NaN, Infinity and numbers that become one; `once` a key that stands twice in an
    object, of which a parser would keep the last without a word; `whole_characters` half an emoji,
    which no text file can hold.
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
    """The value of one line of posts: their numbers are kept as they are written, whatever they
    are, and half characters too, which `prepare` mends. Raises `Unreadable`, `DoubledKey` for a key
    that stands twice.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_depth(_BRACKETS.findall(_STRINGS.sub("", text)))
    with _within_bounds(ValueError):
        return json.loads(text, object_pairs_hook=_each_once)


def object_in(raw: bytes | str, most_bytes: int = MAX_JSON_BYTES, **rules: bool) -> dict[str, Any]:
    """What `json_in` returns, where the document must be an object."""
    value = json_in(raw, most_bytes, **rules)
    if not isinstance(value, dict):
        raise Unreadable(f"it holds {_kind(value)} and not an object")
    return value


def object_file(path: Path, most_bytes: int = MAX_JSON_BYTES, **rules: bool) -> dict[str, Any]:
    """What `object_in` makes of a file; raises `OSError` too."""
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
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise DoubledKey(f"{double[:80]!r} stands there twice")
    return found


def _refuse_halves(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Unreadable("it has half a character (a surrogate without its other half)") from None


# --- YAML ---


class UnclearNumber(str):
    """A number as it was typed that YAML 1.1 takes for another one than a person reads: 010, which
    is 8 there, and 1:30, which is 90. `reading` says so, in a phrase.
    """

    reading: str

    def __new__(cls, typed: str, value: float) -> UnclearNumber:
        self = super().__new__(cls, typed)
        base = "a number to base 60" if ":" in typed else "an octal number"
        self.reading = f"{typed} is {base} in YAML, {value}"
        return self


class _Plain(yaml.SafeLoader):
    """YAML's safe loader, for numbers of a sane length that read as they are meant."""

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
    """Refuses a key that stands twice in a mapping, of which YAML's own loader would keep the last
    without a word.
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
    """The value of a YAML document of plain values; raises `Unreadable`, also for a date that is
    none. `once` as in `json_in`. Octal numbers and those to base 60 are `UnclearNumber`s.
    """
    require_size(len(raw), most_bytes)
    text = _decoded(raw)
    _refuse_depth(_BRACKETS.findall(text))  # else the scanner takes seconds to come to it
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
    """What `yaml_in` makes of a file; raises `OSError` too."""
    return yaml_in(bytes_of(path, most_bytes), most_bytes, once=once)


def _refuse_expansion(root: yaml.Node) -> None:
    """A short text may name so many aliases within aliases that no memory holds what it means."""
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
    """The rows of a small CSV file by the names of its first row, without what a row has beyond
    them; raises `Unreadable` and `OSError`.
    """
    text = _decoded(bytes_of(path, most_bytes)).removeprefix("\ufeff")  # spreadsheets put one there
    with _within_bounds(csv.Error, ValueError):
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [{name: cell for name, cell in row.items() if isinstance(name, str)} for row in rows]


# --- Parquet ---


def require_footer(tail: bytes, size: int, most_bytes: int = MAX_FOOTER_BYTES) -> None:
    """Raises `Unreadable` unless the last 8 bytes of a Parquet file of `size` bytes name a footer
    that lies in it and is not absurd.
    """
    if size < 12 or len(tail) < 8 or tail[-4:] != _MAGIC:
        raise Unreadable("it does not end as a Parquet file")
    length = int.from_bytes(tail[-8:-4], "little")
    if not 0 < length <= size - 12:
        raise Unreadable(f"its footer of {length:,} bytes does not lie in its {size:,} bytes")
    require_size(length, most_bytes)


@contextmanager
def parquet_errors() -> Iterator[None]:
    """What pyarrow raises for damaged bytes, in any of its families, as `Unreadable`."""
    import pyarrow as pa

    with _within_bounds(
        pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError
    ):
        yield


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`; damage found here, or while its rows are read in the
    block, raises `Unreadable`. Raises `OSError` for a file that cannot be opened.
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
    """Whether a file begins as one that Git LFS left in place of its content."""
    return start.startswith(b"version https://git-lfs.github.com/spec/")


def require_no_lfs_pointer(start: bytes) -> None:
    """Raises `Unreadable` for the beginning of such a file."""
    if is_lfs_pointer(start):
        raise Unreadable("it is a Git LFS pointer and not the file itself: type git lfs pull in its folder")


# --- safetensors ---


def require_tensors_header(start: bytes, size: int) -> None:
    """Raises `Unreadable` unless a safetensors file of `size` bytes, of which `start` are the
    first, begins with a header that lies in it and is JSON within bounds where `start` has it all.
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
    """What `require_tensors_header` makes of a file; raises `OSError` too."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        if len(start) == 8 and (length := struct.unpack("<Q", start)[0]) <= min(size, MAX_HEADER_BYTES):
            start += file.read(length)
    require_tensors_header(start, size)


def tensors_in(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, each float32 and without NaN and infinity: what an adapter
    and an optimizer's moments are. Raises `Unreadable`.
    """
    from safetensors.torch import load

    require_tensors_header(data, len(data))
    with tensor_errors():
        tensors: dict[str, torch.Tensor] = load(data)
    require_finite(tensors)
    return tensors


def tensors_of_file(path: Path) -> dict[str, torch.Tensor]:
    """What `tensors_in` makes of a file, which is not read twice; raises `OSError` too."""
    from safetensors.torch import load_file

    require_tensors_file(path)
    with tensor_errors():
        tensors: dict[str, torch.Tensor] = load_file(path)
    require_finite(tensors)
    return tensors


@contextmanager
def tensor_errors() -> Iterator[None]:
    """What the safetensors library raises for damaged bytes as `Unreadable`."""
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
