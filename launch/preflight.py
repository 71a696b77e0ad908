"""What can fail cheaply, failing before a model is loaded: config, data set, output, base model, GPU and packages."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from emotion_train.base import BaseFiles
from emotion_train.config import Config, require_trackers
from emotion_train.data.index import read_index, require_trainable
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.runlog import run_ids
from emotion_train.storage import open_store
from launch.command import choose
from launch.topology import Gpu

_NEEDED_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    finding: str


def run_checks(config: Config, gpus: Sequence[Gpu], accelerate_config: str | None) -> list[Check]:
    """One finding per question; none of them downloads or writes anything large."""
    questions: list[tuple[str, Callable[[], str]]] = [
        ("machine", lambda: _machine(config, gpus, accelerate_config)),
        ("data set", lambda: _data(config)),
        ("output", lambda: _output(config)),
        ("base model", lambda: _base(config)),
        ("precision", lambda: _precision(config, gpus)),
        ("trackers", lambda: _trackers(config)),
        ("disk", _disk),
    ]
    return [_ask(name, question) for name, question in questions]


def _ask(name: str, question: Callable[[], str]) -> Check:
    try:
        return Check(name, True, question())
    except EmotionTrainError as error:
        return Check(name, False, str(error))


def _machine(config: Config, gpus: Sequence[Gpu], accelerate_config: str | None) -> str:
    choice = choose(gpus, accelerate_config, config)
    return f"{choice.config_file.stem}: {choice.reason}"


def _data(config: Config) -> str:
    index = read_index(open_store(config.data.url))
    rows = ", ".join(f"{name} {split.rows:,}" for name, split in index.splits.items())
    require_trainable(index)
    return f"{rows} posts, {len(index.labels)} labels, {config.data.url}"


def _output(config: Config) -> str:
    store = open_store(config.run.output_url)
    probe = f"probe-{secrets.token_hex(8)}.txt"  # what may be listed may not be writable
    store.create(probe, probe.encode())
    store.delete(probe)
    names = run_ids(store)
    return f"writable, {len(names)} run{'' if len(names) == 1 else 's'} at {config.run.output_url}"


def _base(config: Config) -> str:
    base = BaseFiles.find(config.model.base)
    if base.gguf is not None:
        if find_spec("gguf") is None:
            raise WrongRequest("model.base is a .gguf file and the package gguf is missing; type pip install 'emotion-train[gguf]'.")
        return f"{base.gguf.name}, {base.gguf.stat().st_size / 2**20:.0f} MiB"
    if base.folder is not None:
        return str(base.required("config.json").parent)
    return f"{base.name} from the Hugging Face hub or its cache (not contacted)"


def _precision(config: Config, gpus: Sequence[Gpu]) -> str:
    if config.model.precision == "nf4" and find_spec("bitsandbytes") is None:
        raise WrongRequest(
            "model.precision is nf4 and the package bitsandbytes is missing; type pip install 'emotion-train[gpu]' or model.precision=bf16."
        )
    where = gpus[0].name if gpus else "the CPU"
    return f"{config.model.precision} on {where}"


def _trackers(config: Config) -> str:
    require_trackers(config)
    return ", ".join(config.run.trackers) or "none"


def _disk() -> str:
    import tempfile

    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_DISK_BYTES:
        raise WrongRequest(f"{folder} has {free / 2**30:.1f} GiB free and 2 GiB are needed; free some or set TMPDIR to a larger disk.")
    return f"{free / 2**30:.0f} GiB free in {folder}"
