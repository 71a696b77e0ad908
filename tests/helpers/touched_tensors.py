"""Which tensors of a checkpoint are read."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors


def note_touched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the tensors that are read from safetensors files from now on, as they come."""
    touched: set[str] = set()
    real = safetensors.safe_open

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, key: str) -> Any:
            touched.add(key)
            return self.file.get_slice(key)

        def get_tensor(self, key: str) -> Any:
            touched.add(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    return touched
