"""How the model did, as the lines of Markdown that its card shows."""

from __future__ import annotations

from emotion_train.report.figures import cut_sentences
from emotion_train.report.notes import notes
from emotion_train.report.schema import WORDS, Report


def card_lines(report: Report) -> list[str]:
    """The verdict, a table of the headline split, what its posts' labels ask to be said, and what
    was cut.
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
        report.verdict.sentence,
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        f"| {' | '.join(cells)} |",
        *(line for sentence in sentences for line in ("", sentence)),
    ]
