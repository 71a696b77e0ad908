"""A tiny run with auxiliary posts: of other labels, with several labels, and of another source."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from emotion_train.config import Config, load_config
from emotion_train.data.index import Index
from emotion_train.data.targets import TargetKind
from emotion_train.preparation.steps import prepare
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import SIZES, WORDS, tiny_words, write_posts

OTHERS = ("gratitude", "hope")  # auxiliary labels of the posts' own source
ELSEWHERE = ("calm", "spite")  # labels of the other source, one of which is a main label


def write_auxiliary(folder: Path, seed: int = 1) -> None:
    """Add to train.csv posts of other labels and with several, and write elsewhere.csv beside the
    folder.
    """
    draw = random.Random(seed)
    words = [word for words in WORDS.values() for word in words.split()]

    def post(number: int, source: str) -> str:
        return f"{' '.join(draw.choices(words, k=draw.randint(2, 20)))} {source}{number}"

    with (folder / "train.csv").open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number in range(30):
            writer.writerow([post(number, "other"), OTHERS[number % 2]])
            writer.writerow([post(number, "pair"), f"{draw.choice(list(SIZES))},{OTHERS[number % 2]}"])
        for number in range(10):
            writer.writerow([post(number, "both"), "calm,awe"])
    with (folder.parent / "elsewhere.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(24):
            writer.writerow([post(number, "elsewhere"), ELSEWHERE[number % 2]])


def prepare_auxiliary(folder: Path, data: str = "data", **options: object) -> Index:
    """The data set, at `folder / data`, with both sources unless the options say otherwise."""
    if not (folder / "source").exists():
        write_auxiliary(write_posts(folder / "source"))
    chosen = {
        "labels": tuple(SIZES),
        "auxiliary": "keep",
        "auxiliary_sources": (str(folder / "elsewhere.csv"),),
        "rows_per_group": 64,
    }
    return prepare(str(folder / "source"), str(folder / data), **(chosen | options)).index


def auxiliary_config(folder: Path, *overrides: str, targets: TargetKind = "one") -> Config:
    """The config of `tiny_config` for that data set; the first call makes it."""
    if not (folder / "base").exists():
        causal_checkpoint(folder / "base", "llama")
        prepare_auxiliary(folder, targets=targets)
    return load_config(None, tiny_words(folder, *overrides))
