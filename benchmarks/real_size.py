"""The real size on one GPU: a 24B checkpoint with Mistral Small 3.1's exact shape, loaded in nf4,
trained, saved and read back.

    # 45 GiB there, one GPU with 80 GiB or more, some four minutes
    python benchmarks/real_size.py --folder /dev/shm/mistral
    # 131 GiB there; Llama 3.3 70B's shape with Tekken's vocabulary
    python benchmarks/real_size.py --folder /dev/shm/llama --shape llama-3.3-70b

Writes random bf16 weights as shards in the hub's key layout (vision tower and language-model head
included, to be passed over), takes the Tekken tokenizer of the package mistral-common, prepares
GoEmotions posts, runs the program's own command line for 21 steps, pulls the adapter, scores the
validation posts again from it in a new process, and compares the probabilities with the published
ones bit by bit. The weights are random, so speed and memory are real and losses and scores mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from goemotions import MISTRAL, SINGLE_GPU, add_posts_argument, prepared, splits
from safetensors.torch import save_file

from emotion_train.data.tokenization import PostTokenizer
from emotion_train.runs.published import download
from launch.run.choice import accelerate_line

SHARD_BYTES = 4_900_000_000
WRITERS = 6  # shards that are drawn and written side by side
STEPS = 20
# parameters of the published checkpoint, blocks, and what config.json says of a block
MISTRAL_SMALL, LLAMA_70B = "mistral-small-3.1", "llama-3.3-70b"
SHAPES: dict[str, tuple[int, int, dict[str, int]]] = {
    MISTRAL_SMALL: (
        24_011_361_280,
        40,
        {
            "hidden_size": 5120,
            "intermediate_size": 32_768,
            "num_attention_heads": 32,
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
    ),
    LLAMA_70B: (
        70_553_706_496 + 2 * 2_816 * 8_192,  # its vocabulary is 128,256; Tekken's 131,072 is taken
        80,
        {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_attention_heads": 64,
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
    ),
}
HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--batch", type=int, default=448, help="posts a step (default: 448, about 8,000 tokens)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    ensure_checkpoint(arguments)
    with tempfile.TemporaryDirectory(prefix="real-size-") as folder:
        posts = some_posts(
            splits(arguments.posts, Path(folder, "all")), Path(folder, "posts"), STEPS * arguments.batch
        )
        prepared(posts, folder, "--on-bad", "drop")
        print(measure(arguments, Path(folder)))


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where the checkpoint goes; one that is there is used again",
    )
    parser.add_argument(
        "--tekken", type=Path, default=None, help="tekken.json (default: that of the package mistral-common)"
    )
    parser.add_argument("--shape", choices=SHAPES, default=MISTRAL_SMALL, help="default: %(default)s")
    parser.add_argument(
        "--layers", type=int, help="fewer for a smaller GPU or a quick try (default: the real number)"
    )


def ensure_checkpoint(arguments: argparse.Namespace) -> None:
    """Write the checkpoint where there is none; `arguments.layers` becomes its number of blocks."""
    arguments.layers = arguments.layers or SHAPES[arguments.shape][1]
    if not (arguments.folder / "model.safetensors.index.json").exists():
        write_checkpoint(
            arguments.folder, arguments.layers, arguments.tekken or packaged_tekken(), arguments.shape
        )
    config = json.loads((arguments.folder / "config.json").read_text())
    text = config.get("text_config", config)
    asked = {"num_hidden_layers": arguments.layers} | SHAPES[arguments.shape][2]
    if {name: text[name] for name in asked} != asked:
        sys.exit(
            f"{arguments.folder} holds a checkpoint of another shape or depth than {arguments.shape} with"
            f" {arguments.layers} blocks; give another --folder."
        )


def packaged_tekken() -> Path:
    found = find_spec("mistral_common")
    if found is None or found.origin is None:
        sys.exit("real_size.py: no Tekken tokenizer; type pip install mistral-common, or give --tekken FILE.")
    return Path(found.origin).parent / "data" / "tekken_240911.json"


def write_checkpoint(folder: Path, layers: int, tekken: Path, shape: str = MISTRAL_SMALL) -> None:
    """The published configuration and random weights, drawn on the GPU where there is one."""
    config, shapes = configuration(shape, layers)
    total = sum(one.numel() for one in shapes.values())
    assert layers != SHAPES[shape][1] or total == SHAPES[shape][0], f"{total:,} parameters"
    folder.mkdir(parents=True, exist_ok=True)
    shards = in_shards(shapes)
    with ThreadPoolExecutor(WRITERS) as pool:
        files = list(pool.map(partial(write_shard, folder), range(1, len(shards) + 1), shards))
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    (folder / "tekken.json").write_bytes(tekken.read_bytes())
    PostTokenizer.load(str(folder), 8192).save(folder)  # tokenizer.json, which the hub's has too
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
    )


def configuration(shape: str, layers: int) -> tuple[Any, dict[str, torch.Size]]:
    """transformers' configuration, and the shape of each tensor by the name in a published
    checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text: dict[str, Any] = SHAPES[shape][2] | {
        "num_hidden_layers": layers,
        "vocab_size": 131_072,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        if shape == LLAMA_70B:
            config = AutoConfig.for_model("llama", **text, rope_theta=5e5, architectures=["LlamaForCausalLM"])
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return config, {name: tensor.shape for name, tensor in model.state_dict().items()}
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
            "rope_theta": 10_000.0,
        }
        text |= {"rope_theta": 1e9, "sliding_window": None, "architectures": ["MistralForCausalLM"]}
        config = AutoConfig.for_model(
            "mistral3",
            text_config={"model_type": "mistral", **text},
            vision_config={"model_type": "pixtral", **vision},
            image_token_index=10,
        )
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        return config, {hub_name(name): tensor.shape for name, tensor in model.state_dict().items()}


def in_shards(shapes: dict[str, torch.Size]) -> list[dict[str, torch.Size]]:
    """These tensors in files of about SHARD_BYTES, in the same order."""
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * one.numel() for one in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    return shards


def write_shard(folder: Path, number: int, shard: dict[str, torch.Size]) -> str:
    """The name of the file that holds random bf16 weights in these shapes; norms are ones."""
    draw = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(number)
    tensors = {}
    for name, shape in shard.items():
        if name.endswith("norm.weight") or "_norm" in name or "layernorm" in name:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            empty = torch.empty(shape, dtype=torch.bfloat16, device=draw.device)
            tensors[name] = empty.normal_(0, 0.02, generator=draw).cpu()
    file = f"model-{number:05}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return file


def hub_name(name: str) -> str:
    for current, published in HUB_NAMES.items():
        if name.startswith(current):
            return published + name.removeprefix(current)
    return name


def some_posts(whole: Path, folder: Path, rows: int, validation: int = 1000) -> Path:
    """The first training posts, enough for the steps, and the first validation posts."""
    folder.mkdir()
    for name, count in (("train", rows + rows // 20), ("validation", validation)):
        pq.write_table(pq.read_table(whole / f"{name}.parquet").slice(0, count), folder / f"{name}.parquet")
    return folder


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    values = [
        *(
            f"data.url={folder / 'data'}",
            f"run.output_url={folder / 'runs'}",
            "run.id=real-size",
            f"model.base={arguments.folder}",
        ),
        *(
            "train.epochs=1",
            f"train.global_batch_size={arguments.batch}",
            "train.tokens_per_microbatch=8192",
            *arguments.overrides,
        ),
    ]
    began = time.perf_counter()
    subprocess.run(accelerate_line(SINGLE_GPU, str(MISTRAL), values), check=True, stdout=sys.stderr)
    whole_s = time.perf_counter() - began
    download(f"{folder / 'runs'}/real-size", folder / "adapter")
    report: dict[str, Any] = json.loads((folder / "adapter" / "report" / "report.json").read_text())
    command = [
        sys.executable,
        "-m",
        "emotion_train.evaluate",
        "--adapter",
        str(folder / "adapter"),
        "--data",
        str(folder / "data"),
    ]
    again = [
        *command,
        "--split",
        "validation",
        "--out",
        str(folder / "again"),
        "--tokens-per-microbatch",
        "8192",
    ]
    subprocess.run(again, check=True, stdout=sys.stderr)
    published, reread = (
        probabilities(at / "predictions_validation.parquet")
        for at in (folder / "adapter" / "report", folder / "again")
    )
    assert published.keys() == reread.keys()
    apart = max(float(np.abs(published[post] - reread[post]).max()) for post in published)
    speed, steps = report["speed"], report["history"][-1]["step"]
    versions = ", ".join(f"{name} {version}" for name, version in report["identity"]["versions"].items())
    return "\n".join(
        [
            "| | |",
            "|---|--:|",
            f"| steps of {arguments.batch} posts, real tokens | {steps}, {speed['real_tokens']:,} |",
            f"| training | {speed['train_seconds']:.1f} s |",
            (
                f"| speed | {speed['posts_per_second']:.0f} posts/s, {speed['tokens_per_second']:,.0f}"
                " tokens/s |"
            ),
            f"| peak memory of the GPU | {speed['peak_memory_bytes'] / 2**30:.1f} GiB |",
            f"| whole command: imports, load, train, score, publish | {whole_s:.0f} s |",
            (
                "| largest difference of a probability, published against adapter read back"
                f" ({len(published)} posts) | {apart:g} |"
            ),
            "",
            f"{report['identity']['device']}; {versions}",
        ]
    )


def probabilities(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    table = pq.read_table(path)
    name = next(name for name in table.column_names if name.startswith("prob"))
    return {
        post: np.asarray(row)
        for post, row in zip(table["id"].to_pylist(), table[name].to_pylist(), strict=True)
    }


if __name__ == "__main__":
    main()
