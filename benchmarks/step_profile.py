"""Where does a step's time go? The GPU's kernels of blocks of the real size, by what they do.

    # on a machine with one NVIDIA GPU of 80 GB, under a minute
    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --runs nf4=8192,fp8=4096 --blocks 12

Forward pass, backward pass, clipping and AdamW of the program's own classifier and decoder with
random weights and posts of 18 tokens. The GPU is kept busy for five seconds first, since at its
power limit it runs slower than from a rest; then PyTorch's profiler records three steps. Shares are
of the kernels' time; the step itself takes a little longer.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections import Counter
from datetime import UTC, datetime

import torch
from memory_plan import ATTENTION, a_batch, random_classifier, step
from torch.profiler import ProfilerActivity, profile

from emotion_train.processes.machine import versions

KINDS = (
    ("products of the base", ("nvjet", "gemm", "cutlass")),
    ("unpacking nf4", ("_unpack",)),
    ("quantising to fp8", ("_quantize_rows",)),
    ("SwiGLU", ("_swiglu",)),
    ("attention", ("_attention",)),
    ("norms, rotary positions", ("_norm", "_rotate")),
    ("adapters' dropout and their part of the gradient", ("_drop", "_add_dropped")),
)
THIN = 0.12  # ms: a product that takes less is one of the adapters'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        default="nf4=7680,bf16=3840,fp8=3840",
        metavar="BASE=TOKENS,…",
        help="default: nf4=7680,bf16=3840,fp8=3840",
    )
    parser.add_argument("--blocks", type=int, default=20, help="default: 20")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shares: dict[str, dict[str, float]] = {}
    for run in arguments.runs.split(","):
        precision, _, tokens = run.partition("=")
        step_ms, kernels = measured(precision, int(tokens), arguments.blocks)
        name = f"{precision}, {int(tokens):,} tokens, {step_ms:.0f} ms"
        shares[name] = by_kind(kernels)
        for kernel, ms in kernels.most_common(12):
            print(f"{name}: {ms:8.2f} ms  {kernel[:90]}", flush=True)
    kinds = dict.fromkeys(kind for found in shares.values() for kind in found)
    print(f"\n| share of the kernels' time | {' | '.join(shares)} |\n|---{'|--:' * len(shares)}|")
    for kind in kinds:
        print(f"| {kind} | {' | '.join(f'{found.get(kind, 0):.1%}' for found in shares.values())} |")
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"\n{arguments.blocks} blocks; {torch.cuda.get_device_name()}; {datetime.now(UTC):%Y-%m-%d}; {used}"
    )


def measured(precision: str, tokens: int, blocks: int) -> tuple[float, Counter[str]]:
    """Milliseconds of a step, and of its kernels by name; thin products count as a name of their
    own.
    """
    model = random_classifier(precision, blocks, ATTENTION, 0.05, True, "cuda")  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=1e-4, fused=True
    )
    batch = a_batch(tokens, model)
    warm = time.perf_counter()
    while time.perf_counter() - warm < 5:
        step(model, optimizer, batch)
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        step(model, optimizer, batch)
    torch.cuda.synchronize()
    step_ms = 1000 * (time.perf_counter() - began) / 5
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step(model, optimizer, batch)
        torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    for event in profiled.events():
        if event.device_type.name == "CUDA":
            ms = event.time_range.elapsed_us() / 1000
            thin = ms < THIN and any(word in event.name for word in KINDS[0][1])
            kernels["thin products" if thin else event.name] += ms / 3
    del model, optimizer, batch
    gc.collect()
    torch.cuda.empty_cache()
    return step_ms, kernels


def by_kind(kernels: Counter[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, ms in kernels.items():
        kind = next((kind for kind, words in KINDS if any(word in name for word in words)), "the rest")
        kind = "products of the adapters" if name == "thin products" else kind
        found[kind] = found.get(kind, 0.0) + ms
    total = sum(found.values())
    return {kind: ms / total for kind, ms in sorted(found.items(), key=lambda pair: -pair[1])}


if __name__ == "__main__":
    main()
