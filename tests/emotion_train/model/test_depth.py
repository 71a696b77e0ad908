"""A base that is cut to its first blocks, against transformers' own model of so many blocks, and
what is read of its files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import emotion_train.model
from emotion_train.bases.architecture import text_model
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.gguf_file import GgufFile
from emotion_train.bases.headers import weight_files
from emotion_train.config import LoraSection, load_config
from emotion_train.errors import WrongRequest
from emotion_train.exporting.export import export
from emotion_train.model.facts import FACTS, read_facts
from emotion_train.model.fused import FusedDecoder
from emotion_train.model.load import load_base, read_config
from emotion_train.model.lora import base_config_of, build_classifier, load_adapter
from emotion_train.model.precision import Precision
from emotion_train.model.staged_copy import stage
from emotion_train.model.trainable import require_trainable_base
from emotion_train.sizing.memory import estimate, weight_bytes
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.storage.folder import FolderStore
from launch.check.base import check_base
from launch.workload import shape_of_base
from tests.emotion_train.model.test_attention import packed, posts
from tests.emotion_train.test_export import adapter_on, piped, predicted, tensors_of
from tests.helpers import fake_hub, plain_kernels
from tests.helpers.fake_hub import FakeHub
from tests.helpers.tiny_models import IDS, causal_checkpoint, gguf_base, hidden, multimodal_checkpoint

BLOCKS, KEPT = 4, 3
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": WINDOWS,  # its blocks are of two kinds, which its configuration lists
    "qwen3": WINDOWS,
    "gemma3_text": {},  # of two kinds, with rotations of their own
    "ministral3": {},
    "qwen3_5_text": {},  # a delta net, a block that attends, and so on
}
SMALL: dict[str, Any] = {"shard_bytes": 60_000, "piece_bytes": 10_000}


def cut(base: Path | str, layers: Any = KEPT) -> Any:
    return read_config(BaseFiles.find(str(base), layers))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks; the tensors of one lie in several of the five files."""
    return causal_checkpoint(
        tmp_path_factory.mktemp("depth") / "base", "llama", shards=5, num_hidden_layers=BLOCKS
    )


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(str(base), tmp_path_factory.mktemp("depth") / "adapter", layers=KEPT)


# --- the same numbers ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_base_computes_what_transformers_does_with_so_many_blocks(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = causal_checkpoint(tmp_path / "base", kind, num_hidden_layers=BLOCKS, **KINDS[kind])
    config = AutoConfig.from_pretrained(
        folder, num_hidden_layers=KEPT, num_labels=3, pad_token_id=3, trust_remote_code=False
    )
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:KEPT]
    stock: Any = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    ).eval()
    state = tensors_in(folder)
    own = {name for name, _ in stock.named_parameters()} - {"score.weight"}
    assert own < state.keys()
    missing, _ = stock.load_state_dict({name: state[name] for name in own}, strict=False)
    assert missing == ["score.weight"]

    model, info = load_base(cut(folder), "fp32", 3, "cpu")
    assert (info.layers, info.whole_layers) == (KEPT, BLOCKS)
    with torch.no_grad():
        stock.score.weight.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
        model.score.weight.copy_(stock.score.weight)
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=0, atol=1e-5)
    whole, _ = load_base(str(folder), "fp32", 3, "cpu")
    with torch.no_grad():
        whole.score.weight.copy_(stock.score.weight)
    assert (logits_of(whole) - logits_of(model)).abs().max() > 0.01


def test_the_text_part_of_a_multimodal_base_is_cut(tmp_path: Path) -> None:
    folder, whole = multimodal_checkpoint(tmp_path / "base")
    model, info = load_base(cut(folder, 0.5), "fp32", 3, "cpu")
    assert (info.layout, info.layers, len(model.model.layers)) == ("multimodal", 1, 1)
    stock = whole.model.language_model
    stock.layers = stock.layers[:1]
    torch.testing.assert_close(hidden(model.model), hidden(stock), rtol=0, atol=1e-5)


def test_the_fused_decoder_computes_the_blocks_that_are_left(
    monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    monkeypatch.setattr(emotion_train.model, "kernels", plain_kernels, raising=False)
    monkeypatch.setitem(sys.modules, "emotion_train.model.kernels", plain_kernels)
    lora = LoraSection(r=4, dropout=0, targets="all-linear")
    model, _ = build_classifier(cut(base), "fp32", 3, lora, 0, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    stock = packed(model, posts())
    model.decoder = FusedDecoder(model.classifier)
    assert len(model.decoder._blocks) == KEPT
    torch.testing.assert_close(packed(model, posts()), stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_memory_follows_the_depth(base: Path, precision: Precision) -> None:
    """Planned bytes are those of what was loaded, and each block takes the same off."""
    model, _ = load_base(cut(base), precision, 3, "cpu")
    shape = shape_of_base(str(base), KEPT)
    assert shape.num_hidden_layers == KEPT == len(model.model.layers)
    assert Shape.of(cut(base).text.to_dict()) == shape
    if precision != "nf4":
        held = sum(tensor.nbytes for name, tensor in model.named_parameters() if name != "score.weight")
        assert held == weight_bytes(shape, precision)
    else:
        layers = [one for one in model.modules() if type(one).__name__ == "Linear4bit"]
        assert len(layers) == 7 * KEPT
        assert sum(prod(one.weight.quant_state.shape) for one in layers) == shape.linear_parameters
    recipes = [Recipe(shape_of_base(str(base), count), precision, labels=3) for count in (1, 2, 3, 4)]
    totals = np.diff([estimate(one, 256, gradient_checkpointing=False).total for one in recipes])
    assert (totals > 0).all()
    assert totals.max() - totals.min() < 64  # rounded to whole bytes
    trained = np.diff([one.trained_parameters for one in recipes])
    assert len(set(trained)) == 1
    assert trained[0] > 0


# --- what is read ---


def by_block(folder: Path) -> Path:
    """A checkpoint with a file for each block, and one for the rest."""
    causal_checkpoint(folder, "llama", num_hidden_layers=BLOCKS)
    state = tensors_in(folder)
    files = {
        name: f"block-{name.split('.')[2]}.safetensors" if ".layers." in name else "others.safetensors"
        for name in state
    }
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    for shard in folder.glob("model-*"):
        shard.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_of_the_hub_the_files_of_blocks_above_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = by_block(tmp_path / "base")
    with FakeHub({"owner/small": folder}) as server:
        fake_hub.use(monkeypatch, server.endpoint, tmp_path / "cache")
        found = require_trainable_base(BaseFiles.find("owner/small", KEPT), "fp32", 128)
        files = [*(folder / f"block-{number}.safetensors" for number in range(KEPT))]
        files.append(folder / "others.safetensors")
        assert found.bytes_to_download == sum(file.stat().st_size for file in files)
        model, _ = load_base(cut("owner/small"), "fp32", 3, "cpu")
    own, _ = load_base(cut(folder), "fp32", 3, "cpu")
    assert torch.equal(logits_of(model), logits_of(own))
    assert not any(f"block-{KEPT}" in path for _, path, _ in server.asked)


def test_files_of_blocks_above_need_not_be_there(tmp_path: Path) -> None:
    folder = by_block(tmp_path / "base")
    (folder / "block-3.safetensors").unlink()
    found = require_trainable_base(BaseFiles.find(str(folder), KEPT), "fp32", 128)
    names = [file.name for file in found.weights]
    assert names == [*(f"block-{number}.safetensors" for number in range(KEPT)), "others.safetensors"]
    load_base(cut(folder), "fp32", 3, "cpu")
    with pytest.raises(WrongRequest, match=r"block-3"):
        require_trainable_base(str(folder))
    (folder / "block-2.safetensors").write_bytes(b"x")
    with pytest.raises(WrongRequest, match=r"block-2.*damaged"):
        require_trainable_base(BaseFiles.find(str(folder), KEPT))


def test_a_gguf_file_is_read_up_to_the_depth_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = GgufFile.read

    def spy(self: GgufFile, name: str, rows: slice = slice(None)) -> Any:
        read.append(name)
        return real(self, name, rows)

    monkeypatch.setattr(GgufFile, "read", spy)
    model, info = load_base(cut(gguf_base(), 2), "bf16", 3, "cpu")
    assert (info.layers, info.whole_layers, len(model.model.layers)) == (2, 30, 2)
    assert len(read) == len(set(read)) == 2 + 2 * 9
    assert not any(name.startswith("blk.") and int(name.split(".")[1]) >= 2 for name in read)
    whole = read_config(gguf_base())
    assert whole.text.num_hidden_layers == 30
    assert whole.shape_sha256 != cut(gguf_base(), 2).shape_sha256
    assert require_trainable_base(BaseFiles.find(gguf_base(), 0.77)).model.layers == 23


def test_no_piece_of_a_bucket_is_read_that_holds_only_blocks_above(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(str(base), str(tmp_path / "staged"), **SMALL)
    read: list[int] = []
    real: Callable[..., Any] = FolderStore.read_into_verified

    def spy(self: FolderStore, key: str, view: memoryview, *rest: Any, **named: Any) -> Any:
        read.append(len(view))
        return real(self, key, view, *rest, **named)

    monkeypatch.setattr(FolderStore, "read_into_verified", spy)
    counts = []
    for layers in (None, 3, 2, 1):
        read.clear()
        model, info = load_base(cut(tmp_path / "staged", layers), "bf16", 3, "cpu")
        again, its = load_base(cut(base, layers), "bf16", 3, "cpu")
        assert info.weights_sha256 == its.weights_sha256
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)
        needed = sum(
            2 * tensor.numel() for name, tensor in model.named_parameters() if name != "score.weight"
        )
        counts.append(sum(read))
        if layers is not None:
            assert needed <= counts[-1] <= needed + 3 * SMALL["piece_bytes"]
    assert counts == sorted(counts, reverse=True)
    found = require_trainable_base(BaseFiles.find(str(tmp_path / "staged"), 1))
    assert 0 < len(found.weights) < len(weight_files(BaseFiles.find(str(tmp_path / "staged"))))
    words = check_base(lambda: found)
    assert "of which the first 1 of 4 blocks are read" in words
    top = sorted((tmp_path / "staged").glob("model-*.safetensors"))[-2]
    top.unlink()
    check_base(lambda: found)
    with pytest.raises(WrongRequest, match=r"missing or cut short"):
        check_base(lambda: require_trainable_base(str(tmp_path / "staged")))


# --- a staged copy of the first blocks ---


def test_a_copy_of_the_first_blocks_serves_their_runs_and_no_deeper_ones(base: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "copy")
    result = stage(str(base), url, layers=0.75, **SMALL)
    assert result.created
    assert result.index.source_layers == BLOCKS
    assert not stage(str(base), url, layers=KEPT, **SMALL).created
    with pytest.raises(WrongRequest, match=r"holds another staged base"):
        stage(str(base), url, layers=2, **SMALL)
    with pytest.raises(WrongRequest, match=r"holds another staged base"):
        stage(str(base), url, **SMALL)
    for asked in (None, KEPT, 0.75):
        info = load_base(cut(url, asked), "bf16", 3, "cpu")[1]
        assert (info.layers, info.whole_layers) == (KEPT, BLOCKS)
        assert info.weights_sha256 == load_base(cut(base), "bf16", 3, "cpu")[1].weights_sha256
    assert load_base(cut(url, 0.5), "bf16", 3, "cpu")[1].layers == 2  # a share of the whole
    for asked, words in ((BLOCKS, "model.layers is 4;"), (0.9, "model.layers is 0.9, which is 4 blocks;")):
        with pytest.raises(WrongRequest) as raised:
            cut(url, asked)
        assert str(raised.value) == (
            f"The base {url} was staged with 3 of its 4 blocks and {words} type model.layers=3 or less, or"
            " give a base that has so many."
        )
    again = stage(url, str(tmp_path / "again"), layers=2, **SMALL)
    assert (again.index.source_layers, text_model(BaseFiles.find(again.url)).layers) == (BLOCKS, 2)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(url, dtype=torch.float32, trust_remote_code=False)
    assert len(model.layers) == KEPT


def test_a_copy_of_a_whole_base_says_nothing_of_depth(base: Path, tmp_path: Path) -> None:
    """The form that earlier versions wrote, so that they read it too."""
    stage(str(base), str(tmp_path / "whole"), layers=BLOCKS, **SMALL)
    assert b"source_layers" not in (tmp_path / "whole" / "base.json").read_bytes()


# --- adapters ---


def test_an_adapter_knows_its_depth_and_reads_its_base_so(base: Path, adapter: Path) -> None:
    facts = read_facts(adapter)
    assert (facts.layers, facts.whole_layers) == (KEPT, BLOCKS)
    loaded = load_adapter(adapter, device="cpu")
    assert len(loaded.model.layers) == KEPT
    card = (adapter / "README.md").read_text()
    assert "a linear head on the first 3 of 4 blocks of" in card
    assert "config.num_hidden_layers = 3" in card


def test_an_adapter_of_one_depth_is_refused_at_another(base: Path, adapter: Path, tmp_path: Path) -> None:
    facts = read_facts(adapter)
    for layers, words in ((None, "all blocks"), (2, "the first 2 blocks")):
        with pytest.raises(WrongRequest) as raised:
            load_adapter(adapter, device="cpu", base=cut(base, layers))
        assert str(raised.value) == (
            f"The adapter {adapter} was made for the first 3 blocks of the base {facts.base}, and {words} of"
            f" {base} are read here; give both one depth: model.layers=3 in a run, or a base that has all of"
            " these blocks."
        )
    whole = adapter_on(str(base), tmp_path / "whole")
    with pytest.raises(WrongRequest, match=r"was made for all blocks of .* model.layers=null in a run"):
        load_adapter(whole, device="cpu", base=cut(base))


def test_adapters_that_say_nothing_of_depth_read_all_blocks(base: Path, tmp_path: Path) -> None:
    folder = adapter_on(str(base), tmp_path / "adapter")
    stored = json.loads((folder / FACTS).read_text())
    assert stored.pop("layers") is None
    stored.pop("whole_layers")
    (folder / FACTS).write_text(json.dumps(stored))
    assert read_facts(folder).layers is None
    assert base_config_of(read_facts(folder)).text.num_hidden_layers == BLOCKS
    assert len(load_adapter(folder, device="cpu").model.layers) == BLOCKS


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_export_is_a_plain_checkpoint_of_the_blocks_that_are_left(tmp_path: Path, kind: str) -> None:
    folder = causal_checkpoint(tmp_path / "base", kind, num_hidden_layers=BLOCKS, **KINDS[kind])
    adapter, out = adapter_on(str(folder), tmp_path / "adapter", layers=KEPT), tmp_path / "out"
    result = export(adapter, out, dtype="fp32")
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=False)
    assert len(model.model.layers) == KEPT
    assert tensors_of(out).keys() == {name for name, _ in model.named_parameters()}
    np.testing.assert_allclose(piped(out), predicted(adapter), atol=1e-5)
    assert "the first 3 of 4 blocks of" in (out / "README.md").read_text()
    assert (result.facts.layers, export(adapter, out, dtype="fp32").created) == (KEPT, False)
    # from a staged copy of all blocks, whose own sum is not that of three
    stage(str(folder), str(tmp_path / "staged"), **SMALL)
    again = export(adapter, tmp_path / "again", base=str(tmp_path / "staged"))
    assert again.facts.base_weights_sha256 == result.facts.base_weights_sha256
    bf16 = tensors_of(tmp_path / "again")
    for name, tensor in tensors_of(out).items():
        torch.testing.assert_close(bf16[name].float(), tensor, rtol=2e-2, atol=2e-2)


# --- the request ---


@pytest.mark.parametrize(
    ("word", "layers"),
    [("23", 23), ("0.77", 0.77), ("null", None), ("1", 1), (".5", 0.5), ("all", "refused")],
)
def test_a_depth_is_a_number_or_a_share(word: str, layers: Any) -> None:
    words = ["data.url=x", "run.output_url=x", f"model.layers={word}"]
    if layers == "refused":
        with pytest.raises(WrongRequest, match=r"model.layers: expected is a number of blocks"):
            load_config(None, words)
    else:
        assert load_config(None, words).model.layers == layers


@pytest.mark.parametrize("word", ["0", "-1", "1.0", "1.5", "0.0", "2001", "true", "[1]", "23 blocks", "nan"])
def test_what_is_no_depth_is_refused_in_a_sentence(word: str) -> None:
    with pytest.raises(WrongRequest) as raised:
        load_config(None, ["data.url=x", "run.output_url=x", f"model.layers={word}"])
    assert str(raised.value).count("model.layers") == 1


def test_a_deeper_base_than_there_is_is_refused(base: Path) -> None:
    with pytest.raises(WrongRequest) as raised:
        shape_of_base(str(base), 5)
    assert str(raised.value) == (
        f"The base {base} has 4 blocks and model.layers is 5; type model.layers=4 or less, or give a base"
        " that has so many."
    )
    assert shape_of_base("mistralai/Mistral-Small-3.1-24B-Base-2503", 0.77).num_hidden_layers == 31
    assert shape_of_base("mistralai/Mistral-Small-3.1-24B-Base-2503").num_hidden_layers == 40
    with pytest.raises(WrongRequest, match=r"has 40 blocks and model.layers is 41"):
        shape_of_base("mistralai/Mistral-Small-3.1-24B-Base-2503", 41)


@pytest.mark.parametrize(
    ("share", "blocks", "count"),
    [(0.77, 30, 23), (0.9, 30, 27), (0.5, 30, 15), (0.01, 30, 1), (0.999, 30, 30)],
)
def test_a_share_is_rounded_and_at_least_one_block(share: float, blocks: int, count: int) -> None:
    from emotion_train.bases.depth import blocks_read

    assert blocks_read("base", share, blocks, blocks) == count
