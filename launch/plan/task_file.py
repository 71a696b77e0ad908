"""A SkyPilot task with the plan's GPUs: sky/train.yaml with other candidates, and every other line
and comment unchanged. The package holds its own train.yaml (in a checkout a link to sky/'s), since
a folder named `sky` must not be installed: it would hide SkyPilot.

The file is changed as text, because a YAML library would drop its comments, and then read back to
check that only the candidates, the overrides and the config differ.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emotion_train.edges.bounded import Unreadable, yaml_in
from emotion_train.errors import WrongRequest
from launch.plan.choices import Choice
from launch.plan.prices import Prices

TEMPLATE = Path(__file__).parent / "train.yaml"
# the keys of `resources` that say which machine
_CHOOSING = ("ordered", "any_of", "accelerators", "use_spot")
_COMMENT_WIDTH = 134


def write_task_file(
    target: Path,
    choices: Sequence[Choice],
    overrides: Sequence[str],
    config: str | None = None,
    template: Path = TEMPLATE,
    *,
    about: str = "",
    complete: bool = True,
) -> None:
    """Write the task for these GPUs in their order, first all on spot, then all on demand.

    `overrides` become the default of the task's OVERRIDES, `config` (None: the template's) the
    default of its CONFIG, and `about`, how the list was made, the comment above the list. Nothing
    stays of an earlier plan. `complete`: a machine without a price is not on offer. Raises
    `WrongRequest` without a template, and for a file that is not laid out like one.
    """
    if config is None:
        config = _config_of(template)
    text = _read(target if target.is_file() else template)
    written = rewritten(text, choices, overrides, config, about, complete)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target.resolve(), written)
    except OSError as error:
        raise WrongRequest(
            f"{target} cannot be written ({error.strerror}); give --write another file."
        ) from None


def _config_of(template: Path) -> str:
    try:
        return str((yaml_in(_read(template)).get("envs") or {}).get("CONFIG"))
    except (Unreadable, AttributeError) as error:
        raise WrongRequest(
            f"The task file {template} cannot be read ({error}); start from sky/train.yaml."
        ) from None


def _replace(target: Path, text: str) -> None:
    """Replace the file by the text, whole or, on a full disk, not at all: the file may be the only
    copy of a person's own task.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise WrongRequest(
            f"The task file {path} that a plan is written into cannot be read ({error.strerror}); give"
            " --write a file that is yours, or install the package again."
        ) from None
    except UnicodeDecodeError:
        raise WrongRequest(
            f"{path} is no task file, as it is not UTF-8; give --write a new file, or one made from"
            " sky/train.yaml."
        ) from None


def what_the_list_is(best: Choice, prices: Prices, posts: int) -> str:
    """How a plan made its list, for the reader of the task."""
    order = (
        "The smallest GPUs that are enough, since no prices were known"
        if best.usd is None
        else f"In the order of dollars a job, not an hour; prices: {prices.source}"
    )
    return (
        f"{order}. All in {best.precision}, for {posts:,} posts. Hours and dollars at the right are for the"
        " whole job, preemptions of spot machines included. Written by `emotion-launch plan`."
    )


def rewritten(
    text: str,
    choices: Sequence[Choice],
    overrides: Sequence[str],
    config: str,
    about: str = "",
    complete: bool = True,
) -> str:
    """The task's text with these candidates, the comment `about` above them, and these values. A
    comment above the earlier candidates is dropped. Raises `WrongRequest` for a text that is not
    laid out like the template, and for a value that a task cannot pass on.
    """
    for word in overrides:
        # the task's shell splits OVERRIDES at spaces, and keeps quotes
        if re.search(r"[\s\"'\\]", word):
            raise WrongRequest(
                f"The value {word!r} holds a space, a quote or a backslash, which a task cannot pass on;"
                " write it without them, such as lora.targets=[q_proj,v_proj]."
            )
    lines = text.splitlines(keepends=True)
    first, last = _block(lines, "resources", indent=0)
    kept: list[str] = []
    at = first + 1
    place: int | None = None
    while at <= last:
        key = re.match(r"  (\w+):", lines[at])
        if key and key[1] in _CHOOSING:
            while kept and kept[-1].lstrip().startswith("#"):
                kept.pop()
            place = len(kept) if place is None else min(place, len(kept))
            at = _block(lines, key[1], indent=2, start=at)[1] + 1
        else:
            kept.append(lines[at])
            at += 1
    place = 0 if place is None else place
    changed = "".join(
        [
            *lines[: first + 1],
            *kept[:place],
            *(f"  # {line}\n" for line in textwrap.wrap(about, _COMMENT_WIDTH)),
            "  ordered:\n",
            *(_line(choice, use_spot) for choice, use_spot in candidates(choices, complete)),
            *kept[place:],
            *lines[last + 1 :],
        ]
    )
    values = {
        "OVERRIDES": f'"{" ".join(overrides)}"',
        "CONFIG": config if re.fullmatch(r"[\w./-]+", config) else json.dumps(config),
    }
    if any(re.match(r"  PRICES: ", line) for line in lines):
        values["PRICES"] = f'"{prices_words(choices)}"'
    for name, value in values.items():
        line = re.compile(rf'^(  {name}: )(?:"[^"\n]*"|\S+)', re.MULTILINE)
        changed = line.sub(lambda found, value=value: found[1] + value, changed)  # type: ignore[misc]
    listed = [(choice.accelerators(use_spot), use_spot) for choice, use_spot in candidates(choices, complete)]
    expected = {"OVERRIDES": " ".join(overrides), "CONFIG": config, "PRICES": prices_words(choices)}
    _check(text, changed, listed, {name: expected[name] for name in values})
    return changed


def prices_words(choices: Sequence[Choice]) -> str:
    """The dollars an hour of these choices, from which the machine takes its own: `H100:1=4.00
    H100:1:spot=2.20`.
    """
    words = []
    for choice in choices:
        for how, quote in (("", choice.offer.on_demand), (":spot", choice.offer.spot)):
            if quote is not None:
                words.append(f"{choice.name}{how}={quote.usd_per_hour:.4f}")
    return " ".join(words)


def candidates(choices: Sequence[Choice], complete: bool = True) -> list[tuple[Choice, bool]]:
    """(choice, on spot?) in the order in which SkyPilot tries them; where all prices are known,
    only machines that are on offer.
    """
    only = complete and any(choice.usd is not None for choice in choices)
    spot = [(choice, True) for choice in choices if choice.usd_spot is not None or not only]
    return spot + [(choice, False) for choice in choices if choice.usd_on_demand is not None or not only]


def _line(choice: Choice, use_spot: bool) -> str:
    usd, hours = (choice.usd_spot, choice.spot_hours) if use_spot else (choice.usd_on_demand, choice.hours)
    entry = f'    - {{accelerators: "{choice.accelerators(use_spot)}", use_spot: {str(use_spot).lower()}}}'
    facts = ([f"{hours:.1f} h"] if hours is not None else []) + ([f"${usd:.2f}"] if usd is not None else [])
    return f"{entry:<58} # {', '.join(facts)}\n" if facts else f"{entry}\n"


def _block(lines: Sequence[str], key: str, indent: int, start: int = 0) -> tuple[int, int]:
    """First and last line of a key with the lines indented below it; comments and blank lines after
    them belong to the next key.
    """
    opening = re.compile(rf"{' ' * indent}{key}:")
    first = next((at for at in range(start, len(lines)) if opening.match(lines[at])), None)
    if first is None:
        raise WrongRequest(
            f"The task file has no `{key}:` to put the plan's GPUs under; start from sky/train.yaml."
        )
    last = at = first
    while at + 1 < len(lines):
        at += 1
        line = lines[at]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if len(line) - len(line.lstrip()) <= indent:
            break
        last = at
    return first, last


def _check(before: str, after: str, listed: Sequence[tuple[str, bool]], values: dict[str, str]) -> None:
    """Raises `WrongRequest` unless the texts differ only in the candidates and in `values`, and
    `after` has the candidates `listed` and these values.
    """

    def rest(text: str) -> dict[str, Any]:
        document = yaml_in(text)
        resources = {key: value for key, value in document["resources"].items() if key not in _CHOOSING}
        envs = {key: value for key, value in (document.get("envs") or {}).items() if key not in values}
        return {**document, "resources": resources, "envs": envs}

    try:
        same = rest(before) == rest(after)
        written = yaml_in(after)
        same = same and {key: written["envs"][key] for key in values} == values
        named = [(one["accelerators"], one["use_spot"]) for one in written["resources"]["ordered"]]
    except (Unreadable, KeyError, TypeError, AttributeError):
        same, named = False, []
    if not same or named != list(listed):
        raise WrongRequest(
            "The task file's `resources:` or `envs:` is not laid out as in sky/train.yaml; start from that"
            " one."
        )
