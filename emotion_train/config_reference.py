"""Every key of a run config with default, unit, allowed values and meaning: for a terminal, as a
commented YAML file, as a JSON schema for editors, and as docs/reference/config.md.

Everything comes from the fields of `emotion_train.config`, the one home of each fact.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from emotion_train.config import LINEAR_LAYERS, Config
from emotion_train.edges.streams import text_is_the_result

_WIDTH = 100  # columns of comments, and of a terminal that is wider
_BEYOND = 2**62  # bounds above this are not shown
_SCHEMA_FILE = "emotion-train.schema.json"


class Key(NamedTuple):
    """One key; `allowed` is a phrase, `unit` is empty where there is none, `default` means nothing
    for a required key.
    """

    section: str
    name: str
    required: bool
    default: Any
    unit: str
    allowed: str
    meaning: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--yaml",
        action="store_true",
        help="print a commented YAML file with every default, the start of a run config",
    )
    form.add_argument(
        "--json-schema",
        action="store_true",
        help=f"print a JSON schema with which editors complete and check a run config ({_SCHEMA_FILE})",
    )
    form.add_argument("--markdown", action="store_true", help="print the page docs/reference/config.md")


def run(arguments: argparse.Namespace) -> int:
    text_is_the_result()
    if arguments.yaml:
        sys.stdout.write(as_yaml())
    elif arguments.json_schema:
        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    elif arguments.markdown:
        sys.stdout.write(as_markdown())
    else:
        sys.stdout.write(as_text(min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)))
    return 0


def _schema() -> dict[str, Any]:
    """The JSON schema by pydantic, with the layer names that a field's own check allows."""
    schema = Config.model_json_schema()
    targets = schema["$defs"]["LoraSection"]["properties"]["targets"]
    for one in targets["anyOf"]:
        if one["type"] == "array":
            one |= {"items": {"enum": list(LINEAR_LAYERS)}, "minItems": 1, "uniqueItems": True}
    return schema


def keys() -> Iterator[Key]:
    """Every key, in the order of the config."""
    schema = _schema()
    for section, reference in schema["properties"].items():
        fields = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        for name, field in fields["properties"].items():
            yield Key(
                section,
                name,
                name in fields.get("required", ()),
                field.get("default"),
                field.get("unit", ""),
                _allowed(field),
                field["description"],
            )


def _allowed(field: dict[str, Any]) -> str:
    """The values that a field of a JSON schema takes, as a phrase."""
    if "anyOf" in field:
        return " or ".join(_allowed(one) for one in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        *most, last = field["enum"]
        return f"{', '.join(most)} or {last}"
    kind = field["type"]
    if kind == "array":
        return f"a list of {_allowed(field['items']).replace(' or ', ', ')}"
    if kind == "object":
        return f"a table by name of {_allowed(field['additionalProperties'])}"
    if kind in ("integer", "number"):
        return _range(field, "whole number" if kind == "integer" else "number")
    return {"string": "text", "null": "null", "boolean": "true or false"}[kind]


def _range(field: dict[str, Any], kind: str) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    first = f"from {low:,}" if low is not None else f"above {above:,}" if above is not None else ""
    last = f"to {high:,}" if high is not None else ""
    if below is not None and below < _BEYOND:
        last = f"below {below:,}"
    return " ".join(word for word in (kind, first, last) if word)


def _value(value: Any) -> str:
    """The value in YAML, on one line."""
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return dumped.removesuffix("...\n").strip()


def _facts(key: Key) -> str:
    return "; ".join(fact for fact in ("required" if key.required else "", key.unit, key.allowed) if fact)


def as_text(width: int = _WIDTH) -> str:
    """The keys for a terminal of so many columns."""
    lines: list[str] = []
    for key in keys():
        default = "" if key.required else f" = {_value(key.default)}"
        head = f"{key.section}.{key.name}{default}   [{_facts(key)}]"
        lines += _wrapped(head, width, "", " " * 8) + _wrapped(key.meaning, width, " " * 4)
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int, first: str, others: str | None = None) -> list[str]:
    others = first if others is None else others
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def as_yaml() -> str:
    """A file that loads to the defaults; a key without a default is a comment."""
    lines = [
        f"# yaml-language-server: $schema={_SCHEMA_FILE}",
        "# Every key of a run config with its default. A None in a comment is null here. Required keys are",
        "# commented out: give them here, or as data.url=… and run.output_url=… on the command line.",
    ]
    section = ""
    for key in keys():
        if key.section != section:
            section = key.section
            lines += ["", f"{section}:"]
        lines += _wrapped(f"{key.meaning} [{_facts(key)}]", _WIDTH, "  # ")
        lines.append(f"  # {key.name}:" if key.required else f"  {key.name}: {_value(key.default)}")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The schema of a run config's file. No key is required, since the command line may give it,
    and a section may be empty, since all its keys may be commented out.
    """
    schema = _schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
        section["type"] = ["object", "null"]
    schema["title"] = "Run config of emotion-train"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def as_markdown() -> str:
    """docs/reference/config.md."""
    lines = [
        "# Config",
        "",
        "Every key of a run config. This page is printed by `emotion-train config --markdown`; change the",
        "fields in `emotion_train/config.py` and print it again.",
        "",
        "    emotion-train config                     # the same for a terminal",
        "    emotion-train config --yaml > run.yaml   # a commented file that loads to the defaults",
        f"    emotion-train config --json-schema > {_SCHEMA_FILE}   # for editors",
        "",
        "Defaults < the YAML file of `--config` < `section.field=value` words. Numbers that YAML reads",
        "otherwise than a person (`010`, `1:30`) are refused, text that looks like a number stands in",
        "quotes, and None is `null`.",
    ]
    section = ""
    for key in keys():
        if key.section != section:
            section = key.section
            lines += ["", f"## {section}", "", "| key | default | unit | allowed | meaning |"]
            lines.append("|---|---|---|---|---|")
        default = "required" if key.required else f"`{_value(key.default)}`"
        cells = (f"`{section}.{key.name}`", default, key.unit, key.allowed, key.meaning)
        escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main(["config", *sys.argv[1:]]))
