"""bitsandbytes is imported without PyTorch's compiler, and compiles nothing less."""

from __future__ import annotations

from collections.abc import Callable

import torch

from emotion_train.model.precision import _compiled_when_called, import_bitsandbytes_quickly


def test_a_function_is_compiled_when_it_is_called_first() -> None:
    asked: list[tuple[Callable[[int], int], dict[str, object]]] = []

    def compile_now(function: Callable[[int], int], **options: object) -> Callable[[int], int]:
        asked.append((function, options))
        return lambda number: 10 * function(number)

    def twice(number: int) -> int:
        return 2 * number

    found = _compiled_when_called(compile_now, twice, dynamic=False)
    assert found.__name__ == "twice"
    assert asked == []
    assert [found(1), found(2)] == [20, 40]
    assert asked == [(twice, {"dynamic": False})]


def test_pytorch_s_own_compile_is_left_alone() -> None:
    """test_systems.py looks at what a process imports."""
    before = torch.compile
    import_bitsandbytes_quickly()
    assert torch.compile is before
    assert "emotion_train" not in torch.compile.__module__
