"""The launcher over the real chain: `emotion-launch run`, accelerate launch, trainers that are
killed, signalled, or slow to end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from emotion_train.processes.launcher_link import below
from emotion_train.runs.log import Entry, Writer, read_log
from emotion_train.storage.open import open_store
from launch.run.processes import run_to_end
from tests.helpers import run_chain
from tests.helpers.metadata_servers import AwsHandler, serving
from tests.helpers.patience import PATIENCE_S
from tests.helpers.run_chain import one_process_config
from tests.helpers.tiny_runs import tiny_config, tiny_words

# What a launcher leaves ends within 2 s, and a busy machine may take some more to let it. Trainers
# that wait for a collective to fail, as without the launcher's lock, were seen for 9 s and longer.
SECONDS = 8.0

# a trainer without a model: PLAN is what its main does after it answers signals
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from emotion_train.processes.launcher_link import (
    answers_signals, end_within, report_published, run_as_trainer)
from emotion_train.processes.notices import PreemptionWatch
folder, rank = Path({folder!r}), os.environ.get('LOCAL_RANK', '0')
{before}
def main():
    with PreemptionWatch('none') as watch:
        answers_signals()
        (folder / f'pid-{{rank}}').write_text(str(os.getpid()))
        def wait():
            while watch.notice is None: time.sleep(0.02)
            return watch.notice.kind
{plan}
sys.exit(run_as_trainer(main))
"""


@contextmanager
def chain(
    folder: Path, plan: str, processes: int = 1, hold_s: float = 0, save_s: float = 60, before: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """`run_to_end` in a process of its own, over as many trainers; with two, torchelastic stands
    between.
    """
    script = folder / "trainer.py"
    indented = "".join(f"        {line}\n" for line in plan.strip().splitlines())
    script.write_text(TRAINER.format(folder=str(folder), before=before, plan=indented))
    line = [sys.executable, str(script)]
    if processes > 1:
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            str(script),
        ]
    code = (
        "import os, sys\nfrom launch.run import processes\nfrom launch.run.processes import run_to_end\n"
        "processes.FENCED_S = float(os.environ.get('FENCED_S', processes.FENCED_S))\n"
        f"sys.exit(run_to_end({line!r}, os.environ, {hold_s}, {save_s}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for path in folder.glob("pid-*"):
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)


def trainers(folder: Path, count: int) -> list[int]:
    """Their process ids, once all have begun to listen."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = [path.read_text() for path in sorted(folder.glob("pid-*"))]
        if len(found) == count and all(found):
            return [int(text) for text in found]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    words = process.communicate(timeout=PATIENCE_S)[1]
    return process.returncode, words


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ("report_published()\nreturn 0", 0),
        ("return 0", 1),
        ("return 1", 1),
        ("return 2", 2),
        ("return 33", 33),
        ("return 34", 34),
    ],
)
def test_the_trainer_s_own_code_is_returned(tmp_path: Path, plan: str, code: int) -> None:
    with chain(tmp_path, plan) as process:
        assert finish(process)[0] == code


@pytest.mark.parametrize("own", [0, 2])
def test_a_trainer_that_ends_with_a_code_and_no_word_has_not_published(tmp_path: Path, own: int) -> None:
    with chain(tmp_path, f"os._exit({own})") as process:
        code, words = finish(process)
    assert code == 1
    assert "without a message" in words


def test_a_wrong_request_of_accelerate_s_counts_where_no_trainer_has_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "refuses.py"
    script.write_text("import sys\nsys.exit('it says why' if sys.argv[1:] else 2)\n")
    assert run_to_end([sys.executable, str(script)], os.environ, 600) == 2
    assert capfd.readouterr().err == ""
    assert run_to_end([sys.executable, str(script), "1"], os.environ, 0) == 1


def test_a_start_that_is_killed_before_its_trainer_registered_says_by_what(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert run_to_end([sys.executable, str(script)], os.environ, 0) == 1
    assert "emotion-launch: SIGKILL ended the start before its trainer began" in capfd.readouterr().err


def test_a_signal_reaches_the_trainer_once(tmp_path: Path) -> None:
    plan = """
came = []
signal.signal(signal.SIGTERM, lambda *given: came.append(1))
(folder / 'listens').touch()
while not came: time.sleep(0.02)
time.sleep(1)
(folder / 'count').write_text(str(len(came)))
return 33
"""
    with chain(tmp_path, plan) as process:
        while not (tmp_path / "listens").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        time.sleep(0.4)
        process.terminate()
        assert finish(process)[0] == 33
    assert (tmp_path / "count").read_text() == "1"


def test_a_signal_before_the_trainer_listens_is_not_lost(tmp_path: Path) -> None:
    with chain(
        tmp_path, "assert wait() == 'sigterm'\nreturn 33", before="(folder / 'starts').touch()\ntime.sleep(1)"
    ) as process:
        while not (tmp_path / "starts").exists():
            time.sleep(0.02)
        process.terminate()
        assert finish(process)[0] == 33


def test_sigint_is_passed_on_and_a_second_one_kills_at_once(tmp_path: Path) -> None:
    with chain(tmp_path, "(folder / 'kind').write_text(wait())\ntime.sleep(600)\nreturn 33") as process:
        (trainer,) = trainers(tmp_path, 1)
        process.send_signal(signal.SIGINT)
        while not (tmp_path / "kind").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        code, words = finish(process)
        assert (tmp_path / "kind").read_text() == "sigint"
        assert code == 1
        assert "interrupted twice" in words
        assert not alive(trainer)


def test_a_trainer_that_overstays_is_killed_and_33_is_not_claimed_for_it(tmp_path: Path) -> None:
    with chain(tmp_path, "wait()\ntime.sleep(600)\nreturn 33", hold_s=0.5, save_s=1) as process:
        (trainer,) = trainers(tmp_path, 1)
        process.terminate()
        started = time.monotonic()
        code, words = finish(process)
        assert 1.4 < time.monotonic() - started < 50  # without `save_s` it is 300
        assert code == 1
        assert "killed" in words
        assert not alive(trainer)


@pytest.mark.parametrize("plan", ["wait()\nreturn 1", "wait()\nos.kill(os.getpid(), signal.SIGKILL)"])
def test_a_trainer_that_fails_on_a_machine_that_goes_ends_no_hold(tmp_path: Path, plan: str) -> None:
    with chain(tmp_path, plan, hold_s=3) as process:
        trainers(tmp_path, 1)
        process.terminate()
        started = time.monotonic()
        code, words = finish(process)
        assert time.monotonic() - started > 2.5
        assert code == 1
        assert "waiting for the machine to end" in words


@pytest.mark.parametrize("code", [0, 2, 34])
def test_what_needs_no_second_start_holds_nobody(tmp_path: Path, code: int) -> None:
    plan = f"wait()\nreturn {code}" if code else "wait()\nreport_published()\nreturn 0"
    with chain(tmp_path, plan, hold_s=600) as process:
        trainers(tmp_path, 1)
        process.terminate()
        assert process.wait(PATIENCE_S) == code


def test_sigint_ends_the_launcher_s_own_hold(tmp_path: Path) -> None:
    with chain(tmp_path, "wait()\nreturn 1", hold_s=600) as process:
        (trainer,) = trainers(tmp_path, 1)
        process.terminate()
        while alive(trainer):
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 1


def test_when_accelerate_is_killed_no_trainer_is_left(tmp_path: Path) -> None:
    plan = "(folder / 'parent').write_text(str(os.getppid()))\nwait()\nreturn 33"
    with chain(tmp_path, plan, processes=2) as process:
        found = trainers(tmp_path, 2)
        while not (tmp_path / "parent").exists() or not (tmp_path / "parent").read_text():
            time.sleep(0.02)
        os.kill(int((tmp_path / "parent").read_text()), signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 1
        assert not any(alive(trainer) for trainer in found)
        assert process.stderr is not None
        assert "without a message" in process.stderr.read()


@pytest.mark.parametrize(
    ("processes", "deaf"),
    [(1, False), (2, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, True), (2, False)))],
)
def test_when_the_launcher_is_killed_no_trainer_is_left_within_seconds(
    tmp_path: Path, processes: int, deaf: bool
) -> None:
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n" if deaf else ""
    with chain(tmp_path, f"{block}time.sleep(600)", processes) as process:
        found = trainers(tmp_path, processes)
        process.kill()
        assert_gone(found)


def test_when_launcher_and_agent_are_killed_at_once_no_trainer_is_left_within_seconds(tmp_path: Path) -> None:
    with chain(tmp_path, "time.sleep(600)", processes=2) as process:
        found = trainers(tmp_path, 2)
        agent = parent(found[0])
        assert agent not in (process.pid, 1)
        process.kill()
        os.kill(agent, signal.SIGKILL)
        assert_gone([*found, agent])


# what a trainer starts in a session of its own, told by a file of its process id
APART = """
import subprocess
script = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
def apart(name, **more):
    return subprocess.Popen([sys.executable, '-c', script, str(folder / f'pid-{name}')],
                            start_new_session=True, **more)
apart('plain')
apart('bare', env={})
twice = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
subprocess.run([sys.executable, '-c', twice, sys.executable, '-c', script, str(folder / 'pid-orphan')])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("end", ["return 1", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_what_a_trainer_has_started_ends_with_the_run(tmp_path: Path, end: str) -> None:
    wait = "while len(list(folder.glob('pid-*'))) < 4: time.sleep(0.02)\ntime.sleep(0.2)\n"
    with chain(tmp_path, f"{APART}{wait}{end}") as process:
        code, _ = finish(process)
        left = trainers(tmp_path, 4)
    assert code == 1
    assert not any(alive(one) for one in left)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_what_a_trainer_has_started_ends_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with chain(tmp_path, f"{APART.partition('twice')[0]}time.sleep(600)") as process:
        found = trainers(tmp_path, 3)
        process.kill()
        assert_gone(found)


def test_what_the_launcher_had_started_before_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        assert other.pid in below(os.getpid())
        script = tmp_path / "quick.py"
        script.write_text("")
        assert run_to_end([sys.executable, str(script)], os.environ, 0) == 1
        assert other.poll() is None
        other.kill()


def assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(alive(one) for one in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def parent(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fenced_trainer_that_is_stuck_is_killed(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rank 0 knows; it and its peer hang
    plan = "if rank == '0': end_within(600, 34)\nwait()\ntime.sleep(600)"
    monkeypatch.setenv("FENCED_S", "0.5")
    with chain(tmp_path, plan, processes) as process:
        found = trainers(tmp_path, processes)
        code, words = finish(process)
    assert code == 34
    assert "after the run was taken over: killed" in words
    assert not any(alive(one) for one in found)


def test_two_trainers_both_hear_of_it_and_the_slower_one_is_not_torn_down(tmp_path: Path) -> None:
    plan = (
        "assert wait() == 'sigterm'\nif rank == '1':\n    time.sleep(4)\n    (folder /"
        " 'slow').touch()\nreturn 33"
    )
    with chain(tmp_path, plan, processes=2) as process:
        trainers(tmp_path, 2)
        process.terminate()
        assert finish(process)[0] == 33
    assert (tmp_path / "slow").exists()


@pytest.mark.slow
def test_two_trainers_may_take_longer_to_save_than_torchelastic_s_30_s(tmp_path: Path) -> None:
    plan = "wait()\ntime.sleep(40)\n(folder / f'saved-{rank}').touch()\nreturn 33"
    with chain(tmp_path, plan, processes=2) as process:
        trainers(tmp_path, 2)
        process.terminate()
        assert finish(process)[0] == 33
    assert len(list(tmp_path.glob("saved-*"))) == 2


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_rank_that_fails_first_names_the_reason(tmp_path: Path, rank: int) -> None:
    with chain(tmp_path, f"if rank == '{rank}': return 2\nwait()\nreturn 1", processes=2) as process:
        assert finish(process)[0] == 2


# from here on with the real trainer, through the command that a person types


LAYOUTS = [("cpu", 1), ("cpu", 2), ("one_process", 1)]


@contextmanager
def launched(
    folder: Path, processes: int, words: list[str], environment: dict[str, str], config: str = "cpu"
) -> Iterator[subprocess.Popen[str]]:
    line = [
        sys.executable,
        "-m",
        "launch.cli",
        "run",
        "--accelerate-config",
        str(one_process_config(folder)) if config == "one_process" else config,
        "--processes",
        str(processes),
        *words,
    ]
    # on the CPU for the config files of GPUs too; cpu.yaml needs no such word
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **({} if config == "cpu" else {"ACCELERATE_USE_CPU": "true"}),
        **environment,
    }
    with (
        subprocess.Popen(
            line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process,
        all_of_it_ends(process, folder),
    ):
        yield process


@contextmanager
def all_of_it_ends(process: subprocess.Popen[Any], folder: Path) -> Iterator[None]:
    """Whatever happens inside, nothing of this launcher and its run is left."""
    try:
        yield
    finally:
        process.kill()
        for process_id in of_this_run(folder):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


def of_this_run(folder: Path) -> list[int]:
    """Every process that has the test's folder in its command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(checkpoints(folder)) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def checkpoints(folder: Path) -> list[Entry]:
    return [
        entry for entry in read_log(open_store(str(folder / "runs")), "tiny") if entry.kind == "checkpoint"
    ]


def run_words(folder: Path, *more: str) -> list[str]:
    tiny_config(folder)
    return tiny_words(
        folder, "train.epochs=1000", "checkpoint.every_seconds=null", "preemption.notices=none", *more
    )


def saved_for_a_notice(folder: Path) -> list[Entry]:
    """Checkpoints that no evaluation asked for."""
    return [entry for entry in checkpoints(folder) if "macro_f1" not in entry.metrics]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_leaves_with_33(
    tmp_path: Path, config: str, processes: int, number: signal.Signals
) -> None:
    hold_s = 0 if number == signal.SIGTERM else 600  # SIGINT does not hold
    with launched(
        tmp_path, processes, run_words(tmp_path, f"preemption.hold_s={hold_s}"), {}, config
    ) as process:
        wait_for_checkpoint(tmp_path, process)
        process.send_signal(number)
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 33, out[-4000:]
    newest = checkpoints(tmp_path)[-1]
    assert f"Step {newest.step} of" in out
    assert "Traceback" not in out
    assert not of_this_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
def test_under_skypilot_the_launcher_holds_after_the_save_longer_than_torchelastic_waits(
    tmp_path: Path, config: str, processes: int
) -> None:
    with launched(tmp_path, processes, run_words(tmp_path), {"SKYPILOT_TASK_ID": "sky-1"}, config) as process:
        wait_for_checkpoint(tmp_path, process)
        process.terminate()
        deadline = time.monotonic() + PATIENCE_S
        while not saved_for_a_notice(tmp_path):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(40)
        assert len(saved_for_a_notice(tmp_path)) == 1  # it trained no further
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 33
    assert not of_this_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
def test_notices_of_the_cloud_reach_the_trainers_through_the_whole_chain(
    tmp_path: Path, config: str, processes: int
) -> None:
    gone = {"action": "terminate", "time": "2030-01-02T03:04:05Z"}

    def until(claim: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not claim():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def trains_on() -> None:
        count = len(checkpoints(tmp_path))
        until(lambda: len(checkpoints(tmp_path)) >= count + 2)

    with serving(AwsHandler) as machine:
        words = run_words(tmp_path, "preemption.notices=aws", "preemption.hold_s=600")
        place = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": machine.url}
        with launched(tmp_path, processes, words, place, config) as process:
            wait_for_checkpoint(tmp_path, process)
            machine.advice = {"noticeTime": "2030-01-02T03:00:00Z"}
            until(lambda: len(saved_for_a_notice(tmp_path)) == 1)
            trains_on()
            for count in (2, 3):
                machine.action = gone
                until(lambda count=count: len(saved_for_a_notice(tmp_path)) == count)  # type: ignore[misc]
                before = checkpoints(tmp_path)
                time.sleep(3)
                assert checkpoints(tmp_path) == before  # it holds
                if count == 2:
                    machine.action = None  # withdrawn
                    trains_on()
            process.send_signal(signal.SIGINT)
            out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 33, out[-4000:]
    assert "AWS is about to terminate this machine" in out
    assert "The termination was withdrawn" in out


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
def test_a_killed_trainer_is_a_failure_and_leaves_nobody_behind(
    tmp_path: Path, config: str, processes: int
) -> None:
    with launched(tmp_path, processes, run_words(tmp_path), {}, config) as process:
        wait_for_checkpoint(tmp_path, process)
        trainer = next(found for found in of_this_run(tmp_path) if is_trainer(found))
        os.kill(trainer, signal.SIGKILL)
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 1, out[-4000:]
    assert not of_this_run(tmp_path)


def is_trainer(process_id: int) -> bool:
    return run_chain.is_trainer(Path(f"/proc/{process_id}/cmdline").read_bytes().split(b"\0"))


def of_rank(folder: Path, rank: int) -> int:
    """The process id of the trainer with this rank."""
    name = f"RANK={rank}".encode()
    return next(
        one
        for one in of_this_run(folder)
        if is_trainer(one) and name in Path(f"/proc/{one}/environ").read_bytes().split(b"\0")
    )


# a reader that leaves, and a launcher that is killed


@contextmanager
def without_a_reader(
    folder: Path, words: list[str], processes: int = 1, config: str = "cpu"
) -> Iterator[subprocess.Popen[str]]:
    """A run whose standard output and standard error have a reader for their first lines only."""
    with launched(folder, processes, words, {}, config) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.stdout.close()
        yield process


def printed(folder: Path) -> str:
    """What went to the log file of the run."""
    (log,) = (folder / "here" / "output").iterdir()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
def test_a_run_without_a_reader_ends_with_0_once_it_is_published(
    tmp_path: Path, config: str, processes: int
) -> None:
    words = run_words(tmp_path, "train.epochs=1", f"checkpoint.local_folder={tmp_path / 'here'}")
    with without_a_reader(tmp_path, words, processes, config) as process:
        assert process.wait(PATIENCE_S) == 0
    assert read_log(open_store(str(tmp_path / "runs")), "tiny")[-1].kind == "final"
    assert "published at step" in printed(tmp_path)


@pytest.mark.slow
def test_a_run_without_a_reader_ends_as_it_would_with_one(tmp_path: Path) -> None:
    words = run_words(tmp_path, f"checkpoint.local_folder={tmp_path / 'here'}")
    with without_a_reader(tmp_path, words) as process:
        wait_for_checkpoint(tmp_path, process)
        process.terminate()
        assert process.wait(PATIENCE_S) == 33
    assert "is saved" in printed(tmp_path)
    with without_a_reader(tmp_path, words) as process:
        wait_for_checkpoint(tmp_path, process, len(checkpoints(tmp_path)) + 1)
        os.kill(of_rank(tmp_path, 0), signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 1
    with without_a_reader(tmp_path, [*words, "run.seed=77"]) as process:
        assert process.wait(PATIENCE_S) == 2


@pytest.mark.slow
def test_a_run_whose_words_go_to_a_full_disk_ends_with_0_once_it_is_published(tmp_path: Path) -> None:
    words = run_words(tmp_path, "train.epochs=1", f"checkpoint.local_folder={tmp_path / 'here'}")
    line = [sys.executable, "-m", "launch.cli", "run", "--accelerate-config", "cpu", *words]
    with (
        Path("/dev/full").open("wb") as full,
        subprocess.Popen(
            line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=full, stderr=full, start_new_session=True
        ) as process,
        all_of_it_ends(process, tmp_path),
    ):
        assert process.wait(PATIENCE_S) == 0
    assert read_log(open_store(str(tmp_path / "runs")), "tiny")[-1].kind == "final"
    assert "published at step" in printed(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
def test_a_run_that_is_taken_over_ends_with_34_and_leaves_nothing(
    tmp_path: Path, config: str, processes: int
) -> None:
    words = run_words(tmp_path)
    with launched(tmp_path, processes, words, {}, config) as process:
        wait_for_checkpoint(tmp_path, process)
        first = checkpoints(tmp_path)[0]
        other = Writer(open_store(str(tmp_path / "runs")), "tiny", first.index_sha256, first.config_sha256)
        other.claim(first.epoch, first.step)
        out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 34, out[-4000:]
    assert other.append("note", first.epoch, first.step).incarnation == other.incarnation
    assert not of_this_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), LAYOUTS)
@pytest.mark.parametrize("moment", ["starts", "trains"])
def test_nothing_of_a_run_is_left_within_seconds_of_its_launcher_s_death(
    tmp_path: Path, config: str, processes: int, moment: str
) -> None:
    with launched(tmp_path, processes, run_words(tmp_path), {}, config) as process:
        if moment == "trains":
            wait_for_checkpoint(tmp_path, process)
        else:
            while not any(is_trainer(one) for one in of_this_run(tmp_path)):
                time.sleep(0.05)
        process.kill()
        # a trainer that is being imported ends when it asks for its launcher; it has no GPU yet,
        # and how long the import takes is the machine's business
        deadline = time.monotonic() + (SECONDS if moment == "trains" else PATIENCE_S)
        while of_this_run(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
