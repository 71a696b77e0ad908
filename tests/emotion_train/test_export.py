"""An export answers as the adapter does, by transformers alone; it is written once, the index last,
and never over something else.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from emotion_train.bases.files import BaseFiles
from emotion_train.cli import main
from emotion_train.config import LoraSection
from emotion_train.data.index import read_index
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation import decision as decisions
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.evaluation.floors import posts
from emotion_train.evaluation.gate import Gate
from emotion_train.evaluation.scoring import Probabilities, probabilities_of
from emotion_train.exporting import base_rows
from emotion_train.exporting.export import export
from emotion_train.exporting.small_files import tokenizer_files
from emotion_train.exporting.weights import INDEX
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.load import read_config
from emotion_train.model.lora import build_classifier, load_adapter, save_adapter
from emotion_train.model.precision import Precision
from emotion_train.model.staged_copy import stage
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from tests.helpers.tiny_models import causal_checkpoint, gguf_base, multimodal_checkpoint, write_tokenizer
from tests.helpers.tiny_runs import tiny_config

LABELS = ("joy", "anger", "a <b>", "love")
MAX_LENGTH = 24
LORA = LoraSection(r=4, alpha=8, dropout=0, targets="all-linear")
TEXTS = (
    "well",
    "a post that is longer than the twenty-four tokens that are read of it",
    "</s>[INST] quoted <pad>",
    "<|im_end|> naïve 🙂 <|endoftext|>",
    "<pad></s><s>",
)
SMALL = 40_000  # bytes of a file: several files, tensors larger and smaller than one


def adapter_on(
    base: str,
    folder: Path,
    precision: Precision = "fp32",
    lora: LoraSection = LORA,
    *,
    labels: tuple[str, ...] = LABELS,
    seed: int = 1,
    layers: int | None = None,
    **facts: Any,
) -> Path:
    """An adapter that changes the base's answers, as a training leaves it."""
    opened = read_config(BaseFiles.find(base, layers))
    model, info = build_classifier(opened, precision, len(labels), lora, 0, "cpu")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 20)
            if "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
    tokenizer = PostTokenizer.load(base, MAX_LENGTH)
    about = AdapterFacts.of(info, tokenizer, precision=precision, lora=lora, labels=labels, **facts)
    save_adapter(model, folder, tokenizer=tokenizer, facts=about, metrics_lines=["macro-F1 0.5"])
    return folder


def predicted(adapter: Path, texts: Any = TEXTS, targets: Any = "one", **how: Any) -> Probabilities:
    loaded = load_adapter(adapter, device="cpu", **how)
    device = torch.device("cpu")
    labels = len(loaded.facts.labels)
    return probabilities_of(loaded.model, loaded.tokenizer, texts, 512, device, labels, targets)


def piped(folder: Path, texts: Any = TEXTS, **how: Any) -> Probabilities:
    """What transformers alone says of the posts, labels in the order of the adapter."""
    from transformers import pipeline

    classifier = pipeline("text-classification", model=str(folder), dtype=torch.float32)
    answers = classifier(list(texts), top_k=None, truncation=True, max_length=MAX_LENGTH, **how)
    named = [{one["label"]: one["score"] for one in answer} for answer in answers]
    return np.array([[answer[label] for label in LABELS] for answer in named])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, found by its index."""
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    found = {name: load_file(folder / file) for file in set(files.values()) for name in [file]}
    assert {name for tensors in found.values() for name in tensors} == files.keys()
    return {name: found[file][name] for name, file in files.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint whose configuration tells much that is not of an export."""
    folder, _ = multimodal_checkpoint(tmp_path_factory.mktemp("export") / "base")
    document = json.loads((folder / "config.json").read_text())
    document["auto_map"] = {"AutoModel": "evil.py--Model"}
    document["text_config"] |= {
        "_name_or_path": "/home/me/base",
        "_model_name_or_path": "Smollm2 135M 8k",
        "id2label": {"0": "dog", "1": "cat", "2": "bird"},
        "label2id": {"dog": 0, "cat": 1, "bird": 2},
        "problem_type": "regression",
        "pad_token_id": None,
        "task_specific_params": {},
    }
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return adapter_on(str(base), base.parent / "adapter")


@pytest.fixture(scope="module")
def exported(adapter: Path) -> Path:
    folder = adapter.parent / "exported"
    export(adapter, folder, dtype="fp32", shard_bytes=SMALL)
    return folder


# --- the same answers ---


def test_a_pipeline_answers_as_the_adapter_alone_and_in_a_batch(adapter: Path, exported: Path) -> None:
    ours = predicted(adapter)
    assert (ours.argmax(axis=1)[:, None] != ours.argmax(axis=1)).any(), "all posts get one label"
    np.testing.assert_allclose(piped(exported), ours, atol=1e-5)
    np.testing.assert_allclose(piped(exported, batch_size=len(TEXTS)), ours, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "qwen3_5_text", "ministral3"])
def test_other_architectures_with_their_biases_and_norms(tmp_path: Path, kind: str) -> None:
    lora = LoraSection(r=3, alpha=5, dropout=0, targets=("q_proj", "down_proj"))
    adapter = adapter_on(str(causal_checkpoint(tmp_path / "base", kind)), tmp_path / "adapter", lora=lora)
    export(adapter, tmp_path / "out", dtype="fp32", shard_bytes=SMALL)
    np.testing.assert_allclose(piped(tmp_path / "out"), predicted(adapter), atol=1e-5)


@pytest.mark.parametrize("kind", ["several", "shares"])
def test_several_labels_and_shares(
    adapter: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds = (0.5, 0.25, 0.75, 0.125) if kind == "several" else None
    decision = Decision(targets=kind, labels=LABELS, thresholds=thresholds)
    monkeypatch.setattr(decisions, "read_decision", lambda *_: decision)
    export(adapter, tmp_path, dtype="fp32")
    ours = predicted(adapter, targets=kind)
    np.testing.assert_allclose(piped(tmp_path), ours, atol=1e-5)
    np.testing.assert_allclose(piped(tmp_path, batch_size=5), ours, atol=1e-5)
    printed = run_snippet(tmp_path)
    answered = decision.answers(ours)
    for i, line in enumerate(printed):
        if kind == "several":
            named = zip(LABELS, answered[i], strict=True)
            assert line["labels"] == [label for label, is_given in named if is_given]
        assert line["probabilities"] == pytest.approx(dict(zip(LABELS, ours[i], strict=True)), abs=1e-5)
    assert ("`anger`: 0.25" in (tmp_path / "README.md").read_text()) == (kind == "several")
    assert Decision.model_validate_json((tmp_path / "decision.json").read_bytes()) == decision


def run_snippet(folder: Path) -> list[dict[str, Any]]:
    """What the program of the export's card prints of `TEXTS`."""
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", ["snippet.py", str(folder), *TEXTS])
        exec(program, {"__name__": "__main__"})
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_the_card_s_program_cuts_posts_and_says_what_the_adapter_says(adapter: Path, exported: Path) -> None:
    for line, prob_C in zip(run_snippet(exported), predicted(adapter), strict=True):
        assert line["probabilities"] == pytest.approx(dict(zip(LABELS, prob_C, strict=True)), abs=1e-5)
    card = (exported / "README.md").read_text()
    assert "macro-F1 0.5" in card
    assert f'"truncate_prompt_tokens": {MAX_LENGTH}' in card
    assert "<code>a &#60;b&#62;</code>" in card


def test_the_weights_are_those_that_peft_merges(adapter: Path, exported: Path) -> None:
    merged: Any = load_adapter(adapter, device="cpu").model.network
    theirs = merged.merge_and_unload().state_dict()
    ours = tensors_of(exported)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-6)


def test_blocks_of_rows_change_nothing(
    adapter: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_rows, "BLOCK_VALUES", 700)  # ten rows of 64
    export(adapter, tmp_path, dtype="fp32", shard_bytes=SMALL)
    whole, blocks = tensors_of(exported), tensors_of(tmp_path)
    assert whole.keys() == blocks.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(blocks[name], tensor, rtol=0, atol=1e-6)


def test_bf16_rounds_the_sum_once_and_leaves_the_head(adapter: Path, exported: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path)
    exact, rounded = tensors_of(exported), tensors_of(tmp_path)
    assert torch.equal(rounded["score.weight"], exact["score.weight"])
    assert rounded["score.weight"].dtype == torch.float32
    for name in exact.keys() - {"score.weight"}:
        assert torch.equal(rounded[name], exact[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_the_small_real_model_in_a_gguf_file(tmp_path: Path) -> None:
    cut = adapter_on(gguf_base(), tmp_path / "cut-adapter", layers=3)
    export(cut, tmp_path / "cut", dtype="fp32")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 3
    np.testing.assert_allclose(piped(tmp_path / "cut"), predicted(cut), atol=1e-5)
    adapter = adapter_on(gguf_base(), tmp_path / "adapter")
    export(adapter, tmp_path / "out", dtype="fp32", shard_bytes=100 << 20)
    ours = predicted(adapter)
    np.testing.assert_allclose(piped(tmp_path / "out"), ours, atol=1e-5)
    np.testing.assert_allclose(piped(tmp_path / "out", batch_size=len(TEXTS)), ours, atol=1e-5)
    assert "Smollm2" not in (tmp_path / "out" / "config.json").read_text()


# --- bases ---


def test_a_staged_base_gives_the_same_files(base: Path, store: Store, tmp_path: Path) -> None:
    source = str(causal_checkpoint(tmp_path / "base", "mistral", dtype=torch.bfloat16))
    adapter = adapter_on(source, tmp_path / "adapter")
    stage(source, f"{store.url}/base", "bf16", "cpu", shard_bytes=60_000, piece_bytes=10_000)
    export(adapter, f"{store.url}/out", base=f"{store.url}/base")
    export(adapter, f"{store.url}/direct")
    names = [
        [info.key.removeprefix(name) for info in store.list(f"{name}/model-")] for name in ("out", "direct")
    ]
    assert len(names[0]) == 1
    assert names[0] == names[1]  # which have the bytes' sha256


def test_fp32_of_a_base_that_was_rounded_when_staged_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    stage(str(base), str(tmp_path / "base"), "bf16", "cpu")
    with pytest.raises(WrongRequest, match="was rounded to bfloat16 when it was staged, and --dtype is fp32"):
        export(adapter, tmp_path / "out", base=str(tmp_path / "base"), dtype="fp32")


def test_a_staged_base_of_nf4_is_merged_as_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    from emotion_train.model.load import load_base

    stage(str(base), str(tmp_path / "nf4"), "nf4", "cpu")
    adapter = adapter_on(str(tmp_path / "nf4"), tmp_path / "adapter", "nf4")
    export(adapter, tmp_path / "out", dtype="fp32", compare=0)
    network, _ = load_base(str(base), "nf4", len(LABELS), "cpu")
    layer = network.model.layers[1].mlp.down_proj.weight
    state = load_file(adapter / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.model.layers.1.mlp.down_proj.lora_{one}.weight"] for one in "AB")
    wanted = dequantize_4bit(layer.data, layer.quant_state).float() + LORA.alpha / LORA.r * (b @ a)
    merged = tensors_of(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(piped(tmp_path / "out"), predicted(adapter), atol=0.05)


def test_another_base_is_refused_before_anything_is_written(adapter: Path, tmp_path: Path) -> None:
    # a multimodal text part is a Mistral of the same shape with other numbers
    other = causal_checkpoint(tmp_path / "other", "mistral", seed=5)
    with pytest.raises(WrongRequest, match=r"was made for the base .* their weights differ"):
        export(adapter, tmp_path / "out", base=str(other))
    larger = causal_checkpoint(tmp_path / "larger", "mistral", num_hidden_layers=3)
    with pytest.raises(WrongRequest, match="their layers have other shapes"):
        export(adapter, tmp_path / "out", base=str(larger))
    assert not (tmp_path / "out").exists()


def test_a_copy_in_a_bucket_is_exported_into_the_bucket(
    adapter: Path, exported: Path, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_store(bucket_url)
    for path in adapter.iterdir():
        store.write(f"adapter/{path.name}", path)
    words = ["--to", f"{bucket_url}/out", "--dtype", "fp32"]
    assert main(["export", f"{bucket_url}/adapter", *words]) == 0
    (key,) = [info.key for info in store.list("out/model-") if info.key.endswith(".safetensors")]
    (tmp_path / "weights").write_bytes(store.read(key))
    for name, tensor in load_file(tmp_path / "weights").items():
        assert torch.equal(tensor, tensors_of(exported)[name])


# --- small files ---


def test_the_configuration_is_that_of_the_text_part_and_of_nothing_else(exported: Path) -> None:
    text = (exported / "config.json").read_text()
    document = json.loads(text)
    for leftover in ("auto_map", "evil", "dog", "Smollm2", "/home/me", "vision", "quantization", "task_spec"):
        assert leftover not in text
    assert document["architectures"] == ["MistralForSequenceClassification"]
    assert document["id2label"] == {str(number): label for number, label in enumerate(LABELS)}
    assert document["label2id"] == {label: number for number, label in enumerate(LABELS)}
    assert document["problem_type"] == "single_label_classification"
    assert (document["pad_token_id"], document["use_cache"], document["dtype"]) == (3, False, "float32")


def test_a_tool_that_reads_tokenizer_json_alone_cuts_and_pads_on_the_right(
    adapter: Path, exported: Path
) -> None:
    ours = PostTokenizer.load(str(adapter), MAX_LENGTH)
    alone = Tokenizer.from_file(str(exported / "tokenizer.json"))
    plain = TEXTS[:2]
    for ids, theirs in zip(ours.encode(plain), alone.encode_batch(list(plain)), strict=True):
        assert theirs.ids == [*ids.tolist(), *[3] * (MAX_LENGTH - len(ids))]
        assert sum(theirs.attention_mask) == len(ids)
    # without the rule of tokenizer_config.json a control token that a post quotes is one
    assert alone.encode("</s>").ids == [1, 2]
    alone.encode_special_tokens = True  # as the card says
    for ids, theirs in zip(ours.encode(TEXTS), alone.encode_batch(list(TEXTS)), strict=True):
        assert theirs.ids[: len(ids)] == ids.tolist()


def test_transformers_reads_quoted_control_tokens_as_text(adapter: Path, exported: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    ours = PostTokenizer.load(str(adapter), MAX_LENGTH)
    cut = theirs(list(TEXTS), truncation=True)["input_ids"]  # model_max_length is that of the training
    assert [ids.tolist() for ids in ours.encode(TEXTS)] == cut
    assert theirs.padding_side == theirs.truncation_side == "right"


def test_padding_is_a_token_that_no_post_ends_with(tmp_path: Path) -> None:
    def with_padding(name: str, specials: Callable[[dict[str, Any]], bool]) -> PostTokenizer:
        write_tokenizer(tmp_path)
        document = json.loads((tmp_path / "tokenizer.json").read_text())
        document["added_tokens"] = [one for one in document["added_tokens"] if specials(one)]
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        config = {"bos_token": "<s>", "pad_token": name}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return PostTokenizer.load(str(tmp_path), MAX_LENGTH)

    usual = with_padding("<pad>", lambda _: True)
    assert tokenizer_files(usual, 260)[1] == 3
    ordinary = with_padding("!", lambda one: one["content"] in ("<s>", "</s>"))
    assert ordinary.encode(["!"])[0].tolist() == [1, ordinary.pad_id]
    files, pad_id = tokenizer_files(ordinary, 260)
    assert pad_id == 2
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "</s>"
    with pytest.raises(WrongRequest, match="no special token but its BOS"):
        tokenizer_files(with_padding("!", lambda one: one["content"] == "<s>"), 260)


# --- the place ---


def test_parts_come_first_and_the_index_last(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    for name in ("create", "write"):
        method = getattr(FolderStore, name)

        def watched(store: FolderStore, key: str, data: Any, method: Any = method) -> Any:
            keys.append(key)
            return method(store, key, data)

        monkeypatch.setattr(FolderStore, name, watched)
    export(adapter, tmp_path, shard_bytes=SMALL)
    assert (keys[0], keys[-1]) == ("export.json", INDEX)
    assert len(keys) == len(set(keys)) == len(list(tmp_path.iterdir()))


def test_the_same_export_again_writes_nothing_and_another_one_is_refused(
    adapter: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{store.url}/out"
    assert export(adapter, url, shard_bytes=SMALL).created
    before = [(info.key, info.size, info.etag) for info in store.list()]
    assert main(["export", str(adapter), "--to", url]) == 0
    assert "already there, the same" in capsys.readouterr().out
    assert [(info.key, info.size, info.etag) for info in store.list()] == before
    with pytest.raises(WrongRequest, match=r"another export.*dtype 'bf16' there, 'fp32' now"):
        export(adapter, url, dtype="fp32")
    assert main(["export", str(adapter), "--to", store.url]) == 2
    assert "holds other objects, such as out/README.md, and no export" in capsys.readouterr().err
    lost = next(key for key, _, _ in before if key.endswith(".safetensors"))
    store.delete(lost)
    with pytest.raises(WrongRequest, match=r"has lost model-00001-of-"):
        export(adapter, url)


def test_an_export_by_another_decision_or_with_a_damaged_file_is_not_the_same(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(adapter, copy)
    gates = (Gate(label=None, precision=0.9, threshold=0.4, share=0.5),)
    words = ["export", str(copy), "--to", str(out)]
    assert main(words) == 0
    (copy / DECISION).write_bytes(Decision(targets="one", labels=LABELS, gates=gates).to_bytes())
    assert main(words) == 2
    assert "holds other thresholds, gates or temperatures than the adapter has" in capsys.readouterr().err
    (copy / DECISION).write_bytes(Decision.one(LABELS).to_bytes())
    (out / "tokenizer.json").write_text("{}")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "the same" not in printed
    assert "already there; tokenizer.json there: not as this version writes" in printed


def test_a_killed_export_is_resumed_and_what_it_left_goes(
    adapter: Path, store: Store, tmp_path: Path
) -> None:
    export(adapter, store.url, shard_bytes=SMALL)
    first = {info.key: (info.size, info.etag) for info in store.list()}
    weights = sorted(key for key in first if key.endswith(".safetensors"))
    for key in (INDEX, "README.md", "config.json", weights[-1]):
        store.delete(key)
    # the same tensors, of another machine whose sums differ in a last bit
    left = f"model-00001-of-{len(weights):05}-{'0' * 12}.safetensors"
    store.create(left, b"other bytes")
    assert export(adapter, store.url, shard_bytes=SMALL).created
    assert {info.key: info.size for info in store.list()} == {key: size for key, (size, _) in first.items()}


# --- what merging changed ---


def test_what_merging_into_an_unquantised_base_changes_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path)
    data = str(tmp_path / "data")
    store = open_store(data)
    index = read_index(store)
    adapter = adapter_on(
        str(tmp_path / "base"), tmp_path / "adapter", "nf4", index_sha256=index.sha256(), data_url=data
    )
    result = export(adapter, tmp_path / "out")
    texts = [text for _, text, _ in posts(store, index.split("validation"))]
    before, after = predicted(adapter, texts), piped(tmp_path / "out", texts)
    assert result.change is not None
    assert result.change.posts == len(texts)
    # transformers computes in float32 here, of the same bf16 numbers
    assert result.change.largest == pytest.approx(np.abs(before - after).max(), abs=0.02)
    assert result.change.largest > 1e-4
    assert result.change.sentence() in (tmp_path / "out" / "README.md").read_text()
    ten = export(adapter, tmp_path / "ten", compare=10).change
    assert ten is not None
    assert ten.posts == 10
    assert ten.largest <= result.change.largest

    shutil.rmtree(data)
    assert main(["export", str(adapter), "--to", str(tmp_path / "unmeasured")]) == 0
    assert f"not measured: there is no data set at {data}" in capsys.readouterr().out
    assert "was not measured: there is no" in (tmp_path / "unmeasured" / "README.md").read_text()
    with pytest.raises(WrongRequest, match=r"--compare is 5, and no posts can be compared here: there is no"):
        export(adapter, tmp_path / "asked", compare=5)
