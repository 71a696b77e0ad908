"""The report's sections on probabilities to act on: before and after the temperature, and the
gates.
"""

from __future__ import annotations

from html import escape

from emotion_train.report.chances import temperature_words
from emotion_train.report.html_parts import section, table
from emotion_train.report.schema import GateFigures, Report
from emotion_train.report.units import percent


def chance_sections(report: Report) -> list[str]:
    """The sections; none for reports of earlier versions."""
    return [part for part in (_temperature(report), _gates(report)) if part]


def _temperature(report: Report) -> str:
    figures = report.temperature
    if figures is None:
        return ""
    rows = [
        (
            f"{name}, out of fold" if name == "validation" else name,
            f"{one.before.log_loss:.3f}",
            f"{one.after.log_loss:.3f}",
            f"{one.before.calibration_error:.3f}",
            f"{one.after.calibration_error:.3f}",
        )
        for name, one in figures.splits.items()
    ]
    heads = ("split", "log loss before", "after", "calibration error before", "after")
    words = f"<p>{escape(temperature_words(figures))}</p>"
    apart = figures.temperature is not None and len(figures.temperature) > 1
    of_labels = ""
    if apart and figures.temperature is not None:
        pairs = zip(report.labels, figures.temperature, strict=True)
        of_labels = "<h3>Temperature of each label</h3>" + table(
            ("label", "temperature"), [(label, f"{one:g}") for label, one in pairs if one != 1]
        )
    return section("Probabilities before and after the temperature", words + table(heads, rows) + of_labels)


def _gates(report: Report) -> str:
    over_all = [gate for gate in report.gates if gate.label is None]
    if not over_all:
        return ""
    several = report.targets == "several"
    words = (
        "<p>Answers at or above the threshold are right at least as often as wanted, with 95 % certainty by"
        " the validation posts; a person checks the others. "
        + ("An answer is right when the post has every label in it. " if several else "")
        + "<code>predict --accept-precision</code> marks them.</p>"
    )
    splits = list(report.splits)
    heads = (
        "wanted",
        "accepted from",
        *(f"{name}: {what}" for name in splits for what in ("accepted", "right")),
    )
    rows = [
        (
            f"{100 * gate.precision:g} %",
            "no probability" if gate.threshold is None else f"p = {gate.threshold:g}",
            *(cell for name in splits for cell in _check(gate, name)),
        )
        for gate in over_all
    ]
    return section("Which answers to accept", words + table(heads, rows) + _by_label(report))


def _check(gate: GateFigures, name: str) -> tuple[str, str]:
    """The share of accepted answers, and the share of right ones among them."""
    check = gate.checks.get(name)
    if check is None or not check.answers:
        return "–", "–"
    right = percent(check.right / check.accepted) if check.accepted else "–"
    return percent(check.accepted / check.answers), right


def _by_label(report: Report) -> str:
    precisions = [gate.precision for gate in report.gates if gate.label is None]
    found = {(gate.label, gate.precision): gate for gate in report.gates}
    rows = []
    for label in report.labels:
        gates = [found.get((label, precision)) for precision in precisions]
        if any(gate is not None and gate.threshold is not None for gate in gates):
            rows.append((label, *(_threshold_words(gate, report.headline) for gate in gates)))
    if not rows:
        return "<p>No single label has a gate of its own: there are too few answers with each.</p>"
    heads = ("label", *(f"{100 * precision:g} %" for precision in precisions))
    return (
        "<h3>By label</h3><p>The smallest accepted probability, and the accepted share of the"
        f" {escape(report.headline)} answers with the label.</p>{table(heads, rows)}"
    )


def _threshold_words(gate: GateFigures | None, name: str) -> str:
    if gate is None or gate.threshold is None:
        return "–"
    return f"{gate.threshold:g} ({_check(gate, name)[0]})"
