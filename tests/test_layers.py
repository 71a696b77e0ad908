"""The folders are the layers: imports point to rooms on the left; the launcher loads no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.run.choice import HERE, QUIETLY

ROOT = Path(__file__).parents[1]
# a page may use pages of its own room and of the rooms before it; verbs stand at the top level
LINE = """errors edges console other_names config completion command_line progress storage bases sizing
sources data preparation processes model evaluation report runs labelling exporting judging training hosted
VERBS cli"""
ROOMS = LINE.split()
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets", "sklearn"}
PAGES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for package in ("emotion_train", "launch")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


def room_of(page: str) -> int:
    """Place of a page of emotion_train in the line of rooms."""
    name = page.split(".")[1]
    return ROOMS.index(name if name in ROOMS else "VERBS")


def imports(page: str, *, when_imported: bool = False) -> Iterator[str]:
    """Modules that a page imports anywhere, or only `when_imported` itself; not those for type
    checking and of its `if __name__ == "__main__"` block.
    """
    pending: list[ast.AST] = [ast.parse(PAGES[page].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        if when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & PAGES.keys()
            yield from names or {node.module}
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("emotion_train.")])
def test_imports_point_to_rooms_on_the_left(page: str) -> None:
    used = {name for name in imports(page) if name.split(".")[0] in ("emotion_train", "launch")}
    assert not {name for name in used if name.startswith("launch")}
    assert not {name for name in used if room_of(name) > room_of(page)}


def test_every_room_is_in_the_line() -> None:
    rooms = {path.name for path in (ROOT / "emotion_train").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(ROOMS)


def test_the_launcher_loads_no_torch() -> None:
    """But for the pages that stand in for `accelerate launch`, programs of their own."""
    pending = [(page, page) for page in PAGES if page.startswith("launch.") and page not in (QUIETLY, HERE)]
    seen = {page for page, _ in pending}
    while pending:
        page, way = pending.pop()
        for name in imports(page, when_imported=not page.startswith("launch.")):
            assert name.split(".")[0] not in HEAVY, f"{way} -> {name}"
            if name in PAGES and name not in seen:
                seen.add(name)
                pending.append((name, f"{way} -> {name}"))


def test_only_two_verbs_ask_hosted_models() -> None:
    """What trains, and the launcher, work where the extra is not installed."""
    users = {page for page in PAGES if any(name.startswith("emotion_train.hosted") for name in imports(page))}
    outside = {page for page in users if not page.startswith("emotion_train.hosted.")}
    assert outside == {"emotion_train.benchmark", "emotion_train.augment"}
    askers = {
        page for page in PAGES if {"openai", "genai_prices"} & {name.split(".")[0] for name in imports(page)}
    }
    assert askers == {"emotion_train.hosted.client", "emotion_train.hosted.prices"}


def test_packages_import_nothing() -> None:
    for package in ("emotion_train", "launch"):
        for path in (ROOT / package).rglob("__init__.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)], (
                path
            )
