"""The posts of a data set's split, streamed; their predictions are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from emotion_train.config import POSTS_PER_SCORING_STEP
from emotion_train.data.index import Index, read_index
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader
from emotion_train.data.targets import WORDS
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import Classifier
from emotion_train.judging.judged import FLOOR_MAX_ROWS, SEED, Judged
from emotion_train.judging.origins import look_up
from emotion_train.model.facts import AdapterFacts
from emotion_train.progress import ProgressLine
from emotion_train.report.scorecard import Seen
from emotion_train.runs.origin import Origin
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from emotion_train.evaluation.predictions import AnyPredictions


@dataclass(frozen=True)
class SplitPosts:
    """A split of a data set whose labels the adapter knows; `places` are the adapter's numbers of
    these labels.
    """

    store: Store
    index: Index
    name: str
    places: npt.NDArray[np.int64]

    @classmethod
    def open(cls, data_url: str, name: str, facts: AdapterFacts) -> SplitPosts:
        """The split; raises `WrongRequest` where the adapter does not know its labels, or answers
        with another kind of targets.
        """
        store = open_store(data_url)
        index = read_index(store)
        index.split(name)
        labels = facts.labels
        if (index.targets == "several") != (facts.targets == "several"):
            raise WrongRequest(
                f"The posts of {data_url} have {WORDS[index.targets]} and the adapter answers with"
                f" {WORDS[facts.targets]}; give a data set that was prepared with --targets {facts.targets}."
            )
        for label in index.labels:
            if label not in labels:
                raise WrongRequest(
                    f"The data set {data_url} has the label {label!r}, which the adapter does not know; its"
                    f" labels are {', '.join(labels)}."
                )
        return cls(store, index, name, np.array([labels.index(label) for label in index.labels]))

    def seen_by(self, origin: Origin) -> Seen:
        """The posts that an adapter was trained on. `prepare` keeps every text of a data set in one
        split.
        """
        from emotion_train.evaluation.floors import posts

        split = self.index.split(self.name)
        if self.index.sha256() != origin.index_sha256:
            return look_up(origin, ((post_id, text) for post_id, text, _ in posts(self.store, split)))
        if self.name != "train":
            return Seen()
        return Seen({post_id for post_id, _, _ in posts(self.store, split)})

    def judged(self, classifier: Classifier, origin: Origin) -> Judged:
        """The result, with a remark where the TF-IDF floor would take too long."""
        from emotion_train.evaluation.floors import tfidf_predictions
        from emotion_train.evaluation.predictions import placed
        from emotion_train.report.figures import decided

        classes = len(classifier.labels)
        scored = self.predictions(classifier)
        floor = tfidf_predictions(self.store, self.index, [self.name], FLOOR_MAX_ROWS, SEED).get(self.name)
        if floor is not None:
            floor = floor.relabelled(self.places, classes)
        train = self.index.splits.get("train")
        train_counts = placed(
            np.array([train.label_counts if train else self.places * 0]), self.places, classes
        )
        # posts that chose thresholds and temperature must not judge them
        chose = self.name == "validation" and self.index.sha256() == origin.index_sha256
        result = decided(scored.counts(), scored, floor, classifier.decision, chose)
        remarks = []
        if result.tfidf is None:
            rows = self.index.split("train").rows
            remarks.append(
                f"There is no TF-IDF floor to compare with: {rows:,} training posts are more than"
                f" {FLOOR_MAX_ROWS:,}."
            )
        return Judged(result, train_counts[0].tolist(), chose, remarks)

    def predictions(self, classifier: Classifier) -> AnyPredictions:
        """The classifier's predictions for each post."""
        from emotion_train.data.loader import Loader
        from emotion_train.evaluation.predictions import join_predictions
        from emotion_train.evaluation.scoring import fill_multiple, score

        split, classes = self.index.split(self.name), len(classifier.labels)
        model = classifier.loaded.model
        loader = Loader(
            RowGroupReader(self.store, split),
            Order(split.row_counts, split.lanes, seed=0),
            classifier.tokenizer,
            np.ones(len(self.index.labels)),
            global_batch_size=POSTS_PER_SCORING_STEP,
            tokens_per_microbatch=classifier.capacity,
            fill_multiple=fill_multiple(model.device),
            targets=self.index.targets_of(self.name),
        )
        with loader, ProgressLine(f"scoring {self.name}", split.rows, "posts") as line:
            part = score(model, loader, model.device, classes, line.update, self.places)
        return join_predictions([part], split.rows)

    def texts_by_id(self) -> dict[str, str]:
        """The text of each post by its id."""
        from emotion_train.evaluation.floors import posts

        return {key: text for key, text, _ in posts(self.store, self.index.split(self.name))}
