"""Prices as SkyPilot's catalog has them: machines of several clouds, Google's without the machine
around the GPU, cells that are empty.
"""

from __future__ import annotations

import csv
import json
from datetime import date
from pathlib import Path

import pytest

from emotion_train.errors import WrongRequest
from launch.gpus import named
from launch.plan.prices import LIST_PRICES, Quote, find_prices

AWS = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
a1.large,,,2.0,4.0,,0.0642,0.064200,ap-northeast-1,apne1-az2,arm64
g6.xlarge,L4,1.0,4.0,16.0,"{'Gpus': []}",0.8048,0.3011,us-east-1,use1-az2,x86_64
g6.xlarge,L4,1.0,4.0,16.0,"{'Gpus': []}",0.8048,0.2502,us-east-2,use2-az1,x86_64
g6.2xlarge,L4,1.0,8.0,32.0,"{'Gpus': []}",0.9776,0.2501,us-east-2,use2-az1,x86_64
p5.48xlarge,H100,8.0,192.0,2048.0,"{'Gpus': []}",55.04,,us-east-1,use1-az2,x86_64
p3.2xlarge,V100,1.0,8.0,61.0,"{'Gpus': []}",3.06,0.9,us-east-1,use1-az2,x86_64
"""
GOOGLE = """InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
a3-highgpu-1g,26.0,234.0,,,,us-central1,us-central1-a,1.18251,0.36117
,,,H100,1.0,"{'Gpus': []}",us-central1,us-central1-a,9.80,2.25
,,,H100,1.0,"{'Gpus': []}",us-west9,us-west9-a,0.10,0.10
"""
LAMBDA = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
gpu_1x_h100,H100,1.0,26.0,200.0,3.29,us-east-1,"{'Gpus': []}",
"""


def catalog(home: Path) -> dict[str, str]:
    for version, cloud, text in (
        ("v8", "aws", AWS),
        ("v8", "gcp", GOOGLE),
        ("v8", "lambda", LAMBDA),
        ("v7", "aws", AWS.replace("0.8", "0.1")),
    ):
        folder = home / ".sky" / "catalogs" / version / cloud
        folder.mkdir(parents=True)
        (folder / "vms.csv").write_text(text)
    return {"HOME": str(home), "PATH": ""}


def test_the_cheapest_machine_of_all_clouds_and_regions_is_quoted(tmp_path: Path) -> None:
    prices = find_prices(None, environment=catalog(tmp_path))
    small = prices.offers["L4", 1]
    assert small.on_demand == Quote(0.8048, "aws", "us-east-1", "g6.xlarge")
    assert small.spot == Quote(0.2501, "aws", "us-east-2", "g6.2xlarge")
    assert prices.offers["H100", 8].spot is None
    assert ("V100", 1) not in prices.offers
    assert str(tmp_path) in prices.source


def test_google_s_gpu_costs_its_machine_too_and_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    offer = find_prices(None, ["gcp"], catalog(tmp_path)).offers["H100", 1]
    assert offer.on_demand is not None
    assert offer.on_demand.usd_per_hour == pytest.approx(9.80 + 1.18251)
    assert offer.on_demand.instance == "a3-highgpu-1g"
    assert offer.spot is not None
    assert offer.spot.usd_per_hour == pytest.approx(2.25 + 0.36117)


def test_a_damaged_file_of_one_cloud_leaves_the_prices_of_the_others(tmp_path: Path) -> None:
    environment = catalog(tmp_path)
    folder = tmp_path / ".sky" / "catalogs" / "v8"
    (folder / "aws" / "vms.csv").write_text("InstanceType,AcceleratorName\np5.48xlarge,H100\n")
    (folder / "gcp" / "vms.csv").write_bytes(b"\xdc\xff")
    prices = find_prices(None, environment=environment)
    assert prices.offers["H100", 1].on_demand == Quote(3.29, "lambda", "us-east-1", "gpu_1x_h100")
    assert "without aws, gcp" in prices.source


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("AcceleratorName,AcceleratorCount,Price,SpotPrice\nH100,1,3,2\n", encoding="utf-8-sig")
    assert find_prices(file).offers["H100", 1].spot == Quote(2.0, "mine", "", "")


def test_clouds_can_be_chosen(tmp_path: Path) -> None:
    environment = catalog(tmp_path)
    everywhere, at_aws = find_prices(None, (), environment), find_prices(None, ["AWS"], environment)
    assert everywhere.offers["H100", 1].on_demand == Quote(3.29, "lambda", "us-east-1", "gpu_1x_h100")
    assert ("H100", 1) not in at_aws.offers
    with pytest.raises(WrongRequest, match="it has aws, gcp, lambda"):
        find_prices(None, ["azure"], environment)


NOWHERE = {"HOME": "/nonexistent", "PATH": ""}


def test_without_a_catalog_the_list_prices_of_the_package_count_and_say_when_they_were_read() -> None:
    prices = find_prices(None, environment=NOWHERE)
    with LIST_PRICES.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    days = {line["ReadOn"] for line in lines}
    assert f"read from {min(days)} to {max(days)}" in prices.source
    assert not prices.complete
    assert all(
        date.fromisoformat(day) and line["Source"].startswith("https://") for day in days for line in lines
    )
    for line in lines:  # each is of a kind and number that is planned, and no cheaper one is passed over
        kind = named(line["AcceleratorName"])
        assert kind is not None
        offer = prices.offers[kind.name, int(line["AcceleratorCount"])]
        assert offer.on_demand is not None
        assert offer.on_demand.usd_per_hour <= float(line["Price"])
        assert offer.spot is None  # no list has it: it moves
    assert all(quote.on_demand for quote in prices.offers.values())


def test_a_catalog_wins_over_the_list_prices(tmp_path: Path) -> None:
    prices = find_prices(None, environment=catalog(tmp_path))
    assert prices.complete
    assert ("RTX4090", 1) not in prices.offers


def test_a_cloud_without_list_prices_is_refused_with_what_to_do() -> None:
    assert set(find_prices(None, ["aws"], NOWHERE).offers) >= {("A10G", 1), ("H100", 8)}
    with pytest.raises(WrongRequest, match=r"names oci, without a price in list prices.* Install SkyPilot"):
        find_prices(None, ["oci"], NOWHERE)


def test_a_gpu_is_found_under_each_name_that_a_catalog_has_for_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(
        "AcceleratorName,AcceleratorCount,Price,SpotPrice\nRTX-6000-Ada,1,0.9,0.4\nRTX6000Ada,1,1,0.3\n"
        "H100-SXM,1,3,\nA100,3,1,1\nT4,1,0.5,0.2\n"
    )
    offers = find_prices(file).offers
    assert set(offers) == {("RTX6000-Ada", 1), ("H100", 1), ("T4", 1)}
    ada = offers["RTX6000-Ada", 1]
    assert ada.on_demand == Quote(0.9, "mine", "", "", "RTX-6000-Ada")
    assert ada.spot == Quote(0.3, "mine", "", "", "RTX6000Ada")
    assert offers["T4", 1].on_demand == Quote(0.5, "mine", "", "")


def test_the_command_is_asked_where_no_catalog_lies(tmp_path: Path) -> None:
    """Against a program that prints what SkyPilot 0.14.1's does, NaN for what is not offered
    included.
    """
    machine = {
        "cloud": "AWS",
        "instance_type": "g6e.xlarge",
        "accelerator_name": "L40S",
        "accelerator_count": 1.0,
        "cpu_count": 4.0,
    }
    machine |= {
        "device_memory": 44.0,
        "memory": 32.0,
        "price": 1.861,
        "spot_price": float("nan"),
        "region": "us-east-1",
    }
    program = tmp_path / "bin" / "sky"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ "$*" = "gpus list -o json" ] || exit 1\ncat'
        f" <<END\n{json.dumps({'L40S': [machine]})}\nEND\n"
    )
    program.chmod(0o755)
    prices = find_prices(None, environment={"HOME": str(tmp_path), "PATH": f"{program.parent}:/usr/bin:/bin"})
    assert prices.offers["L40S", 1].on_demand == Quote(1.861, "aws", "us-east-1", "g6e.xlarge")
    assert prices.offers["L40S", 1].spot is None


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", AWS.replace("L4", "K80").replace("H100", "K80")])
def test_a_file_without_prices_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_text(text)
    with pytest.raises(WrongRequest, match="names no price"):
        find_prices(tmp_path / "prices.csv")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match=r"nowhere\.csv cannot be read"):
        find_prices(tmp_path / "nowhere.csv")
