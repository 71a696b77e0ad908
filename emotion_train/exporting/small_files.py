"""The small files of an export: configuration and tokenizer, with which other tools cut posts where
the training cut them, pad on the right and find the last token.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import Decision
from emotion_train.exporting.merge import ExportDtype
from emotion_train.model.load import BaseConfig, skeleton
from emotion_train.model.text_document import text_document
from emotion_train.storage.document import version_of

_LONG_NAMES: dict[ExportDtype, str] = {"bf16": "bfloat16", "fp32": "float32"}
# keys of a base's config about a head that it had, its files or a library's settings
_NOT_OF_THE_EXPORT = (
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "pad_token_id",
    "compression_config",
    "task_specific_params",
    "finetuning_task",
    "classifier_dropout",
    "gguf_file",
)
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def config_json(found: BaseConfig, decision: Decision, pad_id: int, dtype: ExportDtype) -> bytes:
    """The config.json of the export: the config of the base's text part, with a head of these
    labels.

    It names the version of transformers; without it that library takes a Mistral's tokenizer for
    one that splits words by a wrong pattern, and warns.
    """
    kept = {
        name: value
        for name, value in text_document(found).items()
        if not name.startswith("_") and name not in _NOT_OF_THE_EXPORT
    }
    several = decision.targets == "several"
    document = kept | {
        "architectures": [type(skeleton(found.text, 2)).__name__],
        "dtype": _LONG_NAMES[dtype],
        "id2label": {str(number): label for number, label in enumerate(decision.labels)},
        "label2id": {label: number for number, label in enumerate(decision.labels)},
        "pad_token_id": pad_id,
        "problem_type": "multi_label_classification" if several else "single_label_classification",
        "transformers_version": version_of("transformers"),
        "use_cache": False,
    }
    return _json(document)


def tokenizer_files(tokenizer: PostTokenizer, rows: int) -> tuple[dict[str, bytes], int]:
    """tokenizer.json and tokenizer_config.json by name, and the id of the padding token, one of the
    embedding's `rows`.

    A tool that reads tokenizer.json alone cuts and pads by it; only tokenizer_config.json can hold
    the rule that a post's `</s>` is text. Raises `WrongRequest` where a post can contain every
    token: padding could then not be told from the post's end.
    """
    with TemporaryDirectory(prefix="emotion-train-export-") as folder:
        tokenizer.save(folder)
        made = Tokenizer.from_file(str(Path(folder, TOKENIZER)))
        config: dict[str, Any] = json.loads(Path(folder, TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    pad_id = _padding(made, tokenizer, rows)
    name = made.id_to_token(pad_id)
    made.enable_truncation(tokenizer.max_length)
    made.enable_padding(direction="right", pad_id=pad_id, pad_token=name)
    config["pad_token"] = name
    return {TOKENIZER: made.to_str().encode(), TOKENIZER_CONFIG: _json(config)}, pad_id


def _padding(made: Tokenizer, tokenizer: PostTokenizer, rows: int) -> int:
    """The training's padding token where no post can contain it, else another such token.

    transformers finds the end of a post as its last token that is not padding.
    """
    never = {id_ for id_, token in made.get_added_tokens_decoder().items() if token.special}
    unknown = made.token_to_id(getattr(made.model, "unk_token", None) or "")
    never -= {tokenizer.bos_id, tokenizer.end_id, unknown}
    free = [id_ for id_ in (tokenizer.pad_id, *sorted(never)) if id_ in never and id_ < rows]
    if not free:
        raise WrongRequest(
            "The tokenizer has no special token but its BOS, so padding would be a token that a post can end"
            " with, and transformers would read the wrong one; add a special token such as <pad> to the"
            " base's tokenizer, within its rows of embedding, and train again."
        )
    return free[0]


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
