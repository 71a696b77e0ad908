"""Preemption notices for this machine: from the cloud's metadata service, asked in a thread, and
from SIGTERM, SIGHUP and SIGINT.

A watch only listens; the ranks agree on what to do about a notice. AWS is asked every 5 s, Azure
every 2 s, and GCP holds a request open until there is news. The price: one request in flight for
the whole run. No answer, a strange answer or a proxy never stops training.
"""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import FrameType, TracebackType
from typing import Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from emotion_train.edges.bounded import json_in
from emotion_train.processes.borrowed import is_borrowed

CloudKind = Literal["rebalance", "terminate"]
Kind = Literal["rebalance", "terminate", "sigterm", "sigint"]

SKYPILOT_HOLD_S = 300.0
GCP_NOTICE_S = 30.0  # https://cloud.google.com/compute/docs/instances/preemptible#preemption-process
_PROBE_S = 2.0
_ANSWER_S = 5.0
_AZURE_FIRST_ANSWER_S = 130.0  # the first request switches the service on, which takes up to 2 minutes
_GCP_HANG_S = 60
_LONGEST_PAUSE_S = 60.0
_PROBE_ROUNDS = 3
_PROBE_PAUSE_S = 10.0
_FAILURES_BEFORE_TELLING = 5
_LARGEST_ANSWER = 1 << 20  # bytes
_ONE_PRESS_S = 0.5  # two SIGINT within this count as one: a supervisor may signal a whole group


@dataclass(frozen=True)
class Notice:
    """A preemption notice: this machine will or may be taken. `deadline` is the announced end in
    UTC epoch seconds; `serial` grows with each notice.
    """

    kind: Kind
    words: str
    deadline: float | None
    serial: int


class Sighting(NamedTuple):
    """The current announcement of a metadata service."""

    kind: CloudKind
    words: str
    deadline: float | None  # UTC epoch seconds


@dataclass(frozen=True)
class Endpoints:
    """Base URLs of the metadata services. The two variables are those of the clouds' own tools."""

    aws: str = "http://169.254.169.254"
    gcp: str = "http://169.254.169.254"  # metadata.google.internal, without asking a name server
    azure: str = "http://169.254.169.254"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Endpoints:
        usual = cls()
        gcp = environment.get("GCE_METADATA_HOST")
        return cls(
            environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", usual.aws),
            f"http://{gcp}" if gcp else usual.gcp,
            usual.azure,
        )


def hold_seconds(configured: float | None, environment: Mapping[str, str]) -> float:
    """Seconds to wait for the kill: the configured time, else 300 under SkyPilot, which takes an
    early exit for a failure, else 0.
    """
    if configured is not None:
        return configured
    return SKYPILOT_HOLD_S if environment.get("SKYPILOT_TASK_ID") else 0.0


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str


class StrangeAnswer(Exception):
    """A metadata service answered in an undocumented way."""


# errors of a request: no network, no HTTP, no JSON, no sense
NO_ANSWER = (OSError, http.client.HTTPException, ValueError, OverflowError, RecursionError, StrangeAnswer)


class MetadataServer:
    """Sends one request at a time to an http:// address, past any proxy, each on a new
    connection.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._connection: http.client.HTTPConnection | None = None

    def ask(
        self, path: str, headers: Mapping[str, str], timeout_s: float = _ANSWER_S, method: str = "GET"
    ) -> Answer:
        """The first MiB of the answer. Raises one of `NO_ANSWER`; `timeout_s` limits the wait
        between two bytes.
        """
        connection = self._connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            text = response.read(_LARGEST_ANSWER).decode("utf-8", "replace").strip()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, text
            )
        finally:
            connection.close()

    def hang_up(self) -> None:
        """End the request that another thread waits for."""
        connection = self._connection
        if connection is not None and (line := connection.sock) is not None:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


class Cloud(Protocol):
    """A metadata service; a method without a sensible answer raises one of `NO_ANSWER`."""

    server: MetadataServer
    pause_s: float  # between two looks

    def is_here(self) -> bool: ...

    def look(self) -> Sighting | None: ...


class Aws:
    """IMDSv2:
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html.
    """

    pause_s = 5.0

    def __init__(self, url: str) -> None:
        self.server = MetadataServer(url)
        self._token: str | None = None

    def is_here(self) -> bool:
        self._renew(_PROBE_S)
        return True

    def look(self) -> Sighting | None:
        action = self._read("/latest/meta-data/spot/instance-action")
        if action is not None:
            words = f"AWS is about to {_text(action, 'action')} this machine ({_text(action, 'time')})"
            return Sighting("terminate", words, _epoch(_text(action, "time")))
        advice = self._read("/latest/meta-data/events/recommendations/rebalance")
        if advice is None:
            return None
        return Sighting("rebalance", f"AWS may take this machine soon ({_text(advice, 'noticeTime')})", None)

    def _read(self, path: str) -> object | None:
        """The JSON at this path, None where there is none; an expired token is renewed once."""
        for _ in range(2):
            token = self._token or self._renew(_ANSWER_S)
            answer = self.server.ask(path, {"X-aws-ec2-metadata-token": token})
            if answer.status == 404:
                return None
            if answer.status == 200:
                return _json(answer)
            if answer.status != 401:
                break
            self._token = None
        raise StrangeAnswer(f"status {answer.status}")

    def _renew(self, timeout_s: float) -> str:
        answer = self.server.ask(
            "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, timeout_s, "PUT"
        )
        if (
            answer.status != 200
            or not answer.text.isascii()
            or not answer.text.isprintable()
            or not answer.text
        ):
            raise StrangeAnswer(f"status {answer.status} to the request for a token")
        self._token = answer.text
        return answer.text


class Gcp:
    """https://cloud.google.com/compute/docs/metadata/querying-metadata; the value never goes back
    from TRUE.
    """

    pause_s = 1.0
    _headers: Mapping[str, str] = {"Metadata-Flavor": "Google"}

    def __init__(self, url: str) -> None:
        self.server = MetadataServer(url)
        self._etag: str | None = None
        self._deadline: float | None = None

    def is_here(self) -> bool:
        answer = self.server.ask("/computeMetadata/v1/instance/id", self._headers, _PROBE_S)
        return answer.status == 200 and answer.headers.get("metadata-flavor") == "Google"

    def look(self) -> Sighting | None:
        path = "/computeMetadata/v1/instance/preempted"
        if self._etag is not None:  # hangs until the value is another one
            path += f"?wait_for_change=true&timeout_sec={_GCP_HANG_S}&last_etag={self._etag}"
        answer = self.server.ask(path, self._headers, _GCP_HANG_S + _ANSWER_S)
        if answer.status == 404:
            return None
        if answer.status != 200 or answer.text not in ("TRUE", "FALSE"):
            raise StrangeAnswer(f"status {answer.status}, {answer.text[:40]!r}")
        etag = answer.headers.get("etag", "")
        self._etag = etag if etag.isalnum() else None
        if answer.text == "FALSE":
            self._deadline = None
            return None
        self._deadline = self._deadline or time.time() + GCP_NOTICE_S
        return Sighting("terminate", "GCP is about to take this machine", self._deadline)


class Azure:
    """https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events; a cancelled event
    vanishes from the list.
    """

    pause_s = 2.0
    _headers: Mapping[str, str] = {"Metadata": "true"}
    _kinds: Mapping[str, CloudKind] = {
        "Preempt": "terminate",
        "Terminate": "terminate",
        "Reboot": "rebalance",
        "Redeploy": "rebalance",
    }

    def __init__(self, url: str) -> None:
        self.server = MetadataServer(url)
        self._name: str | None = None

    def is_here(self) -> bool:
        return self._own_name() is not None

    def look(self) -> Sighting | None:
        answer = self.server.ask(
            "/metadata/scheduledevents?api-version=2020-07-01", self._headers, _AZURE_FIRST_ANSWER_S
        )
        if answer.status != 200:
            raise StrangeAnswer(f"status {answer.status}")
        events = _list(_json(answer), "Events")
        sightings = [sighting for event in events if (sighting := self._of(event)) is not None]
        return min(
            sightings,
            key=lambda sighting: (sighting.kind != "terminate", sighting.deadline or 0.0),
            default=None,
        )

    def _of(self, event: object) -> Sighting | None:
        """The sighting in an event; None for an event about other machines. A reboot counts as
        advice: it is no reason to stop before it comes.
        """
        kind = self._kinds.get(_text(event, "EventType"))
        if kind is None or not self._is_about_this_machine(event):
            return None
        before = _text(event, "NotBefore")  # empty once the event has begun
        words = (
            f"Azure is about to take this machine ({_text(event, 'EventType')}, event"
            f" {_text(event, 'EventId')})"
        )
        return Sighting(kind, words, parsedate_to_datetime(before).timestamp() if before else None)

    def _is_about_this_machine(self, event: object) -> bool:
        with suppress(*NO_ANSWER):
            self._name = self._name or self._own_name()
        resources = [str(name).lower() for name in _list(event, "Resources")]
        return self._name is None or self._name.lower() in resources

    def _own_name(self) -> str | None:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        answer = self.server.ask(path, self._headers, _PROBE_S)
        return answer.text if answer.status == 200 and answer.text and answer.text.isprintable() else None


def _json(answer: Answer) -> object:
    """The answer's JSON. Raises `ValueError` where it is no JSON."""
    value: object = json_in(answer.text)
    return value


def _text(value: object, name: str) -> str:
    """The text in this field of a JSON object. Raises `StrangeAnswer` where there is none."""
    text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise StrangeAnswer(f"no {name} in {str(value)[:80]!r}")
    return text


def _list(value: object, name: str) -> list[object]:
    """The list in this field of a JSON object. Raises `StrangeAnswer` where there is none."""
    items = value.get(name) if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise StrangeAnswer(f"no {name} in {str(value)[:80]!r}")
    return items


def _epoch(text: str) -> float:
    """The epoch seconds of an ISO time, in UTC where it names no zone."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


class PreemptionWatch:
    """Listens from `__enter__`, in the main thread, to `__exit__`. `notices` names the cloud whose
    metadata service is asked; "auto" finds it out.

    A second SIGINT ends the process at once, with 1 and without saving.
    """

    def __init__(
        self,
        notices: Literal["auto", "aws", "gcp", "azure", "none"],
        tell: Callable[[str], None] = print,
        endpoints: Endpoints | None = None,
    ) -> None:
        places = Endpoints.of(os.environ) if endpoints is None else endpoints
        clouds: dict[str, Cloud] = {
            "aws": Aws(places.aws),
            "gcp": Gcp(places.gcp),
            "azure": Azure(places.azure),
        }
        self._detect = notices == "auto"
        self._clouds = (
            list(clouds.values())
            if self._detect
            else [cloud for name, cloud in clouds.items() if name == notices]
        )
        self._tell = tell
        self._serials = itertools.count(1)
        self._signal: Notice | None = None  # written only by the signal handler
        self._cloud: Notice | None = None  # written only by the thread
        self._advised: set[Sighting] = set()  # a rebalance stays in the service's answers and is news once
        self._interrupted_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)

    @property
    def notice(self) -> Notice | None:
        """The gravest notice in force: SIGINT, SIGTERM, a termination that was not withdrawn, a
        rebalance; None without any.
        """
        return self._signal or self._cloud

    def __enter__(self) -> PreemptionWatch:
        wanted = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            wanted.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():  # only this may set handlers
            wanted = []
        self._before = {number: signal.signal(number, self._on_signal) for number in wanted}
        if self._clouds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for cloud in self._clouds:
            cloud.server.hang_up()
        if self._thread.is_alive():
            self._thread.join(_PROBE_S / 4)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. It runs between any two instructions of the main thread, so it takes no
        lock and prints to no stream.
        """
        now, name = time.monotonic(), signal.Signals(number).name
        if number != signal.SIGINT:
            self._signal = self._signal or Notice("sigterm", f"{name} came", None, next(self._serials))
        elif self._signal is None or self._signal.kind != "sigint":
            self._interrupted_at = now
            self._signal = Notice("sigint", f"{name} came", None, next(self._serials))
        elif now - self._interrupted_at > _ONE_PRESS_S:
            if is_borrowed():
                raise KeyboardInterrupt
            with suppress(OSError):  # the stream may have no reader
                os.write(
                    sys.__stderr__.fileno() if sys.__stderr__ else 2,
                    b"\nemotion-train: interrupted twice: left without saving\n",
                )
            os._exit(1)

    def _listen(self) -> None:
        cloud = self._find() if self._detect else self._clouds[0]
        failures, told, pause_s = 0, False, 0.0
        while cloud is not None and not self._ended.wait(pause_s):
            try:
                self._found(cloud.look())
                failures, told, pause_s = 0, False, cloud.pause_s
            except NO_ANSWER as error:
                failures += 1
                pause_s = min(cloud.pause_s * 2 ** min(failures, 6), _LONGEST_PAUSE_S)
                if failures >= _FAILURES_BEFORE_TELLING and not told and not self._ended.is_set():
                    told = True
                    self._tell(
                        f"{cloud.server.url} gives no preemption notices ({error}); asked again every"
                        f" {pause_s:.0f} s"
                    )

    def _find(self) -> Cloud | None:
        """The cloud whose metadata service answers; None where none does, as outside any cloud."""
        for number in range(_PROBE_ROUNDS):
            if self._ended.wait(_PROBE_PAUSE_S if number else 0.0):
                return None
            for cloud in self._clouds:
                with suppress(*NO_ANSWER):
                    if cloud.is_here():
                        return cloud
        return None

    def _found(self, sighting: Sighting | None) -> None:
        """Make a notice of a new sighting, and withdraw a termination that the service no longer
        announces.
        """
        standing = self._cloud
        if sighting is None or sighting in self._advised:
            if standing is not None and standing.kind == "terminate":
                self._cloud = None
            return
        if sighting.kind == "rebalance":
            self._advised.add(sighting)
        if standing is None or (standing.kind, standing.words) != (sighting.kind, sighting.words):
            self._cloud = Notice(*sighting, next(self._serials))
