"""Dollars an hour of this machine: its cloud's metadata service says which machine it is,
SkyPilot's catalog or the task's PRICES have its price.

Only a price of this very machine counts, spot or on demand as the machine is; nothing is guessed.
Asking takes two seconds at most on a machine that is in no cloud.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue

from emotion_train.edges.bounded import Unreadable, json_in, object_in
from emotion_train.processes.notices import NO_ANSWER, Endpoints, MetadataServer, StrangeAnswer
from launch.gpus import kind_of, named
from launch.plan.prices import CatalogRow, rows_of_files
from launch.run.topology import Topology

_ANSWER_S = 2.0
_AWS_TOKEN = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}


@dataclass(frozen=True)
class Facts:
    """What a machine's cloud says about it; None where it says nothing."""

    cloud: str
    region: str | None = None
    zone: str | None = None
    instance: str | None = None
    spot: bool | None = None


@dataclass(frozen=True)
class HourlyPrice:
    """Dollars an hour of all nodes of the run together, and the source of the price."""

    usd: float
    source: str


def price_here(
    topology: Topology, environment: Mapping[str, str] = os.environ, endpoints: Endpoints | None = None
) -> HourlyPrice | None:
    """The price of this run's machines; None where it is not known, and without a GPU.

    The nodes are assumed to be alike, as the launcher requires. PRICES wins over the catalog's
    files, since the plan that started this machine wrote it.
    """
    kind = kind_of(topology.gpus[0].name) if topology.gpus else None
    if kind is None:
        return None
    facts = facts_here(environment, endpoints or Endpoints.of(environment))
    count = len(topology.gpus)
    usd = _of_task(environment.get("PRICES", ""), kind.name, count, facts)
    source = "the plan that wrote the task"
    if usd is None and facts is not None:
        rows, source = rows_of_files(environment)
        usd = _of_catalog(rows, kind.name, count, facts)
    return None if usd is None else HourlyPrice(usd * topology.nodes, source)


# --- prices ---


def _of_task(prices: str, kind: str, count: int, facts: Facts | None) -> float | None:
    """The price from words like `H100:1=4.00 H100:1:spot=2.20`; None where the machine may be spot
    or not.
    """
    prices_by_spot: dict[bool, float] = {}
    for word in prices.split():
        name, _, usd = word.rpartition("=")
        gpu, _, rest = name.partition(":")
        number, _, how = rest.partition(":")
        gpu_kind = named(gpu)
        with suppress(ValueError):
            if gpu_kind is not None and gpu_kind.name == kind and number == str(count) and float(usd) > 0:
                prices_by_spot[how == "spot"] = float(usd)
    if facts is not None and facts.spot is not None:
        return prices_by_spot.get(facts.spot)
    return next(iter(prices_by_spot.values())) if len(prices_by_spot) == 1 else None


def _of_catalog(rows: Sequence[CatalogRow], kind: str, count: int, facts: Facts) -> float | None:
    """The price of this machine's row of the catalog, or the highest price of the rows that it may
    be.
    """
    mine = [row for row in rows if (row.gpu, row.count, row.cloud) == (kind, count, facts.cloud)]
    told_apart: tuple[tuple[str | None, Callable[[CatalogRow], str]], ...] = (
        (facts.region, lambda row: row.region),
        (facts.instance, lambda row: row.instance),
    )
    for fact, of in told_apart:
        mine = [row for row in mine if fact is None or of(row).lower() == fact.lower()]
    if facts.zone is not None:
        mine = [row for row in mine if row.zone == facts.zone] or mine
    spot = facts.spot
    if spot is None and all(row.spot is None for row in mine):
        spot = False  # a cloud that has no spot machines of this kind
    if spot is None:
        return None
    known = [usd for row in mine if (usd := row.spot if spot else row.on_demand) is not None]
    return max(known, default=None)


# --- what this machine is ---


def facts_here(environment: Mapping[str, str], endpoints: Endpoints) -> Facts | None:
    """The facts of the metadata service of AWS, GCP or Azure, all asked at once, else of SkyPilot's
    variable; None where nothing answers.
    """
    answers: Queue[Facts] = Queue()

    def ask(question: Callable[[], Facts]) -> None:
        with suppress(*NO_ANSWER, Unreadable):
            answers.put(question())

    questions: tuple[Callable[[], Facts], ...] = (
        lambda: _aws(MetadataServer(endpoints.aws)),
        lambda: _gcp(MetadataServer(endpoints.gcp)),
        lambda: _azure(MetadataServer(endpoints.azure)),
    )
    threads = [threading.Thread(target=ask, args=(one,), daemon=True) for one in questions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _ANSWER_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    with suppress(Empty):
        return answers.get_nowait()
    return _of_skypilot(environment.get("SKYPILOT_CLUSTER_INFO", ""))


def _of_skypilot(info: str) -> Facts | None:
    """The facts in SKYPILOT_CLUSTER_INFO: cloud, region and zone, but not whether it is spot."""
    try:
        document = object_in(info)
    except Unreadable:
        return None
    cloud, region, zone = (document.get(name) for name in ("cloud", "region", "zone"))
    if not isinstance(cloud, str):
        return None
    return Facts(
        cloud.lower(),
        region if isinstance(region, str) else None,
        zone if isinstance(zone, str) else None,
    )


def _aws(server: MetadataServer) -> Facts:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html."""
    token = _read(server, "/latest/api/token", _AWS_TOKEN, "PUT")
    headers = {"X-aws-ec2-metadata-token": token}

    def of(name: str) -> str:
        return _read(server, f"/latest/meta-data/{name}", headers)

    return Facts(
        "aws",
        of("placement/region"),
        of("placement/availability-zone-id"),
        of("instance-type"),
        _one_of(of("instance-life-cycle"), spot="spot", on_demand="on-demand"),
    )


def _gcp(server: MetadataServer) -> Facts:
    """https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys."""

    def of(name: str) -> str:
        return _read(server, f"/computeMetadata/v1/instance/{name}", {"Metadata-Flavor": "Google"})

    zone = of("zone").rpartition("/")[2]
    return Facts(
        "gcp",
        zone.rpartition("-")[0],
        zone,
        of("machine-type").rpartition("/")[2],
        _one_of(of("scheduling/preemptible"), spot="TRUE", on_demand="FALSE"),
    )


def _azure(server: MetadataServer) -> Facts:
    """https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service; `priority` is
    empty on demand.
    """
    answer = _read(server, "/metadata/instance/compute?api-version=2021-02-01", {"Metadata": "true"})
    compute = json_in(answer)
    if not isinstance(compute, dict):
        raise StrangeAnswer(answer[:80])
    size, place = compute.get("vmSize"), compute.get("location")
    if not isinstance(size, str) or not isinstance(place, str):
        raise StrangeAnswer(answer[:80])
    return Facts("azure", place, None, size, compute.get("priority") in ("Spot", "Low"))


def _read(server: MetadataServer, path: str, headers: Mapping[str, str], method: str = "GET") -> str:
    answer = server.ask(path, headers, _ANSWER_S, method)
    if answer.status != 200 or not answer.text:
        raise StrangeAnswer(f"status {answer.status}")
    return answer.text


def _one_of(text: str, *, spot: str, on_demand: str) -> bool:
    if text not in (spot, on_demand):
        raise StrangeAnswer(text[:80])
    return text == spot
