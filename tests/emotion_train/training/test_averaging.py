"""The mean of adapter and head over the steps: against a plain loop over the weights of each step,
through a stop, and in what is scored, saved and published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest
import torch

from emotion_train.config import load_config
from emotion_train.edges.bounded import tensors_in
from emotion_train.errors import Damaged, WrongRequest
from emotion_train.model.lora import adapter_state
from emotion_train.runs import checkpoint
from emotion_train.runs.log import Entry, read_log
from emotion_train.sizing.memory import estimate
from emotion_train.sizing.recipe import Recipe
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from emotion_train.training.trainer import Trainer
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_runs import start_trainer, tiny_config

DECAY = 0.9
EMA = f"train.ema={DECAY}"
WORDS = ("lora.targets=[q_proj,v_proj]", "train.global_batch_size=24")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(folder)
    return folder


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def trained(
    folder: Path, stack: ExitStack, run_id: str, steps: int, *words: str
) -> tuple[Trainer, list[Tensors]]:
    """A trainer after so many steps, its last state in the log, and the weights after each step."""
    trainer = start_trainer(tiny_config(folder, *WORDS, f"run.id={run_id}", *words), stack)
    trainer.model.train()
    states = []
    epoch, first = divmod(trainer.progress.step, trainer.steps_per_epoch)
    with contextlib.closing(trainer.train_loader.steps(epoch, first)) as batches:
        for batch in islice(batches, steps):
            trainer._step(batch)
            states.append(adapter_state(trainer.bare_model))
    trainer._save({})
    assert trainer.saver is not None
    assert trainer.saver.drain(PATIENCE_S)
    return trainer, states


def entries(folder: Path, run_id: str) -> list[Entry]:
    log = read_log(open_store(str(folder / "runs")), run_id)
    return [entry for entry in log if entry.kind == "checkpoint"]


def test_it_is_the_mean_of_a_plain_loop_over_the_weights_of_each_step(folder: Path, stack: ExitStack) -> None:
    trainer, states = trained(folder, stack, "plain", 4, EMA)
    mean = trainer.average.whole()
    for name, tensor in mean.items():
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for state in states:
            total = DECAY * total + (1 - DECAY) * state[name]
        torch.testing.assert_close(tensor.double(), total / (1 - DECAY ** len(states)), atol=1e-7, rtol=1e-5)
    moved = [float((mean[name] - tensor).abs().max()) for name, tensor in states[-1].items()]
    assert max(moved) > 1e-3


def test_a_stopped_run_has_the_mean_and_the_weights_of_one_that_was_not_to_the_bit(
    folder: Path, stack: ExitStack
) -> None:
    whole, _ = trained(folder, stack, "whole", 4, EMA)
    trained(folder, stack, "stopped", 2, EMA)
    again, _ = trained(folder, stack, "stopped", 2, EMA)
    assert again.progress.step == 4
    for mine, other in (
        (whole.state().adapter, again.state().adapter),
        (whole.average.whole(), again.average.whole()),
    ):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_training_takes_the_same_steps_with_it_as_without(folder: Path, stack: ExitStack) -> None:
    _, with_it = trained(folder, stack, "with", 3, EMA)
    _, without = trained(folder, stack, "without", 3)
    assert all(torch.equal(tensor, without[-1][name]) for name, tensor in with_it[-1].items())


def test_the_mean_is_scored_saved_beside_the_weights_and_published(folder: Path, stack: ExitStack) -> None:
    trainer, states = trained(folder, stack, "scored", 5, EMA)  # an epoch
    mean = trainer.average.whole()
    trainer._evaluate()
    assert trainer.saver is not None
    assert trainer.saver.drain(PATIENCE_S)
    assert all(torch.equal(one, states[-1][name]) for name, one in adapter_state(trainer.bare_model).items())
    store, log = open_store(str(folder / "runs")), entries(folder, "scored")
    assert [part.key.rsplit("/")[-1] for part in log[-1].parts].count(checkpoint.AVERAGE) == 1
    found = checkpoint.best_adapter(store, "scored", log, print)
    assert found is not None
    best = tensors_in(found[1])
    assert best.keys() == mean.keys()
    assert all(torch.equal(tensor, best[name]) for name, tensor in mean.items())
    trainer.engine.load_adapter(best)
    scored = trainer.score(trainer.validation_loader, lambda done: None)
    assert trainer._figures(scored)["macro_f1"] == trainer.progress.history[-1]["macro_f1"]


def test_a_state_that_is_saved_while_the_mean_is_scored_has_the_weights(
    folder: Path, stack: ExitStack
) -> None:
    trainer, states = trained(folder, stack, "while", 5, EMA)
    mean = trainer.average.whole()
    saved = []

    def save(progress: object, words: str) -> None:
        if words:
            saved.append(trainer.state())

    trainer.tell = save
    trainer._evaluate()
    assert saved
    for state in saved:
        assert all(torch.equal(tensor, states[-1][name]) for name, tensor in state.adapter.items())
        assert all(torch.equal(tensor, mean[name]) for name, tensor in state.average.items())
    assert len(saved[0].average) == len(mean)


def test_another_decay_is_another_run_and_a_run_before_there_was_one_has_none(
    folder: Path, stack: ExitStack
) -> None:
    trained(folder, stack, "before", 1)
    (entry,) = entries(folder, "before")
    store = open_store(str(folder / "runs"))
    document = checkpoint.read_document(store, "before", entry)
    del document["config"]["train"]["ema"]
    index = start_trainer(tiny_config(folder, *WORDS, "run.id=before"), stack).index
    config = tiny_config(folder, *WORDS, "run.id=before")
    assert checkpoint.check_same_question(document, config, index, entry, "before") == []
    other = tiny_config(folder, *WORDS, "run.id=before", EMA)
    with pytest.raises(WrongRequest, match=r"train\.ema \(was 0\.0, is 0\.9\)"):
        checkpoint.check_same_question(document, other, index, entry, "before")


def test_a_mean_of_other_parameters_is_damage(folder: Path, stack: ExitStack) -> None:
    trained(folder, stack, "damaged", 1, EMA)
    (entry,) = entries(folder, "damaged")
    saved = checkpoint.read_saved(open_store(str(folder / "runs")), "damaged", entry)
    assert saved.state().average.keys() == saved.state().adapter.keys()
    saved.files[checkpoint.AVERAGE] = saved.files[checkpoint.OPTIMIZER]
    with pytest.raises(Damaged, match="other parameters"):
        saved.state()


def test_it_is_planned_as_four_bytes_more_of_each_trained_number() -> None:
    shape = Shape.of(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 99,
            "model_type": "llama",
        }
    )
    words = ["data.url=d", "run.output_url=r"]
    without, with_it = (
        Recipe.of(load_config(None, [*words, f"train.ema={one}"]), shape) for one in (0, 0.99)
    )
    less, more = (estimate(recipe, 256, False) for recipe in (without, with_it))
    assert more.optimizer - less.optimizer == 4 * without.trained_parameters
