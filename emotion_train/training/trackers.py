"""The experiment trackers of a run: one run in each of them, however often it was started.

W&B gets the run's own id, MLflow's run is found by a tag. TensorBoard has no server, so its events
are a part of every checkpoint and resume from it; the published run has them beside its report. The
price: the events so far, some 200 bytes for each ten steps, are uploaded with each checkpoint.

Steps that a recovery trains again are logged once: a tracker that has them gets no second value. A
tracker that fails stops no training.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from emotion_train.bases.public_names import public_config
from emotion_train.config import Config
from emotion_train.errors import EmotionTrainError
from emotion_train.runs.checkpoint import EVENTS

PROJECT = "emotion-train"
RUN_TAG = "emotion_train.run_id"
LOG_TAG = "emotion_train.first_claim"  # two runs may have one name, in two buckets
_REPORT = ("report.html", "report.json")
_PAUSE_S = 300.0  # a tracker that failed is left alone for so long
# so much of what W&B has only on this disk is lost with a killed process; it would wait for 15
_FLUSH_S = 0.2
_MISTAKES = (TypeError, AssertionError)  # a defect here is none of the tracker's


class Tracker(Protocol):
    """What this page needs of a tracker."""

    name: str

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def report(self, folder: Path) -> None: ...

    def finish(self) -> None: ...


class Trackers:
    """The open trackers of rank 0; none on other ranks. `events` come from the checkpoint from
    which the run resumed, and are kept also where TensorBoard is no longer asked for.
    """

    def __init__(self, say: Callable[[str], None], events: bytes = b"") -> None:
        self._say = say
        self._earlier = events
        self._open: list[Tracker] = []
        self._left_alone_until: dict[str, float] = {}

    def open(self, config: Config, first_claim: str, folder: Path) -> None:
        """Open the trackers of `run.trackers`; TensorBoard writes below `folder`. `first_claim` is
        the nonce of the log's first entry. Raises `EmotionTrainError` for a tracker that cannot be
        opened.
        """
        values = {
            f"{section}.{key}": str(value)
            for section, fields in public_config(config).items()
            for key, value in fields.items()
        }
        run_id = str(config.run.id)
        makes: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder / run_id, self._earlier, values),
            "wandb": lambda: WeightsAndBiases(run_id, values),
            "mlflow": lambda: MLflow(run_id, first_claim, values),
        }
        for name in config.run.trackers:
            try:
                self._open.append(makes[name]())
            except Exception as error:  # each library has a family of its own
                if isinstance(error, _MISTAKES):
                    raise
                raise EmotionTrainError(
                    f"run.trackers names {name}, which cannot be opened ({_first_line(error)}); mend its"
                    " settings or its server, or leave it out. What was trained is kept."
                ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step))

    def events(self) -> bytes:
        """TensorBoard's events from the first step on, as one file."""
        for tracker in self._open:
            if isinstance(tracker, TensorBoard):
                return tracker.events()
        return self._earlier

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Log the report among these published files as an artefact, and end all trackers."""
        self._left_alone_until.clear()
        with tempfile.TemporaryDirectory(prefix="emotion-train-report-") as name:
            for file in _REPORT:
                Path(name, file).write_bytes(files[file])
            self._each(lambda tracker: tracker.report(Path(name)))
        self.close()

    def close(self) -> None:
        """End all trackers; what was logged stays, and the run may be resumed."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in self._open:
            if time.monotonic() < self._left_alone_until.get(tracker.name, 0.0):
                continue
            try:
                act(tracker)
            except Exception as error:
                if isinstance(error, _MISTAKES):
                    raise
                self._left_alone_until[tracker.name] = time.monotonic() + _PAUSE_S
                self._say(
                    f"{tracker.name} did not take the run's figures, training continues without it for"
                    f" {_PAUSE_S:.0f} s: {_first_line(error)}"
                )


class TensorBoard:
    """Events in one folder of this machine, to look at while the run trains."""

    name = "tensorboard"

    def __init__(self, folder: Path, earlier: bytes, values: Mapping[str, str]) -> None:
        from accelerate.tracking import TensorBoardTracker

        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*tfevents*"):  # of earlier starts: the checkpoint has what is true
            path.unlink()
        if earlier:
            Path(folder, f"0.{EVENTS}").write_bytes(earlier)  # read first
        self._folder = folder
        self._tracker = _started(TensorBoardTracker(folder.name, folder.parent))
        if not earlier:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(dict(values), {}):  # type: ignore[no-untyped-call]
                self._tracker.writer.file_writer.add_summary(summary)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def events(self) -> bytes:
        """The events before this start and its own: files of events may be joined."""
        self._tracker.writer.flush()
        return b"".join(path.read_bytes() for path in sorted(self._folder.glob("*tfevents*")))

    def report(self, folder: Path) -> None:
        """The report is published beside the events."""

    def finish(self) -> None:
        self._tracker.finish()


class WeightsAndBiases:
    """The run with this id, begun or resumed. W&B's own facts about machine and command line hold
    paths, and are left out.
    """

    name = "wandb"

    def __init__(self, run_id: str, values: Mapping[str, str]) -> None:
        from accelerate.tracking import WandBTracker

        wandb = importlib.import_module("wandb")
        wanted = {
            **{"x_disable_meta": True, "disable_code": True, "disable_git": True, "console": "off"},
            "x_transaction_log_flush_interval": _FLUSH_S,
        }
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        settings = wandb.Settings(**known)
        self._run_id = run_id
        self._tracker = _started(
            WandBTracker(PROJECT, id=run_id, name=run_id, resume="allow", settings=settings)
        )
        self._tracker.store_init_configuration(dict(values))
        # earlier steps are there, and W&B would refuse them one by one; offline nothing is known
        self._first_step = int(self._tracker.run.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step >= self._first_step:
            self._tracker.log(dict(values), step=step)

    def report(self, folder: Path) -> None:
        wandb = importlib.import_module("wandb")
        artefact = wandb.Artifact(f"report-{self._run_id}", type="report")
        artefact.add_dir(str(folder))
        self._tracker.run.log_artifact(artefact)

    def finish(self) -> None:
        self._tracker.finish()


class MLflow:
    """The run of the experiment that has this run's tags, begun or resumed."""

    name = "mlflow"

    def __init__(self, run_id: str, first_claim: str, values: Mapping[str, str]) -> None:
        from accelerate.tracking import MLflowTracker

        mlflow = importlib.import_module("mlflow")
        tags = {RUN_TAG: run_id, LOG_TAG: first_claim}
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = mlflow.search_runs(
            experiment_names=[experiment], filter_string=wanted, max_results=1, output_format="list"
        )
        self._last_steps: dict[str, int] = {}
        client, known = mlflow.MlflowClient(), dict[str, str]()
        for run in found:
            known = run.data.params
            for name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                self._last_steps[name] = max((one.step for one in history), default=-1)
        self._tracker = _started(
            MLflowTracker(
                experiment_name=experiment,
                run_id=found[0].info.run_id if found else None,
                run_name=run_id,
                # by itself MLflow would take the path of a program
                tags={**tags, "mlflow.source.name": PROJECT},
            )
        )
        # a parameter is never changed there, and some may differ on another machine
        self._tracker.store_init_configuration(
            {name: value for name, value in values.items() if name not in known}
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        if new := {name: value for name, value in values.items() if step > self._last_steps.get(name, -1)}:
            self._tracker.log(new, step=step)

    def report(self, folder: Path) -> None:
        self._tracker.log_artifacts(str(folder), "report")

    def finish(self) -> None:
        self._tracker.finish()


def _started(tracker: Any) -> Any:
    tracker.start()
    return tracker


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
