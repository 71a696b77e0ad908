"""The prompts of hosted models, and how their answers are read: exactly, or as unparseable.

Examples come from `TrainingPosts`, which can read only the training split.

Letters: C labels.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion_train.data.index import Index
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import Target, TargetKind
from emotion_train.edges.bounded import Unreadable, bytes_of, json_in, object_file
from emotion_train.errors import WrongRequest
from emotion_train.hosted.client import Message, Prompt
from emotion_train.storage.store import Store

_MOST_ANSWER = 1 << 16
_MOST_FILE = 1 << 20
_PLACES = re.compile(r"\{(labels|definitions|examples|post)\}")
_QUOTES = "\"'`“”„‘’‚«»‹›"
_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
_ANSWERS: dict[bool, str] = {
    False: 'Answer with JSON and nothing else: {"label": "one of the labels, as it is written"}.',
    True: 'Answer with JSON and nothing else: {"labels": ["any number of the labels, as they are written"]}.',
}
_QUESTIONS: dict[bool, str] = {
    False: "Which one of these labels says best what the writer of the post feels?",
    True: "Which of these labels say what the writer of the post feels? There may be several, or none.",
}
_TEMPLATE = "{question}\n\nLabels: {labels}\n{definitions}{examples}\n{answer}\n\nPost: {post}"


@dataclass(frozen=True)
class TrainingPosts:
    """Texts and targets of a training split, held in memory. It can read no other split."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    targets: tuple[Target, ...]
    weights: tuple[float, ...]

    @classmethod
    def read(cls, store: Store, index: Index) -> TrainingPosts:
        """All posts in their stored order. Raises as `RowGroupReader.rows`."""
        ids: list[str] = []
        texts: list[str] = []
        targets: list[Target] = []
        weights: list[float] = []
        split = index.split("train")
        with RowGroupReader(store, split, capacity=16) as reader:
            for group in range(len(split.row_groups)):
                reader.ask(range(group, min(group + 8, len(split.row_groups))))
                rows = reader.rows(group)
                for post_id, text, target, weight, *_ in zip(*rows, strict=True):
                    if text and target is not None:
                        ids.append(post_id)
                        texts.append(text)
                        targets.append(target)
                        weights.append(weight)
        return cls(tuple(ids), tuple(texts), tuple(targets), tuple(weights))

    def with_label(self, label: int) -> list[int]:
        """Row numbers of the posts that have this label."""
        return [row for row, target in enumerate(self.targets) if any(own == label for own, _ in target)]


@dataclass(frozen=True)
class Question:
    """The content of a benchmark's prompts: labels in the order to list them, their definitions,
    examples (a text and its labels), and the user's own template.
    """

    labels: tuple[str, ...]
    kind: TargetKind
    definitions: Mapping[str, str]
    examples: tuple[tuple[str, tuple[str, ...]], ...]
    template: str | None = None
    max_tokens: int = 64

    def prompt(self, post: str) -> Prompt:
        """The prompt for a post."""
        several = self.kind == "several"
        template = self.template
        if template is None:
            template = _TEMPLATE.replace("{question}", _QUESTIONS[several]).replace(
                "{answer}", _ANSWERS[several]
            )
        parts = {
            "labels": ", ".join(self.labels),
            "definitions": "".join(
                f"{label}: {self.definitions[label]}\n" for label in self.labels if label in self.definitions
            ),
            "examples": "".join(
                f"\nPost: {text}\n{_as_answer(own, several)}\n" for text, own in self.examples
            ),
            "post": post,
        }
        text = _PLACES.sub(lambda place: parts[place[1]], template)  # once: a post's own braces stay
        return Prompt((Message("user", text),), _schema(self.labels, several), self.max_tokens)


def question_of(
    index: Index,
    *,
    seed: int,
    definitions: Mapping[str, str],
    template: str | None,
    max_tokens: int,
    shots: int,
    posts: TrainingPosts | None,
) -> Question:
    """The question for a data set, with `shots` training posts of each label as examples. The seed
    draws them and the order of the labels.
    """
    labels = list(index.labels)
    random.Random(f"labels {seed}").shuffle(labels)
    examples: list[tuple[str, tuple[str, ...]]] = []
    if shots and posts is not None:
        for label in range(len(index.labels)):
            draw = random.Random(f"examples {seed} {label}")
            rows = posts.with_label(label)
            for row in draw.sample(rows, min(shots, len(rows))):
                own: tuple[str, ...] = (index.labels[label],)
                if index.targets == "several":
                    own = tuple(index.labels[number] for number, _ in posts.targets[row])
                examples.append((posts.texts[row], own))
        random.Random(f"order {seed}").shuffle(examples)
    return Question(tuple(labels), index.targets, definitions, tuple(examples), template, max_tokens)


def _schema(labels: Sequence[str], several: bool) -> dict[str, Any]:
    label: dict[str, Any] = {"type": "string", "enum": list(labels)}
    name, form = ("labels", {"type": "array", "items": label}) if several else ("label", label)
    return {"type": "object", "properties": {name: form}, "required": [name], "additionalProperties": False}


def _as_answer(labels: Sequence[str], several: bool) -> str:
    import json

    return json.dumps({"labels": list(labels)} if several else {"label": labels[0]}, ensure_ascii=False)


def read_definitions(path: str | None, labels: Sequence[str]) -> dict[str, str]:
    """The labels' definitions in a JSON file {label: definition}. Raises `WrongRequest` for a label
    that the data set does not have, and for a file that cannot be read.
    """
    if path is None:
        return {}
    try:
        definitions = object_file(Path(path), _MOST_FILE)
    except (Unreadable, OSError) as error:
        raise WrongRequest(
            f"--definitions {path} cannot be read ({_why(error)}); give a JSON file."
        ) from None
    for label, text in definitions.items():
        if label not in labels:
            raise WrongRequest(
                f"--definitions {path} has {label[:80]!r}, which is no label of the data set; its labels are"
                f" {', '.join(labels)}."
            )
        if not isinstance(text, str) or not text.strip():
            raise WrongRequest(f"--definitions {path} has no text for {label[:80]!r}; give a sentence.")
    return {label: " ".join(text.split()) for label, text in definitions.items()}


def read_template(path: str | None) -> str | None:
    """The user's own prompt, with {labels} and {post} in it. Raises `WrongRequest` for a file
    without them, and for one that cannot be read.
    """
    if path is None:
        return None
    try:
        text = bytes_of(Path(path), _MOST_FILE).decode()
    except (Unreadable, OSError, UnicodeDecodeError) as error:
        raise WrongRequest(f"--prompt {path} cannot be read ({_why(error)}); give a text file.") from None
    missing = [name for name in ("labels", "post") if f"{{{name}}}" not in text]
    if missing:
        raise WrongRequest(
            f"--prompt {path} has no {{{missing[0]}}}; a prompt holds {{labels}} and {{post}}, and may hold"
            " {definitions} and {examples}."
        )
    return text


def _why(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def labels_in(text: str, labels: Sequence[str], kind: TargetKind) -> frozenset[int] | None:
    """The labels that an answer names; None for an answer that is neither a label nor the JSON
    asked for, or names an unknown label.

    >>> labels_in('{"label": "Joy"}', ["anger", "joy"], "one")
    frozenset({1})
    >>> labels_in("joy!", ["anger", "joy"], "one")
    """
    answer = text.strip()
    if (fenced := _FENCE.fullmatch(answer)) is not None:
        answer = fenced[1]
    if answer.lstrip()[:1] not in ("{", "["):
        return None if (label := _id_of(answer, labels)) is None else frozenset({label})
    try:
        value = json_in(answer, _MOST_ANSWER, once=True)
    except Unreadable:
        return None
    if isinstance(value, dict):
        wanted = ("labels", "label") if kind == "several" else ("label",)
        value = next((value[name] for name in wanted if name in value), None)
    if isinstance(value, str):
        value = [value]
    elif kind != "several":
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    ids = [_id_of(name, labels) for name in value]
    return None if None in ids else frozenset(number for number in ids if number is not None)


def _id_of(word: str, labels: Sequence[str]) -> int | None:
    """The label written exactly so, else the only label with the same normal form; else None."""
    if word in labels:
        return labels.index(word)
    form = _form(word)
    alike = [number for number, label in enumerate(labels) if _form(label) == form]
    return alike[0] if len(alike) == 1 else None


def _form(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold().strip().strip(_QUOTES).strip()
