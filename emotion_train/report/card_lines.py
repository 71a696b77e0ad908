"""The results in the model card: lines of Markdown, and the fields of its header that the Hugging
Face hub reads.

Labels and names of sources are other people's words: Markdown shows them as code or with every sign
escaped by its number, and the header as YAML strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emotion_train.bases.licence import licence_of
from emotion_train.data.index import SPLITS
from emotion_train.model.card import as_code, as_prose
from emotion_train.report.figures import cut_sentences
from emotion_train.report.notes import notes
from emotion_train.report.plain import averages, plain_sentence
from emotion_train.report.schema import WORDS, AnyFigures, Report
from emotion_train.report.units import posts_of

# figures as the hub names them: the metric and its arguments
_METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "weighted_f1": ("f1", {"average": "weighted"}),
    "micro_f1": ("f1", {"average": "micro"}),
    "samples_f1": ("f1", {"average": "samples"}),
    "accuracy": ("accuracy", {}),
    "exact_match": ("accuracy", {"subset": True}),
    "log_loss": ("log_loss", {}),
    "mean_average_precision": ("average_precision", {"average": "macro"}),
    "calibration_error": ("expected_calibration_error", {}),
}
_HYPERPARAMETERS = {
    "lora": ("r", "alpha", "dropout", "targets"),
    "train": (
        "epochs",
        "max_steps",
        "global_batch_size",
        "learning_rate",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
    ),
    "loss": ("class_weights",),
    "data": ("max_length", "limit"),
    "model": ("precision",),
    "run": ("seed",),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card_lines(report: Report) -> list[str]:
    """The verdict, a table of the headline split, notes on its targets, and the share of posts that
    were cut.
    """
    split = report.splits[report.headline]
    heads = ("split", "macro-F1", "95 % interval", *(WORDS[field] for field in split.also))
    cells = (
        report.headline,
        f"{split.macro_f1:.3f}",
        f"{split.macro_f1_low:.3f} to {split.macro_f1_high:.3f}",
        *(f"{value:.3f}" for value in split.also.values()),
    )
    sentences = (*notes(report.headline, split), *cut_sentences(report))
    return [
        plain_sentence(split),
        "",
        report.verdict.sentence,
        "",
        *_table(heads, [cells]),
        *(line for sentence in sentences for line in ("", sentence)),
        "",
        "### Per label",
        "",
        *_per_label(split),
    ]


def card_sections(report: Report) -> list[str]:
    """The sections on intended use and limits, data, hyperparameters and versions."""
    licence = licence_of(report.identity.base)
    return [
        "## Intended use and limits",
        "",
        (
            "For posts like those it was trained on, where a wrong answer does little harm: to count, to"
            " rank, to choose what a person reads. It guesses how a text was labelled and knows nothing of"
            " what its author felt; do not use it to decide about people. Other languages, other sources,"
            " longer texts and other times are other tasks: score some of your own posts before you rely on"
            " it."
        ),
        "",
        *(f"- {as_prose(warning)}" for warning in report.warnings),
        (
            f"- Licence of the base: {licence}."
            if licence is not None
            else "- Licence of the base: not known to this card; see the base's own."
        ),
        "",
        "## Data",
        "",
        *_table(
            ("split", "posts"),
            [
                (name, f"{report.dataset.rows[name]:,}")
                for name in (*SPLITS, *(report.dataset.rows.keys() - set(SPLITS)))
                if name in report.dataset.rows
            ],
        ),
        "",
        f"Source: {_source(report)}, prepared as index `{report.identity.index_sha256[:16]}`.",
        "",
        *_table(("label", "training posts"), _training_posts(report)),
        "",
        "## Training",
        "",
        *_table(("setting", "value"), _hyperparameters(report.identity.config)),
        "",
        "Versions: "
        + ", ".join(as_prose(f"{name} {version}") for name, version in report.identity.versions.items())
        + ".",
        "",
    ]


def card_header(report: Report) -> dict[str, Any]:
    """The fields `datasets`, `language`, `metrics` and `model-index` of the card's header."""
    split, cleaning = report.splits[report.headline], report.dataset.cleaning
    name = str(cleaning.get("name", "posts"))
    hub_name = name.partition(":")[0]
    from_hub = cleaning.get("format") == "hub" and _HUB_NAME.fullmatch(hub_name) is not None
    language = report.identity.config.get("report", {}).get("language") or []
    metrics = [_metric("f1", "macro-F1", split.macro_f1, {"average": "macro"})]
    for field, value in (split.also | split.of_probabilities).items():
        if field in _METRICS:
            kind, arguments = _METRICS[field]
            metrics.append(_metric(kind, WORDS[field], value, arguments))
    result = {
        "task": {"type": "text-classification", "name": "Text Classification"},
        "dataset": {
            "type": hub_name if from_hub else "private",
            "name": name,
            "split": report.headline,
        },
        "metrics": metrics,
    }
    return {
        **({"language": list(language)} if language else {}),
        **({"datasets": [hub_name]} if from_hub else {}),
        "metrics": list(dict.fromkeys(one["type"] for one in metrics)),
        "model-index": [{"name": report.identity.run_id, "results": [result]}],
    }


def _metric(kind: str, name: str, value: float, arguments: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"type": kind, "value": round(value, 4), "name": name}
    return found | ({"args": arguments} if arguments else {})


def _per_label(split: AnyFigures) -> list[str]:
    also = tuple(WORDS[field] for field in split.per_label[0].also)
    rows = [
        (
            as_code(one.label),
            f"{one.precision:.2f}",
            f"{one.recall:.2f}",
            f"{one.f1:.2f}",
            "" if one.f1_low is None else f"{one.f1_low:.2f} to {one.f1_high:.2f}",
            f"{one.support:,}",
            *(f"{value:.2f}" for value in one.also.values()),
        )
        for one in split.per_label
    ]
    rows += [
        (name, *(f"{value:.2f}" for value in values), "", "", *[""] * len(also))
        for name, values in averages(split).items()
    ]
    return _table(("label", "precision", "recall", "F1", "95 % interval", "posts", *also), rows)


def _source(report: Report) -> str:
    return as_code(str(report.dataset.cleaning.get("name", "not known")))


def _training_posts(report: Report) -> list[tuple[str, str]]:
    counts = report.dataset.label_counts.get("train", ())
    return [(as_code(label), posts_of(n)) for label, n in zip(report.labels, counts, strict=False)]


def _hyperparameters(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for section, names in _HYPERPARAMETERS.items():
        for name in names:
            value = config.get(section, {}).get(name)
            if value is not None:
                words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                rows.append((f"`{section}.{name}`", as_code(words)))
    return rows


def _table(heads: tuple[str, ...], rows: list[Any]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
