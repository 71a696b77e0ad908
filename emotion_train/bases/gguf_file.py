"""Read a GGUF file: metadata at once, one tensor at a time.

The header is parsed here (0.2 s for 49,000 tokens) because the two libraries that also do it take
ten seconds over the vocabulary and differ between versions; only the arithmetic of the quantised
blocks is left to the `gguf` package. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from emotion_train.bases.gemma import gguf_configuration
from emotion_train.edges.bounded import Unreadable, require_no_lfs_pointer
from emotion_train.errors import WrongRequest

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# kinds of text model by GGUF's names of architectures
_KINDS = {"llama": "llama", "gemma3": "gemma3_text"}


@dataclass(frozen=True)
class GgufTensor:
    shape: tuple[int, ...]  # as PyTorch counts it: output dimension first
    kind: int  # ggml's type number, for example 3 = Q4_1
    start: int  # byte of the file


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Parse the header. Raises `WrongRequest` for a file that is cut short, or no GGUF file of
        version 2 or 3.
        """
        path = Path(path)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
        except OSError as error:
            raise WrongRequest(
                f"The base {path} cannot be read ({error.strerror}); give the path of a .gguf file."
            ) from None
        except (struct.error, IndexError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
            why = f": {error}" if isinstance(error, Unreadable) else " (version 2 or 3)"
            raise WrongRequest(f"The base {path} is not a whole GGUF file{why}; download it again.") from None

    @property
    def kind(self) -> str:
        """The kind of its text model, by transformers' name. Raises `WrongRequest` for another
        family.
        """
        if (kind := _KINDS.get(str(self._architecture))) is None:
            raise WrongRequest(
                f"The base {self.path} has the GGUF architecture {self._architecture}; supported are llama,"
                " which includes Mistral and SmolLM2, and gemma3."
            )
        return kind

    def config(self) -> dict[str, Any]:
        """The configuration as in the model's config.json, by transformers' names for its `kind`.
        Raises `WrongRequest` for another family of models (Mistral's text models belong to
        Llama's), for scaled positions or experts, and for a header that lacks a size.
        """
        kind = self.kind
        self._refuse_other_models()
        heads, hidden = self._field("attention.head_count"), self._field("embedding_length")
        embedding = self.tensors.get("token_embd.weight")
        sizes = {
            "vocab_size": self._field("vocab_size") if embedding is None else embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._field("feed_forward_length"),
            "num_hidden_layers": self._field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("attention.head_count_kv", heads),
            "head_dim": self._field("attention.key_length", hidden // heads),
            "max_position_embeddings": self._field("context_length"),
            "rms_norm_eps": self._field("attention.layer_norm_rms_epsilon"),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if kind == "gemma3_text":
            return gguf_configuration(sizes, self._field)
        theta = self._field("rope.freq_base", 10_000.0)
        return sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}

    @property
    def _architecture(self) -> Any:
        return self.metadata.get("general.architecture")

    def _refuse_other_models(self) -> None:
        scaling = self.metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        known = ("none", "linear") if self._architecture == "gemma3" else ("none",)
        scaled = "rope_freqs.weight" in self.tensors or scaling not in known
        if scaled or f"{self._architecture}.expert_count" in self.metadata:
            raise WrongRequest(
                f"The base {self.path} scales its positions or has experts, read from safetensors only; give"
                " such a checkpoint."
            )

    def _field(self, name: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self._architecture}.{name}", default)
        if value is None:
            raise WrongRequest(f"The base {self.path} lacks {self._architecture}.{name}; download it again.")
        return value

    def require_readable(self) -> None:
        """Raises `WrongRequest` where the package that dequantises is missing, and for a tensor
        that it cannot dequantise or that ends beyond the file's end.
        """
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
        except ImportError:
            raise _no_package() from None
        size = self.path.stat().st_size
        for kind in {tensor.kind for tensor in self.tensors.values()}:
            try:
                _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                dequantize(np.zeros((1, block_bytes), dtype=np.uint8), GGMLQuantizationType(kind))
            except (ValueError, KeyError, NotImplementedError):
                raise WrongRequest(
                    f"The base {self.path} has tensors of the GGUF type {kind}, which the package gguf cannot"
                    " turn back into numbers; give a file in F16, BF16, Q8_0, Q4_K_M or the like."
                ) from None
        for name, tensor in self.tensors.items():
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
            if tensor.start + prod(tensor.shape) // block * block_bytes > size:
                raise WrongRequest(f"The base {self.path} ends within {name}; download it again.")

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One tensor, or some of its rows, dequantised to float32."""
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
        except ImportError:
            raise _no_package() from None
        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = tensor.shape[-1] // block * block_bytes
        try:
            raw = np.memmap(
                self.path,
                dtype=np.uint8,
                mode="r",
                offset=tensor.start,
                shape=(*tensor.shape[:-1], row_bytes),
            )
        except ValueError:
            raise WrongRequest(f"The base {self.path} ends within {name}; download it again.") from None
        if len(tensor.shape) == 1:
            return np.asarray(dequantize(np.array(raw), kind), dtype=np.float32)[rows]
        values = dequantize(np.array(raw[rows]), kind)
        return np.asarray(values, dtype=np.float32).reshape(-1, *tensor.shape[1:])


def _no_package() -> WrongRequest:
    return WrongRequest("A .gguf base needs the package gguf; type: pip install 'emotion-train[gguf]'")


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    reader = _Reader(data)
    require_no_lfs_pointer(data[:64])
    if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
        raise ValueError("no GGUF")
    reader.at = 8
    tensor_count, field_count = reader.scalar("<Q"), reader.scalar("<Q")
    metadata = {reader.string(): reader.value(reader.scalar("<I")) for _ in range(field_count)}
    headers = []
    for _ in range(tensor_count):
        name = reader.string()
        shape = tuple(reader.scalar("<Q") for _ in range(reader.scalar("<I")))[::-1]
        headers.append((name, shape, reader.scalar("<I"), reader.scalar("<Q")))
    alignment = int(metadata.get("general.alignment", 32))
    body = -(-reader.at // alignment) * alignment
    tensors = {name: GgufTensor(shape, kind, body + offset) for name, shape, kind, offset in headers}
    if any(tensor.start >= len(data) for tensor in tensors.values()):
        raise ValueError("cut short")
    return GgufFile(path, metadata, tensors)


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        text = self.data[self.at : self.at + length].decode("utf-8")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in (_STRING, _ARRAY):
                return [self.value(item) for _ in range(count)]
            form = f"<{count}{_SCALARS[item][1]}"
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        return self.scalar(_SCALARS[kind])
