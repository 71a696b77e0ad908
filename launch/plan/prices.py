"""Dollars an hour of machines: from a given file, else from SkyPilot's catalog (its CSV files on
this machine, or `sky gpus list`), else from the list prices that come with the program.

The catalog's prices are some hours old; the cheapest region of each cloud counts, as SkyPilot
tries it first. Reading the files of all clouds takes half a second, so only a plan does. The list
prices were published by a few clouds, and read on the days that list_prices.csv names: on demand
only, since spot prices move. A machine without a list price may still be on offer.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion_train.edges.bounded import csv_rows, object_file, object_in
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from launch.gpus import COUNTS, PLANNED, named

_SKY_TIMEOUT_S = 120
LIST_PRICES = Path(__file__).with_name("list_prices.csv")
# the errors of reading a file that is no catalog, or half of one
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)
# Google's catalog prices a GPU without the machine around it:
# https://cloud.google.com/compute/docs/gpus
_GOOGLE_MACHINES = {
    **{("L4", count): f"g2-standard-{vcpus}" for count, vcpus in ((1, 4), (2, 24), (4, 48), (8, 96))},
    **{("A100", count): f"a2-highgpu-{count}g" for count in COUNTS},
    **{("A100-80GB", count): f"a2-ultragpu-{count}g" for count in COUNTS},
    **{("H100", count): f"a3-highgpu-{count}g" for count in COUNTS},
    ("H200", 8): "a3-ultragpu-8g",
    ("B200", 8): "a4-highgpu-8g",
}


@dataclass(frozen=True)
class Quote:
    """The cheapest machine with these GPUs, and where it is; `accelerator` is the GPU's name in
    that cloud's catalog, empty where it is the kind's own name.
    """

    usd_per_hour: float
    cloud: str
    region: str
    instance: str
    accelerator: str = ""


@dataclass(frozen=True)
class Offer:
    on_demand: Quote | None = None
    spot: Quote | None = None


@dataclass(frozen=True)
class Prices:
    """`offers` by (GPU name, count); `source` describes them to a person. `complete`: a machine
    without a price is not on offer.
    """

    offers: Mapping[tuple[str, int], Offer]
    source: str
    complete: bool = True


NO_PRICES = Prices({}, "no prices", complete=False)


@dataclass(frozen=True)
class CatalogRow:
    """One line of a catalog: a machine with `count` GPUs of the kind `gpu`, in dollars an hour; a
    price is None where the machine is not offered so. `accelerator` is the catalog's own name of
    the GPU.
    """

    gpu: str
    count: int
    cloud: str
    region: str
    instance: str
    on_demand: float | None
    spot: float | None
    accelerator: str = ""
    zone: str = ""


def find_prices(
    file: Path | None, clouds: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> Prices:
    """Prices from `file`, else from SkyPilot's catalog files, else from its command, else the list
    prices that come with the program.

    Only these `clouds` count, where any are given. Raises `WrongRequest` for a file that is no
    catalog, and for clouds without an offer.
    """
    wanted = {cloud.lower() for cloud in clouds}
    complete = True
    if file is not None:
        rows, source = _rows_of_file(file), str(file)
    else:
        rows, source = rows_of_catalog(environment)
        if not rows:
            rows, source, complete = *_list_prices(), False
    present = sorted({row.cloud for row in rows})
    if unknown := wanted - set(present):
        remedy = "" if complete else " Install SkyPilot, or give --prices FILE, for other clouds."
        raise WrongRequest(
            f"--cloud names {', '.join(sorted(unknown))}, without a price in {source}; it has"
            f" {', '.join(present)}.{remedy}"
        )
    return Prices(_cheapest(row for row in rows if not wanted or row.cloud in wanted), source, complete)


def _list_prices() -> tuple[list[CatalogRow], str]:
    """The list prices that come with the program, and their description with the days of
    reading.
    """
    days = sorted(line["ReadOn"] or "" for line in csv_rows(LIST_PRICES))
    source = (
        f"list prices on demand that some clouds published, read from {days[0]} to {days[-1]}"
        f" ({LIST_PRICES.name}), since SkyPilot's catalog is not on this machine"
    )
    return _rows_of_csv(LIST_PRICES, ""), source


def _cheapest(rows: Iterable[CatalogRow]) -> dict[tuple[str, int], Offer]:
    best: dict[tuple[str, int], Offer] = {}
    for row in rows:
        offer = best.get((row.gpu, row.count), Offer())
        best[row.gpu, row.count] = Offer(
            _cheaper(offer.on_demand, row.on_demand, row), _cheaper(offer.spot, row.spot, row)
        )
    return best


def _cheaper(known: Quote | None, usd: float | None, row: CatalogRow) -> Quote | None:
    if usd is None or (known is not None and known.usd_per_hour <= usd):
        return known
    other = "" if row.accelerator == row.gpu else row.accelerator
    return Quote(usd, row.cloud, row.region, row.instance, other)


def rows_of_catalog(environment: Mapping[str, str] = os.environ) -> tuple[list[CatalogRow], str]:
    """The machines of SkyPilot's catalog, from its files or else from its command, and the source
    in words; empty where there is no catalog.
    """
    rows, source = rows_of_files(environment)
    return (rows, source) if rows else (_rows_of_command(environment), "`sky gpus list`")


def rows_of_files(environment: Mapping[str, str] = os.environ) -> tuple[list[CatalogRow], str]:
    """The machines of the newest catalog among the files of this machine, and the source in words;
    empty where there is no catalog.
    """
    catalogs = Path(environment.get("HOME") or typed_path("~"), ".sky", "catalogs")
    versions = sorted(
        (path for path in catalogs.glob("v*") if path.name[1:].isdigit()), key=lambda path: int(path.name[1:])
    )
    for folder in reversed(versions):
        rows: list[CatalogRow] = []
        damaged: list[str] = []
        for path in sorted(folder.glob("*/vms.csv")):
            try:
                rows += _rows_of_csv(path, path.parent.name)
            except (OSError, *_DAMAGED):
                damaged.append(path.parent.name)
        if rows:
            without = f", without {', '.join(damaged)} (a file that cannot be read)" if damaged else ""
            return rows, f"SkyPilot's catalog in {folder}{without}"
    return [], ""


def _rows_of_command(environment: Mapping[str, str]) -> list[CatalogRow]:
    program = shutil.which("sky", path=environment.get("PATH"))
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "gpus", "list", "-o", "json"],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=_SKY_TIMEOUT_S,
            check=False,
        )
        return _rows_of_json(object_in(answer.stdout, finite=False)) if answer.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, *_DAMAGED):
        return []


def _rows_of_file(path: Path) -> list[CatalogRow]:
    try:
        if path.suffix.lower() == ".json":
            rows = _rows_of_json(object_file(path, finite=False))
        else:
            rows = _rows_of_csv(path, path.parent.name if path.name == "vms.csv" else path.stem)
    except OSError as error:
        raise WrongRequest(
            f"--prices {path} cannot be read ({error.strerror}); give a catalog's vms.csv."
        ) from None
    except _DAMAGED:
        rows = []
    if not rows:
        raise WrongRequest(
            f"--prices {path} names no price of {', '.join(kind.name for kind in PLANNED)}; give a vms.csv"
            " of SkyPilot's catalog, a CSV with the columns AcceleratorName, AcceleratorCount, Price and"
            " SpotPrice, or what `sky gpus list -o json` prints."
        )
    return rows


def _planned(name: str | None, count: float | None) -> str | None:
    """The kind's name where a plan compares so many of this GPU; None for others."""
    gpu_kind = named(name or "")
    return gpu_kind.name if gpu_kind is not None and gpu_kind.runs and count in COUNTS else None


def _rows_of_csv(path: Path, cloud: str) -> list[CatalogRow]:
    """The GPU machines of one file; a column `Cloud` wins over the file's name."""
    lines = csv_rows(path)
    machines = {
        (line["InstanceType"], line["Region"], line.get("AvailabilityZone")): line
        for line in lines
        if line.get("InstanceType")
    }
    rows = []
    for line in lines:
        count = _number(line.get("AcceleratorCount"))
        gpu, instance = _planned(line.get("AcceleratorName"), count), line.get("InstanceType") or ""
        if gpu is None or count is None:
            continue
        on_demand, spot = _number(line.get("Price")), _number(line.get("SpotPrice"))
        if not instance and cloud == "gcp":
            instance = _GOOGLE_MACHINES.get((gpu, int(count)), "")
            around = machines.get((instance, line["Region"], line.get("AvailabilityZone")))
            if around is None:
                continue
            on_demand, spot = (
                _sum(on_demand, _number(around["Price"])),
                _sum(spot, _number(around["SpotPrice"])),
            )
        rows.append(
            CatalogRow(
                gpu,
                int(count),
                (line.get("Cloud") or cloud).lower(),
                line.get("Region") or "",
                instance,
                on_demand,
                spot,
                line["AcceleratorName"] or "",
                line.get("AvailabilityZone") or "",
            )
        )
    return rows


def _rows_of_json(document: Mapping[str, Any]) -> list[CatalogRow]:
    """The GPU machines in the output of `sky gpus list -o json`, lists of machines by GPU name."""
    rows = []
    for machines in document.values():
        for machine in machines:
            count = _number(machine["accelerator_count"])
            gpu = _planned(str(machine["accelerator_name"]), count)
            if gpu is not None and count is not None:
                where = (
                    str(machine["cloud"]).lower(),
                    str(machine.get("region") or ""),
                    str(machine.get("instance_type") or ""),
                )
                rows.append(
                    CatalogRow(
                        gpu,
                        int(count),
                        *where,
                        _number(machine["price"]),
                        _number(machine["spot_price"]),
                        str(machine["accelerator_name"]),
                    )
                )
    return rows


def _number(value: Any) -> float | None:
    """A price or count; None for an empty cell and for NaN, which stand for "not offered"."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
