"""Labels posts with a trained adapter: posts on the command line, in a file, or on standard input,
one a line. An adapter of several labels answers with the labels that reach their threshold, or with
none.

Posts are read and mended by the readers of `prepare`, so that the tokenizer sees the same text as
in training. They are labelled 1,024 at a time; a file may have any size, and is checked as a whole
first.
"""

from __future__ import annotations

import argparse
import csv
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from emotion_train.console import shown
from emotion_train.edges.paths import typed_path
from emotion_train.edges.spreadsheet import harmless
from emotion_train.edges.streams import text_is_the_result, write_utf8
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import (
    AdapterChoice,
    add_adapter_arguments,
    add_file_arguments,
    open_classifier,
    positive,
)
from emotion_train.evaluation.members import facts_together
from emotion_train.model.facts import AdapterFacts

if TYPE_CHECKING:
    from emotion_train.evaluation.adapter import Classifier
    from emotion_train.evaluation.scoring import Probabilities
    from emotion_train.evaluation.unlabelled import Post
    from emotion_train.exporting.served import Served

_AT_A_TIME = 1024
_TOP = 3
_MARK = "accepted"
_MARKS = {None: "", True: "accepted", False: "for a person"}  # in text
_BETWEEN = "|"  # several labels in a cell, as `prepare` reads them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, required=False, several="logits")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help=(
            "server that labels the posts, such as vLLM's at http://localhost:8000, and serves --adapter or"
            " its export (default: this program labels them)"
        ),
    )
    parser.add_argument(
        "--model", metavar="NAME", help="model of --endpoint (default: the first that the server names)"
    )
    parser.add_argument(
        "--against",
        metavar="URL",
        help=(
            "instead of --adapter: label the posts here too, by this adapter, and print how much --endpoint"
            " differs; ends with 1 where a probability differs by more than --tolerance"
        ),
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="P",
        help="difference of a probability that --against allows (default: %(default)s)",
    )
    parser.add_argument(
        "posts",
        nargs="*",
        metavar="POST",
        help="posts to label (default: standard input, one a line; blank lines are left out)",
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help=(
            "posts in a CSV, TSV, JSONL, Parquet or Arrow file or a folder of them, also in a bucket"
            " (s3://…); one a line in any other file (blank lines are left out)"
        ),
    )
    add_file_arguments(parser)
    parser.add_argument(
        "--columns",
        metavar="A,B",
        help=(
            "columns of --file to print before each post, as text; a column with the name of one of this"
            " program's own columns (row, text, label, labels) is printed as input_…"
        ),
    )
    parser.add_argument(
        "--on-bad",
        choices=("refuse", "drop"),
        default="refuse",
        help="what to do with posts of --file that cannot be used (default: refuse and name them)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl", "csv"),
        default="text",
        help="format of the output (default: text); jsonl and csv also number the posts",
    )
    parser.add_argument(
        "--escape-formulas",
        action="store_true",
        help=(
            "put an apostrophe before csv cells that begin with =, +, -, @, a tab or a carriage return, which"
            " spreadsheets would compute (default: cells as they are)"
        ),
    )
    parser.add_argument(
        "--accept-precision",
        type=float,
        metavar="P",
        help=(
            "mark the answers that by the adapter's gate are right at least this share of the time, such as"
            " 0.95; a person checks the others (default: no mark)"
        ),
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help=(
            "print the probabilities of the head as it was trained, before its temperature; answers and marks"
            " stay (default: the published probabilities, which are chances)"
        ),
    )
    parser.add_argument(
        "--top",
        type=positive,
        metavar="N",
        help=(
            f"labels to print for each post as text (default: {_TOP}; with several labels, all that reach"
            " their threshold); jsonl and csv hold all"
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each post, in the order of the input; returns 0, or 1 where --against
    differs too much.
    """
    text_is_the_result()
    if arguments.posts and arguments.file:
        raise WrongRequest("Posts are given as words and as --file; give one of the two.")
    if arguments.columns and not arguments.file:
        raise WrongRequest("--columns names columns of --file, which is not given; give --file too.")
    if arguments.escape_formulas and arguments.format != "csv":
        raise WrongRequest(
            f"--escape-formulas is for csv and --format is {arguments.format}; add --format csv, or leave it"
            " out."
        )
    if bool(arguments.adapter) == bool(arguments.against):
        raise WrongRequest(
            "Give one of --adapter and, to compare --endpoint with it, --against; both take a run's URL or an"
            " adapter's folder."
        )
    if len(arguments.adapter or ()) > 1:
        _refuse_for_several(arguments)
    if not arguments.endpoint and (arguments.against or arguments.model):
        raise WrongRequest("--against and --model are for a server; give its --endpoint, http://HOST:PORT.")
    if arguments.against and (arguments.raw or arguments.accept_precision is not None):
        raise WrongRequest(
            "--raw and --accept-precision change printed labels, and --against prints none; leave them out."
        )
    with ExitStack() as stack:
        from emotion_train.runs.adapter_cache import find_adapter

        posts = _posts(arguments, stack)
        places = arguments.adapter or [arguments.against]
        folder, *more = folders = [find_adapter(place).folder for place in places]
        chosen = replace(AdapterChoice.of(arguments), adapter=folder, more=tuple(more))
        # a wrong folder is refused before torch is imported, and before anything is typed
        facts = facts_together(folders, places)[0]
        _require_chances(arguments, folder, facts)
        kept = _kept(arguments.columns, facts, arguments.accept_precision is not None)
        served = _served(arguments, folder, facts)
        first = list(islice(posts, _AT_A_TIME if arguments.posts or arguments.file else 1))
        if not first:
            raise WrongRequest(
                'There is no post to label; type one as a word ("what a lovely mess"), give --file, or pipe'
                " lines in."
            )
        if served is not None and arguments.against:
            return _compare([*first, *posts], served, chosen, arguments.tolerance)
        _label(first, posts, lambda: served or open_classifier(chosen), arguments, kept)
    return 0


def _refuse_for_several(arguments: argparse.Namespace) -> None:
    """Raises `WrongRequest` for options that need a single adapter."""
    for option, given, what in (
        ("--endpoint", arguments.endpoint is not None, "serves one adapter"),
        ("--accept-precision", arguments.accept_precision is not None, "is by the gate of one adapter"),
        ("--raw", arguments.raw, "is about the temperature of one adapter"),
    ):
        if given:
            raise WrongRequest(
                f"{option} {what}, and several are given; leave it out, or give one --adapter."
            )


def _require_chances(arguments: argparse.Namespace, folder: Path, facts: AdapterFacts) -> None:
    """Raises `WrongRequest` for a precision without a gate in the adapter; prints a remark where
    --raw changes nothing.
    """
    if arguments.accept_precision is None and not arguments.raw:
        return
    from emotion_train.evaluation.decision import read_decision

    decision = read_decision(folder, facts)
    if arguments.accept_precision is not None:
        decision.accept_above(arguments.accept_precision)
    if arguments.raw and decision.temperature is None:
        print("emotion-train: the adapter has no temperature, so --raw changes nothing", file=sys.stderr)


def _served(arguments: argparse.Namespace, folder: Path, facts: AdapterFacts) -> Served | None:
    """The server that labels the posts; None where this program does."""
    if not arguments.endpoint:
        return None
    from emotion_train.evaluation.decision import read_decision
    from emotion_train.exporting.served import Served

    return Served(arguments.endpoint, arguments.model, read_decision(folder, facts), facts.max_length)


def _compare(posts: Sequence[Post], served: Served, chosen: AdapterChoice, tolerance: float) -> int:
    """Print how much the server's probabilities differ from the adapter's; returns 1 where they
    differ too much, else 0.
    """
    from emotion_train.exporting.agreement import Agreement

    texts = [post.text for post in posts]
    theirs_NC = served.probabilities(texts)  # before the base is loaded, since the server may refuse
    classifier = open_classifier(chosen)
    agreement = Agreement.of(
        texts,
        classifier.probabilities(texts),
        theirs_NC,
        classifier.loaded.tokenizer,
        classifier.decision,
        served.called,
    )
    for line in agreement.lines(tolerance):
        print(line)
    return int(agreement.largest > tolerance)


def _label(
    first: list[Post],
    rest: Iterator[Post],
    open_one: Callable[[], Classifier | Served],
    arguments: argparse.Namespace,
    kept: Sequence[str],
) -> None:
    if arguments.format != "text":
        write_utf8()
    classifier = open_one()
    cell = harmless if arguments.escape_formulas else str
    decision, precision = classifier.decision, arguments.accept_precision
    marked = precision is not None
    written = Written(classifier.labels, classifier.targets == "several", kept, arguments.top, cell, marked)
    print_batch = _printer(arguments.format, written, sys.stdout)
    chunk = first + list(islice(rest, _AT_A_TIME - len(first)))
    while chunk:
        prob_NC = classifier.probabilities([post.text for post in chunk])
        shown_NC = decision.raw(prob_NC) if arguments.raw else prob_NC
        print_batch(chunk, shown_NC, classifier.answers(prob_NC), decision.marks(prob_NC, precision))
        chunk = list(islice(rest, _AT_A_TIME))
    if remark := classifier.cut_remark():
        print(f"emotion-train: {remark}", file=sys.stderr)


def _posts(arguments: argparse.Namespace, stack: ExitStack) -> Iterator[Post]:
    """The posts of the command line, mended as training posts are. A file is checked as a whole
    before its first post comes.
    """
    from emotion_train.evaluation.unlabelled import look_through, mended, posts_of

    if arguments.posts:
        typed = enumerate(map(_utf8, arguments.posts), 1)
        return mended(typed, unescape_html=arguments.unescape_html)
    if arguments.file is None:
        if sys.stdin.isatty():
            print("one post a line, end with Ctrl-D", file=sys.stderr)
        return mended(_lines_of_stdin(), unescape_html=arguments.unescape_html)
    from emotion_train.data.cleaning import Findings, Rules
    from emotion_train.sources.open import Choices, open_source
    from emotion_train.sources.posts import Columns

    if "://" not in arguments.file and not typed_path(arguments.file).exists():
        raise WrongRequest(f"The file {arguments.file} cannot be read ({os.strerror(errno.ENOENT)}).")
    columns = Columns(arguments.text_column, None, None, None, tuple(_named(arguments.columns)))
    choices = Choices(encoding=arguments.encoding, quoting=arguments.quoting, lines=True)
    source = stack.enter_context(open_source(arguments.file, columns, choices))
    rules = Rules(arguments.max_chars, 0, arguments.unescape_html)
    for remark in look_through(source, rules, drop=arguments.on_bad == "drop"):
        print(remark, file=sys.stderr)
    return posts_of(source, rules, Findings(file.name for file in source.files))


def _kept(columns: str | None, facts: AdapterFacts, marked: bool = False) -> list[str]:
    """The names in the output for the columns of --columns."""
    mark = [_MARK] if marked else []
    own = ["row", "text", _answer_name(facts.targets == "several"), *facts.labels, *mark]
    return [f"input_{name}" if name in own else name for name in _named(columns)]


def _answer_name(several: bool) -> str:
    return "labels" if several else "label"


def _named(columns: str | None) -> list[str]:
    return [] if columns is None else [name.strip() for name in columns.split(",") if name.strip()]


def _utf8(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python keeps foreign bytes of a command line as half characters
        raise WrongRequest(
            f"The post {word!r} is not UTF-8; use a terminal and a locale of UTF-8, or give --file."
        ) from None
    return word


def _lines_of_stdin() -> Iterator[tuple[int, str]]:
    # by default the locale decides, and bytes that are not text may pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise WrongRequest(
            "The text on standard input is not UTF-8; convert it, for example by `iconv -f LATIN1 -t UTF-8`."
        ) from None


def _csv_line(cells: Iterable[object]) -> str:
    """One row of a CSV, where each cell with a carriage return or a line feed is quoted; before
    Python 3.13 the csv module quotes only its own line terminator.
    """
    row = io.StringIO()
    csv.writer(row, lineterminator="\r\n").writerow(cells)
    return row.getvalue().removesuffix("\r\n") + "\n"


@dataclass(frozen=True)
class Written:
    """Writes a post as a line: its columns `kept`, its text, its answer (one label or `several`)
    and the probabilities of all `labels`. `cell` makes other people's text harmless in a CSV.
    `marked`: the line also says whether the answer is accepted.
    """

    labels: Sequence[str]
    several: bool
    kept: Sequence[str]
    top: int | None
    cell: Callable[[str], str] = str
    marked: bool = False

    def head(self) -> str:
        """The first line of a CSV."""
        kept, labels = (map(self.cell, names) for names in (self.kept, self.labels))
        mark = [_MARK] if self.marked else []
        return _csv_line(["row", *kept, "text", _answer_name(self.several), *mark, *labels])

    def as_csv(
        self, post: Post, prob_C: Probabilities, answer: Sequence[int], accepted: bool | None = None
    ) -> str:
        """The line of a CSV. Several labels share one cell, which is empty where there is none."""
        given = _BETWEEN.join(self.labels[label] for label in answer)
        words = map(self.cell, (*post.kept, post.text, given))
        mark = [] if accepted is None else [str(accepted).lower()]
        return _csv_line([post.row, *words, *mark, *(f"{value:.6f}" for value in prob_C)])

    def as_jsonl(
        self, post: Post, prob_C: Probabilities, answer: Sequence[int], accepted: bool | None = None
    ) -> str:
        given = [self.labels[label] for label in answer]
        printed: dict[str, Any] = {"row": post.row, **dict(zip(self.kept, post.kept, strict=True))}
        printed |= {"text": post.text, _answer_name(self.several): given if self.several else given[0]}
        printed |= {} if accepted is None else {_MARK: accepted}
        printed["probabilities"] = {
            label: round(float(value), 6) for label, value in zip(self.labels, prob_C, strict=True)
        }
        return json.dumps(printed, ensure_ascii=False) + "\n"

    def as_text(
        self, post: Post, prob_C: Probabilities, answer: Sequence[int], accepted: bool | None = None
    ) -> str:
        if self.several:
            told = list(answer)[: self.top]
        else:
            told = (-prob_C).argsort(kind="stable").tolist()[: self.top or _TOP]
        given = "  ".join(f"{shown(self.labels[label])} {prob_C[label]:.2f}" for label in told) or "none"
        beside = "  ".join(
            f"{shown(name)}={shown(value)}" for name, value in zip(self.kept, post.kept, strict=True)
        )
        return "  | ".join(filter(None, (_MARKS[accepted], given, beside, shown(post.text)))) + "\n"


def _printer(form: str, written: Written, out: IO[str]) -> Any:
    """A function that prints posts with their probabilities and answers."""
    line = {"csv": written.as_csv, "jsonl": written.as_jsonl, "text": written.as_text}[form]
    if form == "csv":
        out.write(written.head())

    def print_batch(
        posts: Sequence[Post],
        prob_NC: Probabilities,
        answers: Sequence[Sequence[int]],
        marks: Sequence[bool | None] = (),
    ) -> None:
        marks = marks or [None] * len(posts)
        for post, prob_C, answer, accepted in zip(posts, prob_NC, answers, marks, strict=True):
            out.write(line(post, prob_C, answer, accepted))
        out.flush()

    return print_batch


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
