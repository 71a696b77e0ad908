"""A start whose store does not answer waits for it, tells of it and ends with 1, never with 2; what
a person has to mend is not waited for. The store is a real S3 server behind a proxy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from emotion_train import cli as train_cli
from emotion_train import train
from emotion_train.errors import EmotionTrainError, NotStarted, Preempted, StorageError, WrongRequest
from emotion_train.preparation.steps import prepare
from emotion_train.processes.interruption import Interruptions
from emotion_train.processes.notices import Notice
from emotion_train.processes.ranks import Ranks
from emotion_train.runs import checkpoint
from emotion_train.runs.log import Entry, read_large_part, read_log
from emotion_train.storage import s3 as s3_page
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.training import start, waiting
from emotion_train.training.claim import Claiming, claim
from emotion_train.training.job import Claimed
from emotion_train.training.waiting import PatientStart
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import job_of, start_trainer, tiny_config, tiny_words, write_posts


@pytest.fixture(scope="module")
def bucket(s3: LocalS3) -> None:
    s3.create_bucket("outage")


@pytest.fixture(scope="module")
def posts_url(bucket: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set in a bucket."""
    prepare(str(write_posts(tmp_path_factory.mktemp("posts"))), "s3://outage/posts")
    return "s3://outage/posts"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    causal_checkpoint(folder, "llama")
    return folder


@pytest.fixture
def proxy(s3: LocalS3, bucket: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(s3_page, "READ_TIMEOUT_S", 1)
        monkeypatch.setattr(s3_page, "PATIENT_ATTEMPTS", 1)
        monkeypatch.setattr(waiting, "end_even_if_stuck", lambda *_: None)  # it would end these tests
        yield proxy


def words(tmp_path: Path, base: Path, posts_url: str, *more: str) -> list[str]:
    return tiny_words(
        tmp_path,
        f"model.base={base}",
        f"data.url={posts_url}",
        "train.epochs=1",
        "preemption.notices=none",
        *more,
    )


@pytest.mark.parametrize("kind", ["503", "reset", "silent"])
def test_an_outage_that_outlasts_the_patience_ends_with_1_and_a_sentence(
    tmp_path: Path,
    base: Path,
    posts_url: str,
    proxy: FaultProxy,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    proxy.outage = kind
    assert train_cli.main(["train", *words(tmp_path, base, posts_url, "run.start_timeout_s=5")]) == 1
    lines = capfd.readouterr().err.splitlines()
    told = f"emotion-train: WAITING for the index of the data set at {posts_url}, for "
    assert sum(line.startswith(told) for line in lines) == 1
    sentence = f"The run did not start: the index of the data set at {posts_url} was waited for 5 s"
    assert lines[-1].startswith(f"emotion-train: {sentence} (run.start_timeout_s). {posts_url}/index.json ")
    assert not (tmp_path / "runs").exists()


def test_an_outage_at_the_start_that_ends_costs_a_word_and_nothing_else(
    tmp_path: Path, base: Path, posts_url: str, proxy: FaultProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.outage = "503"
    ends = threading.Timer(8, lambda: setattr(proxy, "outage", None))
    ends.start()
    output_url = f"s3://outage/{tmp_path.name}"
    assert train_cli.main(["train", *words(tmp_path, base, posts_url, f"run.output_url={output_url}")]) == 0
    err = capfd.readouterr().err
    assert "WAITING for the index of the data set" in err
    assert "did not start" not in err
    assert [entry.kind for entry in read_log(open_store(output_url), "tiny")][:1] == ["claim"]
    assert read_log(open_store(output_url), "tiny")[-1].kind == "final"


@pytest.mark.parametrize("wrong", ["bucket", "prefix", "key", "url"])
def test_what_a_person_has_to_mend_is_not_waited_for(
    tmp_path: Path,
    base: Path,
    posts_url: str,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    wrong: str,
) -> None:
    url = {"bucket": "s3://no-such-bucket/posts", "prefix": "s3://outage/none", "url": "s4://outage/posts"}
    if wrong == "key":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert train_cli.main(["train", *words(tmp_path, base, url.get(wrong, posts_url))]) == 2
    err = capfd.readouterr().err
    assert "WAITING" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("number", "held_s"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 3.0)])
def test_a_signal_while_an_endpoint_never_answers_ends_the_start_with_1(
    tmp_path: Path,
    base: Path,
    posts_url: str,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    held_s: float,
) -> None:
    """Not 33, which promises a checkpoint: nothing is known of one. SIGTERM holds first, so that
    the machine is gone before the code is read, and the run is started again.
    """
    monkeypatch.setattr(s3_page, "READ_TIMEOUT_S", 120)
    proxy.outage = "silent"
    sent_at = list[float]()

    def send() -> None:
        while not proxy.struck:
            time.sleep(0.1)
        time.sleep(7)  # the first look is over
        sent_at.append(time.monotonic())
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    hold = f"preemption.hold_s={held_s if number == signal.SIGTERM else 600}"
    assert train_cli.main(["train", *words(tmp_path, base, posts_url, hold)]) == 1
    took_s = time.monotonic() - sent_at[0]
    proxy.outage = None
    assert held_s <= took_s < held_s + 60
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"was waiting for the index of the data set at {posts_url}; nothing was trained in it" in last


# the parts, one process


def away(failures: int, value: object = "answer") -> Callable[[], object]:
    """Fails so often as a store does that is away."""
    left = iter(range(failures))

    def ask() -> object:
        if next(left, None) is not None:
            raise StorageError("s3://x/y cannot be reached.", transient=True)
        return value

    return ask


def patient(
    timeout_s: float = 60, kind: Callable[[], str | None] = lambda: None, hold_s: float = 0.0
) -> tuple[PatientStart, list[str]]:
    said = list[str]()

    def notice() -> Notice | None:
        found = kind()
        return None if found is None else Notice(cast(Any, found), f"{found} came", None, 1)

    return PatientStart(Interruptions(Ranks(), notice, hold_s, said.append), timeout_s, said.append), said


def test_it_asks_again_until_there_is_an_answer() -> None:
    start, said = patient()
    assert start.on_main("the log", "s3://x", away(2)) == "answer"
    assert len(said) == 1


@pytest.mark.parametrize("refusal", [WrongRequest("no"), StorageError("No permission.")])
def test_a_refusal_ends_it_at_once(refusal: EmotionTrainError) -> None:
    start, said = patient()

    def refuse() -> None:
        raise refusal

    with pytest.raises(type(refusal), match=str(refusal)):
        start.everywhere("the base", "s3://x", refuse)
    assert said == []


def test_a_notice_does_not_disturb_what_is_answered() -> None:
    start, _ = patient(kind=lambda: "sigterm")
    assert start.everywhere("the log", "s3://x", away(0)) == "answer"


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["sigterm", "sigint", "terminate"])
def test_33_is_only_for_a_run_whose_newest_state_is_known_to_be_saved(
    monkeypatch: pytest.MonkeyPatch, saved: bool, kind: str
) -> None:
    monkeypatch.setattr(waiting, "end_even_if_stuck", lambda *_: None)
    start, _ = patient(kind=lambda: kind)
    start.note_saved(saved)
    with pytest.raises(Preempted if saved else NotStarted) as caught:
        start.everywhere("the claim", "s3://x", away(100))
    assert caught.value.exit_code == (33 if saved else 1)


def test_a_termination_that_is_withdrawn_lets_the_start_wait_on() -> None:
    begun = time.monotonic()
    start, said = patient(
        kind=lambda: "terminate" if time.monotonic() - begun < 1.5 else None, hold_s=PATIENCE_S
    )
    assert start.everywhere("the log", "s3://x", away(2)) == "answer"
    assert "The termination was withdrawn: training continues" in said


# the claim


def kinds(url: str) -> list[str]:
    return [entry.kind for entry in read_log(open_store(url), "tiny")]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("503", "PUT", "/log/00000000")] * 2,
        # it is in the log, and nobody is told so
        [Fault("no answer", "PUT", "/log/00000000"), Fault("503", "HEAD", "/log/00000000")],
        [Fault("503", "GET", "list-type")],
    ],
)
def test_a_run_is_claimed_once_however_often_it_is_tried(
    tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    monkeypatch.setattr(s3_page, "CREATE_PAUSES_S", (0.0, 0.1))
    output_url = f"s3://outage/{tmp_path.name}"
    job = job_of(tiny_config(tmp_path, f"run.output_url={output_url}"))
    proxy.faults += faults
    start, said = patient()
    found = start.only_on_main("the claim", output_url, Claiming(job, start.note_saved))
    assert isinstance(found, Claimed)
    assert proxy.faults == []
    assert len(said) == 1
    assert kinds(output_url) == ["claim"]
    assert found.writer.append("note", 0, 0).seq == 1


def test_a_checkpoint_is_waited_for_after_a_claim_that_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    with ExitStack() as stack:
        trainer = start_trainer(config, stack)
        trainer._save({"macro_f1": 0.5})
        assert trainer.saver is not None
        assert trainer.saver.drain(PATIENCE_S)
    job, failing = job_of(config), away(2)
    monkeypatch.setattr(checkpoint, "read_large_part", lambda *given: failing() and read_large_part(*given))
    start, saved = patient()[0], list[bool]()
    found = start.only_on_main("the claim", "s3://x", Claiming(job, saved.append))
    assert isinstance(found, Claimed)
    assert found.newest is not None
    assert kinds(str(tmp_path / "runs")) == ["claim", "checkpoint", "claim"]
    assert saved == [True] * 3


def test_whether_the_newest_state_is_saved_is_told_before_any_is_read(tmp_path: Path) -> None:
    told = list[bool]()
    assert not isinstance(claim(job_of(tiny_config(tmp_path)), told.append), Entry)
    assert told == [False]  # there is none


# two processes

TWO = """
import os, sys, time
import torch.distributed as dist
from emotion_train.errors import EmotionTrainError, StorageError
from emotion_train.processes.interruption import Interruptions
from emotion_train.processes.notices import Notice
from emotion_train.processes.ranks import Ranks
from emotion_train.training import waiting
from emotion_train.training.waiting import PatientStart

waiting.end_even_if_stuck = lambda *_: None
dist.init_process_group('gloo')
ranks = Ranks(timeout_s=10)  # shorter than every wait below
notice = [None]
start = PatientStart(
    Interruptions(ranks, lambda: notice[0], 0.0, print),
    60,
    lambda words: print(f'{ranks.rank} says {words}', flush=True),
)
hurried = PatientStart(Interruptions(ranks, lambda: None, 0.0, print), 1, lambda words: None)
begun = time.monotonic()

def away_for(seconds, rank):
    def ask():
        if ranks.rank == rank and time.monotonic() - begun < seconds:
            raise StorageError('s3://x cannot be reached.', transient=True)
        return ranks.rank
    return ask

def refuse_on_one():
    if ranks.rank == 1:
        raise StorageError('No permission.')

def ends_with(action):
    try:
        return action()
    except EmotionTrainError as error:
        return f'{type(error).__name__} {error.exit_code}'

print(ranks.rank, 'main', start.on_main('the log', 's3://x', away_for(14, 0)), flush=True)
begun = time.monotonic()
print(ranks.rank, 'everywhere', start.everywhere('the base', 's3://y', away_for(14, 1)), flush=True)
begun = time.monotonic()
with ranks.in_contact():
    time.sleep(14 * ranks.rank)
print(ranks.rank, 'contact', time.monotonic() - begun > 13, flush=True)
print(ranks.rank, 'hurried', ends_with(lambda: hurried.on_main('it', 's3://x', away_for(900, 0))), flush=True)
print(ranks.rank, 'refused', ends_with(lambda: start.everywhere('it', 's3://x', refuse_on_one)), flush=True)
if ranks.rank == 1:
    notice[0] = Notice('sigterm', 'SIGTERM came', None, 1)
print(ranks.rank, 'notice', ends_with(lambda: start.on_main('it', 's3://x', away_for(900, 0))), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_wait_together_longer_than_they_wait_for_each_other(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    found = sorted(line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    said = [line for line in found if " says " in line]
    assert [line for line in found if line not in said] == [
        "0 contact True",
        "0 everywhere 0",
        "0 hurried NotStarted 1",
        "0 main 0",
        "0 notice NotStarted 1",
        "0 refused StorageError 2",
        "1 contact True",
        "1 everywhere 1",
        "1 hurried NotStarted 1",
        "1 main 0",
        "1 notice NotStarted 1",
        "1 refused StorageError 2",
    ]
    assert {line.split(" for ")[0] for line in said} >= {"0 says WAITING", "1 says WAITING"}


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False])
def test_two_trainers_behind_an_outage_at_the_start(
    tmp_path: Path, base: Path, posts_url: str, proxy: FaultProxy, ends: bool
) -> None:
    """Through the command that a person types."""
    proxy.outage = "503"
    given = words(tmp_path, base, posts_url, f"run.start_timeout_s={PATIENCE_S if ends else 2}")
    line = [sys.executable, "-m", "launch.cli", "run", "--accelerate-config", "cpu", "--processes", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*line, *given], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        seen = list[str]()
        for said in process.stdout:
            seen.append(said)
            if ends and "WAITING for the index" in said:
                time.sleep(5)
                proxy.outage = None
        code = process.wait(PATIENCE_S)
    out = "".join(seen)
    assert code == (0 if ends else 1), out[-4000:]
    assert ("The run did not start: the index of the data set" in out) != ends
    assert bool(kinds(str(tmp_path / "runs"))) == ends


def test_a_staged_base_is_waited_for_as_the_rest_is(
    tmp_path: Path,
    base: Path,
    posts_url: str,
    proxy: FaultProxy,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its index, and its weights after the claim, in a run."""

    def with_faults(*given: Any) -> Any:
        proxy.faults += [Fault("503", "GET", ".safetensors")] * 4
        return start.start_trainer(*given)

    monkeypatch.setattr(train, "start_trainer", with_faults)
    url = f"s3://outage/{tmp_path.name}-base"
    assert train_cli.main(["stage-base", str(base), url, "--precision", "bf16"]) == 0
    # for who reads ahead, and for who waits
    proxy.faults += [Fault("503", "GET", "base.json")] * 6
    given = words(tmp_path, base, posts_url, f"model.base={url}", "model.precision=bf16")
    assert train_cli.main(["train", *given]) == 0
    err = capfd.readouterr().err
    assert f"WAITING for the base at {url}" in err
    assert "The run waits for its base: " in caplog.text
    assert kinds(str(tmp_path / "runs"))[-1] == "final"
    assert proxy.faults == []
