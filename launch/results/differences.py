"""The differences between compared runs in config, data and versions, and the groups of runs that
are one config with several seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from emotion_train.data.targets import AUXILIARY
from emotion_train.errors import WrongRequest
from launch.results.same_posts import OpenData
from launch.results.scored import Scored

# settings that identify one run among others of its recipe, or change nothing that is learned
_OF_THE_RUN = ("run", "checkpoint", "preemption", "distributed", "report", "data.url")
_OF_THE_MACHINE = ("train.tokens_per_microbatch", "train.gradient_checkpointing")
_NOT_SHOWN = ("run.id", "run.output_url", "data.url")
_NOTHING = "–"


class Row(NamedTuple):
    """One thing that differs, with its value in each group."""

    name: str
    values: tuple[str, ...]


class Group(NamedTuple):
    """Runs that are compared as one: positions in the list of all."""

    name: str
    runs: tuple[int, ...]


def by_config(scored: Sequence[Scored]) -> list[Group]:
    """The runs in groups of one config, in the order of their first.

    Raises `WrongRequest` for a scorecard, which does not hold its config, and for two runs with the
    same config and the same seed.
    """
    members: dict[str, list[int]] = {}
    for place, one in enumerate(scored):
        if one.config is None:
            raise WrongRequest(
                f"{one.word} is a scorecard, which does not hold its config; leave --group-by-config out, or"
                " give runs and reports."
            )
        members.setdefault(_recipe(one), []).append(place)
    for places in members.values():
        _refuse_one_seed_twice([scored[place] for place in places])
    names = [_group_name([scored[place].name for place in places]) for places in members.values()]
    names = [
        name if names.count(name) == 1 else f"{name}, config {number}"
        for number, name in enumerate(names, start=1)
    ]
    return [Group(name, tuple(places)) for name, places in zip(names, members.values(), strict=True)]


def one_each(scored: Sequence[Scored]) -> list[Group]:
    return [Group(one.name, (place,)) for place, one in enumerate(scored)]


def seeds_of_one_config(scored: Sequence[Scored]) -> list[Group]:
    """The groups of runs with one config and different seeds, two or more each."""
    with_config = [place for place, one in enumerate(scored) if one.config is not None]
    members: dict[str, dict[int | None, int]] = {}
    for place in with_config:
        members.setdefault(_recipe(scored[place]), {}).setdefault(scored[place].seed, place)
    return [
        Group(_group_name([scored[place].name for place in places.values()]), tuple(places.values()))
        for places in members.values()
        if len(places) > 1
    ]


def _refuse_one_seed_twice(runs: Sequence[Scored]) -> None:
    seen: dict[int | None, Scored] = {}
    for one in runs:
        if one.seed in seen:
            raise WrongRequest(
                f"{seen[one.seed].name} and {one.name} are one config with one seed ({one.seed}), so they"
                " show nothing about other seeds; leave one out, or train with another run.seed."
            )
        seen[one.seed] = one


def _recipe(one: Scored) -> str:
    """A digest of all that decides what is learned, except the seed."""
    assert one.report is not None
    kept = {
        name: value
        for name, value in flat(one.config or {})
        if name not in _OF_THE_MACHINE
        and value is not None  # a setting that an earlier version did not have
        and not any(name == cut or name.startswith(f"{cut}.") for cut in _OF_THE_RUN)
    }
    identity = one.report.identity
    facts = [kept, identity.base, identity.precision, identity.index_sha256]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _group_name(names: Sequence[str]) -> str:
    """`run` for run-seed-1 and run-seed-2, and for run-seed-42 and run-seed-43."""
    if len(names) == 1:
        return names[0]
    common = names[0]
    for name in names[1:]:
        while not name.startswith(common):
            common = common[:-1]
    if any(name[len(common) :][:1].isdigit() for name in names):  # the prefix ends within a number
        common = common.rstrip("0123456789")
    common = common.rstrip("-_.").removesuffix("seed").rstrip("-_.")
    return f"{common or names[0]} ({len(names)} seeds)"


def flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as `section.field` and its value."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def differences(
    scored: Sequence[Scored], groups: Sequence[Group], data: Sequence[OpenData | str]
) -> dict[str, list[Row]]:
    """The rows that differ between the groups, by kind: config, data, versions. A group's value
    names each different value of its runs once.
    """
    configs = [
        {
            name: value
            for name, value in flat(one.config or {})
            if name not in _NOT_SHOWN and value is not None
        }
        for one in scored
    ]
    versions = [dict(one.report.identity.versions) if one.report else {} for one in scored]
    return {
        "config": _rows(groups, [*map(_config_cells, scored, configs)]),
        "data": _rows(groups, _data_cells(scored, data)),
        "versions": _rows(groups, [*map(_version_cells, scored, versions)]),
    }


def _config_cells(one: Scored, config: dict[str, Any]) -> dict[str, str]:
    cells = {name: _written(value) for name, value in config.items()}
    if one.report is None:  # a scorecard holds only these
        document = one.document
        cells |= {
            "model.base": getattr(document, "base", ""),
            "model.precision": getattr(document, "precision", ""),
        }
        if (layers := getattr(document, "layers", None)) is not None:
            cells["model.layers"] = str(layers)
    return cells


def _version_cells(one: Scored, versions: dict[str, str]) -> dict[str, str]:
    if one.report is None:
        return {}
    identity = one.report.identity
    machine = {
        "git commit": identity.git_commit or "not known",
        "device": f"{identity.world_size} × {identity.device}",
    }
    return versions | machine


def _data_cells(scored: Sequence[Scored], data: Sequence[OpenData | str]) -> list[dict[str, str]]:
    """The data sets, with their training splits and auxiliary posts. These are identified by the
    sha256 of their objects where all data sets can be read, else by the sha256 of the index.
    """
    cells: list[dict[str, str]] = []
    all_open = all(isinstance(there, OpenData) for there in data)
    for one, there in zip(scored, data, strict=True):
        own = {"data set": str(one.data_url or getattr(one.document, "source", _NOTHING))}
        if all_open and isinstance(there, OpenData):
            own["training split"] = _split_cell(there, "train")
            own["auxiliary posts"] = _split_cell(there, AUXILIARY)
        elif one.report is not None:
            rows = one.report.dataset.rows.get("train", 0)
            own["training split"] = f"{rows:,} posts, index {one.report.identity.index_sha256[:12]}"
        cells.append(own)
    return cells


def _split_cell(there: OpenData, name: str) -> str:
    split = there.index.stored_splits.get(name)
    digest = hashlib.sha256("".join(there.objects(name) or ()).encode()).hexdigest()
    return f"{split.rows:,} posts, sha256 {digest[:12]}" if split else _NOTHING


def _rows(groups: Sequence[Group], cells: Sequence[Mapping[str, str]]) -> list[Row]:
    names = dict.fromkeys(name for one in cells for name in one)
    rows = []
    for name in names:
        values = tuple(
            ", ".join(dict.fromkeys(cells[run].get(name, _NOTHING) for run in group.runs)) for group in groups
        )
        if len(set(values)) > 1:
            rows.append(Row(name, values))
    return rows


def _written(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
