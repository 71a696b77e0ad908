"""The report as one HTML file for the browser, the printer and the archive: no script, no font, no request to anywhere.

Every word that comes from outside (labels, URLs, config) goes through `html.escape`; a content security policy forbids the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import yaml

from emotion_train.report.plots import confusion_plot, curve_plot, floors_plot, reliability_plot
from emotion_train.report.schema import LabelFigures, Report, SplitFigures
from emotion_train.report.units import dollars, duration, memory, percent, rate, signed

_MARKS = {"beaten": ("good", "✓"), "open": ("open", "≈"), "not beaten": ("bad", "✗")}
_CONFUSIONS = 8


def render_html(report: Report) -> str:
    """The whole page. The same report gives the same text."""
    split = report.splits[report.headline]
    sections = [
        _head(report, split),
        _section("Against the floors", _floors(split)),
        _section("What to keep in mind", _list(report.warnings)) if report.warnings else "",
        _section("Label by label", _per_label(split)),
        _section("What is taken for what", _confusion(report, split)),
        _section("Can the probabilities be trusted?", _calibration(split)),
        _section("Training", _training(report)),
        _section("Every split", _splits(report)) if len(report.splits) > 1 else "",
        _section("Data", _data(report)),
        _section("Speed and cost", _speed(report)),
        _section("Identity", _identity(report)),
        _section("Configuration", f"<pre>{escape(yaml.safe_dump(report.identity.config, sort_keys=False, allow_unicode=True))}</pre>"),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.identity.run_id)}: macro-F1 {split.macro_f1:.3f}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report, split: SplitFigures) -> str:
    css, mark = _MARKS[report.verdict.outcome]
    identity, speed = report.identity, report.speed
    tiles = [
        ("macro-F1", f"{split.macro_f1:.3f}", f"95 % interval {split.macro_f1_low:.3f} to {split.macro_f1_high:.3f}"),
        ("weighted F1", f"{split.weighted_f1:.3f}", f"{split.rows:,} {report.headline} posts"),
        ("accuracy", f"{split.accuracy:.3f}", f"{len(report.labels)} labels"),
        ("training", duration(speed.train_seconds), f"{rate(speed.posts_per_second)} posts/s"),
    ]
    if speed.usd is not None:
        tiles.append(("cost", dollars(speed.usd), f"{duration(speed.wall_seconds)} of machine time"))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>" for name, value, note in tiles
    )
    return (
        f"<header>\n<p class=run>Emotion classifier · run <b>{escape(identity.run_id)}</b> · {escape(identity.base)}</p>\n"
        f'<h1 class="{css}"><span aria-hidden="true">{mark}</span> {escape(report.verdict.sentence)}</h1>\n<dl class="tiles">{shown}</dl>\n</header>'
    )


def _floors(split: SplitFigures) -> str:
    rows = [
        (floor.name, f"{floor.macro_f1:.3f}", f"{floor.weighted_f1:.3f}", f"{floor.accuracy:.3f}", signed(floor.difference))
        + (f"{signed(floor.difference_low)} to {signed(floor.difference_high)}",)
        for floor in split.floors
    ]
    rows.insert(0, ("this model", f"{split.macro_f1:.3f}", f"{split.weighted_f1:.3f}", f"{split.accuracy:.3f}", "", ""))
    heads = ("", "macro-F1", "weighted F1", "accuracy", "model ahead by", "95 % interval")
    return _figure(
        floors_plot(split, split.floors), "Macro-F1, the mean of every label's F1; the whisker is the 95 % bootstrap interval."
    ) + _table(heads, rows)


def _per_label(split: SplitFigures) -> str:
    most = max(one.support for one in split.per_label) or 1
    body = "".join(
        f'<tr><th scope="row">{escape(one.label)}</th>{_bar(one.support / most, f"{one.support:,}", "floor")}'
        f"<td>{one.predicted:,}</td>{_bar(one.precision, f'{one.precision:.2f}', 'soft')}{_bar(one.recall, f'{one.recall:.2f}', 'soft')}"
        f"{_bar(one.f1, f'{one.f1:.2f}', 'accent')}</tr>"
        for one in _by_support(split.per_label)
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("label", "posts", "predicted", "precision", "recall", "F1"))
    return f'<div class="wide"><table class="bars"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _confusion(report: Report, split: SplitFigures) -> str:
    order = sorted(range(len(report.labels)), key=lambda i: (-split.per_label[i].support, i))
    labels = [report.labels[i] for i in order]
    counts = [[split.confusion[i][j] for j in order] for i in order]
    plot = _figure(
        confusion_plot(labels, counts),
        "Posts by true label (row) and prediction (column), most frequent label first; darker is a larger share of its row.",
    )
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count]
    worst = sorted(wrong, key=lambda item: (-item[0], item[1], item[2]))[:_CONFUSIONS]
    rows = [(labels[i], labels[j], f"{count:,}", percent(count / sum(counts[i]))) for count, i, j in worst]
    heads = ("true label", "predicted", "posts", "of the true label")
    return plot + (f"<h3>Most frequent mistakes</h3>{_table(heads, rows, words=2)}" if rows else "<p>There is no mistake.</p>")


def _calibration(split: SplitFigures) -> str:
    facts = (
        f"<p>Expected calibration error <b>{split.calibration_error:.3f}</b> over {len(split.reliability)} bins, log loss "
        f"<b>{split.log_loss:.3f}</b>. On the dashed line, posts given a probability of 0.7 are right 7 times out of 10; "
        "points below it mean that the model is too sure of itself.</p>"
    )
    return facts + _figure(
        reliability_plot(split.reliability), "Accuracy by the probability of the predicted label; below, how many posts."
    )


def _training(report: Report) -> str:
    if not report.history:
        return "<p>No evaluation was recorded.</p>"
    losses = [(one.step, one.train_loss) for one in report.history if one.train_loss is not None]
    scores = [(one.step, one.macro_f1) for one in report.history]
    plots = [
        _figure(curve_plot(scores, "Validation macro-F1", report.best_step), "Validation macro-F1; the ringed checkpoint is this model.")
    ]
    if losses:
        plots.insert(0, _figure(curve_plot(losses, "Training loss"), "Training loss."))
    rows = [
        (f"{one.step:,}", f"{one.epoch:.2f}", "–" if one.train_loss is None else f"{one.train_loss:.4f}", f"{one.macro_f1:.4f}")
        + (f"{one.learning_rate:.2e}", "◂ this model" if one.step == report.best_step else "")
        for one in report.history
    ]
    heads = ("step", "epoch", "training loss", "validation macro-F1", "learning rate", "")
    return f'<div class="pair">{"".join(plots)}</div>{_table(heads, rows, words=0)}'


def _splits(report: Report) -> str:
    rows = [
        (name, f"{one.rows:,}", f"{one.macro_f1:.3f}", f"{one.macro_f1_low:.3f} to {one.macro_f1_high:.3f}", f"{one.weighted_f1:.3f}")
        + (f"{one.accuracy:.3f}", f"{one.log_loss:.3f}", f"{one.calibration_error:.3f}")
        for name, one in report.splits.items()
    ]
    heads = ("split", "posts", "macro-F1", "95 % interval", "weighted F1", "accuracy", "log loss", "calibration error")
    return _table(heads, rows)


def _data(report: Report) -> str:
    counts, splits = report.dataset.label_counts, list(report.dataset.rows)
    order = sorted(range(len(report.labels)), key=lambda i: (-sum(counts[name][i] for name in splits), i))
    rows = [(report.labels[i], *(f"{counts[name][i]:,}" for name in splits)) for i in order]
    rows.append(("all", *(f"{report.dataset.rows[name]:,}" for name in splits)))
    cleaning = [
        (name.replace("_", " "), "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in report.dataset.cleaning.items()
    ]
    return f'<div class="pair"><div>{_table(("label", *splits), rows, total=True)}</div><div>{_facts(cleaning)}</div></div>'


def _speed(report: Report) -> str:
    speed = report.speed
    facts = [
        ("speed", f"{rate(speed.posts_per_second)} posts/s, {rate(speed.tokens_per_second)} tokens/s"),
        ("trained on", f"{speed.posts:,} posts, {speed.real_tokens:,} tokens over all epochs"),
        ("padding", f"{percent(speed.padding_share)} of the computed tokens"),
        (
            "time",
            f"{duration(speed.train_seconds)} training, {duration(speed.evaluation_seconds)} evaluation, {duration(speed.wall_seconds)} in all",
        ),
        ("peak memory", f"{memory(speed.peak_memory_bytes)} {'on the fullest GPU' if speed.memory_kind == 'GPU' else 'resident'}"),
    ]
    if speed.usd is not None and speed.usd_per_hour is not None:
        facts.append(("cost", f"{dollars(speed.usd)} at {dollars(speed.usd_per_hour)} an hour"))
    return _facts(facts)


def _identity(report: Report) -> str:
    one = report.identity
    when = "%Y-%m-%d %H:%M:%S UTC"
    facts = [
        ("run", one.run_id),
        ("base", f"{one.base}, {one.precision}"),
        ("data", one.data_url),
        ("device", f"{one.world_size} × {one.device}"),
        ("started", one.started_utc.strftime(when)),
        ("ended", one.ended_utc.strftime(when)),
        ("git commit", one.git_commit or "not known"),
        ("config sha256", one.config_sha256),
        ("index sha256", one.index_sha256),
        ("versions", ", ".join(f"{name} {version}" for name, version in one.versions.items())),
    ]
    return _facts(facts)


def _by_support(per_label: Iterable[LabelFigures]) -> list[LabelFigures]:
    return sorted(per_label, key=lambda one: -one.support)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"


def _bar(share: float, value: str, css: str) -> str:
    return f'<td class="bar"><span>{value}</span><i class="{css}" style="width:{100 * share:.1f}%"></i></td>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, total: bool = False) -> str:
    """The first `words` columns are text, the others numbers; the first heads its row."""
    head = "".join(f'<th scope="col"{" class=word" if i < words else ""}>{escape(name)}</th>' for i, name in enumerate(heads))
    body = "".join(
        f'<tr><th scope="row"{" class=word" if words else ""}>{escape(first)}</th>'
        + "".join(f"<td{' class=word' if i < words else ''}>{escape(value)}</td>" for i, value in enumerate(rest, 1))
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table{" class=total" if total else ""}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_CSS = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b1f24;--muted:#626a73;--edge:#e3e6e9;--accent:#3558d4;--on:#fff;
--soft:#c3cff5;--floor:#b3bac2;--good:#1e7d3c;--open:#9a6400;--bad:#c22b2b}
@media (prefers-color-scheme:dark){:root{--page:#0f1215;--card:#171b1f;--ink:#e8eaed;--muted:#9aa3ad;--edge:#2a3036;--accent:#86a0ff;--on:#0c1020;
--soft:#35447d;--floor:#4d565f;--good:#6fd58c;--open:#f2b94f;--bad:#ff8a8a}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--muted:#444;--edge:#ccc;--accent:#3558d4;--on:#fff;--soft:#c3cff5;--floor:#b3bac2;
--good:#1e7d3c;--open:#9a6400;--bad:#c22b2b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1000px;margin:0 auto;padding:32px 20px 64px}
header{margin-bottom:28px}
.run{margin:0 0 14px;color:var(--muted);overflow-wrap:anywhere}.run b{color:var(--ink);font-weight:600}
h1{position:relative;margin:0 0 22px;padding:16px 20px 16px 52px;border:1px solid var(--edge);border-left:5px solid;border-radius:8px;
background:var(--card);font-size:20px;line-height:1.4;font-weight:600;text-wrap:pretty}
h1.good{border-left-color:var(--good)}h1.open{border-left-color:var(--open)}h1.bad{border-left-color:var(--bad)}
h1 span{position:absolute;left:19px;font-weight:700}
h1.good span{color:var(--good)}h1.open span{color:var(--open)}h1.bad span{color:var(--bad)}
h2{margin:0 0 14px;font-size:17px;font-weight:650}h3{margin:22px 0 8px;font-size:15px;font-weight:650}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:0}
.tiles div{padding:14px 16px;border:1px solid var(--edge);border-radius:8px;background:var(--card)}
.tiles dt{color:var(--muted);font-size:13px}.tiles dd{margin:0;font-size:26px;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums}
.tiles small{display:block;color:var(--muted);font-size:12.5px;font-weight:400}
section{margin:0 0 16px;padding:20px 24px 22px;border:1px solid var(--edge);border-radius:8px;background:var(--card)}
p{max-width:75ch;margin:0 0 14px}ul{margin:0;padding-left:20px}li{margin:5px 0;max-width:85ch;overflow-wrap:anywhere}
figure{margin:0 0 8px;break-inside:avoid}figcaption{margin:6px 0 12px;color:var(--muted);font-size:13px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));gap:8px 32px;align-items:start}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--edge);text-align:right;font-weight:400;white-space:nowrap}
th:last-child,td:last-child{padding-right:2px}tr{break-inside:avoid}tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-size:13px;vertical-align:bottom}.word,.bars th:first-child{text-align:left}
tbody th.word,.bars tbody th{max-width:260px;overflow:hidden;text-overflow:ellipsis}
.total tbody tr:last-child>*{border-top:1px solid var(--muted);font-weight:650}
.bars{width:100%}.bars td.bar,.bars thead th:nth-child(n+2){width:16%}.bars td{padding-left:8px}
.bar{position:relative}.bar span{position:relative}
.bar i{position:absolute;right:14px;bottom:2px;height:3px;border-radius:2px;max-width:calc(100% - 22px)}
.bar:last-child i{right:2px}i.accent{background:var(--accent)}i.soft{background:var(--accent);opacity:.45}i.floor{background:var(--floor)}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:5px 20px;margin:0;font-size:14px}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
pre{margin:0;columns:3 230px;column-gap:32px;white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--ink);font-size:12px;font-variant-numeric:tabular-nums}svg .muted{fill:var(--muted)}svg .strong{font-weight:650}
svg .accent{fill:var(--accent)}svg .floor{fill:var(--floor)}svg .soft{fill:var(--soft)}svg .grid{stroke:var(--edge);fill:none}
svg .whisker{stroke:var(--ink);stroke-width:1.6;fill:none}svg .diagonal{stroke:var(--muted);stroke-dasharray:4 4;fill:none}
svg .line{stroke:var(--accent);stroke-width:2;fill:none;stroke-linejoin:round}svg .ring{fill:none;stroke:var(--accent);stroke-width:2}
svg .plate{fill:var(--page)}svg .heat{fill:var(--accent)}svg .on{fill:var(--on)}svg .off{fill:var(--ink)}svg .right text{font-weight:650}
@media print{main{max-width:none;padding:0}section{border:0;padding:8px 0;margin-bottom:12px}h2,h3{break-after:avoid}.wide{overflow:visible}}
"""
