"""A run that trains on from a published adapter starts as that adapter, says what became of its
labels and posts, and needs it no more from its first checkpoint on.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emotion_train import api
from emotion_train import cli as train_cli
from emotion_train.data.index import read_index
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import DECISION
from emotion_train.evaluation.floors import posts
from emotion_train.evaluation.predictions import predictions_from_parquet
from emotion_train.model.facts import WEIGHTS
from emotion_train.model.lora import adapter_state, with_temperature
from emotion_train.preparation.steps import prepare
from emotion_train.report.schema import Report
from emotion_train.runs.log import read_log
from emotion_train.storage.open import open_store
from emotion_train.train import _look_at_base, _look_at_parent
from emotion_train.training.start import build_model
from launch import cli as launch_cli
from tests.helpers.auxiliary_posts import prepare_auxiliary
from tests.helpers.tiny_adapter import write_weights
from tests.helpers.tiny_runs import job_of, tiny_config, tiny_words

HEAD = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run `runs/tiny` of `data`, pulled into `adapter`, and `more`: the posts without
    "awe", with "fear" instead.
    """
    folder = tmp_path_factory.mktemp("train-on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        tiny_config(folder)
        assert train_cli.main(["train", *tiny_words(folder, "train.epochs=1")]) == 0
    assert launch_cli.main(["pull", str(folder / "runs" / "tiny"), "--to", str(folder / "adapter")]) == 0
    (folder / "more-source").mkdir()
    for path in sorted((folder / "source").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{**row, "label": row["label"].replace("awe", "fear")} for row in csv.DictReader(file)]
        with (folder / "more-source" / path.name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    prepare(str(folder / "more-source"), str(folder / "more"))
    return folder


def words(home: Path, *overrides: str, adapter: str = "adapter") -> list[str]:
    return tiny_words(home, "run.id=next", f"model.adapter={home / adapter}", *overrides)


def started(home: Path, *overrides: str, adapter: str = "adapter") -> dict[str, torch.Tensor]:
    """The state of a run before its first step."""
    config = tiny_config(home, f"model.adapter={home / adapter}", "run.id=fresh", *overrides)
    job = job_of(config)
    base, tokenizer = _look_at_base(config)
    parent = _look_at_parent(config, job.index, base, tokenizer)
    return adapter_state(build_model(replace(job, parent=parent))[0])


def test_before_its_first_step_it_predicts_bit_for_bit_as_its_parent(home: Path, tmp_path: Path) -> None:
    parent = home / "adapter"
    state = started(home)
    warm = tmp_path / "warm"
    shutil.copytree(parent, warm)
    write_weights(warm, state)
    temperature = json.loads((parent / DECISION).read_bytes())["temperature"]
    texts = ["tea rain quiet", "never again stop", "stars"]
    raw = [one.probabilities for one in api.load_adapter(warm, device="cpu").predict(texts)]
    told = api.load_adapter(parent, device="cpu").predict(texts, raw=True)
    for own, one in zip(raw, told, strict=True):
        np.testing.assert_allclose(list(own.values()), list(one.probabilities.values()), rtol=1e-5)
    if temperature is None:
        assert raw == [one.probabilities for one in told]


def test_a_parent_without_a_temperature_is_taken_to_the_last_bit(home: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(home / "adapter", plain)
    decision = json.loads((plain / DECISION).read_bytes())
    (plain / DECISION).write_text(json.dumps({**decision, "temperature": None}))
    state, stored = started(home, adapter=str(plain)), load_file(plain / WEIGHTS)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    # and of one that has a temperature, it is multiplied back
    (plain / DECISION).write_text(json.dumps({**decision, "temperature": [2.5]}))
    hot = started(home, adapter=str(plain))
    torch.testing.assert_close(with_temperature(hot, [2.5])[HEAD], stored[HEAD], rtol=1e-6, atol=0)
    assert torch.equal(hot[HEAD], stored[HEAD] * 2.5)


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_a_parent_whose_head_has_other_rows_than_labels_is_refused(
    home: Path, tmp_path: Path, rows: int
) -> None:
    """Its rows would go to other labels; without any rows the head is a number."""
    shutil.copytree(home / "adapter", tmp_path / "edited")
    stored = load_file(tmp_path / "edited" / WEIGHTS)
    head = torch.zeros(rows, stored[HEAD].shape[1]) if rows else torch.zeros(())
    write_weights(tmp_path / "edited", {**stored, HEAD: head})
    with pytest.raises(WrongRequest, match=rf"has {HEAD} of shape .* instead of \(4, 64\)"):
        started(home, adapter=str(tmp_path / "edited"))


def test_auxiliary_labels_have_fresh_rows_behind_those_of_the_parent(home: Path, tmp_path: Path) -> None:
    index = prepare_auxiliary(tmp_path)
    old, state = load_file(home / "adapter" / WEIGHTS), started(home, f"data.url={tmp_path / 'data'}")
    temperature = json.loads((home / "adapter" / DECISION).read_bytes())["temperature"] or [1.0]
    before = ["awe", "calm", "glee", "rage"]
    assert len(state[HEAD]) == len(index.trained_labels) == 7
    for row, label in enumerate(index.labels):
        assert torch.equal(state[HEAD][row], old[HEAD][before.index(label)] * temperature[0])
    assert 0.01 < float(state[HEAD][4:].std()) < 0.03  # N(0, 0.02), as every fresh head


def test_rows_of_the_head_follow_their_labels(home: Path) -> None:
    old, state = load_file(home / "adapter" / WEIGHTS), started(home, f"data.url={home / 'more'}")
    temperature = json.loads((home / "adapter" / DECISION).read_bytes())["temperature"] or [1.0]
    before, now = ["awe", "calm", "glee", "rage"], ["calm", "fear", "glee", "rage"]
    for label in ("calm", "glee", "rage"):
        expected = old[HEAD][before.index(label)] * torch.tensor(temperature[0])
        assert torch.equal(state[HEAD][now.index(label)], expected)
    drawn = started(home, f"data.url={home / 'more'}", "run.seed=7")[HEAD][1]
    assert not torch.equal(drawn, state[HEAD][1])
    assert 0.005 < float(state[HEAD][1].std()) < 0.05
    assert all(torch.equal(old[name], state[name]) for name in old if name != HEAD)


def test_the_report_says_what_was_gained_and_forgotten(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    old = home / "data"
    asked = words(home, f"data.url={home / 'more'}", f"report.old_data={old}", "train.epochs=1")
    assert train_cli.main(["train", *asked, "--stop-after-step", "3"]) == 33
    told = " ".join(capsys.readouterr().err.split())
    assert "New against the adapter tiny that this run trained on from: fear" in told
    assert "Labels of the adapter tiny that the posts do not have any more were dropped: awe." in told
    # from a checkpoint on the adapter is needed no more, and another one is refused
    other = home / "other"
    shutil.copytree(home / "adapter", other)
    state = load_file(other / WEIGHTS)
    write_weights(other, {name: 2 * one for name, one in state.items()})
    assert train_cli.main(["train", *asked, f"model.adapter={other}"]) == 2
    assert "different now: model.adapter (was" in capsys.readouterr().err
    moved = home / "moved"
    shutil.copytree(home / "adapter", moved)
    assert train_cli.main(["train", *asked, f"model.adapter={moved}"]) == 0
    final = read_log(open_store(str(home / "runs")), "next")[-1]
    report = Report.model_validate_json(
        (home / "runs" / "next" / "final" / f"{final.incarnation:08d}" / "report.json").read_bytes()
    )
    parent, found = report.identity.parent, report.old_posts
    assert parent is not None
    assert found is not None
    assert (parent.name, parent.new_labels, parent.dropped_labels) == ("tiny", ("fear",), ("awe",))
    assert api.pull_run(str(home / "runs" / "next"), home / "next") == home / "next"
    before = predictions_from_parquet((home / "adapter" / "report" / "predictions_test.parquet").read_bytes())
    texts = posts_by_id(home, before.ids)
    labels = ["awe", "calm", "glee", "rage"]
    right = wrong = 0
    answers = api.load_adapter(home / "next", device="cpu").predict(texts)
    for truth, was, now in zip(before.truth_N, before.predicted_N, answers, strict=True):
        right += was != truth and now.label == labels[truth]
        wrong += was == truth and now.label != labels[truth]
    assert (found.gained, found.forgotten, found.rows) == (right, wrong, len(texts))
    assert found.difference_low <= found.difference <= found.difference_high
    assert found.difference == pytest.approx(found.macro_f1 - found.macro_f1_before)
    awe = next(one for one in found.per_label if one.label == "awe")
    assert awe.f1 == 0
    page = (home / "next" / "report" / "report.html").read_text()
    assert "gained and forgotten" in page
    assert str(home) not in (home / "next" / "report" / "report.json").read_text()


def posts_by_id(home: Path, ids: tuple[str, ...]) -> list[str]:
    store = open_store(str(home / "data"))
    texts = {key: text for key, text, _ in posts(store, read_index(store).split("test"))}
    return [texts[one] for one in ids]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("lora.r=8",), "has lora.r 4, not 8; give lora.r=4"),
        (
            ("model.layers=1",),
            "was made for all blocks of its base, and this run reads the first block; give"
            r" model\.layers=null\.",
        ),
        (("lora.alpha=3",), "has lora.alpha 32, not 3; give lora.alpha=32"),
        (("lora.targets=[q_proj]",), "has adapters on .*, not on q_proj; give lora.targets="),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    home: Path, changed: tuple[str, ...], told: str
) -> None:
    with pytest.raises(WrongRequest, match=told):
        started(home, *changed)


def test_other_weights_of_the_same_shapes_are_refused_before_the_run_is_claimed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(home / "base", tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        tensors = load_file(file)
        changed = {name: one * 1.5 for name, one in tensors.items() if name.endswith("layernorm.weight")}
        save_file(tensors | changed, file, metadata={"format": "pt"})
    staged = tmp_path / "staged"
    assert train_cli.main(["stage-base", str(tmp_path / "base"), str(staged)]) == 0
    for base, precision in ((tmp_path / "base", "fp32"), (staged, "bf16")):
        more = (f"data.url={home / 'more'}", f"model.base={base}", f"model.precision={precision}")
        asked = words(home, "run.id=other", *more)
        assert train_cli.main(["train", *asked]) == 2
        assert f"the weights of {base} differ; give model.base=" in capsys.readouterr().err
        assert not (home / "runs" / "other" / "log").exists()
    launch_cli.main(["check", *asked, "--accelerate-config", "cpu"])
    assert f"the weights of {staged} differ" in " ".join(capsys.readouterr().out.split())
    staged_again = tmp_path / "same"
    assert train_cli.main(["stage-base", str(home / "base"), str(staged_again)]) == 0
    own = (f"model.base={staged_again}", "model.precision=bf16")
    assert started(home, *own).keys() == started(home).keys()


def test_old_posts_need_their_adapter_and_their_data_set(home: Path) -> None:
    with pytest.raises(
        WrongRequest, match=r"report\.old_data is .*, the data set of model\.adapter, which is not given"
    ):
        tiny_config(home, f"report.old_data={home / 'data'}")
    with pytest.raises(WrongRequest, match="is not the data set that tiny was trained on"):
        started(home, f"report.old_data={home / 'more'}")


def test_check_looks_at_the_adapter(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = words(home, f"data.url={home / 'more'}", "run.id=looked")
    launch_cli.main(["check", *asked, "--accelerate-config", "cpu"])
    assert "tiny, 3 of 4 labels with its rows of the head" in " ".join(capsys.readouterr().out.split())
    launch_cli.main(["check", *asked, "lora.r=8", "--accelerate-config", "cpu"])
    assert "has lora.r 4, not 8" in " ".join(capsys.readouterr().out.split())
    launch_cli.main(["check", *asked, "model.layers=0.5", "--accelerate-config", "cpu"])
    assert "was made for all blocks of its base, and this run" in " ".join(capsys.readouterr().out.split())
