"""Check, run, the trainer, plan and predict answer alike whether a base fits a GPU, and name the
same setting that would: over all kinds of GPU, precisions, ranks and lengths, by arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from emotion_train.config import Config, load_config
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import refuse_small_gpu
from emotion_train.processes import machine
from emotion_train.training.engines import Kind
from emotion_train.training.job import too_small
from emotion_train.training.microbatch import setting_for
from launch.check.machine import check_memory, target_of
from launch.gpus import GPU_KINDS, GpuKind
from launch.plan.choices import Choice, TooSmall, best_settings
from launch.plan.prices import Offer
from launch.plan.spot import Spot
from launch.run.choice import by_memory
from launch.run.topology import Gpu, Topology
from launch.workload import Work, config_on, shape_of_base

LABELS = 28  # as many as `run` assumes, which reads no index
SHARE = 20_000  # tokens of a step, more than the largest micro-batch has
INDEX: Any = SimpleNamespace(labels=["label"] * LABELS, trained_labels=["label"] * LABELS)
MISTRAL_SMALL = {
    "model_type": "mistral",
    "hidden_size": 5120,
    "intermediate_size": 32_768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131_072,
}
ENGINES: dict[str, Kind] = {
    "single_gpu_qlora": "one process",
    "multi_gpu_ddp": "DDP",
    "multi_gpu_deepspeed_zero2": "DeepSpeed ZeRO-2",
    "multi_gpu_fsdp2_qlora": "FSDP2",
}


@cache
def config_of(*words: str) -> Config:
    return load_config(None, ["data.url=d", "run.output_url=o", *words])


# of equal memory one is enough
KINDS = tuple({kind.gb: kind for kind in reversed(GPU_KINDS) if kind.runs}.values())


class Case(NamedTuple):
    kind: GpuKind
    words: tuple[str, ...]

    @property
    def config(self) -> Config:
        return config_on(config_of(*self.words), self.kind)


def cases(tokens: str) -> Iterator[Case]:
    precisions, ranks, lengths = ("nf4", "bf16", "fp8", "fp32"), (16, 256, 1024), (128, 2048)
    for kind, precision, r, longest in product(KINDS, precisions, ranks, lengths):
        if precision == "fp8" and not kind.bf16:
            continue
        if tokens == "auto" or int(tokens) >= longest:
            yield Case(
                kind,
                (
                    f"model.precision={precision}",
                    f"lora.r={r}",
                    f"data.max_length={longest}",
                    f"train.tokens_per_microbatch={tokens}",
                ),
            )


def refusal(answer: Any, *arguments: Any) -> str | None:
    """The sentence with which it refuses; None where it fits."""
    try:
        answer(*arguments)
    except WrongRequest as error:
        return str(error)
    return None


def check(case: Case, count: int = 1) -> str | None:
    return refusal(check_memory, case.config, target_of(f"{case.kind.name}:{count}", []), lambda: INDEX)


def topology_of(case: Case, count: int = 1) -> Topology:
    gpus = tuple(Gpu(str(place), "", case.kind.name, case.kind.memory_mib) for place in range(count))
    return Topology(gpus, count)


def run(case: Case, count: int = 1) -> str | None:
    return refusal(by_memory, topology_of(case, count), case.config)


def trainer(case: Case, engine: Kind = "one process", count: int = 1) -> str | None:
    shape = shape_of_base(case.config.model.base)
    return refusal(setting_for, case.config, shape, LABELS, case.kind.memory_bytes, SHARE, engine, count)


def predict(case: Case) -> str | None:
    base, precision = case.config.model.base, case.config.model.precision
    return refusal(refuse_small_gpu, base, shape_of_base(base), precision, case.kind.memory_bytes)


@pytest.mark.parametrize("tokens", ["auto", "4096", "8192"])
def test_all_programs_refuse_the_same_with_the_same_sentence(tokens: str) -> None:
    verdicts = set()
    for case in cases(tokens):
        refused = trainer(case)
        assert check(case) == run(case) == refused, case
        verdicts.add(refused is None)
        if refused is None:
            assert predict(case) is None, case
        elif sentence := predict(case):
            beginning = refused[: refused.index(":")]
            assert beginning.endswith(f"does not fit a GPU of {case.kind.memory_bytes / 2**30:.1f} GiB")
            assert sentence.startswith(beginning), case
    assert verdicts == {True, False}


@pytest.mark.parametrize("tokens", ["auto", "4096", "8192"])
def test_what_a_refusal_says_to_type_fits_as_it_is(tokens: str) -> None:
    remedies = set()
    for case in cases(tokens):
        refused = trainer(case)
        if refused is None or "; type " not in refused:
            continue
        words = refused.partition("; type ")[2].rstrip(".").split()
        names = {word.partition("=")[0] for word in words}
        kept = [word for word in case.words if word.partition("=")[0] not in names]
        mended = Case(case.kind, (*kept, *words))
        assert check(mended) is run(mended) is trainer(mended) is predict(mended) is None, (case, words)
        remedies |= names
    assert "model.precision" in remedies
    assert ("train.tokens_per_microbatch" in remedies) == (tokens != "auto")


def test_the_largest_number_of_tokens_that_fits_is_named() -> None:
    """One more quantum is refused by all; on an L40S check named 4,608 tokens and run 4,096."""
    for case in cases("8192"):
        refused = trainer(case)
        found = re.search(r"train\.tokens_per_microbatch=(\d+)\.$", refused or "")
        if found is None or int(found[1]) < 256:
            continue
        words = (refused or "").partition("; type ")[2].rstrip(".").split()[:-1]
        names = {word.partition("=")[0] for word in words} | {"train.tokens_per_microbatch"}
        kept = [word for word in case.words if word.partition("=")[0] not in names]
        more = f"train.tokens_per_microbatch={int(found[1]) + 256}"
        assert trainer(Case(case.kind, (*kept, *words, more))) is not None, case


def test_an_l40s_in_bf16_is_refused_by_all_where_run_said_tight() -> None:
    kind = next(kind for kind in GPU_KINDS if kind.name == "L40S")
    case = Case(kind, ("model.precision=bf16",))
    assert trainer(case) == check(case) == run(case)
    assert re.fullmatch(
        r"\S+ in bf16 does not fit a GPU of 45\.0 GiB: even with one post of 128 tokens at a time( and"
        r" recomputation)? it needs 4[3-5]\.\d GiB and 42\.4 are usable; type model\.precision=nf4\.",
        trainer(case) or "",
    )


def test_a_plan_takes_what_the_trainer_takes_and_passes_over_what_it_refuses() -> None:
    for case in cases("auto"):
        config, shape = case.config, shape_of_base(case.config.model.base)
        longest = config.data.max_length
        work = Work(10_000, 1000, 1, 64, (longest,) * 64, LABELS, longest)
        planned = best_settings(config, shape, work, case.kind, 1, Offer(), Spot(), config.model.precision)
        refused = trainer(case)
        assert isinstance(planned, Choice) == (refused is None), case
        if isinstance(planned, TooSmall):
            assert f" needs {planned.memory.total / 2**30:.1f}" in (refused or ""), case


@pytest.mark.parametrize("tokens", ["auto", "4096"])
def test_the_trainer_takes_the_layout_that_run_gives_it_on_several_gpus(tokens: str) -> None:
    given = set()
    for case in cases(tokens):
        refused = run(case, 4)
        assert check(case, 4) == refused
        if refused is not None:
            assert all(trainer(case, engine, 4) for engine in ("DDP", "DeepSpeed ZeRO-2")), case
            assert case.config.model.precision == "fp8" or trainer(case, "FSDP2", 4), case
            continue
        name, _ = by_memory(topology_of(case, 4), case.config)
        assert trainer(case, ENGINES[name], 4) is None, case
        given.add(name)
    assert given >= {"multi_gpu_ddp", "multi_gpu_fsdp2_qlora"}


def test_the_trainer_takes_an_optimizer_that_only_fits_in_shards() -> None:
    kind = next(kind for kind in GPU_KINDS if kind.name == "H100")
    case = Case(kind, ("lora.r=1024", "lora.targets=all-linear"))
    name, _ = by_memory(topology_of(case, 8), case.config)
    assert name == "multi_gpu_deepspeed_zero2"
    assert trainer(case, "DDP", 8) is not None
    assert trainer(case, ENGINES[name], 8) is None


def test_a_run_that_finds_no_memory_left_is_told_the_same_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 0
    for plain in cases("4096"):
        case = plain._replace(words=(*plain.words, "model.keep_unpacked=true"))
        memory_bytes = case.kind.memory_bytes
        monkeypatch.setattr(machine, "memory_of", lambda device, memory_bytes=memory_bytes: memory_bytes)
        job: Any = SimpleNamespace(
            config=case.config,
            base=SimpleNamespace(text=SimpleNamespace(to_dict=lambda: MISTRAL_SMALL)),
            index=INDEX,
            engine="one process",
            ranks=SimpleNamespace(world_size=1),
            accelerator=SimpleNamespace(device=torch.device("cpu")),
        )
        sentence, refused = too_small(job), trainer(case)
        told, _, rest = sentence.partition(". The run ")
        assert rest == "resumes from its last checkpoint."
        if refused is not None:
            assert f"{told}." == refused, case
        if "model.keep_unpacked" in sentence:  # what nothing needed is given back first
            assert case.config.model.precision == "nf4"
            assert refused is None
            kept += 1
        elif refused is None:
            assert "ran out of the memory of" in sentence, case
            assert "; take" not in sentence or case.config.model.precision == "nf4", case
    assert kept
