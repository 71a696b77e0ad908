"""The files of a base model: in a folder, in one .gguf file, on the Hugging Face hub, or where
`stage-base` put them.

A base may bring programs of its own, which its configuration names under `auto_map`. None is ever
run: the configuration is read here as data, and not by a library that would run them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emotion_train.bases.depth import Layers
from emotion_train.bases.packaged import SMALL_MODEL, packaged_file
from emotion_train.bases.staged import BASE_KEY, UNFINISHED_KEY, StagedBase, open_staged
from emotion_train.edges import hub
from emotion_train.edges.bounded import Unreadable, object_file
from emotion_train.edges.paths import typed_path
from emotion_train.errors import WrongRequest
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store

INSTEAD = (
    "give a folder with the checkpoint, a .gguf file, smollm2, or a hub id such as"
    " mistralai/Mistral-Small-3.1-24B-Base-2503"
)
CODE = "auto_map"  # the key under which a configuration names programs
CONFIGURATIONS = ("config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class BaseFiles:
    """The base `name` as the user gave it. Exactly one of `folder`, `gguf` and `staged` is set, or
    none for a hub id. `packaged`: the base is the packaged small model, whose file is `gguf`.
    `layers`: the number of first blocks to read, or their share; None means all.
    """

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    staged: StagedBase | None = None
    packaged: bool = False
    layers: Layers | None = None

    @classmethod
    def find(cls, name: str, layers: Layers | None = None) -> BaseFiles:
        """The files of the base `name`, with `layers` of its blocks to read. A staged base's index
        is read here.

        Raises `WrongRequest` for a base that does not exist, or whose staging was not finished.
        """
        return replace(cls._find(name), layers=layers)

    @classmethod
    def _find(cls, name: str) -> BaseFiles:
        if (packaged := packaged_file(name)) is not None:  # also where a folder has that name: ./smollm2
            return cls(SMALL_MODEL, gguf=packaged, packaged=True)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
            return cls(name, staged=open_staged(open_store(name)))
        path = typed_path(name)
        if (path / BASE_KEY).is_file() or (path / UNFINISHED_KEY).is_file():
            return cls(name, staged=open_staged(FolderStore(path)))
        if path.is_dir():
            return cls(name, folder=path)
        if path.is_file() and path.suffix == ".gguf":
            return cls(name, gguf=path)
        if path.is_file():
            raise WrongRequest(
                f"The base {name} is a file; give a checkpoint's folder, a .gguf file or a hub id such as"
                " owner/model."
            )
        if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise WrongRequest(
                f"The base {name} does not exist; give a checkpoint's folder, a .gguf file or a hub id such"
                " as owner/model."
            )
        return cls(name)

    @property
    def lasting_name(self) -> str:
        """The name to record: a hub id, a bucket's URL, a packaged model's name, or an absolute
        path.
        """
        if self.packaged:
            return self.name
        if self.staged is not None:
            return self.staged.lasting_name
        path = self.folder or self.gguf
        return self.name if path is None else str(path.resolve())

    def file(self, file: str) -> Path | None:
        """The path of one file of the checkpoint, downloaded if needed; None where the checkpoint
        has no such file.

        Raises `WrongRequest` when the hub does not know the base or wants a token, and
        `StorageError` when it cannot be reached or answers with an error of its own.
        """
        if self.staged is not None:
            return self.staged.path(file)
        if self.gguf is not None:
            path = self.gguf.parent / file
            return path if path.is_file() else None
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        return _download(self.name, file)

    def weight_map(self) -> tuple[dict[str, str], int] | None:
        """The safetensors file of each tensor, and the bytes of all by the index (0 where it does
        not say); None for a checkpoint of one file.

        Raises `WrongRequest` for a damaged index.
        """
        index = self.file("model.safetensors.index.json")
        if index is None:
            return None
        try:
            document = object_file(index)
            files = {str(key): str(file) for key, file in document["weight_map"].items()}
            if stray := next((file for file in files.values() if not _FILE_NAME.fullmatch(file)), None):
                raise WrongRequest(f"{index} names {stray!r}, which is no file beside it; download it again.")
            return files, int(document.get("metadata", {}).get("total_size", 0))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise WrongRequest(f"{index} is no safetensors index; download it again.") from None

    def config(self) -> dict[str, Any]:
        """The content of config.json without any `auto_map`, so that no library learns of programs
        that the base names. Raises `WrongRequest`.
        """
        path = self.required(CONFIGURATIONS[0])
        try:
            found: dict[str, Any] = _without_code(object_file(path))
        except (Unreadable, OSError) as error:
            raise WrongRequest(
                f"{path} of the base {self.name} cannot be used ({error}); give a whole checkpoint."
            ) from None
        return found

    def names_code(self) -> list[str]:
        """The small files in which the base names programs of its own, which are never run."""
        found = []
        for name in CONFIGURATIONS:
            path = None if self.gguf is not None else self.file(name)
            try:
                if path is not None and _has_code(object_file(path)):
                    found.append(name)
            except (Unreadable, OSError):  # said where the file is used
                continue
        return found

    def required(self, file: str) -> Path:
        """The path as by `file`; raises `WrongRequest` where the file is missing."""
        path = self.file(file)
        if path is None:
            where = (
                ""
                if self.folder or self.gguf or self.staged
                else ", or it is not in the local hub cache and the hub cannot be reached"
            )
            raise WrongRequest(
                f"The base {self.name} has no {file}{where}; give the folder or hub id of a safetensors"
                " checkpoint, or a .gguf file."
            )
        return path


_FILE_NAME = re.compile(r"[^/\\\x00-\x1f]+")


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(part) for key, part in value.items() if key != CODE}
    return [_without_code(part) for part in value] if isinstance(value, list) else value


def _has_code(document: dict[str, Any]) -> bool:
    return bool(_without_code(document) != document)


def _download(repo: str, file: str) -> Path | None:
    try:
        return hub.file(repo, file)
    except Exception as error:  # the hub's client raises errors of many families
        raise hub.refusal(error, "base", repo, INSTEAD) from None
