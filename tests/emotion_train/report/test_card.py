"""The model card: its header as the hub's own client reads it, its figures those of the report,
and labels that stay text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from emotion_train.bases.licence import licence_of
from emotion_train.model.card import CardFacts, as_code, as_prose, model_card
from emotion_train.report.card_lines import card_header, card_lines, card_sections
from emotion_train.report.figures import SetResult
from emotion_train.report.schema import Report
from tests.emotion_train.report.test_report import HOSTILE, predictions, report, result
from tests.helpers.scored_sets import scored

NAMES = ["joy", "a | b", HOSTILE, "--- x: 1", "'quoted': \"yes\""]


def card_of(made: Report, base: str = "some/base") -> str:
    return model_card(
        CardFacts(
            base,
            "text",
            "bf16",
            128,
            made.labels,
            16,
            32.0,
            ("q_proj",),
            made.targets,
            made.identity.run_id,
            card_lines(made),
            card_sections(made),
            card_header(made),
        )
    )


def read(made: Report) -> ModelCardData:
    """The header as the hub's client reads it."""
    data = ModelCard(card_of(made)).data
    assert isinstance(data, ModelCardData)
    return data


def of_one(**changes: Any) -> Report:
    made = report({"test": result(predictions(), predictions(skill=1))}, list(NAMES))
    dataset = made.dataset.model_copy(update={"cleaning": {"name": "owner/posts:raw", "format": "hub"}})
    config = {
        "train": {"epochs": 3, "learning_rate": 2e-4},
        "lora": {"r": 16, "targets": ["q_proj", "k_proj"]},
        "report": {"language": ["en", "pt"]},
    }
    identity = made.identity.model_copy(update={"config": config, **changes})
    return made.model_copy(update={"dataset": dataset, "identity": identity})


def test_the_hub_s_client_reads_the_header_and_finds_the_report_s_figures() -> None:
    made = of_one()
    data = read(made).to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("some/base", "adapter")
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-classification")
    assert data["language"] == ["en", "pt"]
    assert data["datasets"] == ["owner/posts"]
    assert data["metrics"] == ["f1", "accuracy", "log_loss", "expected_calibration_error"]
    assert read(made).model_name == "run-1"
    results = read(made).eval_results or []
    split = made.splits["test"]
    found = {one.metric_name: one.metric_value for one in results}
    assert found["macro-F1"] == pytest.approx(split.macro_f1, abs=1e-4)
    assert found["accuracy"] == pytest.approx(split.also["accuracy"], abs=1e-4)
    for one in results:
        assert (one.task_type, one.dataset_type, one.dataset_split) == (
            "text-classification",
            "owner/posts",
            "test",
        )
    assert results[0].metric_args == {"average": "macro"}
    # what the client would write of these results is what stands there
    assert eval_results_to_model_index("run-1", results) == data["model-index"]


def test_several_labels_have_their_figures_and_a_private_source_its_name() -> None:
    model = scored(400, 1)
    made = report({"test": SetResult(model.counts(), model)}, ["joy", "anger", "awe", "grief"])
    data = read(made)
    found = {one.metric_name: (one.metric_type, one.metric_args) for one in data.eval_results or []}
    assert found["micro-F1"] == ("f1", {"average": "micro"})
    assert found["exact match"] == ("accuracy", {"subset": True})
    assert (data.eval_results or [])[0].dataset_type == "private"
    assert not {"datasets", "language"} & data.to_dict().keys()


def test_a_person_finds_data_hyperparameters_limits_and_each_label() -> None:
    made = of_one(base="smollm2")
    text = card_of(made)
    for words in (
        "## Intended use and limits",
        "Licence of the base: apache-2.0.",
        "| train | 4,000 |",
        "| `lora.targets` | `q_proj, k_proj` |",
        "| `train.learning_rate` | `0.0002` |",
        "Versions: torch 2.",
        "### Per label",
    ):
        assert words in text
    for one in made.splits["test"].per_label:
        assert f"| {as_code(one.label)} | {one.precision:.2f} | {one.recall:.2f} | {one.f1:.2f} |" in text
    assert text.index("## Results") < text.index("## Intended use") < text.index("## Use\n")


def test_labels_stay_text_in_every_part_of_the_card() -> None:
    made = of_one().model_copy(update={"warnings": (f"Labels without a test post: {HOSTILE}, *a* | b.",)})
    text = card_of(made)
    assert "<script" not in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "peft"
    for line in text.partition("## Results")[2].partition("## Use\n")[0].splitlines():
        if line.startswith("| ") and "a &#124; b" in line:
            assert line.count("|") in (3, 7)  # of two cells, and of six
    assert as_prose("*a* | <b>") == "&#42;a&#42; &#124; &#60;b&#62;"


def test_the_licence_of_a_base_is_that_of_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert licence_of("mistralai/Mistral-Small-3.1-24B-Base-2503") == "apache-2.0"
    assert licence_of(str(tmp_path)) is None
    for written, found in (
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\nlicense: <b>\n---\n", None),
        ("---\nlicense: [a]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("no header", None),
    ):
        (tmp_path / "README.md").write_text(written, encoding="utf-8")
        assert licence_of(str(tmp_path)) == found
    monkeypatch.setattr("emotion_train.edges.hub.in_cache", lambda *_: tmp_path / "README.md")
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n", encoding="utf-8")
    assert licence_of("owner/model") == "gemma"
