"""Several processes do what one does, whatever the engine: the same losses, parameters and moments
to 1e-5, every post scored once.

The comparison is with the whole batch of a step computed by PyTorch alone, in one process, without
packs, loader or engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch

from emotion_train.config import load_config
from emotion_train.data.index import read_index
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import KINDS, TargetKind
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.lora import adapter_state, build_classifier
from emotion_train.model.loss import class_weights
from emotion_train.storage.open import open_store
from emotion_train.training.engines import Kind, asked_for, deepspeed_config, make_engine, start_accelerator
from emotion_train.training.trainer import learning_rate
from tests.helpers.auxiliary_posts import auxiliary_config
from tests.helpers.many_processes import Crew, Leg, Outcome, train_leg
from tests.helpers.other_targets import tiny_folder
from tests.helpers.padded import numbers_of, padded_counters
from tests.helpers.plain_loss import plain_loss
from tests.helpers.tiny_runs import start_trainer, tiny_config, tiny_words

ENGINES: tuple[Kind, ...] = ("DDP", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3", "FSDP2")
DECAY = 0.8  # of train.ema where a run moves
WRAPPERS = {
    "DDP": "DistributedDataParallel",
    "DeepSpeed ZeRO-2": "DeepSpeedEngine",
    "DeepSpeed ZeRO-3": "DeepSpeedEngine",
    "FSDP2": "FSDPEmotionClassifier",
}


class Case(NamedTuple):
    """A run to compare: posts a step, tokens a pack, whether gradients are clipped, whether rows
    turn bad, how many steps, and dropout.
    """

    batch: int
    tokens: int
    clip: str
    blank: bool
    steps: int
    dropout: float

    def words(self, folder: Path, run_id: str) -> list[str]:
        given = {
            "global_batch_size": self.batch,
            "tokens_per_microbatch": self.tokens,
            "learning_rate": 0.001,
            "epochs": 1,
        }
        values = [f"train.{name}={value}" for name, value in {**given, "max_grad_norm": self.clip}.items()]
        values.append(f"lora.dropout={self.dropout}")
        return tiny_words(folder, f"run.id={run_id}", "checkpoint.every_seconds=null", *values)


# 108 posts: the last step of the first case has 8; that of the second has one, so that all ranks
# but one have none
CASES = {
    "uneven packs and tail, clipped": Case(25, 200, "0.05", False, 5, 0.1),
    "bad rows, empty tail, not clipped": Case(107, 600, "null", True, 2, 0.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[TargetKind, Path]:
    """Data sets of each kind of targets; all but those of one label have weights of posts."""
    return {kind: tiny_folder(tmp_path_factory.mktemp("tiny") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(folders: dict[TargetKind, Path]) -> Path:
    return folders["one"]


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Crew]:
    with Crew(folder, 2) as crew:
        yield crew


def alone(folder: Path, leg: Leg, device: str = "cpu") -> Outcome:
    """What one process makes of the leg: this one, or one of its own on a GPU."""
    if device != "cpu":
        with Crew(folder, 1, on_cpu=False) as crew:
            return crew.train([leg])[0]
    with ExitStack() as stack:
        return train_leg(leg, start_trainer(load_config(None, leg.words), stack))


class Reference(NamedTuple):
    losses: list[float]
    adapter: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]


@cache
def whole_batches(folder: Path, case: Case, device: str = "cpu") -> Reference:
    """Plain PyTorch: padded batch, PyTorch's own losses of the good rows, AdamW."""
    config = tiny_config(folder, *case.words(folder, "reference")[3:])
    store = open_store(config.data.url)
    index = read_index(store)
    split = index.training
    tokenizer = PostTokenizer.load(config.model.base, config.data.max_length)
    labels, auxiliary = len(index.trained_labels), len(index.trained_labels) - len(index.labels)
    model, _ = build_classifier(
        config.model.base, "fp32", labels, config.lora, config.run.seed, device, auxiliary=auxiliary
    )
    sources = [one.labels for one in index.auxiliary.sources] if index.auxiliary is not None else None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights_C = torch.tensor(
        class_weights(split.label_counts, config.loss.class_weights), dtype=torch.float32, device=device
    )
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay
    )
    order = Order(split.row_counts, split.lanes, config.run.seed)
    steps = order.steps(case.batch)
    losses, states = [], []
    with RowGroupReader(store, split) as reader:
        for step in range(case.steps):
            places = list(zip(*order.epoch(0).locate(order.positions(step, case.batch)), strict=True))
            places = [(group, row) for group, row in places if not (case.blank and row == 0)]
            rows = [(reader.rows(int(group)), int(row)) for group, row in places]
            texts = [str(found.texts[row]) for found, row in rows]
            tokens = [torch.from_numpy(one) for one in tokenizer.encode(texts)]
            targets = [found.targets[row] or () for found, row in rows]
            weight_N = torch.tensor([found.weights[row] for found, row in rows], device=device)
            padded_NL = torch.nn.utils.rnn.pad_sequence(
                tokens, batch_first=True, padding_value=tokenizer.pad_id
            ).long()
            numbers, length = numbers_of(split, places), padded_NL.shape[1]
            logits_NC = model.train().forward_padded(
                padded_NL.to(device),
                torch.tensor([len(one) for one in tokens]),
                padded_counters(config.run.seed, step, numbers, length, device),
            )
            known = sources and [sources[found.known[row]] for found, row in rows]
            loss = plain_loss(logits_NC, targets, weight_N, weights_C, index.trained_targets, known)
            loss.backward()
            if config.train.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), config.train.max_grad_norm)
            rate = learning_rate(
                step, steps, round(steps * config.train.warmup_ratio), config.train.learning_rate
            )
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            states.append(adapter_state(model))
    moments = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in trained.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    moments = {name: moment.cpu() for name, moment in moments.items()}
    return Reference(losses, states[-1], moments, mean_of(states, DECAY))


def mean_of(states: Sequence[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The mean of states of which each older one counts `decay` times the next."""
    weights = [decay ** (len(states) - 1 - number) for number in range(len(states))]
    return {
        name: sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True))  # type: ignore[misc]
        / sum(weights)
        for name in states[0]
    }


def same_as(outcome: Outcome, expected: Reference) -> None:
    """Losses, parameters and moments to 1e-5; of the moments to 1e-5 of the largest, because Adam
    would hide a wrong scale of gradients, and twice that of the squares.
    """
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-5)
    assert outcome.adapter.keys() == expected.adapter.keys()
    for name, tensor in expected.adapter.items():
        torch.testing.assert_close(outcome.adapter[name], tensor, atol=1e-5, rtol=0)
    assert outcome.moments.keys() == expected.moments.keys()
    for key, tolerance in (("exp_avg.", 1e-5), ("exp_avg_sq.", 2e-5)):
        names = [name for name in expected.moments if name.startswith(key)]
        largest = max(float(expected.moments[name].abs().max()) for name in names)
        for name in names:
            torch.testing.assert_close(
                outcome.moments[name], expected.moments[name], atol=tolerance * largest, rtol=0
            )
    # the comparison is not between two models that stood still
    assert (
        max(float(tensor.abs().max()) for name, tensor in expected.adapter.items() if "lora_B" in name) > 1e-3
    )


def compare(folder: Path, crew: Crew, engines: Sequence[Kind], device: str = "cpu") -> None:
    """Every engine against the whole batch, and what they predict against each other."""
    legs, cases = [], []
    for engine, (place, case) in product(engines, enumerate(CASES.values())):
        name = f"{device}{crew.count}-{engine.replace(' ', '-')}-{place}"
        legs.append(Leg(engine, case.words(folder, name), case.steps, f"{folder}/{name}", case.blank))
        cases.append(case)
    probabilities: dict[Case, dict[str, list[float]]] = {}
    for leg, case, outcome in zip(legs, cases, crew.train(legs), strict=True):
        assert (outcome.world_size, outcome.wrapper) == (crew.count, WRAPPERS[leg.engine])
        assert (outcome.bad_rows > 0) == case.blank
        same_as(outcome, whole_batches(folder, case, device))
        first = probabilities.setdefault(case, outcome.probabilities)
        assert outcome.probabilities.keys() == first.keys()
        for post, row in outcome.probabilities.items():
            np.testing.assert_allclose(row, first[post], atol=1e-5)


@pytest.mark.parametrize(
    "engines",
    [("DDP",), pytest.param(ENGINES, marks=pytest.mark.slow)],  # quicker: a run moves between them all
    ids=["DDP", "all"],
)
def test_every_engine_takes_the_step_of_the_whole_batch(
    folder: Path, two: Crew, engines: Sequence[Kind]
) -> None:
    compare(folder, two, engines)


@pytest.mark.parametrize("kind", ["several", pytest.param("shares", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "engines", [("DDP",), pytest.param(ENGINES, marks=pytest.mark.slow)], ids=["DDP", "all"]
)
def test_so_it_does_for_several_labels_and_for_shares_with_weights_of_posts(
    folders: dict[TargetKind, Path], two: Crew, engines: Sequence[Kind], kind: TargetKind
) -> None:
    compare(folders[kind], two, engines)


@pytest.mark.slow  # quicker: one process takes that step, in test_trainer.py
@pytest.mark.parametrize("engines", [("DDP",), ENGINES], ids=["DDP", "all"])
def test_so_it_does_with_auxiliary_posts(tmp_path: Path, two: Crew, engines: Sequence[Kind]) -> None:
    auxiliary_config(tmp_path)
    compare(tmp_path, two, engines)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
def test_more_processes_take_the_step_of_the_whole_batch_too(
    folders: dict[TargetKind, Path], count: int
) -> None:
    with Crew(folders["one"], count) as crew:
        for folder in folders.values():
            compare(folder, crew, ENGINES)


@pytest.mark.parametrize("tokens", [128, pytest.param(200, marks=pytest.mark.slow), 100_000])
@pytest.mark.parametrize("kind", ["one", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_one_process_takes_the_step_of_the_whole_batch_in_any_number_of_micro_batches(
    folders: dict[TargetKind, Path], tokens: int, kind: TargetKind
) -> None:
    folder = folders[kind]
    for place, case in enumerate(CASES.values()):
        words = [*case.words(folder, f"p1-{place}-{tokens}"), f"train.tokens_per_microbatch={tokens}"]
        leg = Leg("one process", words, case.steps, "", case.blank)
        outcome = alone(folder, leg)
        same_as(outcome, whole_batches(folder, case))
        assert max(outcome.packs) == 1 if tokens == 100_000 else max(outcome.packs) > 1


def move(folder: Path, crew: Crew, engines: Sequence[Kind], device: str = "cpu") -> None:
    """Each leg goes on from the checkpoint of the one before it, the last in one process; together
    they are one run of one process.
    """
    case = CASES["uneven packs and tail, clipped"]
    words = [*case.words(folder, f"moving-{device}"), f"train.ema={DECAY}"]
    steps = [1] * (len(engines) - 1) + [case.steps - len(engines)]
    legs = [
        Leg(engine, words, count, f"{folder}/moving-{number}")
        for number, (engine, count) in enumerate(zip(engines, steps, strict=True))
    ]
    outcomes = crew.train(legs)
    outcomes.append(alone(folder, Leg("one process", words, 1, f"{folder}/moved"), device))
    assert [outcome.first_step for outcome in outcomes] == [
        sum(steps[:number]) for number in range(len(steps) + 1)
    ]
    losses = [loss for outcome in outcomes for loss in outcome.losses]
    expected = whole_batches(folder, case, device)
    same_as(Outcome(**{**vars(outcomes[-1]), "losses": losses}), expected)
    for name, tensor in expected.average.items():
        torch.testing.assert_close(outcomes[-1].average[name].double(), tensor, atol=1e-5, rtol=0)
    differs = [float((mean - expected.adapter[name]).abs().max()) for name, mean in expected.average.items()]
    assert max(differs) > 1e-4


def test_a_run_moves_between_engines_and_numbers_of_processes(folder: Path, two: Crew) -> None:
    move(folder, two, ENGINES)


def test_a_base_that_is_cut_under_the_fused_decoder_takes_the_step_of_the_whole_batch(
    folder: Path, two: Crew
) -> None:
    """The second case recomputes; the passes go up and down the blocks."""
    legs = []
    for place, case in enumerate(CASES.values()):
        words = [*case.words(folder, f"cut-{place}"), f"train.gradient_checkpointing={place == 1}"]
        legs.append(Leg("FSDP2", words, case.steps, f"{folder}/cut-{place}", case.blank, plain=True))
    for case, outcome in zip(CASES.values(), two.train(legs), strict=True):
        assert (outcome.world_size, outcome.wrapper) == (2, "DistributedDataParallel")
        same_as(outcome, whole_batches(folder, case))


def test_4_bit_codes_are_cut_under_the_fused_decoder_as_they_are(folder: Path, two: Crew) -> None:
    agree_to_rounding(folder, two, ["FSDP2"], "nf4", plain=True)


def test_evaluations_while_a_slow_reader_makes_the_next_steps_change_no_step(folder: Path, two: Crew) -> None:
    """Then two loaders ask the ranks to agree at the same time."""

    def leg(kind: Kind) -> Leg:
        values = ["train.global_batch_size=8", "train.max_steps=6", "evaluation.every_steps=1"]
        name = f"late-{kind.replace(' ', '-')}"
        words = tiny_words(folder, f"run.id={name}", "checkpoint.every_seconds=null", *values)
        return Leg(kind, words, None, f"{folder}/{name}", late_s=0.02)

    single, (together,) = alone(folder, leg("one process")), two.train([leg("DDP")])
    assert len(together.losses) == 6
    np.testing.assert_allclose(together.losses, single.losses, rtol=1e-5)
    for name, tensor in single.adapter.items():
        torch.testing.assert_close(together.adapter[name], tensor, atol=1e-4, rtol=0)


def agree_to_rounding(
    folder: Path,
    crew: Crew,
    engines: Sequence[Kind],
    precision: str,
    *words: str,
    device: str = "cpu",
    plain: bool = False,
) -> None:
    """Two processes of every engine against one process, in a format that rounds; fp8 keeps three
    bits, and its gradients agree less. `plain` as of a `Leg` is for the two.
    """

    def leg(engine: Kind, count: int) -> Leg:
        name = f"{device}{count}-{precision}-{engine.replace(' ', '-')}{'-plain' if plain else ''}"
        values = [
            "checkpoint.every_seconds=null",
            "train.global_batch_size=24",
            "train.learning_rate=0.001",
            "train.max_grad_norm=null",
        ]
        return Leg(
            engine,
            tiny_words(folder, f"run.id={name}", f"model.precision={precision}", *values, *words),
            4,
            f"{folder}/{name}",
            plain=plain and count > 1,
        )

    single = alone(folder, leg("one process", 1), device)
    for outcome in crew.train([leg(engine, 2) for engine in engines]):
        np.testing.assert_allclose(outcome.losses, single.losses, rtol=5e-3)
        assert cosine(outcome.moments, single.moments) > (0.998 if precision == "fp8" else 0.999)
        for post, row in single.probabilities.items():
            np.testing.assert_allclose(outcome.probabilities[post], row, atol=2e-2)


def cosine(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of the gradients that AdamW has seen."""
    names = [name for name in theirs if name.startswith("exp_avg.")]
    assert mine.keys() == theirs.keys()
    ours, other = (torch.cat([one[name].flatten() for name in names]) for one in (mine, theirs))
    return float(torch.cosine_similarity(ours, other, dim=0))


@pytest.mark.slow  # quicker: 4-bit codes that are cut, below
@pytest.mark.parametrize("engines", [("FSDP2",), ENGINES], ids=["FSDP2", "all"])
def test_a_4_bit_base_is_trained_alike_by_every_engine(
    folder: Path, two: Crew, engines: Sequence[Kind]
) -> None:
    agree_to_rounding(folder, two, engines, "nf4")


@pytest.mark.slow
def test_a_bfloat16_base_is_trained_alike_by_every_engine(folder: Path, two: Crew) -> None:
    agree_to_rounding(folder, two, ENGINES, "bf16")


# --- what was asked for is what runs ---


def test_accelerate_s_environment_names_the_engine() -> None:
    deepspeed = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "WORLD_SIZE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }
    found = [
        asked_for({}),
        asked_for({"WORLD_SIZE": "1"}),
        asked_for({"WORLD_SIZE": "2"}),
        asked_for({**deepspeed, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        asked_for({**deepspeed, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
        asked_for(
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "WORLD_SIZE": "2",
                "FSDP_OFFLOAD_PARAMS": "false",
            }
        ),
    ]
    assert found == ["one process", "one process", *get_args(Kind)[1:]]


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
    ],
)
def test_settings_of_accelerate_that_would_have_no_effect_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(WrongRequest, match="The accelerate config asks for"):
        asked_for(environment)


def test_one_process_where_several_were_asked_for_is_refused() -> None:
    # what `accelerate launch --num_processes 2` makes of distributed_type NO
    with pytest.raises(WrongRequest, match="accelerate started one process where several were asked for"):
        start_accelerator(
            60, {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_no_reason_to_take_the_cpu() -> None:
    with pytest.raises(WrongRequest, match="CUDA sees no GPU"):
        start_accelerator(60, {})


def test_deepspeed_clips_and_accumulates_as_the_run_config_says(folder: Path) -> None:
    config = tiny_config(folder)
    for value, told in ((0.25, 0.25), (None, 0.0)):
        settings = deepspeed_config(2, config.train.model_copy(update={"max_grad_norm": value}), 1000)
        assert settings["gradient_clipping"] == told  # DeepSpeed takes 0 for off
        assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (1, 1)


def test_an_engine_refuses_an_adapter_of_another_shape(folder: Path) -> None:
    config = tiny_config(folder)
    model, _ = build_classifier(config.model.base, "fp32", 4, config.lora, 0, "cpu")
    engine = make_engine("one process", model, config.train, torch.device("cpu"))
    state = {name: tensor.clone() for name, tensor in engine.adapter().items()}
    name = next(iter(state))
    with pytest.raises(WrongRequest, match=f"lacks {name}"):
        engine.load_adapter({other: tensor for other, tensor in state.items() if other != name})
    with pytest.raises(WrongRequest, match="of shape"):
        engine.load_adapter({**state, name: state[name][1:]})
