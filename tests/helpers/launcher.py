"""Launches the task files on the site as a person would, and reads from the bucket how far a run
is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from emotion_train.config import example_config
from emotion_train.runs.log import Entry, read_log, run_ids
from emotion_train.runs.published import download
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from launch.results.history import incarnations
from tests.helpers.slurm_site import ROOT, Site

OUTPUT_URL = "s3://cloud/runs"
TASK, EVALUATE = ROOT / "sky" / "train.yaml", ROOT / "sky" / "evaluate.yaml"
PATIENCE_S = 900
ENDS = (
    "SUCCEEDED",
    "CANCELLED",
    "FAILED",
    "FAILED_SETUP",
    "FAILED_PRECHECKS",
    "FAILED_NO_RESOURCE",
    "FAILED_CONTROLLER",
)
# The demo's config with two layers; Adam turns rounding into steps of the learning rate where a
# gradient is near 0, so it is small
WORDS = [
    "model.precision=fp32",
    "lora.r=4",
    "train.global_batch_size=10",
    "train.tokens_per_microbatch=512",
    "train.learning_rate=0.001",
]
WORDS += ["report.bootstrap_samples=100", "run.id=null"]


@dataclass(frozen=True)
class Launcher:
    site: Site
    s3: LocalS3
    base: Path
    posts_url: str

    def words(self, *overrides: str, infra: str = "slurm", cpu: bool = True, **environment: str) -> list[str]:
        """The options of `sky launch` and `sky jobs launch`."""
        keys = self.s3.env()
        values = " ".join([*WORDS, f"model.base={self.base}", *overrides])
        envs = {
            "DATA_URL": self.posts_url,
            "OUTPUT_URL": OUTPUT_URL,
            "CONFIG": str(example_config().relative_to(ROOT)),
            "OVERRIDES": values,
            "AWS_ENDPOINT_URL": keys["AWS_ENDPOINT_URL"],
            "AWS_REGION": keys["AWS_REGION"],
            **({"DEVICE": "cpu"} if cpu else {}),
            **environment,
        }
        secrets = {name: keys[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        words = ["-y", "--infra", infra, "--no-use-spot"]
        words += [word for name, value in envs.items() for word in ("--env", f"{name}={value}")]
        return words + [word for name, value in secrets.items() for word in ("--secret", f"{name}={value}")]

    def start_managed(self, name: str, *words: str, task: Path = TASK) -> ManagedJob:
        printed = self.site.sky("jobs", "launch", "-d", "-n", name, str(task), *words)
        number = re.search(r"Managed Job ID: .*?(\d+)", _plain(printed))
        assert number, printed
        return ManagedJob(self.site, name, int(number[1]))


@dataclass(frozen=True)
class ManagedJob:
    site: Site
    name: str
    number: int

    @property
    def run_id(self) -> str | None:
        """The run below `OUTPUT_URL`, named after the task's id, once it has begun."""
        found = [
            run_id
            for run_id in run_ids(open_store(OUTPUT_URL))
            if re.search(rf"_{self.name}_{self.number}-0$", run_id)
        ]
        return found[0] if found else None

    @property
    def log(self) -> list[Entry]:
        return read_log(open_store(OUTPUT_URL), self.run_id) if self.run_id else []

    def status(self) -> str:
        row = next(line for line in self.queue().splitlines() if line.startswith(f"{self.number} "))
        return next(word for word in row.split() if re.fullmatch(r"[A-Z]{6,}(_[A-Z]+)*", word))

    def queue(self) -> str:
        return _plain(self.site.sky("jobs", "queue"))

    def wait_for_step(self, step: int) -> None:
        """Until the first writer has committed that step."""
        self._wait(lambda log: log[-1].step >= step, f"step {step}")
        assert self.log[-1].kind != "final", "the run ended before it was interrupted"

    def wait_for_second_writer(self) -> None:
        self._wait(lambda log: len(incarnations(log)) > 1, "second writer")

    def _wait(self, reached: Callable[[list[Entry]], bool], what: str) -> None:
        deadline, looked = time.monotonic() + PATIENCE_S, time.monotonic()
        while not ((log := self.log) and reached(log)):
            assert time.monotonic() < deadline, f"no {what}; {self.queue()}\n{self.controller_log()}"
            if time.monotonic() - looked > 30:  # a look takes seconds
                looked = time.monotonic()
                assert self.status() not in ENDS, f"no {what}; {self.controller_log()}"
            time.sleep(0.5)

    def wait_for_end(self) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while (status := self.status()) not in ENDS:
            assert time.monotonic() < deadline, self.controller_log()
            time.sleep(3)
        return status

    def controller_log(self) -> str:
        return _plain(
            self.site.sky("jobs", "logs", "--controller", "--no-follow", str(self.number), check=False)
        )[-6000:]


def published_run(printed: str) -> str:
    """The run id in what a launch printed."""
    found = re.search(rf"published at step \d+: {OUTPUT_URL}/(\S+)", _plain(printed))
    assert found, printed[-6000:]
    return found[1]


def adapter(run_id: str, folder: Path) -> dict[str, torch.Tensor]:
    download(f"{OUTPUT_URL}/{run_id}", folder)
    state: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return state


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=tolerance, rtol=0)


def _plain(printed: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", printed)
