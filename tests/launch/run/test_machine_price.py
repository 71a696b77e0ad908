"""What a machine costs: by small servers that speak the clouds' protocols, and a catalog in a home
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from emotion_train.processes.notices import Endpoints
from launch.run.machine_price import Facts, HourlyPrice, facts_here, price_here
from launch.run.topology import Gpu, Topology
from tests.helpers.metadata_servers import AwsHandler, AzureHandler, GcpHandler, Reply, serving

CATALOG = {
    "aws": "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region,AvailabilityZone\n"
    "g6.xlarge,L4,1,0.8,0.30,us-east-1,use1-az2\n"
    "g6.xlarge,L4,1,0.8,0.25,us-east-1,use1-az4\n"
    "g6.2xlarge,L4,1,0.98,0.35,us-east-1,use1-az2\n"
    "g6.xlarge,L4,1,0.9,0.10,eu-west-1,euw1-az1\n",
    "gcp": "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region,AvailabilityZone\n"
    "g2-standard-4,,,0.1,0.04,us-central1,us-central1-a\n"
    ",L4,1,0.56,0.2,us-central1,us-central1-a\n",
    "azure": "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\n"
    "Standard_NC24ads_A100_v4,A100-80GB,1,3.67,0.7,eastus\n",
    "runpod": "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\n"
    "1x_L4_SECURE,L4,1,0.44,,US\n1x_L40S_SECURE,L40S,1,1.1,0.6,US\n",
}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    for cloud, text in CATALOG.items():
        folder = tmp_path / ".sky" / "catalogs" / "v8" / cloud
        folder.mkdir(parents=True)
        (folder / "vms.csv").write_text(text)
    return {"HOME": str(tmp_path), "PATH": ""}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def machine(name: str = "NVIDIA L4", count: int = 1, nodes: int = 1) -> Topology:
    return Topology(tuple(Gpu(str(i), "", name, 23_034) for i in range(count)), count, nodes)


def aws(stack: ExitStack, life: str, zone: str = "use1-az4") -> Endpoints:
    said = {
        "placement/region": "us-east-1",
        "placement/availability-zone-id": zone,
        "instance-type": "g6.xlarge",
        "instance-life-cycle": life,
    }
    return Endpoints(aws=answering(stack, AwsHandler, "/latest/meta-data/", said), gcp=NOBODY, azure=NOBODY)


def answering(stack: ExitStack, handler: type, prefix: str, said: dict[str, str]) -> str:
    def odd(method: str, path: str) -> Reply | tuple[()]:
        name = path.removeprefix(prefix).partition("?")[0]
        return (200, said[name]) if method == "GET" and name in said else ()

    served = stack.enter_context(serving(handler))
    served.odd = odd
    return served.url


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("life", "zone", "usd"),
    [
        ("spot", "use1-az4", 0.25),
        ("spot", "use1-az2", 0.30),
        ("spot", "use1-az9", 0.30),  # of a zone that the catalog does not know the dearest
        ("on-demand", "use1-az4", 0.8),
        ("scheduled", "use1-az4", None),  # of a way to pay that is neither nothing is said
    ],
)
def test_a_machine_of_aws_costs_what_the_catalog_says_of_its_type_place_and_way(
    life: str, zone: str, usd: float | None, home: dict[str, str], stack: ExitStack
) -> None:
    found = price_here(machine(), home, aws(stack, life, zone))
    assert (found.usd if found is not None else None) == usd


def test_all_nodes_are_counted(home: dict[str, str], stack: ExitStack) -> None:
    found = price_here(machine(nodes=3), home, aws(stack, "spot"))
    assert found is not None
    assert found.usd == pytest.approx(0.75)
    assert "SkyPilot's catalog" in found.source


def test_a_machine_of_google_costs_its_gpu_and_the_machine_around_it(
    home: dict[str, str], stack: ExitStack
) -> None:
    said = {
        "zone": "projects/1/zones/us-central1-a",
        "machine-type": "projects/1/machineTypes/g2-standard-4",
        "scheduling/preemptible": "TRUE",
    }
    url = answering(stack, GcpHandler, "/computeMetadata/v1/instance/", said)
    found = price_here(machine(), home, Endpoints(NOBODY, url, NOBODY))
    assert found is not None
    assert found.usd == pytest.approx(0.24)


@pytest.mark.parametrize(("priority", "usd"), [("Spot", 0.7), ("", 3.67)])
def test_a_machine_of_azure(priority: str, usd: float, home: dict[str, str], stack: ExitStack) -> None:
    text = f'{{"vmSize": "Standard_NC24ads_A100_v4", "location": "eastus", "priority": "{priority}"}}'
    url = answering(stack, AzureHandler, "/metadata/instance/", {"compute": text})
    found = price_here(machine("NVIDIA A100 80GB PCIe"), home, Endpoints(NOBODY, NOBODY, url))
    assert found is not None
    assert found.usd == usd


def test_where_only_skypilot_speaks_a_price_is_known_if_there_is_no_spot(home: dict[str, str]) -> None:
    nobody = Endpoints(NOBODY, NOBODY, NOBODY)
    info = {"SKYPILOT_CLUSTER_INFO": '{"cluster_name": "c", "cloud": "RunPod", "region": "US", "zone": null}'}
    assert facts_here(info, nobody) == Facts("runpod", "US")
    assert price_here(machine(), home | info, nobody) == HourlyPrice(
        0.44, f"SkyPilot's catalog in {home['HOME']}/.sky/catalogs/v8"
    )
    assert price_here(machine("NVIDIA L40S"), home | info, nobody) is None  # spot, or not
    assert price_here(machine(), home, nobody) is None
    assert facts_here({"SKYPILOT_CLUSTER_INFO": "no JSON"}, nobody) is None
    assert facts_here({"SKYPILOT_CLUSTER_INFO": '{"cloud": 3}'}, nobody) is None


def test_the_prices_of_the_task_win_and_say_which_they_are(home: dict[str, str], stack: ExitStack) -> None:
    prices = {"PRICES": "H100:1=4.0 L4:1=0.7 L4:1:spot=0.2 L4:2=1.4 nonsense A10G:1=x"}
    for life, usd in (("spot", 0.2), ("on-demand", 0.7)):
        found = price_here(machine(), home | prices, aws(stack, life))
        assert found is not None
        assert (found.usd, found.source) == (usd, "the plan that wrote the task")
    nobody = Endpoints(NOBODY, NOBODY, NOBODY)
    assert price_here(machine(), prices, nobody) is None  # one of two, and nobody says which
    alone = price_here(machine(count=2), prices, nobody)
    assert alone is not None
    assert alone.usd == 1.4


def test_no_gpu_and_an_unknown_one_have_no_price(home: dict[str, str], stack: ExitStack) -> None:
    assert price_here(Topology(()), home, aws(stack, "spot")) is None
    assert price_here(machine("NVIDIA K80"), home, aws(stack, "spot")) is None
