"""Writes down which posts each optimizer step is trained on, in every trainer that is started with
this folder on PYTHONPATH and a folder for journals in EMOTION_SOAK_JOURNALS.

Python runs this page at its start. The trainer's own page is left as it is; what it defines is
watched once it is imported. A line stands before its step is taken, so that a step which a
checkpoint has is in the journals of all ranks, whoever is killed when.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PAGE = "emotion_train.training.trainer"
FOLDER_VARIABLE, START_VARIABLE = "EMOTION_SOAK_JOURNALS", "EMOTION_SOAK_START"


class _Watch:
    """Stands first among Python's finders until the trainer's page is imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _PAGE:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_watch(module: ModuleType) -> None:
            load(module)
            _watch(module.Trainer)

        loader.exec_module = load_and_watch
        return spec


def _watch(trainer: Any) -> None:
    start, rank = os.environ[START_VARIABLE], os.environ.get("RANK", "0")
    path = os.path.join(os.environ[FOLDER_VARIABLE], f"{start}-{rank}-{os.getpid()}")
    journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    step: Callable[[Any, Any], None] = trainer._step

    def noted(self: Any, batch: Any) -> None:
        line = json.dumps([self.progress.step, batch.epoch, batch.step, batch.ids])
        os.write(journal, f"{line}\n".encode())
        step(self, batch)

    trainer._step = noted


if FOLDER_VARIABLE in os.environ:
    sys.meta_path.insert(0, _Watch)
