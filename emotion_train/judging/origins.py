"""The adapters to judge and what they were trained on: which of the posts that is, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from emotion_train.data.text_filter import FALSE_POSITIVES, keys_of
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice
from emotion_train.evaluation.members import facts_together
from emotion_train.judging.judged import FLOOR_MAX_ROWS
from emotion_train.judging.question import Question
from emotion_train.report.schema import Member
from emotion_train.report.scorecard import Seen
from emotion_train.runs.adapter_cache import FoundAdapter, find_adapter
from emotion_train.runs.origin import NotInReach, Origin
from emotion_train.storage.document import file_sha256

_LOOKED_UP_AT_A_TIME = 10_000


class Adapters(NamedTuple):
    """The adapters as folders of this machine, and the origin of each."""

    chosen: AdapterChoice
    origins: list[Origin]

    @classmethod
    def of(cls, asked: Question) -> Adapters:
        """The adapters that are asked about. Raises `WrongRequest` for adapters that cannot answer
        together, and for a run that is not theirs.
        """
        if asked.chosen.more and asked.run_url is not None:
            raise WrongRequest(
                "--run names the run of one adapter, and several are given; leave it out, and give each"
                " --adapter as OUTPUT_URL/RUN_ID."
            )
        all_found = [find_adapter(str(place)) for place in asked.chosen.adapters]
        folders = [found.folder for found in all_found]
        origins = [_origin_of(found, asked) for found in all_found]
        facts_together(folders, [str(place) for place in asked.chosen.adapters])
        return cls(replace(asked.chosen, adapter=folders[0], more=tuple(folders[1:])), origins)

    def apart(self) -> list[Origin]:
        """One origin for each data set that the adapters were trained on."""
        return list({one.index_sha256 or one.folder: one for one in reversed(self.origins)}.values())

    def members(self) -> tuple[Member, ...]:
        """The adapters by name and weights where there are several."""
        if len(self.origins) == 1:
            return ()
        return tuple(
            Member(
                name=one.facts.run_id or one.folder.resolve().name,
                weights_sha256=file_sha256(one.folder / one.facts.weights_file),
            )
            for one in self.origins
        )


def _origin_of(found: FoundAdapter, asked: Question) -> Origin:
    origin = Origin.of(found.folder, asked.run_url, asked.training_data)
    if asked.run_url is None and found.run_url is not None:  # its report may name an earlier place
        return replace(origin, run_url=found.run_url)
    return origin


def look_up(origin: Origin, posts: Iterable[tuple[str, str]]) -> Seen:
    """The posts (id, text) that are in the adapter's training split, or why that is not known."""
    try:
        trained_on = origin.training_filter(FLOOR_MAX_ROWS)
    except NotInReach as error:
        return Seen(
            unknown=f"Whether these posts were trained on could not be looked up: {error}. Give --run"
            " OUTPUT_URL/RUN_ID or --training-data DATA_URL, or an adapter pulled with"
            " --with-training-filter."
        )
    ids: set[str] = set()
    posts = iter(posts)
    while chunk := list(islice(posts, _LOOKED_UP_AT_A_TIME)):
        found_N = trained_on.contains(keys_of(text for _, text in chunk))
        ids.update(post_id for (post_id, _), found in zip(chunk, found_N, strict=True) if found)
    return Seen(ids, FALSE_POSITIVES)
