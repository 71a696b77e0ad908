"""A smoke run: how its two starts follow each other, what it says of the whole run, and once the
real thing by `emotion-launch run --smoke`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion_train.config import Config, load_config
from emotion_train.data.index import Index, limited, read_index
from emotion_train.errors import Preempted, WrongRequest
from emotion_train.runs.log import Metrics, Writer, is_smoke, read_log, smoke_id, upload_part
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.cli import main
from launch.results.history import list_runs
from launch.run.smoke import STEPS, rehearse, smoke_config, smoke_run, smoke_words, whole_run
from launch.workload import work_of
from tests.helpers.tiny_runs import tiny_config, tiny_words

RUN = "tiny-smoke"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smoke")
    tiny_config(made)
    return made


def index_of(config: Config) -> Index:
    return read_index(open_store(config.data.url))


# --- what it is asked to do ---


def test_the_smoke_run_of_a_config_is_ten_steps_of_one_epoch_with_one_evaluation(folder: Path) -> None:
    config = tiny_config(folder, "train.global_batch_size=4", "evaluation.every_steps=2")
    smoke = smoke_config(config, index_of(config), "tiny")
    assert load_config(None, [*tiny_words(folder, "train.global_batch_size=4"), *smoke_words(smoke)]) == smoke
    kept = limited(index_of(config), smoke.data.limit)
    assert smoke.train.steps(kept.split("train").rows) == STEPS == -(-kept.split("train").rows // 4)
    assert smoke.evaluation.every_steps is smoke.checkpoint.every_seconds is None
    assert smoke.run.id == RUN


@pytest.mark.parametrize(
    ("given", "limit", "steps"),
    [("data.limit=20", 20, 4), ("train.max_steps=3", 160, 3), ("train.global_batch_size=1", 10, 10)],
)
def test_limits_of_the_config_itself_stay(given: str, limit: int, steps: int, folder: Path) -> None:
    config = tiny_config(folder, given)
    smoke = smoke_config(config, index_of(config), "tiny")
    assert smoke.data.limit == limit
    assert smoke.train.steps(limited(index_of(config), limit).split("train").rows) == steps


def test_a_smoke_run_has_a_name_that_a_run_may_have() -> None:
    assert smoke_id("a") == "a-smoke"
    assert smoke_id("a-smoke") == "a-smoke"
    assert len(smoke_id("x" * 128)) == 128
    assert is_smoke(smoke_id("x" * 128))
    assert not is_smoke("a")


def test_several_nodes_need_a_name_that_all_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NODE_RANK", "0"), ("NUM_NODES", "2"), ("NODE_IPS", "10.0.0.1\n10.0.0.2")):
        monkeypatch.setenv(f"SKYPILOT_{name}", value)
    monkeypatch.delenv("SKYPILOT_TASK_ID", raising=False)
    with pytest.raises(WrongRequest, match=r"type run\.id=NAME"):
        smoke_run(tiny_config(folder, "run.id="), lambda words, stop_after: 0)


@pytest.mark.parametrize(
    ("word", "refusal"),
    [
        ("report.slices=[colour]", "'colour', which is no kept column"),
        ("loss.class_weights={calmer: 2}", "calmer"),
    ],
)
def test_what_the_data_set_does_not_have_is_refused_before_anything_starts(
    folder: Path, word: str, refusal: str
) -> None:
    started: list[object] = []

    def start(words: list[str], stop_after: int | None) -> int:
        started.append(words)
        return 0

    with pytest.raises(WrongRequest, match=refusal):
        smoke_run(tiny_config(folder, word), start)
    assert not started


# --- two starts ---


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


class Starts:
    """Writes what a start would leave in the log; `ends` are the exit codes of the starts, and the
    steps of the checkpoints that they leave.
    """

    def __init__(self, store: Store, *ends: tuple[int, int]) -> None:
        self.store, self.ends = store, iter(ends)
        self.asked: list[int | None] = []

    def __call__(self, stop_after: int | None) -> int:
        self.asked.append(stop_after)
        code, step = next(self.ends)
        writer = Writer(self.store, RUN, "a" * 64, "b" * 64)
        writer.claim(0, 0)
        if step:
            writer.append("checkpoint", 0, step, (), {})
        return code


def rehearsed(folder: Path, store: Store, *ends: tuple[int, int]) -> tuple[int, list[int | None]]:
    config = tiny_config(folder, "train.global_batch_size=4")
    smoke, starts = smoke_config(config, index_of(config), "tiny"), Starts(store, *ends)
    index = limited(index_of(config), smoke.data.limit)
    return rehearse(smoke, index, store, starts, lambda words: None), starts.asked


def test_the_second_start_follows_a_preemption_that_was_rehearsed(folder: Path, store: Store) -> None:
    assert rehearsed(folder, store, (Preempted.exit_code, 5), (0, 10)) == (0, [5, None])


@pytest.mark.parametrize("end", [(2, 0), (1, 0), (1, 5), (0, 10), (Preempted.exit_code, 3)])
def test_nothing_follows_a_start_that_failed_or_was_really_preempted(
    end: tuple[int, int], folder: Path, store: Store
) -> None:
    assert rehearsed(folder, store, end) == (end[0], [5])


def test_a_smoke_run_that_a_preemption_stopped_has_its_second_start_by_the_scheduler(
    folder: Path, store: Store
) -> None:
    assert rehearsed(folder, store, (Preempted.exit_code, 3))[0] == Preempted.exit_code
    assert rehearsed(folder, store, (0, 10)) == (0, [None])


# --- what the whole run will take ---


def leave(store: Store, price: float | None, **changes: float) -> None:
    """The log of a smoke run of 16 posts a step with two starts, whose checkpoint says what it
    measured.
    """
    progress = {
        "examples": 160,
        "train_seconds": 50.0,
        "warm_up_examples": 32,
        "warm_up_seconds": 42.0,
        "evaluation_seconds": 5.0,
        "earlier_wall_seconds": 255.0,
        "history": [{"step": 10}],
        **changes,
    }
    facts: Metrics = {"usd_per_hour": price}
    Writer(store, RUN, "a" * 64, "b" * 64).claim(0, 0, facts)
    writer = Writer(store, RUN, "a" * 64, "b" * 64)
    writer.claim(0, 5, facts)
    content = json.dumps({"progress": progress}).encode()
    part = upload_part(store, RUN, f"data/{writer.incarnation:08d}/step-00000010-scored/state.json", content)
    writer.append("checkpoint", 1, 10, (part,), {"macro_f1": 0.5})


def test_the_whole_run_is_told_from_what_was_measured_but_for_the_first_steps(
    folder: Path, store: Store
) -> None:
    config = tiny_config(folder, "train.epochs=40")
    index, data = index_of(config), open_store(config.data.url)
    leave(store, 3.0)
    found = whole_run(config, index, limited(index, 40), store, RUN, data)
    assert found is not None
    train, validation = (index.split(name).rows for name in ("train", "validation"))
    assert found.posts_per_second == (160 - 32) / (50 - 42)
    assert found.training_s == 40 * train / 16
    assert found.steps == 40 * -(-train // 16)
    scored = work_of(config, index, data, 1.0).scored_posts
    assert scored == 40 * validation + validation + index.split("test").rows
    assert found.scoring_s == pytest.approx(scored * 5.0 / 40)
    assert found.start_s == (255 - 50 - 5) / 2
    assert found.hours == pytest.approx((found.training_s + found.scoring_s + 100) / 3600)
    assert found.usd == pytest.approx(3 * found.hours)
    assert str(found).startswith(f"the whole run: {found.steps:,} steps in ")
    assert f"${found.usd:.2f} at $3.00 an hour" in str(found)


def test_without_a_price_it_says_how_to_give_one_and_without_a_measurement_nothing(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    config = tiny_config(folder)
    index, data = index_of(config), open_store(config.data.url)
    leave(store, None)
    found = whole_run(config, index, limited(index, 40), store, RUN, data)
    assert "report.usd_per_hour=N gives one" in str(found)
    other = open_store(str(tmp_path / "other"))
    leave(other, None, train_seconds=0.0)
    assert whole_run(config, index, limited(index, 40), other, RUN, data) is None
    assert whole_run(config, index, index, open_store(str(tmp_path / "none")), RUN, data) is None


# --- the real thing ---


@pytest.fixture
def command(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "launch.cli", "run", "--accelerate-config", "cpu", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.mark.slow  # quicker: the two starts above, and the trainer's own stop in test_trainer.py
def test_a_smoke_run_resumes_publishes_and_says_what_the_whole_run_takes(
    folder: Path, command: Callable[..., subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words(folder, "run.id=real", "train.global_batch_size=4", "report.usd_per_hour=3.6")
    done = command("--smoke", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "second start, which resumes" in done.stderr
    assert "resumed at step 5 of 10" in done.stderr
    assert "the whole run: 54 steps in " in done.stdout
    assert "at $3.60 an hour" in done.stdout
    entries = read_log(open_store(str(folder / "runs")), "real-smoke")
    kinds = [entry.kind for entry in entries]
    assert kinds == ["claim", "checkpoint", "claim", "checkpoint", "final"]
    assert [entry.step for entry in entries if entry.kind == "checkpoint"] == [5, 10]
    assert main(["runs", str(folder / "runs")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("real-smoke "))
    assert "published (smoke)" in row
    facts = next(one for one in list_runs(open_store(str(folder / "runs"))) if one.run_id == "real-smoke")
    assert (facts.starts, facts.unpriced, facts.steps) == (2, 0, 10)
    again = command("--smoke", *words)  # published: nothing is trained, the same is said
    assert again.returncode == 0
    assert "the whole run: 54 steps in " in again.stdout
