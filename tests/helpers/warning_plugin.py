"""A plugin of pytest that warns wherever one may, outside of tests."""

from __future__ import annotations

import warnings


def warn(*_: object) -> None:
    warnings.warn("a plugin has something to say", UserWarning, stacklevel=2)


def pytest_configure() -> None:
    warn()


def pytest_sessionstart() -> None:
    warn()


def pytest_collection_finish() -> None:
    warn()


def pytest_terminal_summary() -> None:
    warn()


def pytest_sessionfinish() -> None:
    warn()
