"""What `augment` prints: posts by label, what became of the written ones, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from emotion_train.data.index import Index
from emotion_train.edges.bounded import object_in
from emotion_train.hosted.augmentation import Augmentation
from emotion_train.hosted.calling import PREFIX
from emotion_train.hosted.synthetic import Wish
from emotion_train.storage.store import Store


def wish_words(wished: Sequence[Wish], labels: Sequence[str]) -> str:
    """How many posts each label has and is to get."""
    return "\n".join(
        f"{labels[one.label]}: {one.real:,} real posts, {one.posts:,} to be added" for one in wished
    )


def table_words(made: Index, store: Store) -> str:
    """Real and added posts of each label, and the URL of the data set."""
    train = made.split("train")
    rows = [("label", "real", "added")]
    for label, every, real in zip(made.labels, train.label_counts, train.real_label_counts, strict=True):
        rows.append((label, f"{real:,.0f}", f"{every - real:,.0f}" if every > real else ""))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {real:>8}  {added:>6}".rstrip() for name, real, added in rows]
    return "\n".join([*lines, f"data set    {store.url}"])


def summary(asked: Augmentation, made: Index, store: Store) -> str:
    """Posts by label, how many written posts were kept or dropped, and the commands that show
    whether they help.
    """
    report = object_in(store.read(f"{PREFIX}/report.json"))
    outcomes = ", ".join(f"{count:,} {name}" for name, count in sorted(report["outcomes"].items()))
    lines = [
        table_words(made, store),
        f"calls       {report['augmented_calls']:,}: {outcomes}; {report['augmented_usd']:.4f} dollars",
        f"written     {report['written']:,}, {report['unclean']:,} of them no post",
        f"the same    {_by_split(report['same_as'])}",
        f"nearly      {_by_split(report['near_to'])}",
        f"filtered    {report['filtered']:,} by {report['augmented_filter']}; {report['augmented_posts']:,}"
        " stay",
        "validation and test are the same bytes; class weights count real posts only",
    ]
    new, old = shlex.quote(asked.new_data_url), shlex.quote(asked.data_url)
    control = shlex.quote(f"{asked.new_data_url.rstrip('/')}-repeated")
    return "\n".join(
        [
            *lines,
            "whether it helps: train on all three with equal steps and three seeds each, and compare",
            f"  emotion-train augment {old} {control} --repeat-of {new}",
            f"  for data in {old} {new} {control}; do for seed in 1 2 3; do emotion-launch run"
            " --config YOUR_RUN.yaml data.url=$data run.seed=$seed train.max_steps=STEPS; done; done",
            "  emotion-launch compare --group-by-config RUN RUN … (9 runs; no difference can be shown where"
            " an interval holds 0)",
        ]
    )


def _by_split(counts: dict[str, int]) -> str:
    found = ", ".join(
        f"{count:,} as {name if name == 'synthetic' else f'posts of {name}'}"
        for name, count in counts.items()
        if count
    )
    return found or "none"
