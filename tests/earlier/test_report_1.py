"""Reports and scorecards of the first schema, which knew one label a post, are read and shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report, Scorecard, SplitFigures
from emotion_train.report.scorecard import headline
from emotion_train.report.terminal import print_report, print_scorecard

# written by the last version that wrote these schemas, about posts made of random numbers
REPORT = Path(__file__).parent / "report_1.json"
CARD = Path(__file__).parent / "scorecard_1.json"


def test_a_report_of_the_first_schema_is_read_and_shown() -> None:
    raw = REPORT.read_bytes()
    old = Report.model_validate_json(raw)
    assert (old.schema_version, old.targets) == ("emotion-train/report/1", "one")
    split = old.splits[old.headline]
    assert isinstance(split, SplitFigures)
    assert split.distance is None
    written = json.loads(raw)["splits"]["test"]
    assert [*map(list, split.confusion)] == written["confusion"]
    assert split.macro_f1 == written["macro_f1"]
    assert split.also == {name: written[name] for name in ("weighted_f1", "accuracy")}
    out = io.StringIO()
    print_report(old, Console(file=out, width=200))
    for shown in (out.getvalue(), render_html(old)):
        assert old.verdict.sentence in shown


def test_a_scorecard_of_the_first_schema_is_read_and_shown() -> None:
    old = Scorecard.model_validate_json(CARD.read_bytes())
    assert (old.schema_version, old.targets) == ("emotion-train/scorecard/1", "one")
    out = io.StringIO()
    print_scorecard(old, Console(file=out, width=200))
    assert headline(old)[1] in out.getvalue()
