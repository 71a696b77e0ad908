"""What a user installs: the wheel of this checkout, in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_words, write_posts

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel, and the packages that it needs
    from this one's site-packages; of this checkout it has nothing.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy without what earlier builds left behind
    for name in ("emotion_train", "launch", "accelerate_configs", "sky"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=PATIENCE_S)
    (wheel,) = folder.glob("*.whl")
    home = folder / "environment"
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    unpack = [*pip, "install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(unpack, check=True, timeout=PATIENCE_S)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def of_a_user() -> dict[str, str]:
    """Without this checkout, and with the programs of the packages in the way of commands."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    programs = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": programs}


def asked(installed: Path, folder: Path, *words: str) -> str:
    """What the installed program prints, far from this checkout; it must end with 0."""
    package = {"emotion-train": "emotion_train.cli", "emotion-launch": "launch.cli"}[words[0]]
    line = [str(installed / "python"), "-m", package, *words[1:]]
    done = subprocess.run(
        line, cwd=folder, env=of_a_user(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_alone_has_every_room_and_its_data(installed: Path, tmp_path: Path) -> None:
    script = (
        "import emotion_train, launch, launch.run.choice as c, launch.plan.task_file as t, "
        "emotion_train.config as f, emotion_train.demo as d\n"
        "print(emotion_train.__file__)\nassert f.example_config().exists() and d.POSTS.is_dir()\n"
        "assert (c.CONFIGS / 'cpu.yaml').exists()"
    )
    line = [str(installed / "python"), "-c", script]
    done = subprocess.run(line, cwd=tmp_path, env=of_a_user(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed.parent))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["emotion-train", "emotion-launch"])
def test_every_verb_of_the_wheel_explains_itself(installed: Path, tmp_path: Path, program: str) -> None:
    told = asked(installed, tmp_path, program, "--help")
    verbs = re.findall(r"(?m)^    ([a-z][a-z-]+)(?: {2,}|$)", told)
    assert len(verbs) > 4
    for verb in verbs:
        assert verb in asked(installed, tmp_path, program, verb, "--help")


@pytest.mark.slow
def test_nothing_named_sky_is_installed(installed: Path) -> None:
    (site,) = (installed.parent / "lib").glob("python*/site-packages")
    assert not [path for path in site.iterdir() if path.name.startswith("sky")]


@pytest.mark.slow
def test_the_demo_of_the_wheel_ends_with_an_adapter(installed: Path, tmp_path: Path) -> None:
    told = asked(installed, tmp_path, "emotion-train", "demo", "--folder", "demo", "train.epochs=1")
    assert "published at step" in told
    assert (tmp_path / "demo" / "adapter" / "report" / "report.html").exists()


@pytest.mark.slow
def test_a_plan_of_the_wheel_writes_a_task(installed: Path, tmp_path: Path) -> None:
    causal_checkpoint(tmp_path / "base", "llama")
    asked(installed, tmp_path, "emotion-train", "prepare", str(write_posts(tmp_path / "source")), "data")
    plan = ["emotion-launch", "plan", "--data", "data", "model.base=base", "--write", "mine.yaml"]
    asked(installed, tmp_path, *plan)
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))
    source = yaml.safe_load((ROOT / "sky" / "train.yaml").read_text(encoding="utf-8"))
    assert written["setup"] == source["setup"]
    assert written["resources"]["ordered"]
    # what the task starts on a machine, with the config that it names
    words = ["--config", written["envs"]["CONFIG"], "data.url=data", "run.output_url=runs", "model.base=base"]
    asked(installed, tmp_path, "emotion-launch", "run", "--accelerate-config", "cpu", "--dry-run", *words)


@pytest.mark.slow
def test_a_tiny_run_of_the_wheel_is_published_pulled_and_used(installed: Path, tmp_path: Path) -> None:
    causal_checkpoint(tmp_path / "base", "llama")
    asked(installed, tmp_path, "emotion-train", "prepare", str(write_posts(tmp_path / "source")), "data")
    run = ["emotion-launch", "run", "--accelerate-config", "cpu", *tiny_words(tmp_path, "run.id=tiny")]
    asked(installed, tmp_path, *run)
    url = next(word for word in run if word.startswith("run.output_url=")).partition("=")[2]
    asked(installed, tmp_path, "emotion-launch", "pull", f"{url}/tiny", "--to", "adapter")
    told = asked(installed, tmp_path, "emotion-train", "predict", "--adapter", "adapter", "tea and rain")
    assert told.endswith("| tea and rain\n")
