"""The shipped sky/train.yaml by a real `sky launch`: on one node, on two, a second time on the same
cluster, and without its GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emotion_train.errors import WrongRequest
from emotion_train.report.schema import Scorecard
from emotion_train.storage.open import open_store
from tests.helpers.launcher import EVALUATE, OUTPUT_URL, TASK, Launcher, adapter, assert_equal, published_run

pytestmark = pytest.mark.cloud
SHORT = ["train.epochs=2", "preemption.notices=none"]


def test_one_node_and_two_nodes_train_the_same_adapter(launcher: Launcher, tmp_path: Path) -> None:
    adapters = []
    for nodes in (1, 2):
        name = f"nodes{nodes}"
        try:
            printed = launcher.site.sky(
                "launch", "-c", name, str(TASK), "--num-nodes", str(nodes), *launcher.words(*SHORT)
            )
        finally:
            launcher.site.sky("down", "-y", name, check=False)
        assert f"--num_machines {nodes}" in printed or nodes == 1
        adapters.append(adapter(published_run(printed), tmp_path / name))
    one, other = adapters
    assert_equal(one, other, tolerance=1e-5)


def test_later_launches_find_their_packages_there_one_of_them_evaluates_and_no_key_is_printed(
    launcher: Launcher,
) -> None:
    words = launcher.words(*SHORT, "train.epochs=1")
    packages = launcher.site.folder / "home" / ".sky_clusters"
    try:
        first = launcher.site.sky("launch", "-c", "twice", str(TASK), *words)
        [stamp] = packages.glob("twice-*/sky_workdir/.venv/ready-*")
        made = stamp.parent.joinpath("pyvenv.cfg").stat().st_mtime_ns
        second = launcher.site.sky("launch", "-c", "twice", str(TASK), *words)
        run_url = f"{OUTPUT_URL}/{published_run(second)}"
        scored = launcher.words(RUN_URL=run_url, SPLIT="validation", OUT="s3://cloud/scores")
        third = launcher.site.sky("launch", "-c", "twice", str(EVALUATE), *scored)
        assert stamp.parent.joinpath("pyvenv.cfg").stat().st_mtime_ns == made
    finally:
        launcher.site.sky("down", "-y", "twice", check=False)
    assert published_run(first) != published_run(second)
    card = Scorecard.model_validate_json(open_store("s3://cloud/scores").read("scorecard.json"))
    assert (card.name, card.source, card.run_id) == ("validation", launcher.posts_url, published_run(second))
    for secret in (launcher.s3.secret_key, launcher.s3.access_key):
        assert secret not in first + second + third


def test_gpus_that_are_promised_and_not_there_end_the_run_with_a_sentence(launcher: Launcher) -> None:
    try:
        printed = launcher.site.sky(
            "launch", "-c", "blind", str(TASK), *launcher.words(*SHORT, cpu=False), check=False
        )
    finally:
        launcher.site.sky("down", "-y", "blind", check=False)
    assert "promised 1 GPUs" in printed
    assert "DEVICE=cpu" in printed
    assert f"[{WrongRequest.exit_code}]" in printed
