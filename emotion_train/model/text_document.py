"""The config.json of a base's text part alone, for a copy of the base that has no other part.

It says what was published, key by key, so that it does not depend on the version of transformers
that reads it here.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from emotion_train.bases.depth import cut_configuration
from emotion_train.errors import WrongRequest
from emotion_train.model.load import BaseConfig, read_config, skeleton

_NOT_OF_THE_TEXT = (
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "quantization_config",
    "architectures",
)


def text_document(found: BaseConfig) -> dict[str, Any]:
    """The text part's configuration as it was published; for a GGUF file what its header says. It
    names the model without a head, in bfloat16, and the number of blocks that are read.
    """
    if found.gguf is not None:
        text = found.gguf.config()
    else:
        published = found.files.config()
        text = published["text_config"] if found.layout == "multimodal" else published
    if found.layers is not None:
        text = cut_configuration(text, found.layers)
    kept = {name: value for name, value in text.items() if name not in _NOT_OF_THE_TEXT}
    backbone = type(skeleton(found.text, 2).base_model).__name__
    return kept | {"model_type": found.text.model_type, "architectures": [backbone], "dtype": "bfloat16"}


def refuse_other_meaning(found: BaseConfig) -> None:
    """Raises `WrongRequest` unless the text part's configuration means the same alone as within the
    whole one.
    """
    with TemporaryDirectory(prefix="emotion-train-text-") as folder:
        Path(folder, "config.json").write_text(json.dumps(text_document(found)), encoding="utf-8")
        old, new = found.text.to_dict(), read_config(folder).text.to_dict()
    different = sorted(
        name for name in (old.keys() | new.keys()) - set(_NOT_OF_THE_TEXT) if old.get(name) != new.get(name)
    )
    if different:
        raise WrongRequest(
            f"The text part of {found.files.name} does not stand alone: its {', '.join(different)} come from"
            " the rest of config.json; read this base from where it is."
        )
