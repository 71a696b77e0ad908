"""The report's plots as inline SVG, and bars as HTML: a few kilobytes each, crisp in print,
coloured by the page's light or dark theme.

Every function returns one element with an `aria-label` that describes it. Colours are CSS classes
of stylesheet.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from emotion_train.report.schema import AnyFigures, Floor, ReliabilityBin, SetFloor
from emotion_train.report.units import percent, short_count

MOST_PLOTTED = 32  # labels of a square of pairs, the most frequent ones
_LABEL_CHARACTERS = 24
_CHARACTER = 6.7  # average width at 12 px, a little generous
_NARROW = 360  # width in pixels that a telephone shows without shrinking the letters


def floors_plot(split: AnyFigures, floors: Sequence[Floor | SetFloor]) -> str:
    """Bars of macro-F1: the model's with its interval, then each floor's."""
    whisker = _span(split.macro_f1_low, split.macro_f1_high, "span")
    bars = [("this model", split.macro_f1, "accent", whisker)]
    bars += [(floor.name, floor.macro_f1, "floor", "") for floor in floors]
    rows = [
        _track(name, f'<i class="{css}" style="width:{100 * value:.2f}%"></i>{more}', f"{value:.3f}")
        for name, value, css, more in bars
    ]
    words = (
        f"Macro-F1 {split.macro_f1:.3f}, 95 % interval {split.macro_f1_low:.3f} to"
        f" {split.macro_f1_high:.3f}; " + ", ".join(f"{floor.name} {floor.macro_f1:.3f}" for floor in floors)
    )
    return _tracks(rows, [(i / 5, f"{i / 5:.1f}") for i in range(6)], words)


def differences_plot(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Differences with their intervals around a line at 0; `rows` are name, difference, low,
    high.
    """
    ticks = nice_ticks(min(0.0, *(low for _, _, low, _ in rows)), max(0.0, *(high for _, _, _, high in rows)))

    def at(value: float) -> float:
        return (value - ticks[0]) / (ticks[-1] - ticks[0])

    digits = max(1, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    zero = f'<s style="left:{100 * at(0):.2f}%"></s>'
    tracks = [
        _track(
            name,
            f'{zero}{_span(at(low), at(high), "span")}<b style="left:{100 * at(difference):.2f}%"></b>',
            f"{difference:+.3f}",
        )
        for name, difference, low, high in rows
    ]
    words = "; ".join(f"{name} {value:+.3f}, {low:+.3f} to {high:+.3f}" for name, value, low, high in rows)
    scale = [(at(tick), f"{tick:.{digits}f}") for tick in ticks]
    return _tracks(tracks, scale, f"Differences with their 95 % intervals: {words}")


def _tracks(rows: Iterable[str], scale: Iterable[tuple[float, str]], words: str) -> str:
    """Named bars over a scale, in HTML: their letters keep their size on a narrow screen."""
    marks = "".join(f'<em style="left:{100 * at:.2f}%">{escape(name)}</em>' for at, name in scale)
    axis = f'<div class="track axis"><span></span><span class="rail">{marks}</span><span></span></div>'
    return f'<div class="tracks" role="img" aria-label="{escape(words)}">{"".join(rows)}{axis}</div>'


def _track(name: str, rail: str, value: str) -> str:
    return (
        f'<div class="track"><span>{escape(name)}</span><span class="rail">{rail}</span>'
        f"<span>{value}</span></div>"
    )


def _span(low: float, high: float, css: str) -> str:
    """A bar from one share of the width to another."""
    return f'<u class="{css}" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></u>'


def confusion_plot(labels: Sequence[str], confusion: Sequence[Sequence[int]], support: Sequence[int]) -> str:
    """Counts of truth (rows) by prediction (columns); the colour is the share of the label's
    `support`.
    """
    words = f"Confusion matrix of {len(labels)} labels; the most frequent mistakes are listed below"
    return pairs_plot(labels, confusion, support, ("true label", "predicted"), words)


def pairs_plot(
    labels: Sequence[str],
    counts: Sequence[Sequence[int]],
    of: Sequence[int],
    axes: tuple[str, str],
    words: str,
) -> str:
    """Posts of each pair of labels as a square; `axes` name rows and columns. The colour is the
    share of `of`, the posts of the row.
    """
    classes = len(labels)
    cell = 46 if classes <= 12 else 38 if classes <= 18 else 27
    font = 12.5 if cell >= 38 else 11
    names = [_short(label) for label in labels]
    room = max(len(name) for name in names) * _CHARACTER + 14
    left, top = room + 18, room * 0.72 + 34
    body = [
        _text(left + classes * cell / 2, 13, axes[1], "middle", "muted"),
        (
            f'<text transform="translate(12 {top + classes * cell / 2:.1f}) rotate(-90)" text-anchor="middle"'
            f' class="muted">{escape(axes[0])}</text>'
        ),
        _rect(left, top, classes * cell, classes * cell, "plate"),
    ]
    for i, (label, name) in enumerate(zip(labels, names, strict=True)):
        at = i * cell + cell / 2
        full = f"<title>{escape(label)}</title>" if name != label else ""
        body.append(
            f'<text x="{left - 8:.1f}" y="{top + at + 4:.1f}" text-anchor="end">{full}{escape(name)}</text>'
        )
        body.append(
            f'<text transform="translate({left + at + 3:.1f} {top - 8:.1f})'
            f' rotate(-45)">{full}{escape(name)}</text>'
        )
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                share = count / of[i]
                body.append(
                    _cell(
                        left + j * cell,
                        top + i * cell,
                        cell,
                        font,
                        count,
                        share,
                        i == j,
                        f"{labels[i]} → {labels[j]}",
                    )
                )
    width = left + classes * cell + room * 0.72
    return _svg(width, top + classes * cell + 6, words, body, narrowest=width)  # letters below 11 px are none


def _cell(
    x: float, y: float, cell: float, font: float, count: int, share: float, right: bool, words: str
) -> str:
    opacity = 0.07 + 0.93 * share
    ink = "on" if opacity > 0.55 else "off"
    edge = ' class="right"' if right else ""
    return (
        f"<g{edge}><title>{escape(words)}: {count:,} ({percent(share)})</title>"
        + _rect(x + 0.75, y + 0.75, cell - 1.5, cell - 1.5, "heat", f' rx="2" fill-opacity="{opacity:.3f}"')
        + f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + font * 0.36:.1f}" text-anchor="middle"'
        f' font-size="{font}" class="{ink}">{short_count(count)}</text></g>'
    )


def reliability_plot(bins: Iterable[ReliabilityBin], several: bool = False) -> str:
    """Accuracy over the model's confidence; bars below the diagonal mean overconfidence. Strips
    below show how many posts, or with several labels how many pairs of post and label.
    """
    across, up, counted = (
        ("probability of a label", "share that has it", "labels")
        if several
        else ("confidence (highest probability)", "accuracy", "posts")
    )
    left, right, top, bottom, strip = 46, 340, 10, 260, 40
    filled = [one for one in bins if one.confidence is not None and one.accuracy is not None]
    most = max((one.rows for one in filled), default=1)

    def x(value: float) -> float:
        return left + value * (right - left)

    def y(value: float) -> float:
        return bottom - value * (bottom - top)

    ticks = [i / 5 for i in range(6)]
    body = _horizontal_grid(ticks, y, left, right)
    for one in filled:
        assert one.confidence is not None
        assert one.accuracy is not None
        start, width = x(one.low) + 1, x(one.high) - x(one.low) - 2
        height = max(one.rows / most * strip, 1)
        words = f"confidence {one.confidence:.2f}, accuracy {one.accuracy:.2f}, {one.rows:,} {counted}"
        body += [
            f"<g><title>{words}</title>",
            _rect(start, y(one.accuracy), width, bottom - y(one.accuracy), "soft"),
            f'<circle cx="{x(one.confidence):.1f}" cy="{y(one.accuracy):.1f}" r="4" class="accent"/>',
            _rect(start, bottom + 8 + strip - height, width, height, "floor"),
            "</g>",
        ]
    body.append(f'<path d="M{left} {bottom}L{right} {top}" class="diagonal"/>')
    floor = bottom + 8 + strip
    body += [_text(x(tick), floor + 17, f"{tick:.1f}", "middle", "muted") for tick in ticks]
    body.append(_text((left + right) / 2, floor + 36, across, "middle", "muted"))
    body.append(_text(left - 10, floor - 2, counted, "end", "muted"))
    body.append(
        f'<text transform="translate(11 {(top + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle"'
        f' class="muted">{up}</text>'
    )
    words = "Reliability diagram: " + "; ".join(
        f"confidence {one.confidence:.2f} accuracy {one.accuracy:.2f}" for one in filled
    )
    return _svg(_NARROW, floor + 42, words, body)


def curves_plot(
    curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], best_step: int | None = None
) -> str:
    """Up to two named curves over optimizer steps; the best step of the last curve is ringed."""
    left, right, top, bottom = 50, 346, 26, 226
    every = [point for _, points in curves for point in points]
    low_x, high_x = min(step for step, _ in every), max(step for step, _ in every)
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1
    ticks = nice_ticks(min(value for _, value in every), max(value for _, value in every))

    def x(step: float) -> float:
        return left + 12 + (step - low_x) / (high_x - low_x) * (right - left - 24)

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    body, at = _horizontal_grid(ticks, y, left, right, digits), float(left)
    for number, (name, points) in enumerate(curves):
        css = ("accent", "second")[number]
        body.append(f'<circle cx="{at + 5:.1f}" cy="8" r="4" class="{css}"/>')
        body.append(_text(at + 14, 12, name, "start", "muted"))
        at += 30 + _CHARACTER * len(name)
        last = number == len(curves) - 1
        body += _curve(
            [(x(step), y(value)) for step, value in points], points, css, best_step if last else None
        )
    for step in _spread(sorted({step for step, _ in every}), 5):
        body.append(_text(x(step), bottom + 18, f"{step:,}", "middle", "muted"))
    body.append(_text((left + right) / 2, bottom + 37, "optimizer step", "middle", "muted"))
    told = [
        f"{name} over steps {points[0][0]} to {points[-1][0]}, last {points[-1][1]:.4f}"
        + "".join(f", best {value:.4f} at step {step}" for step, value in points if step == best_step)
        for name, points in curves
    ]
    return _svg(_NARROW, bottom + 44, "; ".join(told), body)


def _curve(
    places: Sequence[tuple[float, float]],
    points: Sequence[tuple[int, float]],
    css: str,
    best_step: int | None,
) -> list[str]:
    """A line through the places, with dots where there are few."""
    drawn = [f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" class="line {css}"/>']
    for (x, y), (step, value) in zip(places, points, strict=True):
        if step == best_step:
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" class="ring {css}"/>')
        if len(points) <= 60 or step == best_step:
            words = f"<title>step {step:,}: {value:.4f}</title>"
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{css}">{words}</circle>')
    return drawn


def nice_ticks(low: float, high: float, intervals: int = 4) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    rough = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, first and last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"


def _horizontal_grid(
    ticks: Sequence[float], y: Callable[[float], float], left: float, right: float, digits: int = 1
) -> list[str]:
    lines = [f'<path d="M{left} {y(tick):.1f}H{right}" class="grid"/>' for tick in ticks]
    return lines + [_text(left - 8, y(tick) + 4, f"{tick:.{digits}f}", "end", "muted") for tick in ticks]


def _text(x: float, y: float, words: str, anchor: str, css: str = "") -> str:
    named = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, css: str, more: str = "") -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" class="{css}"{more}/>'


def _svg(width: float, height: float, words: str, body: Iterable[str], narrowest: float = 0) -> str:
    """An SVG that shrinks with the page down to `narrowest` pixels and never grows beyond its own
    size.
    """
    size = f"max-width:{width:.0f}px;min-width:{narrowest:.0f}px"
    kind = ' class="matrix"' if narrowest else ""
    return (
        f'<svg{kind} viewBox="0 0 {width:.0f} {height:.0f}" style="{size}" role="img"'
        f' aria-label="{escape(words)}">{"".join(body)}</svg>'
    )
