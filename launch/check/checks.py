"""What can fail cheaply, failing before a machine is paid for: config, data set, labels, output,
credentials, base model, GPU and packages.

Every question is asked, also when an earlier one has failed, and answered in one line. The checks
read the index, the first posts and the small files of the base, and write and delete one probe; a
data set of 10 million posts takes some 20 s.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import StagedBase
from emotion_train.config import Config, Precision, load_config, require_trackers
from emotion_train.data.index import DataObject, Index, Split, read_index, require_trainable
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.runs.log import read_log, require_conditional_writes, run_ids, summary
from emotion_train.sizing.memory import GIB, estimate, largest_microbatch, usable_bytes
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store
from launch.gpus import GPU_KINDS, MIB, kind_of
from launch.plan.choices import Choice, Spot, best_settings, spot_of
from launch.plan.prices import Offer
from launch.run.choice import asked_for, by_memory, choose, requested_file
from launch.run.topology import Gpu, Topology
from launch.workload import refuse_unfused_fp8, shape_of_base, work_of

_NEEDED_DISK_BYTES = 2 << 30
_BYTES_READ_AGAIN = 256 << 20  # of objects whose ETag says nothing
_HELD_OUT_LOOKED_AT = 50_000
_TRAIN_LOOKED_AT = 200_000
_NAMES_SHOWN = 4
_FEW_POSTS = 5
# providers of boto3 that fetch a new credential by themselves, for as long as the machine or the
# login lasts
_RENEWED = (
    "iam-role",
    "container-role",
    "assume-role",
    "assume-role-with-web-identity",
    "custom-process",
    "sso",
    "login",
)


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    finding: str


@dataclass(frozen=True)
class Target:
    """The machine that will train: `gpus` of it, of `memory_mib` each, none for a CPU. `here`: it
    is this one.
    """

    name: str
    memory_mib: int
    gpus: int
    here: bool


def target_of(words: str | None, gpus: Sequence[Gpu]) -> Target | None:
    """`H100:8` as SkyPilot writes it, else this machine's GPUs, else None. Raises `WrongRequest`
    for a GPU that is not in the table.
    """
    if words is None:
        return Target(gpus[0].name, min(gpu.memory_mib for gpu in gpus), len(gpus), True) if gpus else None
    name, colon, count = words.partition(":")
    kind = next((kind for kind in GPU_KINDS if kind.name.lower() == name.lower()), None)
    if kind is None or (colon and not (count.isdecimal() and int(count) > 0)):
        raise WrongRequest(
            f"--gpus is {words!r}; give NAME or NAME:COUNT with one of"
            f" {', '.join(one.name for one in GPU_KINDS)}."
        )
    return Target(kind.name, kind.memory_mib, int(count or 1), False)


def check_all(
    path: str | None,
    overrides: Sequence[str],
    gpus: Sequence[Gpu],
    accelerate_config: str | None,
    *,
    wanted_gpus: str | None = None,
    hours: float | None = None,
) -> Iterator[Check]:
    """One finding per question, as it is made. A config that is wrong in one place is looked at in
    the others all the same.
    """
    try:
        config = load_config(path, overrides)
    except WrongRequest as error:
        names = " ".join(str(error).split("\n  - ")[1:]) or str(error)
        yield Check("config", False, names)
        partial = _what_is_right(path, overrides)
        if partial is None:
            return
        config = partial
    else:
        where = f"{path} and " if path is not None else ""
        yield Check("config", True, f"{where}{len(overrides)} values, sha256 {config.sha256()[:12]}")
    yield from run_checks(config, gpus, accelerate_config, wanted_gpus=wanted_gpus, hours=hours)


def _what_is_right(path: str | None, overrides: Sequence[str]) -> Config | None:
    """The config without the sections that are wrong; None where data or output is not named."""
    import yaml

    values: dict[str, Any] = {}
    if path is not None:
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            document = None
        values = document if isinstance(document, dict) else {}
    words = [
        f"{section}.{field}={value}"
        for section, fields in values.items()
        if isinstance(fields, Mapping)
        for field, value in fields.items()
        if isinstance(value, str | int | float)
    ]
    right: list[str] = []
    needed = [word for word in (*words, *overrides) if word.startswith(("data.url=", "run.output_url="))]
    try:
        load_config(None, needed)
    except WrongRequest:
        return None
    for word in (*words, *overrides):
        try:
            load_config(None, [*needed, *right, word])
        except WrongRequest:
            continue
        right.append(word)
    return load_config(None, [*needed, *right])


def run_checks(
    config: Config,
    gpus: Sequence[Gpu],
    accelerate_config: str | None,
    *,
    wanted_gpus: str | None = None,
    hours: float | None = None,
) -> Iterator[Check]:
    """One finding per question, as it is made.

    `wanted_gpus` is another machine than this one, `hours` how long the run will take on it (None:
    as planned, where that can be).
    """

    @cache
    def data() -> Store:
        return open_store(config.data.url)

    @cache
    def index() -> Index:
        return read_index(data())

    questions: list[tuple[str, Callable[[], str]]] = [
        ("data set", lambda: _data(config, index())),
        ("objects", lambda: _objects(data(), index())),
        ("labels", lambda: _labels(index())),
        ("overlap", lambda: _overlap(data(), index())),
        ("output", lambda: _output(config)),
        (
            "credentials",
            lambda: _credentials(
                config, lambda: hours or _planned_hours(config, index(), data(), target_of(wanted_gpus, gpus))
            ),
        ),
        ("base model", lambda: _base(config)),
        ("memory", lambda: _memory(config, target_of(wanted_gpus, gpus), index)),
        ("precision", lambda: _precision(config, wanted_gpus, gpus, accelerate_config)),
        ("trackers", lambda: _trackers(config)),
    ]
    if wanted_gpus is None:
        questions += [("machine", lambda: _machine(config, gpus, accelerate_config)), ("disk", _disk)]
    elif accelerate_config is not None:
        questions.append(("machine", lambda: f"{requested_file(accelerate_config).stem}: asked for"))
    for name, question in questions:
        yield _ask(name, question)


def _ask(name: str, question: Callable[[], str]) -> Check:
    try:
        return Check(name, True, question())
    except EmotionTrainError as error:
        return Check(name, False, str(error))


# --- the data set ---


def _data(config: Config, index: Index) -> str:
    rows = ", ".join(f"{name} {split.rows:,}" for name, split in index.splits.items())
    index.split("train")
    index.split("validation")
    return f"{rows} posts, {len(index.labels)} labels, {config.data.url}"


def _objects(store: Store, index: Index) -> str:
    """Every object is there with its size; what no ETag vouches for is compared by sha256, as long
    as it is not too much.
    """
    there = {info.key: info for info in store.list()}
    described = [
        (split, number, one) for split in index.splits.values() for number, one in enumerate(split.objects)
    ]
    problems = [
        problem for _, _, one in described if (problem := _unlike(one, there.get(one.key))) is not None
    ]
    if problems:
        more = f", and {len(problems) - _NAMES_SHOWN} more" if len(problems) > _NAMES_SHOWN else ""
        raise WrongRequest(
            f"The data set at {store.url} is not whole: {', '.join(problems[:_NAMES_SHOWN])}{more}; prepare"
            " it again into an empty prefix, or copy all of it."
        )
    total = sum(one.bytes for _, _, one in described)
    doubtful = [item for item in described if item[2].etag is None or there[item[2].key].etag != item[2].etag]
    read, unread = _compare(store, doubtful)
    words = f"{len(described)} objects of {total / 1e6:,.1f} MB, all there"
    if not doubtful:
        return f"{words}, unchanged by their ETags"
    return f"{words}; {read} compared by sha256" + (f", {unread} by size alone" if unread else "")


def _unlike(described: DataObject, there: ObjectInfo | None) -> str | None:
    if there is None:
        return f"{described.key} is missing"
    return (
        f"{described.key} has {there.size:,} bytes instead of {described.bytes:,}"
        if there.size != described.bytes
        else None
    )


def _compare(store: Store, doubtful: Sequence[tuple[Split, int, DataObject]]) -> tuple[int, int]:
    """How many objects were read and are right, and how many were too much; raises `WrongRequest`
    for one that is wrong.
    """
    read, budget = 0, _BYTES_READ_AGAIN
    for split, number, described in doubtful:
        if described.bytes > budget:
            continue
        budget -= described.bytes
        content = store.read(described.key)
        for group in split.row_groups:
            end = group.start + group.length
            if (
                group.object == number
                and hashlib.sha256(content[group.start : end]).hexdigest() != group.sha256
            ):
                raise WrongRequest(
                    f"{store.url_of(described.key)} is not what index.json describes (bytes {group.start} to"
                    f" {end}); prepare the data again into an empty prefix."
                )
        read += 1
    return read, len(doubtful) - read


def _labels(index: Index) -> str:
    require_trainable(index)
    train = index.split("train")
    rarest, most = min(train.label_counts), max(train.label_counts)
    remarks = [
        f"largest class {most / rarest:,.{1 if most < 10 * rarest else 0}f} times the smallest ({rarest:,}"
        " posts)"
    ]
    for name, split in index.splits.items():
        empty = [label for label, count in zip(index.labels, split.label_counts, strict=True) if count == 0]
        if name != "train" and split.rows and empty:
            raise WrongRequest(
                f"No {name} post has the label {_some(empty)}, which counts 0 in macro-F1 whatever the model"
                f" does; prepare the data with more {name} posts, or without"
                f" {'it' if len(empty) == 1 else 'them'}."
            )
        if name != "train" and split.rows:
            few = [
                label
                for label, count in zip(index.labels, split.label_counts, strict=True)
                if count < _FEW_POSTS
            ]
            remarks += [f"{name} has fewer than {_FEW_POSTS} posts of {_some(few)}"] if few else []
    return "; ".join(remarks)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (
        f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    )


def _overlap(store: Store, index: Index) -> str:
    """No text of the training split, normalised as `prepare` does, stands in another one too."""
    trained, looked_at = _text_hashes(store, index.split("train"), _TRAIN_LOOKED_AT)
    for name, split in index.splits.items():
        if name == "train" or split.rows == 0:
            continue
        held_out, _ = _text_hashes(store, split, _HELD_OUT_LOOKED_AT)
        if both := len(trained.keys() & held_out.keys()):
            example = held_out[next(iter(sorted(trained.keys() & held_out.keys())))]
            raise WrongRequest(
                f"{both} texts stand in train and in {name}, among them {example[:60]!r}, so that its score"
                " would be too good; prepare the data again, which keeps a text out of two splits."
            )
    total = index.split("train").rows
    return (
        f"no text in two splits ({'all' if looked_at == total else f'{looked_at:,} of'} {total:,} training"
        " posts)"
    )


def _text_hashes(store: Store, split: Split, most: int) -> tuple[dict[bytes, str], int]:
    """The beginning of each text by the hash of its normal form, of at most about `most` posts, and
    how many posts these are.
    """
    from emotion_train.data.cleaning import normalised
    from emotion_train.data.reader import RowGroupReader

    found: dict[bytes, str] = {}
    looked_at = 0
    with RowGroupReader(store, split, capacity=4) as reader:
        groups = range(len(split.row_groups))
        for place, group in enumerate(groups):
            reader.ask(groups[place : place + 3])
            rows = [text for text in reader.rows(group).texts if text]
            found |= {
                hashlib.blake2b(normalised(text).encode("utf-8", "replace"), digest_size=16).digest(): text[
                    :80
                ]
                for text in rows
            }
            looked_at += split.row_groups[group].rows
            if looked_at >= most:
                break
    return found, looked_at


# --- the output ---


def _output(config: Config) -> str:
    store = open_store(config.run.output_url)
    if config.run.kernels_url is not None:
        open_store(config.run.kernels_url)
    run_id = config.run.id
    require_conditional_writes(store, run_id or f"check-{secrets.token_hex(4)}", allow_unfenced=False)
    names = run_ids(store)
    words = (
        f"writable, keeps what was created, {len(names)} run{'' if len(names) == 1 else 's'} at"
        f" {config.run.output_url}"
    )
    if run_id in names:
        facts = summary(read_log(store, run_id))
        goes_on = (
            "would be printed, not trained again"
            if facts["state"] == "published"
            else "would go on from there"
        )
        words += f"; {run_id} is {facts['state']} at step {facts['step']} and {goes_on}"
    return words


def _planned_hours(config: Config, index: Index, store: Store, target: Target | None) -> float | None:
    """What `emotion-launch plan` expects on this machine; None where it knows nothing of it or the
    base cannot be read.
    """
    kind = None if target is None else kind_of(target.name)
    if kind is None or target is None:
        return None
    try:
        shape, work = shape_of_base(config.model.base), work_of(config, index, store, None)
    except WrongRequest:  # said by the check of the base
        return None
    found = best_settings(
        config, shape, work, kind, target.gpus, Offer(), spot_of(config, Spot()), config.model.precision
    )
    return (found.spot_hours or found.hours) if isinstance(found, Choice) else None


def _credentials(config: Config, hours: Callable[[], float | None]) -> str:
    """boto3's credentials are there and outlast the run, as far as they tell."""
    if not any(
        url.strip().lower().startswith("s3:")
        for url in (config.data.url, config.run.output_url, config.model.base, config.run.kernels_url or "")
    ):
        return "none needed: data and output are folders"
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        found = boto3.Session().get_credentials()
        token = found.get_frozen_credentials().token if found is not None else None
    except BotoCoreError as error:
        raise WrongRequest(
            f"The credentials for the bucket cannot be had ({error}); type `aws sso login` or set"
            " AWS_PROFILE."
        ) from None
    if found is None:
        raise WrongRequest(
            "There are no credentials for the bucket: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
            " AWS_PROFILE, or type `aws configure`."
        )
    ends: datetime | None = getattr(found, "_expiry_time", None)
    return _lasting(str(found.method), ends, token is not None, hours, datetime.now(UTC))


def _lasting(
    method: str, ends: datetime | None, temporary: bool, planned: Callable[[], float | None], now: datetime
) -> str:
    """Words on how long a credential lasts; raises `WrongRequest` when it ends within the run and
    nothing renews it.
    """
    if ends is None and not temporary:
        return f"from {method}, without an end"
    hours = planned()
    run = f" and the run takes {hours:.1f} hours" if hours is not None else ""
    if ends is None:
        return (
            f"from {method}, with a session token whose end is not known{run}: a role of the machine is safer"
        )
    left = (ends - now).total_seconds() / 3600
    if method in _RENEWED:
        return f"from {method}, renewed by itself (this one ends in {left:.1f} hours)"
    if left <= (hours or 0.0):
        raise WrongRequest(
            f"The credentials from {method} end in {left:.1f} hours{run}; renew them, or give the machine a"
            " role of its own, which is renewed by itself."
        )
    return f"from {method}, for {left:.1f} more hours{run}"


# --- the base ---


def _base(config: Config) -> str:
    """The base's small files are read; the hub is asked where they are not in its cache."""
    from emotion_train.data.tokenization import PostTokenizer

    base = BaseFiles.find(config.model.base)
    if base.gguf is not None:
        if find_spec("gguf") is None:
            raise WrongRequest(
                "model.base is a .gguf file and the package gguf is missing; type pip install"
                " 'emotion-train[gguf]'."
            )
        words = f"{base.gguf.name}, {base.gguf.stat().st_size / 2**20:.0f} MiB"
    elif base.staged is not None:
        words = _staged(base.staged, config.model.precision)
    else:
        base.required("config.json")
        words = _shards(base)
    PostTokenizer.load(config.model.base, config.data.max_length)
    return f"{words}, tokenizer loads"


def _staged(base: StagedBase, precision: Precision) -> str:
    """All objects are there in their size, and the staged numbers serve the run's precision."""
    base.refuse_other_precision(precision)
    if missing := base.missing():
        raise WrongRequest(
            f"{base.store.url_of(missing[0])} is missing or cut short; stage the base again into an empty"
            " place."
        )
    index = base.index
    return (
        f"{index.source}, staged at {base.store.url} as {index.precision}, {index.bytes / 1e9:.1f} GB, all"
        " objects there"
    )


def _shards(base: BaseFiles) -> str:
    """All files of weights are in the folder, in the hub's cache, or still to be downloaded."""
    index = base.file("model.safetensors.index.json")
    if index is None:
        if base.folder is not None:
            base.required("model.safetensors")
        return f"{base.name}, one file of weights"
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        names, total = (
            sorted(set(document["weight_map"].values())),
            document.get("metadata", {}).get("total_size", 0),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WrongRequest(f"{index} is no safetensors index; download it again.") from None
    if base.folder is not None:
        for name in names:
            base.required(name)
        return f"{base.name}, {len(names)} files of weights"
    from huggingface_hub import try_to_load_from_cache

    cached = [name for name in names if isinstance(try_to_load_from_cache(base.name, name), str)]
    if len(cached) == len(names):
        return f"{base.name}, all {len(names)} files of weights are in this machine's hub cache"
    return (
        f"{base.name}, the hub has it: {len(names)} files of weights, {total / 1e9:.0f} GB to download where"
        " it trains"
    )


def _memory(config: Config, target: Target | None, index: Callable[[], Index]) -> str:
    """The config's precision and micro-batch fit the GPU, or several that share; raises
    `WrongRequest` with the nearest that does.
    """
    if target is None:
        return (
            "no NVIDIA GPU is visible here; --gpus H100:1 checks for another machine, emotion-launch plan"
            " compares all"
        )
    shape, labels = shape_of_base(config.model.base), len(index().labels)
    lora, train, precision = config.lora, config.train, config.model.precision
    available = target.memory_mib * MIB
    where = f"{target.name} with {available / GIB:.1f} GiB"
    auto, fused = train.tokens_per_microbatch == "auto", config.model.decoder == "fused"
    tokens = config.data.max_length if auto else train.microbatch_tokens  # auto: what it may come down to
    again = train.gradient_checkpointing or (auto and "gradient_checkpointing" not in train.model_fields_set)
    memory = estimate(
        shape, precision, lora.r, lora.targets, tokens, again, labels, lora_dropout=lora.dropout, fused=fused
    )
    if memory.total <= usable_bytes(available):
        return f"{'at least ' if auto else ''}{memory} of {where}"
    if target.gpus > 1:
        alike = tuple(Gpu(str(number), "", target.name, target.memory_mib) for number in range(target.gpus))
        name, why = by_memory(Topology(alike, target.gpus), config)
        return f"{name}: {why}"
    problem = (
        f"{config.model.base} in {precision} with {tokens} tokens a micro-batch takes"
        f" {memory.total / GIB:.1f} GiB of {where}"
    )
    for one in (precision, "nf4"):
        found = largest_microbatch(
            shape,
            one,
            lora.r,
            lora.targets,
            labels,
            available,
            longest_post=config.data.max_length,
            most_tokens=tokens,
            lora_dropout=lora.dropout,
            fused=fused,
            gradient_checkpointing=again if auto else None,
        )
        if found is not None:
            words = [f"model.precision={one}"] if one != precision else []
            words += [f"train.tokens_per_microbatch={found.tokens}"] if found.tokens != tokens else []
            words += (
                [f"train.gradient_checkpointing={str(found.gradient_checkpointing).lower()}"]
                if found.gradient_checkpointing != again
                else []
            )
            raise WrongRequest(f"{problem}; type {' '.join(words)}.")
    raise WrongRequest(f"{problem}, and nothing smaller fits; `emotion-launch plan` names GPUs that do.")


# --- this machine ---


def _machine(config: Config, gpus: Sequence[Gpu], accelerate_config: str | None) -> str:
    choice = choose(gpus, accelerate_config, config)
    return f"{choice.config_file.stem}: {choice.reason}"


def _precision(
    config: Config, wanted_gpus: str | None, gpus: Sequence[Gpu], accelerate_config: str | None
) -> str:
    """The machine and the base are such that the base can be computed in this precision, and its
    package is here.
    """
    precision, here = config.model.precision, wanted_gpus is None
    if precision == "nf4" and here and find_spec("bitsandbytes") is None:
        raise WrongRequest(
            "model.precision is nf4 and the package bitsandbytes is missing; type pip install"
            " 'emotion-train[gpu]' or model.precision=bf16."
        )
    on_cpu = here and asked_for(gpus, accelerate_config)[1].on_cpu
    if precision == "fp8":
        target = None if on_cpu else target_of(wanted_gpus, gpus)
        kind = None if target is None else kind_of(target.name)
        if target is None or (kind is not None and not kind.fp8):
            raise WrongRequest(
                f"model.precision is fp8 and {'the CPU' if target is None else target.name} has no float8"
                f" units, as have {', '.join(one.name for one in GPU_KINDS if one.fp8)}; type"
                " model.precision=bf16, or nf4 for a quarter of its memory."
            )
        refuse_unfused_fp8(config, shape_of_base(config.model.base), "model.precision=")
    where = wanted_gpus or ("the CPU" if on_cpu else gpus[0].name)
    return f"{precision} on {where}"


def _trackers(config: Config) -> str:
    require_trackers(config)
    return ", ".join(config.run.trackers) or "none"


def _disk() -> str:
    import tempfile

    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_DISK_BYTES:
        raise WrongRequest(
            f"{folder} has {free / 2**30:.1f} GiB free and 2 GiB are needed; free some or set TMPDIR to a"
            " larger disk."
        )
    return f"{free / 2**30:.0f} GiB free in {folder}"
