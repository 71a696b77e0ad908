"""Adapters are judged on a split of a prepared data set, or on a file of labelled posts, with the
same figures and floors as the report.

Posts that they were trained on are looked up in their runs, reported, and left out of the quoted
figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from emotion_train.bases.public_names import public_base
from emotion_train.console import tell
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import open_classifier
from emotion_train.judging.file_posts import FilePosts
from emotion_train.judging.judged import SEED
from emotion_train.judging.origins import Adapters
from emotion_train.judging.question import Question
from emotion_train.judging.split_posts import SplitPosts
from emotion_train.judging.together import decide_together, validation_of
from emotion_train.model.facts import AdapterFacts
from emotion_train.report.schema import Scorecard
from emotion_train.report.scorecard import Seen
from emotion_train.storage.open import open_store

_BOOTSTRAP_SAMPLES = 2000


def evaluate(asked: Question, show: Callable[[Scorecard], None] = lambda _: None) -> Scorecard:
    """The figures, which are also written to `out`. `show` is called with them first, so that a
    full disk costs no figures; the scorecard is written last, and without it nothing is whole.

    Raises `WrongRequest` for labels that the adapter does not know, posts that cannot be scored,
    and an adapter, base or run that do not belong together.
    """
    # all checks come before torch is imported and the base is loaded
    if asked.with_texts and not asked.out:
        raise WrongRequest(
            "--with-texts adds texts to the predictions that --out writes; type --out FOLDER or leave it out."
        )
    out = open_store(asked.out) if asked.out else None
    adapters = Adapters.of(asked)
    origin = adapters.origins[0]
    posts = _posts(asked, origin.facts)
    validation = validation_of(adapters.origins, posts if isinstance(posts, SplitPosts) else None)
    seen = Seen.by_any([posts.seen_by(one) for one in adapters.apart()])
    classifier = open_classifier(adapters.chosen)
    together = decide_together(validation, classifier)
    judged = posts.judged(classifier, origin)
    if remark := classifier.remark():
        tell(f"emotion-train: {remark}")

    from emotion_train.evaluation.predictions import predictions_key, predictions_to_parquet
    from emotion_train.report.scorecard import build_scorecard

    facts = classifier.loaded.facts
    card = build_scorecard(
        judged.result,
        name=posts.name,
        labels=classifier.labels,
        train_counts=judged.train_counts,
        seen=seen,
        remarks=judged.remarks + together,
        samples=_BOOTSTRAP_SAMPLES,
        seed=SEED,
        decision=classifier.decision,
        chose=judged.chose,
        source=str(asked.data or asked.file),
        run_id=facts.run_id,
        members=adapters.members(),
        base=public_base(asked.chosen.base or facts.base),
        layers=facts.layers,
        precision=asked.chosen.precision or facts.precision,
    )
    show(card)
    if out is not None:
        texts_by_id = posts.texts_by_id() if asked.with_texts else None
        predictions = predictions_to_parquet(judged.result.predictions, classifier.labels, texts_by_id)
        out.write(predictions_key(posts.name), predictions)
        out.write("scorecard.json", card.to_bytes())
        tell(f"written: {out.url_of('scorecard.json')} and {predictions_key(posts.name)}", sys.stdout)
    return card


def _posts(asked: Question, facts: AdapterFacts) -> SplitPosts | FilePosts:
    if bool(asked.data) == bool(asked.file):
        raise WrongRequest("Give one of --data DATA_URL and --file FILE, and not an empty one.")
    if asked.data:
        return SplitPosts.open(asked.data, asked.split, facts)
    return FilePosts.read(asked, facts)
