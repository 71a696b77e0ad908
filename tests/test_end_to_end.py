"""The whole path through the commands that a person types, over a real S3 server, with a tiny
model.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from emotion_train import cli as train_cli
from emotion_train.data.index import INDEX_KEY, read_index
from emotion_train.evaluation.floors import posts as split_posts
from emotion_train.evaluation.predictions import predictions_from_parquet
from emotion_train.report.schema import Report
from emotion_train.runs.log import final_entry, read_log
from emotion_train.storage.open import open_store
from launch import cli as launch_cli
from tests.helpers.edited_index import edit
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_words, write_posts

ROOT = Path(__file__).parents[1]


MAINS = {"emotion-train": train_cli.main, "emotion-launch": launch_cli.main}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """What the command answers as a program of its own, which takes seconds to import PyTorch."""
    module = {"emotion-train": "emotion_train.cli", "emotion-launch": "launch.cli"}[words[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *words[1:]],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def done_here(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints, run in this process."""
    code = MAINS[words[0]](list(words[1:]))
    answer = capfd.readouterr()
    assert code == 0, answer.out + answer.err
    return answer.out


def test_posts_in_adapter_and_report_out(
    own_bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # TensorBoard's files go to tracking/
    base = causal_checkpoint(tmp_path / "base", "mistral")
    data, runs, adapter = f"{own_bucket_url}/posts", f"{own_bucket_url}/runs", tmp_path / "adapter"
    done_here(capfd, "emotion-train", "prepare", str(write_posts(tmp_path / "source")), data)
    assert "already there" in done_here(capfd, "emotion-train", "prepare", str(tmp_path / "source"), data)

    words = [
        *tiny_words(tmp_path),
        f"data.url={data}",
        f"run.output_url={runs}",
        f"model.base={base}",
        "run.trackers=[tensorboard]",
    ]
    assert "wrong" not in done_here(capfd, "emotion-launch", "check", *words)
    answer = command("emotion-launch", "run", "--accelerate-config", "cpu", *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    out = answer.stdout
    assert "accelerate launch --config_file" in out
    assert f"published at step 14: {runs}/tiny" in out
    assert list((tmp_path / "tracking" / "tiny").glob("events.out.*"))
    with monkeypatch.context() as patch:  # again: nothing is claimed
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert "published at step 14" in done_here(capfd, "emotion-train", "train", *words)
    entries = read_log(open_store(runs), "tiny")
    assert [entry.kind for entry in entries] == ["claim", "checkpoint", "checkpoint", "final"]
    assert entries[0].metrics["processes"] == 1
    assert "CPU" in str(entries[0].metrics["device"])
    assert entries[0].metrics["steps"] == entries[-1].step
    assert "published" in done_here(capfd, "emotion-launch", "runs", runs)

    done_here(capfd, "emotion-launch", "pull", f"{runs}/tiny", "--to", str(adapter))
    report = Report.model_validate_json((adapter / "report" / "report.json").read_bytes())
    predictions = predictions_from_parquet((adapter / "report" / "predictions_test.parquet").read_bytes())
    expected = f1_score(
        predictions.truth_N, predictions.predicted_N, average="macro", labels=range(4), zero_division=0
    )
    assert report.splits["test"].macro_f1 == pytest.approx(expected)
    assert report.identity.index_sha256 == read_index(open_store(data)).sha256()
    assert report.speed.posts == 2 * report.dataset.rows["train"]
    assert "<svg" in (adapter / "report" / "report.html").read_text()
    for name in ("README.md", "report/report.json", "report/report.html", "report/tensorboard/run.tfevents"):
        assert str(tmp_path).encode() not in (adapter / name).read_bytes(), name  # no path of this machine

    lines = done_here(
        capfd,
        "emotion-train",
        "predict",
        "--adapter",
        str(adapter),
        "--format",
        "jsonl",
        "tea and rain",
        "never again",
        "stars",
    )
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["text"] for row in rows] == ["tea and rain", "never again", "stars"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in rows)

    again = tmp_path / "again"
    done_here(
        capfd,
        "emotion-train",
        "evaluate",
        "--adapter",
        str(adapter),
        "--data",
        data,
        "--split",
        "test",
        "--out",
        str(again),
    )
    repeated = predictions_from_parquet((again / "predictions_test.parquet").read_bytes())
    assert repeated.ids == predictions.ids
    assert abs(repeated.prob_NC - predictions.prob_NC).max() < 1e-5
    out = done_here(
        capfd,
        "emotion-train",
        "evaluate",
        "--adapter",
        str(adapter),
        "--file",
        str(tmp_path / "source" / "test.csv"),
    )
    assert f"Macro-F1 {expected:.3f}" in out
    assert "None of the 54 posts is in the training split." in out


def test_posts_of_400_words_at_96_tokens_pass_nothing_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    causal_checkpoint(tmp_path / "base", "llama")  # a token a byte, and BOS
    source, adapter = tmp_path / "posts.csv", tmp_path / "adapter"
    with source.open("w", newline="") as file:
        rows = [(f"post {i} {'rain ' * (400 + i)}", ("calm", "glee")[i % 2]) for i in range(120)]
        csv.writer(file).writerows([("text", "label"), *rows])
    words = tiny_words(tmp_path, "data.max_length=96", "train.epochs=1")

    out = done_here(capfd, "emotion-train", "prepare", str(source), str(tmp_path / "data"))
    assert "warning     by default, data.max_length=128 would cut about 100.0 % of the training posts" in out
    index = read_index(open_store(str(tmp_path / "data")))
    posts = {
        name: list(split_posts(open_store(str(tmp_path / "data")), split))
        for name, split in index.splits.items()
    }
    sizes = {name: sorted(1 + len(text.encode()) for _, text, _ in some) for name, some in posts.items()}
    lost = {name: f"{100 * (1 - 96 * len(some) / sum(some)):.1f} %" for name, some in sizes.items()}
    of_train = f"cuts 100.0 % of the 96 training posts and {lost['train']} of their tokens"
    advice = f"data.max_length={sizes['train'][-2]} would cut at most 2 %"  # one of 96 may be longer

    out = done_here(capfd, "emotion-launch", "check", *words)
    (line,) = (line for line in out.splitlines() if line.startswith("warn"))
    assert of_train in line
    assert advice in line
    out = done_here(capfd, "emotion-launch", "plan", *words)
    assert (
        f"posts of 96.0 tokens ({sum(sizes['train']) / 96:.1f} uncut; data.max_length=96 cuts 100.0 %" in out
    )
    assert f"warning: data.max_length=96 {of_train}" in out

    assert train_cli.main(["train", *words]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert f"! data.max_length=96 {of_train}" in shown
    assert f"100.0 % of the test posts, {lost['test']} of their tokens, at 96 tokens" in shown
    done_here(capfd, "emotion-launch", "pull", str(tmp_path / "runs" / "tiny"), "--to", str(adapter))
    report = Report.model_validate_json((adapter / "report" / "report.json").read_bytes())
    for name, some in sizes.items():
        cut = report.cuts[name]
        assert (cut.posts, cut.cut_posts, cut.tokens) == (len(some), len(some), sum(some))
        assert (cut.lost_tokens, cut.longest_tokens) == (sum(some) - 96 * len(some), some[-1])
    assert report.warnings[-1].startswith(f"data.max_length=96 {of_train}")
    for page in ("README.md", "report/report.html"):
        assert of_train in (adapter / page).read_text()
        assert advice in (adapter / page).read_text()

    told = "120 of 120 posts were cut at the 96 tokens that the adapter was trained with"
    test = f"{len(sizes['test'])} of {len(sizes['test'])} posts were cut at the 96 tokens"
    for asked, line in ((["--file", str(source)], told), (["--data", str(tmp_path / "data")], test)):
        assert train_cli.main(["evaluate", "--adapter", str(adapter), *asked]) == 0
        assert line in capfd.readouterr().err


@pytest.mark.slow  # quicker: launch/test_cli.py, without a reader
def test_exit_code_2_comes_through_accelerate(tmp_path: Path) -> None:
    answer = command("emotion-launch", "run", "--accelerate-config", "cpu", *tiny_words(tmp_path))
    assert answer.returncode == 2
    assert f"There is no prepared data set at {tmp_path / 'data'}" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.slow  # quicker: launch/run/test_processes.py
def test_a_signal_to_the_launcher_leaves_no_trainer_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words(tmp_path, "train.epochs=1000")
    causal_checkpoint(tmp_path / "base", "llama")
    done_here(
        capfd, "emotion-train", "prepare", str(write_posts(tmp_path / "source")), str(tmp_path / "data")
    )
    line = [sys.executable, "-m", "launch.cli", "run", "--accelerate-config", "cpu", *words]
    with subprocess.Popen(
        line,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "runs" / "tiny" / "log" / "00000001.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        message = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 33
    assert "is saved. The next start resumes from there." in message
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
    assert not left
    assert "training" in message or "loading" in message or "run tiny" in message


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


@pytest.mark.slow  # quicker: the sentence in test_engines.py, that of exit code 2 in launch/test_cli.py
def test_a_gpu_config_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done_here(
        capfd, "emotion-train", "prepare", str(write_posts(tmp_path / "source")), str(tmp_path / "data")
    )
    answer = command(
        "emotion-launch", "run", "--accelerate-config", "single_gpu_qlora", *tiny_words(tmp_path)
    )
    assert answer.returncode == 2
    assert "accelerate_configs/cpu.yaml" in answer.stderr


def run_here(words: list[str], capsys: pytest.CaptureFixture[str], program: str = "train") -> str:
    """Run a command in this process that must end with exit code 2, and return its sentence."""
    main = launch_cli.main if program == "launch" else train_cli.main
    assert main(words) == 2
    return capsys.readouterr().err


def test_an_index_that_was_edited_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    causal_checkpoint(tmp_path / "base", "llama")
    source, data = write_posts(tmp_path / "source"), tmp_path / "data"
    assert train_cli.main(["prepare", str(source), str(data)]) == 0
    index = data / INDEX_KEY
    original = index.read_bytes()
    index.write_bytes(original.replace(b'"rows":', b'"rowz":', 1))
    assert "damaged or was edited" in run_here(["train", *tiny_words(tmp_path)], capsys)

    index.write_bytes(original)
    assert train_cli.main(["train", *tiny_words(tmp_path, "train.epochs=1")]) == 0
    entry = final_entry(open_store(str(tmp_path / "runs")), "tiny")
    # as if it had stopped before publishing
    (tmp_path / "runs" / "tiny" / "log" / f"{entry.seq:08d}.json").unlink()
    edit(index, lambda document: document.update(seed=43))
    assert "the data set's index" in run_here(["train", *tiny_words(tmp_path, "train.epochs=1")], capsys)

    index.write_bytes(original)
    (shard,) = (data / "train").glob("part-00000-*.parquet")
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    assert "is not what index.json describes" in run_here(
        ["train", *tiny_words(tmp_path, "run.id=other")], capsys
    )


def test_a_base_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert train_cli.main(["prepare", str(write_posts(tmp_path / "source")), str(tmp_path / "data")]) == 0
    assert "does not exist" in run_here(["train", *tiny_words(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predict", "--adapter", "nowhere", "x"], "no adapter folder nowhere"),
        (["predict", "--adapter", ".", "--file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["evaluate", "--adapter", "nowhere", "--data", "posts"], "no adapter folder nowhere"),
        (["train"], "data.url: required and not given"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in run_here(words, capsys)


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from emotion_train import prepare

    def full(arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/part")

    monkeypatch.setattr(prepare, "run", full)
    assert "the disk is full (/scratch/part)" in run_here(["prepare", "posts.csv", str(tmp_path)], capsys)


def test_a_gpu_that_is_too_small_names_settings_that_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from emotion_train.training import start

    def too_large(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(start, "build_model", too_large)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    causal_checkpoint(tmp_path / "base", "llama")
    assert train_cli.main(["prepare", str(write_posts(tmp_path / "source")), str(tmp_path / "data")]) == 0
    sentence = run_here(["train", *tiny_words(tmp_path)], capsys)
    assert "ran out of the memory of a GPU of 80.0 GiB: with 512 tokens a micro-batch" in sentence
    assert "; type " in sentence
    assert "The run resumes from its last checkpoint" in sentence


def test_an_output_that_cannot_be_written_is_found_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_cli.main(["check", *tiny_words(tmp_path, "run.output_url=/proc/runs")]) == 2
    assert "/proc/runs" in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong output")
    )


def test_pulling_into_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from emotion_train.runs.log import Writer

    writer = Writer(open_store(str(tmp_path / "runs")), "run", "", "")
    writer.claim(0, 0)
    writer.append("final", 0, 0)
    assert "/proc/nope/adapter cannot be written" in run_here(
        ["pull", str(tmp_path / "runs" / "run"), "--to", "/proc/nope/adapter"], capsys, "launch"
    )


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from emotion_train.runs.log import Writer

    store = open_store(str(tmp_path))
    Writer(store, "good", "", "").claim(0, 0)
    store.write("bad/log/00000000.json", b"{")
    store.write("app/log/server.txt", b"of another program")
    assert launch_cli.main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["bad", "damaged"]
    assert lines[2].split()[:2] == ["good", "training"]
    assert len(lines) == 3


def test_help_names_every_verb_and_exit_code_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom emotion_train.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:"
        " pass\nprint('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for word in (*train_cli.VERBS, "33  checkpointed", "34  fenced"):
        assert word in out
    assert out.endswith("False\n")
