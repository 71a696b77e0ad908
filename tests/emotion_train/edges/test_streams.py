"""What a program does whose reader leaves, whose disk is full, or whose output was closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S

HEAD = """
import os, sys, logging
from pathlib import Path
from emotion_train.errors import exit_code
from emotion_train.edges.streams import go_to, hold, text_is_the_result
"""
# the work of one that writes words by all ways there are, and whose result is a file
WORK = """
def work():
    print('line', flush=True)
    print('to stderr', file=sys.stderr)
    import rich.console
    rich.console.Console().print('rich')
    logging.warning('logged')
    sys.stdout.buffer.write(b'bytes\\n')
    os.system('echo child; echo child >&2')
    print('unflushed')
    Path(sys.argv[1], 'done').write_text('done')
    return 33
"""
RUN = "sys.exit(exit_code('program', work))\n"
LOGGED = ["line", "to stderr", "rich", "WARNING:root:logged", "bytes", "child", "unflushed"]


def program(folder: Path, *code: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the code with the redirections of `shell`, such as `>&-`."""
    script = folder / "program.py"
    script.write_text(HEAD + "".join(code))
    line = f'"{sys.executable}" "{script}" "{folder}" {shell}'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment |= variables
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        encoding="latin-1" if variables else "utf-8",
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE_S,
        env=environment,
    )


NOBODY = {
    "a pipe without a reader": "2>&1 | true; exit ${PIPESTATUS[0]}",
    "a full disk": "> /dev/full 2> /dev/full",
    "closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
}


@pytest.mark.parametrize("shell", NOBODY.values(), ids=NOBODY)
def test_without_a_reader_the_work_goes_on_and_its_words_go_to_the_log(tmp_path: Path, shell: str) -> None:
    log = tmp_path / "a folder" / "output.log"
    wait = "import time\ntime.sleep(0.5)\n"  # until the reader has left
    done = program(tmp_path, WORK, wait, f"hold('program')\ngo_to(Path({str(log)!r}))\n", RUN, shell=shell)
    assert done.returncode == 33, done.stderr
    assert (tmp_path / "done").read_text() == "done"  # no file took the number of a closed stream
    assert (done.stdout, done.stderr) == ("", "")
    written = log.read_text().splitlines()
    assert [line for line in LOGGED if line not in written] == []
    if "closed" not in shell and "-" not in shell:
        assert written[0].endswith(f"the work continues, and its messages go to {log}")
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("lost", "other"), [("1", "stderr"), ("2", "stdout")])
def test_the_other_stream_says_once_where_the_words_go(tmp_path: Path, lost: str, other: str) -> None:
    log = tmp_path / "output.log"
    done = program(
        tmp_path, WORK, f"hold('program')\ngo_to(Path({str(log)!r}))\n", RUN, shell=f"{lost}> /dev/full"
    )
    title = "standard output" if lost == "1" else "standard error"
    told = f"program: {title} cannot be written (No space left on device); the work continues, and its"
    assert getattr(done, other).count(told) == 1
    assert log.read_text().count(told) == 1
    assert done.returncode == 33


def test_a_log_that_cannot_be_written_stops_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for log in ("/dev/full", tmp_path / "file" / "below", "/proc/nowhere/log"):
        done = program(
            tmp_path,
            WORK,
            f"hold('program')\ngo_to(Path({str(log)!r}))\n",
            RUN,
            shell="> /dev/full 2> /dev/full",
        )
        assert done.returncode == 33


def test_the_log_of_the_process_above_is_that_of_those_below(tmp_path: Path) -> None:
    above = tmp_path / "above.log"
    own = f"os.environ['EMOTION_TRAIN_OUTPUT_LOG'] = {str(above)!r}\n"
    done = program(
        tmp_path,
        WORK,
        own,
        f"hold('program')\ngo_to(Path({str(tmp_path / 'own.log')!r}))\n",
        RUN,
        shell="> /dev/full",
    )
    assert done.returncode == 33
    assert "unflushed" in above.read_text()
    assert not (tmp_path / "own.log").exists()


def test_what_was_lost_before_the_log_has_a_name_changes_nothing_after(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    early = f"hold('program')\nprint('early', flush=True)\ngo_to(Path({str(log)!r}))\nprint('late')\n"
    assert program(tmp_path, WORK, early, RUN, shell="> /dev/full").returncode == 33
    assert "early" not in log.read_text()
    assert log.read_text().startswith("late\n")


TEXT = """
def text():
    text_is_the_result()
    for number in range(100_000):
        print(number)
    Path(sys.argv[1], 'done').write_text('done')
    return 0
hold('program')
sys.exit(exit_code('program', text))
"""


def test_where_the_text_is_all_a_reader_that_leaves_ends_the_program_quietly(tmp_path: Path) -> None:
    done = program(tmp_path, TEXT, shell="| head -3; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n1\n2\n", "")
    assert not (tmp_path / "done").exists()


def test_where_the_text_is_all_a_full_disk_is_its_failure_and_names_it(tmp_path: Path) -> None:
    for count in ("100_000", "3"):  # in the middle, and at the very end
        done = program(tmp_path, TEXT.replace("100_000", count), shell="> /dev/full")
        assert done.returncode == 2
        assert "Standard output cannot be written (No space left on device)" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_library_that_leaves_in_the_middle_has_not_succeeded(tmp_path: Path) -> None:
    for words, code in (("sys.exit()", 1), ("sys.exit(0)", 1), ("sys.exit(3)", 3), ("sys.exit('why')", 1)):
        done = program(tmp_path, f"hold('program')\nexit_code('program', lambda: {words})\n", RUN[:0])
        assert done.returncode == 0  # only `exit_code` returned
        done = program(tmp_path, f"hold('program')\nsys.exit(exit_code('program', lambda: {words}))\n")
        assert done.returncode == code
        assert ("why" in done.stderr) == ("why" in words)


def test_a_socket_that_breaks_is_no_reader_that_left(tmp_path: Path) -> None:
    broken = "def work(): raise BrokenPipeError('a socket')\nhold('program')\n"
    done = program(tmp_path, broken, RUN)
    assert done.returncode == 1
    assert "BrokenPipeError: a socket" in done.stderr


def test_a_stream_that_would_block_is_waited_for(tmp_path: Path) -> None:
    many = "hold('program')\nos.set_blocking(1, False)\nprint('x' * 3_000_000)\n"
    done = program(tmp_path, many, shell="| (sleep 1; wc -c)")
    assert done.stdout.strip() == "3000001"
    assert done.stderr == ""


NO_UTF8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"PYTHONIOENCODING": "iso8859-5"},
        {"PYTHONIOENCODING": "cp1252:surrogateescape"},
        {"LC_ALL": "C", **NO_UTF8},
        {"LANG": "POSIX", "LC_ALL": "", **NO_UTF8},
    ],
    ids=lambda variables: "-".join(variables.values()),
)
def test_no_encoding_of_the_output_ends_a_program(tmp_path: Path, variables: dict[str, str]) -> None:
    words = """
def work():
    print('macro-F1 ≈ 0.5 for 😀 and \\udcff')
    print('≈', file=sys.stderr)
    import rich.console
    rich.console.Console().print('rich ≈')
    logging.warning('logged ≈')
    return 0
"""
    done = program(tmp_path, words, "hold('program')\n", RUN, **variables)
    assert done.returncode == 0, done.stderr
    assert "macro-F1 \\u2248 0.5 for \\U0001f600 and \\udcff" in done.stdout
    assert "rich \\u2248" in done.stdout
    assert done.stderr.startswith("\\u2248")


def test_a_handler_of_the_user_s_that_cannot_fail_stays(tmp_path: Path) -> None:
    done = program(
        tmp_path, "hold('program')\nprint('≈é')\n", PYTHONIOENCODING="ascii:replace", PYTHONUTF8="0"
    )
    assert done.stdout == "??\n"


def test_half_a_character_ends_no_utf8_either(tmp_path: Path) -> None:
    """As Python keeps a file's name that is no UTF-8."""
    done = program(tmp_path, "hold('program')\nprint('a\\udcffb')\n")
    assert (done.returncode, done.stdout) == (0, "a\\udcffb\n")


def test_data_for_another_program_is_utf8(tmp_path: Path) -> None:
    code = "from emotion_train.edges.streams import write_utf8\nhold('program')\nwrite_utf8()\nprint('≈é')\n"
    done = program(tmp_path, code, PYTHONIOENCODING="latin-1")
    assert done.stdout.encode("latin-1").decode() == "≈é\n"
