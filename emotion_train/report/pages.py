"""The report as one HTML file for the browser, the printer and the archive: no script, no font, no
request to anywhere.

All text from outside (labels, URLs, config) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import yaml

from emotion_train.data.index import SPLITS
from emotion_train.report.chance_pages import chance_sections
from emotion_train.report.html_parts import bullets, fact_list, figure, page, section, table
from emotion_train.report.notes import notes
from emotion_train.report.old_posts import old_sentence
from emotion_train.report.plain import averages, plain_sentence
from emotion_train.report.plots import (
    MOST_PLOTTED,
    confusion_plot,
    curves_plot,
    floors_plot,
    reliability_plot,
)
from emotion_train.report.post_pages import mislabelled_section, mistakes_section
from emotion_train.report.schema import (
    WORDS,
    AnyFigures,
    Identity,
    LabelFigures,
    Report,
    SetFigures,
    SplitFigures,
)
from emotion_train.report.set_pages import mistaken_section, together_section
from emotion_train.report.slices import FEW_POSTS
from emotion_train.report.units import dollars, duration, memory, percent, posts_of, rate, saving, signed

_MARKS = {"beaten": ("good", "✓"), "open": ("open", "≈"), "not beaten": ("bad", "✗")}
_CONFUSIONS = 8
_NOTES = {"one": "Notes", "several": "Thresholds", "shares": "How far from the shares?"}


def render_html(report: Report) -> str:
    """The whole page. The same report gives the same text."""
    split = report.splits[report.headline]
    sections = [
        _head(report, split),
        section("Baselines", _floors(split)),
        section("What to keep in mind", bullets(report.warnings)) if report.warnings else "",
        section("Per-label report", _per_label(split)),
        *_mistakes(report, split),
        mistakes_section(report),
        mislabelled_section(report),
        section("Slices", _slices(report)) if report.slices else "",
        section("Old posts: gained and forgotten", _old(report)) if report.old_posts else "",
        section("Calibration: can the probabilities be trusted?", _calibration(split)),
        *chance_sections(report),
        section(_NOTES[report.targets], bullets(told)) if (told := _notes(report)) else "",
        section("Learning curve", _training(report)),
        section("Splits", _splits(report)) if len(report.splits) > 1 else "",
        section("Data", _data(report)),
        section("Speed and cost", _speed(report)),
        section("Identity", _identity(report)),
        section(
            "Configuration",
            "<pre>"
            + escape(yaml.safe_dump(report.identity.config, sort_keys=False, allow_unicode=True))
            + "</pre>",
        ),
        section("What to try next", f"<p>{escape(report.try_next)}</p>") if report.try_next else "",
    ]
    return page(f"{report.identity.run_id}: macro-F1 {split.macro_f1:.3f}", sections)


def _head(report: Report, split: AnyFigures) -> str:
    css, mark = _MARKS[report.verdict.outcome]
    identity, speed = report.identity, report.speed
    facts = [f"{split.rows:,} {report.headline} posts", f"{len(report.labels)} labels"]
    also = list(split.also.items())
    tiles = [
        ("macro-F1", f"{split.macro_f1:.3f}", f"95 %: {split.macro_f1_low:.3f} to {split.macro_f1_high:.3f}"),
        *(
            (WORDS[field], f"{value:.3f}", note)
            for (field, value), note in zip(also, facts + [""] * len(also), strict=False)
        ),
        ("training", duration(speed.train_seconds), f"{rate(speed.posts_per_second)} posts/s"),
    ]
    if speed.usd is not None:
        tiles.append(("cost", dollars(speed.usd), f"{duration(speed.wall_seconds)} of machines"))
    advice = f"<p>{escape(report.verdict.advice)}</p>\n" if report.verdict.advice is not None else ""
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return (
        f"<header>\n<p class=run>Emotion classifier · run <b>{escape(identity.run_id)}</b> ·"
        f" {escape(identity.base)}</p>\n"
        f"<p class=lead>{escape(plain_sentence(split))}</p>\n"
        f'<h1 class="{css}"><span aria-hidden="true">{mark}</span> {escape(report.verdict.sentence)}</h1>\n'
        f"{advice}"
        f'<dl class="tiles">{shown}</dl>\n</header>'
    )


def _old(report: Report) -> str:
    old, parent = report.old_posts, report.identity.parent
    assert old is not None
    assert parent is not None
    rows = [
        (
            one.label,
            f"{one.support:,}",
            f"{one.f1_before:.2f}",
            f"{one.f1:.2f}",
            f"{signed(one.difference_low)} to {signed(one.difference_high)}",
        )
        for one in sorted(old.per_label, key=lambda one: one.f1 - one.f1_before)
    ]
    heads = ("label", "posts", "F1 before", "F1 now", "95 % interval of the difference")
    return f"<p>{escape(old_sentence(parent, old))}</p>" + table(heads, rows)


def _floors(split: AnyFigures) -> str:
    fields = ("macro_f1", *split.floors[0].also)
    rows = [("this model", *_named(split, fields), "", "")]
    for floor in split.floors:
        interval = f"{signed(floor.difference_low)} to {signed(floor.difference_high)}"
        rows.append(
            (
                floor.name,
                *_named(floor, fields),
                signed(floor.difference),
                interval,
            )
        )
    heads = (
        "classifier",
        "macro-F1",
        *(WORDS[field] for field in fields[1:]),
        "model ahead by",
        "95 % interval",
    )
    caption = (
        "The floors that a model must beat. Macro-F1 is the mean of every label's F1; the whisker is the 95 %"
        " bootstrap interval."
    )
    return figure(floors_plot(split, split.floors), caption) + table(heads, rows)


def _per_label(split: AnyFigures) -> str:
    most = max(one.support for one in split.per_label) or 1
    also = tuple(WORDS[field] for field in split.per_label[0].also)
    intervals = all(one.f1_low is not None for one in split.per_label)
    heads = ("label", "F1", *(["95 % interval"] if intervals else []), "precision", "recall", "posts")
    body = "".join(
        f'<tr><th scope="row">{escape(one.label)}</th>'
        + _bar(one.f1, f"{one.f1:.2f}", "accent", "F1")
        + (_interval(one) if intervals else "")
        + _bar(one.precision, f"{one.precision:.2f}", "soft", "precision")
        + _bar(one.recall, f"{one.recall:.2f}", "soft", "recall")
        + _bar(one.support / most, f"{one.support:,}", "floor", "posts")
        + _cell(f"{one.predicted:,}", "predicted")
        + "".join(_cell(f"{value:.2f}", name) for name, value in zip(also, one.also.values(), strict=True))
        + "</tr>"
        for one in sorted(split.per_label, key=lambda one: -one.support)
    )
    for name, (precision, recall, f1) in averages(split).items():
        body += (
            f'<tr class=average><th scope="row">{name}</th>'
            + _bar(f1, f"{f1:.2f}", "accent", "F1")
            + ("<td></td>" if intervals else "")
            + _bar(precision, f"{precision:.2f}", "soft", "precision")
            + _bar(recall, f"{recall:.2f}", "soft", "recall")
            + "<td></td>" * (len(also) + 2)
            + "</tr>"
        )
    numbers = {"predicted", *also}
    head = "".join(
        f'<th scope="col"{" class=number" if name in numbers else ""}>{name}</th>'
        for name in (*heads, "predicted", *also)
    )
    note = (
        "<p class=note>Most frequent label first; the interval of each F1 is Wilson's, which is wide where a"
        " label has few posts.</p>"
        if intervals
        else ""
    )
    return note + (
        f'<div class="wide"><table class="bars"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _mistakes(report: Report, split: AnyFigures) -> list[str]:
    """The sections on labels that the model mistakes for others."""
    if isinstance(split, SetFigures):
        return [mistaken_section(split), together_section(split)]
    return [section("Confusion matrix", _confusion(report, split))]


def _notes(report: Report) -> list[str]:
    return [note for name in in_order(report.splits) for note in notes(name, report.splits[name])]


def _confusion(report: Report, split: SplitFigures) -> str:
    order = sorted(range(len(report.labels)), key=lambda i: (-split.per_label[i].support, i))
    labels = [report.labels[i] for i in order]
    counts = [[split.confusion[i][j] for j in order] for i in order]
    shown = labels[:MOST_PLOTTED]
    of_all = f" Shown are the {len(shown)} most frequent labels." if len(shown) < len(labels) else ""
    plot = figure(
        confusion_plot(shown, [row[: len(shown)] for row in counts[: len(shown)]], list(map(sum, counts))),
        "Posts by true label (row) and prediction (column), most frequent label first; stronger colour,"
        f" larger share of the row.{of_all}",
    )
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count]
    worst = sorted(wrong, key=lambda item: (-item[0], item[1], item[2]))[:_CONFUSIONS]
    rows = [(labels[i], labels[j], f"{count:,}", percent(count / sum(counts[i]))) for count, i, j in worst]
    heads = ("true label", "predicted", "posts", "of the true label")
    return plot + (
        f"<h3>Most frequent mistakes</h3>{table(heads, rows, words=2)}"
        if rows
        else "<p>There is no mistake.</p>"
    )


def _calibration(split: AnyFigures) -> str:
    several = isinstance(split, SetFigures)
    figures = ", ".join(
        f"{WORDS[field]} <b>{value:.3f}</b>" for field, value in split.of_probabilities.items()
    )
    ideal, caption = (
        (
            "7 of 10 labels given a probability of 0.7 are true of their posts",
            "How often a post has a label, by the label's probability; below, how many labels of all posts.",
        )
        if several
        else (
            "posts given a probability of 0.7 are right 7 times out of 10",
            "Accuracy by the probability of the predicted label; below, how many posts.",
        )
    )
    words = (
        f"<p>Over {len(split.reliability)} bins of equal width: {figures}. On the dashed line, {ideal};"
        " points below it mean that the model is too sure of itself.</p>"
    )
    plot = figure(reliability_plot(split.reliability, several), caption)
    return f'<div class="pair">{plot}<div>{words}</div></div>'


def _training(report: Report) -> str:
    if not report.history:
        return "<p>No evaluation was recorded.</p>"
    losses = [(one.step, one.loss) for one in report.losses] or [
        (one.step, one.train_loss) for one in report.history if one.train_loss is not None
    ]
    held_out = [(one.step, one.validation_loss) for one in report.history if one.validation_loss is not None]
    scores = [(one.step, one.macro_f1) for one in report.history]
    named = {"training loss": losses, "validation loss": held_out}
    curves = [(name, points) for name, points in named.items() if points]
    caption = (
        "Loss by step. Where validation loss rises while training loss falls, more training is of no use."
        if held_out
        else "Training loss."
    )
    plots = [figure(curves_plot(curves), caption)] if curves else []
    plots.append(
        figure(
            curves_plot([("validation macro-F1", scores)], report.best_step),
            "Macro-F1 on validation posts; the ringed point is this model.",
        )
    )
    rows = [
        (
            f"{one.step:,}",
            f"{one.epoch:.2f}",
            "–" if one.train_loss is None else f"{one.train_loss:.4f}",
            "–" if one.validation_loss is None else f"{one.validation_loss:.4f}",
            f"{one.macro_f1:.4f}",
            f"{one.learning_rate:.2e}",
            "◂ this model" if one.step == report.best_step else "",
        )
        for one in report.history
    ]
    heads = ("step", "epoch", "training loss", "validation loss", "validation macro-F1", "learning rate", "")
    return f'<div class="pair">{"".join(plots)}</div>{table(heads, rows, words=0)}'


def _slices(report: Report) -> str:
    """The tables of macro-F1 by value, one for each kept column."""
    parts = []
    for one in report.slices:
        rows = [
            (
                "no value" if value.value == "" else value.value or f"{value.values:,} other values",
                f"{value.rows:,}",
                f"{value.labels:,}",
                f"{value.macro_f1:.3f}",
                f"{value.macro_f1_low:.3f} to {value.macro_f1_high:.3f}",
                "few posts" if value.rows < FEW_POSTS else "",
            )
            for value in one.values
        ]
        heads = (one.column, "posts", "labels", "macro-F1", "95 % interval", "")
        parts.append(f"<h3>{escape(one.column)}</h3>{table(heads, rows)}")
    words = (
        f"<p>{escape(report.headline.capitalize())} posts by the values of kept columns. Macro-F1 of a slice"
        f" is over the labels of its posts; with fewer than {FEW_POSTS} posts it is mostly chance.</p>"
    )
    return words + "".join(parts)


def _splits(report: Report) -> str:
    rows, split = [], report.splits[report.headline]
    for name in in_order(report.splits):
        one = report.splits[name]
        interval = f"{one.macro_f1_low:.3f} to {one.macro_f1_high:.3f}"
        others = [f"{value:.3f}" for value in (one.also | one.of_probabilities).values()]
        rows.append((name, f"{one.rows:,}", f"{one.macro_f1:.3f}", interval, *others))
    heads = (
        "split",
        "posts",
        "macro-F1",
        "95 % interval",
        *(WORDS[field] for field in split.also | split.of_probabilities),
    )
    return table(heads, rows)


def _data(report: Report) -> str:
    counts, splits = report.dataset.label_counts, in_order(report.dataset.rows)
    order = sorted(range(len(report.labels)), key=lambda i: (-sum(counts[name][i] for name in splits), i))
    rows = [(report.labels[i], *(posts_of(counts[name][i]) for name in splits)) for i in order]
    rows.append(("all posts", *(f"{report.dataset.rows[name]:,}" for name in splits)))
    cleaning = [
        (
            name.replace("_", " "),
            "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value),
        )
        for name, value in report.dataset.cleaning.items()
        if not name.startswith("bytes_p")  # the lengths below are in tokens
    ]
    lengths = f"<h3>Lengths in tokens</h3>{_lengths(report)}" if report.cuts else ""
    return (
        f'<div class="pair"><div>{table(("label", *splits), rows, total=True)}</div>'
        f"<div>{fact_list(cleaning)}</div></div>{lengths}"
    )


def _lengths(report: Report) -> str:
    """The table of posts and tokens that data.max_length cuts, by split."""
    rows = [
        (
            name,
            f"{cut.posts:,}",
            f"{cut.median_tokens:,}",
            f"{cut.longest_tokens:,}",
            f"{cut.max_length:,}",
            cut.share_words,
            cut.lost_words,
            f"{cut.max_length_for_2_percent:,}",
        )
        for name in in_order(report.cuts)
        for cut in [report.cuts[name]]
    ]
    heads = (
        "split",
        "posts counted",
        "median",
        "longest",
        "cut at",
        "posts cut",
        "tokens lost",
        "2 % would be cut at",
    )
    return table(heads, rows)


def _speed(report: Report) -> str:
    speed = report.speed
    facts = [
        ("speed", f"{rate(speed.posts_per_second)} posts/s, {rate(speed.tokens_per_second)} tokens/s"),
        ("trained on", f"{speed.posts:,} posts, {speed.real_tokens:,} tokens over all epochs"),
        ("padding", f"{percent(speed.padding_share)} of the computed tokens"),
        ("training", duration(speed.train_seconds)),
        ("evaluation", duration(speed.evaluation_seconds)),
        ("checkpoints", saving(speed.saves, speed.stall_seconds, speed.train_seconds, speed.upload_seconds)),
        ("machines held", duration(speed.wall_seconds)),
        (
            "peak memory",
            (
                f"{memory(speed.peak_memory_bytes)}"
                f" {'on the fullest GPU' if speed.memory_kind == 'GPU' else 'resident'}"
            ),
        ),
    ]
    if speed.usd is not None and speed.usd_per_hour is not None:
        facts.append(("cost", f"{dollars(speed.usd)} at {dollars(speed.usd_per_hour)} an hour"))
    return fact_list(facts)


def _identity(report: Report) -> str:
    one = report.identity
    when = "%Y-%m-%d %H:%M:%S UTC"
    facts = [
        ("run", one.run_id),
        ("base", ", ".join([one.base, one.precision, *_depth(one)])),
        ("data", one.data_url),
        ("device", f"{one.world_size} × {one.device}"),
        ("started", one.started_utc.strftime(when)),
        ("ended", one.ended_utc.strftime(when)),
        ("git commit", one.git_commit or "not known"),
        ("config sha256", one.config_sha256),
        ("index sha256", one.index_sha256),
        ("versions", ", ".join(f"{name} {version}" for name, version in one.versions.items())),
    ]
    return fact_list(facts)


def _depth(identity: Identity) -> list[str]:
    layers = identity.config.get("model", {}).get("layers")
    return [] if layers is None else [f"model.layers={layers}"]


def in_order(names: Iterable[str]) -> list[str]:
    """The splits in the order train, validation, test, then others by name."""
    found = list(names)
    return sorted(found, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))


def _named(figures: object, fields: Iterable[str]) -> list[str]:
    return [f"{getattr(figures, field):.3f}" for field in fields]


def _bar(share: float, value: str, css: str, head: str) -> str:
    return (
        f'<td class="bar" data-head="{escape(head)}"><div><span>{value}</span><b><i class="{css}"'
        f' style="width:{100 * share:.1f}%"></i></b></div></td>'
    )


def _interval(one: LabelFigures) -> str:
    return f'<td class=between data-head="95 % interval">{one.f1_low:.2f} to {one.f1_high:.2f}</td>'


def _cell(value: str, head: str) -> str:
    return f'<td data-head="{escape(head)}">{value}</td>'
