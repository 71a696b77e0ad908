"""Posts that cannot be used are refused in one message: how many of which kind, the first of them,
and what to type.
"""

from __future__ import annotations

from emotion_train.data.cleaning import DROPPED, REFUSED
from emotion_train.data.index import SPLITS
from emotion_train.errors import WrongRequest
from emotion_train.preparation.work import Work

_LABELS_SHOWN = 30
# The likely cause or remedy where every row fails in the same way
_ALL_ALIKE = {
    "undecodable": "the file is not UTF-8",
    "ragged_line": "its rows have other cells than its header; see whether the header and the delimiter fit",
    "broken_json": "the file is not JSON Lines, one object a line",
    "not_text": "type --text-column with the column that holds the posts",
    "empty_text": "type --text-column with the column that holds the posts",
    "no_label": "type --label-column with the column that holds the labels",
    "hidden_labels": "the labels of this file are hidden",
    "unknown_label": "--labels names none of the labels that are there",
}


def refuse_bad_posts(work: Work, rows_read: int) -> None:
    """Raises `WrongRequest` for posts that the options do not let drop."""
    options, findings = work.options, work.findings
    policy = dict.fromkeys(REFUSED, options.on_bad)
    policy["several_labels"] = options.multi_label or options.on_bad
    policy["conflicting"] = options.policy
    refused = {kind: words for kind, words in (REFUSED | DROPPED).items() if policy.get(kind) == "refuse"}
    lines = findings.lines(refused)
    if not lines:
        return
    if "unknown_label" in refused:
        lines += findings.unknown_lines(work.labels)
    if "conflicting" in refused:
        lines += [f"  {example}" for example in findings.conflicts]
    failing = [kind for kind in refused if findings.counts[kind]]
    total = sum(findings.counts[kind] for kind in failing)
    posts = f"1 of {rows_read:,} posts" if total == 1 else f"{total:,} of {rows_read:,} posts"
    listed = "\n  ".join(lines)
    remedies = "; or ".join(_remedies(work, failing, rows_read))
    raise WrongRequest(f"{work.source.name}: {posts} cannot be used:\n  {listed}\n{remedies}.")


def _remedies(work: Work, failing: list[str], rows_read: int) -> list[str]:
    """What to do about the kinds of bad posts in `failing`, the likeliest remedy first."""
    options = work.options
    one_way = failing[0] if work.findings.counts[failing[0]] == rows_read else None
    remedies = [
        "Mend them" if one_way is None else f"All fail in one way: {_ALL_ALIKE.get(one_way, 'mend them')}"
    ]
    if "undecodable" in failing:
        remedies.append(
            "type --encoding latin-1 (or cp1252, …), or convert the file by `iconv -f LATIN1 -t UTF-8`"
        )
    if one_way is None and any(
        kind != "conflicting" and (kind != "several_labels" or options.multi_label is None)
        for kind in failing
    ):
        remedies.append("type --on-bad drop to leave them out")
    if "hidden_labels" in failing:
        remedies.append(
            "give the file that has the labels of these posts, or label them with `emotion-train predict`"
        )
    if "several_labels" in failing:
        remedies.append("type --multi-label drop to leave out posts with several labels")
        remedies.append("type --targets several to train on several labels a post")
    may_be_none = options.targets == "several" and not options.allow_none
    if may_be_none and {"no_label", "no_half"} & set(failing):
        remedies.append("type --allow-none if a post may have none of the labels")
    if "object_label" in failing and options.targets != "shares":
        remedies.append("type --targets shares if objects hold shares of the labels")
    if "conflicting" in failing:
        *others, last = options.policies[:-1]
        remedies.append(f"type --on-conflict {', '.join(others)} or {last} for texts with several labels")
    if "unknown_label" in failing:
        known = ", ".join(work.labels.in_order()[:_LABELS_SHOWN])
        remedies.append(f"name all labels with --labels ({known} are known)")
        if options.labels is not None and options.annotations_by is None and options.auxiliary == "drop":
            remedies.append("type --auxiliary keep to train on posts of labels that are never predicted")
    return remedies


def refuse_untrainable(names: tuple[str, ...], label_counts: dict[str, list[float]]) -> None:
    """Raises `WrongRequest` for a label without a post to train on."""
    missing = [name for name, count in zip(names, label_counts["train"], strict=True) if not count]
    if missing:
        position = names.index(missing[0])
        elsewhere = ", ".join(f"{split} {label_counts[split][position]:,.6g}" for split in SPLITS)
        likewise = f"; neither have {len(missing) - 1} other labels" if missing[1:] else ""
        others = ",".join(name for name in names if name not in missing)
        raise WrongRequest(
            f"Label {missing[0]!r} has no post to train on ({elsewhere}{likewise}): "
            f"add posts, or leave it out with --labels {others} and --on-bad drop."
        )


def no_validation(work: Work, remedy: str) -> WrongRequest:
    """The refusal of a source that gives no validation posts."""
    return WrongRequest(
        f"{work.source.name} gives no validation posts, which every run needs: {remedy}, or add a file"
        f" named validation{work.not_read()}."
    )
