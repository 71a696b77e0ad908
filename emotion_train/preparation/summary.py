"""The summary of a prepared data set that a person reads."""

from __future__ import annotations

import shlex

from emotion_train.config import DataSection
from emotion_train.data.cleaning import DROPPED, MENDED, NOTED, PASSED_OVER, REFUSED
from emotion_train.data.index import SPLITS, Index
from emotion_train.data.label_doubts import doubts
from emotion_train.data.lengths import BYTES_A_TOKEN, Cut, estimated
from emotion_train.preparation.steps import PrepareResult
from emotion_train.preparation.stratify import quotas


def summary(result: PrepareResult, *, given: bool) -> str:
    """The summary for a person: the cleaning report, posts by split and label, doubts about labels
    that were not `given`, and the next command.
    """
    index, lines = result.index, []
    rows_read = index.source.get("rows_read")
    lines.append(f"{rows_read:,} posts read from {index.source.get('name')} ({index.source.get('format')})")
    groups = {"mended": MENDED, "dropped": REFUSED | DROPPED, "passed over": PASSED_OVER, "noted": NOTED}
    for title, kinds in groups.items():
        if found := result.findings.lines(kinds):
            lines += [title, *(f"  {line}" for line in found)]
    lines += result.findings.remarks
    counts = [
        sum(of_label) for of_label in zip(*(s.label_counts for s in index.splits.values()), strict=True)
    ]
    lines += [
        "",
        *_table(index),
        "",
        *_auxiliary(index),
        *_lengths(index),
        *doubts(index.labels, [round(count) for count in counts], given=given),
        *_conflicts(result),
        *(result.corrected.lines() if result.corrected is not None else []),
    ]
    if "test" not in index.splits and index.source.get("validation_fraction") == 0:
        lines.append(
            "no test     the source brings validation posts and no test posts; add a test file to get one"
        )
    total = sum(described.bytes for split in index.stored_splits.values() for described in split.objects)
    lines.append(
        f"data set    {result.url} ({total / 1e6:,.1f}"
        f" MB){'' if result.created else ': already there, the same'}{_written_anew(result)}"
    )
    lines.append(
        f"next        emotion-launch check --config YOUR_RUN.yaml {shlex.quote(f'data.url={result.url}')}"
        " run.output_url=WHERE_RUNS_GO"
    )
    return "\n".join(lines)


def _written_anew(result: PrepareResult) -> str:
    if not result.written:
        return ""
    objects = sum(len(split.objects) for split in result.index.stored_splits.values())
    return f"; {result.written} of its {objects} objects were missing and are written anew"


def _conflicts(result: PrepareResult) -> list[str]:
    """How many texts have several labels, which label they got, and some examples."""
    texts = result.findings.counts["conflicting_texts"]
    if not texts:
        return []
    several = result.index.targets == "several"
    outcome = {
        "first": "the label of the first row stays",
        "majority": (
            "those that at least half of the rows have stay"
            if several
            else "the label of most rows stays, of equally many the first row's"
        ),
        "union": "all of them stay",
        "mean": "the mean of their shares stays",
        "drop": "none of their rows stays",
    }[result.on_conflict]
    subject = "1 text has" if texts == 1 else f"{texts:,} texts have"
    examples = [f"            {example}" for example in result.findings.conflicts]
    return [
        f"conflicts   {subject} several labels; {outcome} (--on-conflict {result.on_conflict})",
        *examples,
    ]


def _auxiliary(index: Index) -> list[str]:
    """A line on the auxiliary posts, which are trained on and never scored, with the counts of
    their own labels.
    """
    if (auxiliary := index.auxiliary) is None:
        return []
    counts = auxiliary.split.label_counts[len(index.labels) :]
    labels = sorted(zip(auxiliary.labels, counts, strict=True), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{name} {_count(count, None)}" for name, count in labels)
    return [
        f"auxiliary   {auxiliary.split.rows:,} more posts are trained on and never scored"
        + (f"; labels of training alone: {shown}" if shown else "")
    ]


def _lengths(index: Index) -> list[str]:
    """The lengths of the training posts, and an estimate of how many the default max_length would
    cut: this verb has no tokenizer.
    """
    if (tokens := estimated(index.source)) is None:
        return [
            "lengths     not in this index, which an earlier version wrote; emotion-launch check counts them"
        ]
    cut = Cut.of(tokens, DataSection.model_fields["max_length"].default)
    median, longest = (index.source[f"characters_{name}"] for name in ("median", "longest"))
    return [
        f"lengths     {median:,} characters at the median of the training posts, {longest:,} at most; a token"
        f" is estimated as {BYTES_A_TOKEN:g} UTF-8 bytes (measured by benchmarks/token_lengths.py)",
        f"{'warning' if cut.is_much else 'max_length':<12}by default,"
        f" {cut.words('training posts', estimated=True)}",
    ]


def _table(index: Index) -> list[str]:
    """A table of posts by label and split."""
    splits = [split for split in SPLITS if split in index.splits]
    wanted = _wanted(index)
    body = [
        [name, *(_count(index.splits[split].label_counts[i], wanted.get((split, i))) for split in splits)]
        for i, name in enumerate(index.labels)
    ]
    rows = [["label", *splits], *body, ["all", *(f"{index.splits[split].rows:,}" for split in splits)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _wanted(index: Index) -> dict[tuple[str, int], int]:
    """The number of posts that each split made here should get of each label, by split and
    label.
    """
    asked = {name: index.source.get(f"{name}_fraction") for name in ("validation", "test")}
    fractions = {name: float(share) for name, share in asked.items() if share}
    if index.targets == "shares" or not fractions:
        return {}
    made = [name for name in ("train", *fractions) if name in index.splits]
    wanted: dict[tuple[str, int], int] = {}
    for label in range(len(index.labels)):
        posts = int(sum(index.splits[name].label_counts[label] for name in made))
        numbers = quotas(posts, fractions.get("validation", 0.0), fractions.get("test", 0.0))
        wanted |= {(name, label): n for name, n in zip(("validation", "test"), numbers, strict=True)}
    return {(name, label): number for (name, label), number in wanted.items() if name in fractions}


def _count(count: float, wanted: int | None) -> str:
    """A label count, with the wanted count where the two differ by more than one post."""
    words = f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"
    return words if wanted is None or abs(count - wanted) <= 1 else f"{words} (of {wanted:,} wanted)"
