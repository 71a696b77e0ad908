"""The adapter: LoRA on the linear layers of the text blocks and the head beside it, float32, in
PEFT's own layout; or all weights of an encoder, which is trained whole.

A saved folder opens with plain `peft` and `transformers` (its README.md holds the program) and with
`load_adapter`, which refuses a base that the adapter was not made for. One of a whole encoder is a
checkpoint that `transformers` alone opens, and needs no base.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from emotion_train.bases.depth import blocks_words
from emotion_train.bases.encoders import ENCODER_PRECISIONS, ENCODERS, head_of, pooling_modules
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.public_names import public_base
from emotion_train.config import LoraSection
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.edges.bounded import Unreadable, tensors_of_file
from emotion_train.errors import WrongRequest
from emotion_train.model.card import CardFacts, model_card
from emotion_train.model.dropout import PostDropout, current_of, product_number
from emotion_train.model.encoder import is_encoder, target_pattern
from emotion_train.model.encoder import product_number as encoder_product
from emotion_train.model.facts import FACTS, LABELS, AdapterFacts, read_facts, refuse_other_weights_file
from emotion_train.model.fused import ADAPTER
from emotion_train.model.head import EmotionClassifier, TrainedRows, generator, init_head
from emotion_train.model.load import BaseConfig, BaseInfo, Tell, load_base, read_config, tell_nobody
from emotion_train.model.precision import Precision, import_bitsandbytes_quickly
from emotion_train.sizing.shape import layer_names, target_names
from emotion_train.storage.document import file_sha256

_PEFT = "base_model.model."
_HEADS = ("score", "classifier", "classifier.out_proj")


@dataclass(frozen=True)
class LoadedAdapter:
    """A saved adapter on its base, with the tokenizer, labels and facts of its folder."""

    model: EmotionClassifier
    tokenizer: PostTokenizer
    labels: tuple[str, ...]
    facts: AdapterFacts


def build_classifier(
    base: str | BaseConfig,
    precision: Precision,
    num_labels: int,
    lora: LoraSection | None,
    seed: int,
    device: torch.device | str,
    *,
    auxiliary: int = 0,
    to_be_sharded: bool = False,
    tell: Tell = tell_nobody,
    patience_s: float = 0.0,
) -> tuple[EmotionClassifier, BaseInfo]:
    """The base on `device` with a fresh head and adapter: what a run starts from. `lora` None: all
    of the base, an encoder, is trained. The last `auxiliary` of the labels are those of training
    alone. `to_be_sharded` and `patience_s` as in `load_base`.
    """
    network, info = load_base(
        base, precision, num_labels, device, to_be_sharded=to_be_sharded, tell=tell, patience_s=patience_s
    )
    init_head(network, seed)
    if auxiliary:
        parent, _, head = head_of(cast(Any, network.config).model_type).rpartition(".")
        owner: Any = network.get_submodule(parent)
        setattr(owner, head, TrainedRows(getattr(owner, head), num_labels - auxiliary))
    trained = network.requires_grad_(True) if lora is None else attach_lora(network, lora, seed)
    return EmotionClassifier(trained, precision), info


def attach_lora(network: nn.Module, lora: LoraSection, seed: int) -> nn.Module:
    """PEFT's model around the stock classifier; exactly the adapter and the head require gradients,
    all float32.

    The start depends on `seed` and the parameters' names alone: B is zero, A is PEFT's
    Kaiming-uniform drawn from a stream per name.
    """
    import_bitsandbytes_quickly()
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    names, kind = target_names(lora.targets), network.config.model_type  # type: ignore[union-attr]
    of_encoder = kind in ENCODERS
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_pattern(names) if of_encoder else list(layer_names(lora.targets, str(kind))),
        modules_to_save=list(pooling_modules(str(kind))),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing that PEFT warns of here is the user's choice
        # PEFT's own numbers, which take half a second of a 24B base, are not drawn
        adapted: nn.Module = get_peft_model(network, config, low_cpu_mem_usage=True)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            device = module.get_base_layer().weight.device
            for part in (module.lora_A, module.lora_B):
                part.to_empty(device=device)
    own = adapter_parameters(adapted)
    a_names = [name for name in own if ".lora_A." in name]
    with torch.no_grad(), ThreadPoolExecutor() as pool:
        drawn = pool.map(lambda name: _drawn(seed, name, own[name].shape), a_names)
        for name, parameter in own.items():
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                parameter.zero_()
            parameter.requires_grad_(True)
        for name, numbers_RI in zip(a_names, drawn, strict=True):
            own[name].copy_(numbers_RI)
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Autocast then brings the small matrices to bfloat16; PEFT would bring the activations
            # to float32, twice their memory.
            vars(module)["cast_input_dtype_enabled"] = False
    current = current_of(adapted)
    for module in adapted.modules():
        if isinstance(module, PostDropout):
            module.current = current  # of modules_to_save PEFT has made copies
    if lora.dropout > 0:
        _drop_by_post(adapted, lora.dropout, encoder_product if of_encoder else product_number)
    return adapted


def _drawn(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """kaiming_uniform_(a=sqrt(5)) of a matrix with that many inputs."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, name))


def _drop_by_post(adapted: nn.Module, p: float, number_of: Callable[[str], int]) -> None:
    """Put our own dropout in the place of PEFT's."""
    current = current_of(adapted)
    for name, module in list(adapted.named_modules()):
        if isinstance(dropouts := getattr(module, "lora_dropout", None), nn.ModuleDict):
            dropouts[ADAPTER] = PostDropout(p, number_of(name), current)


def adapter_parameters(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter and head under the names that they have in a PEFT file; all weights of a model that
    has no adapter.
    """
    if not hasattr(adapted, "peft_config"):
        return dict(adapted.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for name, parameter in adapted.named_parameters():
        if any(f".{part}.{ADAPTER}." in name for part in ("lora_A", "lora_B", "modules_to_save")):
            found[peft_name(name)] = parameter
    return found


def peft_name(name: str) -> str:
    """The name in a PEFT file of a parameter of adapter or head, which the model calls `name`.

    >>> peft_name("network.base_model.model.score.modules_to_save.default.weight")
    'base_model.model.score.weight'
    """
    name = name.removeprefix("network.")
    return name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")


def adapter_state(model: EmotionClassifier) -> dict[str, torch.Tensor]:
    """Copy of adapter and head on the CPU, under the names of a PEFT file."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in adapter_parameters(model.network).items()
    }


def load_adapter_state(model: EmotionClassifier, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a state into the model. Raises `WrongRequest` unless names and shapes are exactly the
    model's.
    """
    copy_state(adapter_parameters(model.network), state)


def copy_state(own: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    """Copy a state into these parameters, each of which is whole here; raises as
    `load_adapter_state` does.
    """
    refuse_misfits({name: tuple(parameter.shape) for name, parameter in own.items()}, state)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def refuse_misfits(own: Mapping[str, tuple[int, ...]], state: Mapping[str, torch.Tensor]) -> None:
    """Raises `WrongRequest` unless the names and shapes of a state are exactly the model's
    `own`.
    """
    problems = [f"lacks {name}" for name in sorted(own.keys() - state.keys())]
    problems += [f"has {name}, which the model has not" for name in sorted(state.keys() - own.keys())]
    problems += [
        f"has {name} of shape {tuple(state[name].shape)} instead of {own[name]}"
        for name in sorted(own.keys() & state.keys())
        if own[name] != tuple(state[name].shape)
    ]
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise WrongRequest(
            f"This adapter does not fit the model: it {'; it '.join(problems[:2])}{more}. Give the LoRA"
            " settings and labels of its run."
        )


def with_temperature(
    state: Mapping[str, torch.Tensor], temperature: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The state whose logits are those of this one divided by the temperature, one number or one a
    label: the head's weight, and its bias where it has one, divided in float32.
    """
    by = torch.tensor(temperature, dtype=torch.float32)
    return {
        name: tensor / (by if tensor.ndim == 1 else by[:, None]) if is_of_head(name) else tensor
        for name, tensor in state.items()
    }


def of_main_labels(state: Mapping[str, torch.Tensor], labels: int) -> dict[str, torch.Tensor]:
    """The state whose head has the first so many rows, those of the labels that are published."""
    return {
        name: tensor[:labels].contiguous() if is_of_head(name) else tensor for name, tensor in state.items()
    }


def is_of_head(name: str) -> bool:
    """Whether a tensor of a state is the head's, whose rows are labels."""
    return name.removeprefix(_PEFT).rpartition(".")[0] in _HEADS


# --- the folder ---


def save_adapter(
    model: EmotionClassifier,
    folder: str | Path,
    *,
    tokenizer: PostTokenizer,
    facts: AdapterFacts,
    state: Mapping[str, torch.Tensor] | None = None,
    metrics_lines: Sequence[str] = (),
    card_sections: Sequence[str] = (),
    card_header: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter in PEFT's layout, or a whole encoder in transformers', with tokenizer,
    labels, facts and model card. `state` (default: the model's) is what is saved; the last three
    are those of `CardFacts`.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(state) if state is not None else adapter_state(model),
        folder / facts.weights_file,
        metadata={"format": "pt"},
    )
    if facts.lora is None:
        _write_json(folder / "config.json", _whole_config(model, tokenizer, facts))
    else:
        _write_json(folder / "adapter_config.json", _peft_config(model, facts))
    tokenizer.save(folder)
    _write_json(folder / LABELS, {"labels": list(facts.labels)})
    stored = facts.model_copy(update={"weights_sha256": file_sha256(folder / facts.weights_file)})
    _write_json(folder / FACTS, stored.model_dump(mode="json", exclude={"labels"}))
    card = CardFacts(
        base=facts.base,
        layout=facts.layout,
        precision=facts.precision,
        max_length=facts.max_length,
        labels=facts.labels,
        lora_r=0 if facts.lora is None else facts.lora.r,
        lora_alpha=0 if facts.lora is None else facts.lora.alpha,
        lora_targets=() if facts.lora is None else layer_names(facts.lora.targets, facts.architecture),
        architecture=facts.architecture,
        whole=facts.lora is None,
        targets=facts.targets,
        run_id=facts.run_id,
        metrics_lines=metrics_lines,
        sections=card_sections,
        header=card_header,
        layers=facts.layers,
        whole_layers=facts.whole_layers,
    )
    (folder / "README.md").write_text(model_card(card), encoding="utf-8")


def _peft_config(model: EmotionClassifier, facts: AdapterFacts) -> dict[str, Any]:
    config: dict[str, Any] = model.network.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr, index]
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {
        **config,
        "base_model_name_or_path": public_base(facts.base),
        "inference_mode": True,
        "modules_to_save": list(pooling_modules(model.classifier.config.model_type)),
    }


def _whole_config(model: EmotionClassifier, tokenizer: PostTokenizer, facts: AdapterFacts) -> dict[str, Any]:
    """The config.json of a whole encoder, with which a pipeline answers as `predict` does."""
    stock = model.classifier
    config: dict[str, Any] = json.loads(stock.config.to_json_string(use_diff=False))
    several = facts.targets == "several"
    return {
        **{key: value for key, value in config.items() if not key.startswith("_")},
        "architectures": [type(stock).__name__],
        "dtype": "float32",
        "id2label": {str(number): label for number, label in enumerate(facts.labels)},
        "label2id": {label: number for number, label in enumerate(facts.labels)},
        "pad_token_id": tokenizer.pad_id,
        "problem_type": "multi_label_classification" if several else "single_label_classification",
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adapter(
    folder: str | Path,
    *,
    device: torch.device | str,
    base: str | BaseConfig | None = None,
    precision: Precision | None = None,
    fused: bool = True,
    tell: Tell = tell_nobody,
) -> LoadedAdapter:
    """The classifier of a saved adapter, ready to predict. `base` and `precision` default to those
    of the training.

    `fused`: by the fused decoder where it fits, else by transformers' modules, which round
    elsewhere. A whole encoder takes no `base`. Raises `WrongRequest` for a folder that is no
    adapter of this program, holds pickles, or was made for another base, and for fp8 that is not
    fused.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    if not fused and (precision or facts.precision) == "fp8":
        raise WrongRequest(
            "--decoder is stock and the precision fp8, which only the fused decoder computes; type"
            " --precision bf16."
        )
    config = base if isinstance(base, BaseConfig) else base_config_of(facts, base, folder)
    refuse_other_base(folder, facts, config, shape_sha256=config.shape_sha256)
    precision = precision or facts.precision
    if is_encoder(config.text) and precision not in ENCODER_PRECISIONS:
        raise WrongRequest(
            f"--precision is {precision} and {folder} is on an encoder; type --precision bf16, or fp32."
        )
    tokenizer = PostTokenizer.load(str(folder), facts.max_length)
    refuse_other_tokenizer(folder, facts, tokenizer)
    network, info = load_base(config, precision, len(facts.labels), device, tell=tell)
    if facts.lora is not None:
        refuse_other_base(folder, facts, config, weights_sha256=info.weights_sha256)
        network = attach_lora(network, facts.lora, seed=0)
    model = EmotionClassifier(network, precision)
    load_adapter_state(model, read_weights(folder))
    model.requires_grad_(False).eval()
    if fused:
        model.fuse()
    return LoadedAdapter(model, tokenizer, facts.labels, facts)


def base_config_of(
    facts: AdapterFacts, base: str | BaseFiles | None = None, folder: Path | None = None
) -> BaseConfig:
    """The configuration of an adapter's base, or of `base` in its place, at the adapter's depth;
    raises as `read_config`. That of an encoder that was trained whole is in its `folder`; raises
    `WrongRequest` for a `base` given to one.
    """
    if facts.lora is None:
        if base is not None:
            raise WrongRequest(f"{folder} holds every weight and needs no base; leave --base out.")
        whole = read_config(str(folder))  # which holds the blocks alone that were trained
        return replace(whole, layers=facts.layers, whole_layers=facts.whole_layers)
    return read_config(
        base if isinstance(base, BaseFiles) else BaseFiles.find(base or facts.base, facts.layers)
    )


def refuse_other_tokenizer(folder: Path, facts: AdapterFacts, tokenizer: PostTokenizer) -> None:
    """Raises `WrongRequest` for a tokenizer in the folder that is not the training's."""
    if tokenizer.sha256() != facts.tokenizer_sha256:
        raise WrongRequest(
            f"The tokenizer in {folder} is not the one of the training; pull the adapter again."
        )


def refuse_other_base(
    folder: Path,
    facts: AdapterFacts,
    given: BaseConfig,
    *,
    shape_sha256: str | None = None,
    weights_sha256: str | None = None,
) -> None:
    """Raises `WrongRequest` unless a base with this identity, as far as it is given, and this depth
    is the one that the adapter was made for.
    """
    if facts.layers != given.layers:
        raise _other_depth(folder, facts, given)
    if shape_sha256 not in (None, facts.base_shape_sha256):
        why = "their layers have other shapes"
    elif weights_sha256 not in (None, facts.base_weights_sha256):
        why = "their weights differ"
    else:
        return
    raise WrongRequest(
        f"The adapter {folder} was made for the base {facts.base} and not for what {given.files.name} is now:"
        f" {why}. Give the former."
    )


def _other_depth(folder: Path, facts: AdapterFacts, given: BaseConfig) -> WrongRequest:
    own = "null" if facts.layers is None else facts.layers
    return WrongRequest(
        f"The adapter {folder} was made for {blocks_words(facts.layers)} of the base {facts.base}, and"
        f" {blocks_words(given.layers)} of {given.files.name} are read here; give both one depth:"
        f" model.layers={own} in a run, or a base that has all of these blocks."
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Adapter and head in the folder, under the names of a PEFT file, or all weights. Raises
    `WrongRequest` for a file that is damaged or not the one that was saved.
    """
    facts = read_facts(folder)
    path = folder / facts.weights_file
    try:
        tensors = tensors_of_file(path)
        if facts.weights_sha256 is not None:
            refuse_other_weights_file(folder, facts, file_sha256(path))
        return tensors
    except (Unreadable, OSError) as error:
        raise WrongRequest(f"{path} is damaged ({error}); pull the adapter again.") from None
