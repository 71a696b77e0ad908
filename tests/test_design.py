"""What docs/design says of folders and names is so: rooms, pages, order of imports, cited code,
links.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from emotion_train.cli import VERBS, page_of
from tests.test_layers import ROOMS

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design"
PAGES = sorted(DESIGN.glob("*.md"))
ARCHITECTURE = (DESIGN / "architecture.md").read_text(encoding="utf-8")
TOP = ("emotion_train", "launch", "sky", "accelerate_configs", "tests", "benchmarks", "docs")
# `path/to/page.py::Class.method`, or a path alone
CITED = re.compile(rf"(?<![\w./-])((?:{'|'.join(TOP)})/[\w./-]*)(?:::([\w.]+))?")


def tree() -> dict[str, dict[str, list[str]]]:
    """Names of pages by top folder and entry: `emotion_train`, `data/`, [`posts`, …].

    A top folder starts a line, an entry is two spaces in, and further in are the names of its
    pages. An entry twice under one folder fails.
    """
    folders: dict[str, dict[str, list[str]]] = {}
    folder = entry = ""
    block = ARCHITECTURE.split("```text\n")[1].split("```")[0]
    for line in block.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split()
        if indent == 0:
            folder = words[0].removesuffix("/")
            assert folder not in folders, f"{folder} has two lines"
            folders[folder] = {}
        elif indent == 2:
            entry = words[0]
            assert entry not in folders[folder], f"{folder}/{entry} has two lines"
            folders[folder][entry] = []
        else:
            folders[folder][entry] += words
    return folders


def modules(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.name != "__init__.py")


def packages(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/__init__.py")}


def test_every_top_folder_of_the_tree_exists() -> None:
    assert set(tree()) == set(TOP)
    assert not [name for name in TOP if not (ROOT / name).is_dir()]


@pytest.mark.parametrize("package", ["emotion_train", "launch"])
def test_every_room_has_one_entry_that_names_all_its_pages(package: str) -> None:
    rooms = {name[:-1]: pages for name, pages in tree()[package].items() if name.endswith("/")}
    assert packages(ROOT / package) <= set(rooms)
    for room, pages in rooms.items():
        assert (ROOT / package / room).is_dir(), f"{package}/{room} does not exist"
        assert sorted(pages) == modules(ROOT / package / room), f"pages of {package}/{room}"


@pytest.mark.parametrize("package", ["emotion_train", "launch"])
def test_pages_outside_the_rooms_are_named_once(package: str) -> None:
    entries = tree()[package]
    named = [page for name, pages in entries.items() if not name.endswith("/") for page in pages]
    assert sorted(named) == modules(ROOT / package)


def test_the_verbs_of_the_tree_are_those_of_the_command() -> None:
    named = tree()["emotion_train"]["verbs"]
    # `api` is all verbs at once, for Python; like them it may use every room
    assert sorted(named) == sorted(["cli", "api", *map(page_of, VERBS)])


def test_the_order_of_imports_is_the_one_that_is_held() -> None:
    line = re.search(r"^    (\w+(?: < \w+)+)$", ARCHITECTURE, re.MULTILINE)
    assert line is not None
    order = line[1].split(" < ")
    assert order == ROOMS
    rooms = [name[:-1] for name, pages in tree()["emotion_train"].items() if name.endswith("/") and pages]
    assert rooms == [name for name in order if name in rooms], "the tree is in another order"


@cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a page, and methods and fields as `Class.name`."""

    def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign):
                found |= {prefix + one.id for one in node.targets if isinstance(one, ast.Name)}
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
        return found

    return frozenset(names(ast.parse(path.read_text(encoding="utf-8")).body))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_cites_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for path, name in CITED.findall(text):
        path, name = path.rstrip("."), name.rstrip(".")
        if not (ROOT / path).exists() or (name and name not in defined(ROOT / path)):
            missing.append(f"{path}::{name}" if name else path)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@cache
def anchors(page: Path) -> frozenset[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings)


def test_the_index_names_every_page() -> None:
    linked = re.findall(r"\]\((\w[\w-]*\.md)\)", (DESIGN / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(page.name for page in PAGES if page.name != "README.md")
