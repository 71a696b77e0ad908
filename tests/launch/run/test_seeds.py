"""`emotion-launch run --seeds`: which runs it makes, how they share the GPUs of a machine, and how
they end together.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from emotion_train.config import Config, example_config, load_config
from emotion_train.demo import POSTS
from emotion_train.errors import WrongRequest
from emotion_train.runs.log import read_log
from emotion_train.storage.open import open_store
from launch.cli import main
from launch.run import seeds
from launch.run.seeds import SeedRun, as_jobs, seed_runs, seeds_of, spread
from launch.run.topology import Gpu
from tests.helpers.patience import PATIENCE_S

ROOT = Path(__file__).parents[3]
GPUS = [Gpu(str(number), f"GPU-{number}", "H100", 81_559) for number in range(2)]


def config(*words: str) -> Config:
    return load_config(None, ["data.url=s3://team/posts", "run.output_url=s3://team/runs", *words])


# --- which runs ---


def test_a_number_counts_from_the_config_s_seed_and_a_list_names_seeds() -> None:
    assert seeds_of("3", 42) == (42, 43, 44)
    assert seeds_of(" 1, 5,9", 42) == (1, 5, 9)
    assert seeds_of("7,8,", 0) == (7, 8)


@pytest.mark.parametrize("words", ["", "1", "0", "5,", "1,1", "-1,2", "a,b", "1.5", "101", "3;4", "9" * 19])
def test_seeds_that_make_no_sense_are_refused(words: str) -> None:
    with pytest.raises(WrongRequest, match="give"):
        seeds_of(words, 42)


def test_each_seed_is_a_run_of_its_own_name_and_seed() -> None:
    overrides = ["run.id=mine", "train.epochs=2", "run.seed=4"]
    found = seed_runs("2", config(*overrides), overrides)
    assert [(one.seed, one.run_id) for one in found] == [(4, "mine-seed-4"), (5, "mine-seed-5")]
    for one in found:
        made = config(*one.overrides)
        assert (made.run.id, made.run.seed, made.train.epochs) == (one.run_id, one.seed, 2)


def test_a_derived_name_is_one_for_all_and_fits() -> None:
    task = {"SKYPILOT_TASK_ID": "sky-" + "x" * 140}
    found = seed_runs("1,1000000", config(), [], task)
    assert len({one.run_id.rpartition("-seed-")[0] for one in found}) == 1
    for one in found:
        assert config(*one.overrides).run.id == one.run_id
    assert seed_runs("1,1000000", config(), [], task) == found  # a recovery goes on with the same


def test_jobs_are_lines_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.url=s3://team/posts", "run.output_url=s3://team/runs", "run.id=mine", "lora.r=8"]
    head, first, _, compare = as_jobs(
        "my.yaml", config(*overrides), seed_runs("2", config(*overrides), overrides)
    )
    assert head.startswith("as jobs of SkyPilot")
    words = shlex.split(first)
    assert words[:4] == ["sky", "jobs", "launch", "sky/train.yaml"]
    given = dict(word.split("=", 1) for word in words if word.isupper() or word.partition("=")[0].isupper())
    assert given == {
        "DATA_URL": "s3://team/posts",
        "OUTPUT_URL": "s3://team/runs",
        "CONFIG": "my.yaml",
        "OVERRIDES": "lora.r=8 run.id=mine-seed-42 run.seed=42",
    }
    assert compare == "then: emotion-launch compare s3://team/runs/mine-seed-42 s3://team/runs/mine-seed-43"
    assert main(["run", "--dry-run", "--accelerate-config", "cpu", "--seeds", "1,5", *overrides]) == 0
    out = capsys.readouterr().out
    assert out.count("accelerate launch --config_file") == 2
    assert "run.id=mine-seed-5 run.seed=5" in out
    assert "sky jobs launch sky/train.yaml -n mine-seed-1" in out


def test_folders_are_no_place_for_jobs() -> None:
    own = load_config(None, ["data.url=posts", "run.output_url=runs", "run.id=a"])
    assert "have to be in a bucket" in as_jobs(None, own, seed_runs("2", own, []))[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--spread"], "--spread is for several seeds"),
        (["--spread", "--seeds", "3", "--accelerate-config", "cpu"], "no GPU is used here"),
        (["--seeds", "x"], "--seeds is 'x'"),
    ],
)
def test_a_wrong_request_ends_with_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words, "data.url=nowhere", "run.output_url=runs"]) == 2
    assert says in capsys.readouterr().err


# --- spread over GPUs ---


def jobs(folder: Path, *plans: str) -> list[tuple[SeedRun, list[str], Path]]:
    """Commands in place of runs; a plan writes what it learns to `folder`."""
    made = []
    for number, plan in enumerate(plans):
        script = folder / f"job-{number}.py"
        script.write_text(
            f"import os, signal, sys, time\nnumber, folder = {number}, {str(folder)!r}\n{plan}\n"
        )
        one = SeedRun(number, f"run-seed-{number}", ())
        made.append((one, [sys.executable, str(script)], folder / f"{number}.log"))
    return made


SHARED = """
gpu = os.environ['CUDA_VISIBLE_DEVICES']
taken = os.path.join(folder, gpu)
os.mkdir(taken)  # fails where another has this GPU
time.sleep(0.3)
os.rmdir(taken)
print('trained on', gpu, 'promised', os.environ['SKYPILOT_NUM_GPUS_PER_NODE'])
"""


def test_runs_that_are_spread_import_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, str]] = []

    def spread(jobs: object, gpus: object, environment: Mapping[str, str]) -> int:
        given.append(environment)
        return 0

    monkeypatch.setattr(seeds, "spread", spread)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/opt/x")
    arguments = argparse.Namespace(config=None, allow_unfenced=False)
    own = config("data.url=posts", f"run.output_url={tmp_path}")
    monkeypatch.chdir(tmp_path)
    assert seeds.spread_runs(arguments, own, [SeedRun(1, "run-seed-1", ())], GPUS) == 0
    assert given[0]["PYTHONSAFEPATH"] == "1"
    assert "" not in given[0]["PYTHONPATH"].split(os.pathsep)


def test_as_many_run_at_once_as_there_are_gpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = jobs(tmp_path, *[SHARED] * 5)
    assert spread(made, GPUS, {**os.environ, "SKYPILOT_NUM_GPUS_PER_NODE": "2"}) == 0
    said = [log.read_text() for _, _, log in made]
    assert {words.split()[2] for words in said} == {"GPU-0", "GPU-1"}
    assert all(words.endswith("promised 1\n") for words in said)
    assert capfd.readouterr().out.count("is published") == 5


@pytest.mark.parametrize(
    ("plans", "code"),
    [
        (("sys.exit(2)", "time.sleep(0.5); sys.exit(1)"), 2),
        (("sys.exit(33)", "sys.exit(0)"), 33),
        (("sys.exit(33)", "print('why'); os.kill(os.getpid(), 9)"), 1),
        (("sys.exit(34)", "sys.exit(1)"), 34),
    ],
)
def test_after_a_failure_none_is_started_and_its_code_is_told(
    tmp_path: Path, plans: tuple[str, str], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    started = "open(os.path.join(folder, f'started-{number}'), 'w')\n"
    made = jobs(tmp_path, *(started + plan for plan in (*plans, "")))
    assert spread(made, GPUS) == code
    assert sorted(path.name for path in tmp_path.glob("started-*")) == ["started-0", "started-1"]
    err = capfd.readouterr().err
    assert f"ended with {code}" in err
    assert ("why" in err) == (code == 1)


PARENT = """
import sys
from pathlib import Path
from launch.run.seeds import spread
from launch.run.topology import Gpu
from tests.launch.run.test_seeds import GPUS, jobs
sys.exit(spread(jobs(Path({folder!r}), {plan!r}, {plan!r}, {plan!r}), GPUS))
"""
WAITS = """
from launch.run.seeds import end_with_seeds
end_with_seeds()
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(33))
with open(os.path.join(folder, f'pid-{number}'), 'w') as file:
    file.write(str(os.getpid()))
os.rename(file.name, file.name + '.ready')
time.sleep(600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 33), (signal.SIGKILL, -signal.SIGKILL)])
def test_runs_end_with_the_one_that_started_them(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """In order after a signal, which none outlives; and at once where it is killed."""
    script = PARENT.format(folder=str(tmp_path), plan=WAITS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        deadline = time.monotonic() + PATIENCE_S
        while len(ready := list(tmp_path.glob("*.ready"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = [int(path.read_text()) for path in ready]
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == code
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*.ready"))) == 2  # the third was not started


def _runs(process_id: int) -> bool:
    """Whether it is there and no zombie that waits for its parent."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- for real ---


@pytest.mark.slow
def test_two_demo_runs_are_trained_and_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The demo's posts and config with a model of two layers; the same command trains nothing
    again.
    """
    from emotion_train import cli as train_cli
    from tests.helpers.tiny_models import causal_checkpoint  # torch, which the parent of a run needs not

    causal_checkpoint(tmp_path / "base", "llama")
    assert train_cli.main(["prepare", str(POSTS), str(tmp_path / "data")]) == 0
    words = [
        f"model.base={tmp_path / 'base'}",
        f"data.url={tmp_path / 'data'}",
        f"run.output_url={tmp_path / 'runs'}",
        "run.id=demo",
        "train.epochs=1",
        "report.bootstrap_samples=100",
    ]
    line = [sys.executable, "-m", "launch.cli", "run", "--accelerate-config", "cpu", "--seeds", "1,2"]
    line += ["--config", str(example_config()), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        answer = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "demo-seed-2" in answer.stdout
        assert "over 2 seeds" in answer.stdout
        assert f"written: {tmp_path}/runs/demo-seeds.html" in answer.stdout
        pooled = " ".join(f"{tmp_path}/runs/demo-seed-{seed}" for seed in (1, 2))
        assert f"emotion-launch compare --group-by-config {pooled} URLS_OF_THOSE_RUNS" in answer.stdout
    store = open_store(str(tmp_path / "runs"))
    for seed in (1, 2):
        assert [one.kind for one in read_log(store, f"demo-seed-{seed}")].count("claim") == 1
    assert "<table" in (tmp_path / "runs" / "demo-seeds.html").read_text()
    capfd.readouterr()
    assert main(["runs", str(tmp_path / "runs")]) == 0  # the page is no run
    assert len(capfd.readouterr().out.splitlines()) == 3
    urls = [f"{tmp_path}/runs/demo-seed-{seed}" for seed in (1, 2)]
    page = str(tmp_path / "page.html")
    assert main(["compare", *urls, "--group-by-config", "--page", page]) == 0
    out = capfd.readouterr().out
    assert "demo (2 seeds)" in out
    assert "one config, nothing to compare it with" in out
