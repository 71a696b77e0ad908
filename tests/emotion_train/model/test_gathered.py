"""Blocks whose weights are cut over processes are whole when they compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore
from torch.multiprocessing.spawn import spawn

from emotion_train.model import gathered as gathered_module
from emotion_train.model.gathered import GatheredBlocks


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def blocks(count: int) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(count)
    return [
        [
            torch.randint(0, 256, (5, 7), dtype=torch.uint8, generator=draw),
            torch.randn(3, 4, generator=draw).to(torch.bfloat16),
            torch.randn(2, 1, generator=draw),
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_block_is_whole_however_the_passes_follow_each_other(group: None, count: int) -> None:
    expected = blocks(count)
    gathered = GatheredBlocks(torch.device("cpu"))
    views = [gathered.cut(tensors) for tensors in expected]
    upwards, downwards = range(count), range(count - 1, -1, -1)
    # a forward pass alone, then two steps of forward and backward, then a forward pass alone
    for numbers in (upwards, upwards, downwards, upwards, downwards, upwards):
        for number in numbers:
            gathered.need(number, number + numbers.step)
            for view, tensor in zip(views[number], expected[number], strict=True):
                assert torch.equal(view, tensor)


def test_two_buffers_serve_all_blocks(group: None) -> None:
    gathered = GatheredBlocks(torch.device("cpu"))
    views = [gathered.cut(tensors) for tensors in blocks(6)]
    places = {view.untyped_storage().data_ptr() for tensors in views for view in tensors}
    assert len(places) == 2
    starts = [view.data_ptr() - view.untyped_storage().data_ptr() for view in views[0]]
    assert all(start % 256 == 0 for start in starts)


def test_blocks_of_other_shapes_are_not_cut_together(group: None) -> None:
    gathered = GatheredBlocks(torch.device("cpu"))
    gathered.cut([torch.zeros(4)])
    with pytest.raises(AssertionError, match="same shapes"):
        gathered.cut([torch.zeros(5)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_of_a_host_read_each_others_parts(tmp_path: Path) -> None:
    spawn(whole_on_each_gpu, (2, str(tmp_path / "store")), nprocs=2)


def whole_on_each_gpu(rank: int, processes: int, store: str) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", store=FileStore(store, processes), rank=rank, world_size=processes, device_id=device
    )
    assert gathered_module.reach_each_other(device)
    expected = [[tensor.to(device) for tensor in tensors] for tensors in blocks(5)]
    for collective in (False, True):
        with mock.patch.object(gathered_module, "reach_each_other", return_value=not collective):
            gathered = GatheredBlocks(device)
        views = [gathered.cut(tensors) for tensors in expected]
        for numbers in (range(5), range(4, -1, -1), range(5)):
            for number in numbers:
                gathered.need(number, number + numbers.step)
                for view, tensor in zip(views[number], expected[number], strict=True):
                    assert torch.equal(view, tensor)
    dist.barrier()
    dist.destroy_process_group()


def test_processes_of_other_hosts_use_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    device = torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert gathered_module._neighbours(device, 2)
    assert not gathered_module._neighbours(device, 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: False)
    assert not gathered_module._neighbours(device, 2)


def test_no_process_waits_to_map_memory_that_another_will_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapping meets every process: one whose GPU reaches all others would wait for one whose GPU
    does not.
    """
    tried: list[torch.device] = []

    def maps_memory(device: torch.device) -> bool:
        tried.append(device)
        return True

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(gathered_module, "_neighbours", lambda device, processes: True)
    monkeypatch.setattr(gathered_module, "_maps_memory", maps_memory)
    monkeypatch.setattr(gathered_module, "_all", lambda own, device: False)
    assert not gathered_module.reach_each_other(torch.device("cuda", 0))
    assert tried == []


def test_all_is_asked_of_every_process(group: None) -> None:
    device = torch.device("cpu")
    assert [gathered_module._all(own, device) for own in (True, False)] == [True, False]
