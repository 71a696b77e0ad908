"""The update of a step against the whole batch computed by PyTorch alone, and a stopped run against
one that was not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_cosine_schedule_with_warmup

from emotion_train.config import Config
from emotion_train.data.index import read_index
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import KINDS, TargetKind
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import Diverged, WrongRequest
from emotion_train.model.lora import adapter_state, build_classifier
from emotion_train.model.loss import class_weights
from emotion_train.model.staged_copy import stage
from emotion_train.runs.log import read_log
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.training.trainer import Trainer, learning_rate
from tests.helpers.auxiliary_posts import auxiliary_config
from tests.helpers.many_processes import blank_first_posts
from tests.helpers.other_targets import relabel, tiny_folder
from tests.helpers.padded import numbers_of, padded_counters
from tests.helpers.patience import PATIENCE_S
from tests.helpers.plain_loss import plain_loss
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import start_trainer, tiny_config

STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[TargetKind, Path]:
    return {kind: tiny_folder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(folders: dict[TargetKind, Path]) -> Path:
    return folders["one"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@cache
def whole_batch_reference(folder: Path, dropout: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and adapter after a few steps of plain PyTorch: padded batch, PyTorch's own losses,
    AdamW, no packing, no loader.
    """
    config = tiny_config(folder, f"lora.dropout={dropout}")
    store = open_store(config.data.url)
    index = read_index(store)
    split = index.training
    tokenizer = PostTokenizer.load(config.model.base, config.data.max_length)
    labels, auxiliary = len(index.trained_labels), len(index.trained_labels) - len(index.labels)
    model, _ = build_classifier(
        config.model.base, "fp32", labels, config.lora, config.run.seed, "cpu", auxiliary=auxiliary
    )
    sources = [one.labels for one in index.auxiliary.sources] if index.auxiliary is not None else None
    weights_C = torch.tensor(
        class_weights(split.label_counts, config.loss.class_weights), dtype=torch.float32
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.train.learning_rate, weight_decay=config.train.weight_decay
    )
    order = Order(split.row_counts, split.lanes, config.run.seed)
    steps = order.steps(16) * config.train.epochs
    losses = []
    with RowGroupReader(store, split) as reader:
        for step in range(STEPS):
            places = list(zip(*order.epoch(0).locate(order.positions(step, 16)), strict=True))
            rows = [(reader.rows(int(group)), int(row)) for group, row in places]
            texts = [str(rows_.texts[row]) for rows_, row in rows]
            tokens = [torch.from_numpy(one) for one in tokenizer.encode(texts)]
            targets = [rows_.targets[row] or () for rows_, row in rows]
            weight_N = torch.tensor([rows_.weights[row] for rows_, row in rows])
            padded_NL = torch.nn.utils.rnn.pad_sequence(
                tokens, batch_first=True, padding_value=tokenizer.pad_id
            ).long()
            counters = padded_counters(config.run.seed, step, numbers_of(split, places), padded_NL.shape[1])
            logits_NC = model.train().forward_padded(
                padded_NL, torch.tensor([len(one) for one in tokens]), counters
            )
            known = sources and [sources[rows_.known[row]] for rows_, row in rows]
            loss = plain_loss(logits_NC, targets, weight_N, weights_C, index.trained_targets, known)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(
                step, steps, round(steps * 0.05), config.train.learning_rate
            )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, adapter_state(model)


# By another dropout than 0.3 a gradient may come out below AdamW's epsilon, 1e-8 (with 0.1 one of
# 3,840 does, in the second step). Its update is then what summing in this or that order rounds.
@pytest.mark.parametrize(
    ("tokens_per_microbatch", "dropout", "recompute"),
    [
        *((128, 0, "false"), (128, 0.3, "true"), (100_000, 0.3, "false")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((128, 0.3, "false"), (100_000, 0, "false"), (100_000, 0.3, "true")),
                *((300, 0, "false"), (300, 0.3, "false"), (300, 0.3, "true")),
            )
        ),
    ],
)
def test_the_update_is_that_of_the_whole_batch_for_every_cut_into_microbatches(
    folder: Path, stack: ExitStack, tokens_per_microbatch: int, dropout: float, recompute: str
) -> None:
    compare_with_the_whole_batch(folder, stack, tokens_per_microbatch, dropout, recompute)


@pytest.mark.parametrize("kind", ["several", "shares"])
@pytest.mark.parametrize(("tokens_per_microbatch", "dropout"), [(128, 0.3), (300, 0.0)])
def test_so_it_is_for_several_labels_and_for_shares_with_weights_of_posts(
    folders: dict[TargetKind, Path],
    stack: ExitStack,
    kind: TargetKind,
    tokens_per_microbatch: int,
    dropout: float,
) -> None:
    compare_with_the_whole_batch(folders[kind], stack, tokens_per_microbatch, dropout, "false")


@pytest.mark.parametrize(
    ("targets", "tokens_per_microbatch", "dropout"),
    [("one", 128, 0.3), ("one", 100_000, 0.0), ("several", 300, 0.0)],
)
def test_so_it_is_with_auxiliary_posts_whose_sources_know_some_of_the_labels(
    tmp_path: Path, stack: ExitStack, targets: TargetKind, tokens_per_microbatch: int, dropout: float
) -> None:
    auxiliary_config(tmp_path, targets=targets)
    compare_with_the_whole_batch(tmp_path, stack, tokens_per_microbatch, dropout, "false")


def test_a_run_on_shares_of_one_label_is_that_on_one_label_to_the_bit(
    folder: Path, tmp_path: Path, stack: ExitStack
) -> None:
    one_hot = tmp_path / "tiny"
    one_hot.mkdir()
    (one_hot / "base").symlink_to(folder / "base")
    table = {"one": FolderStore(folder / "data"), "shares": FolderStore(one_hot / "data")}
    relabel(table["one"], table["shares"], "shares", weighted=False, mixed=False)
    found = []
    for place in (folder, one_hot):
        trainer = start_trainer(tiny_config(place, "run.id=one-hot", "lora.dropout=0.1"), stack)
        trainer.model.train()
        with contextlib.closing(trainer.train_loader.steps(0)) as batches:
            for batch in islice(batches, STEPS):
                trainer._step(batch)
        found.append((trainer.ledger.add_up(), adapter_state(trainer.bare_model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, found[1][1][name]) for name, one in found[0][1].items())


def compare_with_the_whole_batch(
    folder: Path, stack: ExitStack, tokens_per_microbatch: int, dropout: float, recompute: str
) -> None:
    losses, expected = whole_batch_reference(folder, dropout)
    trainer = start_trainer(
        tiny_config(
            folder,
            f"train.tokens_per_microbatch={tokens_per_microbatch}",
            f"train.gradient_checkpointing={recompute}",
            f"lora.dropout={dropout}",
            f"run.id=cut-{tokens_per_microbatch}-{dropout}-{recompute}",
        ),
        stack,
    )
    trainer.model.train()
    packs = []
    batches = trainer.train_loader.steps(0)
    for batch in islice(batches, STEPS):
        packs.append(len(batch.packs))
        trainer._step(batch)
    batches.close()
    assert max(packs) == 1 if tokens_per_microbatch == 100_000 else min(packs) > 1
    np.testing.assert_allclose([loss.item() for loss in trainer.ledger.losses], losses, rtol=1e-5)
    state = adapter_state(trainer.bare_model)
    moved = 0.0
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=0)
        moved = max(moved, float(tensor.abs().max()) if "lora_B" in name else 0.0)
    assert moved > 1e-3  # the comparison is not between two models that stood still


def stop_after(trainer: Trainer, steps: int) -> None:
    """Let the trainer run, and end it right after that step as a kill would: whatever is not
    committed is lost.
    """

    class Killed(Exception):
        pass

    def tell(progress: object, words: str) -> None:
        if trainer.progress.step >= steps and not words:
            raise Killed

    trainer.tell = tell
    with pytest.raises(Killed):
        trainer.fit()
    drain(trainer)


def drain(trainer: Trainer) -> None:
    assert trainer.saver is not None
    assert trainer.saver.drain(PATIENCE_S)


def fit(config: Config, stack: ExitStack) -> Trainer:
    trainer = start_trainer(config, stack)
    trainer.fit()
    drain(trainer)
    return trainer


@pytest.mark.slow  # quicker: test_resume.py
def test_stopping_and_resuming_ends_with_the_same_adapter(folder: Path, stack: ExitStack) -> None:
    words = ["lora.dropout=0.1", "evaluation.every_steps=3"]
    whole = fit(tiny_config(folder, "run.id=whole", *words), stack)
    for stop in (4, 11):
        stop_after(start_trainer(tiny_config(folder, "run.id=stopped", *words), stack), stop)
    resumed = start_trainer(tiny_config(folder, "run.id=stopped", *words), stack)
    assert resumed.progress.step == 9
    resumed.fit()
    assert resumed.progress.history == whole.progress.history
    assert resumed.progress.examples == whole.progress.examples
    for name, tensor in adapter_state(whole.bare_model).items():
        assert torch.equal(adapter_state(resumed.bare_model)[name], tensor), name
    assert [entry.kind for entry in read_log(open_store(str(folder / "runs")), "stopped")].count("claim") == 3


@pytest.fixture(scope="module")
def ended(folder: Path) -> str:
    """The id of a run of one epoch that came to its end."""
    with ExitStack() as stack:
        fit(tiny_config(folder, "run.id=ended", "train.epochs=1"), stack)
    return "ended"


@pytest.mark.parametrize(
    "change",
    [
        "train.global_batch_size=8",
        "lora.r=8",
        "run.seed=1",
        "loss.class_weights=none",
        "train.epochs=3",
        "train.max_steps=9",
        "data.limit=60",
    ],
)
def test_a_run_is_not_continued_as_another_run(
    folder: Path, ended: str, stack: ExitStack, change: str
) -> None:
    store = open_store(str(folder / "runs"))
    before = read_log(store, ended)
    with pytest.raises(WrongRequest, match=change.split("=")[0].replace(".", r"\.")):
        start_trainer(tiny_config(folder, f"run.id={ended}", "train.epochs=1", change), stack)
    assert read_log(store, ended) == before


def test_a_run_of_so_many_steps_ends_within_an_epoch_with_a_scored_checkpoint(
    folder: Path, stack: ExitStack
) -> None:
    words = ["run.id=short", "train.max_steps=3", "data.limit=60", "train.warmup_ratio=0"]
    trainer = fit(tiny_config(folder, *words), stack)
    assert (trainer.steps, trainer.steps_per_epoch, trainer.progress.step) == (3, 4, 3)
    assert [one["step"] for one in trainer.progress.history] == [3]
    entries = read_log(open_store(str(folder / "runs")), "short")
    assert [entry.step for entry in entries if "macro_f1" in entry.metrics] == [3]
    peak = trainer.config.train.learning_rate
    assert trainer.progress.history[0]["learning_rate"] == learning_rate(2, 3, 0, peak)
    assert trainer.progress.warm_up_examples == 16
    assert 0 < trainer.progress.warm_up_seconds < trainer.progress.train_seconds
    resumed = start_trainer(tiny_config(folder, *words), stack)
    resumed.fit()
    assert resumed.progress.step == 3


def test_packing_and_precision_may_differ_when_a_run_is_continued(
    folder: Path, ended: str, stack: ExitStack
) -> None:
    again = start_trainer(
        tiny_config(
            folder,
            f"run.id={ended}",
            "train.epochs=1",
            "train.tokens_per_microbatch=256",
            "model.precision=bf16",
        ),
        stack,
    )
    assert again.progress.step == again.steps


def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(
    folder: Path, ended: str, tmp_path: Path, stack: ExitStack
) -> None:
    words = [f"run.id={ended}", "train.epochs=1"]
    same, other = (
        causal_checkpoint(tmp_path / "same", "llama"),
        causal_checkpoint(tmp_path / "other", "llama", seed=1),
    )
    start_trainer(tiny_config(folder, *words, f"model.base={same}"), stack)
    with pytest.raises(WrongRequest, match="its weights differ"):
        start_trainer(tiny_config(folder, *words, f"model.base={other}"), stack)


def test_a_run_goes_on_from_a_staged_copy_of_its_base_and_refuses_one_of_another(
    folder: Path, ended: str, tmp_path: Path, stack: ExitStack
) -> None:
    words = [f"run.id={ended}", "train.epochs=1"]
    other = causal_checkpoint(tmp_path / "other", "llama", seed=1)
    for source, name in ((folder / "base", "same"), (other, "another")):
        stage(str(source), str(tmp_path / name), "nf4", "cpu")
    again = start_trainer(
        tiny_config(folder, *words, f"model.base={tmp_path / 'same'}", "model.precision=nf4"), stack
    )
    assert again.progress.step == again.steps
    with pytest.raises(WrongRequest, match="its weights differ"):
        start_trainer(
            tiny_config(folder, *words, f"model.base={tmp_path / 'another'}", "model.precision=nf4"), stack
        )


def test_a_loss_that_is_no_number_stops_the_run(folder: Path, stack: ExitStack) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=nan"), stack)
    with torch.no_grad():
        next(iter(trainer.engine.trained.own)).fill_(float("nan"))
    with pytest.raises(Diverged, match="learning rate"):
        trainer.fit()


def test_the_schedule_is_transformers_cosine_but_for_the_first_step() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 20)
    theirs = []
    for _ in range(20):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    mine = [learning_rate(step, 20, 4, 0.5) for step in range(20)]
    np.testing.assert_allclose(mine[:4], theirs[1:5])
    np.testing.assert_allclose(mine[4:], theirs[4:])
    assert min(mine) > 0


class _Asked(TorchDispatchMode):
    """Notes what makes the host wait for a GPU's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        if operator.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "is_nonzero",
            "_unique2",
        ):
            self.found.append(str(operator))
        return operator(*values, **(named or {}))


def test_a_step_asks_the_device_for_no_number(folder: Path, stack: ExitStack) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=asks"), stack)
    optimizer: Any = trainer.engine.optimizer
    with contextlib.closing(trainer.train_loader.steps(0)) as batches, _Asked() as asked:
        trainer._step(next(batches))
        assert asked.found  # AdamW's count of updates, but not as a GPU computes it:
        asked.found.clear()
        for group in optimizer.param_groups:
            group["fused"] = True
        trainer._step(next(batches))
        assert asked.found == []


def test_a_row_that_turns_bad_weighs_nothing_and_is_counted(folder: Path, stack: ExitStack) -> None:
    trainer = start_trainer(tiny_config(folder, "run.id=bad"), stack)
    blank_first_posts(trainer)
    batches = list(trainer.train_loader.steps(0))
    assert sum(batch.bad_rows for batch in batches) == len(trainer.index.split("train").row_groups)
    bad = next(batch for batch in batches if batch.bad_rows)
    weights = np.concatenate([pack.weights_NC.sum(axis=1) for pack in bad.packs])
    assert (weights == 0).sum() == bad.bad_rows
    assert bad.weight_sum == pytest.approx(float(weights.sum()), rel=1e-5)
