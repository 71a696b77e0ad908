"""What bounds a small step of the 24B in nf4? Steps of one pack of the real size, beside the floor
by arithmetic.

    # on a machine with one NVIDIA GPU of 80 GB or more, under two minutes
    python benchmarks/small_steps.py
    python benchmarks/small_steps.py --tokens 512,1152,2048

All 40 blocks with random weights, posts of 18 tokens, forward, backward, clipping and AdamW of the
program's own classifier and decoder. `nf4` unpacks each weight for either pass; `recorded` replays
both passes as one CUDA graph, which starts no kernels; `unpacked kept` holds the weights in
bfloat16, too; `bf16` is a base in that precision. The kernels' time is PyTorch's profiler's; what a
step takes more is a GPU that waits to be told. The host's time to start a step's kernels is that of
a step of two posts, whose kernels are shorter than their starts.

The floor is 4 x linear parameters x tokens at the rate of a bf16 product of 8192 x 8192 matrices,
measured before and after; with unpacking, the time of the unpacking kernels besides.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from memory_plan import ATTENTION, Row, a_batch, random_classifier, step
from speed import product_rate
from torch.profiler import ProfilerActivity, profile

from emotion_train.model.head import EmotionClassifier
from emotion_train.model.loss import weighted_loss_sum
from emotion_train.processes.machine import versions
from emotion_train.sizing.shape import Precision

GIB = 2**30
POST = 18  # tokens
Way = Callable[[EmotionClassifier, torch.optim.Optimizer, int], Callable[[], None]]
PRECISIONS: tuple[Precision, ...] = ("nf4", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1152", help="of a step, comma-separated (default: 1152)")
    parser.add_argument("--blocks", type=int, default=40, help="default: 40")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = [int(word) for word in arguments.tokens.split(",")]
    linear = Row("nf4", arguments.blocks, ATTENTION, 0.05, sizes[0], False).shape.linear_parameters
    print(
        "| tokens | run | a step, ms | kernels, ms | unpacking | products | floor, ms | host, ms | posts/s of"
        " 18 tokens | GiB |\n|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for precision in PRECISIONS:
        model = random_classifier(precision, arguments.blocks, ATTENTION, 0.05, True, "cuda")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        host_ms = 1000 * seconds(plain(model, optimizer, 36))
        ways: dict[str, Way] = {precision: plain}
        if precision == "nf4":
            ways |= {"nf4, recorded": recorded, "nf4, unpacked kept": kept}
        ways["nf4, kept and recorded" if precision == "nf4" else "bf16, recorded"] = recorded
        for name, way in ways.items():
            for tokens in sizes:
                torch.cuda.reset_peak_memory_stats()
                one = way(model, optimizer, tokens)
                before = product_rate(1.0)
                warm = time.perf_counter()
                while time.perf_counter() - warm < 3:
                    one()
                    torch.cuda.synchronize()
                step_ms = 1000 * seconds(one)
                rate = (before + product_rate(1.0)) / 2
                kernels = kernel_ms(one)
                unpacking = sum(ms for kernel, ms in kernels.items() if "_unpack" in kernel)
                words = ("nvjet", "gemm", "cutlass")
                products = sum(ms for kernel, ms in kernels.items() if any(word in kernel for word in words))
                floor = 1000 * 4 * linear * tokens / rate + unpacking
                cells = [f"{step_ms:.1f}", f"{sum(kernels.values()):.1f}", f"{unpacking:.1f}"]
                cells += [f"{products:.1f}", f"{floor:.1f}", "" if "recorded" in name else f"{host_ms:.0f}"]
                cells += [f"{tokens / POST / step_ms * 1000:.0f}"]
                peak = torch.cuda.max_memory_allocated() / GIB
                print(f"| {tokens:,} | {name} | {' | '.join(cells)} | {peak:.1f} |", flush=True)
                del one
                gc.collect()
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"\n{arguments.blocks} blocks; {torch.cuda.get_device_name()}; {datetime.now(UTC):%Y-%m-%d}; {used}"
    )


def plain(model: EmotionClassifier, optimizer: torch.optim.Optimizer, tokens: int) -> Callable[[], None]:
    batch = a_batch(tokens, model)
    return lambda: step(model, optimizer, batch)


def kept(model: EmotionClassifier, optimizer: torch.optim.Optimizer, tokens: int) -> Callable[[], None]:
    """From now on, for whatever comes after it."""
    decoder = model.decoder
    assert decoder is not None
    decoder.keep_unpacked(len(model.classifier.model.layers))
    return plain(model, optimizer, tokens)


def recorded(model: EmotionClassifier, optimizer: torch.optim.Optimizer, tokens: int) -> Callable[[], None]:
    """Both passes as one CUDA graph, as emotion_train/model/graphs.py records them."""
    ids, positions, segments, last, counters, labels_N = a_batch(tokens, model)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    inputs = model.fused_inputs(ids, positions, segments, last, counters)

    def passes() -> list[torch.Tensor]:
        logits_NC = model.forward_fused(inputs)
        targets_NC = torch.nn.functional.one_hot(labels_N, logits_NC.shape[1]).float()
        loss = weighted_loss_sum(logits_NC, targets_NC, targets_NC) / len(labels_N)
        return list(torch.autograd.grad(loss, own))

    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        passes()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = passes()

    def replay(read: object = (inputs, labels_N)) -> None:
        """The graph reads those where they lie, so they must stay."""
        graph.replay()
        for parameter, gradient in zip(own, torch._foreach_mul(gradients, 1.0), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return replay


def seconds(one: Callable[[], None], times: int = 10) -> float:
    """How long one call takes, in a row of several."""
    one()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        one()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def kernel_ms(one: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each kernel in one step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            one()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiled.events():
        if event.device_type.name == "CUDA":
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 3000
    return found


if __name__ == "__main__":
    main()
