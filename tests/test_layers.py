"""Imports point down only: a page may use pages of its own level and of those below it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"console", "errors", "outcome", "preemption"},
    {"config", "shape"},
    {"activations"},
    {
        "loss",
        "manifest",
        "memory",
        "metrics",
        "data.order",
        "data.packing",
        "data.posts",
        "data.spill",
        "data.stratify",
        "storage",
        "staged",
        "base",
        "gguf_file",
        "progress",
    },
    {"data.cleaning", "data.index", "data.reader", "data.shards", "data.tokenization", "local_s3", "runlog"},
    {"data.loader", "model.", "checkpoint", "report.", "ranks", "distributed", "retention"},
    {"scoring", "saver", "interruption", "microbatch"},
    {"trainer", "publish"},
    {"prepare", "stage_base", "train", "evaluate", "predict", "demo"},
    {"cli"},
]
FOR_THE_LAUNCHER = {
    *(
        "config",
        "console",
        "errors",
        "storage",
        "runlog",
        "staged",
        "base",
        "progress",
        "outcome",
        "preemption",
        "memory",
        "shape",
        "gguf_file",
    ),
    *("data.index", "data.cleaning", "data.packing", "data.reader", "data.tokenization"),
}


def level(name: str) -> int:
    return next(
        i
        for i, pages in enumerate(LEVELS)
        if name in pages or any(p.endswith(".") and name.startswith(p) for p in pages)
    )


def imports(path: Path) -> set[str]:
    """Project pages imported anywhere in a file, but for type checking and in its `if __name__ ==
    "__main__"` block.
    """
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            if (ROOT / node.module.replace(".", "/")).is_dir():
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return {name for name in found if name.split(".")[0] in ("emotion_train", "launch")}


def test_imports_point_down_only() -> None:
    for path in (ROOT / "emotion_train").rglob("*.py"):
        if path.name == "__init__.py":
            continue
        page = path.relative_to(ROOT / "emotion_train").with_suffix("").as_posix().replace("/", ".")
        for name in imports(path):
            assert not name.startswith("launch"), f"{page} imports the launcher"
            assert level(name.removeprefix("emotion_train.")) <= level(page), (
                f"{page} imports {name}, which is above it"
            )


def test_the_launcher_uses_the_torch_free_pages_only() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        used = {
            name.removeprefix("emotion_train.") for name in imports(path) if name.startswith("emotion_train")
        }
        assert used <= FOR_THE_LAUNCHER, f"{path.name} imports {used - FOR_THE_LAUNCHER}"


def test_packages_import_nothing() -> None:
    for path in (*(ROOT / "emotion_train").rglob("__init__.py"), ROOT / "launch" / "__init__.py"):
        assert not [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ], path
