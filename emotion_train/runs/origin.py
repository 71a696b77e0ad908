"""The origin of an adapter, and what it still gives: which texts the run was trained on, and the
training posts themselves.

An adapter holds its run's name and its data set's hash. Their URLs come from the adapter, from the
report that was pulled with it, or from the user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion_train.console import tell
from emotion_train.data.index import INDEX_KEY, Index, read_index
from emotion_train.data.text_filter import TextFilter, filter_of_split
from emotion_train.edges.bounded import object_in
from emotion_train.errors import EmotionTrainError, ObjectNotFound, StorageError, WrongRequest
from emotion_train.model.facts import AdapterFacts, read_facts
from emotion_train.runs.log import final_entry, read_part
from emotion_train.runs.published import (
    MAX_REPORT_BYTES,
    REPORT,
    TRAINING_FILTER,
    published_report,
    split_run_url,
    training_filter,
)
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from emotion_train.runs.log import Entry


@dataclass(frozen=True)
class Origin:
    """The run and data set of an adapter, as far as known; `named` says that the user typed the
    run's URL.
    """

    folder: Path
    facts: AdapterFacts
    run_url: str | None
    data_url: str | None
    index_sha256: str | None
    named: bool = False
    # a store that does not answer is waited for once
    _looked: dict[str | None, tuple[Store, Index] | NotInReach] = field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def of(cls, folder: Path, run_url: str | None = None, data_url: str | None = None) -> Origin:
        """The origin of the adapter in this folder; given URLs override the report's.

        Raises `WrongRequest` when the run is another adapter's, and as `read_facts`.
        """
        facts = read_facts(folder)
        if run_url is not None:
            run_id = split_run_url(run_url)[1]
            if facts.run_id is not None and run_id != facts.run_id:
                raise WrongRequest(
                    f"The adapter {folder} was published by run {facts.run_id}, and --run names {run_id};"
                    f" give OUTPUT_URL/{facts.run_id}."
                )
            store, entry = _published(run_url)
            identity = _identity(published_report(store, run_id, entry), facts)
        else:
            identity = _identity(_report_beside(folder), facts)
        told = facts.output_url or (identity["config"]["run"]["output_url"] if identity else None)
        return cls(
            folder,
            facts,
            run_url or (f"{str(told).rstrip('/')}/{facts.run_id}" if told else None),
            data_url or facts.data_url or (str(identity["data_url"]) if identity else None),
            facts.index_sha256 or (str(identity["index_sha256"]) if identity else None),
            run_url is not None,
        )

    def training_filter(self, most_rows: int) -> TextFilter:
        """The filter of the texts that the adapter was trained on: the filter pulled with it, else
        the run's, else one made from a training split of at most `most_rows` posts.

        Raises `NotInReach` when there is none, and `WrongRequest` for a damaged filter or another
        data set's.
        """
        try:
            return self._kept_filter()
        except NotInReach as error:
            reason = str(error)
        try:
            store, index = self.training_data(most_rows)
            return filter_of_split(store, index.training, index.sha256())
        except NotInReach as error:
            raise NotInReach(f"{reason}; {error}") from error

    def training_data(self, most_rows: int) -> tuple[Store, Index]:
        """The data set that the adapter was trained on; raises `NotInReach` when it cannot be
        reached, or its training split has more than `most_rows` posts.
        """
        store, index = self.data_set()
        if (rows := index.training.rows) > most_rows:
            raise NotInReach(f"its {rows:,} training posts are more than {most_rows:,}")
        return store, index

    def data_set(self) -> tuple[Store, Index]:
        """The data set that the adapter was trained on. It is looked for once; later calls return
        or raise the same at once.
        """
        if self.data_url not in self._looked:
            try:
                self._looked[self.data_url] = self._look_for_data_set()
            except NotInReach as error:
                self._looked[self.data_url] = error
        found = self._looked[self.data_url]
        if isinstance(found, NotInReach):
            raise found
        return found

    def _look_for_data_set(self) -> tuple[Store, Index]:
        if self.data_url is None:
            raise NotInReach("nothing tells where its data set is")
        tell(f"looking for the data set {self.data_url} that the adapter was trained on")
        try:
            store = open_store(self.data_url)
            store.stat(INDEX_KEY)
            index = read_index(store)
        except ObjectNotFound as error:
            raise NotInReach(f"there is no data set at {self.data_url}") from error
        except (WrongRequest, StorageError) as error:
            raise NotInReach(str(error).rstrip(".")) from error
        if index.sha256() != self.index_sha256:
            raise NotInReach(f"{self.data_url} is not the data set that this adapter was trained on")
        return store, index

    def _kept_filter(self) -> TextFilter:
        path = self.folder / TRAINING_FILTER
        if path.is_file():
            return self._own(TextFilter.from_file(path), str(path))
        if self.run_url is None:
            raise NotInReach("nothing tells where the run of this adapter is")
        tell(f"looking for the training filter of {self.run_url}")
        try:
            store, entry = _published(self.run_url)
            if (part := training_filter(entry)) is None:
                raise NotInReach(f"run {self.run_url} was published by a version that kept no filter")
            content = read_part(store, split_run_url(self.run_url)[1], part)
        except (WrongRequest, StorageError) as error:
            if self.named:
                raise
            raise NotInReach(str(error).rstrip(".")) from error
        url = f"{self.run_url}/{part.key}"
        return self._own(TextFilter.from_bytes(content, url), url)

    def _own(self, found: TextFilter, url: str) -> TextFilter:
        if found.index_sha256 != self.index_sha256:
            raise WrongRequest(
                f"The training filter {url} is of another data set than the adapter {self.folder} was trained"
                " on; pull both again from one run."
            )
        return found


class NotInReach(EmotionTrainError):
    """The filter or data set cannot be reached from here; the message says why."""

    @property
    def unanswered(self) -> bool:
        """Whether a store did not answer, so waiting may help."""
        return isinstance(self.__cause__, StorageError) and self.__cause__.transient


def _published(run_url: str) -> tuple[Store, Entry]:
    output_url, run_id = split_run_url(run_url)
    store = open_store(output_url)
    return store, final_entry(store, run_id)


def _report_beside(folder: Path) -> bytes | None:
    """The report where `pull` puts it, or where a run's own final/ has it; None without one."""
    for path in (folder / "report" / REPORT, folder.parent / REPORT):
        if path.is_file() and path.stat().st_size <= MAX_REPORT_BYTES:
            return path.read_bytes()
    return None


def _identity(report: bytes | None, facts: AdapterFacts) -> dict[str, Any] | None:
    """The identity in the run's report; None without a report, or for a damaged one or another
    run's. Reports of other versions are read too.
    """
    try:
        identity: dict[str, Any] = object_in(report or b"", MAX_REPORT_BYTES)["identity"]
        texts = (identity["config"]["run"]["output_url"], identity["data_url"], identity["index_sha256"])
        return identity if all(isinstance(text, str) for text in texts) and _same(identity, facts) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _same(identity: dict[str, Any], facts: AdapterFacts) -> bool:
    """Whether a report belongs to the run that published the adapter."""
    return identity.get("run_id") == facts.run_id and facts.index_sha256 in (None, identity["index_sha256"])
