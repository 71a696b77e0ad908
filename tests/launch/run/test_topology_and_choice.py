"""From nvidia-smi's listing and the scheduler's variables to the accelerate line of this node."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from emotion_train.config import Config, load_config
from emotion_train.errors import WrongRequest
from launch.run.choice import CONFIGS, HERE, QUIETLY, accelerate_line, choose, printable, program_file
from launch.run.environment import THREADS, trainer_environment
from launch.run.topology import Gpu, Topology, expand_nodelist, parse, read_topology, visible

LISTING = "0, GPU-aaaa-1, NVIDIA H200, 143771\n1, GPU-bbbb-2, NVIDIA H200, 143771\n"
SIMPLE = "distributed_type: 'NO'\n"
TWO = parse(LISTING)
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7\n",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "2",
    "SKYPILOT_TASK_ID": "sky-2026-11-25-20-00-00-000000_mine_1",
}
ALONE = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.4"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[08-09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_GPUS_ON_NODE": "2",
}


def config(*words: str) -> Config:
    return load_config(None, ["data.url=d", "run.output_url=o", "model.base=./nowhere.gguf", *words])


def test_the_listing_is_read() -> None:
    assert TWO[1] == Gpu("1", "GPU-bbbb-2", "NVIDIA H200", 143771)
    assert parse("No devices were found\n") == []


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ["0", "1"]),
        ("1,0", ["1", "0"]),
        ("", []),
        ("-1", []),
        ("1,7,0", ["1"]),
        ("GPU-bbbb", ["1"]),
        ("0,0", ["0"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(choice: str | None, expected: list[str]) -> None:
    assert [gpu.index for gpu in visible(TWO, choice)] == expected


# --- the topology ---


def test_a_machine_alone_gives_one_process_to_each_gpu_and_one_to_the_cpu() -> None:
    assert read_topology(TWO, {}) == Topology(tuple(TWO), 2)
    assert read_topology([], {}) == Topology((), 1)
    assert read_topology(TWO, {}, processes=1).gpus == (TWO[0],)
    assert read_topology([], {}, processes=3).world_size == 3
    with pytest.raises(WrongRequest, match="--processes 2"):
        read_topology(TWO, {}, processes=3)


def test_skypilot_s_variables_place_this_node() -> None:
    topology = read_topology(TWO, SKYPILOT)
    assert (topology.nodes, topology.node_rank, topology.main_address, topology.world_size) == (
        2,
        1,
        "10.0.0.4",
        4,
    )
    other = read_topology(TWO, {**SKYPILOT, "SKYPILOT_NODE_RANK": "0"})
    assert other.main_port == topology.main_port  # the nodes find each other
    assert 20_000 <= topology.main_port < 30_000
    assert read_topology(TWO, {**SKYPILOT, "MASTER_PORT": "4321"}).main_port == 4321
    with pytest.raises(WrongRequest, match="MASTER_PORT is 99999; a port from 1 to 65535"):
        read_topology(TWO, {**SKYPILOT, "MASTER_PORT": "99999"})
    assert read_topology(TWO, {**SKYPILOT, **ALONE}).nodes == 1


def test_slurm_s_variables_place_this_node() -> None:
    topology = read_topology(TWO, SRUN)
    assert (topology.nodes, topology.node_rank, topology.main_address, topology.world_size) == (
        2,
        1,
        "gpu08",
        4,
    )
    assert (
        read_topology(TWO, {**SRUN, "SLURM_NODEID": "0", "SLURM_PROCID": "0"}).main_port == topology.main_port
    )
    assert read_topology(TWO, {**SKYPILOT, **SRUN}).source == "SkyPilot"  # SkyPilot on Slurm


def test_the_batch_script_of_one_node_is_a_machine_and_that_of_two_is_told_to_srun() -> None:
    batch = {
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "gpu08",
        "SLURM_NTASKS": "4",
    }
    assert read_topology(TWO, batch).world_size == 2
    with pytest.raises(WrongRequest, match="srun --ntasks-per-node=1"):
        read_topology(TWO, {**batch, "SLURM_JOB_NUM_NODES": "2"})
    with pytest.raises(WrongRequest, match="4 tasks on 2 nodes"):
        read_topology(TWO, {**SRUN, "SLURM_STEP_NUM_TASKS": "4"})


@pytest.mark.parametrize(
    "environment",
    [
        {**SKYPILOT, "SKYPILOT_NUM_GPUS_PER_NODE": "4"},
        {**SRUN, "SLURM_GPUS_ON_NODE": "8"},
        {**SKYPILOT, **ALONE, "SKYPILOT_NUM_GPUS_PER_NODE": "3"},
    ],
)
def test_promised_gpus_that_are_not_visible_are_an_error_and_never_a_fall_back(
    environment: dict[str, str],
) -> None:
    for found in ([], TWO):
        with pytest.raises(WrongRequest, match=f"promised . GPUs on node . and {len(found)} are visible"):
            read_topology(found, environment)
    assert read_topology(TWO, {**environment, "DEVICE": "cpu"}).on_cpu


def test_device_cpu_keeps_the_nodes_and_gives_each_one_process() -> None:
    topology = read_topology(TWO, {**SKYPILOT, "DEVICE": "cpu"})
    assert (topology.world_size, topology.nodes, topology.on_cpu) == (2, 2, True)
    # a task without accelerators on a GPU machine
    assert read_topology(TWO, {**SKYPILOT, "SKYPILOT_NUM_GPUS_PER_NODE": "0"}).on_cpu
    with pytest.raises(WrongRequest, match="allowed are auto"):
        read_topology([], {"DEVICE": "tpu"})


@pytest.mark.parametrize(
    "change", [{"SKYPILOT_NODE_RANK": "2"}, {"SKYPILOT_NODE_IPS": "10.0.0.4"}, {"SKYPILOT_NUM_NODES": "3"}]
)
def test_contradictions_of_skypilot_s_variables_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(WrongRequest, match="contradict each other"):
        read_topology(TWO, {**SKYPILOT, **change})
    with pytest.raises(WrongRequest, match="whole number"):
        read_topology(TWO, {**SKYPILOT, "SKYPILOT_NODE_RANK": "one"})


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("gpu08", ["gpu08"]),
        ("a,b", ["a", "b"]),
        ("gpu[08-10,12],login1", ["gpu08", "gpu09", "gpu10", "gpu12", "login1"]),
        ("r[1-2]n[8-9]", ["r1n8", "r1n9", "r2n8", "r2n9"]),
        ("n[9-11].site", ["n9.site", "n10.site", "n11.site"]),
        ("", []),
    ],
)
def test_slurm_s_short_node_list_is_expanded(listed: str, names: list[str]) -> None:
    assert expand_nodelist(listed) == names


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm is not installed")
@pytest.mark.parametrize("listed", ["gpu[08-10,12],login1", "r[1-2]n[8-9]", "n[098-101]"])
def test_slurm_itself_expands_the_node_list_the_same_way(listed: str, tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    command = ["scontrol", "show", "hostnames", listed]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert expand_nodelist(listed) == answer.stdout.split()


# --- the line ---


def test_a_machine_without_gpu_takes_the_cpu_config() -> None:
    assert choose([], None, config("model.precision=fp32"), {}).config_file.name == "cpu.yaml"
    one = choose(TWO[:1], None, config(), {})
    assert (one.config_file.name, one.topology.world_size) == ("single_gpu_qlora.yaml", 1)


def test_a_4_bit_base_without_a_gpu_is_refused_unless_the_cpu_is_asked_for() -> None:
    with pytest.raises(WrongRequest, match="--accelerate-config cpu"):
        choose([], None, config(), {})
    assert choose([], "cpu", config(), {}).config_file.name == "cpu.yaml"
    assert choose([], None, config(), {"DEVICE": "cpu"}).config_file.name == "cpu.yaml"


def test_the_cpu_config_needs_no_promised_gpu() -> None:
    assert choose([], "cpu", config(), SKYPILOT).topology.world_size == 2


@pytest.mark.parametrize(
    ("use", "on_cpu"), [("use_cpu: true\n", True), ("use_cpu: false\n", False), ("", False)]
)
def test_a_config_file_that_uses_the_cpu_asks_for_no_gpu(tmp_path: Path, use: str, on_cpu: bool) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"distributed_type: 'NO'\n{use}")
    topology = choose(TWO[:1], str(path), config(), {}).topology
    assert topology.on_cpu == on_cpu
    assert topology.world_size == 1
    # threads on the CPU are the launcher's choice, since accelerate would choose others
    assert (THREADS in trainer_environment(topology, {})[0]) == on_cpu


def test_an_unknown_accelerate_config_names_those_there_are() -> None:
    with pytest.raises(WrongRequest, match=r"cpu, multi_gpu_ddp, .*, single_gpu_qlora"):
        choose([], "gpu8", config(), {})
    assert choose([], "single_gpu_qlora", config(), {}).config_file == CONFIGS / "single_gpu_qlora.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train:\n  epochs: 2\n",
            (
                r"is a run config; type --config .*run\.yaml, and --accelerate-config with one of cpu,"
                r" multi_gpu_ddp"
            ),
        ),
        ("- distributed_type\n", "not an accelerate config, since it has no distributed_type"),
        ("", "not an accelerate config, since it has no distributed_type"),
        ("use_cpu: true\n", "not an accelerate config, since it has no distributed_type"),
        ("distributed_type: [\n", r"cannot be read \(while parsing"),
        ("distributed_type: caf\udce9\n", "cannot be read"),
    ],
)
def test_a_file_that_is_no_accelerate_config_is_refused_before_accelerate_reads_it(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for found in ([], TWO):
        with pytest.raises(WrongRequest, match=words):
            choose(found, str(path), config(), {})


@pytest.mark.parametrize("own", [None, SIMPLE, "distributed_type: NO\n"])
def test_a_config_that_starts_one_process_uses_one_gpu_of_several(own: str | None, tmp_path: Path) -> None:
    asked = "single_gpu_qlora"
    if own is not None:
        path = tmp_path / "mine.yaml"
        path.write_text(f"{own}mixed_precision: 'no'\n")
        asked = str(path)
    assert choose(TWO, asked, config(), {}).topology.gpus == (TWO[0],)
    assert choose(TWO, asked, config(), {}, processes=1).topology.world_size == 1
    with pytest.raises(WrongRequest, match="2 nodes; type --accelerate-config multi_gpu_ddp"):
        choose(TWO, asked, config(), SKYPILOT)
    with pytest.raises(WrongRequest, match="--processes is 2; leave"):
        choose(TWO, asked, config(), {}, processes=2)


def test_the_printed_line_is_the_one_a_person_would_type() -> None:
    line = printable(accelerate_line(Path("cpu.yaml"), "run.yaml", ["train.epochs=1", "run.id=a b"]))
    expected = (
        "accelerate launch --config_file cpu.yaml --num_processes 1 --main_process_port 0 -m"
        " emotion_train.train --config run.yaml"
    )
    assert line == f"{expected} train.epochs=1 'run.id=a b'"


@pytest.mark.parametrize(
    ("text", "here"),
    [
        (SIMPLE, True),
        ('distributed_type: "NO"\nuse_cpu: true\ngpu_ids: all\nmixed_precision: bf16\n', True),
        ("distributed_type: MULTI_GPU\n", False),
        ("distributed_type: DEEPSPEED\n", False),
        (f"{SIMPLE}gpu_ids: '1'\n", False),  # which CUDA reads when torch is imported
        (f"{SIMPLE}mpirun_config: {{mpirun_ccl: '1'}}\n", False),
        (f"{SIMPLE}fp8_config: {{backend: TE}}\n", False),
        ("- a list\n", False),
    ],
)
def test_a_single_trainer_needs_no_process_between_by_a_config_of_one(
    tmp_path: Path, text: str, here: bool
) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    line = accelerate_line(path, None, [])
    assert line[2] == program_file(HERE if here else QUIETLY)
    assert printable(line).startswith(f"accelerate launch --config_file {path} ")
    assert accelerate_line(path, None, [], topology=read_topology(TWO, {}))[2] == program_file(QUIETLY)
    assert accelerate_line(tmp_path / "missing.yaml", None, [])[2] == program_file(QUIETLY)


def test_only_the_config_of_one_gpu_needs_no_process_between() -> None:
    programs = {path.stem: accelerate_line(path, None, [])[2] for path in CONFIGS.glob("*.yaml")}
    assert [name for name, program in programs.items() if program == program_file(HERE)] == [
        "single_gpu_qlora"
    ]


def test_the_line_of_a_node_names_its_rank_and_where_rank_0_listens() -> None:
    line = printable(
        accelerate_line(Path("x.yaml"), None, [], topology=read_topology(TWO, SKYPILOT), timeout_s=90.0)
    )
    port = read_topology(TWO, SKYPILOT).main_port
    assert (
        line == "accelerate launch --config_file x.yaml --num_processes 4 --num_machines 2 --machine_rank 1"
        f" --main_process_ip 10.0.0.4 --main_process_port {port} --rdzv_conf timeout=90 -m"
        " emotion_train.train"
    )


MISTRAL = {
    "hidden_size": 5120,
    "intermediate_size": 32_768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131_072,
}


def sized(folder: Path, *words: str) -> Config:
    """A config whose base has Mistral Small 3.1's shape and no weights."""
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": MISTRAL}))
    return config(f"model.base={folder}", "train.tokens_per_microbatch=2048", *words)


def gpus_of(count: int, memory_gib: int) -> list[Gpu]:
    return [Gpu(str(index), f"GPU-{index}", "a GPU", memory_gib * 1024) for index in range(count)]


@pytest.mark.parametrize(
    ("count", "memory_gib", "words", "name"),
    [
        (1, 80, [], "single_gpu_qlora"),
        (2, 80, [], "multi_gpu_ddp"),
        (2, 80, ["model.precision=bf16"], "multi_gpu_ddp"),
        # an adapter with an optimizer of 88 GiB: whole on each GPU it does not fit, shared by eight
        # it does
        (
            8,
            80,
            ["lora.r=1024", "lora.targets=all-linear", "train.gradient_checkpointing=true"],
            "multi_gpu_deepspeed_zero2",
        ),
        (2, 40, ["model.precision=bf16", "train.gradient_checkpointing=true"], "multi_gpu_fsdp2_qlora"),
        (2, 40, ["model.precision=bf16", "train.tokens_per_microbatch=auto"], "multi_gpu_fsdp2_qlora"),
        (2, 20, ["train.tokens_per_microbatch=auto"], "multi_gpu_ddp"),
    ],
)
def test_the_first_way_that_fits_is_taken_and_its_numbers_are_said(
    tmp_path: Path, count: int, memory_gib: int, words: list[str], name: str
) -> None:
    choice = choose(gpus_of(count, memory_gib), None, sized(tmp_path, *words), {})
    assert choice.config_file == CONFIGS / f"{name}.yaml"
    assert choice.topology.world_size == count
    assert re.search(
        rf"{name} \([a-z ]+(GPU|sharded)\) needs (at least )?[\d.]+ GiB \([\d.]+ weights, .*\)"
        r" of the [\d.]+ GiB usable",
        choice.reason,
    )
    before = ["multi_gpu_ddp", "multi_gpu_deepspeed_zero2", "multi_gpu_fsdp2_qlora"]
    passed_over = before[: before.index(name)] if name in before else []
    assert re.findall(r"(\w+) would need", choice.reason) == passed_over


@pytest.mark.parametrize(
    ("gpus", "nodes", "words", "name"),
    [
        (TWO, {}, [], "multi_gpu_fsdp2_qlora"),
        (TWO, {}, ["train.gradient_checkpointing=true"], "multi_gpu_ddp"),  # as asked for
        (TWO, SKYPILOT, [], "multi_gpu_ddp"),  # nodes have slower links
        ([replace(gpu, name="NVIDIA L40S") for gpu in TWO], {}, [], "multi_gpu_ddp"),  # so has PCIe
        ([replace(gpu, name="a GPU") for gpu in TWO], {}, [], "multi_gpu_ddp"),  # links unknown
    ],
)
def test_a_base_is_sharded_rather_than_recomputed_where_the_links_are_fast(
    tmp_path: Path, gpus: list[Gpu], nodes: dict[str, str], words: list[str], name: str
) -> None:
    """Llama 3.3 70B's shape in bf16: one H200 holds it and would have to recompute."""
    shape = MISTRAL | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
    text = shape | {"num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **text}))
    auto = ["model.precision=bf16", "train.tokens_per_microbatch=auto"]
    choice = choose(gpus, None, config(f"model.base={tmp_path}", *auto, *words), nodes)
    assert choice.config_file == CONFIGS / f"{name}.yaml"
    assert ("multi_gpu_ddp would need" in choice.reason) == (name == "multi_gpu_fsdp2_qlora")


def test_a_gpu_too_small_is_refused_with_the_nearest_setting_that_fits(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match=r"does not fit a GPU of 24.0 GiB: .*; type (.*)\.$") as refused:
        choose(gpus_of(1, 24), None, sized(tmp_path, "model.precision=bf16"), {})
    remedy = re.findall(r"; type (.*)\.$", str(refused.value))[0].split()
    assert remedy[0] == "model.precision=nf4"
    assert choose(gpus_of(1, 24), None, sized(tmp_path, *remedy), {}).config_file.stem == "single_gpu_qlora"
    with pytest.raises(WrongRequest, match=r"; type model\.precision=nf4\.$"):
        choose(
            gpus_of(1, 24),
            None,
            sized(tmp_path, "model.precision=bf16", "train.tokens_per_microbatch=auto"),
            {},
        )
    with pytest.raises(WrongRequest, match=r"take a smaller model\.base, or a larger GPU"):
        choose(gpus_of(1, 8), None, sized(tmp_path), {})


def test_a_base_that_cannot_be_looked_at_is_no_reason_to_stop() -> None:
    choice = choose(gpus_of(2, 80), None, config(), {})
    assert choice.config_file.stem == "multi_gpu_ddp"
    assert "not known" in choice.reason


def test_accelerate_configs_hold_no_process_count_accumulation_or_clipping() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert len(files) == 6
    for path in files:
        for word in ("num_processes:", "gradient_accumulation", "gradient_clipping"):
            assert word not in path.read_text(), (path, word)


def test_accelerate_configs_are_what_their_first_lines_say() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in CONFIGS.glob("*.yaml"):
        read = load_config_from_file(str(path))
        assert read.distributed_type.value == yaml.safe_load(path.read_text())["distributed_type"]
        assert f"--config_file accelerate_configs/{path.name} --num_processes" in path.read_text()
