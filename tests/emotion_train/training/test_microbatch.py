"""`train.tokens_per_microbatch: auto` on pretended GPUs, and in a run on the CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emotion_train import cli
from emotion_train.config import Config, load_config
from emotion_train.data.index import read_index
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.load import read_config
from emotion_train.processes import machine
from emotion_train.processes.machine import memory_of
from emotion_train.sizing.memory import GIB, estimate, usable_bytes
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from emotion_train.training import room, start
from emotion_train.training.engines import Kind
from emotion_train.training.job import too_small
from emotion_train.training.microbatch import Setting, setting_for, settle, tokens_of_a_step
from tests.helpers.tiny_runs import tiny_config, tiny_words

MISTRAL_SMALL = Shape(5120, 32_768, 40, 32, 8, 128, 131_072)
AUTO = "train.tokens_per_microbatch=auto"


def config(*words: str) -> Config:
    return load_config(None, ["data.url=d", "run.output_url=o", AUTO, *words])


def chosen(
    gpu_gib: float, *words: str, share: int = 16_000, engine: Kind = "one process", world_size: int = 1
) -> Setting:
    return setting_for(config(*words), MISTRAL_SMALL, 15, int(gpu_gib * GIB), share, engine, world_size)


def beyond(found: Setting, gpu_gib: float, tokens: int) -> int:
    """Bytes by which so many tokens exceed what the GPU can give."""
    planned = estimate(Recipe(MISTRAL_SMALL, "nf4"), tokens, found.gradient_checkpointing)
    return planned.total - usable_bytes(int(gpu_gib * GIB))


def test_as_many_tokens_as_fit_the_gpu_are_taken() -> None:
    for gib in (22.5, 44.4, 79.6):
        found = chosen(gib)
        assert beyond(found, gib, found.tokens) <= 0 < beyond(found, gib, found.tokens + 256)


def test_recomputation_is_switched_on_where_it_is_the_only_way_unless_the_config_says() -> None:
    small = chosen(17)
    assert small.gradient_checkpointing
    assert not chosen(79.6).gradient_checkpointing
    assert chosen(79.6, "train.gradient_checkpointing=true").gradient_checkpointing
    kept = chosen(17, "train.gradient_checkpointing=false")
    assert not kept.gradient_checkpointing
    assert kept.tokens < small.tokens


def test_a_micro_batch_is_no_larger_than_a_step() -> None:
    found = chosen(79.6, share=1100)
    assert found.tokens == 1280
    assert "all that a step has" in found.why


@pytest.mark.parametrize(
    ("gib", "words", "engine", "world_size", "remedy"),
    [
        (22.5, ["model.precision=bf16"], "one process", 1, "model.precision=nf4"),
        (
            16.0,
            ["train.gradient_checkpointing=false", "data.max_length=512"],
            "one process",
            1,
            "train.gradient_checkpointing=true",
        ),
        (22.5, ["model.precision=bf16"], "DDP", 4, "model.precision=nf4"),
        (12.0, [], "DDP", 4, "--config_file accelerate_configs/multi_gpu_fsdp2_qlora.yaml"),
        (8.0, [], "one process", 1, None),
    ],
)
def test_a_base_that_does_not_fit_is_refused_with_the_nearest_setting_that_does(
    gib: float, words: list[str], engine: Kind, world_size: int, remedy: str | None
) -> None:
    with pytest.raises(WrongRequest) as refused:
        chosen(gib, *words, engine=engine, world_size=world_size)
    if remedy is None:
        assert "; take a smaller model.base, or a larger GPU" in str(refused.value)
        return
    assert str(refused.value).endswith(f"; type {remedy}.")
    if remedy.startswith("--config_file"):
        assert chosen(gib, *words, engine="FSDP2", world_size=world_size).tokens >= 128
    elif "=" in remedy:
        others = [word for word in words if word.partition("=")[0] != remedy.partition("=")[0]]
        assert chosen(gib, *others, remedy, engine=engine, world_size=world_size).tokens >= 128


def test_sharded_bases_take_less_of_each_gpu() -> None:
    with pytest.raises(WrongRequest):
        chosen(22.5, "model.precision=bf16", engine="DDP", world_size=4)
    assert chosen(22.5, "model.precision=bf16", engine="FSDP2", world_size=4).tokens >= 128


def test_nearly_every_step_fits_what_a_step_is_said_to_have() -> None:
    draw = random.Random(0)
    lengths = [max(3, min(128, round(draw.gammavariate(3.2, 17.8 / 3.2)))) for _ in range(4096)]
    for world_size in (1, 4):
        share = tokens_of_a_step(config("train.global_batch_size=448"), lengths, 100_000, world_size)
        steps = [sum(draw.choices(lengths, k=448 // world_size)) for _ in range(1000)]
        assert sum(tokens > share for tokens in steps) < 10
        assert share < 1.25 * sum(steps) / len(steps)


# --- with a data set ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    tiny_config(folder)
    return folder


def settled(
    folder: Path, gpus: list[int | None], said: list[str], *words: str, own: int | None = None
) -> Config:
    """By the first of several ranks, whose GPUs have these sizes."""
    given = tiny_config(folder, AUTO, *words)
    store = open_store(given.data.url)
    ranks: Any = SimpleNamespace(
        gather=lambda own: [own, *gpus[1:]], on_main=lambda do: do(), is_main=True, world_size=len(gpus)
    )
    tokenizer = PostTokenizer.load(given.model.base, given.data.max_length)
    device = torch.device("cpu" if gpus[0] is None else "cuda")
    base = read_config(given.model.base)
    return settle(
        given,
        base,
        read_index(store),
        store,
        tokenizer,
        "one process",
        ranks,
        device,
        said.append,
        read=lambda device: own or 0,
    )


def test_the_smallest_gpu_of_all_ranks_decides(folder: Path) -> None:
    words = ["train.global_batch_size=100000", "model.precision=bf16", "model.decoder=stock", "lora.r=1024"]
    small, large = (int(usable / 0.96 + 0.79 * GIB) for usable in (60e6, 1e9))
    found = []
    for sizes in ([large], [large, small], [small, large], [small]):
        said: list[str] = []
        found.append(settled(folder, list(sizes), said, *words, own=sizes[0]).train)
        assert f"micro-batches of {found[-1].microbatch_tokens:,} tokens" in said[0]
        assert "tokens_per_microbatch is auto" in said[0]
    alone, mixed, turned, small_alone = found
    assert mixed == turned
    assert mixed.microbatch_tokens <= small_alone.microbatch_tokens < alone.microbatch_tokens


@pytest.mark.gpu
def test_a_gpu_s_memory_is_read_less_what_others_hold() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    before = memory_of(torch.device("cuda"))
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    assert 0.5 * total < before <= total
    # its own is no other's
    assert memory_of(torch.device("cuda")) == pytest.approx(before, abs=GIB // 2), held.device


def test_without_a_gpu_auto_is_the_default(folder: Path) -> None:
    said: list[str] = []
    assert settled(folder, [None], said).train.tokens_per_microbatch == 4096
    assert settled(folder, [None], said, "data.max_length=8192").train.tokens_per_microbatch == 8192
    assert all("no GPU to fill" in words for words in said)


def test_a_number_stays_what_it_is(folder: Path) -> None:
    said: list[str] = []
    given = tiny_config(folder)
    nothing: Any = None
    assert (
        settle(
            given,
            nothing,
            nothing,
            nothing,
            nothing,
            "one process",
            nothing,
            torch.device("cuda"),
            said.append,
        )
        is given
    )
    assert not said


def test_a_run_with_auto_is_published_with_the_number_that_it_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert cli.main(["train", *tiny_words(folder, AUTO, "train.epochs=1", "run.id=auto")]) == 0
    assert "micro-batches of 4,096 tokens without recomputation" in capfd.readouterr().err
    report = next((folder / "runs" / "auto").rglob("report.json"))
    assert json.loads(report.read_text())["identity"]["config"]["train"]["tokens_per_microbatch"] == 4096


def job_on(device: str, *words: str, engine: Kind = "one process", world_size: int = 1) -> Any:
    """What is asked of a job before its weights are read."""
    text = {"model_type": "mistral", "num_hidden_layers": 40, "hidden_size": 5120}
    text |= {"intermediate_size": 32_768, "num_attention_heads": 32, "num_key_value_heads": 8}
    text |= {"head_dim": 128, "vocab_size": 131_072, "max_position_embeddings": 131_072}
    return SimpleNamespace(
        config=config(*words),
        accelerator=SimpleNamespace(device=torch.device(device)),
        base=SimpleNamespace(text=SimpleNamespace(to_dict=lambda: text, num_hidden_layers=40)),
        index=SimpleNamespace(trained_labels=range(15)),
        engine=engine,
        ranks=SimpleNamespace(world_size=world_size, is_main=True),
    )


def test_zero_3_is_sized_as_transformers_modules_also_after_the_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "memory_of", lambda device: 24 * GIB)
    words = ("train.tokens_per_microbatch=8192", "model.precision=bf16")
    engines: tuple[tuple[Kind, bool], ...] = (("DeepSpeed ZeRO-3", True), ("FSDP2", False))
    for engine, same in engines:
        fused, stock = (
            job_on("cuda", *words, f"model.decoder={decoder}", engine=engine, world_size=4)
            for decoder in ("fused", "stock")
        )
        assert (room._needed(fused, fused.config) == room._needed(stock, stock.config)) == same
        assert (too_small(fused) == too_small(stock)) == same


@pytest.mark.parametrize(("gpu_gib", "blocks"), [(79.6, 40), (44.4, 16), (22.3, 0)])
def test_a_run_keeps_blocks_unpacked_in_what_memory_its_gpu_has_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu_gib: float, blocks: int
) -> None:
    monkeypatch.setattr(machine, "memory_of", lambda device: int(gpu_gib * GIB))
    asked: list[int] = []

    def keep_unpacked(count: int) -> int:
        asked.append(count)
        return count

    def keep(*words: str, device: str = "cuda") -> list[int]:
        job = job_on(device, "train.tokens_per_microbatch=1536", "model.keep_unpacked=true", *words)
        asked.clear()
        model: Any = SimpleNamespace(decoder=SimpleNamespace(keep_unpacked=keep_unpacked))
        start._keep_unpacked(job, model)
        return asked

    assert keep() == [blocks]
    said = capsys.readouterr().err
    assert (f"the weights of {blocks} of 40 blocks are kept unpacked" in said) == (blocks > 0)
    assert keep("model.keep_unpacked=false") == [0]
    assert keep("model.precision=bf16") == [0]
    assert keep(device="cpu") == []
