"""The memory of `emotion-train export`: ru_maxrss of the command on Mistral Small 3.1's shape.

    # 44 GiB for the base, as many for the export, 3 GiB below TMPDIR, an hour on two cores
    python benchmarks/export_memory.py --folder /data/mistral
    # the same tensors in fewer layers, 6 GiB and 6 GiB
    python benchmarks/export_memory.py --folder /tmp/mistral --layers 4

Writes random bf16 weights of the text part under the hub's names, in files of 4.6 GiB as the hub
has them, and an adapter of rank 16 on all linear layers. Memory depends on the largest tensor and
not on the number of layers, which `--layers` changes to show it. The parent imports no library, as
Linux counts its memory at the start of a child as the child's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 131_072,
    "hidden_size": 5120,
    "intermediate_size": 32_768,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
FILE_BYTES = 4_900_000_000
BLOCK_BYTES = 64 << 20
LABELS = [f"label {number}" for number in range(28)]
MOST_GIB = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the base goes; one that is there is used again"
    )
    parser.add_argument("--layers", type=int, default=40, help="fewer for a smaller disk (default: 40)")
    parser.add_argument("--to", help="folder or s3:// URL of the export (default: FOLDER-export, removed)")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    adapter = arguments.folder.with_name(f"{arguments.folder.name}-adapter")
    if arguments.make:
        make(arguments.folder, adapter, arguments.layers)
        return
    if not (adapter / "labels.json").exists():
        again = ["--make", "--folder", str(arguments.folder), "--layers", str(arguments.layers)]
        subprocess.run([sys.executable, __file__, *again], check=True)
    target = arguments.to or str(arguments.folder.with_name(f"{arguments.folder.name}-export"))
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "emotion_train", "export", str(adapter), "--to", target])
    _, status, usage = os.wait4(child.pid, 0)
    seconds, peak = time.perf_counter() - began, usage.ru_maxrss / 2**20
    base = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors")) / 2**30
    if arguments.to is None:
        shutil.rmtree(target, ignore_errors=True)
    print("| layers | base, GiB | peak memory, GiB | s | cores' s |\n|--:|--:|--:|--:|--:|")
    busy = usage.ru_utime + usage.ru_stime
    print(f"| {arguments.layers} | {base:.1f} | {peak:.2f} | {seconds:.0f} | {busy:.0f} |")
    if os.waitstatus_to_exitcode(status) != 0 or peak > MOST_GIB:
        sys.exit(f"export ended with {os.waitstatus_to_exitcode(status)} after {peak:.2f} GiB")


def make(folder: Path, adapter: Path, layers: int) -> None:
    """The base, and an adapter in the program's own files."""
    import torch
    from real_size import packaged_tekken
    from safetensors.torch import save_file

    from emotion_train.config import LoraSection
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.exporting.base_rows import open_rows
    from emotion_train.exporting.merge import adapter_shapes
    from emotion_train.model.facts import FACTS, AdapterFacts
    from emotion_train.model.load import BaseInfo, read_config

    write_base(folder, layers)
    shutil.copyfile(packaged_tekken(), folder / "tekken.json")
    found = read_config(str(folder))
    rows = open_rows(found)
    identity = BaseInfo(
        str(folder.resolve()), "mistral", "text", found.shape_sha256, rows.weights_sha256(), 0
    )
    lora = LoraSection(r=16, alpha=32, targets="all-linear")
    tokenizer = PostTokenizer.load(str(folder), 128)
    facts = AdapterFacts.of(identity, tokenizer, precision="bf16", lora=lora, labels=LABELS)
    adapter.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(1)
    shapes = adapter_shapes(rows.shapes, found.text.model_type, lora, len(LABELS))
    state = {name: torch.randn(shape, generator=draw) / 100 for name, shape in shapes.items()}
    save_file(state, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save(adapter)
    (adapter / FACTS).write_text(json.dumps(facts.model_dump(mode="json", exclude={"labels"})))
    (adapter / "labels.json").write_text(json.dumps({"labels": LABELS}))


def write_base(folder: Path, layers: int) -> None:
    """Files of random numbers, of which one block is drawn and written again and again."""
    import torch

    from emotion_train.bases.architecture import text_model
    from emotion_train.bases.files import BaseFiles

    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    document |= SIZES | {"num_hidden_layers": layers, "max_position_embeddings": 131_072}
    document["dtype"] = "bfloat16"
    document |= {"rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None}
    document |= {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(document))
    block = torch.empty(BLOCK_BYTES // 2).normal_(0, 0.02).to(torch.bfloat16).view(torch.uint8).numpy().data
    files = list(batches(text_model(BaseFiles.find(str(folder))).tensors()))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= {f"language_model.{key}": name for key in shapes}
        with (folder / name).open("wb") as file:
            header, size = header_of(shapes)
            file.write(header)
            for start in range(0, size, BLOCK_BYTES):
                file.write(block[: min(BLOCK_BYTES, size - start)])
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def batches(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    batch: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        batch[name] = shape
        if sum(map(bytes_of, batch.values())) >= FILE_BYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def bytes_of(shape: tuple[int, ...]) -> int:
    size = 2
    for length in shape:
        size *= length
    return size


def header_of(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """First bytes of a safetensors file, and how many bytes of numbers follow."""
    at, header = 0, dict[str, Any]({"__metadata__": {"format": "pt"}})
    for name, shape in shapes.items():
        end = at + bytes_of(shape)
        header[f"language_model.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, end)}
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, at


if __name__ == "__main__":
    main()
