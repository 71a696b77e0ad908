"""The run config: three layers, every problem in one message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from emotion_train.config import Config, load_config, require_trackers
from emotion_train.errors import WrongRequest
from emotion_train.other_names import _KEYS, NAMES

REQUIRED = ["data.url=posts", "run.output_url=runs"]
CONFIGS = Path(__file__).parents[2] / "emotion_train" / "configs"


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {url: from-file}\nrun: {output_url: runs}\ntrain: {learning_rate: 1e-4, epochs: 5}\n"
    )
    config = load_config(file, ["train.epochs=7"])
    assert (config.train.epochs, config.train.learning_rate, config.train.global_batch_size) == (7, 1e-4, 64)


def test_every_problem_is_in_one_message_with_the_nearest_name() -> None:
    with pytest.raises(WrongRequest) as caught:
        load_config(
            None,
            [
                "data.url=posts",
                "train.learning_rat=1",
                "lorra.r=4",
                "train.epochs=none",
                "lora.targets=[q_prj]",
                "epochs",
            ],
        )
    message = str(caught.value)
    for piece in (
        "train.learning_rat: no such key; did you mean train.learning_rate?",
        "lorra: no such section; did you mean lora?",
        "train.epochs: input should be a valid integer",
        "targets has 'q_prj'; allowed are all-linear or",
        "'epochs' is not of the form section.field=value",
        "run.output_url: required and not given; type run.output_url=…",
    ):
        assert piece in message, message


@pytest.mark.parametrize("value", ["lora.targets=[q_proj, q_proj]", "lora.dropout=1"])
def test_an_adapter_that_could_not_be_is_refused(value: str) -> None:
    with pytest.raises(
        WrongRequest, match=r"lora\.?(.*has 'q_proj' twice|dropout: .*less than or equal to 0\.99)"
    ):
        load_config(None, [*REQUIRED, value])


def test_a_section_that_is_none_is_told_with_what_it_should_be(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: 5\ndata: {url: d}\nrun: hello\n")
    with pytest.raises(
        WrongRequest,
        match=r"run: a section is expected, run\.output_url and so on, .*'hello'\n.*train: .*got 5",
    ):
        load_config(tmp_path / "run.yaml", ["run.output_url=o"])


def test_a_key_in_the_wrong_section_is_led_to_the_right_one() -> None:
    with pytest.raises(
        WrongRequest, match=r"train\.max_length: no such key; did you mean data\.max_length\?"
    ):
        load_config(None, [*REQUIRED, "train.max_length=64"])


def test_a_post_must_fit_one_microbatch() -> None:
    with pytest.raises(WrongRequest, match="one post must fit one micro-batch"):
        load_config(None, [*REQUIRED, "data.max_length=512", "train.tokens_per_microbatch=256"])


@pytest.mark.parametrize("given", ["autoo", "4"])
def test_a_field_that_takes_a_word_or_a_number_has_one_problem(given: str) -> None:
    with pytest.raises(WrongRequest) as refused:
        load_config(None, [*REQUIRED, f"train.tokens_per_microbatch={given}"])
    (problem,) = str(refused.value).splitlines()[1:]
    assert problem.startswith("  - train.tokens_per_microbatch: input should be ")
    assert ", or 'auto', got" in problem


@pytest.mark.parametrize(
    ("word", "items"),
    [
        ("report.slices=[lang]", ("lang",)),
        ("report.slices=[lang, source]", ("lang", "source")),
        ("report.language=[en,de]", ("en", "de")),
        ("report.gates=[0.9]", (0.9,)),
        ("run.trackers=[tensorboard]", ("tensorboard",)),
        ("lora.targets=[q_proj, v_proj]", ("q_proj", "v_proj")),
    ],
)
def test_every_list_can_be_given_on_the_command_line(word: str, items: tuple[object, ...]) -> None:
    section, field = word.partition("=")[0].split(".")
    assert getattr(getattr(load_config(None, [*REQUIRED, word]), section), field) == items


def test_a_word_in_place_of_a_list_is_told_how_to_write_one() -> None:
    with pytest.raises(
        WrongRequest, match=r"report\.slices: input should be a list such as \[lang\], got 'lang'"
    ):
        load_config(None, [*REQUIRED, "report.slices=lang"])


@pytest.mark.parametrize("choice", ["balanced", "none", 0.25])
def test_class_weights_are_a_word_or_a_power(choice: str | float) -> None:
    assert load_config(None, [*REQUIRED, f"loss.class_weights={choice}"]).loss.class_weights == choice


def test_class_weights_are_a_table_by_label_too() -> None:
    loss = load_config(None, [*REQUIRED, "loss.class_weights={pride: 4, relief: 1.5}"]).loss
    assert (loss.class_weights, loss.weighted_labels) == ({"pride": 4, "relief": 1.5}, ("pride", "relief"))
    assert load_config(None, REQUIRED).loss.weighted_labels == ()


@pytest.mark.parametrize("given", ["inverse", "-1", "{pride: 0}", "{pride: much}", "[1, 2]"])
def test_other_class_weights_are_refused_with_one_problem(given: str) -> None:
    with pytest.raises(WrongRequest) as refused:
        load_config(None, [*REQUIRED, f"loss.class_weights={given}"])
    (problem,) = str(refused.value).splitlines()[1:]
    assert problem.startswith("  - loss.class_weights")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", f"a: {'[' * 3000}"])
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(WrongRequest, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("run.trackers=wandb", "run.trackers: input should be a list such as [wandb], got 'wandb'"),
        ("run.trackers=7", "run.trackers: input should be a list such as [NAME,NAME], got 7"),
        (
            "lora.targets=q_proj",
            "lora.targets: input should be a list such as [q_proj], or 'all-linear', got 'q_proj'",
        ),
        ("lora.targets=q_proj,v_proj", "a list such as [q_proj,v_proj], or 'all-linear'"),
    ],
)
def test_a_word_where_a_list_is_wanted_is_shown_as_one(word: str, problem: str) -> None:
    with pytest.raises(WrongRequest, match=re.escape(problem)):
        load_config(None, [*REQUIRED, word])


@pytest.mark.parametrize(
    "text",
    ["train: {epochs: 1, epochs: 2}\n", "train: {epochs: 1}\nlora: {r: 8}\ntrain: {learning_rate: 0.1}\n"],
)
def test_a_key_that_stands_twice_is_refused_and_none_of_the_two_is_lost(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(
        WrongRequest,
        match=r"run\.yaml is not valid YAML: '(epochs|train)' stands there twice; leave one.* line [13]",
    ):
        load_config(tmp_path / "run.yaml", REQUIRED)


@pytest.mark.parametrize(
    "word",
    ["train.epochs=true", "evaluation.every_steps=on", "train.max_grad_norm=off", "loss.class_weights=no"],
)
def test_yes_and_no_are_not_taken_for_1_and_0(word: str) -> None:
    with pytest.raises(
        WrongRequest,
        match=rf"{word.partition('=')[0]}: (true|false) .* is not allowed here; give a number or a word",
    ):
        load_config(None, [*REQUIRED, word])
    assert load_config(None, [*REQUIRED, "train.gradient_checkpointing=yes"]).train.gradient_checkpointing


def test_a_section_whose_keys_are_all_commented_out_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n#  epochs: 2\nlora:\n")
    assert load_config(path, REQUIRED) == load_config(None, REQUIRED)
    assert load_config(path, [*REQUIRED, "train.epochs=2"]).train.epochs == 2
    path.write_text("run:\ntrian:\n")
    with pytest.raises(WrongRequest, match=r"trian: no such section.*\n.*run.output_url: required"):
        load_config(path, ["data.url=d"])


def test_a_missing_file_names_an_example(tmp_path: Path) -> None:
    with pytest.raises(WrongRequest, match=r"demo_cpu\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_resolved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(None, [*REQUIRED, "lora.targets=all-linear", "run.trackers=[tensorboard]"])
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert again.sha256() == config.sha256()


@pytest.mark.parametrize("name", ["mistral_small_3_1.yaml", "demo_cpu.yaml"])
def test_shipped_configs_are_valid(name: str) -> None:
    load_config(CONFIGS / name, REQUIRED)


def test_the_recipe_file_says_what_the_defaults_say() -> None:
    """Two homes of one recipe: the defaults for people who write their own file, the file for
    people who read.
    """
    written = yaml.safe_load((CONFIGS / "mistral_small_3_1.yaml").read_text())
    defaults = Config.model_validate({"data": {"url": "x"}, "run": {"output_url": "y"}}).model_dump(
        mode="json"
    )
    assert written == {
        section: {key: defaults[section][key] for key in fields} for section, fields in written.items()
    }


@pytest.mark.parametrize(
    ("word", "value"),
    [("run.id=2026-11-23", "2026-11-23"), ("run.id=42", "42"), ("run.id=no", "no"), ("run.id=none", None)],
)
def test_a_word_for_text_stays_text(word: str, value: str | None) -> None:
    assert load_config(None, [*REQUIRED, word]).run.id == value


def test_none_switches_off() -> None:
    assert load_config(None, [*REQUIRED, "train.max_grad_norm=None"]).train.max_grad_norm is None


def test_a_file_that_is_not_utf_8_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("run: {id: é}".encode("latin-1"))
    with pytest.raises(WrongRequest, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    require_trackers(load_config(None, [*REQUIRED, "run.trackers=[tensorboard]"]))
    with pytest.raises(WrongRequest, match="pip install mlflow"):
        require_trackers(load_config(None, [*REQUIRED, "run.trackers=[mlflow]"]))


def test_a_config_cannot_be_changed() -> None:
    config = load_config(None, REQUIRED)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (
            "run: {id: 42}",
            'run.id: 42 is a number in YAML and text is expected; put quotes around it: id: "42"',
        ),
        (
            "run: {id: 010}",
            'run.id: 010 is a number in YAML and text is expected; put quotes around it: id: "010"',
        ),
        ("run: {id: 1.5}", 'put quotes around it: id: "1.5"'),
        ("run: {id: no}", 'put quotes around it: id: "no"'),
        ("run: {id: 2026-11-23}", "run.id: 2026-11-23 is a date in YAML and text is expected"),
        ("model: {base: 12:30}", "model.base: 12:30 is a number in YAML and text is expected"),
        (
            "train: {epochs: 010}",
            "train.epochs: 010 is an octal number in YAML, 8; write 8, or 10 if that is meant",
        ),
        ("train: {epochs: 1:30}", "train.epochs: 1:30 is a number to base 60 in YAML, 90; write 90"),
        (
            "train: {learning_rate: -01}",
            "train.learning_rate: -01 is an octal number in YAML, -1; write -1",
        ),
        (
            "run: {start_timeout_s: 1:00:00.5}",
            "1:00:00.5 is a number to base 60 in YAML, 3600.5; write 3600.5",
        ),
        ("checkpoint: {every_seconds: 0_17}", "0_17 is an octal number in YAML, 15; write 15, or 17 if"),
        ("train: {epochs: 08}", "train.epochs: '08' begins with a zero; write 8"),
        ('train: {epochs: "010"}', "train.epochs: '010' begins with a zero; write 10"),
    ],
)
def test_what_yaml_reads_otherwise_than_a_person_is_refused(tmp_path: Path, typed: str, problem: str) -> None:
    (tmp_path / "run.yaml").write_text(typed)
    with pytest.raises(WrongRequest, match=re.escape(problem)) as refused:
        load_config(tmp_path / "run.yaml", [word for word in REQUIRED if f"{word[:3]}: " not in typed])
    place = problem.partition(":")[0]
    assert str(refused.value).count(f"  - {place}") <= 1


@pytest.mark.parametrize("word", ["train.epochs=010", "train.epochs=1:30", "train.epochs=08"])
def test_a_word_is_held_to_the_same(word: str) -> None:
    with pytest.raises(WrongRequest, match=r"octal number|base 60|begins with a zero"):
        load_config(None, [*REQUIRED, word])


@pytest.mark.parametrize(
    ("word", "value"), [("train.epochs=0x10", 16), ("train.epochs=1_0", 10), ("train.epochs=7", 7)]
)
def test_numbers_that_are_clear_are_taken(word: str, value: int) -> None:
    assert load_config(None, [*REQUIRED, word]).train.epochs == value
    assert load_config(None, [*REQUIRED, "lora.dropout=0.05", "run.id=010"]).run.id == "010"


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr=1e-4", "train.learning_rate?"),
        ("train.lr=1e-4", "train.learning_rate?"),
        ("learning_rate=1e-4", "train.learning_rate?"),
        ("train.batch_size=8", "train.global_batch_size (posts of one optimizer step over all GPUs; "),
        ("per_device_train_batch_size=8", "train.global_batch_size (posts of"),
        ("train.per-device-train-batch-size=8", "train.global_batch_size (posts of"),
        ("train.num_epochs=3", "train.epochs?"),
        ("train.max_seq_length=64", "data.max_length?"),
        ("lora.lora_r=4", "lora.r?"),
        ("lora_r=4", "lora.r?"),
        ("training.warmup_steps=10", "train?"),
        ("train.warmup_steps=10", "train.warmup_ratio (a share of all steps, not their number)?"),
        ("model.model_name_or_path=a/b", "model.base?"),
        ("run.output_dir=a", "run.output_url?"),
    ],
)
def test_names_of_other_tools_are_led_to_ours(word: str, key: str) -> None:
    with pytest.raises(WrongRequest, match=re.escape(f"did you mean {key}")):
        load_config(None, [*REQUIRED, word])


def test_every_name_of_other_tools_leads_to_a_key_and_is_none_itself() -> None:
    keys = {
        f"{section}.{field}"
        for section, model in Config.model_fields.items()
        for field in model.annotation.model_fields  # type: ignore[union-attr]
    }
    assert {key for key, _ in NAMES.values()} <= keys
    assert not NAMES.keys() & {key.partition(".")[2] for key in keys}
    assert len(NAMES) == sum(len(names.split()) for _, _, names in _KEYS), "one name leads to two keys"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["run.yaml"],
            "'run.yaml' is not of the form section.field=value; for a file type --config run.yaml",
        ),
        (["train.epochs", "=", "3"], "type train.epochs=VALUE as one word, without spaces"),
        (["train.epochs:", "3"], "type train.epochs=VALUE as one word, without spaces"),
        (["run.id=a/b"], "run.id: allowed are up to 128 letters, digits, dots, _ and -, a letter or digit"),
    ],
)
def test_a_word_of_another_form_is_led_to_the_right_one(words: list[str], told: str) -> None:
    with pytest.raises(WrongRequest) as caught:
        load_config(None, ["data.url=d", "run.output_url=o", *words])
    assert told in str(caught.value)
    assert "pattern" not in str(caught.value)
