"""The README.md of an export: its facts, and lines for a pipeline and for vLLM, which cut posts
where the training cut them only when asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from emotion_train.bases.depth import depth_words
from emotion_train.data.targets import TargetKind
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.exporting.change import Change
from emotion_train.exporting.manifest import ExportFacts
from emotion_train.model.card import as_code

_GIVES: dict[TargetKind, str] = {
    "one": "gives one of {} labels to a post",
    "several": "gives any of {} labels to a post, or none",
    "shares": "says how annotators would divide over {} labels of a post",
}
_PIPELINE = """\
import json
import sys

import torch
from transformers import pipeline

folder = sys.argv[1] if len(sys.argv) > 1 else "."  # this folder
texts = sys.argv[2:] or ["what a lovely mess"]
classifier = pipeline("text-classification", model=folder, dtype=torch.float32)
# posts are cut only because these words ask for it
answers = classifier(texts, top_k=None, truncation=True, max_length=$max_length)
for text, answer in zip(texts, answers):
    probabilities = {one["label"]: one["score"] for one in answer}
$answer"""
_ONE = """\
    print(json.dumps({"text": text, "probabilities": probabilities}, ensure_ascii=False))
"""
_SEVERAL = """\
    labels = [label for label, enough in thresholds.items() if probabilities[label] >= enough]
    print(json.dumps({"text": text, "labels": labels, "probabilities": probabilities}, ensure_ascii=False))
"""
_LEAST_MODEL_LENGTH = 256
# Options for classes that vLLM 0.32 would take for another: vLLM's own name of the class, or the
# name of the language model from which vLLM makes a classifier.
_VLLM_OPTIONS = {
    "Gemma3TextForSequenceClassification": ("", "Gemma3ForSequenceClassification"),
    "Qwen3_5TextForSequenceClassification": (" --convert classify", "Qwen3_5ForCausalLM"),
}


@dataclass(frozen=True)
class ExportCard:
    """`results` are lines of Markdown with the figures of the adapter's run; where nothing was
    compared, `change` is None and `unmeasured` says why. `whole`: an encoder without an adapter.
    """

    facts: ExportFacts
    decision: Decision
    architecture: str
    positions: int
    results: Sequence[str] = ()
    change: Change | None = None
    unmeasured: str | None = None
    of_encoder: bool = False
    whole: bool = False

    def text(self) -> str:
        """The whole README.md."""
        facts = self.facts
        before = "The adapter's results, before it was merged:"
        if self.whole:
            before = "The results of the weights in float32:"
        results = ["## Results", "", before, "", *self.results, ""]
        return "\n".join(
            [
                "---",
                *([f"base_model: {json.dumps(facts.base)}"] if _is_hub_id(facts.base) else []),
                "library_name: transformers",
                "pipeline_tag: text-classification",
                "tags: [emotion-classification"
                + (", multi-label-classification]" if facts.targets == "several" else "]"),
                "---",
                "",
                "# Emotion classifier",
                "",
                (
                    f"A `{self.architecture}` in {facts.dtype}, its head in float32, made of"
                    f" {self._source()}, which {_GIVES[facts.targets].format(len(facts.labels))}:"
                ),
                ", ".join(map(as_code, facts.labels)) + ".",
                "",
                *self._notes(),
                "",
                *(results if self.results else []),
                "## Use",
                "",
                "transformers alone gives the same probabilities as the training's evaluation:",
                "",
                "```python",
                self.pipeline_snippet().rstrip("\n"),
                "```",
                "",
                *self._of_bf16(),
                *([] if self.of_encoder else self._served()),
            ]
        )

    def _source(self) -> str:
        named = as_code(self.facts.base)
        if self.whole:
            return f"{named}, all of whose weights were trained"
        return f"an adapter and {self._part_of_base()}{named}"

    def _served(self) -> list[str]:
        return [
            "vLLM serves it; a post that is too long is refused, with all others of its request, unless"
            " `truncate_prompt_tokens` asks to cut it:",
            "",
            "```bash",
            *self.vllm_lines(),
            "```",
            "",
        ]

    def _part_of_base(self) -> str:
        words = depth_words(self.facts.layers, self.facts.whole_layers)
        return "" if words is None else f"{words} of "

    def pipeline_snippet(self) -> str:
        """A program that prints each label's probability and, with several labels, those that reach
        their threshold: `python snippet.py [folder] [text …]`.
        """
        several = self.decision.thresholds is not None
        program = Template(_PIPELINE).substitute(
            max_length=self.facts.max_length, answer=_SEVERAL if several else _ONE
        )
        if not several:
            return program
        read = (
            f'with open(f"{{folder}}/{DECISION}", encoding="utf-8") as file:\n'
            "    decision = json.load(file)\n"
            'thresholds = dict(zip(decision["labels"], decision["thresholds"]))\n'
        )
        return program.replace("# posts are cut", f"{read}# posts are cut")

    def vllm_lines(self) -> list[str]:
        """The server and a request to it."""
        length = min(self.positions, max(_LEAST_MODEL_LENGTH, self.facts.max_length))
        request = json.dumps(
            {
                "model": "emotions",
                "input": ["what a lovely mess"],
                "truncate_prompt_tokens": self.facts.max_length,
            }
        )
        told = ""
        if self.architecture in _VLLM_OPTIONS:
            convert, known = _VLLM_OPTIONS[self.architecture]
            told = f"{convert} --hf-overrides '{json.dumps({'architectures': [known]})}'"
        return [
            f"vllm serve . --served-model-name emotions --runner pooling --max-model-len {length}{told}",
            f"curl -s localhost:8000/classify -H 'Content-Type: application/json' -d '{request}'",
        ]

    def _notes(self) -> list[str]:
        facts, decision = self.facts, self.decision
        what = "weights come" if self.whole else "adapter comes"
        run = "" if facts.run_id is None else f" The {what} from run {facts.run_id}."
        pooled = "the last token of the post that is not padding"
        if self.of_encoder:
            pooled = "the output of the model's own pooling layers"
        notes = [
            f"- {'Computed' if self.whole else 'Base'} while training: {facts.precision}; posts cut at"
            f" {facts.max_length} tokens.{run}",
            f"- The head reads {pooled}. The tokenizer is the training's; use no other.",
            (
                "- A control token that a post quotes, such as `</s>`, `[INST]` or `<|im_end|>`, is text:"
                " transformers and vLLM read that in `tokenizer_config.json` (`split_special_tokens`). A tool"
                " that reads `tokenizer.json` alone cuts and pads posts by it, and takes such words for the"
                " tokens; with the tokenizers library set `encode_special_tokens = True`."
            ),
        ]
        if decision.thresholds is not None:
            rows = [
                f"  - {as_code(label)}: {threshold:g}"
                for label, threshold in zip(decision.labels, decision.thresholds, strict=True)
            ]
            notes += [
                f"- A post gets the labels that reach their threshold in `{DECISION}`:",
                *rows,
            ]
        if facts.targets == "shares":
            notes.append("- Probabilities add up to 1 and estimate the shares of annotators.")
        if self.change is not None:
            notes.append(f"- Measured: {self.change.sentence()}.")
        elif self.unmeasured is not None:
            notes.append(f"- What merging changed was not measured: {self.unmeasured}.")
        return notes

    def _of_bf16(self) -> list[str]:
        if self.facts.dtype == "fp32" or self.of_encoder:
            return []
        return [
            'On a GPU with `dtype="auto"` transformers also rounds the head to bfloat16; vLLM keeps it in'
            " float32.",
            "",
        ]


def _is_hub_id(base: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None


def results_in(card: str) -> list[str]:
    """The lines below Results in the README.md of an adapter; none where it has no such part."""
    part = card.partition("\n## Results\n")[2].partition("\n## Use\n")[0]
    return part.strip("\n").splitlines()
