"""Draws docs/images/path-light.svg and path-dark.svg: the path from posts to adapter and report.

    python docs/scripts/picture.py

tests/test_docs.py fails where the files differ from what this draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parents[1] / "images"
WIDTH, HEIGHT = 960, 250
BOX, TOP, TALL = 150, 60, 92  # width, upper edge and height of a box
GAP = (WIDTH - 5 * BOX) / 6


class Colours(NamedTuple):
    text: str
    faint: str
    box: str
    edge: str
    accent: str


COLOURS = {
    "light": Colours("#1f2328", "#59636e", "#f6f8fa", "#b6bfc8", "#0969da"),
    "dark": Colours("#f0f6fc", "#9198a1", "#161b22", "#4a525c", "#58a6ff"),
}
# heading, two lines below it, and the command that leads to the next box
STEPS = (
    ("posts", ("CSV, JSONL,", "Parquet, hub"), "prepare"),
    ("bucket", ("shuffled, checked,", "every byte hashed"), "sky jobs launch"),
    ("spot GPUs", ("train, and may vanish", "at any moment"), "every minute"),
    ("log", ("create-only, one writer,", "nothing torn or lost"), "pull"),
    ("adapter, report", ("verified LoRA,", "macro-F1 and floors"), ""),
)
BACK = "preempted: another machine resumes from the newest checkpoint"


def left(step: int) -> float:
    return GAP + step * (BOX + GAP)


def drawing(colours: Colours) -> str:
    """The picture as SVG, its text as text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>From posts to adapter and report</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
        f' orient="auto"><path d="M0 0L8 4L0 8z" fill="{colours.accent}"/></marker></defs>',
    ]
    for step, (heading, lines, verb) in enumerate(STEPS):
        x, middle = left(step), left(step) + BOX / 2
        parts.append(
            f'<rect x="{x:.0f}" y="{TOP}" width="{BOX}" height="{TALL}" rx="8" fill="{colours.box}"'
            f' stroke="{colours.edge}"/>'
        )
        parts.append(text(middle, TOP + 32, heading, colours.text, 17, "600"))
        parts += [text(middle, TOP + 56 + 18 * n, line, colours.faint, 13) for n, line in enumerate(lines)]
        if verb:
            y = TOP + TALL / 2
            parts.append(arrow(f"M{x + BOX + 2:.0f} {y:.0f}H{x + BOX + GAP - 2:.0f}", colours))
            parts.append(text(x + BOX + GAP / 2, TOP - 16, verb, colours.accent, 13))
    below = TOP + TALL
    start, end = left(3) + BOX / 2, left(2) + BOX / 2
    parts.append(arrow(f"M{start:.0f} {below + 2}V{below + 40}H{end:.0f}V{below + 4}", colours))
    parts.append(text((start + end) / 2, below + 64, BACK, colours.accent, 13))
    return "\n".join([*parts, "</svg>\n"])


def text(x: float, y: float, words: str, colour: str, size: int, weight: str = "400") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
        f' text-anchor="middle">{escape(words)}</text>'
    )


def arrow(path: str, colours: Colours) -> str:
    line = f'fill="none" stroke="{colours.accent}" stroke-width="1.5" marker-end="url(#tip)"'
    return f'<path d="{path}" {line}/>'


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, colours in COLOURS.items():
        (IMAGES / f"path-{name}.svg").write_text(drawing(colours), encoding="utf-8")


if __name__ == "__main__":
    main()
