"""Managed jobs whose node is taken in mid-training: each goes on from the bucket's last commit and
ends as a run in peace does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from emotion_train.errors import NotStarted
from emotion_train.runs.log import Entry, when
from launch.results.history import incarnations
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.launcher import (
    PATIENCE_S,
    TASK,
    Launcher,
    ManagedJob,
    adapter,
    assert_equal,
    published_run,
)
from tests.helpers.metadata_servers import AwsHandler, Machine, serving
from tests.helpers.slurm_site import SPOT, Site

pytestmark = pytest.mark.cloud
# half a minute of training on a machine with nothing else to do
WORDS = ["train.epochs=16", "checkpoint.every_seconds=5"]
NOTICE_S = 20.0
OUTAGE_S = 90.0  # longer than a word about it every minute
STEP = 120  # after which the node is taken


@pytest.fixture(scope="session")
def in_peace(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of the same run on a node that nothing happens to."""
    try:
        printed = launcher.site.sky(
            "launch", "-c", "peace", str(TASK), *launcher.words(*WORDS, "preemption.notices=none")
        )
    finally:
        launcher.site.sky("down", "-y", "peace", check=False)
    return adapter(published_run(printed), tmp_path_factory.mktemp("peace") / "adapter")


def notice_then_power_cut(site: Site, node: str, machine: Machine) -> float:
    """As AWS takes a spot machine: the metadata service says so, some time later the machine is
    gone.
    """
    end = time.time() + NOTICE_S
    machine.action = {"action": "terminate", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))}
    time.sleep(NOTICE_S)
    return power_cut(site, node, machine)


def power_cut(site: Site, node: str, machine: Machine) -> float:
    site.cut_power(node)
    machine.action = None
    return time.time()


def set_down(site: Site, node: str, machine: Machine) -> float:
    site.set_down(node)
    return time.time()


def preempt(site: Site, node: str, machine: Machine) -> float:
    """As Slurm takes a node: SIGTERM to everything, some time later SIGKILL to what is left."""
    site.preempt(node)
    return time.time()


@contextmanager
def managed(launcher: Launcher, name: str, *words: str, task: Path = TASK) -> Iterator[ManagedJob]:
    job = launcher.start_managed(name, *words, task=task)
    try:
        yield job
    finally:
        launcher.site.sky("jobs", "cancel", "-y", str(job.number), check=False)
        for node in launcher.site.slurm("sinfo", "-h", "-N", "-t", "down", "-o", "%N").split():
            launcher.site.set_up(node)


@pytest.mark.parametrize(
    "take", [notice_then_power_cut, power_cut, set_down], ids=lambda take: take.__name__.replace("_", "-")
)
def test_a_run_whose_node_goes_ends_with_the_same_adapter(
    launcher: Launcher,
    in_peace: dict[str, torch.Tensor],
    tmp_path: Path,
    take: Callable[[Site, str, Machine], float],
) -> None:
    name = take.__name__.replace("_", "-")
    with serving(AwsHandler) as machine:
        words = launcher.words(
            *WORDS, "preemption.notices=aws", AWS_EC2_METADATA_SERVICE_ENDPOINT=machine.url
        )
        with managed(launcher, name, *words) as job:
            job.wait_for_step(STEP)
            node = launcher.site.node_of(name)
            taken_at = take(launcher.site, node, machine)
            job.wait_for_second_writer()
            if take is not set_down:
                launcher.site.switch_on(node)
            assert job.wait_for_end() == "SUCCEEDED"
            log = job.log
    tell(name, log, taken_at)
    if take is not set_down:  # where Slurm's SIGTERM comes some seconds before its SIGKILL
        assert incarnations(log)[0].notice == ("preempted" if take is notice_then_power_cut else None)
    assert_equal(in_peace, adapter(str(job.run_id), tmp_path / "adapter"), tolerance=0)


def test_a_run_that_slurm_preempts_with_grace_ends_with_the_same_adapter_where_errors_may_restart_it(
    launcher: Launcher, in_peace: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Slurm's SIGTERM ends SkyPilot's own process on the node, so that SkyPilot takes the job for
    failed, whatever the trainer does.
    """
    text = TASK.read_text()
    assert text.count("max_restarts_on_errors: 0") == 1
    task = tmp_path / "train.yaml"
    task.write_text(text.replace("max_restarts_on_errors: 0", "max_restarts_on_errors: 3"))
    words = launcher.words(*WORDS, "preemption.notices=none", infra=f"slurm/site/{SPOT}")
    with managed(launcher, "grace", *words, task=task) as job:
        job.wait_for_step(STEP)
        taken_at = preempt(launcher.site, launcher.site.node_of("grace"), Machine())
        job.wait_for_second_writer()
        assert job.wait_for_end() == "SUCCEEDED"
        log = job.log
    tell("preempted by Slurm", log, taken_at)
    assert incarnations(log)[0].notice == "preempted"
    assert_equal(in_peace, adapter(str(job.run_id), tmp_path / "adapter"), tolerance=0)


def test_an_outage_at_the_start_is_waited_for_and_the_job_is_not_failed(
    launcher: Launcher, in_peace: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As after a recovery into a region whose store is away: every request gets a 503 until the
    trainer has waited for a while.
    """
    with FaultProxy(launcher.s3.endpoint) as proxy:
        proxy.outage = "503"
        words = launcher.words(*WORDS, "preemption.notices=none", AWS_ENDPOINT_URL=proxy.endpoint)
        with managed(launcher, "outage", *words) as job:
            deadline = time.monotonic() + PATIENCE_S
            while not proxy.struck:
                assert time.monotonic() < deadline, job.controller_log()
                time.sleep(1)
            time.sleep(OUTAGE_S)
            assert job.log == []
            assert job.status() == "RUNNING"
            proxy.outage = None
            assert job.wait_for_end() == "SUCCEEDED"
            assert len(incarnations(job.log)) == 1  # it waited, and was not started again
            run_id = str(job.run_id)
    assert_equal(in_peace, adapter(run_id, tmp_path / "adapter"), tolerance=0)


def test_an_outage_that_outlasts_the_patience_fails_the_job_with_1(launcher: Launcher) -> None:
    with FaultProxy(launcher.s3.endpoint) as proxy:
        proxy.outage = "503"
        words = launcher.words(
            *WORDS, "preemption.notices=none", "run.start_timeout_s=20", AWS_ENDPOINT_URL=proxy.endpoint
        )
        try:
            printed = launcher.site.sky("launch", "-c", "away", str(TASK), *words, check=False)
        finally:
            launcher.site.sky("down", "-y", "away", check=False)
    assert "The run did not start: the index of the data set" in printed
    assert f"[{NotStarted.exit_code}]" in printed


def tell(name: str, log: list[Entry], taken_at: float) -> None:
    """Print what the recovery cost; the steps that were trained twice are reckoned by the pace of
    the first writer's checkpoints.
    """
    first, again = incarnations(log)[:2]
    saved = [entry for entry in first.entries if entry.kind == "checkpoint"]
    assert again.claim.step == saved[-1].step
    pace = (saved[-1].step - saved[0].step) / max(1.0, seconds(saved[-1]) - seconds(saved[0]))
    lost = 0.0 if first.notice == "preempted" else max(0.0, taken_at - seconds(saved[-1])) * pace
    owned_s, saved_s = seconds(again.claim) - taken_at, seconds(again.entries[0]) - taken_at
    print(
        f"\n{name}: {owned_s:.0f} s from the loss of the node to the new claim, {saved_s:.0f} s to its first"
        f" commit; went on from step {again.claim.step} of {log[-1].step}, about {lost:.0f} steps at"
        f" {pace:.1f}/s trained again"
    )


def seconds(entry: Entry) -> float:
    return when(entry).timestamp()
