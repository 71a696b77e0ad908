"""Notices of three clouds and of signals, against small servers that speak the clouds' protocols
and misbehave as they do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from emotion_train.processes import notices as notices_page
from emotion_train.processes.notices import (
    Aws,
    Azure,
    Cloud,
    Endpoints,
    Gcp,
    Notice,
    PreemptionWatch,
    Sighting,
    StrangeAnswer,
    hold_seconds,
)
from tests.helpers.metadata_servers import AwsHandler, AzureHandler, GcpHandler, Machine, serving
from tests.helpers.patience import PATIENCE_S, eventually

TERMINATE = {"action": "terminate", "time": "2030-01-02T03:04:05Z"}
AT = 1893553445.0  # that time, by `date -u -d 2030-01-02T03:04:05Z +%s`
HANDLERS = {"aws": AwsHandler, "gcp": GcpHandler, "azure": AzureHandler}
CLOUDS: dict[str, type[Aws] | type[Gcp] | type[Azure]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once, and so do tries after failures; a question that Google holds
    open while a test changes what the server answers ends soon.
    """
    for cloud in CLOUDS.values():
        monkeypatch.setattr(cloud, "pause_s", 0.01)
    monkeypatch.setattr(notices_page, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(notices_page, "_PROBE_PAUSE_S", 0.05)
    monkeypatch.setattr(notices_page, "_GCP_HANG_S", 3)


def preempt_event(**changes: object) -> dict[str, object]:
    event = {
        "EventId": "A1",
        "EventType": "Preempt",
        "ResourceType": "VirtualMachine",
        "Resources": ["vm-0"],
        "EventStatus": "Scheduled",
    }
    return {**event, "NotBefore": "Wed, 02 Jan 2030 03:04:05 GMT", **changes}


def announce(cloud: str, machine: Machine, going: bool = True) -> None:
    machine.action = TERMINATE if going else None
    machine.preempted = going
    machine.events = [preempt_event()] if going else []


def everywhere(url: str) -> Endpoints:
    return Endpoints(url, url, url)


def noticed(watch: PreemptionWatch) -> Notice:
    """Its notice, as soon as it has one."""
    eventually(lambda: watch.notice is not None)
    notice = watch.notice
    assert notice is not None
    return notice


def looks(machine: Machine, count: int) -> None:
    """Return after that many more questions."""
    before = len(machine.asked)
    eventually(lambda: len(machine.asked) >= before + count)


@contextmanager
def watching(notices: str, url: str, tell: Callable[[str], None] = print) -> Iterator[PreemptionWatch]:
    with PreemptionWatch(notices, tell, everywhere(url)) as watch:  # type: ignore[arg-type]
        yield watch


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("asked", ["its name", "auto"])
def test_a_termination_is_a_notice_and_its_withdrawal_takes_it_back(cloud: str, asked: str) -> None:
    with (
        serving(HANDLERS[cloud]) as machine,
        watching(cloud if asked == "its name" else "auto", machine.url) as watch,
    ):
        eventually(lambda: len(machine.asked) >= 2)
        assert watch.notice is None
        announce(cloud, machine)
        first = noticed(watch)
        assert first.kind == "terminate"
        if cloud == "gcp":
            assert first.deadline == pytest.approx(time.time() + 30, abs=20)
        else:
            assert first.deadline == AT
        time.sleep(0.1)
        assert noticed(watch) is first  # said again and again, it is one notice
        announce(cloud, machine, going=False)
        eventually(lambda: watch.notice is None)
        announce(cloud, machine)
        assert noticed(watch).serial > first.serial


def test_a_rebalance_is_said_once_and_a_termination_outranks_it() -> None:
    with (
        serving(AwsHandler, advice={"noticeTime": "2030-01-02T03:00:00Z"}) as machine,
        watching("aws", machine.url) as watch,
    ):
        advice = noticed(watch)
        assert (advice.kind, advice.deadline) == ("rebalance", None)
        machine.action = TERMINATE
        eventually(lambda: watch.notice is not advice)
        going = watch.notice
        assert going is not None
        assert going.kind == "terminate"
        assert going.serial > advice.serial
        machine.action = None
        eventually(lambda: watch.notice is None)
        looks(machine, 6)
        assert watch.notice is None  # the service still gives the same advice


def test_an_expired_token_of_aws_is_renewed() -> None:
    with serving(AwsHandler, action=TERMINATE) as machine:
        cloud = Aws(machine.url)
        assert cloud.look() is not None
        machine.token = "token-2"  # the old one is answered by 401 from now on
        assert cloud.look() is not None
        assert [line for line in machine.asked if line.startswith("PUT")] == ["PUT /latest/api/token"] * 2


def test_a_token_that_is_never_taken_is_no_endless_loop() -> None:
    with serving(
        AwsHandler, odd=lambda method, path: (200, "t") if method == "PUT" else (401, "")
    ) as machine:
        with pytest.raises(StrangeAnswer, match="401"):
            Aws(machine.url).look()
        assert len(machine.asked) == 4


def test_gcp_holds_the_question_open_until_there_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_page, "_GCP_HANG_S", 60)
    with serving(GcpHandler) as machine, watching("gcp", machine.url) as watch:
        eventually(lambda: len(machine.asked) >= 2)
        time.sleep(0.3)
        assert len(machine.asked) == 2
        assert "wait_for_change=true" in machine.asked[1]
        assert "last_etag=e0" in machine.asked[1]
        machine.preempted = True
        eventually(lambda: watch.notice is not None)


def test_a_slow_first_answer_of_azure_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notices_page._AZURE_FIRST_ANSWER_S > 120
    monkeypatch.setattr(notices_page, "_ANSWER_S", 0.1)  # what other questions get

    def slow(method: str, path: str) -> tuple[()]:
        if "scheduledevents" in path:
            time.sleep(1.5)
        return ()

    with serving(AzureHandler, odd=slow, events=[preempt_event()]) as machine:
        assert Azure(machine.url).look() is not None


@pytest.mark.parametrize(
    ("name", "event", "kind"),
    [
        ("vm-0", preempt_event(), "terminate"),
        ("VM-0", preempt_event(), "terminate"),
        ("vm-1", preempt_event(), None),
        (None, preempt_event(), "terminate"),
        ("vm-0", preempt_event(EventType="Freeze"), None),
        ("vm-0", preempt_event(EventType="Terminate"), "terminate"),
        ("vm-0", preempt_event(EventType="Reboot"), "rebalance"),
        ("vm-0", preempt_event(EventStatus="Started", NotBefore=""), "terminate"),
    ],
)
def test_what_an_event_of_azure_means_for_this_machine(
    name: str | None, event: dict[str, object], kind: str | None
) -> None:
    with serving(AzureHandler, name=name, events=[event]) as machine:
        sighting = Azure(machine.url).look()
        assert (sighting and sighting.kind) == kind


def test_of_several_events_the_termination_counts() -> None:
    with serving(
        AzureHandler,
        events=[preempt_event(EventType="Reboot"), preempt_event(Resources=["vm-9"]), preempt_event()],
    ) as machine:
        sighting = Azure(machine.url).look()
        assert sighting is not None
        assert (sighting.kind, sighting.deadline) == ("terminate", AT)


GARBAGE = [
    "",
    "garbage",
    "[]",
    "{}",
    '{"action": 1}',
    '{"Events": 1}',
    '{"Events": [1]}',
    "[" * 100_000,
    "\x00",
    "9" * 10_000,
    "x" * (2 << 20),
]


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: text[:12] or "empty")
def test_garbage_is_no_notice_and_the_next_true_word_is(cloud: str, text: str) -> None:
    strange = True

    def odd(method: str, path: str) -> tuple[int, str] | tuple[()]:
        return (200, text) if strange and method == "GET" else ()

    with serving(HANDLERS[cloud], odd=odd) as machine, watching(cloud, machine.url) as watch:
        looks(machine, 4)
        assert watch.notice is None
        strange = False
        announce(cloud, machine)
        eventually(lambda: watch.notice is not None)


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("status", [302, 400, 403, 429, 500, 503])
def test_an_error_takes_no_termination_back_and_is_told_once(cloud: str, status: int) -> None:
    told: list[str] = []
    watches: list[PreemptionWatch] = []

    def odd(method: str, path: str) -> tuple[int, str] | tuple[()]:
        # from the first question after the notice on: later, GCP's next one would hang already
        return (status, "") if any(watch.notice is not None for watch in watches) else ()

    with serving(HANDLERS[cloud], odd=odd) as machine, watching(cloud, machine.url, told.append) as watch:
        watches.append(watch)
        announce(cloud, machine)
        first = noticed(watch)
        looks(machine, 12)
        assert watch.notice is first
        assert len(told) == 1
        assert machine.url in told[0]
        assert str(status) in told[0]


def test_a_server_that_speaks_no_http_is_told_and_survived() -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as line:

        def answer() -> None:
            while True:
                try:
                    peer, _ = line.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"220 mail ready\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with watching("aws", f"http://127.0.0.1:{line.getsockname()[1]}", told.append) as watch:
            eventually(lambda: bool(told))
            assert watch.notice is None
        line.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_hanging_server_delays_neither_start_nor_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_page, "_PROBE_S", 8)  # the end waits for a quarter of it
    monkeypatch.setattr(notices_page, "_ANSWER_S", 60)

    def start_and_end(notices: str) -> None:
        with serving(AwsHandler, odd=lambda method, path: None) as machine:
            started = time.monotonic()
            with watching(notices, machine.url) as watch:
                assert time.monotonic() - started < 6
                eventually(lambda: bool(machine.asked))
                assert watch.notice is None
                ended = time.monotonic()
            assert time.monotonic() - ended < 6

    for notices in ("auto", "aws", "gcp", "azure"):
        start_and_end(notices)


def test_where_no_cloud_is_nobody_is_bothered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        url = f"http://127.0.0.1:{line.getsockname()[1]}"  # nobody listens there once it is closed
    told: list[str] = []
    with watching("auto", url, told.append) as watch:
        watch._thread.join(PATIENCE_S)
        assert not watch._thread.is_alive()
        assert watch.notice is None
    assert not told


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_cloud_knows_its_own_metadata_service(cloud: str) -> None:
    with serving(HANDLERS[cloud]) as machine:
        found = PreemptionWatch("auto", endpoints=everywhere(machine.url))._find()
        assert isinstance(found, CLOUDS[cloud])


def test_a_proxy_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(AwsHandler) as proxy, serving(AwsHandler, action=TERMINATE) as machine:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert Aws(machine.url).look() is not None
        assert not proxy.asked


def test_a_cloud_that_is_not_asked_for_is_left_alone() -> None:
    with serving(AwsHandler, action=TERMINATE) as machine:
        with watching("none", machine.url) as watch:
            time.sleep(0.1)
            assert watch.notice is None
        assert not machine.asked


def test_the_clouds_own_variables_name_the_metadata_services() -> None:
    environment = {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1",
        "GCE_METADATA_HOST": "127.0.0.1:2",
    }
    assert Endpoints.of(environment) == Endpoints(
        "http://127.0.0.1:1", "http://127.0.0.1:2", "http://169.254.169.254"
    )
    assert Endpoints.of({}) == Endpoints()


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, "sigterm"), (signal.SIGHUP, "sigterm"), (signal.SIGINT, "sigint")]
)
def test_a_signal_is_a_notice_that_no_cloud_takes_back(number: signal.Signals, kind: str) -> None:
    before = signal.getsignal(number)
    with serving(AwsHandler, action=TERMINATE) as machine, watching("aws", machine.url) as watch:
        eventually(lambda: watch.notice is not None)
        os.kill(os.getpid(), number)
        notice = watch.notice
        assert notice is not None
        assert (notice.kind, notice.deadline, notice.words) == (kind, None, f"{number.name} came")
        machine.action = None
        looks(machine, 4)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.notice is notice
    assert signal.getsignal(number) is before


def test_sigint_after_sigterm_is_news() -> None:
    with PreemptionWatch("none") as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        first = watch.notice
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.notice == Notice("sigint", "SIGINT came", None, 2)
        assert first == Notice("sigterm", "SIGTERM came", None, 1)


def test_a_second_sigint_leaves_at_once_and_one_that_came_twice_is_one() -> None:
    code = (
        "import os, signal, time\nfrom emotion_train.processes.notices import PreemptionWatch\n"
        "with PreemptionWatch('none') as watch:\n    print('ready', flush=True)\n"
        "    while watch.notice is None: time.sleep(0.01)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "still here\n"
            time.sleep(notices_page._ONE_PRESS_S + 0.1)
            process.send_signal(signal.SIGINT)
            _, words = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 1
    assert words.strip() == "emotion-train: interrupted twice: left without saving"


def test_a_hangup_that_nohup_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionWatch("none") as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.notice is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("configured", "environment", "seconds"),
    [
        (None, {}, 0),
        (None, {"SKYPILOT_TASK_ID": ""}, 0),
        (None, {"SKYPILOT_TASK_ID": "sky-1"}, 300),
        (7.5, {"SKYPILOT_TASK_ID": "sky-1"}, 7.5),
    ],
)
def test_the_hold_is_300_s_under_skypilot_and_what_is_configured_wins(
    configured: float | None, environment: dict[str, str], seconds: float
) -> None:
    assert hold_seconds(configured, environment) == seconds


def test_every_failure_of_a_look_is_one_that_the_watch_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_page, "_LONGEST_PAUSE_S", 0.0005)

    class Failing:
        pause_s = 0.001

        def __init__(self, url: str) -> None:
            self.server = notices_page.MetadataServer(url)
            # in a row: the pause stays finite
            self.left = [kind("") for kind in notices_page.NO_ANSWER for _ in range(200)]

        def is_here(self) -> bool:
            return True

        def look(self) -> Sighting | None:
            if self.left:
                raise self.left.pop()
            return Sighting("terminate", "gone", None)

    cloud: Cloud = Failing("http://127.0.0.1:9")
    watch = PreemptionWatch("aws", lambda words: None, Endpoints())
    watch._clouds = [cloud]
    with watch:
        eventually(lambda: watch.notice is not None)
