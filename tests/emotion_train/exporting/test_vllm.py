"""vLLM itself serves an export and a published adapter, by the lines of docs/guides/serve.md, and
answers as the adapter does.

`make test-serve` installs vLLM for CPUs in an environment of its own, which SERVE_PYTHON names.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emotion_train.cli import main
from emotion_train.evaluation.decision import Decision
from emotion_train.exporting.export import export
from emotion_train.exporting.served import Served
from tests.emotion_train.test_export import LABELS, MAX_LENGTH, TEXTS, adapter_on, predicted
from tests.helpers.tiny_adapter import write_weights
from tests.helpers.tiny_models import OWN, causal_checkpoint, gguf_base

pytestmark = pytest.mark.serve
PYTHON = os.environ.get("SERVE_PYTHON", "")
READY_S = 900
LONG = " ".join(["on and on"] * 120)  # tokens: beyond --max-model-len
SERVE = ["--runner", "pooling", "--max-model-len", "256"]
# what a CPU needs, and no GPU
ON_CPU = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"]
# as the published ones are, whose queries are multiplied beyond the longest post
OF_POSTS = {**OWN["ministral3"]["rope_parameters"], "original_max_position_embeddings": 16_384}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON or not Path(PYTHON).exists():
        pytest.skip("SERVE_PYTHON names no Python with vLLM; type make test-serve")
    return adapter_on(gguf_base(), tmp_path_factory.mktemp("vllm") / "adapter")


@contextmanager
def served(model: Path, *words: str) -> Iterator[str]:
    """The URL of vLLM's server of this folder, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the command `vllm serve` wants a distribution of the name vllm, which that for CPUs is not
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *SERVE, *ON_CPU]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = model.with_name(f"{model.name}-{port}.log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *words],
            env=environment,
            cwd=model.parent,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until_ready(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(READY_S):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"vLLM was not ready after {READY_S} s: {log.read_text()[-4000:]}")


def asked(url: str, texts: Sequence[str], **more: Any) -> Any:
    body = json.dumps({"model": "emotions", "input": list(texts), **more}).encode()
    request = urllib.request.Request(f"{url}/classify", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_an_export_is_served_as_its_card_says(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(adapter, tmp_path / "out", dtype="fp32")
    texts = [*TEXTS, LONG]
    with served(tmp_path / "out", "--served-model-name", "emotions") as url:
        answer = asked(url, texts, truncate_prompt_tokens=MAX_LENGTH)["data"]
        ours = predicted(adapter, texts)
        np.testing.assert_allclose([one["probs"] for one in answer], ours, atol=1e-4)
        assert [one["label"] for one in answer] == [LABELS[prob_C.argmax()] for prob_C in ours]
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(url, texts)
        assert refused.value.code == 400
        assert main(["predict", "--endpoint", url, "--against", str(adapter), *texts]) == 0
        assert f"{len(texts)} posts: a probability differs by" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gemma3_text", "ministral3"])
def test_exports_of_other_kinds_are_served(adapter: Path, tmp_path: Path, kind: str) -> None:
    """Small and random, with posts beyond the window and heads of a size that vLLM has on a CPU."""
    sizes: dict[str, Any] = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    more: dict[str, Any] = {"rope_parameters": OF_POSTS} if kind == "ministral3" else {}
    base = causal_checkpoint(tmp_path / "base", kind, **sizes, **more)
    own = adapter_on(str(base), tmp_path / "adapter")
    export(own, tmp_path / "out", dtype="fp32")
    line = next(
        one for one in (tmp_path / "out" / "README.md").read_text().splitlines() if "vllm serve" in one
    )
    words = shlex.split(line)[shlex.split(line).index("256") + 1 :]
    with served(tmp_path / "out", "--served-model-name", "emotions", *words) as url:
        answer = asked(url, TEXTS, truncate_prompt_tokens=MAX_LENGTH)["data"]
    np.testing.assert_allclose([one["probs"] for one in answer], predicted(own), atol=1e-4)


def test_an_adapter_is_served_on_its_base_with_its_own_head(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a GGUF file is no base for vLLM: the same base as a checkpoint, without the adapter
    base = without_adapter(adapter, tmp_path)
    names = {"architectures": ["LlamaForSequenceClassification"], "num_labels": len(LABELS)}
    with served(
        base,
        *("--convert", "classify", "--enable-lora", "--max-lora-rank", "16"),
        *("--lora-modules", f"emotions={adapter}", "--tokenizer", str(adapter)),
        *("--hf-overrides", json.dumps(names)),
    ) as url:
        found = Served(url, "emotions", Decision.one(LABELS), MAX_LENGTH).probabilities(TEXTS)
        np.testing.assert_allclose(found, predicted(adapter), atol=1e-4)
        words = ["predict", "--endpoint", url, "--model", "emotions", "--against", str(adapter)]
        assert main([*words, *TEXTS]) == 0
        assert "differs by" in capsys.readouterr().out


def test_adapters_of_other_labels_share_a_server(adapter: Path, tmp_path: Path) -> None:
    """The base is told how many labels the largest has; each answers by its own head."""
    fewer = adapter_on(gguf_base(), tmp_path / "fewer", labels=("calm", "sad"), seed=2)
    names = {"architectures": ["LlamaForSequenceClassification"], "num_labels": len(LABELS)}
    with served(
        without_adapter(adapter, tmp_path),
        *("--convert", "classify", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"),
        *("--lora-modules", f"emotions={adapter}", f"moods={fewer}", "--tokenizer", str(adapter)),
        *("--hf-overrides", json.dumps(names)),
    ) as url:
        for name, folder, labels in (("moods", fewer, ("calm", "sad")), ("emotions", adapter, LABELS)):
            found = Served(url, name, Decision.one(labels), MAX_LENGTH).probabilities(TEXTS)
            np.testing.assert_allclose(found, predicted(folder), atol=1e-4)


def without_adapter(adapter: Path, folder: Path) -> Path:
    """The adapter's base as a causal checkpoint, float32."""
    from safetensors.torch import load_file, save_file

    still = shutil.copytree(adapter, folder / "still")
    state = load_file(still / "adapter_model.safetensors")
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in state.items()}
    write_weights(still, zero)
    export(still, folder / "exported", dtype="fp32", shard_bytes=1 << 40)
    (file,) = (folder / "exported").glob("*.safetensors")
    tensors = {name: one for name, one in load_file(file).items() if name != "score.weight"}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    base = folder / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "exported" / "config.json").read_text())
    for key in ("id2label", "label2id", "problem_type"):
        del config[key]
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return base
