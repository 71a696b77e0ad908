"""A peer that is set up well, for speed.py and encoders.py: transformers' Trainer with Liger's
kernels, posts of like length together, and the batch at which it is fastest.

    python benchmarks/peer.py --base FOLDER --posts train.parquet --precision nf4
    python benchmarks/peer.py --base ENCODER --posts train.parquet --each --batches 32,256

sdpa attention, posts cut at 48 tokens, no checkpointing, fused AdamW, LoRA r=16 on q, k, v, o.
Posts are sorted by length over the whole set and cut into batches, whose order is drawn. Each batch
size of `--batches` is tried on batches spread over all lengths, until one does not fit; the fastest
by real tokens/s then trains the whole set, twice: each batch padded to its longest post, and to a
multiple of 8 tokens. The faster of these counts. Before the clock runs, one batch of each width is
trained on: PyTorch plans its attention anew for each new shape, a tenth of a second each. A loss
that is not a number ends the program. Without the package liger-kernel the Trainer runs without it,
which stderr says.

With `--unsloth` Unsloth's classes load and adapt the model and patch the Trainer, in place of
transformers, PEFT and Liger; all else is the same.

An encoder is trained whole: weights in float32, products in bf16 by autocast, and no Liger, which
has no kernels for one.

Prints one line of JSON: posts/s and real tokens/s of the steps that count, the batch, the multiple,
and the peak of the GPU's memory; with `--each` a list of these, one for each size of `--batches`,
since an update of more posts is another training.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from goemotions import LABELS
from stock_recipe import WARM_UP, Clock, adapted, base_model
from transformers import Trainer, TrainingArguments

from emotion_train.bases.architecture import text_model
from emotion_train.bases.files import BaseFiles
from emotion_train.data.tokenization import PostTokenizer

LENGTH = 48
BATCHES = (64, 96, 128, 192, 256, 384, 512)
# the loss over a vocabulary, which a classifier does not have, is left out
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "fused_linear_cross_entropy": False}
MULTIPLES = (1, 8)  # of tokens
TRIAL = 8  # batches that are timed of each size


UNSLOTH = {"lora_alpha": 32, "lora_dropout": 0, "bias": "none"}  # without dropout its LoRA kernels apply


class Timed(NamedTuple):
    """The steps of one training that count."""

    batch: int
    multiple: int  # of tokens, to which batches are padded
    posts_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--posts", required=True)
    parser.add_argument("--precision", choices=("nf4", "bf16", "fp32"), help="of a decoder (default: nf4)")
    parser.add_argument(
        "--batches",
        default=",".join(map(str, BATCHES)),
        help="posts a batch that are tried, ascending (default: %(default)s)",
    )
    parser.add_argument("--each", action="store_true", help="time each of --batches, not only the fastest")
    parser.add_argument("--steps", type=int, help="batches that are timed at most (default: the whole set)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--unsloth", action="store_true", help="by the package unsloth")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    is_encoder = text_model(BaseFiles.find(arguments.base)).is_encoder
    if is_encoder and (arguments.precision or arguments.unsloth):
        parser.error("an encoder is trained whole in one way; leave --precision and --unsloth out")
    precision = arguments.precision or "nf4"
    by_unsloth = unsloth_model(arguments.base, precision) if arguments.unsloth else None
    if by_unsloth is None and not is_encoder and find_spec("liger_kernel") is None:
        print("peer.py: liger-kernel is not installed; the Trainer runs without its kernels", file=sys.stderr)
    tokenizer = PostTokenizer.load(arguments.base, LENGTH)
    table = pq.read_table(arguments.posts)
    rows = [
        {"input_ids": ids.tolist(), "labels": LABELS.index(label)}
        for ids, label in zip(
            tokenizer.encode(table["text"].to_pylist()), table["label"].to_pylist(), strict=True
        )
    ]
    sizes = [size for size in map(int, arguments.batches.split(",")) if size * (WARM_UP + 1) <= len(rows)]
    if not sizes:
        parser.error(f"{len(rows)} posts make no {WARM_UP + 1} batches of the smallest of --batches")
    load = partial(base_model, arguments.base, tokenizer.pad_id)

    def measured(tried: Sequence[int]) -> dict[str, Any]:
        """The fastest of these sizes on the whole set, or on so many batches of it."""
        network = load("fp32", arguments.device) if is_encoder else by_unsloth
        network = network or adapted(load(precision, arguments.device))
        network.config.pad_token_id = tokenizer.pad_id
        best = fastest(network, rows, tried, tokenizer.pad_id, arguments.device)
        ordered = drawn(batches(rows, best), seed=0)
        if arguments.steps is not None:
            ordered = ordered[: arguments.steps]
        both = [timed(network, ordered, tokenizer.pad_id, arguments.device, one) for one in MULTIPLES]
        found = max(both, key=lambda one: one.tokens_per_second)
        tokens = round(best * sum(map(length, rows)) / len(rows))
        return {**found._asdict(), "tokens_a_microbatch": tokens}

    print(json.dumps([measured([size]) for size in sizes] if arguments.each else measured(sizes)))


def unsloth_model(base: str, precision: str) -> Any:
    """The classifier with LoRA as Unsloth makes it. It reads a text model, so it is given a folder
    with the configuration of the text part of `base`, and with a tokenizer, which it asks for and
    nothing here uses.
    """
    from unsloth import FastLanguageModel  # first of all, since it patches what others import

    with tempfile.TemporaryDirectory(prefix="text-part-") as folder:
        text_part(Path(base), Path(folder))
        network, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=LENGTH,
            dtype=torch.bfloat16,
            load_in_4bit=precision == "nf4",
            num_labels=len(LABELS),
            key_mapping={r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."},
        )
    return FastLanguageModel.get_peft_model(
        network,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        use_gradient_checkpointing=False,
        max_seq_length=LENGTH,
        **UNSLOTH,
    )


def text_part(base: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for path in base.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((base / "config.json").read_text())
    text = config.get("text_config", config)
    text["architectures"] = ["MistralForCausalLM"]
    (folder / "config.json").write_text(json.dumps(text))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)


def length(row: dict[str, Any]) -> int:
    return len(row["input_ids"])


def batches(rows: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Whole batches of posts of like length, ascending; the shortest posts that fill none are left
    out.
    """
    by_length = sorted(rows, key=length)[len(rows) % size :]
    return [by_length[at : at + size] for at in range(0, len(by_length), size)]


def drawn(ascending: Sequence[list[dict[str, Any]]], seed: int) -> list[list[dict[str, Any]]]:
    return random.Random(seed).sample(list(ascending), len(ascending))


def trial(ascending: Sequence[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Batches spread over all lengths, from the shortest to the longest, by which a size that does
    not fit is seen.
    """
    return [ascending[at * (len(ascending) - 1) // (TRIAL - 1)] for at in range(TRIAL)]


def width(batch: Sequence[dict[str, Any]], multiple: int) -> int:
    return -(-max(map(length, batch)) // multiple) * multiple


def each_width(ordered: Sequence[list[dict[str, Any]]], multiple: int) -> list[list[dict[str, Any]]]:
    """One batch of each width, the widest first, and no fewer than `WARM_UP`."""
    by_width = {width(batch, multiple): batch for batch in ordered}
    found = [by_width[one] for one in sorted(by_width, reverse=True)]
    return [found[at % len(found)] for at in range(max(len(found), WARM_UP))]


def fastest(
    network: Any, rows: Sequence[dict[str, Any]], sizes: Sequence[int], pad_id: int, device: str
) -> int:
    """The batch of most real tokens/s among those that fit; ends the program where none does."""
    speeds: dict[int, float] = {}
    for size in sizes:
        try:
            found = timed(network, trial(batches(rows, size)), pad_id, device)
        except torch.OutOfMemoryError:
            print(f"peer.py: batches of {size} do not fit", file=sys.stderr)
            break
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        speeds[size] = found.tokens_per_second
        print(f"peer.py: batches of {size}: {found.tokens_per_second:,.0f} tokens/s", file=sys.stderr)
    if not speeds:
        sys.exit("peer.py: the smallest of --batches does not fit this GPU.")
    return max(speeds, key=lambda size: speeds[size])


def timed(
    network: Any, ordered: Sequence[list[dict[str, Any]]], pad_id: int, device: str, multiple: int = 1
) -> Timed:
    """Train on these batches in their order, one step each, after `each_width`, which does not
    count.
    """
    size, warm = len(ordered[0]), each_width(ordered, multiple)

    def padded(posts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_NT = torch.full((len(posts), width(posts, multiple)), pad_id)
        mask_NT = torch.zeros_like(ids_NT)
        for at, post in enumerate(posts):
            ids_NT[at, : length(post)] = torch.tensor(post["input_ids"])
            mask_NT[at, : length(post)] = 1
        labels_N = torch.tensor([post["labels"] for post in posts])
        return {"input_ids": ids_NT, "attention_mask": mask_NT, "labels": labels_N}

    clock = Clock(len(warm))
    liger = device == "cuda" and "unsloth" not in sys.modules and find_spec("liger_kernel") is not None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        model=network,
        args=TrainingArguments(
            output_dir="peer",
            per_device_train_batch_size=size,
            num_train_epochs=1,
            learning_rate=2e-4,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            use_liger_kernel=liger,
            liger_kernel_config=LIGER,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # each step would wait for its loss
            report_to=[],
            remove_unused_columns=False,
            dataloader_num_workers=4 if device == "cuda" else 0,
        ),
        train_dataset=[post for batch in (*warm, *ordered) for post in batch],
        data_collator=padded,
        callbacks=[clock],
    )
    if not math.isfinite(trainer.train().training_loss):
        sys.exit(
            f"peer.py: the loss of batches of {size} is not a number, so their speed is that of no training: "
            "products of such numbers cost a GPU less power."
        )
    counted = [length(post) for batch in ordered for post in batch]
    return Timed(
        size,
        multiple,
        len(counted) / clock.seconds,
        sum(counted) / clock.seconds,
        torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    )


if __name__ == "__main__":
    main()
