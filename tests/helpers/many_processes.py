"""What each of several processes runs: trains by the engines it is told of, one after another, and
writes what came out.

    with Crew(folder, 2) as crew:
        outcomes = crew.train([Leg("DDP", words, 5, f"{folder}/out")])

Starting processes and importing PyTorch takes longer than all the rest, so the processes of a crew
stay for many plans, each a list of `Leg`s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from emotion_train.config import load_config
from emotion_train.training.engines import Kind, start_accelerator
from emotion_train.training.trainer import Trainer
from tests.helpers.patience import PATIENCE_S
from tests.helpers.plain_kernels import cut_base_on_cpu
from tests.helpers.tiny_runs import start_trainer


@dataclass(frozen=True)
class Leg:
    """Train `steps` steps of a run from where it stands, and save; None trains to its end with the
    evaluations that are due.

    `blank`: the first post of each row group has lost its text. `late_s`: so long does a row group
    take, times the rank's number from 1. `plain`: the base is cut as for a GPU, and the fused
    decoder computes by plain PyTorch.
    """

    engine: Kind
    words: list[str]
    steps: int | None
    out: str
    blank: bool = False
    late_s: float = 0.0
    plain: bool = False


TENSORS = ("adapter", "moments", "average")


@dataclass(frozen=True)
class Outcome:
    """What rank 0 has after a leg: the losses of its steps (between two evaluations their mean),
    and whole tensors.
    """

    losses: list[float]
    first_step: int
    packs: list[int]
    bad_rows: int
    world_size: int
    wrapper: str
    adapter: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    probabilities: dict[str, list[float]]  # of each validation post
    average: dict[str, torch.Tensor]  # empty without train.ema


def train_leg(leg: Leg, trainer: Trainer) -> Outcome:
    """The steps of a leg on this rank."""
    if leg.blank:
        blank_first_posts(trainer)
    if leg.late_s:
        read_late(trainer, leg.late_s)
    first = trainer.progress.step
    packs, losses = to_its_end(trainer) if leg.steps is None else some_steps(trainer, leg.steps)
    by_mean = None
    if trainer.config.train.ema:
        with trainer.average.applied():
            by_mean = trainer.score(trainer.validation_loader, lambda done: None).predictions.prob_NC
    trainer._save({})
    if trainer.saver is not None:
        assert trainer.saver.drain(PATIENCE_S)
    adapter = {name: tensor.clone() for name, tensor in trainer.engine.adapter().items()}
    moments = {name: tensor.clone() for name, tensor in trainer.engine.moments().items()}
    if average := trainer.average.whole():
        trainer.engine.load_adapter(average)
        scored = trainer.score(trainer.validation_loader, lambda done: None).predictions.prob_NC
        assert by_mean is not None
        np.testing.assert_allclose(scored, by_mean, atol=1e-6)
    trainer.engine.load_adapter(adapter)  # as before the report: what is scored is what was saved
    parts = trainer.ranks.gather(trainer.score(trainer.validation_loader, lambda done: None).predictions)
    return Outcome(
        losses=losses,
        first_step=first,
        packs=packs,
        bad_rows=trainer.progress.bad_rows,
        world_size=trainer.ranks.world_size,
        wrapper=type(trainer.engine.module).__name__,
        adapter=adapter,
        moments=moments,
        probabilities={
            post: row.tolist() for part in parts for post, row in zip(part.ids, part.prob_NC, strict=True)
        },
        average=average,
    )


def some_steps(trainer: Trainer, steps: int) -> tuple[list[int], list[float]]:
    """Packs and loss of each step."""
    first, packs = trainer.progress.step, list[int]()
    trainer.model.train()
    while trainer.progress.step < first + steps:
        epoch, step = divmod(trainer.progress.step, trainer.steps_per_epoch)
        batches = trainer.train_loader.steps(epoch, step)
        for batch in islice(batches, first + steps - trainer.progress.step):
            packs.append(len(batch.packs))
            trainer._step(batch)
        batches.close()
    return packs, trainer.ledger.add_up()


def to_its_end(trainer: Trainer) -> tuple[list[int], list[float]]:
    """No packs, and the losses that the evaluations note."""
    trainer.fit()
    losses = []
    for noted in trainer.progress.history:
        loss = noted["train_loss"]
        assert loss is not None
        losses.append(float(loss))
    return [], losses


def read_late(trainer: Trainer, seconds: float) -> None:
    reader, rank = trainer.train_loader._reader, trainer.ranks.rank
    real = reader.rows

    def late(group: int) -> object:
        time.sleep(seconds * (1 + rank))
        return real(group)

    reader.rows = late  # type: ignore[method-assign, assignment]


def blank_first_posts(trainer: Trainer) -> None:
    reader = trainer.train_loader._reader
    real = reader.rows

    def without_a_text(group: int) -> object:
        rows = real(group)
        return rows._replace(texts=["  ", *rows.texts[1:]])

    reader.rows = without_a_text  # type: ignore[method-assign, assignment]


def save_outcome(outcome: Outcome, path: Path) -> None:
    tensors = {f"{kind} {name}": one for kind in TENSORS for name, one in getattr(outcome, kind).items()}
    save_file(
        {name: one.cpu().contiguous() for name, one in tensors.items()}, path.with_suffix(".safetensors")
    )
    facts = {name: value for name, value in vars(outcome).items() if name not in TENSORS}
    path.with_suffix(".json").write_text(json.dumps(facts))


def load_outcome(path: Path) -> Outcome:
    tensors = load_file(path.with_suffix(".safetensors"))
    whole: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    for kind in TENSORS:
        whole[kind] = {
            name.removeprefix(f"{kind} "): one for name, one in tensors.items() if name.startswith(f"{kind} ")
        }
    return Outcome(**whole)


class Crew:
    """`count` processes under torchrun, on the CPU or each on a GPU of its own, that train one plan
    after another until the block ends. They start with the first plan.
    """

    def __init__(self, folder: Path, count: int, on_cpu: bool = True) -> None:
        self.count, self.on_cpu = count, on_cpu
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(mkdtemp(prefix=f"crew-{count}-", dir=folder))  # none has another's answers
        self._plans = 0
        self._process: subprocess.Popen[bytes] | None = None

    def train(self, legs: list[Leg]) -> list[Outcome]:
        process = self._process = self._process or self._start()
        self._plans += 1
        hand_over(self._folder / f"plan-{self._plans}.json", json.dumps([asdict(leg) for leg in legs]))
        while not (self._folder / f"done-{self._plans}").exists():
            if process.poll() is not None:
                self._process = None
                raise AssertionError((self._folder / "words").read_text(errors="replace")[-5000:])
            time.sleep(0.02)
        return [load_outcome(Path(leg.out)) for leg in legs]

    def _start(self) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line += [f"--nproc-per-node={self.count}", "-m", "tests.helpers.many_processes"]
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": str(self.on_cpu).lower(),
            "OMP_NUM_THREADS": "1",
            "CREW_OF": str(os.getpid()),
            "CREW_PLANS": str(self._plans),
        }
        with (self._folder / "words").open("ab") as words:
            return subprocess.Popen(
                [*line, str(self._folder)],
                stdout=words,
                stderr=words,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            for path in self._folder.glob("pid-*"):  # torchrun gives each a session of its own
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            self._process.kill()
            self._process.wait()


def hand_over(path: Path, content: str) -> None:
    """Write a file that a reader sees whole or not at all."""
    path.with_suffix(".tmp").write_text(content)
    path.with_suffix(".tmp").replace(path)


def plans(folder: Path) -> Iterator[tuple[int, list[Leg]]]:
    """Number and legs of each plan as it comes, until the process that makes them is gone."""
    for number in count(int(os.environ["CREW_PLANS"]) + 1):
        path = folder / f"plan-{number}.json"
        while not path.exists():
            try:
                os.kill(int(os.environ["CREW_OF"]), 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)
        yield number, [Leg(**leg) for leg in json.loads(path.read_text())]


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    accelerator, _ = start_accelerator(120)
    if accelerator.device.type == "cpu":
        without_deepspeed_s_compiler()
    for number, legs in plans(folder):
        for leg in legs:
            with ExitStack() as stack:
                if leg.plain:
                    stack.enter_context(cut_base_on_cpu())
                trainer = start_trainer(
                    load_config(None, leg.words), stack, engine=leg.engine, accelerator=accelerator
                )
                outcome = train_leg(leg, trainer)
                if trainer.ranks.is_main:
                    save_outcome(outcome, Path(leg.out))
        if accelerator.is_main_process:
            hand_over(folder / f"done-{number}", "")
    accelerator.state.destroy_process_group()


def without_deepspeed_s_compiler() -> None:
    """Let gloo add up for DeepSpeed. Its own all-reduce of CPUs is compiled first, a minute of C++
    on a new machine; the slow tests of test_accelerate_configs.py use it.
    """
    backend = import_module("deepspeed.comm.torch")  # as an attribute, deepspeed.comm.torch is PyTorch
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
