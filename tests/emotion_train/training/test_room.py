"""A start that finds its GPU too full, on pretended GPUs: what is read of their memory is given by
a function.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from emotion_train import cli
from emotion_train.config import Config, load_config
from emotion_train.errors import NotStarted
from emotion_train.runs.log import Writer, read_log
from emotion_train.sizing.memory import GIB
from emotion_train.sizing.shape import Shape
from emotion_train.training import microbatch, room
from emotion_train.training.job import Job
from emotion_train.training.microbatch import setting_for
from emotion_train.training.room import wait_for_room
from tests.helpers.tiny_runs import job_of, tiny_config, tiny_words
from tests.launch.test_does_it_fit import MISTRAL_SMALL  # some 13 GiB in nf4 before the first token

LABELS = ("calm", "glee", "rage")
WHOLE = 44.4


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_LOOK_EVERY_S", 0.01)


def asked(*words: str) -> Config:
    return load_config(None, ["data.url=d", "run.output_url=o", "train.tokens_per_microbatch=auto", *words])


class Start:
    """A start on one GPU or several, after its claim; `free` is what it reads of its own (GiB)."""

    def __init__(
        self, config: Config, free: Callable[[], float], others: tuple[float, ...] = (), going: bool = False
    ) -> None:
        self.asked, self.reads, self.settled = config, 0, list[float]()
        self.free = free
        ranks = SimpleNamespace(
            gather=lambda own: [own, *(int(one * GIB) for one in others if self.reads)],
            from_main=lambda value: value,
            sum=lambda values: values.astype(float),
            is_main=True,
            world_size=1 + len(others),
        )
        self.job: Job = self._job(cast(Any, ranks), going)

    def _job(self, ranks: Any, going: bool) -> Job:
        nothing: Any = None
        base: Any = SimpleNamespace(text=SimpleNamespace(to_dict=lambda: MISTRAL_SMALL))
        accelerator: Any = SimpleNamespace(device=torch.device("cuda"))
        index: Any = SimpleNamespace(labels=LABELS, trained_labels=LABELS)
        interruptions: Any = SimpleNamespace(going=lambda: going)
        self.base, self.world_size = base, ranks.world_size
        config = self.settle(read=lambda device: int(WHOLE * GIB))
        engine: Any = "one process" if ranks.world_size == 1 else "DDP"
        return Job(
            config=config,
            index=index,
            data_store=nothing,
            output_store=nothing,
            run_id="run",
            accelerator=accelerator,
            engine=engine,
            ranks=ranks,
            interruptions=interruptions,
            tokenizer=nothing,
            started=nothing,
            again="again",
            base=base,
        )

    def settle(self, *, read: Callable[[torch.device], int]) -> Config:
        if self.asked.train.tokens_per_microbatch != "auto":
            return self.asked
        gpu_bytes = read(torch.device("cuda"))
        self.settled.append(gpu_bytes / GIB)
        shape = Shape.of(MISTRAL_SMALL)
        engine: Any = "one process" if self.world_size == 1 else "DDP"
        found = setting_for(self.asked, shape, len(LABELS), gpu_bytes, 16_000, engine, self.world_size)
        update = {
            "tokens_per_microbatch": found.tokens,
            "gradient_checkpointing": found.gradient_checkpointing,
        }
        return self.asked.model_copy(update={"train": self.asked.train.model_copy(update=update)})

    def read(self, device: torch.device) -> int:
        self.reads += 1
        return int(self.free() * GIB)

    def waited(self, wait_s: float = 0.2) -> Job:
        return wait_for_room(self.job, self.settle, self.read, lambda device: int(WHOLE * GIB), wait_s=wait_s)


def freed_after(looks: int, before: float, after: float = WHOLE) -> Callable[[], float]:
    """What is free on a GPU whose predecessor leaves after so many looks."""
    left = iter(range(looks))
    return lambda: before if next(left, None) is not None else after


@pytest.mark.parametrize("words", [[], ["train.tokens_per_microbatch=4096"]])
def test_a_predecessor_that_leaves_is_waited_for_and_changes_no_setting(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    start = Start(asked(*words), freed_after(5, before=4.0))
    assert start.waited(wait_s=600) is start.job
    assert start.reads == 6
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert "waiting for the start before this one to leave the GPU, for 600 s at most" in told[0]
    assert "are needed and 3.1 GiB are free" in told[0]  # of 4, less the context and what is lost between


def test_a_gpu_that_nobody_holds_is_waited_for_by_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    start = Start(asked(), lambda: WHOLE)
    assert start.waited(wait_s=600) is start.job
    assert (start.reads, capfd.readouterr().err) == (1, "")


def test_a_context_of_its_own_is_no_predecessor_and_is_left_free() -> None:
    """On an empty GPU too less is free than it has; the setting then comes down by that."""
    start = Start(asked(), lambda: WHOLE - 1.5)  # the setting leaves 1.2 of the whole
    job = start.waited(wait_s=600)
    assert start.reads == 1
    assert start.settled == pytest.approx([WHOLE, WHOLE - 1.5])
    assert 0 < job.config.train.microbatch_tokens < start.job.config.train.microbatch_tokens


def test_what_is_still_held_after_the_wait_makes_the_micro_batch_smaller() -> None:
    start = Start(asked(), lambda: 22.0)
    began = time.monotonic()
    job = start.waited()
    assert 0.2 <= time.monotonic() - began < 5
    assert start.settled == pytest.approx([WHOLE, 22.0])
    assert job.config.train.microbatch_tokens < start.job.config.train.microbatch_tokens
    assert job.run_id == start.job.run_id


@pytest.mark.parametrize("words", [[], ["train.tokens_per_microbatch=4096"]])
def test_a_gpu_that_stays_full_ends_the_start_with_1_and_one_sentence(words: list[str]) -> None:
    with pytest.raises(NotStarted) as ended:
        Start(asked(*words), lambda: 4.0).waited()
    assert ended.value.exit_code == 1
    sentence = str(ended.value)
    assert "The run did not start: another program holds the GPU and did not leave it within 0 s" in sentence
    assert sentence.endswith("; end what nvidia-smi lists there, then type the same command again.")


def test_a_number_that_exceeds_the_whole_gpu_is_tried_at_once() -> None:
    start = Start(asked("train.tokens_per_microbatch=16000", "model.precision=bf16"), lambda: 4.0)
    assert start.waited(wait_s=600) is start.job
    assert start.reads == 0


def test_the_fullest_gpu_of_all_ranks_is_waited_for() -> None:
    start = Start(asked(), lambda: WHOLE, others=(WHOLE, 22.0))
    assert start.waited().config.train.microbatch_tokens < start.job.config.train.microbatch_tokens
    assert start.settled[-1] == 22.0


def test_a_preemption_notice_ends_the_wait() -> None:
    start = Start(asked(), lambda: 4.0, going=True)
    assert start.waited(wait_s=600) is start.job


def test_without_a_gpu_nothing_is_read_and_nothing_changes(tmp_path: Path) -> None:
    job = job_of(tiny_config(tmp_path))

    def never(*given: object, **named: object) -> Any:
        raise AssertionError("nothing is read")

    assert wait_for_room(job, never, never, never) is job


def test_a_run_that_another_start_has_claimed_counts_its_gpu_whole_and_waits_after_its_own_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = tiny_config(tmp_path)
    job, counted = job_of(config), list[str]()

    def kinds() -> list[str]:
        return [entry.kind for entry in read_log(job.output_store, "tiny")]

    def settle(*given: Any, read: Callable[[torch.device], int]) -> Config:
        counted.append(read.__name__)
        return microbatch_settle(*given, read=read)

    def wait_in_vain(*given: Any) -> Job:
        raise NotStarted(f"no room after {kinds()}")

    microbatch_settle: Callable[..., Config] = microbatch.settle
    monkeypatch.setattr(microbatch, "settle", settle)
    monkeypatch.setattr(room, "wait_for_room", wait_in_vain)
    Writer(job.output_store, "tiny", job.index.sha256(), config.sha256()).claim(0, 0)
    assert cli.main(["train", *tiny_words(tmp_path)]) == 1
    assert counted == ["whole_memory_of"]
    assert "no room after ['claim', 'claim']" in capfd.readouterr().err
