"""Start-up by where the base lies: a checkpoint's folder, staged as bf16, staged as nf4, and the
same in the local S3 server.

    # one GPU with 80 GB, 57 GiB there, three minutes
    python benchmarks/stage_base.py --folder /dev/shm/mistral --places folder,nf4
    # the same checkpoint again, 43 GiB more, likewise
    python benchmarks/stage_base.py --folder /dev/shm/mistral --places bf16,s3-nf4
    # on a CPU
    python benchmarks/stage_base.py --folder /tmp/small --small --places
        folder,nf4,bf16,s3-nf4,s3-bf16

Writes Mistral Small 3.1's shape with random weights as `real_size.py` does (`--small`: SmolLM2-135M
from the demo's GGUF file), stages it, and starts a new process for each place and precision that
loads the base as a run does. The clock runs from before the process starts until its model is ready
on the device. Some layers of every model are hashed: all ways must give the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "bases"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoint goes; FOLDER-bf16 and FOLDER-nf4 beside it; what is there is used",
    )
    parser.add_argument(
        "--places",
        default="folder,nf4,bf16",
        help="of folder, bf16, nf4, s3-bf16, s3-nf4 (default: folder,nf4,bf16)",
    )
    parser.add_argument(
        "--precisions",
        default="nf4",
        help="of the runs: nf4, bf16 (default: nf4); staged nf4 serves nf4 only",
    )
    parser.add_argument(
        "--layers", type=int, default=40, help="fewer for a smaller machine (default: 40, the real number)"
    )
    parser.add_argument("--small", action="store_true", help="SmolLM2-135M in place of the 24B shape")
    parser.add_argument(
        "--repeats", type=int, default=1, help="starts of each; the fastest counts (default: 1)"
    )
    parser.add_argument(
        "--s3-folder",
        type=Path,
        help="where the server keeps its objects (default: a temporary folder, removed)",
    )
    parser.add_argument("--load", nargs=3, metavar=("URL", "PRECISION", "BEGAN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(*arguments.load)
        return
    places, rows = arguments.places.split(","), []
    write_source(arguments)
    staging_s = {
        precision: stage(arguments.folder, precision)
        for precision in ("nf4", "bf16")
        if any(precision in one for one in places)
    }
    with server(
        arguments, [one.removeprefix("s3-") for one in places if one.startswith("s3-")]
    ) as environment:
        # so that none pays for reading the libraries from the disk
        start(str(arguments.folder), "none", environment)
        for place in places:
            for precision in arguments.precisions.split(","):
                if "nf4" in place and precision != "nf4":
                    continue
                url = (
                    f"s3://{BUCKET}/{place[3:]}"
                    if place.startswith("s3-")
                    else str(sibling(arguments.folder, place))
                )
                found = [start(url, precision, environment) for _ in range(arguments.repeats)]
                rows.append((place, precision, min(found, key=lambda one: float(one["ready_s"]))))
                print(rows[-1], file=sys.stderr, flush=True)
    check_same(rows)
    print(table(rows, staging_s))


def sibling(folder: Path, place: str) -> Path:
    return folder if place == "folder" else folder.with_name(f"{folder.name}-{place}")


def write_source(arguments: argparse.Namespace) -> None:
    if (arguments.folder / "config.json").exists():
        return
    began = time.perf_counter()
    if arguments.small:
        write_small(arguments.folder)
    else:
        from real_size import packaged_tekken, write_checkpoint

        write_checkpoint(arguments.folder, arguments.layers, packaged_tekken())
    print(f"checkpoint written in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def write_small(folder: Path) -> None:
    """The demo's GGUF file as a safetensors checkpoint in bfloat16."""
    from safetensors.torch import save_file

    from emotion_train.bases.packaged import small_model
    from emotion_train.data.tokenization import PostTokenizer
    from emotion_train.model.load import HEAD, load_base

    model: Any = load_base(str(small_model()), "bf16", 2, "cpu")[0]
    folder.mkdir(parents=True)
    save_file(
        {name: tensor for name, tensor in model.state_dict().items() if name != HEAD},
        folder / "model.safetensors",
    )
    PostTokenizer.load(str(small_model()), 8192).save(folder)
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))


def stage(folder: Path, precision: str) -> float:
    """Seconds of the whole command; 0 where it was made before."""
    target = sibling(folder, precision)
    if (target / "base.json").exists():
        return 0.0
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "emotion_train.stage_base",
        str(folder),
        str(target),
        "--precision",
        precision,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - began


@contextmanager
def server(arguments: argparse.Namespace, precisions: list[str]) -> Iterator[dict[str, str]]:
    """The local S3 server with copies of the staged bases, base.json last; nothing where none is
    asked for.
    """
    if not precisions:
        yield dict(os.environ)
        return
    from emotion_train.storage.local_s3 import LocalS3
    from emotion_train.storage.open import open_store

    with (
        tempfile.TemporaryDirectory(prefix="stage-base-s3-") as temporary,
        LocalS3(arguments.s3_folder or Path(temporary)) as running,
    ):
        running.is_all_there_is()
        running.create_bucket(BUCKET)
        for precision in precisions:
            began = time.perf_counter()
            store = open_store(f"s3://{BUCKET}/{precision}")
            files = sorted(
                sibling(arguments.folder, precision).iterdir(), key=lambda path: path.name == "base.json"
            )
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda path, store=store: store.write(path.name, path), files[:-1]))
            store.write(files[-1].name, files[-1])
            print(
                f"{precision} copied to the bucket in {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        yield dict(os.environ)


def start(url: str, precision: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", url, precision, str(time.time())]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def load(url: str, precision: str, began: str) -> None:
    """In a process of its own: the base as a run loads it, and when what was done."""
    import torch
    from transformers import AutoModelForSequenceClassification  # noqa: F401

    from emotion_train.model.load import load_base, read_config
    from emotion_train.model.precision import require_bitsandbytes

    require_bitsandbytes()
    facts: dict[str, Any] = {"imports_s": time.time() - float(began)}
    if precision == "none":
        print(json.dumps(facts))
        return
    cuda = torch.cuda.is_available()
    device = torch.zeros(1, device="cuda" if cuda else "cpu").device
    facts["device_s"] = time.time() - float(began)
    config = read_config(url)
    model, info = load_base(config, precision, 28, device)  # type: ignore[arg-type]
    if cuda:
        torch.cuda.synchronize()
    facts["ready_s"] = time.time() - float(began)
    facts["host_gib"] = peak_host_bytes() / 2**30
    facts["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    facts["weights_sha256"], facts["bits"] = info.weights_sha256, bits(model)
    facts["machine"] = (
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {os.cpu_count()} cores, torch"
        f" {torch.__version__}"
    )
    print(json.dumps(facts))


def peak_host_bytes() -> int:
    """The peak of this process; getrusage would count the parent's at the time of the fork."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) << 10


def bits(model: Any) -> str:
    """The sha256 of the first, a middle and the last layer."""
    import torch

    layers = len(model.model.layers)
    digest = hashlib.sha256()
    for number in sorted({0, layers // 2, layers - 1}):
        for name, parameter in model.model.layers[number].named_parameters():
            digest.update(
                name.encode()
                + parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                for tensor in (
                    state.absmax,
                    state.state2.absmax,
                    state.offset,
                    state.code,
                    state.state2.code,
                ):
                    digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same(rows: list[tuple[str, str, dict[str, Any]]]) -> None:
    for precision in {precision for _, precision, _ in rows}:
        found = {facts["bits"] for _, one, facts in rows if one == precision}
        print(
            f"{precision}:"
            f" {'the same bits everywhere' if len(found) == 1 else f'{len(found)} DIFFERENT models'}",
            file=sys.stderr,
        )
    assert len({facts["weights_sha256"] for *_, facts in rows}) == 1, "the identity of the weights differs"


def table(rows: list[tuple[str, str, dict[str, Any]]], staging_s: dict[str, float]) -> str:
    lines = [
        (
            "| base read from | run | imports, device | base loaded | process start to ready | host peak |"
            " GPU peak |"
        ),
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for place, precision, facts in rows:
        loaded = facts["ready_s"] - facts["device_s"]
        times = f"{facts['device_s']:.1f} s | {loaded:.1f} s | {facts['ready_s']:.1f} s"
        lines.append(
            f"| {place} | {precision} | {times} | {facts['host_gib']:.1f} GiB | {facts['gpu_gib']:.1f} GiB |"
        )
    lines += ["", *(f"staged as {name} in {seconds:.0f} s" for name, seconds in staging_s.items() if seconds)]
    return "\n".join([*lines, rows[0][2]["machine"]])


if __name__ == "__main__":
    main()
