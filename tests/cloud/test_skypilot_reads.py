"""SkyPilot itself reads the task files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.slurm_site import ROOT, SKY_ENV, lay_out_catalog

pytestmark = pytest.mark.cloud
READ = """
import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
if len(sys.argv) > 2:
    task.set_resources_override(json.loads(sys.argv[2]))
candidates = [
    [next(iter(one.accelerators.items())), one.use_spot, one.disk_size, one.job_recovery]
    for one in task.resources
]
kind = type(task.resources).__name__
print("read", json.dumps([kind, task.num_nodes, candidates, sorted(task.secrets), task.envs]))
"""


def read(path: Path, home: Path, *override: str) -> subprocess.CompletedProcess[str]:
    """What SkyPilot makes of a file, by its own Python in a home of its own."""
    if not (SKY_ENV / "bin" / "python").exists():
        pytest.skip("SkyPilot is not installed; type make sky-env")
    lay_out_catalog(home)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    line = [str(SKY_ENV / "bin" / "python"), "-c", READ, str(path), *override]
    return subprocess.run(line, env=environment, cwd=home, capture_output=True, text=True, timeout=120)


def given(name: str, folder: Path) -> Path:
    """The shipped file with the values that a person has to give."""
    text = (ROOT / "sky" / f"{name}.yaml").read_text()
    assert text.count("_URL: null") == (1 if name == "serve" else 2)
    path = folder / f"{name}.yaml"
    given = text.replace("_URL: null", "_URL: s3://team/some").replace(
        "SOURCE: null", "SOURCE: s3://team/posts"
    )
    path.write_text(given)
    return path


def facts(done: subprocess.CompletedProcess[str]) -> list[Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.rpartition("read ")[2]))


@pytest.mark.parametrize("name", ["train", "evaluate", "label"])
def test_skypilot_takes_the_file_with_its_candidates_in_their_order(name: str, tmp_path: Path) -> None:
    kind, nodes, candidates, secrets, envs = facts(read(given(name, tmp_path), tmp_path))
    assert (kind, nodes) == ("list", 1)  # a list is tried in its order, a set by price
    spots = [use_spot for _, use_spot, _, _ in candidates]
    assert spots == sorted(spots, reverse=True)
    assert set(spots) == {True, False}
    for _, _, disk_gb, recovery in candidates:
        assert disk_gb == 150
        assert recovery == {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": [33],
        }
    assert "AWS_SESSION_TOKEN" in secrets
    assert envs["DEVICE"] == "auto"


def test_a_service_is_read_with_its_candidates(tmp_path: Path) -> None:
    kind, _, candidates, secrets, envs = facts(read(given("serve", tmp_path), tmp_path))
    assert kind == "set"  # the cheapest is taken
    assert {use_spot for _, use_spot, _, _ in candidates} == {True}
    assert "AWS_SECRET_ACCESS_KEY" in secrets
    assert envs["MODEL_URL"] == "s3://team/some"


@pytest.mark.parametrize("use_spot", [True, False])
def test_spot_or_on_demand_can_be_switched_off(use_spot: bool, tmp_path: Path) -> None:
    candidates = facts(read(given("train", tmp_path), tmp_path, json.dumps({"use_spot": use_spot})))[2]
    assert {candidate[1] for candidate in candidates} == {use_spot}


@pytest.mark.parametrize(
    ("name", "required"),
    [("train", "DATA_URL"), ("evaluate", "RUN_URL"), ("label", "SOURCE"), ("serve", "MODEL_URL")],
)
def test_a_required_value_that_is_not_given_is_asked_for(name: str, required: str, tmp_path: Path) -> None:
    done = read(ROOT / "sky" / f"{name}.yaml", tmp_path)
    assert done.returncode != 0
    assert f"'{required}' is None" in done.stderr


def test_a_key_that_skypilot_does_not_know_is_refused(tmp_path: Path) -> None:
    broken = given("train", tmp_path)
    broken.write_text(broken.read_text().replace("disk_tier:", "disc_tier:"))
    done = read(broken, tmp_path)
    assert done.returncode != 0
    assert "disc_tier" in done.stderr
