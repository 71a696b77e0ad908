"""Label posts with a trained adapter: words on the command line, a file, or standard input, one
post a line.

Posts are read and labelled 1,024 at a time, so a file of any size goes through and the first lines
come out early.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import add_adapter_arguments, load_with_progress, positive
from emotion_train.model.facts import read_facts

if TYPE_CHECKING:
    from emotion_train.evaluation.scoring import Probabilities

_AT_A_TIME = 1024
_NO_POSTS_INSIDE = {
    ".json": "convert it to JSON Lines, one object a line, for example with `jq -c '.[]'`"
} | dict.fromkeys((".gz", ".bz2", ".zst", ".xz", ".zip"), "unpack it first")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument(
        "posts",
        nargs="*",
        metavar="POST",
        help="posts to label (default: standard input, one a line; blank lines are left out)",
    )
    parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help=(
            "posts in a .csv, .tsv, .jsonl, .ndjson or .parquet file, or one a line in any other (blank lines"
            " are left out)"
        ),
    )
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column or key of the post in --file (default: text)",
    )
    parser.add_argument(
        "--format", choices=("text", "jsonl", "csv"), default="text", help="what is printed (default: text)"
    )
    parser.add_argument(
        "--top",
        type=positive,
        default=3,
        metavar="N",
        help="labels shown a post as text (default: 3); jsonl and csv hold all",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line a post, in the order of the input."""
    posts = iter(_posts(arguments))
    first = list(islice(posts, 1)) if arguments.file else []
    # a wrong folder is refused before torch is imported, and before anything is typed
    read_facts(arguments.adapter)
    first = first or list(islice(posts, 1))
    if not first:
        raise WrongRequest(
            'There is no post to label; type one as a word ("what a lovely mess"), give --file, or pipe'
            " lines in."
        )
    from emotion_train.evaluation.scoring import probabilities_of

    loaded = load_with_progress(arguments)
    print_batch = _printer(arguments.format, loaded.labels, arguments.top, sys.stdout)
    chunk = first + list(islice(posts, _AT_A_TIME - 1))
    while chunk:
        capacity = max(arguments.tokens_per_microbatch, loaded.tokenizer.max_length)
        prob_NC = probabilities_of(
            loaded.model, loaded.tokenizer, chunk, capacity, loaded.model.device, len(loaded.labels)
        )
        print_batch(chunk, prob_NC)
        chunk = list(islice(posts, _AT_A_TIME))
    return 0


def _posts(arguments: argparse.Namespace) -> Iterable[str]:
    if arguments.posts and arguments.file:
        raise WrongRequest("Posts are given as words and as --file; give one of the two.")
    if arguments.posts:
        return [_utf8(post) for post in arguments.posts]
    if arguments.file is None:
        if sys.stdin.isatty():
            print("one post a line, end with Ctrl-D", file=sys.stderr)
        return _from_stdin()
    return _from_file(arguments.file, arguments.text_column)


def _utf8(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python keeps foreign bytes of a command line as half characters
        raise WrongRequest(
            f"The post {word!r} is not UTF-8; use a terminal and a locale of UTF-8, or give --file."
        ) from None
    return word


def _from_stdin() -> Iterator[str]:
    # by default the locale decides, and bytes that are not text may pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield from _lines(sys.stdin)
    except UnicodeDecodeError:
        raise WrongRequest(
            "The text on standard input is not UTF-8; convert it, for example by `iconv -f LATIN1 -t UTF-8`."
        ) from None


def _from_file(path: Path, column: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix in _NO_POSTS_INSIDE:
        raise WrongRequest(f"The file {path} cannot be read as it is; {_NO_POSTS_INSIDE[suffix]}.")
    try:
        if suffix == ".parquet":
            yield from _from_parquet(path, column)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                yield from _from_csv(file, path, column, "," if suffix == ".csv" else "\t")
            elif suffix in (".jsonl", ".ndjson"):
                yield from _from_jsonl(file, path, column)
            else:
                yield from _lines(file)
    except OSError as error:
        raise WrongRequest(f"The file {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise WrongRequest(
            f"The file {path} is not UTF-8; convert it, for example by `iconv -f LATIN1 -t UTF-8`."
        ) from None


def _from_csv(file: IO[str], path: Path, column: str, delimiter: str) -> Iterator[str]:
    rows = csv.DictReader(file, delimiter=delimiter)
    try:
        _refuse_missing(column, rows.fieldnames or [], path)
        for row in rows:
            if None in row:  # where csv puts what is left over; the text may have been cut at a comma
                raise WrongRequest(
                    f"{path}:{rows.line_num} has more cells than the header; put quotes around a text with"
                    " commas in it."
                )
            yield row[column] or ""
    except csv.Error as error:
        raise WrongRequest(
            f"{path}:{rows.line_num} is broken CSV ({error}), most likely a quote that is never closed;"
            " mend it."
        ) from None


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            _refuse_missing(column, parquet.schema_arrow.names, path)
            kind = parquet.schema_arrow.field(column).type
            spelled = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (
                pa.types.is_string(spelled)
                or pa.types.is_large_string(spelled)
                or pa.types.is_string_view(spelled)
            ):
                raise WrongRequest(f"Column {column!r} of {path} holds {kind}, not text; give --text-column.")
            for batch in parquet.iter_batches(_AT_A_TIME, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pa.ArrowInvalid as error:
        raise WrongRequest(
            f"{path} is not a whole Parquet file ({str(error)[:80]}); copy it again."
        ) from None


def _refuse_missing(column: str, present: Sequence[str], path: Path) -> None:
    if column not in present:
        raise WrongRequest(
            f"{path} has no column {column!r}; it has {', '.join(present) or 'none'}. Give --text-column."
        )


def _from_jsonl(file: IO[str], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise WrongRequest(
                f"{path}:{number} is not a JSON object with a text {column!r}; mend the line or give"
                " --text-column."
            )
        # JSON can spell half characters, which no one can print
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(file: IO[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file if line.strip())


def _printer(form: str, labels: Sequence[str], top: int, out: IO[str]) -> Any:
    writer = csv.writer(out, lineterminator="\n")
    if form == "csv":
        writer.writerow(["text", "label", *labels])

    def print_batch(posts: Sequence[str], prob_NC: Probabilities) -> None:
        for post, prob_C in zip(posts, prob_NC, strict=True):
            ranked = [int(label) for label in (-prob_C).argsort(kind="stable")]
            if form == "csv":
                writer.writerow([post, labels[ranked[0]], *(f"{value:.6f}" for value in prob_C)])
            elif form == "jsonl":
                probabilities = {
                    label: round(float(value), 6) for label, value in zip(labels, prob_C, strict=True)
                }
                print(
                    json.dumps(
                        {"text": post, "label": labels[ranked[0]], "probabilities": probabilities},
                        ensure_ascii=False,
                    ),
                    file=out,
                )
            else:
                print(
                    "  ".join(f"{labels[label]} {prob_C[label]:.2f}" for label in ranked[:top])
                    + f"  | {post}",
                    file=out,
                )
        out.flush()

    return print_batch


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
