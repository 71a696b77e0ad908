"""Encoders: transformers' own classes on padded rows against packs, alone and together; adapters;
dropout by post; folders that are read back.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emotion_train.bases.encoders import ENCODERS
from emotion_train.bases.files import BaseFiles
from emotion_train.bases.headers import shapes_in, weight_files
from emotion_train.config import LoraSection
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice
from emotion_train.evaluation.members import facts_together
from emotion_train.judging.origins import Adapters
from emotion_train.judging.question import Question
from emotion_train.model.attention import Segments
from emotion_train.model.encoder import packed
from emotion_train.model.ensemble import load_ensemble
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.load import load_base, read_config
from emotion_train.model.lora import (
    adapter_parameters,
    adapter_state,
    build_classifier,
    load_adapter,
    load_adapter_state,
    of_main_labels,
    save_adapter,
    with_temperature,
)
from tests.helpers.padded import padded_counters
from tests.helpers.tiny_models import encoder_checkpoint

LENGTHS = [3, 17, 1, 40]
LABELS = ("awe", "calm", "glee", "rage", "ennui")
FAMILIES = [(kind, "cls") for kind in ENCODERS] + [("modernbert", "mean")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def base_of(folder: Path, kind: str, pooling: str = "cls") -> str:
    place = folder / f"{kind}-{pooling}"
    changes: dict[str, Any] = {"classifier_pooling": pooling} if kind == "modernbert" else {}
    return str(place if place.exists() else encoder_checkpoint(place, kind, **changes))


@cache
def posts() -> torch.Tensor:
    return torch.randint(4, 250, (4, 40), generator=torch.Generator().manual_seed(0))


def made(base: str, lora: LoraSection | None = None, seed: int = 3) -> EmotionClassifier:
    return build_classifier(base, "fp32", len(LABELS), lora, seed, "cpu")[0]


def loud(model: EmotionClassifier, scale: float = 0.3) -> EmotionClassifier:
    """Heads of 0.02 give logits that hardly differ; these do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("classifier" in name or "lora_B" in name):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def theirs(model: EmotionClassifier, config: Any) -> Any:
    """transformers' own class, by its own attention, with the same weights."""
    from transformers import AutoModelForSequenceClassification

    config.num_labels = len(LABELS)
    reference = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", trust_remote_code=False
    )
    reference.load_state_dict(model.classifier.state_dict())
    return reference.eval()


@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
def test_alone_packed_and_padded_are_transformers_own_logits(folder: Path, kind: str, pooling: str) -> None:
    from transformers import AutoConfig

    base = base_of(folder, kind, pooling)
    model = loud(made(base)).eval()
    reference = theirs(model, AutoConfig.from_pretrained(base, trust_remote_code=False))
    lengths_N = torch.tensor(LENGTHS)
    mask_NL = torch.arange(40) < lengths_N[:, None]
    with torch.no_grad():
        wanted_NC = reference(input_ids=posts().where(mask_NL, 3), attention_mask=mask_NL.long()).logits
        packed_NC = model.forward_padded(posts(), lengths_N)
        alone_NC = torch.cat(
            [
                model.forward_padded(row[None, :length], torch.tensor([length]))
                for row, length in zip(posts(), LENGTHS, strict=True)
            ]
        )
    assert packed_NC.dtype == torch.float32
    assert wanted_NC.std() > 0.1
    torch.testing.assert_close(packed_NC, wanted_NC, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone_NC, wanted_NC, atol=1e-5, rtol=0)


def test_filling_tokens_and_the_posts_beside_it_change_nothing(folder: Path) -> None:
    model = loud(made(base_of(folder, "modernbert", "mean"))).eval()
    ids = posts()[1, :30][None]
    positions = torch.cat([torch.arange(12), torch.arange(9), torch.arange(9)])[None]
    ends = torch.tensor([11, 20])
    other = ids.clone()
    other[0, 21:] = 3
    with torch.no_grad():
        one = model(ids, positions, Segments.of([0, 12, 21, 30], "cpu"), ends)
        two = model(other, positions, Segments.of([0, 12, 21, 30], "cpu"), ends)
    assert one.shape == (2, len(LABELS))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_pack_without_posts_gives_zero_gradients_to_every_weight(folder: Path, kind: str) -> None:
    model = made(base_of(folder, kind))
    segments, nobody = Segments.of([0, 4], "cpu"), torch.empty(0, dtype=torch.long)
    logits = model(torch.full((1, 4), 9), torch.arange(4)[None], segments, nobody)
    assert logits.shape == (0, len(LABELS))
    logits.sum().backward()
    assert all(one.grad is not None and not one.grad.any() for one in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("lora", [None, LoraSection(r=2, dropout=0.2)])
def test_dropout_and_gradients_do_not_depend_on_packing(
    folder: Path, kind: str, lora: LoraSection | None
) -> None:
    def gradients(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        model = loud(made(base_of(folder, kind), lora)).train()
        for row in rows:
            lengths_N = torch.tensor([LENGTHS[one] for one in row])
            counters = padded_counters(7, 2, row, 40)
            model.forward_padded(posts()[row], lengths_N, counters).square().sum().backward()
        return {
            name: one.grad for name, one in adapter_parameters(model.network).items() if one.grad is not None
        }

    whole, parts = gradients([[0, 1, 2, 3]]), gradients([[3], [1, 0], [2]])
    assert whole.keys() == parts.keys()
    scale = max(float(one.abs().max()) for one in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5 * scale, rtol=1e-4)
    still = made(base_of(folder, kind), lora)
    assert not torch.allclose(
        loud(still)
        .train()
        .forward_padded(posts(), torch.tensor(LENGTHS), padded_counters(7, 2, range(4), 40)),
        still.eval().forward_padded(posts(), torch.tensor(LENGTHS)),
        atol=1e-3,
    )


# PEFT 0.21 asks transformers 5.23 for it by its old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "pooling"), FAMILIES)
@pytest.mark.parametrize("lora", [None, LoraSection(r=2, targets="all-linear")])
def test_a_saved_folder_gives_the_same_logits_here_and_by_transformers(
    folder: Path, tmp_path: Path, kind: str, pooling: str, lora: LoraSection | None
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = base_of(folder, kind, pooling)
    model, info = build_classifier(base, "fp32", len(LABELS), lora, 3, "cpu")
    tokenizer = PostTokenizer.load(base, 32)
    facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=lora, labels=LABELS)
    save_adapter(loud(model), tmp_path, tokenizer=tokenizer, facts=facts)
    loaded = load_adapter(tmp_path, device="cpu")
    assert loaded.facts.model_copy(update={"weights_sha256": None}) == facts
    texts = ["a quiet </s> garden", "x" * 90, ""]
    ids = loaded.tokenizer.encode(texts)
    rows = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one).long() for one in ids], True, 3)
    lengths_N = torch.tensor([len(one) for one in ids])
    with torch.no_grad():
        ours_NC = model.eval().forward_padded(rows, lengths_N)
        assert torch.equal(loaded.model.forward_padded(rows, lengths_N), ours_NC)
        stock: Any = AutoModelForSequenceClassification.from_pretrained(
            tmp_path if lora is None else base, num_labels=len(LABELS), trust_remote_code=False
        )
        stock = stock.eval() if lora is None else PeftModel.from_pretrained(stock, tmp_path).eval()
        own = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
        batch = own(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        assert torch.equal(batch["input_ids"], rows)
        torch.testing.assert_close(stock(**batch).logits, ours_NC, atol=1e-5, rtol=0)
    if lora is None:
        with pytest.raises(WrongRequest, match="needs no base"):
            load_adapter(tmp_path, device="cpu", base=base)
        (tmp_path / "emotion_train.json").write_text(
            json.dumps({**facts.model_dump(mode="json", exclude={"labels"}), "lora": {}})
        )
        with pytest.raises(WrongRequest, match=r"does not say how model\.safetensors was trained"):
            load_adapter(tmp_path, device="cpu")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("lora", [None, LoraSection(r=2)])
def test_a_cut_encoder_is_transformers_own_of_so_many_blocks_also_from_its_folder(
    folder: Path, tmp_path: Path, kind: str, lora: LoraSection | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    base = base_of(folder, kind)
    found = read_config(BaseFiles.find(base, 2))
    model, info = build_classifier(found, "fp32", len(LABELS), lora, 3, "cpu")
    assert (info.layers, info.whole_layers, len(model.layers)) == (2, 3, 2)
    assert not any(re.search(r"layers?\.2\.", name) for name in shapes_in(weight_files(found.files, 2)))
    whole = made(base, lora).classifier.state_dict()
    assert all(torch.equal(one, whole[name]) for name, one in model.classifier.state_dict().items())
    loud(model).eval()
    lengths_N = torch.tensor(LENGTHS)
    ours_NC = model.forward_padded(posts(), lengths_N)
    if lora is None:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        config.num_hidden_layers = 2
        if kind == "modernbert":
            config.layer_types = config.layer_types[:2]
        mask_NL = (torch.arange(40) < lengths_N[:, None]).long()
        wanted_NC = theirs(model, config)(input_ids=posts(), attention_mask=mask_NL).logits
        torch.testing.assert_close(ours_NC, wanted_NC, atol=1e-5, rtol=0)
    tokenizer = PostTokenizer.load(base, 32)
    facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=lora, labels=LABELS)
    save_adapter(model, tmp_path, tokenizer=tokenizer, facts=facts)
    loaded = load_adapter(tmp_path, device="cpu")
    assert torch.equal(loaded.model.forward_padded(posts(), lengths_N), ours_NC)
    texts = ["a quiet garden", "x" * 90]
    ids = [torch.from_numpy(one).long()[None] for one in tokenizer.encode(texts)]
    alone = [model.forward_padded(one, torch.tensor([one.shape[1]])).softmax(-1)[0] for one in ids]
    printed = printed_by_the_card(tmp_path, base, texts, monkeypatch)
    torch.testing.assert_close(printed, torch.stack(alone), atol=1e-5, rtol=0)
    if lora is not None:
        with pytest.raises(WrongRequest, match=r"made for the first 2 blocks .* and all blocks of"):
            load_adapter(tmp_path, device="cpu", base=read_config(base))


def printed_by_the_card(
    folder: Path, base: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The probabilities that the program in the folder's README.md prints."""
    program = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    program = re.sub(r"(?m)^base = .*$", f"base = {json.dumps(base)}", program)  # told by its last name
    monkeypatch.setattr("sys.argv", ["snippet.py", str(folder), *texts])
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(program, "snippet.py", "exec"), {"__name__": "__main__"})
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    return torch.tensor([list(line["probabilities"].values()) for line in lines])


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("lora", [None, LoraSection(r=2)])
def test_a_temperature_divides_the_logits(folder: Path, kind: str, lora: LoraSection | None) -> None:
    model = loud(made(base_of(folder, kind), lora)).eval()
    lengths_N = torch.tensor(LENGTHS)
    with torch.no_grad():
        before_NC = model.forward_padded(posts(), lengths_N)
        tempered = with_temperature(adapter_state(model), (2.0,))
        for name, parameter in adapter_parameters(model.network).items():
            parameter.copy_(tempered[name])
        torch.testing.assert_close(model.forward_padded(posts(), lengths_N), before_NC / 2)


def stored(base: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in Path(base).glob("*.safetensors"):
        state |= load_file(file)
    return state


def test_a_pooler_that_is_stored_is_taken_and_one_that_is_not_is_drawn_by_the_seed(
    folder: Path, tmp_path: Path
) -> None:
    base = base_of(folder, "bert")
    drawn = load_base(base, "fp32", 2, "cpu")[0]
    assert drawn.not_stored == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    state = stored(base)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(Path(base, "config.json").read_text())
    pooler = {"bert.pooler.dense.weight": torch.eye(64), "bert.pooler.dense.bias": torch.ones(64)}
    old_head = {"classifier.weight": torch.ones(3, 64), "bert.embeddings.position_ids": torch.arange(160)}
    save_file({**state, **pooler, **old_head}, tmp_path / "bare" / "model.safetensors")
    kept = made(str(tmp_path / "bare"))
    assert torch.equal(kept.classifier.bert.pooler.dense.weight, torch.eye(64))
    one, two, three = (made(base, seed=seed).classifier.bert.pooler.dense.weight for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    save_file({**state, "bert.pooler.dense.bias": torch.ones(64)}, tmp_path / "bare" / "model.safetensors")
    with pytest.raises(WrongRequest, match=r"lacks bert\.pooler\.dense\.weight"):
        made(str(tmp_path / "bare"))


def test_names_without_a_prefix_and_of_old_norms_are_read(folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, "bert")
    old = {
        key.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in stored(base).items()
    }
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text(Path(base, "config.json").read_text())
    ours, info = load_base(str(tmp_path / "old"), "fp32", 2, "cpu")
    wanted, wanted_info = load_base(base, "fp32", 2, "cpu")
    assert info.weights_sha256 == wanted_info.weights_sha256
    for name, parameter in wanted.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("lora", [None, LoraSection(r=2)])
def test_labels_of_training_alone_have_no_logits_outside_of_it(
    folder: Path, kind: str, lora: LoraSection | None
) -> None:
    base, lengths_N = base_of(folder, kind), torch.tensor(LENGTHS)
    model = loud(build_classifier(base, "fp32", len(LABELS), lora, 3, "cpu", auxiliary=2)[0])
    counters = padded_counters(7, 2, range(4), 40)
    assert model.train().forward_padded(posts(), lengths_N, counters).shape == (4, len(LABELS))
    main_NC = model.eval().forward_padded(posts(), lengths_N)
    plain = build_classifier(base, "fp32", len(LABELS) - 2, lora, 3, "cpu")[0].eval()
    load_adapter_state(plain, of_main_labels(adapter_state(model), len(LABELS) - 2))
    assert torch.equal(plain.forward_padded(posts(), lengths_N), main_NC)


def test_whole_encoders_of_two_seeds_answer_together(folder: Path, tmp_path: Path) -> None:
    base = base_of(folder, "bert")
    tokenizer = PostTokenizer.load(base, 32)
    for seed in (1, 2):
        model, info = build_classifier(base, "fp32", len(LABELS), None, seed, "cpu")
        facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=None, labels=LABELS)
        with torch.no_grad():
            model.classifier.classifier.weight.mul_(10 * seed)
        save_adapter(model, tmp_path / str(seed), tokenizer=tokenizer, facts=facts)
    folders = [tmp_path / "1", tmp_path / "2"]
    facts_together(folders)
    own = Adapters.of(Question(AdapterChoice(folders[0], more=(folders[1],))))
    assert [one.weights_sha256 for one in own.members()] == [
        hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest() for one in folders
    ]
    ids, positions, segments, ends, _ = packed(posts(), torch.tensor(LENGTHS), None)
    with torch.no_grad():
        alone = [load_adapter(one, device="cpu").model(ids, positions, segments, ends) for one in folders]
        together = load_ensemble(folders, device="cpu").model(ids, positions, segments, ends)
    assert not torch.allclose(alone[0], alone[1])
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
