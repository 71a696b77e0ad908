"""Every key of the config is told, in each form, as the config itself has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from emotion_train.cli import main
from emotion_train.config import Config, all_keys, load_config
from emotion_train.config_reference import as_markdown, as_text, as_yaml, json_schema, keys

ROOT = Path(__file__).parents[2]
REQUIRED = ["data.url=posts", "run.output_url=runs"]
# numbers that count nothing
NO_UNIT = {"run.seed", "lora.r", "lora.alpha", "loss.class_weights", "train.learning_rate"}
NO_UNIT |= {"train.weight_decay", "train.max_grad_norm"}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["config", *words]) == 0
    return capsys.readouterr().out


def test_the_yaml_file_loads_to_the_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(printed(capsys, "--yaml"), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml", REQUIRED) == load_config(None, REQUIRED)


def test_the_yaml_file_has_every_key_below_its_section() -> None:
    commented = as_yaml().replace("  # output_url:", "  output_url: runs").replace("  # url:", "  url: posts")
    written = yaml.safe_load(commented)
    assert [f"{section}.{name}" for section, fields in written.items() for name in fields] == all_keys()


def test_a_default_is_told_as_the_config_has_it() -> None:
    config = load_config(None, REQUIRED).model_dump(mode="json")
    told = {f"{key.section}.{key.name}": key for key in keys()}
    assert list(told) == all_keys()
    for name, key in told.items():
        assert key.required == (f"{name}=" in " ".join(REQUIRED))
        if not key.required:
            assert key.default == config[key.section][key.name], name


def test_every_number_has_a_unit_and_every_key_a_meaning() -> None:
    for key in keys():
        name = f"{key.section}.{key.name}"
        assert key.meaning.endswith("."), name
        assert bool(key.unit) == ("number" in key.allowed and name not in NO_UNIT), name


def test_the_terminal_s_form_has_every_key_on_lines_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    assert [line.split()[0] for line in text.splitlines() if not line.startswith(" ")] == all_keys()
    assert "train.global_batch_size = 64   [posts; whole number from 1 to 1,000,000]\n" in text
    assert "data.url   [required; text]\n" in text
    assert max(map(len, as_text(60).splitlines())) <= 60


def test_the_page_is_that_of_the_fields() -> None:
    page = ROOT / "docs" / "reference" / "config.md"
    assert page.read_text(encoding="utf-8") == as_markdown(), (
        "the page is stale; type emotion-train config --markdown > docs/reference/config.md"
    )


CONFIGS = sorted((ROOT / "emotion_train" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_schema_takes_the_shipped_configs(path: Path) -> None:
    Draft202012Validator(json_schema()).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_schema_takes_every_default_and_an_empty_section(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "--json-schema"))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    validator.validate(load_config(None, REQUIRED).model_dump(mode="json"))
    validator.validate(yaml.safe_load(as_yaml()))
    validator.validate({"train": None})
    validator.validate({"lora": {"targets": "all-linear"}, "train": {"tokens_per_microbatch": 4096}})


WRONG: list[dict[str, Any]] = [
    {"trian": {}},
    {"train": {"lr": 1}},
    {"train": {"epochs": 0}},
    {"train": {"epochs": "three"}},
    {"lora": {"targets": ["q_prj"]}},
    {"lora": {"targets": ["q_proj", "q_proj"]}},
    {"lora": {"targets": []}},
    {"run": {"id": "a/b"}},
    {"model": {"precision": "int8"}},
    {"loss": {"class_weights": "inverse"}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_the_schema_refuses_the_config_refuses_too(wrong: dict[str, Any]) -> None:
    assert not Draft202012Validator(json_schema()).is_valid(wrong)
    whole = {"data": {"url": "d"}, "run": {"output_url": "o"}}
    with pytest.raises(ValueError, match="validation error"):
        Config.model_validate(whole | {name: whole.get(name, {}) | values for name, values in wrong.items()})
