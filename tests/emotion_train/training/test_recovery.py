"""Real processes that are killed and started again on other numbers of processes end with the
adapter of a run that nothing stopped.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emotion_train import cli as train_cli
from emotion_train.report.schema import Report
from emotion_train.runs.log import Entry, read_log, read_part
from emotion_train.runs.published import download
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import tiny_config, tiny_words

# Adam turns rounding into steps of the learning rate where a gradient is near 0, so it is small
WORDS = [
    "train.learning_rate=0.001",
    "train.global_batch_size=10",
    "train.tokens_per_microbatch=200",
    "preemption.notices=none",
]


@contextmanager
def started(processes: int, words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The trainer on that many processes, in a session of its own; whatever is left of it is killed
    at the end.
    """
    line = [sys.executable, "-m", "emotion_train.train"]
    if processes > 1:
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "emotion_train.train",
        ]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(
        [*line, *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def train_to_the_end(processes: int, words: list[str], environment: dict[str, str]) -> str:
    with started(processes, words, environment) as process:
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, out[-4000:]
    return out


def wait_for_step(store: Store, run_id: str, step: int, process: subprocess.Popen[str]) -> None:
    """Return once that step, or a later one, is committed, or the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while (
        process.poll() is None and max((entry.step for entry in checkpoints(store, run_id)), default=0) < step
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def checkpoints(store: Store, run_id: str) -> list[Entry]:
    return [entry for entry in read_log(store, run_id) if entry.kind == "checkpoint"]


def published(url: str, folder: Path) -> tuple[dict[str, torch.Tensor], Report]:
    download(url, folder)
    return load_file(folder / "adapter_model.safetensors"), Report.model_validate_json(
        (folder / "report" / "report.json").read_bytes()
    )


def same_run(
    one: tuple[dict[str, torch.Tensor], Report],
    other: tuple[dict[str, torch.Tensor], Report],
    tolerance: float,
) -> None:
    for name, tensor in one[0].items():
        torch.testing.assert_close(other[0][name], tensor, atol=tolerance, rtol=0)
    assert [found.step for found in other[1].history] == [found.step for found in one[1].history]
    for found, expected in zip(other[1].history, one[1].history, strict=True):
        assert found.train_loss == pytest.approx(expected.train_loss, abs=tolerance, rel=tolerance)
    for split in one[1].splits:
        assert other[1].splits[split].per_label == one[1].splits[split].per_label
    assert (other[1].speed.posts, other[1].speed.real_tokens) == (
        one[1].speed.posts,
        one[1].speed.real_tokens,
    )


@pytest.mark.slow
def test_one_then_three_then_two_processes_do_what_one_does(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    words = tiny_words(tmp_path, *WORDS, "train.epochs=2", "checkpoint.every_seconds=0.01")
    store = open_store(str(tmp_path / "runs"))
    train_to_the_end(1, [*words, "run.id=whole"], {})
    for processes, step in ((1, 4), (3, 9)):
        with started(processes, words, {}) as process:
            wait_for_step(store, "tiny", step, process)
            assert process.poll() is None
    assert "continued on another number of processes (was 3, is 2)" in train_to_the_end(2, words, {})
    assert len({entry.incarnation for entry in checkpoints(store, "tiny")}) == 3
    same_run(
        published(f"{tmp_path}/runs/whole", tmp_path / "a"),
        published(f"{tmp_path}/runs/tiny", tmp_path / "b"),
        1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(1,), (1, 2, 3, 1)])
def test_kills_at_random_moments_change_nothing(
    tmp_path: Path, own_bucket_url: str, processes: tuple[int, ...]
) -> None:
    tiny_config(tmp_path)
    words = tiny_words(
        tmp_path, *WORDS, f"run.output_url={own_bucket_url}", "train.epochs=8", "checkpoint.every_seconds=0.3"
    )
    store = open_store(own_bucket_url)
    train_to_the_end(1, [*words, "run.id=whole"], {})
    draw, kills = random.Random(0), 0
    for number in range(8):
        with started(processes[number % len(processes)], words, {}) as process:
            before = max((entry.step for entry in read_log(store, "tiny")), default=0) if number else 0
            wait_for_step(store, "tiny", before + draw.randrange(1, 12), process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(draw.random() * 2)
            kills += process.poll() is None
        for entry in checkpoints(store, "tiny")[-3:]:  # older ones may have been cleared away
            for part in entry.parts:
                read_part(store, "tiny", part)  # raises when it is torn or gone
    assert kills >= 3
    train_to_the_end(processes[-1], words, {})
    tolerance = 0.0 if processes == (1,) else 1e-5
    same_run(
        published(f"{own_bucket_url}/whole", tmp_path / "a"),
        published(f"{own_bucket_url}/tiny", tmp_path / "b"),
        tolerance,
    )


@pytest.mark.slow
@pytest.mark.parametrize("keys_expire", [False, True])
def test_a_store_that_goes_away_stops_no_training_and_gets_everything_when_it_is_back(
    tmp_path: Path, keys_expire: bool
) -> None:
    with LocalS3(tmp_path / "s3") as server:
        server.create_bucket("runs")
        tiny_config(tmp_path)
        environment = server.env()
        words = tiny_words(
            tmp_path,
            *WORDS,
            "run.output_url=s3://runs",
            "train.epochs=8",
            f"checkpoint.local_folder={tmp_path / 'local'}",
        )
        whole = [*words, "run.id=whole", f"run.output_url={tmp_path / 'runs'}"]
        train_to_the_end(1, whole, {})
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            store = open_store("s3://runs")
            with started(1, [*words, "checkpoint.every_seconds=0.3"], environment) as process:
                wait_for_step(store, "tiny", 5, process)
                server.kill()
                secret = server.secret_key
                if keys_expire:
                    server.secret_key = "another"
                    server.start()
                deadline = time.monotonic() + PATIENCE_S
                while not list((tmp_path / "local").rglob("*.json")):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                time.sleep(5)
                server.kill()
                server.secret_key = secret
                server.start()
                out = process.communicate(timeout=PATIENCE_S)[0]
            assert process.returncode == 0, out[-4000:]
            assert "NOT SAVED, training continues" in out
            same_run(
                published(f"{tmp_path}/runs/whole", tmp_path / "a"),
                published("s3://runs/tiny", tmp_path / "b"),
                0.0,
            )


@pytest.mark.slow
def test_a_run_that_cannot_be_published_ends_with_1_and_names_what_publishes_it(tmp_path: Path) -> None:
    with LocalS3(tmp_path / "s3") as server:
        server.create_bucket("runs")
        tiny_config(tmp_path)
        environment = server.env()
        words = tiny_words(
            tmp_path,
            *WORDS,
            "run.output_url=s3://runs",
            "run.publish_timeout_s=1",
            f"checkpoint.local_folder={tmp_path / 'local'}",
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            store = open_store("s3://runs")
            with started(
                1, [*words, "train.epochs=8", "checkpoint.every_seconds=0.3"], environment
            ) as process:
                wait_for_step(store, "tiny", 5, process)
                server.kill()
                out = process.communicate(timeout=600)[0]
            assert process.returncode == 1, out[-4000:]
            assert str(tmp_path / "local") in out
            server.start()
            steps = [entry.step for entry in checkpoints(store, "tiny")]
            out = type_what_it_says(out, environment)
            assert "holds step 88" in out
            assert max(steps) < 88
            assert "training:" not in out
            published("s3://runs/tiny", tmp_path / "b")


@pytest.mark.slow  # quicker: what a failing bucket does not take, in runs/test_saver.py
def test_what_cannot_be_published_is_kept_here_and_the_command_that_is_named_publishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path)
    words = tiny_words(
        tmp_path, *WORDS, "run.publish_timeout_s=0", f"checkpoint.local_folder={tmp_path / 'local folder'}"
    )
    in_the_way = tmp_path / "runs" / "tiny" / "final"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert train_cli.main(["train", *words]) == 1
    out = capfd.readouterr().err
    (kept,) = (tmp_path / "local folder").glob("*/tiny/final")
    assert str(kept) in out.splitlines()[-1]
    adapter = load_file(kept / "adapter" / "adapter_model.safetensors")
    report = Report.model_validate_json((kept / "report.json").read_bytes())
    in_the_way.unlink()
    type_what_it_says(out, {})
    same_run((adapter, report), published(f"{tmp_path}/runs/tiny", tmp_path / "b"), 0.0)
    assert not kept.exists()


@pytest.mark.slow
def test_a_run_that_somebody_deletes_while_it_trains_is_not_called_published_and_can_still_be(
    tmp_path: Path,
) -> None:
    tiny_config(tmp_path)
    local = f"checkpoint.local_folder={tmp_path / 'local'}"
    words = tiny_words(
        tmp_path, *WORDS, "run.publish_timeout_s=1", local, "train.epochs=8", "checkpoint.every_seconds=0.3"
    )
    store = open_store(str(tmp_path / "runs"))
    with started(1, words, {}) as process:
        wait_for_step(store, "tiny", 5, process)
        while (tmp_path / "runs" / "tiny").exists():  # a write may come in between
            shutil.rmtree(tmp_path / "runs" / "tiny", ignore_errors=True)
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 1, out[-4000:]
    assert "is gone" in out
    assert read_log(store, "tiny") == []
    type_what_it_says(out, {})
    published(f"{tmp_path}/runs/tiny", tmp_path / "b")


def type_what_it_says(out: str, environment: dict[str, str]) -> str:
    """Run the command that stands at the end of the last line, as a person types it: in a shell,
    with nothing that a test has set.
    """
    command = out.splitlines()[-1].partition("type on this machine: ")[2]
    assert "run.id=tiny" in command
    env = {
        **os.environ,
        **environment,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(
        command, shell=True, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_the_step_that_all_ranks_are_at_and_leaves_with_33(
    tmp_path: Path, processes: int
) -> None:
    tiny_config(tmp_path)
    words = tiny_words(
        tmp_path, *WORDS, "train.epochs=8", "checkpoint.every_seconds=null", "preemption.hold_s=0"
    )
    store = open_store(str(tmp_path / "runs"))
    train_to_the_end(processes, [*words, "run.id=whole"], {})
    with started(processes, words, {}) as process:
        wait_for_step(store, "tiny", 11, process)
        time.sleep(0.3)
        process.terminate()
        out = process.communicate(timeout=PATIENCE_S)[0]
    newest = checkpoints(store, "tiny")[-1]
    assert f"Step {newest.step} of 88 is saved" in out
    assert "macro_f1" not in newest.metrics
    if processes == 1:  # torch.distributed.run makes 1 of every code
        assert process.returncode == 33
    assert f"resumed at step {newest.step} of 88" in train_to_the_end(processes, words, {})
    same_run(
        published(f"{tmp_path}/runs/whole", tmp_path / "a"),
        published(f"{tmp_path}/runs/tiny", tmp_path / "b"),
        0.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_while_the_store_does_not_take_the_result_leaves_with_33_and_the_next_start_publishes(
    tmp_path: Path, processes: int
) -> None:
    tiny_config(tmp_path)
    words = tiny_words(tmp_path, *WORDS, "preemption.hold_s=0")
    in_the_way = tmp_path / "runs" / "tiny" / "final"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    with started(processes, words, {}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "NOT PUBLISHED yet" in line:
                break
        process.terminate()
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert "trained and not yet published" in out
    if processes == 1:
        assert process.returncode == 33
    in_the_way.unlink()
    assert "resumed at step 22 of 22" in train_to_the_end(processes, words, {})


@pytest.mark.slow
def test_after_sigterm_a_run_holds_until_it_is_killed(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    words = tiny_words(tmp_path, *WORDS, "train.epochs=8", "checkpoint.every_seconds=null")
    store = open_store(str(tmp_path / "runs"))
    with started(1, words, {"SKYPILOT_TASK_ID": "sky"}) as process:  # there the hold is 300 s
        wait_for_step(store, "tiny", 11, process)
        process.terminate()
        while not (
            saved := [entry for entry in checkpoints(store, "tiny") if "macro_f1" not in entry.metrics]
        ):
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(5)
        assert checkpoints(store, "tiny")[-1] == saved[-1]  # it has not trained on
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 33


@pytest.mark.slow
def test_sigterm_while_the_model_is_loaded_leaves_with_33(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    with started(1, tiny_words(tmp_path, *WORDS, "preemption.hold_s=0", "train.epochs=8"), {}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("run tiny"):
                break
        process.terminate()
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 33
    assert "The next start resumes from there." in out
