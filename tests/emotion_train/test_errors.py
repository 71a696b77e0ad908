"""The tree at the head of errors.py is the family."""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
import sys
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

import emotion_train.exporting.served
import emotion_train.hosted.client
import emotion_train.runs.log
import emotion_train.runs.origin
from emotion_train import cli, errors, prepare
from launch import cli as launch_cli
from tests.helpers.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_the_tree_of_errors_is_the_family_with_its_exit_codes() -> None:
    assert emotion_train.runs.log.Published.__bases__ == (errors.EmotionTrainError,)
    assert emotion_train.runs.origin.NotInReach.__bases__ == (errors.EmotionTrainError,)

    def lines(error: type[errors.EmotionTrainError], depth: int) -> set[tuple[int, str, int]]:
        below = [lines(one, depth + 1) for one in error.__subclasses__()]
        return {(depth, error.__name__, error.exit_code)}.union(*below)

    told: set[tuple[int, str, int]] = set()
    code = 1
    for space, name, number in re.findall(r"(?m)^    ( *)([A-Z]\w+)(?: +(\d+) .*)?$", errors.__doc__ or ""):
        code = int(number) if number else code
        told.add((len(space) // 2, name, code))
    assert told == lines(errors.EmotionTrainError, 0)


def test_a_store_that_does_not_answer_is_no_wrong_request_also_on_another_rank() -> None:
    """A scheduler that starts a run anew must not take an outage for a mistake."""
    for kind in (errors.StorageError, errors.ObjectNotFound):
        assert not issubclass(kind, errors.WrongRequest)
        for transient, code in ((True, 1), (False, 2)):
            sent = pickle.loads(pickle.dumps(kind("The network is gone.", transient=transient)))
            assert (str(sent), sent.transient, sent.exit_code) == ("The network is gone.", transient, code)


def test_a_refusal_ends_a_program_with_2_and_an_outage_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(transient: bool) -> int:
        raise errors.StorageError("s3://posts said no.", transient=transient)

    assert errors.exit_code("emotion-train", lambda: fail(False)) == 2
    assert errors.exit_code("emotion-train", lambda: fail(True)) == 1
    assert capsys.readouterr().err == "emotion-train: s3://posts said no.\n" * 2


# the last line of defence


class PanicException(BaseException):
    """As the Rust parts of a library raise it."""


def ended(capsys: pytest.CaptureFixture[str], error: BaseException, *, show: bool = False) -> tuple[int, str]:
    def fail() -> int:
        raise error

    code = errors.exit_code("emotion-train", fail, show_traceback=show)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        KeyError("ETag"),
        RecursionError("maximum recursion depth exceeded"),
        PanicException("called `Option::unwrap()`\non a `None` value"),
        PermissionError(errno.EACCES, "Permission denied", "/x"),
        RuntimeError("at https://key:hunter2@host/x " + "long " * 500),
    ],
)
def test_what_nobody_has_foreseen_is_one_sentence_with_where_to_report_it(
    capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    code, told = ended(capsys, error)
    assert code == 1
    assert told.count("\n") == 1
    assert told.startswith(f"emotion-train: An unexpected error ended the work: {type(error).__name__}: ")
    assert "please report it at the project's issue tracker" in told
    assert "Traceback" not in told
    assert "hunter2" not in told
    assert len(told) < 800
    kept = re.search("the traceback is in ([^;]+); --traceback shows it", told)
    assert kept is not None
    assert "Traceback (most recent call last)" in Path(kept[1]).read_text(encoding="utf-8")
    assert Path(kept[1]).stat().st_mode & 0o777 == 0o600


def test_the_traceback_is_shown_to_who_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = ended(capsys, KeyError("ETag"), show=True)
    assert code == 1
    assert "Traceback (most recent call last)" in told
    assert "is in" not in told.splitlines()[-1]


def test_memory_that_is_full_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = ended(capsys, MemoryError())
    assert code == 1
    assert "no memory left" in told
    assert "report" not in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more_is_full(capsys: pytest.CaptureFixture[str], number: int) -> None:
    code, told = ended(capsys, OSError(number, os.strerror(number), "/data/x"))
    assert code == 2
    assert "the disk is full (/data/x" in told
    assert "TMPDIR" in told


def test_the_package_s_own_urls_win(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = Message()
    built["Project-URL"] = "Homepage, https://example.org"
    built["Project-URL"] = "Issues, https://example.org/issues"
    monkeypatch.setattr(metadata, "metadata", lambda name: built)
    assert "please report it at https://example.org/issues (" in ended(capsys, KeyError("x"))[1]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_both_programs_take_the_option_wherever_it_stands(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> int:
        raise KeyError("ETag")

    monkeypatch.setattr(prepare, "run", fail)
    monkeypatch.setattr(launch_cli, "_runs", fail)
    for program, words in ((cli.main, ["prepare", "a", "b"]), (launch_cli.main, ["runs", str(tmp_path)])):
        assert program(words) == 1
        assert "Traceback" not in capsys.readouterr().err
        words.insert(at, "--traceback")
        assert program(words) == 1
        assert "Traceback" in capsys.readouterr().err


def test_what_fails_before_the_verb_begins_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(prepare, "add_arguments", broken)
    with pytest.raises(SystemExit) as left:
        cli.main(["prepare", "a", "b"])
    assert left.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("emotion-train: An unexpected error ended the work: ImportError: numpy")
    assert "Traceback" not in told


def test_after_two_dashes_words_are_words() -> None:
    assert errors.without_traceback_option(["predict", "--", "--traceback"], {}) == (
        ["predict", "--", "--traceback"],
        False,
    )
    assert errors.without_traceback_option([], {errors.TRACEBACK_VARIABLE: "1"}) == ([], True)


@pytest.mark.parametrize("program", ["emotion_train.cli", "launch.cli"])
def test_a_current_folder_that_is_gone_is_named(program: str, tmp_path: Path) -> None:
    words = {"emotion_train.cli": "prepare a.csv b", "launch.cli": "runs somewhere"}[program]
    gone = tmp_path / "gone"
    line = f'mkdir "{gone}"; cd "{gone}"; rmdir "{gone}"; "{sys.executable}" -P -m {program} {words}'
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert "The current folder does not exist any more" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        *(
            "train predict a --adapter {}",
            "train predict --adapter a --file {}",
            "train label {} out --adapter a",
        ),
        *("train evaluate --adapter a --file {}", "train export {} --to out", "launch runs {}"),
        *("launch compare {} b", "launch pull a/b --to {}"),
    ],
)
def test_a_text_in_place_of_a_path_is_no_defect(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk takes names of 255 bytes; Python's `exists` raises for longer ones."""
    monkeypatch.chdir(tmp_path)
    program, *words = line.split()
    main = {"train": cli.main, "launch": launch_cli.main}[program]
    assert main([word.format("n" * 300) for word in words]) == 2
    told = capsys.readouterr().err
    assert "unexpected" not in told
    assert told.count("\n") == 1
