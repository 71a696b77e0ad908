"""Does a step take the memory and the time that are planned? Blocks of Mistral Small 3.1's shape,
planned beside measured.

    # on a machine with one NVIDIA GPU of 80 GB or more, under 2 minutes
    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --only 4
    # all 40 blocks in nf4, as cards of 24 and of 80 GB would train them
    python benchmarks/memory_plan.py --cap 24 80
    # all 40 blocks by tokens a micro-batch; the plot takes `pip install matplotlib`
    python benchmarks/memory_plan.py --curve plan.svg

The program's own classifier and decoder with random weights that are drawn on the GPU, posts of 18
tokens. A row takes two whole steps (forward, backward, clipping, AdamW); its peak is PyTorch's
`max_memory_allocated` over the second, its seconds are the mean of three more. Rows that the plan
says do not fit are left out.

With --cap the process may take no more of the GPU than a card with so many GB has beside its
context (PyTorch's per-process fraction), and trains with the setting that
`train.tokens_per_microbatch: auto` takes there: a row is there when no step ran out of memory. The
seconds are this GPU's, not that card's.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import nn

from emotion_train.config import LoraSection
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import Counters, key_of
from emotion_train.model.head import EmotionClassifier, init_head
from emotion_train.model.load import HEAD, _place, skeleton
from emotion_train.model.lora import attach_lora
from emotion_train.model.loss import weighted_loss_sum
from emotion_train.model.precision import Precision, formats
from emotion_train.processes.machine import versions
from emotion_train.sizing.fit import Layout, largest_microbatch
from emotion_train.sizing.memory import GIB, MemoryEstimate, estimate, usable_bytes
from emotion_train.sizing.recipe import Recipe, repeats_keys
from emotion_train.sizing.shape import Shape
from launch.gpus import GPU_KINDS, GpuKind, kind_of
from launch.plan.speed import Speed

LABELS = 15
POST = 18
RESERVED = 0.75 * GIB  # of a card, for what is no memory of PyTorch
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# GB in its name: the kind whose memory it stands for
CARDS = {24: "A10G", 40: "A100", 48: "L40S", 80: "H100"}
WIDTH = {
    **{
        "hidden_size": 5120,
        "intermediate_size": 32_768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    **{
        "vocab_size": 131_072,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
}


@dataclass(frozen=True)
class Row:
    precision: Precision
    layers: int
    targets: tuple[str, ...] | str
    dropout: float
    tokens: int
    recompute: bool
    fused: bool = True

    @property
    def model(self) -> tuple[Precision, int, tuple[str, ...] | str, float, bool]:
        return self.precision, self.layers, self.targets, self.dropout, self.fused

    @property
    def shape(self) -> Shape:
        return Shape.of({**WIDTH, "model_type": "mistral", "num_hidden_layers": self.layers})

    @property
    def recipe(self) -> Recipe:
        lora = LoraSection.model_validate({"r": 16, "dropout": self.dropout, "targets": self.targets})
        return Recipe(
            self.shape,
            self.precision,
            lora,
            LABELS,
            decoder="fused" if self.fused else "stock",
            repeated_keys=repeats_keys(),
        )

    @property
    def planned(self) -> MemoryEstimate:
        return estimate(self.recipe, self.tokens, self.recompute)


# Rows of one model stand together; recomputing ones last, since it is not switched off again.
ROWS = (
    Row("nf4", 4, ATTENTION, 0.05, 4096, False),
    Row("nf4", 4, ATTENTION, 0.05, 8192, False),
    Row("nf4", 4, ATTENTION, 0.05, 16_384, False),
    Row("nf4", 4, ATTENTION, 0.05, 16_384, True),
    Row("nf4", 4, "all-linear", 0.05, 8192, False),
    Row("nf4", 4, "all-linear", 0.05, 8192, True),
    Row("bf16", 4, ATTENTION, 0.05, 4096, False),
    Row("bf16", 4, ATTENTION, 0.05, 8192, False),
    Row("bf16", 4, ATTENTION, 0.05, 8192, True),
    Row("bf16", 4, "all-linear", 0.0, 8192, False),
    Row("bf16", 4, "all-linear", 0.05, 8192, False),
    Row("bf16", 4, "all-linear", 0.05, 8192, True),
    Row("fp8", 4, ATTENTION, 0.05, 4096, False),
    Row("fp8", 4, ATTENTION, 0.05, 8192, False),
    Row("fp8", 4, ATTENTION, 0.05, 8192, True),
    Row("fp8", 4, "all-linear", 0.05, 8192, False),
    Row("nf4", 4, ATTENTION, 0.05, 8192, False, fused=False),
    Row("nf4", 12, ATTENTION, 0.05, 2048, False),
    Row("nf4", 12, ATTENTION, 0.05, 8192, False),
    Row("nf4", 12, ATTENTION, 0.05, 8192, True),
)
CURVE = tuple(
    Row(precision, 40, ATTENTION, 0.05, tokens, False)
    for precision in ("nf4", "bf16", "fp8")
    for tokens in (512, 1024, 2048, 3072, 4096, 6144, 8192, 9728)
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, metavar="BLOCKS", help="only the rows with so many blocks")
    parser.add_argument(
        "--cap",
        type=int,
        nargs="+",
        choices=CARDS,
        metavar="GB",
        help=f"cards to stand for: {', '.join(map(str, CARDS))}",
    )
    parser.add_argument(
        "--curve",
        metavar="FILE.svg",
        help="posts/s and memory of the whole size by tokens a micro-batch, beside the plan",
    )
    arguments = parser.parse_args()
    kind = kind_of(torch.cuda.get_device_name())
    if arguments.cap:
        caps(arguments.cap)
    else:
        print(
            "| base | blocks | adapters on | dropout | tokens | recompute | planned, GiB | measured | off |"
            " planned, s | measured | off |"
        )
        print("|---|--:|---|--:|--:|---|--:|--:|--:|--:|--:|--:|")
        found = []
        for row, peak, seconds in measured(
            row for row in (CURVE if arguments.curve else ROWS) if arguments.only in (None, row.layers)
        ):
            print(line(row, kind, peak, seconds), flush=True)
            found.append((row, peak, seconds))
        if arguments.curve:
            plot(found, kind, arguments.curve)
    print(
        f"\n{torch.cuda.get_device_name()}; {datetime.now(UTC):%Y-%m-%d};"
        f" {', '.join(f'{k} {v}' for k, v in versions().items())}"
    )


def measured(rows: Iterator[Row]) -> Iterator[tuple[Row, int, float]]:
    """Each row with the peak bytes of a step and the seconds of one; one model at a time."""
    for model_of, group in groupby(rows, key=lambda row: row.model):
        fitting = [row for row in group if row.planned.total <= usable_bytes(torch.cuda.mem_get_info()[1])]
        if fitting:
            precision, layers, targets, dropout, fused = model_of
            model = random_classifier(precision, layers, targets, dropout, fused, "cuda")
            for row in fitting:
                yield (row, *measure(model, row))
            del model
            gc.collect()
            torch.cuda.empty_cache()


def caps(cards: list[int]) -> None:
    """Train the whole size in nf4 on a part of this GPU as large as these cards, with the planned
    setting.
    """
    print(
        "| card | usable, GiB | adapters on | tokens | recompute | planned, GiB | measured | held by PyTorch"
        " | s of a step here |"
    )
    print("|---|--:|---|--:|---|--:|--:|--:|--:|")
    kinds = {kind.name: kind for kind in GPU_KINDS}
    for targets in (ATTENTION, "all-linear"):
        model = random_classifier("nf4", 40, targets, 0.05, True, "cuda")
        # smaller ones later, since recomputation is not switched off again
        for card in sorted(cards, reverse=True):
            memory = min(kinds[CARDS[card]].memory_bytes, torch.cuda.mem_get_info()[1])
            found = largest_microbatch(Row("nf4", 40, targets, 0.05, 1, False).recipe, memory)
            if found is None:
                print(f"| {card} GB | does not fit |")
                continue
            row = Row("nf4", 40, targets, 0.05, found.tokens, found.gradient_checkpointing)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((memory - RESERVED) / torch.cuda.mem_get_info()[1])
            torch.cuda.reset_peak_memory_stats()
            peak, seconds = measure(model, row)
            cells = [
                f"{card} GB",
                f"{usable_bytes(memory) / GIB:.1f}",
                name_of(targets),
                f"{row.tokens:,}",
                "yes" if row.recompute else "",
            ]
            cells += [
                f"{row.planned.total / GIB:.1f}",
                f"{peak / GIB:.1f}",
                f"{torch.cuda.max_memory_reserved() / GIB:.1f}",
                f"{seconds:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
        torch.cuda.set_per_process_memory_fraction(1.0)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def random_classifier(
    precision: Precision,
    layers: int,
    targets: tuple[str, ...] | str,
    dropout: float,
    fused: bool,
    device: str,
    **width: int,
) -> EmotionClassifier:
    """What `build_classifier` makes, of weights that are drawn where they will lie."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("mistral", **{**WIDTH, **width, "num_hidden_layers": layers})
    network = skeleton(config, LABELS)
    draw = torch.Generator(device).manual_seed(0)
    kind, place = formats(precision), torch.device(device)
    for name, empty in list(network.named_parameters()):
        if name != HEAD:
            tensor = torch.empty(empty.shape, dtype=torch.bfloat16, device=device)
            _place(
                network,
                name,
                tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02, generator=draw),
                kind,
                place,
                False,
            )
    network.model.rotary_emb = type(network.model.rotary_emb)(config=network.config).to(device)
    network.score.weight = nn.Parameter(torch.zeros(LABELS, network.config.hidden_size, device=device))
    network.requires_grad_(False)
    network.is_loaded_in_4bit = kind.quantised
    init_head(network, 0)
    lora = LoraSection(r=16, dropout=dropout, targets=targets)
    model = EmotionClassifier(attach_lora(network, lora, 0), precision).train()
    if fused:
        model.fuse()
    return model


def measure(model: EmotionClassifier, row: Row) -> tuple[int, float]:
    """Peak bytes of a step, and seconds of one."""
    if row.recompute:
        model.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=model.device.type == "cuda")
    batch = a_batch(row.tokens, model)
    step(model, optimizer, batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, batch)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    began = time.perf_counter()
    for _ in range(3):
        step(model, optimizer, batch)
    torch.cuda.synchronize()
    return peak, (time.perf_counter() - began) / 3


Batch = tuple[torch.Tensor, torch.Tensor, Segments, torch.Tensor, Counters, torch.Tensor]


def a_batch(tokens: int, model: EmotionClassifier) -> Batch:
    """Ids, positions, segments, last tokens, counters of dropout and labels of a full pack."""
    device = model.device
    boundaries = [*range(0, tokens, POST), tokens]
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(20, model.classifier.config.vocab_size, (1, tokens))).to(device)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(boundaries)])[None].to(device)
    segments = Segments.of(boundaries, device)
    last = torch.tensor(boundaries[1:], device=device) - 1
    posts = torch.arange(tokens, device=device) // POST
    places = torch.stack([posts, positions[0]], 1).int()
    labels = torch.from_numpy(rng.integers(0, LABELS, len(last))).to(device)
    return ids, positions, segments, last, Counters(torch.tensor(key_of(0, 0), device=device), places), labels


def step(
    model: EmotionClassifier,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> None:
    *given, labels_N = batch
    logits_NC = model(*given)
    targets_NC = torch.nn.functional.one_hot(labels_N, logits_NC.shape[1]).float()
    loss = weighted_loss_sum(logits_NC, targets_NC, targets_NC) / len(labels_N)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def name_of(targets: tuple[str, ...] | str) -> str:
    return "all" if targets == "all-linear" else "q, k, v, o"


def line(row: Row, kind: GpuKind | None, peak: int, seconds: float) -> str:
    memory = row.planned.total
    cells = [
        row.precision if row.fused else f"{row.precision}, stock",
        str(row.layers),
        name_of(row.targets),
        f"{row.dropout:g}",
    ]
    cells += [
        f"{row.tokens:,}",
        "yes" if row.recompute else "",
        f"{memory / GIB:.1f}",
        f"{peak / GIB:.1f}",
        f"{memory / peak - 1:+.1%}",
    ]
    if kind is not None:
        expected = planned_s(row, kind)
        cells += [f"{expected:.3f}", f"{seconds:.3f}", f"{expected / seconds - 1:+.1%}"]
    else:
        cells += ["", f"{seconds:.3f}", ""]
    return f"| {' | '.join(cells)} |"


def planned_s(row: Row, kind: GpuKind) -> float:
    """The speed of two processes: this loop records no graphs, whatever the size."""
    return Speed(kind, row.recipe, row.recompute, Layout(2)).microbatch_s(row.tokens)


def plot(found: list[tuple[Row, int, float]], kind: GpuKind | None, path: str) -> None:
    """Dots are measured, lines planned."""
    import matplotlib.pyplot as plt

    figure, (speeds, memories) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (precision, rows), colour in zip(
        groupby(found, key=lambda one: one[0].precision),
        ("tab:blue", "tab:orange", "tab:green"),
        strict=False,
    ):
        some = list(rows)
        tokens = [row.tokens for row, *_ in some]
        speeds.plot(
            tokens,
            [row.tokens / POST / seconds for row, _, seconds in some],
            "o",
            color=colour,
            label=precision,
        )
        memories.plot(tokens, [peak / GIB for _, peak, _ in some], "o", color=colour, label=precision)
        memories.plot(tokens, [row.planned.total / GIB for row, *_ in some], color=colour)
        if kind is not None:
            speeds.plot(tokens, [row.tokens / POST / planned_s(row, kind) for row, *_ in some], color=colour)
    speeds.set(xlabel="tokens a micro-batch", ylabel=f"posts/s (of {POST} tokens)", ylim=0)
    memories.set(xlabel="tokens a micro-batch", ylabel="peak memory, GiB", ylim=0)
    speeds.legend(title="measured, and planned as lines")
    figure.suptitle(f"24B, {torch.cuda.get_device_name()}")
    figure.savefig(path)


if __name__ == "__main__":
    main()
