"""A run with auxiliary posts is resumed as any other, and publishes what knows the main labels
alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emotion_train import api, cli
from emotion_train.data.index import read_index
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.text_filter import TextFilter, keys_of
from emotion_train.edges.bounded import tensors_in
from emotion_train.evaluation.predictions import (
    Predictions,
    any_predictions_from_parquet,
    predictions_key,
    texts_from_parquet,
)
from emotion_train.model.head import TrainedRows
from emotion_train.model.lora import of_main_labels
from emotion_train.report.schema import Report
from emotion_train.runs.checkpoint import best_adapter
from emotion_train.runs.log import final_entry, read_log, read_part
from emotion_train.runs.published import download, training_filter
from emotion_train.storage.open import open_store
from emotion_train.training.finish import _of_all_rows
from tests.helpers.auxiliary_posts import ELSEWHERE, OTHERS, auxiliary_config, prepare_auxiliary
from tests.helpers.tiny_runs import SIZES, tiny_words

WORDS = ("train.epochs=1", "train.global_batch_size=24", "report.texts=true", "report.floor_max_rows=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run "whole" was published, and "stopped" after it was resumed."""
    folder = tmp_path_factory.mktemp("auxiliary")
    auxiliary_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        words = {name: tiny_words(folder, *WORDS, f"run.id={name}") for name in ("whole", "stopped")}
        assert cli.main(["train", *words["whole"]]) == 0
        assert cli.main(["train", "--stop-after-step", "4", *words["stopped"]]) == 33
        assert cli.main(["train", *words["stopped"]]) == 0
    return folder


def best_of(folder: Path, run_id: str) -> dict[str, torch.Tensor]:
    store = open_store(str(folder / "runs"))
    found = best_adapter(store, run_id, read_log(store, run_id), print)
    assert found is not None
    return tensors_in(found[1])


def test_a_stopped_run_ends_with_the_adapter_and_the_whole_head_of_one_that_was_not(folder: Path) -> None:
    whole, stopped = best_of(folder, "whole"), best_of(folder, "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    (head,) = (tensor for name, tensor in whole.items() if name.endswith("score.weight"))
    assert len(head) == len(SIZES) + len(OTHERS) + len(set(ELSEWHERE) - SIZES.keys())


def test_what_is_published_knows_the_main_labels_alone_and_answers_as_its_report_says(folder: Path) -> None:
    download(f"{folder / 'runs'}/whole", pulled := folder / "pulled")
    report = Report.model_validate_json((pulled / "report" / "report.json").read_bytes())
    assert report.labels == tuple(SIZES)
    assert report.dataset.label_counts["train"] == tuple(SIZES.values())
    assert any("94 auxiliary posts" in remark for remark in report.warnings)
    classifier = api.load_adapter(pulled, device="cpu")
    assert classifier.labels == tuple(SIZES)
    for split in report.splits:
        raw = (pulled / "report" / predictions_key(split)).read_bytes()
        predictions, texts = any_predictions_from_parquet(raw), texts_from_parquet(raw)
        assert isinstance(predictions, Predictions)
        assert predictions.prob_NC.shape[1] == len(SIZES)
        assert texts is not None
        again_NC = classifier.probabilities([texts[post] for post in predictions.ids])
        np.testing.assert_allclose(again_NC, predictions.prob_NC, atol=1e-6)
    trained = {name: tensor for name, tensor in best_of(folder, "whole").items() if "score" in name}
    published = tensors_in((pulled / "adapter_model.safetensors").read_bytes())
    for name, tensor in trained.items():
        assert published[name].shape == tensor[: len(SIZES)].shape
        ratio = published[name] / tensor[: len(SIZES)]  # the temperature is in it, one number for all
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-5, atol=0)


def test_the_texts_of_auxiliary_posts_are_in_the_filter_of_the_training_posts(folder: Path) -> None:
    store, runs = open_store(str(folder / "data")), open_store(str(folder / "runs"))
    auxiliary = read_index(store).auxiliary
    assert auxiliary is not None
    part = training_filter(final_entry(runs, "whole"))
    assert part is not None
    trained_on = TextFilter.from_bytes(read_part(runs, "whole", part), "whole")
    with RowGroupReader(store, auxiliary.split) as reader:
        groups = range(len(auxiliary.split.row_groups))
        texts = [text or "" for group in groups for text in reader.rows(group).texts]
    assert len(texts) == 94
    assert trained_on.contains(keys_of(texts)).all()
    assert not trained_on.contains(keys_of(["a text that nobody wrote"])).any()


def test_outside_of_training_the_head_is_that_of_the_main_labels_to_the_bit() -> None:
    whole = torch.nn.Linear(64, 28, bias=False)
    published = torch.nn.Linear(64, 15, bias=False)
    (rows,) = of_main_labels({"base_model.model.score.weight": whole.weight.detach()}, 15).values()
    published.weight = torch.nn.Parameter(rows)
    hidden_NH = torch.randn(33, 64)
    head = TrainedRows(whole, 15)
    assert torch.equal(head.train()(hidden_NH), whole(hidden_NH))
    assert torch.equal(head.eval()(hidden_NH), published(hidden_NH))


def test_a_temperature_of_each_label_leaves_the_rows_of_auxiliary_labels(tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path, targets="several")
    assert _of_all_rows((2.0, 1.0, 0.5, 1.25), index) == (2.0, 1.0, 0.5, 1.25, 1.0, 1.0, 1.0)
    assert _of_all_rows((1.5,), index) == (1.5,)
