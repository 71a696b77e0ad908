"""The steps from posts to a served classifier, as the commands that a person would type one by one,
and their state in the bucket.

The bucket alone shows what is done: `prepare` and `export` find their own work there and repeat
nothing, a run is published or not, and a pulled adapter is compared with the run's log. So the same
command resumes where any machine stopped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from emotion_train.command_line import LAUNCH, TRAIN
from emotion_train.errors import WrongRequest
from emotion_train.runs.log import Entry, read_log, smoke_id
from emotion_train.runs.published import safe_targets
from emotion_train.storage.document import file_sha256
from emotion_train.storage.open import open_store

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


@dataclass(frozen=True)
class Places:
    """The place of everything: below `bucket`/`name`, and below `folder` on this machine."""

    bucket: str
    name: str
    run_id: str
    folder: Path

    @classmethod
    def of(cls, bucket: str, name: str, run_id: str | None, folder: Path | None) -> Places:
        """The places for a name; raises `WrongRequest` where SkyPilot would refuse it as a job's
        name.
        """
        if not _NAME.fullmatch(name):
            raise WrongRequest(
                f"--name is {name!r}; allowed are up to 40 lower-case letters, digits and hyphens, a letter"
                " first, such as emotions."
            )
        return cls(bucket.rstrip("/"), name, run_id or name, folder or Path(name))

    @property
    def data_url(self) -> str:
        return f"{self.bucket}/{self.name}/posts"

    @property
    def output_url(self) -> str:
        return f"{self.bucket}/{self.name}/runs"

    @property
    def run_url(self) -> str:
        return f"{self.output_url}/{self.run_id}"

    @property
    def export_url(self) -> str:
        return f"{self.bucket}/{self.name}/exported/{self.run_id}"

    @property
    def labelled_url(self) -> str:
        return f"{self.bucket}/{self.name}/labelled"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def task_file(self) -> Path:
        return self.folder / "train.yaml"


@dataclass(frozen=True)
class Steps:
    """The command lines. `values` are all overrides that a run needs."""

    places: Places
    source: str
    prepare_words: tuple[str, ...]
    config: str | None
    overrides: tuple[str, ...]

    @property
    def values(self) -> list[str]:
        places = self.places
        own = [f"data.url={places.data_url}", f"run.output_url={places.output_url}"]
        return [*own, f"run.id={places.run_id}", *self.overrides]

    @property
    def _config(self) -> list[str]:
        return [] if self.config is None else ["--config", self.config]

    def prepare(self) -> list[str]:
        return [TRAIN, "prepare", self.source, self.places.data_url, *self.prepare_words]

    def check(self, gpus: str | None) -> list[str]:
        return [LAUNCH, "check", *self._config, *self.values, *(["--gpus", gpus] if gpus else [])]

    def plan(self, *more: str) -> list[str]:
        """The line of `plan`, without run.output_url: a plan never opens the output, and a task
        need not hold it.
        """
        words = [f"data.url={self.places.data_url}", *self.overrides]
        return [LAUNCH, "plan", *self._config, *words, *more]

    def run(self, *more: str) -> list[str]:
        return [LAUNCH, "run", *self._config, *more, *self.values]

    def show(self) -> list[str]:
        return [LAUNCH, "show", self.places.run_url]

    def pull(self) -> list[str]:
        return [LAUNCH, "pull", self.places.run_url, "--to", str(self.places.adapter)]

    def export(self) -> list[str]:
        return [TRAIN, "export", self.places.run_url, "--to", self.places.export_url]


def final_of(places: Places, *, smoke: bool = False) -> Entry | None:
    """The entry that published the run, or its smoke run; None where it is not published."""
    run_id = smoke_id(places.run_id) if smoke else places.run_id
    entries = read_log(open_store(places.output_url), run_id)
    return next((entry for entry in entries if entry.kind == "final"), None)


def is_begun(places: Places) -> bool:
    """Whether a machine has claimed the run."""
    return bool(read_log(open_store(places.output_url), places.run_id))


def is_pulled(final: Entry, folder: Path) -> bool:
    """Whether the folder holds every file of the published adapter and report, byte for byte."""
    return all(
        (path := folder / target).is_file()
        and path.stat().st_size == part.bytes
        and file_sha256(path) == part.sha256
        for part, target in safe_targets(final)
    )
