"""A data set that already exists at DATA_URL: the same one is checked and completed, another one is
never touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emotion_train.data.index import INDEX_KEY, Index, read_index
from emotion_train.errors import WrongRequest
from emotion_train.storage.store import Store

_NAMES_SHOWN = 4


def existing_index(store: Store) -> Index | None:
    return None if store.find(INDEX_KEY) is None else read_index(store)


def restore(store: Store, existing: Index, index: Index, folder: Path) -> int:
    """Check that the data set at `store` is the one just made in `folder`, and complete it; returns
    how many of its objects were missing and were written.

    Raises `WrongRequest` for another data set, and for an object that has other bytes.
    """
    from emotion_train.data.objects import look_at_objects
    from emotion_train.preparation.shards import local_file, place

    _refuse_another(store, existing, index)
    found = look_at_objects(store, existing)
    if found.damaged:
        shown = list(found.damaged.items())[:_NAMES_SHOWN]
        more = f", and {len(found.damaged) - len(shown)} more" if len(found.damaged) > len(shown) else ""
        raise WrongRequest(
            f"The data set at {store.url} is damaged: {', '.join(damage for _, damage in shown)}{more};"
            f" delete {', '.join(store.url_of(key) for key, _ in shown)}{more} and type the same command"
            " again, which writes missing objects anew."
        )
    for name, split in existing.stored_splits.items():
        for number, described in enumerate(split.objects):
            if described.key in found.missing:
                place(store, described, local_file(folder, name, number))
    return len(found.missing)


def _refuse_another(store: Store, existing: Index, index: Index) -> None:
    if _content(existing) == _content(index):
        return
    if "on_conflict" in existing.source:
        raise WrongRequest(
            f"{store.url} holds another prepared data set ({_difference(existing, index)}); it is never"
            " overwritten. Type another DATA_URL, or repeat the source and options it was made with."
        )
    if not same_posts(existing, index):
        raise WrongRequest(
            f"{store.url} holds a data set of an earlier version of this program, and this version makes"
            f" another one from {index.source.get('name')} ({_difference(existing, index, ('source',))}). It"
            " stays as it is, fit for training: type another DATA_URL, or --on-conflict first if the"
            " earlier version differed only in that."
        )


def _content(index: Index) -> dict[str, Any]:
    """The index without the fields that a copy, or another version of this program or a library,
    changes while the posts' bytes stay the same.
    """
    from emotion_train.data.lengths import RECORDED

    content = index.model_dump(exclude={"versions", "schema_version"})
    content["source"] = {key: value for key, value in index.source.items() if key not in RECORDED}
    for split in _splits_of(content):
        for described in split["objects"]:
            del described["etag"]
    return content


def same_posts(one: Index, other: Index) -> bool:
    """Whether both indexes describe the same posts, trained on or scored, at the same places, and
    the same label names.
    """
    return _posts(one) == _posts(other)


def _posts(index: Index) -> dict[str, Any]:
    """The part of the index that says which posts are where: without the objects' names and the
    facts on the source, which earlier versions chose differently.
    """
    content = _content(index)
    del content["source"]
    for split in _splits_of(content):
        for described in split["objects"]:
            del described["key"]
    return content


def _splits_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    auxiliary = content["auxiliary"]
    return [*content["splits"].values(), *([] if auxiliary is None else [auxiliary["split"]])]


def _difference(one: Index, other: Index, apart_from: tuple[str, ...] = ()) -> str:
    there, now = _content(one), _content(other)
    for name in ("labels", "seed", "source"):
        if name in apart_from:
            continue
        old, new = there[name], now[name]
        if isinstance(old, dict):
            changed = next(
                (key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)), None
            )
            if changed is not None:
                return f"{changed} {old.get(changed)!r} there, {new.get(changed)!r} now"
        elif old != new:
            return f"{name} {old!r} there, {new!r} now"
    return "the posts differ"
