"""What others wrote is printed as data: no formula for a spreadsheet that asks for none, no command
for a terminal, no HTML in a page.
"""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.text import Text

from emotion_train.cli import main
from emotion_train.console import Terminal, shown
from emotion_train.edges.spreadsheet import harmless
from emotion_train.evaluation.answer_lines import Written, printer
from emotion_train.evaluation.unlabelled import Post
from emotion_train.model.card import CardFacts, model_card

FORMULAS = ['=HYPERLINK("http://evil")', "+1", "-2+3", "@SUM(1)", "\t=1", "\r=1"]
PLAIN = ["what a mess", "a=1", "1-2", "'=1", "", " =1"]
COMMANDS = {
    "\x1b[31mred": "\\x1b[31mred",
    "\x9b2J": "\\x9b2J",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "abc\u202egpj": "abc\\u202egpj",
    "\u2066a\u2069": "\\u2066a\\u2069",
    "one\r\ntwo": "one\\r\\ntwo",
    "half \ud83d": "half \\ud83d",
}


def printed(form: str, posts: list[str], labels: list[str], escape: bool = False) -> str:
    out = io.StringIO()
    prob_NC = np.full((len(posts), len(labels)), 1 / len(labels))
    batch = [Post(number, text, (text,)) for number, text in enumerate(posts, 1)]
    written = Written(labels, False, ["=kept"], 2, harmless if escape else str)
    printer(form, written, out)(batch, prob_NC, [(0,)] * len(posts))
    return out.getvalue()


def test_formulas_get_an_apostrophe_where_that_is_asked_for() -> None:
    posts = [*FORMULAS, *PLAIN]
    head, *rows = csv.reader(io.StringIO(printed("csv", posts, ["=calm", "glee"], True), newline=""))
    assert head == ["row", "'=kept", "text", "label", "'=calm", "glee"]
    wanted = [f"'{post}" for post in FORMULAS] + PLAIN
    assert [row[1:3] for row in rows] == [[post, post] for post in wanted]
    assert {row[3] for row in rows} == {"'=calm"}
    assert {cell for row in rows for cell in row[4:]} == {"0.500000"}


def test_cells_are_as_they_are_by_default() -> None:
    posts = [*FORMULAS, *PLAIN]
    head, *rows = csv.reader(io.StringIO(printed("csv", posts, ["=calm", "glee"]), newline=""))
    assert head == ["row", "=kept", "text", "label", "=calm", "glee"]
    assert [row[1:3] for row in rows] == [[post, post] for post in posts]


def test_the_switch_is_in_help_and_for_csv_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "--escape-formulas" in capsys.readouterr().out
    assert main(["predict", "--adapter", "nowhere", "--escape-formulas", "a post"]) == 2
    assert "--escape-formulas is for csv and --format is text" in capsys.readouterr().err


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_for_a_terminal_are_shown(words: str) -> None:
    assert shown(words) == COMMANDS[words]
    lines = printed("text", [words], [words, "glee"]).splitlines()
    assert lines == [f"{COMMANDS[words]} 0.50  glee 0.50  | =kept={COMMANDS[words]}  | {COMMANDS[words]}"]
    out = io.StringIO()
    Terminal(file=out, force_terminal=True, width=200, color_system=None).print(words, markup=False)
    assert not re.search("[\x1b\x9b\u202e\u2066\r]", out.getvalue())


def test_other_words_and_the_terminal_s_own_colours_stay() -> None:
    for words in ("naïve café 日本語 👍🏽", "שלום", "a\tb", "don’t"):
        assert shown(words) == words
    out = io.StringIO()
    Terminal(file=out, force_terminal=True, width=80, color_system="standard").print(Text("alarm", "red"))
    assert out.getvalue() == "\x1b[31malarm\x1b[0m\n"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize(
    "label",
    ["<script>alert(1)</script>", "a`<img src=x onerror=alert(1)>`b", "<b>", "calm & glee", "*_[x](y)`"],
)
def test_the_card_holds_no_html_of_a_label_or_base(label: str, tmp_path: Path) -> None:
    facts = CardFacts(label, "text", "bf16", 64, ("calm", label), 8, 16, ("q_proj",))
    prose = model_card(facts).split("## Use")[0].split("---\n", 2)[2]
    parser = _Tags()
    parser.feed(prose)
    assert parser.tags == ["code", "code"]
    assert parser.words.count(label) == 2
    assert "`calm`" in prose
