"""What `runs`, `show` and `show --watch` tell, from logs that the program's own writers made in a
folder and in a real bucket.
"""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from emotion_train.errors import Preempted, StorageError, WrongRequest
from emotion_train.processes.notices import Notice
from emotion_train.runs.checkpoint import Progress
from emotion_train.runs.log import Entry, Metrics, Writer, mean_price, read_log, upload_part
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch.cli import main
from launch.results.history import facts_of, follow, incarnations, list_runs, progress_line, story
from launch.results.pages import _print_as_it_comes, watch
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import start_trainer, tiny_config

FACTS: Metrics = {
    "base": "some/base",
    "device": "NVIDIA H100 80GB HBM3",
    "processes": 2,
    "steps": 300,
    "usd_per_hour": 6.0,
}


def begun(store: Store, run_id: str = "run", facts: Metrics | None = None) -> Writer:
    writer = Writer(store, run_id, "a" * 64, "b" * 64)
    writer.claim(0, 0, facts)
    return writer


def at(entry: Entry, minutes: float) -> Entry:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return entry.model_copy(update={"time_utc": (start + timedelta(minutes=minutes)).isoformat()})


def two_starts(store: Store) -> list[Entry]:
    """30 minutes on the first machine, a preemption, 20 minutes later 60 on the second."""
    first = begun(store, facts=FACTS)
    first.append("checkpoint", 0, 90, metrics={"macro_f1": 0.5, "train_loss": 1.0})
    first.append("checkpoint", 0, 95)
    first.append("checkpoint", 0, 100, metrics={"notice": "preempted"})
    second = begun(store, facts=FACTS | {"usd_per_hour": 3.0})
    second.append("note", 0, 100, metrics={"note": "fall-back", "words": "Checkpoint 3 does not verify"})
    second.append("checkpoint", 1, 200, metrics={"macro_f1": 0.7})
    minutes = (0, 10, 20, 30, 50, 51, 110)
    return [at(entry, minute) for entry, minute in zip(read_log(store, "run"), minutes, strict=True)]


def test_a_run_in_place_of_its_output_url_is_told_how_to_be_shown(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(store)
    assert main(["runs", f"{store.url}/run"]) == 0
    assert f"which is a run itself; type emotion-launch show {store.url}/run" in capsys.readouterr().out
    assert main(["runs", f"{store.url}/none"]) in (0, 2)
    assert "a run itself" not in capsys.readouterr().out


# --- facts ---


def test_a_row_says_state_score_machine_hours_and_dollars(store: Store) -> None:
    entries = two_starts(store)
    now = datetime(2026, 1, 1, 1, 51, tzinfo=UTC)
    row = facts_of("run", entries, now)
    assert (row.state, row.step, row.steps, row.macro_f1, row.split) == (
        "training",
        200,
        300,
        0.7,
        "validation",
    )
    assert (row.base, row.gpu, row.starts) == ("some/base", "2 x NVIDIA H100 80GB HBM3", 2)
    assert row.hours == pytest.approx(1.5)
    assert row.usd == pytest.approx(0.5 * 6 + 1.0 * 3)
    assert facts_of("run", entries, now + timedelta(hours=1)).state == "stopped"


def test_dollars_are_those_of_all_starts_whose_price_is_known(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = two_starts(store)
    unknown = entries[0].model_copy(update={"metrics": {**entries[0].metrics, "usd_per_hour": None}})
    now = datetime(2026, 1, 1, 1, 51, tzinfo=UTC)
    row = facts_of("run", [unknown, *entries[1:]], now)
    assert row.usd == pytest.approx(1.0 * 3)
    assert (row.unpriced, row.starts) == (1, 2)
    assert facts_of("run", entries, now).unpriced == 0
    assert mean_price(entries, now) == pytest.approx((0.5 * 6 + 61 / 60 * 3) / (0.5 + 61 / 60))
    assert mean_price([unknown, *entries[1:]], now) is None
    mine = begun(store, "mixed", FACTS)
    mine.append("checkpoint", 0, 5)
    begun(store, "mixed", {name: value for name, value in FACTS.items() if name != "usd_per_hour"})
    assert main(["runs", store.url]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mixed"))
    assert line.rstrip().endswith("> 0.00")
    assert main(["show", f"{store.url}/mixed"]) == 0
    assert "$0.00 over 2 starts, without 1 of 2 starts that have no price" in capsys.readouterr().out


def test_a_smoke_run_is_marked(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "a-smoke"):
        begun(store, name)
    assert main(["runs", store.url]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert ["(smoke)" in line for line in lines] == [False, True]


def test_a_published_run_has_the_score_of_its_report(store: Store) -> None:
    writer = begun(store)
    writer.append("checkpoint", 1, 10, metrics={"macro_f1": 0.9})
    writer.append("final", 1, 10, metrics={"macro_f1": 0.6, "split": "test"})
    row = facts_of("run", read_log(store, "run"), datetime.now(UTC))
    assert (row.state, row.macro_f1, row.split) == ("published", 0.6, "test")


def test_a_run_of_before_is_told_without_what_its_claim_does_not_say(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(store).append("checkpoint", 0, 5)
    row = facts_of("run", read_log(store, "run"), datetime.now(UTC))
    assert (row.base, row.gpu, row.steps, row.usd) == (None, None, None, None)
    assert main(["runs", store.url]) == 0
    cells = capsys.readouterr().out.splitlines()[1].split()
    assert cells[:6] == ["run", "training", "5", "-", "-", "-"]
    assert main(["show", f"{store.url}/run"]) == 0


def test_a_claim_that_holds_other_kinds_of_values_hides_no_run(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    odd: Metrics = {"base": 5, "layers": "x", "device": 1.5, "steps": "many", "processes": "two"}
    begun(store, "odd", odd)
    begun(store, "other", FACTS)
    row = facts_of("odd", read_log(store, "odd"), datetime.now(UTC))
    assert (row.base, row.layers, row.gpu, row.steps) == (None, None, None, None)
    assert main(["runs", store.url]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["odd", "other"]
    assert main(["show", f"{store.url}/odd"]) == 0


@pytest.mark.parametrize("name", ["[bold]base", "base[v2]", "[/x]base", ":smile:", "a[b]c[/b]d"])
def test_names_are_shown_letter_by_letter(
    store: Store, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """To Rich these are styles and pictures; one that closes nothing ended in a traceback."""
    begun(store, facts=FACTS | {"base": f"bases/{name}", "device": name})
    for verb in (["runs", store.url], ["show", f"{store.url}/run"]):
        assert main(verb) == 0
        shown = capsys.readouterr().out
        assert name.rpartition("/")[2] in shown
        assert f"2 x {name}" in shown


def test_runs_are_listed_by_name_and_a_damaged_one_as_such(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a", "c"):
        begun(store, name)
    store.write("b/log/00000000.json", b"{")
    assert [(row.run_id, row.state) for row in list_runs(store)] == [
        ("a", "training"),
        ("b", "damaged"),
        ("c", "training"),
    ]
    assert main(["runs", store.url]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["a", "training"],
        ["b", "damaged"],
        ["c", "training"],
    ]


# --- story ---


def test_a_run_that_is_deleted_while_runs_are_listed_does_not_hide_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(store, "stays")
    monkeypatch.setattr("launch.results.history.run_ids", lambda store: ["gone", "stays"])
    assert [(row.run_id, row.state) for row in list_runs(store)] == [
        ("gone", "damaged"),
        ("stays", "training"),
    ]


@pytest.mark.parametrize(("verb", "code"), [("runs", 0), ("check", 2)])
def test_a_reader_that_leaves_early_changes_no_exit_code(tmp_path: Path, verb: str, code: int) -> None:
    for number in range(9):
        begun(open_store(str(tmp_path)), f"run{number}")
    words = (
        [str(tmp_path)]
        if verb == "runs"
        else [f"data.url={tmp_path}", f"run.output_url={tmp_path}", f"model.base={tmp_path}"]
    )
    line = [sys.executable, "-m", "launch.cli", verb, *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(PATIENCE_S) == code
        assert process.stderr.read() == ""


def test_the_story_names_starts_preemptions_fall_backs_and_scores(store: Store) -> None:
    told = [words for _, words in story(two_starts(store))]
    assert told == [
        "started on 2 x NVIDIA H100 80GB HBM3",
        "checkpoint, macro-F1 0.5000, training loss 1.0000, 0.0 MiB",
        "checkpoint, preempted, 0.0 MiB",
        "start 2 on 2 x NVIDIA H100 80GB HBM3 after a preemption, from step 0",
        "Checkpoint 3 does not verify",
        "checkpoint, macro-F1 0.7000, 0.0 MiB",
    ]


def test_an_end_without_notice_is_told_and_an_older_notice_is_not_taken_for_it(store: Store) -> None:
    first = begun(store)
    first.append("checkpoint", 0, 5, metrics={"notice": "preempted"})  # withdrawn: training went on
    first.append("checkpoint", 0, 9)
    Writer(store, "run", "a" * 64, "b" * 64).claim(0, 9)
    entries = read_log(store, "run")
    assert [writer.notice for writer in incarnations(entries)] == [None, None]
    assert story(entries)[-1][1] == "start 2 after an end without notice, from step 9"


def test_show_prints_the_page(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    two_starts(store)
    assert main(["show", f"{store.url}/run"]) == 0
    out = capsys.readouterr().out
    for words in (
        "200 of 300",
        "0.7000 on validation",
        "some/base",
        "in 2 starts",
        "7 entries, 4 checkpoints",
        "after a preemption",
    ):
        assert words in out


def test_a_run_that_is_not_there_ends_in_2(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{store.url}/nowhere"]) == 2
    assert "There is no run 'nowhere'" in capsys.readouterr().err


def test_a_trainer_leaves_its_facts_and_its_notice_in_the_log(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.epochs=1", "report.usd_per_hour=2.5")
    said: list[Notice] = []

    def tell(progress: Progress, words: str) -> None:
        if progress.step == 3 and not said:
            said.append(Notice("terminate", "gone soon", None, 1))

    with ExitStack() as stack:
        trainer = start_trainer(config, stack, lambda: said[-1] if said else None)
        trainer.tell = tell
        with pytest.raises(Preempted):
            trainer.fit()
    entries = read_log(open_store(config.run.output_url), "tiny")
    row = facts_of("tiny", entries, datetime.now(UTC))
    assert row.base == config.model.base
    assert row.steps == -(-108 // 16)
    assert entries[0].metrics["usd_per_hour"] == 2.5
    assert incarnations(entries)[-1].notice == "preempted"
    saved = [entry for entry in entries if entry.kind == "checkpoint"]
    assert isinstance(saved[-1].metrics["posts_per_second"], float)


# --- how far it is ---


def test_progress_is_the_trainer_s_line_by_the_newest_checkpoints(store: Store) -> None:
    entries = two_starts(store)
    now = datetime(2026, 1, 1, 1, 50, tzinfo=UTC)  # of the newest entry
    # the second machine took the steps from 0 to 200 between its claim, minute 50, and minute 110
    told = progress_line(entries, now)
    assert told == "training: 200 of 300 steps (66 %), 30 min left, last macro-F1 0.700"
    facts: Metrics = {"loss": 0.5, "posts_per_second": 388.4}
    third = at(entries[-1].model_copy(update={"seq": 7, "step": 250, "metrics": facts}), 120)
    # 50 steps in 10 minutes, and 4 minutes since
    told = progress_line([*entries, third], now + timedelta(minutes=14))
    figures = "loss 0.500, 388 posts/s, last macro-F1 0.700"
    assert told == f"training: 250 of 300 steps (83 %), 6 min left, {figures}"


def test_a_run_of_which_the_log_tells_no_steps_and_a_published_one_have_no_progress(store: Store) -> None:
    writer = begun(store, "old")
    writer.append("checkpoint", 0, 5)
    assert progress_line(read_log(store, "old"), datetime.now(UTC)) is None
    entries = two_starts(store)
    assert progress_line(entries, datetime.now(UTC)) is not None
    final = entries[-1].model_copy(update={"kind": "final", "seq": 7})
    assert progress_line([*entries, final], datetime.now(UTC)) is None


def test_watching_without_a_terminal_tells_progress_every_30_s(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    writer = begun(store, facts=FACTS)
    writer.append("checkpoint", 0, 60, metrics={"loss": 2.0})
    out, now, step = io.StringIO(), [0.0], [60]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        step[0] += 10
        if step[0] == 130:
            writer.append("final", 1, 130)
        else:
            writer.append("checkpoint", 0, step[0], metrics={"loss": 2.0 - step[0] / 100})

    _print_as_it_comes(store, "run", 10.0, Console(file=out, width=200), sleep, lambda: now[0])
    told = [line.partition(" steps")[0] for line in out.getvalue().splitlines() if "training:" in line]
    assert told == ["training: 60 of 300", "training: 90 of 300", "training: 120 of 300"]
    assert ", loss 1.100" in out.getvalue()


# --- following ---


class Counting(FolderStore):
    """A folder that counts what is read of it, and fails once when told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[str] = []
        self.failing = 0

    def read(self, key: str, **more: Any) -> bytes:
        self.reads.append(key)
        return super().read(key, **more)

    def list(self, prefix: str = "") -> Any:
        if self.failing:
            self.failing -= 1
            raise StorageError("no answer", transient=True)
        return super().list(prefix)


def test_following_reads_each_entry_once_and_ends_with_the_final_one(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    writer = begun(store)
    plan = iter(
        [lambda: writer.append("checkpoint", 0, 5), lambda: None, lambda: writer.append("final", 1, 9)]
    )

    def sleep(seconds: float) -> None:
        assert seconds == 3
        next(plan)()

    seen = [
        [entry.kind for entry in new]
        for new in follow(store, "run", 3, sleep)
        if not isinstance(new, StorageError)
    ]
    assert seen == [["claim"], ["checkpoint"], [], ["final"]]
    assert store.reads == [f"run/log/{seq:08d}.json" for seq in range(3)]


def test_a_store_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    writer = begun(store)

    def sleep(seconds: float) -> None:
        if len(seen) == 1:
            store.failing = 1
        if len(seen) == 2:
            writer.append("final", 0, 1)

    seen: list[Any] = []
    for new in follow(store, "run", 3, sleep):
        seen.append(new)
    assert [type(new) for new in seen] == [list, StorageError, list]


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_a_live_run_of_a_bucket_shows_what_comes_until_it_is_published(
    terminal: bool, bucket_url: str
) -> None:
    store = open_store(f"{bucket_url}/runs")
    writer = begun(store, facts=FACTS)
    steps = iter((10, 20, 30))

    def train_on(seconds: float) -> None:
        step = next(steps)
        if step == 30:
            writer.append("final", 1, step, (), {"macro_f1": 0.25, "split": "test"})
            return
        part = upload_part(store, "run", f"data/{writer.incarnation:08d}/{step}/x.json", b"{}")
        writer.append("checkpoint", 0, step, (part,), {"macro_f1": step / 100})

    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    watch(open_store(f"{bucket_url}/runs"), "run", 0.05, console, sleep=train_on)
    shown = out.getvalue()
    for words in (
        "started on 2 x NVIDIA H100",
        "macro-F1 0.1000",
        "macro-F1 0.2000",
        "published, test, macro-F1 0.2500",
    ):
        assert words in shown
    if not terminal:
        assert len(shown.splitlines()) == 4


def test_a_pause_that_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["show", f"{tmp_path}/run"], ["label-status", str(tmp_path)]):
        for pause in ("0", "nan", "inf", "1e12"):  # time.sleep raises for the last three
            assert main([*verb, "--watch", "--every", pause]) == 2
            assert f"--every is {float(pause):g}; give seconds above 0" in capsys.readouterr().err


def test_following_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match="There is no run 'none'"):
        next(follow(open_store(str(tmp_path)), "none", 1))
