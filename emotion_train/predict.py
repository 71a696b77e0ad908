"""Label posts with a trained adapter: words on the command line, a file, or standard input, one post a line.

Posts are read and labelled 1,024 at a time, so a file of any size goes through and the first lines come out early.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.scoring import Probabilities

_AT_A_TIME = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("posts", nargs="*", metavar="POST", help="posts to label (default: standard input, one a line)")
    parser.add_argument("--file", type=Path, metavar="FILE", help="posts in a .csv or .jsonl file, or one a line in any other")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column or key of the post in --file (default: text)")
    parser.add_argument("--format", choices=("text", "jsonl", "csv"), default="text", help="what is printed (default: text)")
    parser.add_argument(
        "--top", type=_positive, default=3, metavar="N", help="labels shown a post as text (default: 3); jsonl and csv hold all"
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="adapter folder written by `emotion-launch pull`")
    parser.add_argument(
        "--base", metavar="BASE", help="folder, .gguf file or hub id of the base model (default: the one it was trained on)"
    )
    parser.add_argument("--precision", choices=("nf4", "bf16", "fp32"), help="format of the frozen base (default: as in training)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes the GPU where there is one (default: auto)")
    parser.add_argument(
        "--tokens-per-microbatch", type=_positive, default=4096, metavar="N", help="tokens of one forward pass (default: 4096)"
    )


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1 up")
    return int(word)


def run(arguments: argparse.Namespace) -> int:
    """Print one line a post, in the order of the input."""
    posts = iter(_posts(arguments))
    first = list(islice(posts, 1))
    if not first:
        raise WrongRequest('There is no post to label; type one as a word ("what a lovely mess"), give --file, or pipe lines in.')
    from emotion_train.model.lora import load_adapter
    from emotion_train.scoring import probabilities_of

    loaded = load_adapter(arguments.adapter, base=arguments.base, precision=arguments.precision, device=choose_device(arguments.device))
    print_batch = _printer(arguments.format, loaded.labels, arguments.top, sys.stdout)
    chunk = first + list(islice(posts, _AT_A_TIME - 1))
    while chunk:
        capacity = max(arguments.tokens_per_microbatch, loaded.tokenizer.max_length)
        prob_NC = probabilities_of(loaded.model, loaded.tokenizer, chunk, capacity, loaded.model.device, len(loaded.labels))
        print_batch(chunk, prob_NC)
        chunk = list(islice(posts, _AT_A_TIME))
    return 0


def choose_device(choice: str) -> Any:
    import torch

    return torch.device("cuda" if choice == "auto" and torch.cuda.is_available() else "cpu")


def _posts(arguments: argparse.Namespace) -> Iterable[str]:
    if arguments.posts and arguments.file:
        raise WrongRequest("Posts are given as words and as --file; give one of the two.")
    if arguments.posts:
        return [str(post) for post in arguments.posts]
    if arguments.file is None:
        if sys.stdin.isatty():
            print("one post a line, end with Ctrl-D", file=sys.stderr)
        return _lines(sys.stdin)
    return _from_file(arguments.file, arguments.text_column)


def _from_file(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield from _from_csv(file, path, column)
            elif path.suffix == ".jsonl":
                yield from _from_jsonl(file, path, column)
            else:
                yield from _lines(file)
    except OSError as error:
        raise WrongRequest(f"The file {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise WrongRequest(f"The file {path} is not UTF-8 (byte {error.start}); convert it, for example by iconv -t utf-8.") from None


def _from_csv(file: TextIO, path: Path, column: str) -> Iterator[str]:
    rows = csv.DictReader(file)
    if column not in (rows.fieldnames or []):
        raise WrongRequest(f"{path} has no column {column!r}; it has {', '.join(rows.fieldnames or ['none'])}. Give --text-column.")
    for row in rows:
        yield row[column] or ""


def _from_jsonl(file: TextIO, path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise WrongRequest(f"{path}:{number} is not a JSON object with a text {column!r}; mend the line or give --text-column.")
        yield text


def _lines(file: TextIO) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file if line.strip())


def _printer(form: str, labels: Sequence[str], top: int, out: TextIO) -> Any:
    writer = csv.writer(out, lineterminator="\n")
    if form == "csv":
        writer.writerow(["text", "label", *labels])

    def print_batch(posts: Sequence[str], prob_NC: Probabilities) -> None:
        for post, prob_C in zip(posts, prob_NC, strict=True):
            ranked = [int(label) for label in (-prob_C).argsort(kind="stable")]
            if form == "csv":
                writer.writerow([post, labels[ranked[0]], *(f"{value:.6f}" for value in prob_C)])
            elif form == "jsonl":
                probabilities = {label: round(float(value), 6) for label, value in zip(labels, prob_C, strict=True)}
                print(json.dumps({"text": post, "label": labels[ranked[0]], "probabilities": probabilities}, ensure_ascii=False), file=out)
            else:
                print("  ".join(f"{labels[label]} {prob_C[label]:.2f}" for label in ranked[:top]) + f"  | {post}", file=out)
        out.flush()

    return print_batch


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
