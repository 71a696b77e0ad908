"""Qwen3.5 from prepared posts to a pipeline: the update of a step in any packing, a stopped run
against one that was not, its tokenizer, and a published run.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from emotion_train import cli
from emotion_train.config import Config, load_config
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, open_classifier
from emotion_train.exporting.export import export
from emotion_train.model.lora import adapter_state
from emotion_train.preparation.steps import prepare
from emotion_train.runs.published import download
from emotion_train.train import _look_at_base
from launch.workload import refuse_unfused_fp8, shape_of_base
from tests.emotion_train.training.test_engines import ENGINES
from tests.helpers.many_processes import Crew, Leg, some_steps
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import start_trainer, tiny_words, write_posts

KIND = "qwen3_5_text"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAIRS = ("t h", "th e", "Ġ the", "e r", "Ġ a", "a n", "an d")
STEPS, RATE = 3, 1e-3
TEXTS = ["tea rain quiet", "party <|im_end|> laugh<|endoftext|>", "stars " * 60, "", "cafe\u0301 ✨ don't"]


def qwen_tokenizer(folder: Path) -> None:
    """A small tokenizer of Qwen3.5's own class, with its normalisation and its pattern: no BOS, and
    padding by the token that ends a document.
    """
    from tokenizers import pre_tokenizers
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(pair.replace(" ", "") for pair in PAIRS)]
    made = Qwen3_5Tokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[tuple(pair.split()) for pair in PAIRS],
        additional_special_tokens=list(SPECIALS[1:]),
    )
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_5")
    prepare(str(write_posts(folder / "source")), str(folder / "data"))
    causal_checkpoint(folder / "base", KIND, num_hidden_layers=4, vocab_size=288, initializer_range=0.1)
    for path in folder.glob("base/tokenizer*"):
        path.unlink()
    qwen_tokenizer(folder / "base")
    return folder


def config(folder: Path, *more: str) -> Config:
    return load_config(None, tiny_words(folder, f"train.learning_rate={RATE}", *more))


def trained(folder: Path, *more: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    with ExitStack() as stack:
        trainer = start_trainer(config(folder, *more), stack)
        _, losses = some_steps(trainer, STEPS)
        return losses, adapter_state(trainer.bare_model)


def assert_near(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To 1e-5, but for one number in a thousand: where a gradient is only what rounding leaves,
    AdamW's update is of the rate's size in any direction.
    """
    assert state.keys() == wanted.keys()
    off = torch.cat([(state[name] - wanted[name]).abs().flatten() for name in wanted])
    assert (off < 1e-5).float().mean() > 0.999
    assert off.max() < 2 * STEPS * RATE


# --- the tokenizer ---


def test_posts_have_the_ids_of_qwen3_5_s_tokenizer_and_their_special_tokens_are_text(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder / "base", trust_remote_code=False)
    ours = PostTokenizer.load(str(folder / "base"), 64)
    special = theirs.convert_tokens_to_ids(SPECIALS[0])
    assert (ours.bos_id, ours.end_id, ours.pad_id) == (None, None, special)
    assert set(SPECIALS) <= set(ours.control_tokens)
    ours.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for text, ids in zip(TEXTS, ours.encode_whole(TEXTS), strict=True):
        plain = theirs(text, split_special_tokens=True)["input_ids"] or [special]
        assert ids.tolist() == plain
        assert (again(text)["input_ids"] or [special]) == plain
        assert special not in ids.tolist() or not text
    assert ours.encode_whole(["cafe\u0301"])[0].tolist() == ours.encode_whole(["caf\u00e9"])[0].tolist()


# --- training ---


@pytest.mark.slow  # quicker: gradients of packs, in test_delta_net.py
def test_the_update_does_not_depend_on_the_packing_or_on_recomputation(folder: Path) -> None:
    more = ("lora.dropout=0.1", "lora.targets=all-linear")
    losses, wanted = trained(folder, "run.id=whole", *more, "train.tokens_per_microbatch=4096")
    other = ("train.tokens_per_microbatch=140", "train.gradient_checkpointing=true")
    found, state = trained(folder, "run.id=parts", *more, *other)
    assert found == pytest.approx(losses, rel=1e-5)
    assert_near(state, wanted)


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(folder: Path) -> None:
    more = ("lora.dropout=0.1", "train.tokens_per_microbatch=200", "model.layers=3")
    _, wanted = trained(folder, "run.id=unbroken", *more)
    with ExitStack() as stack:
        trainer = start_trainer(config(folder, "run.id=stopped", *more), stack)
        some_steps(trainer, 1)
        trainer._save({})
        assert trainer.saver is not None
        assert trainer.saver.drain(60)
    with ExitStack() as stack:
        resumed = start_trainer(config(folder, "run.id=stopped", *more), stack)
        assert resumed.progress.step == 1
        some_steps(resumed, STEPS - 1)
        state = adapter_state(resumed.bare_model)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert {name.split(".")[4] for name in wanted if ".layers." in name} == {"0", "1", "2"}


@pytest.mark.slow
def test_two_processes_do_what_one_does_by_every_engine(folder: Path, tmp_path: Path) -> None:
    more = (f"train.learning_rate={RATE}", "train.tokens_per_microbatch=200")
    legs = [
        Leg(engine, tiny_words(folder, f"run.id=two{number}", *more), STEPS, str(tmp_path / f"two{number}"))
        for number, engine in enumerate(ENGINES)
    ]
    with Crew(tmp_path, 2) as crew:
        together = crew.train(legs)
    losses, alone = trained(folder, "run.id=alone", "train.tokens_per_microbatch=200")
    for found in together:
        assert found.losses == pytest.approx(losses, rel=1e-5)
        assert_near(found.adapter, alone)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_published_run_answers_the_same_from_its_folder_and_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import pipeline

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = tiny_words(folder, "run.id=published", "train.epochs=1", "model.layers=3")
    assert cli.main(["train", *given]) == 0
    url = f"{folder}/runs/published"
    download(url, tmp_path / "pulled")
    classifier = open_classifier(AdapterChoice(tmp_path / "pulled", device="cpu"))
    texts = [text for text in TEXTS if text]
    ours = [one.probabilities for one in classifier.predict(texts)]
    card = (tmp_path / "pulled" / "README.md").read_text(encoding="utf-8")
    assert "on q_proj, k_proj, v_proj, o_proj, in_proj_qkv, in_proj_z, out_proj" in card
    made = export(url, str(tmp_path / "export"), dtype="fp32", compare=6, device="cpu")
    assert made.change is not None
    assert made.change.largest < 1e-5
    document = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert document["architectures"] == ["Qwen3_5TextForSequenceClassification"]
    assert (document["model_type"], document["num_hidden_layers"]) == (KIND, 3)
    readme = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert """--convert classify --hf-overrides '{"architectures": ["Qwen3_5ForCausalLM"]}'""" in readme
    served = pipeline("text-classification", model=str(tmp_path / "export"), dtype=torch.float32)
    answers = served(texts, top_k=None, truncation=True, max_length=128, batch_size=4)
    for probabilities, answer in zip(ours, answers, strict=True):
        for one in answer:
            assert math.isclose(one["score"], probabilities[one["label"]], abs_tol=1e-5)


# --- what it cannot ---


def test_fp8_is_refused_before_anything_is_read(folder: Path) -> None:
    asked = config(folder, "model.precision=fp8")
    shape = shape_of_base(asked.model.base, asked.model.layers)
    with pytest.raises(WrongRequest, match="fp8"):
        refuse_unfused_fp8(asked, shape, "model.precision=")
    _look_at_base(config(folder, "model.precision=nf4"))
