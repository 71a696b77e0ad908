"""A real run made small: a two-layer model, a few hundred generated posts, and the parts of
`emotion_train.train` around them.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from accelerate import Accelerator

from emotion_train.bases.files import BaseFiles
from emotion_train.config import Config, load_config
from emotion_train.data.index import limited, read_index
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.model.load import read_config
from emotion_train.preparation.steps import prepare
from emotion_train.processes.interruption import Interruptions
from emotion_train.processes.notices import Notice
from emotion_train.processes.ranks import Ranks
from emotion_train.runs.log import Entry
from emotion_train.storage.open import open_store
from emotion_train.training import start
from emotion_train.training.claim import claim, look_before_claiming
from emotion_train.training.engines import Kind
from emotion_train.training.job import Job
from emotion_train.training.trainer import Trainer
from tests.helpers.tiny_models import causal_checkpoint

WORDS = {
    "calm": "tea rain quiet garden",
    "glee": "party laugh sunshine win",
    "rage": "stop shouting never again",
    "awe": "stars vast",
}
SIZES = {"calm": 60, "glee": 30, "rage": 12, "awe": 6}


def write_posts(folder: Path, seed: int = 0) -> Path:
    """train.csv, validation.csv and test.csv with four imbalanced labels, posts of 2 to 20
    words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for split, share in (("train", 1.0), ("validation", 0.5), ("test", 0.5)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            rows = [
                (label, number)
                for label, size in SIZES.items()
                for number in range(max(2, int(size * share)))
            ]
            for label, number in draw.sample(rows, len(rows)):
                words = [
                    draw.choice((*WORDS[label].split(), "the", "and", "so"))
                    for _ in range(draw.randint(2, 20))
                ]
                writer.writerow([f"{' '.join(words)} {split}{number}", label])
    return folder


def tiny_config(folder: Path, *overrides: str) -> Config:
    """A config whose base, data and output lie in `folder`; the first call makes the base and the
    data.
    """
    if not (folder / "base").exists():
        causal_checkpoint(folder / "base", "llama")
        prepare(str(write_posts(folder / "source")), str(folder / "data"))
    return load_config(None, tiny_words(folder, *overrides))


def tiny_words(folder: Path, *overrides: str) -> list[str]:
    return [
        f"model.base={folder / 'base'}",
        f"data.url={folder / 'data'}",
        f"run.output_url={folder / 'runs'}",
        "run.id=tiny",
        "model.precision=fp32",
        "lora.r=4",
        "lora.dropout=0",
        "train.epochs=2",
        "train.global_batch_size=16",
        "train.tokens_per_microbatch=512",
        "train.learning_rate=0.01",
        "report.bootstrap_samples=100",
        *overrides,
    ]


def job_of(
    config: Config,
    notice: Callable[[], Notice | None] = lambda: None,
    engine: Kind = "one process",
    accelerator: Accelerator | None = None,
) -> Job:
    """The job as `emotion_train.train` makes it, before the claim; on the CPU unless another
    accelerator is given.
    """
    data_store, output_store = open_store(config.data.url), open_store(config.run.output_url)
    index = limited(read_index(data_store), config.data.limit)
    assert config.run.id is not None
    assert look_before_claiming(config, index, output_store, False).final is None
    accelerator, ranks = accelerator or Accelerator(cpu=True), Ranks()
    base = read_config(BaseFiles.find(config.model.base, config.model.layers))
    tokenizer = PostTokenizer.load(base.files, config.data.max_length)
    interruptions = Interruptions(ranks, notice, config.preemption.hold_s or 0.0, print)
    now = datetime.now(UTC)
    return Job(
        config,
        index,
        data_store,
        output_store,
        config.run.id,
        accelerator,
        engine,
        ranks,
        interruptions,
        tokenizer,
        now,
        "again",
        base,
    )


def start_trainer(
    config: Config,
    stack: ExitStack,
    notice: Callable[[], Notice | None] = lambda: None,
    engine: Kind = "one process",
    accelerator: Accelerator | None = None,
) -> Trainer:
    """The trainer as `emotion_train.train` makes it, claimed and resumed."""
    job = job_of(config, notice, engine, accelerator)
    claimed = job.ranks.only_on_main(lambda: claim(job))
    assert not isinstance(claimed, Entry)
    return start.start_trainer(job, claimed, stack)
