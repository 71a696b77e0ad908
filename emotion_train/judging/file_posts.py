"""The labelled posts of a file, held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from emotion_train.config import POSTS_PER_SCORING_STEP
from emotion_train.console import tell
from emotion_train.data.cleaning import REFUSED, Cleaner, Findings, Rules
from emotion_train.data.labels import LabelNames
from emotion_train.data.target_columns import PostTargets
from emotion_train.data.targets import WORDS, Target, dense
from emotion_train.data.text_filter import keys_of
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import Classifier
from emotion_train.judging.judged import FLOOR_MAX_ROWS, SEED, Judged
from emotion_train.judging.origins import look_up
from emotion_train.judging.question import Question
from emotion_train.model.facts import AdapterFacts
from emotion_train.progress import ProgressLine
from emotion_train.report.scorecard import Seen
from emotion_train.runs.origin import NotInReach, Origin
from emotion_train.sources.open import Choices, open_source
from emotion_train.sources.posts import Columns


class FilePosts(NamedTuple):
    """The posts of a file, column by column."""

    ids: list[str]
    texts: list[str]
    targets: list[Target]

    @property
    def name(self) -> str:
        return "file"

    @classmethod
    def read(cls, asked: Question, facts: AdapterFacts) -> FilePosts:
        """Every row of the file, duplicates included, with labels read as `prepare` reads them for
        the adapter's kind of targets.

        Raises `WrongRequest` that names the rows which cannot be scored, and for columns of labels
        that the adapter does not know.
        """
        source, labels = str(asked.file), facts.labels
        if asked.allow_none and facts.targets != "several":
            raise WrongRequest(
                f"--allow-none is for several labels, and the adapter answers with {WORDS[facts.targets]};"
                " leave it out."
            )
        choices = Choices(encoding=asked.encoding, quoting=asked.quoting)
        with open_source(source, _columns(asked, facts), choices) as opened:
            findings = Findings(file.name for file in opened.files)
            names = LabelNames(labels, opened.label_names)
            rules = Rules(asked.max_chars, 0, asked.unescape_html, facts.targets, asked.allow_none)
            cleaner = Cleaner(rules, names, findings)
            rows: list[Any] = [cleaner.clean(batch, None) for batch in opened.batches()]
        if lines := findings.lines(REFUSED):
            may_be_none = findings.counts["no_label"] and facts.targets == "several"
            or_none = ", or type --allow-none where a post may have none of the labels" if may_be_none else ""
            raise WrongRequest(
                f"{source} has posts that cannot be scored:\n  "
                + "\n  ".join([*lines, *findings.unknown_lines(names)])
                + f"\nMend them{or_none}; the adapter's labels are {', '.join(labels)}."
            )
        ids, texts = (
            [value for batch in rows for value in batch.column(name).to_pylist()] for name in ("id", "text")
        )
        if not ids:
            raise WrongRequest(
                f"{source} has no posts; give a file with the columns {asked.text_column} and"
                f" {', '.join(asked.label_columns or [asked.label_column])}."
            )
        return cls(ids, texts, _targets(rows, names.in_order(), labels, source))

    def seen_by(self, origin: Origin) -> Seen:
        """The posts that an adapter was trained on, or why that is not known."""
        return look_up(origin, zip(self.ids, self.texts, strict=True))

    def judged(self, classifier: Classifier, origin: Origin) -> Judged:
        """The result, with remarks on repeated texts and where there is no TF-IDF floor. The floor
        is fitted only on the adapter's own training posts, as the report's is.
        """
        from emotion_train.evaluation.floors import tfidf_of_texts
        from emotion_train.evaluation.predictions import join_predictions
        from emotion_train.evaluation.scoring import predictions_of
        from emotion_train.report.figures import decided

        chunks = []
        with ProgressLine("scoring", len(self.texts), "posts") as line:
            for start in range(0, len(self.texts), POSTS_PER_SCORING_STEP):
                chunk = self.texts[start : start + POSTS_PER_SCORING_STEP]
                chunks.append(classifier.probabilities(chunk))
                line.update(start + len(chunk))
        targets_NC = dense(self.targets, len(classifier.labels)).astype(np.float32)
        predictions = predictions_of(self.ids, targets_NC, np.concatenate(chunks), classifier.targets)
        scored = join_predictions([predictions], len(self.ids))
        remarks, floor = self._repeated(), None
        try:
            store, index = origin.training_data(FLOOR_MAX_ROWS)
        except NotInReach as error:
            remarks.append(
                f"There is no TF-IDF floor to compare with: {error}. Give --training-data DATA_URL, the data"
                " set that the adapter was trained on."
            )
        else:
            tell("fitting the TF-IDF floor")
            floor = tfidf_of_texts(store, index, self.ids, self.texts, self.targets, SEED)
        return Judged(decided(scored.counts(), scored, floor, classifier.decision), None, False, remarks)

    def _repeated(self) -> list[str]:
        """A remark on the posts that repeat the text of an earlier post; empty without any."""
        first: dict[bytes, Target] = {}
        others = [
            target != first.setdefault(key.tobytes(), target)
            for key, target in zip(keys_of(self.texts), self.targets, strict=True)
        ]
        repeated = len(others) - len(first)
        if not repeated:
            return []
        posts = "1 post has" if repeated == 1 else f"{repeated:,} posts have"
        differ = f", {sum(others):,} of them with another label" if any(others) else ""
        return [f"{posts} the text of an earlier post{differ}; each counts."]

    def texts_by_id(self) -> dict[str, str]:
        """The text of each post by its id."""
        return dict(zip(self.ids, self.texts, strict=True))


def _targets(rows: Sequence[Any], in_file: Sequence[str], labels: Sequence[str], source: str) -> list[Target]:
    """The targets with the adapter's label ids, from the ids of the file's label columns
    `in_file`.
    """
    if (unknown := next((name for name in in_file if name not in labels), None)) is not None:
        raise WrongRequest(
            f"{source} has a column for the label {unknown!r}, which the adapter does not know; its labels"
            f" are {', '.join(labels)}."
        )
    place_C = np.array([labels.index(name) for name in in_file], np.int32)
    by_batch = [PostTargets.of_rows(batch, place_C) for batch in rows]
    return [of_rows.target(row) for of_rows in by_batch for row in range(of_rows.posts)]


def _columns(asked: Question, facts: AdapterFacts) -> Columns:
    return Columns(
        asked.text_column,
        asked.label_column if asked.label_columns is None else None,
        split=None,
        label_columns=asked.label_columns or (),
        lists=facts.targets != "one",
    )
