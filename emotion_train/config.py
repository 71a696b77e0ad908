"""The config of a run: one frozen object from defaults, a YAML file and `section.field=value`
words.

Later layers win. All problems are reported together, each with the nearest allowed name, before
anything is started.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from emotion_train.console import counted
from emotion_train.edges.bounded import UnclearNumber, Unreadable, yaml_file, yaml_in
from emotion_train.errors import WrongRequest
from emotion_train.other_names import key_meant

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR_LAYERS = (*ATTENTION_PROJECTIONS, "gate_proj", "up_proj", "down_proj")
Precision = Literal["nf4", "bf16", "fp8", "fp32"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
DEFAULT_TOKENS_PER_MICROBATCH = 4096
POSTS_PER_SCORING_STEP = 512  # in one process
MOST_LAYERS = 2000  # blocks of a base
SMALLEST_MAX_LENGTH, LARGEST_MAX_LENGTH = 4, 8192  # tokens of a post
_CONFIGS = Path(__file__).parent / "configs"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_read_what_was_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses values that YAML reads otherwise than a person: yes, no, on and off as true and
        false (1 and 0 for pydantic), 010 as 8, and digits as a number where text is meant.
        """
        name = str(info.field_name)
        kinds = _kinds(cls, name)
        if str in kinds and (given := _not_text(value)) is not None:
            quoted = '"no"' if value is False else f'"{str(value).lower()}"'
            raise ValueError(f"{given} in YAML and text is expected; put quotes around it: {name}: {quoted}")
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError(
                f"{str(value).lower()} (in YAML also yes, no, on and off) is not allowed here; give a number"
                " or a word"
            )
        if isinstance(value, UnclearNumber):
            read, plain = value.reading.split()[-1], _without_zeros(value)
            other = "" if ":" in value or plain == read else f", or {plain} if that is meant"
            raise ValueError(f"{value.reading}; write {read}{other}")
        if isinstance(value, str) and str not in kinds and re.fullmatch("[-+]?0[0-9_]+", value):
            raise ValueError(f"{value!r} begins with a zero; write {_without_zeros(value)}")
        return value


def _kinds(section: type[Section], field: str) -> tuple[Any, ...]:
    """The types that a field takes, such as `(str, NoneType)` for `str | None`."""
    annotation = section.model_fields[field].annotation
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _not_text(value: Any) -> str | None:
    """What YAML made of unquoted text, in words; None for text."""
    if isinstance(value, bool):
        return "yes, on and true are true, no, off and false are false"
    if isinstance(value, int | float | UnclearNumber):
        return f"{value} is a number"
    return f"{value} is a date" if isinstance(value, date) else None


def _without_zeros(digits: str) -> str:
    return ("-" if digits.startswith("-") else "") + (digits.lstrip("+-0_") or "0")


class RunSection(Section):
    output_url: str = Field(
        min_length=1,
        description="Bucket prefix or folder that receives the run: s3://bucket/prefix or a path.",
    )
    id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Name of the run below output_url; None derives one.",
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="Seed of the example order, the new weights and dropout."
    )
    trackers: tuple[Tracker, ...] = Field(
        (), description="Experiment trackers that receive the step and evaluation figures."
    )
    start_timeout_s: float = Field(
        3600,
        ge=0,
        description=(
            "Seconds for which a start waits for a bucket that does not answer, before it ends with 1; 0 does"
            " not wait."
        ),
        json_schema_extra={"unit": "seconds"},
    )
    publish_timeout_s: float = Field(
        3600,
        ge=0,
        description="Seconds for which publishing is tried again when the bucket fails.",
        json_schema_extra={"unit": "seconds"},
    )
    kernels_url: str | None = Field(
        None,
        min_length=1,
        description=(
            "Bucket prefix or folder that keeps built GPU kernels, for machines that start empty. Kernels are"
            " programs: whoever can write there can run programs in your jobs."
        ),
    )


class DataSection(Section):
    url: str = Field(
        min_length=1,
        description="Data set written by `emotion-train prepare`: s3://bucket/prefix or a folder.",
    )
    max_length: int = Field(
        128,
        ge=SMALLEST_MAX_LENGTH,
        le=LARGEST_MAX_LENGTH,
        description="Tokens kept of a post, counting the BOS token, or an encoder's [CLS] and [SEP].",
        json_schema_extra={"unit": "tokens"},
    )
    limit: int | None = Field(
        None,
        ge=1,
        description=(
            "Posts kept of each split, with each label in its share, the same at each start; None keeps all."
        ),
        json_schema_extra={"unit": "posts"},
    )


def _blocks_or_a_share(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        checked = check(value)
    except ValidationError:
        checked = value
    whole = isinstance(checked, int) and 1 <= checked <= MOST_LAYERS
    if checked is None or whole or (isinstance(checked, float) and 0 < checked < 1):
        return checked
    raise ValueError(
        "expected is a number of blocks such as 23, or a share of them below 1 such as 0.77, got"
        f" {str(value)[:40]!r}"
    )


class ModelSection(Section):
    base: str = Field(
        "mistralai/Mistral-Small-3.1-24B-Base-2503",
        min_length=1,
        description=(
            "Hub id, folder of a checkpoint, .gguf file, the s3://bucket/prefix or folder of"
            " `emotion-train stage-base`, or smollm2, the small model of the quick start."
        ),
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description=(
            "Published adapter from which to train on: OUTPUT_URL/RUN_ID or a folder of `emotion-launch"
            " pull`. Training starts from its matrices and from the head's rows of shared labels; None starts"
            " anew."
        ),
    )
    layers: Annotated[
        Annotated[int, Field(json_schema_extra={"minimum": 1})]
        | Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1})]
        | None,
        WrapValidator(_blocks_or_a_share),
    ] = Field(
        None,
        description=(
            "Read and compute only the first blocks of the base: a number, such as 23, or a share, such as"
            " 0.77. Less work and memory, at some cost in quality. None is all."
        ),
        json_schema_extra={"unit": "blocks"},
    )
    precision: Precision = Field(
        "nf4",
        description=(
            "Frozen base: 4-bit NormalFloat with bf16 compute, bfloat16, float8 products (Ada, Hopper and"
            " newer), or float32."
        ),
    )
    decoder: Literal["fused", "stock"] = Field(
        "fused",
        description=(
            "fused = this program's Triton blocks, where they fit the model and GPU; stock = transformers'"
            " modules."
        ),
    )

    keep_unpacked: bool = Field(
        False,
        description=(
            "nf4 on a GPU, in micro-batches of up to 4,096 tokens: also hold the weights of as many blocks as"
            " fit in bfloat16, so that no pass unpacks them. The numbers stay the same; steps of 64 posts of"
            " the 24B take 16 % less time on an H200, and most of its memory."
        ),
    )

    @model_validator(mode="after")
    def _fp8_is_fused(self) -> ModelSection:
        if self.precision == "fp8" and self.decoder == "stock":
            raise ValueError(
                "decoder is stock and precision is fp8, which only the fused blocks compute; leave decoder"
                " out or take bf16"
            )
        return self


class LoraSection(Section):
    r: int = Field(16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: float = Field(32, gt=0, description="Adapter scale; the product is multiplied by alpha / r.")
    dropout: float = Field(
        0.05,
        ge=0,
        le=0.99,
        description="Probability with which an adapter input is dropped.",
        json_schema_extra={"unit": "probability"},
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        ATTENTION_PROJECTIONS, description="Names of the linear layers that get an adapter, or all-linear."
    )

    @model_validator(mode="after")
    def _known_targets(self) -> LoraSection:
        if self.targets != "all-linear":
            if not self.targets:
                raise ValueError(
                    f"targets is empty; allowed are all-linear or names out of {', '.join(LINEAR_LAYERS)}"
                )
            for name in self.targets:
                if self.targets.count(name) > 1:
                    raise ValueError(f"targets has {name!r} twice; leave one out")
                if name not in LINEAR_LAYERS:
                    raise ValueError(
                        f"targets has {name!r}; allowed are all-linear or names out of"
                        f" {', '.join(LINEAR_LAYERS)}"
                    )
        return self


def _a_word_a_number_or_a_table(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            "expected is a number from 0 to 4, balanced, none, or a table of weights above 0 by label such as"
            f" {{pride: 4, relief: 2}}, got {value!r}"
        ) from None


ClassWeights = (
    Literal["balanced", "none"]
    | Annotated[float, Field(ge=0, le=4)]
    | dict[str, Annotated[float, Field(gt=0, le=1e6)]]
)


class LossSection(Section):
    class_weights: Annotated[ClassWeights, WrapValidator(_a_word_a_number_or_a_table)] = Field(
        0.25,  # benchmarks/class_weights.py
        description=(
            "A number p = count^-p (0 is none, 1 is balanced); balanced = n / (classes x count); none = 1; or"
            " a table of weights by label, such as {pride: 4, relief: 2}, where the labels left out weigh 1."
        ),
    )

    @property
    def weighted_labels(self) -> tuple[str, ...]:
        """Labels that a table of weights names."""
        return tuple(self.class_weights) if isinstance(self.class_weights, dict) else ()


class TrainSection(Section):
    epochs: int = Field(
        3,
        ge=1,
        le=10_000,
        description="Passes over the training split.",
        json_schema_extra={"unit": "epochs"},
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description=(
            "Optimizer steps after which the run ends, with an evaluation and a report; the learning rate"
            " falls within them. None is all steps of the epochs."
        ),
        json_schema_extra={"unit": "steps"},
    )
    global_batch_size: int = Field(
        64,
        ge=1,
        le=1_000_000,
        description="Examples per optimizer step over all GPUs.",
        json_schema_extra={"unit": "posts"},
    )
    tokens_per_microbatch: Literal["auto"] | Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        "auto",
        description=(
            "Tokens of one packed forward pass on one GPU; auto = as many as fit and a step has, with"
            " recomputation where that is faster."
        ),
        json_schema_extra={"unit": "tokens"},
    )
    method: Literal["auto", "lora", "full"] = Field(
        "auto",
        description=(
            "What is trained: lora = an adapter and the head, full = every weight, which encoders allow; auto"
            " = full for an encoder, lora for a decoder."
        ),
    )
    learning_rate: float = Field(
        2e-4,
        gt=0,
        le=1,
        description="Peak learning rate; 2e-4 suits adapter and head, 2e-5 to 1e-4 a whole encoder.",
    )
    warmup_ratio: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of all steps in which the learning rate rises linearly from 0.",
        json_schema_extra={"unit": "share of all steps"},
    )
    weight_decay: float = Field(0.01, ge=0, lt=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are scaled down to this 2-norm; None is off."
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Decay, such as 0.99, of a mean of adapter and head over the steps; the mean is scored and"
            " published instead of the last step's weights. 0 is off."
        ),
        json_schema_extra={"unit": "share kept a step"},
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third slower."
    )

    @property
    def microbatch_tokens(self) -> int:
        """`tokens_per_microbatch` as a number; call it only once auto is settled."""
        assert self.tokens_per_microbatch != "auto", "settled before anything is packed"
        return self.tokens_per_microbatch

    def steps(self, posts: int) -> int:
        """Optimizer steps of the whole run on so many training posts."""
        steps = -(-posts // self.global_batch_size) * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)


class EvaluationSection(Section):
    every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations and checkpoints; each epoch ends with one in any case.",
        json_schema_extra={"unit": "steps"},
    )


class CheckpointSection(Section):
    every_seconds: float | None = Field(
        60,
        gt=0,
        description=(
            "Seconds between checkpoints; with None only every_steps and evaluations make them. Every"
            " evaluation makes one."
        ),
        json_schema_extra={"unit": "seconds"},
    )
    every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints, beside every_seconds; None is off.",
        json_schema_extra={"unit": "steps"},
    )
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Keep each k-th checkpoint for good; None keeps only the newest three and the best.",
        json_schema_extra={"unit": "checkpoints"},
    )
    local_folder: str | None = Field(
        None,
        min_length=1,
        description=(
            "Folder for the newest state while the bucket does not answer; None is a folder below TMPDIR."
        ),
    )


class PreemptionSection(Section):
    notices: Literal["auto", "aws", "gcp", "azure", "none"] = Field(
        "auto", description="Cloud whose metadata service is asked for preemption notices; auto finds it."
    )
    hold_s: float | None = Field(
        None,
        ge=0,
        description=(
            "Seconds to wait for the kill after SIGTERM or a termination notice, once saved, before exiting"
            " with 33; None is 300 under SkyPilot, which would take an early exit for a failure, else 0."
        ),
        json_schema_extra={"unit": "seconds"},
    )


class DistributedSection(Section):
    timeout_s: float = Field(
        3600,
        ge=10,
        le=86_400,
        description=(
            "Seconds that a process waits for another one, at the start and in every step, before the run"
            " ends with a message."
        ),
        json_schema_extra={"unit": "seconds"},
    )


class ReportSection(Section):
    bootstrap_samples: int = Field(
        2000,
        ge=100,
        le=100_000,
        description="Resamples behind the 95 % interval of macro-F1.",
        json_schema_extra={"unit": "resamples"},
    )
    floor_max_rows: int = Field(
        100_000,
        ge=0,
        description="Largest training split on which the TF-IDF floor is fitted; 0 leaves it out.",
        json_schema_extra={"unit": "posts"},
    )
    texts: bool = Field(
        False,
        description="Whether predictions_<split>.parquet holds the texts of its posts beside their ids.",
    )
    gates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.8, 0.9, 0.95, 0.99),
        max_length=8,
        description=(
            "Precisions for which decision.json holds the probability from which on answers are right that"
            " often, for `predict --accept-precision`; [] leaves them out."
        ),
        json_schema_extra={"unit": "share of right answers"},
    )
    examples: int = Field(
        5,
        ge=0,
        le=100,
        description=(
            "Posts shown with their texts for each pair of mistaken labels, and four times as many that look"
            " mislabelled; 0 leaves all texts out of the report."
        ),
        json_schema_extra={"unit": "posts a pair"},
    )
    slices: tuple[str, ...] = Field(
        (),
        description=(
            "Columns kept by `emotion-train prepare --keep-columns`; macro-F1 is reported for each value."
        ),
    )
    language: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = Field(
        (), description="Languages of the posts for the model card, as two or three letters: en, pt."
    )
    old_data: str | None = Field(
        None,
        min_length=1,
        description=(
            "Data set that model.adapter was trained on: the report then shows what was gained and forgotten"
            " on its test split."
        ),
    )
    usd_per_hour: float | None = Field(
        None,
        ge=0,
        description=(
            "Price of all machines together, for the cost in report and `runs`; with None `emotion-launch"
            " run` looks for it (in the task's PRICES, then in SkyPilot's catalog)."
        ),
        json_schema_extra={"unit": "dollars an hour"},
    )


class Config(Section):
    """The resolved configuration of one run."""

    run: RunSection
    data: DataSection
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    preemption: PreemptionSection = PreemptionSection()
    distributed: DistributedSection = DistributedSection()
    report: ReportSection = ReportSection()

    @model_validator(mode="after")
    def _post_fits_a_microbatch(self) -> Config:
        tokens = self.train.tokens_per_microbatch
        if tokens != "auto" and self.data.max_length > tokens:
            raise ValueError(
                f"train.tokens_per_microbatch is {tokens} and data.max_length is {self.data.max_length}; "
                "one post must fit one micro-batch: raise the former or lower the latter"
            )
        return self

    @model_validator(mode="after")
    def _old_data_has_its_adapter(self) -> Config:
        if self.report.old_data is not None and self.model.adapter is None:
            raise ValueError(
                f"report.old_data is {self.report.old_data}, the data set of model.adapter, which is not"
                " given; give model.adapter=RUN_URL, or leave report.old_data out"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Hash of every value, independent of the order in which they were given."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Merge defaults < YAML file < `section.field=value` words into a `Config`.

    Raises `WrongRequest` with one line per problem.
    """
    problems: list[str] = []
    values = _read_yaml(_shipped(Path(path))) if path is not None else {}
    for word in overrides:
        _apply_override(values, word, problems)
    problems += _unknown_keys(values)
    if not problems:
        try:
            return Config.model_validate(values)
        except ValidationError as error:
            problems += [line for item in _one_per_field(error.errors()) for line in _describe(item)]
    else:  # report the values' problems together with the keys'
        try:
            Config.model_validate(values)
        except ValidationError as error:
            problems += [
                line
                for item in _one_per_field(error.errors())
                if item["type"] != "extra_forbidden"
                for line in _describe(item)
            ]
    source = f"{path}" if path is not None else "the command line"
    count = counted(len(problems), "problem")
    raise WrongRequest(
        f"The configuration from {source} has {count}:\n" + "\n".join(f"  - {line}" for line in problems)
    )


def require_trackers(config: Config) -> None:
    """Raises `WrongRequest` for a tracker without its package; Accelerate would silently skip
    it.
    """
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise WrongRequest(
                f"run.trackers names {name} and that package is not installed; type pip install {name}, or"
                " leave it out."
            )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml_file(path, once=True)
    except OSError as error:
        raise WrongRequest(
            f"The config file {path} cannot be read ({error.strerror}); give --config a YAML file, for"
            f" example {example_config()}."
        ) from None
    except Unreadable as error:
        raise WrongRequest(f"The config file {path} is not valid YAML: {error}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise WrongRequest(
            f"The config file {path} holds a {type(values).__name__}; sections such as `train:` are expected."
        )
    # every key may be commented out
    return {section: {} if fields is None else fields for section, fields in values.items()}


def _apply_override(values: dict[str, Any], word: str, problems: list[str]) -> None:
    name, equals, text = word.partition("=")
    section, dot, field = name.partition(".")
    if not (equals and dot and section and field):
        example = "for example train.epochs=3"
        if equals and (meant := nearest_key(name)) is not None:
            example = f"did you mean {meant}?"
        elif Path(word).suffix.lower() in (".yaml", ".yml"):
            example = f"for a file type --config {word}"
        elif not equals and name.rstrip(":") in all_keys():
            example = f"type {name.rstrip(':')}=VALUE as one word, without spaces"
        problems.append(f"{word!r} is not of the form section.field=value; {example}")
        return
    value = _typed(section, field, text)
    # where the file has no section there, the validation reports it
    if isinstance(values.setdefault(section, {}), dict):
        values[section][field] = value


def _typed(section: str, field: str, text: str) -> Any:
    """The word's value as YAML reads it; a text field takes the word unchanged, so that
    run.id=2026-11-23 is no date.
    """
    known = section in Config.model_fields and field in _section_type(section).model_fields
    kinds = _kinds(_section_type(section), field) if known else ()
    if type(None) in kinds and text.lower() in ("", "none", "null", "~"):
        return None
    if str in kinds:
        return text
    try:
        value = yaml_in(text) if text else None
    except Unreadable:  # the field's own check reports it
        return text
    takes_tables = any(get_origin(kind) is dict for kind in kinds)
    return text if isinstance(value, dict) and not takes_tables else value


def _unknown_keys(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for section, fields in values.items():
        model = Config.model_fields.get(str(section))
        if model is None:
            problems.append(f"{section}: no such section{_suggest(str(section), _all_names())}")
            continue
        known = _section_type(str(section)).model_fields
        if isinstance(fields, Mapping):
            problems += [
                f"{section}.{field}: no such"
                f" key{_suggest(str(field), [f'{section}.{name}' for name in known] + _all_names())}"
                for field in fields
                if field not in known
            ]
    return problems


def _section_type(name: str) -> type[Section]:
    annotation = Config.model_fields[name].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def _all_names() -> list[str]:
    return [*Config.model_fields, *all_keys()]


def all_keys() -> list[str]:
    """`section.field` of every key, in the order of the sections."""
    return [
        f"{section}.{field}"
        for section in Config.model_fields
        for field in _section_type(section).model_fields
    ]


def nearest_key(name: str, candidates: Sequence[str] = ()) -> str | None:
    """The key or section that a wrong name means: one with that last word, else the key that other
    tools call so, else the one with the nearest last word. `candidates`, the likeliest first,
    default to all names.
    """
    by_last_word: dict[str, str] = {}
    for candidate in candidates or _all_names():
        by_last_word.setdefault(candidate.rpartition(".")[2], candidate)
    if name not in by_last_word and (meant := key_meant(name)) is not None:
        return meant
    nearest = difflib.get_close_matches(name, by_last_word, n=1, cutoff=0.6)
    return by_last_word[nearest[0]] if nearest else None


def _suggest(name: str, candidates: list[str]) -> str:
    """`; did you mean X?`, else the list of sections."""
    if (nearest := nearest_key(name, candidates)) is not None:
        return f"; did you mean {nearest}?"
    return f"; sections are {', '.join(Config.model_fields)}"


def _one_per_field(items: Iterable[Any]) -> list[Any]:
    """The errors, with one for each field: where a field takes a word or a number and got neither,
    the number's error with the allowed words.
    """
    kept: list[Any] = []
    for item in items:
        if kept and kept[-1]["type"] == "literal_error" and _place(kept[-1]) == _place(item):
            words = kept.pop()["ctx"]["expected"]
            kept.append({**item, "msg": f"{item['msg']}, or {words}"})
        else:
            kept.append(item)
    return kept


def _place(item: Any) -> str:
    return ".".join(
        str(part)
        for part in item["loc"]
        if not str(part).startswith(("literal", "tuple", "function", "constrained"))
    )


def _describe(item: Any) -> list[str]:
    place = _place(item)
    if item["type"] == "missing":
        fields = _section_type(place).model_fields if place in Config.model_fields else None
        missing = (
            [place]
            if fields is None
            else [f"{place}.{name}" for name, field in fields.items() if field.is_required()]
        )
        return [
            f"{name}: required and not given; type {name}=… or put it into the YAML file" for name in missing
        ]
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return [message if not place else f"{place}: {message}"]
    if item["type"] == "string_pattern_mismatch" and place == "run.id":
        message = "allowed are up to 128 letters, digits, dots, _ and -, a letter or digit first"
    if item["type"] == "tuple_type":
        example = item["input"] if isinstance(item["input"], str) else "NAME,NAME"
        message = message.replace("a valid tuple", f"a list such as [{example}]")
    given = repr(item["input"])
    if item["type"] == "model_type":
        message = (
            f"a section is expected, {place}.{next(iter(_section_type(place).model_fields))} and so on, one"
            " line each"
        )
    return [
        f"{place}: {message[0].lower()}{message[1:]}, got {given if len(given) < 80 else given[:77] + '...'}"
    ]


def example_config() -> Path:
    """The quick start's YAML file, shipped with the package."""
    return _CONFIGS / "demo_cpu.yaml"


def _shipped(path: Path) -> Path:
    """The package's own file for emotion_train/configs/NAME, where the current folder has none;
    tasks and the documentation use the path in a clone.
    """
    shipped = _CONFIGS / path.name
    is_one = path.parent == Path("emotion_train", "configs") and not path.exists() and shipped.is_file()
    return shipped if is_one else path
