"""The frozen base as a text classifier: transformers' own XForSequenceClassification, filled tensor
by tensor.

Names and shapes are compared before anything is read, so a checkpoint that does not fit is refused
in a second, not after 40 GB. Only the text tensors are read: the vision part of Mistral Small 3.1
is never opened. Host memory holds a few tensors at a time; with nf4 each is quantised on its device
as it arrives.

`from_pretrained` is not used because it fills what it does not find with random weights, keeps GGUF
blocks or not depending on its version, and wants a key mapping that differs between layouts; what
it yields is what the tests compare with.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from emotion_train.bases.architecture import kind_of, refuse_misfits, text_model, text_name
from emotion_train.bases.depth import is_read
from emotion_train.bases.encoders import head_of, pooling_tensors
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.gguf_file import GgufFile
from emotion_train.bases.headers import damaged, files_of_weights, gguf_places
from emotion_train.errors import WrongRequest
from emotion_train.model.attention import ATTENTION
from emotion_train.model.delta_net import has_delta_nets, read_posts_apart
from emotion_train.model.dropout import Current
from emotion_train.model.encoder import drop_by_post, is_encoder
from emotion_train.model.precision import (
    Codes4bit,
    Formats,
    Precision,
    formats,
    linear_4bit,
    require_bitsandbytes,
)
from emotion_train.model.staged_weights import staged_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "score.weight"  # of a decoder
# endings of what is the identity of a base: tables of words, and norms
SAMPLED = ("embed_tokens.weight", "word_embeddings.weight", "tok_embeddings.weight")
WHOLE = ("norm.weight", "LayerNorm.weight")
_READ_AHEAD = 4  # tensors on the host while one is placed on the device
_SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


Tell = Callable[[int, int], None]  # tensors placed, tensors in all


def tell_nobody(placed: int, total: int) -> None:
    """Nothing is told: the callers show no progress."""


@dataclass(frozen=True)
class BaseInfo:
    """What the base is, apart from where it lies."""

    name: str  # a hub id or an absolute path
    architecture: str
    layout: str  # "text", "multimodal" or "gguf": what the model card's snippet must do to load it
    shape_sha256: str  # of the text configuration
    weights_sha256: str  # of norms and a sample of embedding rows, equal for every precision
    parameters: int
    layers: int | None = None  # blocks that were read, where the base has more: these are whole_layers
    whole_layers: int | None = None


@dataclass(frozen=True)
class BaseConfig:
    """The text configuration of a base, known before any weight is read. A base that is cut to its
    first `layers` of `whole_layers` blocks has the configuration of those.
    """

    files: BaseFiles
    text: Any  # transformers' configuration of the text part
    layout: str
    gguf: GgufFile | None = None
    layers: int | None = None
    whole_layers: int | None = None

    @property
    def shape_sha256(self) -> str:
        shape = {field: getattr(self.text, field, None) for field in _SHAPE_FIELDS}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint's files by the classifier's names. `sources` are the names in the
    files.

    `read_rows` brings the rows from one number up to another, and leaves nothing of the file in
    memory; `read` maps the file, which is quicker.
    """

    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, str]
    read: Callable[[str], torch.Tensor]
    read_rows: Callable[[str, int, int], torch.Tensor]


def read_config(base: str | BaseFiles) -> BaseConfig:
    """Find the base and read its text configuration. Raises `WrongRequest` for anything that cannot
    be trained here.
    """
    files = BaseFiles.find(base) if isinstance(base, str) else base
    model = text_model(files)
    if model.gguf is not None:
        text = _configuration(files.name, {**model.gguf.config(), "model_type": model.kind})
    else:
        document = files.config()
        document.pop("quantization_config", None)  # of a staged base, whose base.json tells
        text = _configuration(files.name, document)
    if model.layers is not None:
        text.num_hidden_layers = model.layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: model.layers]
    return BaseConfig(files, text, model.layout, model.gguf, model.layers, model.whole_layers)


def _configuration(base: str, document: dict[str, Any]) -> Any:
    """transformers' own configuration of this content's text part.

    `AutoConfig.from_pretrained` would ask on standard input whether to run the base's programs.
    """
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[document["model_type"]].from_dict(document).get_text_config()
    except Exception as error:  # transformers and its validators raise errors of many families
        raise WrongRequest(
            f"The config.json of the base {base} cannot be used: {_first_line(error)}."
        ) from None


def load_base(
    base: str | BaseConfig,
    precision: Precision,
    num_labels: int,
    device: torch.device | str,
    *,
    to_be_sharded: bool = False,
    tell: Tell = tell_nobody,
    patience_s: float = 0.0,
) -> tuple[PreTrainedModel, BaseInfo]:
    """A stock `XForSequenceClassification` on `device`, frozen, without cache; its head is float32
    and zero until `init_head`, and so is what `not_stored` names of an encoder.

    Every text tensor of the checkpoint is in it and every one of its tensors comes from the
    checkpoint, else `WrongRequest`. Embeddings and norms have the precision's weight format; with
    nf4 exactly the linear layers of the blocks are 4-bit. An encoder is float32 in any precision,
    since all of it may be trained, and drops its own hidden states by post.

    `to_be_sharded`: a base that need not fit the device. The weights wait in host memory (bf16 ones
    in the page cache, which the processes of a node share) until each is cut, and 4-bit codes lie
    under bfloat16, the type that FSDP and DeepSpeed ZeRO-3 shard.

    The bucket of a staged base that does not answer is asked again for `patience_s` seconds; `tell`
    is called meanwhile too, so that what it raises ends the waiting.
    """
    found = read_config(base) if isinstance(base, str) else base
    kind = formats(precision)
    if kind.quantised:
        require_bitsandbytes()
    device = torch.device(device)
    model = skeleton(found.text, num_labels)
    parameters = parameters_of(model)
    placed = 0
    fingerprint = Fingerprint(found)
    tensors = _tensors_of(
        found,
        model,
        precision,
        torch.device("cpu") if to_be_sharded else device,
        patience_s,
        lambda: tell(placed, len(parameters)),
    )
    for name in getattr(model, "not_stored", ()):
        del parameters[name]

    def told() -> Iterator[tuple[str, torch.Tensor | Codes4bit]]:
        nonlocal placed
        for placed, (name, tensor) in enumerate(tensors, 1):
            fingerprint.add(name, tensor)
            yield name, tensor
            tell(placed, len(parameters))

    fill(model, told(), precision, device, to_be_sharded)
    info = BaseInfo(
        name=found.files.lasting_name,
        architecture=found.text.model_type,
        layout=found.layout,
        shape_sha256=found.shape_sha256,
        weights_sha256=fingerprint.hexdigest(),
        parameters=sum(prod(shape) for shape in parameters.values()),
        layers=found.layers,
        whole_layers=found.whole_layers,
    )
    return model, info


def fill(
    model: Any,
    tensors: Iterable[tuple[str, torch.Tensor | Codes4bit]],
    precision: Precision,
    device: torch.device,
    to_be_sharded: bool = False,
) -> None:
    """Give a `skeleton` these tensors, which are all but its head's, on `device`, frozen; its head
    is float32 and zero.
    """
    kind = formats(precision)
    if is_encoder(model.config):
        kind = replace(kind, weights=torch.float32)
    for name, tensor in tensors:
        _place(model, name, tensor, kind, device, to_be_sharded)
    _fill_the_rest(model, device)
    model.requires_grad_(False).eval()
    model.is_loaded_in_4bit = kind.quantised  # by this mark PEFT knows which adapter layers to make
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"never filled: {left}"


def _fill_the_rest(model: Any, device: torch.device) -> None:
    """What is in no checkpoint: buffers, the head and, of some encoders, the layers before it."""
    body = model.base_model
    if model.config.model_type == "gemma3_text":  # a buffer that no checkpoint has
        body.embed_tokens.embed_scale = torch.tensor(model.config.hidden_size**0.5, device=device)
    if hasattr(body, "rotary_emb"):
        body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    else:
        rows = model.config.max_position_embeddings
        body.embeddings.position_ids = torch.arange(rows, device=device).expand((1, -1))
        body.embeddings.token_type_ids = torch.zeros((1, rows), dtype=torch.long, device=device)
    head = head_of(model.config.model_type)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and (
            name.rpartition(".")[0] == head or name in getattr(model, "not_stored", ())
        ):
            owner, _, leaf = name.rpartition(".")
            zeros = nn.Parameter(torch.zeros(parameter.shape, device=device))
            setattr(model.get_submodule(owner), leaf, zeros)
    if is_encoder(model.config):
        drop_by_post(model, Current())


def open_checkpoint(found: BaseConfig, model: nn.Module) -> Weights:
    """The base's files, compared with the model's names and shapes; nothing of the weights is read
    yet. What an encoder's checkpoint may leave out and does is noted as the model's `not_stored`.
    Raises `WrongRequest`.
    """
    weights = (
        _gguf_weights(found.gguf, found.text, found.layers)
        if found.gguf is not None
        else _safetensors_weights(found.files, found.layers)
    )
    wanted = parameters_of(model)
    optional = pooling_tensors(found.text.to_dict()) if is_encoder(found.text) else {}
    if not optional.keys() & weights.shapes.keys():
        vars(model)["not_stored"] = tuple(optional)
        wanted = {name: shape for name, shape in wanted.items() if name not in optional}
    refuse_misfits(found.files.name, wanted, weights.shapes)
    return weights


def _tensors_of(
    found: BaseConfig,
    model: nn.Module,
    precision: Precision,
    device: torch.device,
    patience_s: float,
    meanwhile: Callable[[], None],
) -> Iterator[tuple[str, torch.Tensor | Codes4bit]]:
    """Every tensor of the base once, those of a staged base on `device` and others on the host."""
    staged = found.files.staged
    if staged is None:
        return stream(open_checkpoint(found, model))
    staged.refuse_other_precision(precision)
    read = staged.index.tensors_read(found.layers)
    refuse_misfits(found.files.name, parameters_of(model), {tensor.name: tensor.shape for tensor in read})
    return staged_tensors(staged, device, patience_s, meanwhile, None if found.layers is None else read)


def parameters_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of what comes from the base: everything but the head."""
    head = head_of(model.config.model_type)  # type: ignore[union-attr, arg-type]
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] != head
    }


def skeleton(text_config: Any, num_labels: int) -> Any:
    """The classifier without storage."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(text_config)
    config.num_labels = num_labels
    config.use_cache = False  # with a cache the posts of a pack see each other
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
        )
    if has_delta_nets(config):
        read_posts_apart(model)
    return model


def _place(
    model: Any,
    name: str,
    tensor: torch.Tensor | Codes4bit,
    kind: Formats,
    device: torch.device,
    to_be_sharded: bool,
) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if kind.quantised and leaf == "weight" and isinstance(owner, nn.Linear):
        parent, _, child = owner_name.rpartition(".")
        layer = linear_4bit(tensor, owner.bias, device, torch.bfloat16 if to_be_sharded else torch.uint8)
        if to_be_sharded:
            # the codes; their scales, a thirtieth of them, stay on the device
            layer.weight.data = layer.weight.data.cpu()
        setattr(model.get_submodule(parent), child, layer)
        return
    assert isinstance(tensor, torch.Tensor)  # codes come for linear layers only
    place = torch.device("cpu") if to_be_sharded else device
    setattr(owner, leaf, nn.Parameter(tensor.to(device=place, dtype=kind.weights), requires_grad=False))


def stream(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor once; weights before biases, a few read ahead of use."""
    names = deque(in_order(weights.shapes))
    ahead: deque[tuple[str, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        while names or ahead:
            while names and len(ahead) < _READ_AHEAD:
                name = names.popleft()
                ahead.append((name, pool.submit(weights.read, name)))
            name, reading = ahead.popleft()
            yield name, reading.result()


def in_order(names: Iterable[str]) -> list[str]:
    """The names of a base's tensors in the order of reading: weights before biases, block by
    block.
    """
    return sorted(names, key=lambda name: (not name.endswith(".weight"), _natural(name)))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


class Fingerprint:
    """Identity of a base's weights: its shape, its norms and a sample of embedding rows in
    bfloat16, the same for every precision.
    """

    def __init__(self, found: BaseConfig) -> None:
        self._digest = hashlib.sha256(found.shape_sha256.encode())

    def add(self, name: str, tensor: torch.Tensor | Codes4bit) -> None:
        """Every tensor, in the order of `stream`."""
        if isinstance(tensor, Codes4bit):
            return
        if name.endswith(SAMPLED):
            tensor = tensor[:: max(1, len(tensor) // 64)]
        elif not name.endswith(WHOLE):
            return
        self._digest.update(
            name.encode() + tensor.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()
        )

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


# --- safetensors ---


def _safetensors_weights(files: BaseFiles, layers: int | None) -> Weights:
    from safetensors import SafetensorError, safe_open

    place: dict[str, tuple[Path, Any, str]] = {}
    kind = kind_of(files)
    for path, keys in files_of_weights(files, layers).items():
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(path, files.name, _first_line(error)) from None
        present: set[str] = set(file.keys())  # type: ignore[no-untyped-call]
        for key in present if keys is None else present & keys:
            if (name := text_name(key, kind)) is not None and is_read(name, layers):
                place[name] = (path, file, key)
    shapes = {name: tuple(file.get_slice(key).get_shape()) for name, (_, file, key) in place.items()}

    def read(name: str) -> torch.Tensor:
        _, file, key = place[name]
        tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def read_rows(name: str, start: int, stop: int) -> torch.Tensor:
        path, _, key = place[name]
        # the pages of a mapping that stays open count as memory of this process
        with safe_open(path, framework="pt") as file:
            rows: torch.Tensor = file.get_slice(key)[start:stop].clone()
        return rows

    return Weights(shapes, {name: key for name, (_, _, key) in place.items()}, read, read_rows)


# --- GGUF ---


def _gguf_weights(gguf: GgufFile, config: Any, layers: int | None) -> Weights:
    stored = gguf_places(gguf.kind, gguf.tensors, layers)
    is_gemma = gguf.kind == "gemma3_text"  # of which llama.cpp leaves the rows as they are
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = {} if is_gemma else heads

    def read(name: str) -> torch.Tensor:
        tensor = torch.from_numpy(gguf.read(stored[name]))
        if is_gemma and name.endswith("norm.weight"):
            return tensor - 1  # llama.cpp stores what the norm multiplies by, transformers 1 less
        layer = name.split(".")[-2]
        return _halves(tensor, heads[layer]) if layer in heads else tensor

    def read_rows(name: str, start: int, stop: int) -> torch.Tensor:
        # of other rows in the file, or of other numbers
        if name.split(".")[-2] in heads or (is_gemma and name.endswith("norm.weight")):
            return read(name)[start:stop].clone()
        return torch.from_numpy(gguf.read(stored[name], slice(start, stop)))

    return Weights({name: gguf.tensors[key].shape for name, key in stored.items()}, stored, read, read_rows)


def _halves(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a rotary projection from llama.cpp's order (pairs side by side) back to transformers'
    (first halves, then second).
    """
    rows, columns = weight_OI.shape
    return weight_OI.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
