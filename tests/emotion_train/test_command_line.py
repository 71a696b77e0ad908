"""What a person types wrongly is led to what was meant, by both programs; help fits the verb."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from emotion_train import cli as train_cli
from emotion_train.cli import VERBS
from emotion_train.command_line import _MEANT, LAUNCH_VERBS
from emotion_train.completion import script
from emotion_train.config import all_keys
from launch import cli as launch_cli

MAINS = {"emotion-train": train_cli.main, "emotion-launch": launch_cli.main}
PARSERS = {"emotion-train": lambda: train_cli._parser(VERBS), "emotion-launch": launch_cli._parser}


def refusal(capsys: pytest.CaptureFixture[str], program: str, *words: str) -> str:
    assert MAINS[program](words) == 2
    return capsys.readouterr().err.removeprefix(f"{program}: ").rstrip("\n")


def told(capsys: pytest.CaptureFixture[str], program: str, *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        MAINS[program](words)
    assert ended.value.code == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


def test_the_launcher_s_verbs_are_those_of_its_parser() -> None:
    text = launch_cli._parser().format_help()
    assert re.findall(r"(?m)^    ([a-z][a-z-]+)(?: {2,}|$)", text) == list(LAUNCH_VERBS)


@pytest.mark.parametrize(
    ("program", "word", "sentence"),
    [
        ("emotion-train", "pull", "pull is a verb of emotion-launch; type emotion-launch pull."),
        ("emotion-train", "run", "run is a verb of emotion-launch; type emotion-launch run."),
        ("emotion-launch", "predict", "predict is a verb of emotion-train; type emotion-train predict."),
        ("emotion-train", "predcit", "There is no verb 'predcit'; did you mean emotion-train predict?"),
        ("emotion-train", "chekc", "There is no verb 'chekc'; did you mean emotion-launch check?"),
        ("emotion-train", "Eval", "There is no verb 'Eval'; did you mean emotion-train evaluate?"),
        ("emotion-launch", "eval", "There is no verb 'eval'; did you mean emotion-train evaluate?"),
        ("emotion-launch", "train", "There is no verb 'train'; did you mean emotion-launch run?"),
        ("emotion-launch", "fit", "There is no verb 'fit'; did you mean emotion-launch run?"),
        ("emotion-train", "fit", "There is no verb 'fit'; did you mean emotion-train train?"),
        ("emotion-launch", "ls", "There is no verb 'ls'; did you mean emotion-launch runs?"),
        ("emotion-launch", "xyzzy", "emotion-launch has no verb 'xyzzy'; its verbs are run, plan, "),
        ("emotion-launch", "--", "emotion-launch has no verb '--'; its verbs are "),
    ],
)
def test_a_wrong_verb_is_led_to_the_right_one(
    program: str, word: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, program, word, "--more", "words").startswith(sentence)


@pytest.mark.parametrize("program", MAINS)
def test_no_verb_is_a_wrong_request_that_names_them(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, program).startswith("A verb is missing: ")


def test_what_is_meant_by_a_word_is_a_verb() -> None:
    verbs = {*VERBS, *LAUNCH_VERBS}
    assert not [word for word, meant in _MEANT.items() if not meant or not verbs.issuperset(meant)]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--lr", "1e-4"], "the word train.learning_rate=1e-4?"),
        (["--train.epochs=3"], "the word train.epochs=3?"),
        (["--num-epochs", "--dry-run"], "the word train.epochs=VALUE?"),
        (["--batch_size=8"], "the word train.global_batch_size=8 (posts of one optimizer step"),
    ],
)
def test_an_option_of_other_tools_is_led_to_the_word_for_it(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"did you mean {meant}" in told(capsys, "emotion-launch", "run", *words, code=2)
    assert f"did you mean {meant}" in told(capsys, "emotion-train", "train", *words, code=2)


def test_an_option_that_nobody_has_is_refused_without_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in told(capsys, "emotion-launch", "run", "--xyzzy", code=2)
    assert "did you mean" not in told(capsys, "emotion-train", "predict", "--adapter", "a", "--lr", code=2)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "emotion-train evaluate --adapter a --data b --out",
            "--out is empty; type --out FOLDER, or leave it",
        ),
        ("emotion-train evaluate --data b --adapter", "--adapter is empty; type --adapter URL. "),
        ("emotion-train predict a --file", "--file is empty; type --file FILE, or leave it out."),
        ("emotion-train export a --to", "--to is empty; type --to URL."),
        ("emotion-launch compare a b --page", "--page is empty; type --page FILE, or leave it out."),
        ("emotion-launch plan --data", "--data is empty; type --data URL, or leave it out."),
    ],
)
def test_a_variable_that_is_not_set_is_no_place(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty --out counted as none, so that figures were computed and not written."""
    program, *words = line.split()
    assert told(capsys, program, *words, "", code=2).startswith(f"{program}: {sentence}")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "emotion-train prepare a b --targets multi",
            "--targets is 'multi'; type one of one, several, shares.",
        ),
        ("emotion-train prepare a b --test-fraction 10%", "--test-fraction is '10%'; type a number."),
        ("emotion-train prepare a b --memory-mb 512MB", "--memory-mb is '512MB'; type a whole number."),
        ("emotion-train prepare a b --text-column", "--text-column needs a value; type --text-column …."),
        ("emotion-train prepare", "DATA_URL is missing; type emotion-train prepare [SOURCE] DATA_URL."),
        ("emotion-train prepare a b c", "prepare has no place for 'c'; type emotion-train prepare [SOURCE] "),
        ("emotion-train prepare a b --lable-column c", "prepare has no option --lable-column; did you mean"),
        (
            "emotion-train prepare a b --label c",
            "--label may mean --label-column, --label-columns, --labels,",
        ),
        ("emotion-train prepare a b --labels a --labels-file b", "--labels-file and --labels exclude each "),
        ("emotion-train evaluate --adapter a", "--data or --file is missing; type emotion-train evaluate "),
        ("emotion-launch pull a", "--to is missing; type emotion-launch pull OUTPUT_URL/RUN_ID --to FOLDER."),
        (
            "emotion-launch up --bucket b",
            "SOURCE is missing; type emotion-launch up SOURCE [section.field=va",
        ),
        ("emotion-launch plan --label 10M", "--label: '10M' is not a whole number above 0."),
        ("emotion-launch plan --gpus H100:1", "plan has no option --gpus; check, up, distil have it."),
        ("emotion-launch runs a --watch", "runs has no option --watch; show, label-status have it."),
        ("emotion-launch check --data a", "check has no option --data; did you mean the word data.url=a "),
        ("emotion-launch run -c a", "run has no option -c; emotion-launch run --help lists its options."),
    ],
)
def test_a_wrong_option_ends_in_one_sentence_without_a_page_of_usage(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = line.split()
    printed = told(capsys, program, *words, code=2)
    assert printed.startswith(f"{program}: {sentence}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("program", MAINS)
def test_the_version_is_that_of_the_package(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, program, "--version") == f"{program} {version('emotion-train')}\n"


@pytest.mark.parametrize(
    ("module", "program"), [("emotion_train", "emotion-train"), ("launch", "emotion-launch")]
)
def test_a_package_runs_as_its_program_and_help_loads_nothing_heavy(module: str, program: str) -> None:
    """What is loaded is what takes time; a clock would only tell how busy the machine is."""
    code = (
        "import atexit, runpy, sys\nsys.argv = ['x', '--help']\n"
        "heavy = ('torch', 'transformers', 'numpy', 'pyarrow', 'boto3', 'pydantic', 'yaml', 'rich')\n"
        "atexit.register(lambda: print('loaded', [m for m in heavy if m in sys.modules]))\n"
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {program} ")
    assert done.stdout.endswith("loaded []\n")


@pytest.mark.parametrize("program", MAINS)
def test_the_table_of_exit_codes_is_in_the_program_s_help_alone(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, program, "--help").count("exit codes:") == 1
    for verb in VERBS if program == "emotion-train" else LAUNCH_VERBS:
        text = " ".join(told(capsys, program, verb, "--help").split())
        assert text.count("exit codes:") == 1
        assert ("33 saved and preempted" in text) == (verb in ("run", "train"))
        assert "stopped at once by a second" not in text


# --- completion ---


def completed(program: str, *words: str) -> list[str]:
    """What a real bash offers for the last of the words that are typed."""
    line = [program, *words]
    function = "_" + program.replace("-", "_")
    typed = " ".join(f"'{word}'" for word in line)
    commands = (
        f"{script('bash', PARSERS[program]())}\ncompopt() {{ :; }}\n"
        f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; {function}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", commands],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stderr == ""
    return [word for word in done.stdout.split("\n") if word]


def test_bash_completes_verbs_options_choices_and_keys() -> None:
    assert completed("emotion-train", "p") == ["prepare", "predict"]
    assert completed("emotion-launch", "ru") == ["run", "runs"]
    assert completed("emotion-launch", "--v") == ["--version"]
    assert completed("emotion-train", "--completion", "") == ["bash", "zsh"]
    assert completed("emotion-train", "predict", "--esc") == ["--escape-formulas"]
    assert completed("emotion-train", "predict", "--format", "") == ["text", "jsonl", "csv"]
    assert completed("emotion-launch", "run", "--dry-run", "data.") == [
        "data.url=",
        "data.max_length=",
        "data.limit=",
    ]
    assert completed("emotion-launch", "run", "train.")[0] == "train.epochs="
    assert completed("emotion-launch", "pull", "data.") == []
    assert completed("emotion-launch", "show", "--every", "") == []  # a number is nobody's to guess


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_script_has_every_verb_option_and_key(
    program: str, shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = told(capsys, program, "--completion", shell)
    for verb in VERBS if program == "emotion-train" else LAUNCH_VERBS:
        line = next(line for line in printed.splitlines() if line.startswith(f"        {verb}) "))
        options = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", told(capsys, program, verb, "--help")))
        assert "--help" in options
        words = shlex.split(re.sub(r"[();]|words=", " ", line))
        if shell == "bash":
            words = [word for group in words for word in group.split()]
        assert {word.partition(":")[0] for word in words if word.startswith("--")} - {"--"} == options
        takes_keys = verb in ("run", "plan", "check", "up", "distil", "train", "demo")
        assert {f"{key}=" in words for key in all_keys()} == {takes_keys}


def test_zsh_words_are_quoted_and_have_one_colon_of_their_own() -> None:
    text = script("zsh", PARSERS["emotion-train"]())
    assert text.startswith("#compdef emotion-train\n")
    listed = re.findall(r"(?:options|verbs)=\((.*?)\)(?=;| ;;|$)", text, re.MULTILINE)
    assert len(listed) == 2 + len(VERBS)
    for group in listed:
        for word in shlex.split(group):
            assert re.fullmatch(r"[\w-]+:(?:[^:\\]|\\:|\\(?!:))*", word), word


def test_a_folder_that_is_missing_has_no_runs_to_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "emotion-launch", "runs", str(tmp_path / "rusn")).startswith(
        f"There is no folder {tmp_path / 'rusn'}; give the run.output_url of your runs"
    )
    assert MAINS["emotion-launch"](["runs", str(tmp_path)]) == 0


@pytest.mark.parametrize("program", ["emotion_train.cli", "launch.cli"])
def test_a_program_that_ends_looks_for_no_cycles_among_its_objects(program: str) -> None:
    lines = [
        "import atexit, gc",
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))",
        f"from {program} import main",
        "main(['--version'])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True True"
