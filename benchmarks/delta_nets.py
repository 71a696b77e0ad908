"""A few blocks of Qwen3.5's 9B in training on one GPU: tokens/s and peak memory beside what is
planned, and the share of the time that the delta nets' recurrence takes.

python benchmarks/delta_nets.py                       # one GPU with 24 GiB or more, a minute
python benchmarks/delta_nets.py --tiny                # a dry run on a CPU, in float32

The weights are random and the posts are numbers, drawn with the lengths of GoEmotions' posts (some
20 tokens) or of --length tokens each. One JSON line for each kind of posts and each number of
tokens a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from emotion_train.config import LoraSection
from emotion_train.model import delta_net
from emotion_train.model.attention import Segments
from emotion_train.model.dropout import Counters
from emotion_train.model.head import EmotionClassifier, init_head
from emotion_train.model.load import fill, parameters_of, skeleton
from emotion_train.model.lora import attach_lora
from emotion_train.sizing.memory import estimate
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape

LABELS = 28
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8, help="blocks, each fourth attends (default: 8)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="of a micro-batch")
    parser.add_argument("--length", type=int, nargs="+", default=[0, 60, 120], help="0: GoEmotions' posts")
    parser.add_argument("--steps", type=int, default=10, help="measured micro-batches (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="small blocks on a CPU: a dry run")
    given = parser.parse_args()
    device = torch.device("cpu" if given.tiny else "cuda")
    model, shape = classifier(given.layers, TINY if given.tiny else {}, device)
    for length in given.length:
        for tokens in [256] if given.tiny else given.tokens:
            print(json.dumps(measured(model, shape, tokens, length, given.steps, device)), flush=True)


def classifier(layers: int, changes: dict[str, Any], device: torch.device) -> tuple[EmotionClassifier, Shape]:
    from transformers import AutoConfig

    config = AutoConfig.for_model("qwen3_5_text", num_hidden_layers=layers, **changes)
    network = skeleton(config, LABELS)
    draw = torch.Generator(device).manual_seed(0)
    precision: Any = "bf16" if device.type == "cuda" else "fp32"
    tensors = (
        (name, torch.empty(size, device=device).normal_(0, 0.02, generator=draw))
        for name, size in parameters_of(network).items()
    )
    fill(network, tensors, precision, device)
    init_head(network, 0)
    return EmotionClassifier(attach_lora(network, LoraSection(), 0), precision).train(), Shape.of(
        config.to_dict()
    )


def measured(
    model: EmotionClassifier, shape: Shape, tokens: int, length: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """What one micro-batch costs, in the middle of some."""
    draw = np.random.default_rng(0)
    lengths = [length] * (tokens // length) if length else goemotions(tokens, draw)
    recipe = Recipe(shape, model.precision, LoraSection(), LABELS, decoder="stock")
    planned = estimate(recipe, sum(lengths), False)
    for _ in range(2):  # what is made once
        step(model, lengths, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(lambda: step(model, lengths, device), steps, device)
    found: dict[str, Any] = {
        "posts": len(lengths),
        "tokens": sum(lengths),
        "tokens_per_s": round(sum(lengths) / seconds),
        "tflops": round(4 * shape.linear_parameters * sum(lengths) / seconds / 1e12, 1),
        "share_between_the_products": round(between(model, lengths, steps, device, shape) / seconds, 3),
        "planned_gib": round(planned.total / 2**30, 2),
    }
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def goemotions(tokens: int, draw: np.random.Generator) -> list[int]:
    """Lengths that fill a micro-batch, of about 20 tokens each."""
    lengths: list[int] = []
    while sum(lengths) < tokens - 40:
        lengths.append(int(np.clip(draw.normal(20, 9), 4, 40)))
    return lengths


def step(model: nn.Module, lengths: list[int], device: torch.device) -> None:
    ends = np.cumsum(lengths)
    positions = torch.from_numpy(np.concatenate([np.arange(one) for one in lengths])).to(device)
    places = torch.stack([positions, positions], 1).int()
    logits_NC = model(
        torch.randint(0, 250, (1, int(ends[-1])), device=device),
        positions[None],
        Segments.of([0, *ends.tolist()], device),
        torch.from_numpy(ends - 1).to(device),
        Counters(torch.tensor(1, device=device), places),
    )
    logits_NC.sum().backward()


def between(
    model: EmotionClassifier, lengths: list[int], steps: int, device: torch.device, shape: Shape
) -> float:
    """Seconds of all delta nets between their convolution and their last product: forward pass,
    once more, and backward pass.
    """
    nets: Any = [block.linear_attn for block in model.layers if hasattr(block, "linear_attn")]
    sizes = shape.delta_nets
    assert sizes is not None
    chunks = delta_net.Chunks.of(lengths, sizes.width - 1, device)
    dtype = model.compute
    given = [
        torch.randn(sum(lengths), size, device=device, dtype=kind, requires_grad=True)
        for size, kind in (
            (sizes.channels, dtype),
            (sizes.values_width, dtype),
            (sizes.value_heads, torch.float32),
            (sizes.value_heads, torch.float32),
        )
    ]

    def once() -> None:
        convolved, z, strength, decay = given
        made = delta_net.computed_again(
            lambda *one: nets[0]._between(chunks, *one), convolved, z, strength.sigmoid(), -decay.exp()
        )
        made.sum().backward()  # type: ignore[no-untyped-call]

    once()
    return len(nets) * timed(once, steps, device)


def timed(once: Any, times: int, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main()
