"""From posts to a served classifier: which commands are typed in which state of the bucket, what is
refused before anything is uploaded, and (slow) the whole way killed at every step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from emotion_train.config import load_config
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.runs.log import Writer, upload_part
from emotion_train.storage.open import open_store
from launch import cli
from launch.up import jobs, verb
from launch.up.commands import Commands, Stopped
from launch.up.jobs import launch_line, living
from launch.up.price import Price, price_of
from launch.up.steps import Places, final_of, is_pulled
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import tiny_config, tiny_words

ROOT = Path(__file__).parents[3]
FILES = {"adapter/adapter_model.safetensors": b"weights", "report.json": b"{}"}
PLAN = {
    "choices": [
        {"gpus": "L4:1", "hours": 3.0, "hours_on_spot": 3.4, "usd_spot": 1.1, "usd_on_demand": 2.4},
        {"gpus": "H100:1", "hours": 0.5, "hours_on_spot": 0.6, "usd_spot": None, "usd_on_demand": 1.9},
        {"gpus": "T4:1", "hours": 9.0, "hours_on_spot": None, "usd_spot": None, "usd_on_demand": None},
    ]
}


def publish(output_url: str, run_id: str, *overrides: str) -> None:
    store = open_store(output_url)
    writer = Writer(store, run_id, "a" * 64, "b" * 64)
    writer.claim(0, 0)
    files = FILES
    if overrides:
        config = load_config(None, ["data.url=posts", f"run.output_url={output_url}", *overrides])
        identity = {"identity": {"config": config.model_dump(mode="json")}}
        files = FILES | {"report.json": json.dumps(identity).encode()}
    parts = tuple(
        upload_part(store, run_id, f"final/{writer.incarnation:08d}/{name}", data)
        for name, data in files.items()
    )
    writer.append("final", 3, 30, parts, {"macro_f1": 0.5})


class Typed(Commands):
    """Notes what is typed; a run publishes, a pull writes the files, and `fails` ends with 1."""

    def __init__(self, places: Places, fails: str | None = None) -> None:
        super().__init__({})
        self.places, self.fails, self.lines = places, fails, list[str]()

    def call(self, words: Sequence[str], *, cwd: Path | None = None) -> None:
        line = " ".join(words)
        name = " ".join(words[1:3]) if words[0] == "sky" else words[1]
        self.lines.append(f"{name} --smoke" if "--smoke" in words or "SMOKE=1" in words else name)
        if self.lines[-1] == self.fails:
            raise Stopped(33)
        if name in ("run", "jobs launch"):
            run_id = self.places.run_id
            publish(self.places.output_url, f"{run_id}-smoke" if "smoke" in self.lines[-1] else run_id)
        if name == "plan" and "--write" in words:
            self.places.task_file.parent.mkdir(parents=True, exist_ok=True)
            self.places.task_file.write_text("envs: {OVERRIDES: model.precision=nf4}\n")
        if name == "jobs launch":
            assert "model.precision=nf4" in line
        if name == "pull":
            for key, data in FILES.items():
                path = self.places.adapter / key.replace("adapter/", "").replace(
                    "report.json", "report/report.json"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def answer(self, words: Sequence[str]) -> str:
        return json.dumps(PLAN)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def up(monkeypatch: pytest.MonkeyPatch, *words: str, fails: str | None = None) -> tuple[int, list[str]]:
    """The exit code, and the verbs that were typed."""
    typed = Typed(Places.of("bucket", "emotions", None, None), fails)

    @contextmanager
    def here() -> Iterator[Commands]:
        yield typed

    monkeypatch.setattr(verb, "commands", here)
    code = cli.main(["up", "posts.csv", "--bucket", "bucket", *words, "model.base=base"])
    return code, typed.lines


WHOLE = ["prepare", "check", "run --smoke", "run", "show", "pull", "export"]


@pytest.mark.usefixtures("place")
def test_each_step_is_typed_once_and_the_same_command_repeats_none_that_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert up(monkeypatch, "--local") == (0, WHOLE)
    assert "emotion-train predict --adapter emotions/adapter" in capsys.readouterr().out
    # prepare and export look at what is there themselves
    assert up(monkeypatch, "--local") == (0, ["prepare", "show", "export"])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("step", WHOLE)
def test_a_step_that_fails_ends_it_with_its_code_and_is_where_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    code, typed = up(monkeypatch, "--local", fails=step)
    assert (code, typed) == (33, WHOLE[: WHOLE.index(step) + 1])
    code, typed = up(monkeypatch, "--local")
    assert code == 0
    assert step in typed
    assert set(typed) & {"run", "run --smoke", "pull"} == set(WHOLE[WHOLE.index(step) :]) & {
        "run",
        "run --smoke",
        "pull",
    }


@pytest.mark.usefixtures("place")
def test_steps_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--local", "--no-smoke", "--no-export")
    assert up(monkeypatch, *words) == (0, ["prepare", "check", "run", "show", "pull"])


@pytest.mark.usefixtures("place")
def test_a_run_that_was_published_with_another_request_is_not_taken_for_this_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = Places.of("bucket", "emotions", None, None)
    publish(places.output_url, places.run_id, "lora.r=4", "model.base=one")
    assert up(monkeypatch, "--local", "lora.r=8") == (2, [])
    assert "different now: lora.r (was 4, is 8)" in capsys.readouterr().err
    assert up(monkeypatch, "--local", "lora.r=4") == (
        0,
        ["prepare", "show", "pull", "export"],
    )
    assert "published with another model.base (was 'one', is 'base')" in capsys.readouterr().err


def by_jobs(monkeypatch: pytest.MonkeyPatch, *words: str, job: int | None = None) -> tuple[int, list[str]]:
    """As `up`, by a SkyPilot in which this job is alive; the bucket is a folder of this machine."""
    monkeypatch.setattr(verb, "require_sky", lambda: "sky")
    monkeypatch.setattr(jobs, "living_jobs", lambda: {} if job is None else {"emotions": job})
    monkeypatch.setattr(verb, "out_of_reach", lambda bucket: False)
    return up(monkeypatch, *words)


@pytest.mark.usefixtures("place")
def test_machines_are_asked_for_after_somebody_has_agreed_to_the_price(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["check", "prepare", "plan", "check"]
    assert by_jobs(monkeypatch) == (2, asked)
    assert "L4:1, about 3.4 hours, about $1.10: nobody can answer" in capsys.readouterr().err
    assert by_jobs(monkeypatch, "--yes", "--max-usd", "1") == (2, asked)
    assert "more than --max-usd 1" in capsys.readouterr().err
    assert by_jobs(monkeypatch, "--yes", "--gpus", "T4:1", "--max-usd", "9")[0] == 2
    assert "not known" in capsys.readouterr().err
    code, typed = by_jobs(monkeypatch, "--yes", "--max-usd", "1.2")
    assert code == 0
    assert typed == [*asked, "jobs launch --smoke", "jobs launch", "show", "pull", "export"]


@pytest.mark.usefixtures("place")
def test_a_job_that_is_alive_is_followed_and_none_is_started_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = Places.of("bucket", "emotions", None, None)
    real = Typed.call

    def call(typed: Typed, words: Sequence[str], *, cwd: Path | None = None) -> None:
        real(typed, words, cwd=cwd)
        if words[:3] == ["sky", "jobs", "logs"]:
            publish(places.output_url, places.run_id)

    monkeypatch.setattr(Typed, "call", call)
    code, typed = by_jobs(monkeypatch, "--yes", job=7)
    assert (code, typed) == (0, ["check", "prepare", "jobs logs", "show", "pull", "export"])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("step", ["jobs logs", "jobs launch"])
def test_how_a_job_ended_is_told_by_the_bucket_where_skypilot_does_not_know_it(
    monkeypatch: pytest.MonkeyPatch, step: str, published: bool
) -> None:
    """`sky jobs` ends with 101 where it sees a job end before that is written down."""
    places = Places.of("bucket", "emotions", None, None)
    real = Typed.call

    def call(typed: Typed, words: Sequence[str], *, cwd: Path | None = None) -> None:
        if step in " ".join(words) and not published:
            raise Stopped(101)
        real(typed, words, cwd=cwd)
        if step in " ".join(words):
            if step == "jobs logs":  # a job that is started publishes by itself
                publish(places.output_url, places.run_id)
            raise Stopped(101)

    monkeypatch.setattr(Typed, "call", call)
    monkeypatch.setattr(jobs, "_SETTLING_S", 0.01)
    monkeypatch.setattr(jobs, "_LOOK_S", 0.01)
    job = 7 if step == "jobs logs" else None
    code, typed = by_jobs(monkeypatch, "--yes", "--no-smoke", job=job)
    assert code == (0 if published else 101)
    assert ("pull" in typed) is published


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bucket", "folder"], "a cloud's machine does not reach"),
        (["--bucket", "s3://team"], "`sky` is not on the PATH"),
        (["--bucket", "b", "--local", "--name", "Not A Name"], "--name"),
        (["--bucket", "b", "--local", "--max-usd", "3"], "--max-usd is for machines"),
        (["--bucket", "b", "--local", "data.url=x"], "follows from --bucket"),
        (["--bucket", "s3://team", "--max-usd", "-1"], "above 0"),
        (["--bucket", "s3://team", "run.trackers=[wandb, mlflow]"], "white space"),
        (["--bucket", "b", "--local", "--prepare", "--text 'x"], "shell could not read"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert cli.main(["up", "posts.csv", *words, "model.base=base"]) == 2
    assert said in capsys.readouterr().err
    assert list(place.iterdir()) == []


def test_the_price_is_that_of_the_best_row_or_of_the_gpus_asked_for() -> None:
    assert price_of(PLAN, None) == Price("L4:1", 3.4, 1.1)
    assert price_of(PLAN, "h100:1") == Price("H100:1", 0.5, 1.9)
    assert price_of(PLAN, "T4:1") == Price("T4:1", 9.0, None)
    assert str(price_of(PLAN, "B200:8")) == "B200:8, a time that is not known, a price that is not known"


def test_a_job_s_line_hands_on_where_the_bucket_is_and_no_key() -> None:
    given = {"AWS_ENDPOINT_URL": "http://here", "AWS_REGION": "", "AWS_SECRET_ACCESS_KEY": "secret"}
    line = launch_line("t.yaml", "mine", {"DATA_URL": "s3://b/posts"}, ["--infra", "aws"], given)
    assert line[:7] == ["sky", "jobs", "launch", "--yes", "--name", "mine", "t.yaml"]
    assert line[7:] == [
        *("--env", "DATA_URL=s3://b/posts", "--env", "AWS_ENDPOINT_URL=http://here", "--infra", "aws")
    ]


def test_of_jobs_the_newest_that_lives_and_has_the_name_is_found() -> None:
    rows = [
        {"job_id": 4, "job_name": "mine", "status": "RUNNING"},
        {"job_id": 5, "job_name": "mine", "status": "FAILED_SETUP"},
        {"job_id": 6, "job_name": "other", "status": "RUNNING"},
        {"job_id": 3, "job_name": "mine", "status": "ManagedJobStatus.PENDING"},
    ]
    assert living("a word before\n" + json.dumps(rows)) == {"mine": 4, "other": 6}
    assert living(json.dumps({"jobs": rows, "total": 4})) == {"mine": 4, "other": 6}
    assert living("[]\n") == living("\x1b[2mSkyPilot {API} server [ok]\x1b[0m\n[]") == {}
    assert living("\x1b[32m[1/2] starting {server: 1}\x1b[0m\n" + json.dumps(rows))["mine"] == 4
    for printed in ("", "[1, 2]", "no word of it"):
        with pytest.raises(EmotionTrainError, match=r"printed no list of jobs .* nothing was started"):
            living(printed)


@pytest.mark.parametrize(("printed", "code"), [("No in-progress managed jobs.", 1), ("[]", 0)])
def test_a_controller_at_rest_has_no_job(monkeypatch: pytest.MonkeyPatch, printed: str, code: int) -> None:
    done = subprocess.CompletedProcess(["sky"], code, printed, "")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    assert jobs.alive("mine") is None


def test_a_sky_that_does_not_answer_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess(["sky"], 1, "", "the server is not there\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    with pytest.raises(EmotionTrainError, match="the server is not there"):
        jobs.alive("mine")


def test_a_pulled_adapter_is_known_by_its_bytes(tmp_path: Path) -> None:
    places = Places.of(str(tmp_path / "bucket"), "emotions", None, tmp_path / "here")
    assert final_of(places) is None
    publish(places.output_url, places.run_id)
    final = final_of(places)
    assert final is not None
    assert not is_pulled(final, places.adapter)
    assert cli.main(["pull", places.run_url, "--to", str(places.adapter)]) == 0
    assert is_pulled(final, places.adapter)
    (places.adapter / "adapter_model.safetensors").write_bytes(b"weightz")
    assert not is_pulled(final, places.adapter)


@pytest.mark.parametrize("name", ["", "-a", "A", "a" * 41, "a/b", "ä"])
def test_a_name_that_no_job_can_have_is_refused(name: str) -> None:
    with pytest.raises(WrongRequest, match="--name"):
        Places.of("s3://team", name, None, None)


@pytest.mark.slow
def test_killed_at_every_step_it_ends_with_one_data_set_one_run_and_one_export(tmp_path: Path) -> None:
    """The real commands on a tiny model: SIGKILL once each step has been printed, and again."""
    tiny_config(tmp_path)
    words = [word for word in tiny_words(tmp_path) if not word.startswith(("data.", "run."))]
    line = [sys.executable, "-m", "launch.cli", "up", str(tmp_path / "source"), "--local"]
    line += ["--bucket", str(tmp_path / "bucket"), "--accelerate-config", "cpu", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for step in ("prepare", "check", "run --smoke", "run --accelerate-config", "show", "pull", "export"):
        printed = tmp_path / "printed"
        with printed.open("wb") as file:
            process = subprocess.Popen(
                line, cwd=tmp_path, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        mark = f"emotion-{'train' if step in ('prepare', 'export') else 'launch'} {step}"
        until = time.monotonic() + 4 * PATIENCE_S
        while mark not in printed.read_text() and process.poll() is None:
            assert time.monotonic() < until, printed.read_text()
            time.sleep(0.1)
        assert process.poll() is None, printed.read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "bucket" / "emotions"
    assert sorted(path.name for path in root.iterdir()) == ["exported", "posts", "runs"]
    assert sorted(path.name for path in (root / "runs").iterdir()) == ["emotions", "emotions-smoke"]
    assert (root / "exported" / "emotions" / "model.safetensors.index.json").exists()
    assert (tmp_path / "emotions" / "adapter" / "report" / "report.html").exists()
    finals = [entry for entry in open_store(str(root / "runs")).list() if "/final/" in entry.key]
    assert {entry.key.split("/")[0] for entry in finals} == {"emotions", "emotions-smoke"}
