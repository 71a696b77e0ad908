"""The sentences of a comparison, the same in the terminal and on the page."""

from __future__ import annotations

from emotion_train.evaluation.comparison import LEVEL, judged
from emotion_train.report.units import round_up, signed
from launch.results.comparison import SAMPLES, Comparison, GroupFigures, SeedSpread, Versus


def p_words(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval_words(versus: Versus) -> str:
    return f"{signed(versus.macro_f1.low)} to {signed(versus.macro_f1.high)}"


def verdict(comparison: Comparison, versus: Versus) -> str:
    """The sentence that says whether a group is better than the first, and by how much."""
    first, second = comparison.groups[0], comparison.groups[versus.group]
    scores = f"macro-F1 {second.macro_f1:.3f} against {first.macro_f1:.3f}"
    count = len(comparison.versus)
    corrected = f", corrected for {count} comparisons" if count > 1 else ""
    tested = (
        f"{signed(versus.macro_f1.difference)}, 95 % interval {interval_words(versus)}, p"
        f" {'' if versus.p < 0.001 else '= '}{p_words(versus.p)}{corrected}"
    )
    if versus.outcome != "open":
        return f"{second.name} is {versus.outcome} than {first.name}: {scores} ({tested})."
    alone = (
        " Its own interval leaves 0 out, but it is one of several comparisons."
        if judged(versus.macro_f1, versus.macro_f1.p) != "open"
        else ""
    )
    return f"No difference can be shown between {second.name} and {first.name}: {scores} ({tested}).{alone}"


def what_it_takes(comparison: Comparison, versus: Versus) -> str:
    """The sentence on how many seeds, or posts, would show a difference of this size."""
    size, spread = abs(versus.macro_f1.difference), versus.spread
    first, second = comparison.groups[0], comparison.groups[versus.group]
    if size == 0:
        return "There is no difference that more seeds could show."
    of_posts = (
        f"; on {round_up(versus.posts):,} posts instead of {comparison.rows:,} as many runs as there are"
        " would"
        if versus.posts is not None and versus.posts > comparison.rows
        else ""
    )
    if spread.run is None and _one_config(comparison):
        return "They are one config: the difference comes from the seed."
    if spread.run is None:
        alone = of_posts and _alone(of_posts)
        return (
            f"One run each: how much of {size:.3f} the seed makes is not known{alone}. Train both configs by"
            " `emotion-launch run --seeds 3` and compare with --group-by-config."
        )
    had = f"the groups have {len(first.runs)} and {len(second.runs)}"
    if versus.seeds is None:
        return f"No number of seeds up to 100 would show {size:.3f} on these posts; {had}{of_posts}."
    return f"{versus.seeds} seeds of each config show {size:.3f} in 8 of 10 repeats; {had}{of_posts}."


def _one_config(comparison: Comparison) -> bool:
    """Whether nothing that is known differs but the seed."""
    rows = [row.name for rows in comparison.differences.values() for row in rows]
    return rows == ["run.seed"]


def _alone(of_posts: str) -> str:
    return of_posts.replace("as many runs as there are would", "these two would show it")


def how_counted(comparison: Comparison) -> list[str]:
    """The sentences on how intervals and p were computed and corrected."""
    lines = [
        f"Intervals come from {SAMPLES:,} resamples of the {comparison.rows:,} posts, the same for all"
        " runs. Where fewer than six posts are answered differently, they hold 0.",
    ]
    if any(one.spread.run is not None for one in comparison.versus):
        lines.append(
            "They count the seeds too: the mean of a config's seeds is drawn from Student's t of their"
            " spread, which is assumed to be the same in both groups."
        )
    elif comparison.versus:
        lines.append("They count posts and no seeds: another seed of either config may score differently.")
    count = len(comparison.versus)
    if count > 1:
        lines.append(
            f"{count} groups are compared with {comparison.groups[0].name}: each p is corrected for all of"
            f" them (Holm). Without any true difference, a p below {LEVEL} then comes up in 5 % of such"
            " comparisons. Intervals are not widened."
        )
    if comparison.versus:
        lines.append("The p of each label is corrected for all labels of its comparison.")
    return lines


def seed_words(spread: SeedSpread) -> str:
    return (
        f"{spread.name}: mean {spread.mean:.3f}, standard deviation {spread.deviation:.3f}, from"
        f" {min(spread.scores):.3f} to {max(spread.scores):.3f} over {len(spread.scores)} seeds; as many"
        f" seeds of another config would show a difference of {spread.smallest_shown:.3f} in 8 of 10 repeats,"
        " on an unlimited number of posts"
    )


def mcnemar_words(versus: Versus) -> str:
    one = versus.mcnemar
    return (
        f"right only before {one.only_first:,}, right only now {one.only_second:,}; McNemar's exact test p"
        f" {'' if one.p < 0.001 else '= '}{p_words(one.p)}"
    )


def flips_words(comparison: Comparison, versus: Versus) -> str:
    flips = versus.flips
    several = comparison.targets == "several"
    says = "the labels that half of them give" if several else "the label of their highest mean probability"
    pooled = (
        f" A group of several runs answers with {says}, and the test counts no seeds."
        if any(len(group.runs) > 1 for group in (comparison.groups[0], comparison.groups[versus.group]))
        else ""
    )
    if not flips.total:
        return f"No post flipped.{pooled}"
    exact = " A post is right when it gets all its labels and no other." if several else ""
    return (
        f"{flips.total:,} of {comparison.rows:,} posts flipped: {mcnemar_words(versus)}; wrong in another way"
        f" {len(flips.other):,}.{exact}{pooled}"
    )


def runs_words(group: GroupFigures) -> str:
    """Names of a group's runs with their seeds."""
    return ", ".join(
        f"{name} (seed {seed})" if seed is not None else name
        for name, seed in zip(group.runs, group.seeds, strict=True)
    )
