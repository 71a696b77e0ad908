"""Which synthetic posts are asked for, how, and which of them are kept.

The plan is a function of the training split, the seed and the options: the same calls on every
machine. Each call shows real posts of one label from one fold of the training split, drawn with
replacement. A classifier trained on the other folds judges the new posts: it has seen neither them
nor the posts that the call showed.

Letters: N posts, C labels.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emotion_train.data.targets import TargetKind, largest
from emotion_train.edges.bounded import Unreadable, object_in
from emotion_train.errors import WrongRequest
from emotion_train.hosted.answers import Answer
from emotion_train.hosted.client import Message, Prompt
from emotion_train.hosted.prompts import TrainingPosts
from emotion_train.hosted.similar import NEAR, Shingles, first_of_near, nearest

FOLDS = 3
MOST_TIMES = 3  # a label has at most so many times its real posts
_MOST_ANSWER = 1 << 20
_TOKENS_A_POST = 120
_REGISTERS = ("plain", "casual, with small slips of typing", "terse", "chatty", "ironic", "earnest")
_TOPICS = (
    "work",
    "family",
    "a friend",
    "a game",
    "the news",
    "sport",
    "a film or series",
    "health",
    "money",
    "a pet",
    "school",
    "a stranger on the street",
    "food",
    "travel",
    "a reply to somebody's post",
    "something that was waited for",
)
_CALL = """You write posts as people write them on a forum. Each expresses {label}, and nothing else so much.
{definition}
Real posts that express {label}:
{examples}

Write {count} new posts that express {label}, about other things than these. Do not rewrite them, and do not
name the feeling. Their register is {register}; they are about {topics}. Their lengths in words are {lengths}.

Answer with JSON and nothing else: {{"posts": ["…"]}}."""


class Wish(NamedTuple):
    """The number of synthetic posts that a label is to get, and of real posts that it has."""

    label: int
    real: int
    posts: int


class Call(NamedTuple):
    """One request: its number, label, the fold of the real posts in it, its prompt, the number of
    posts it asks for, and its block; after each block the answers are checked.
    """

    number: int
    label: int
    fold: int
    prompt: Prompt
    wanted: int
    block: int


class Made(NamedTuple):
    """A synthetic post, with its call and its place in the call's answer."""

    call: int
    place: int
    label: int
    fold: int
    text: str


@dataclass
class Counts:
    """How many posts were asked for, written, dropped and kept."""

    asked: int = 0
    outcomes: Counter[str] | None = None
    written: int = 0
    unclean: int = 0
    same: Counter[str] | None = None  # by split; "synthetic" where they repeat each other
    near: Counter[str] | None = None
    filtered: int = 0
    kept: int = 0


def wishes(
    labels: Sequence[str], counts: Sequence[float], to: str, chosen: Sequence[str] | None
) -> list[Wish]:
    """A wish for each label below the target. Raises `WrongRequest` for a target above the median
    number of real posts, for unknown labels, and where no label is below the target.
    """
    middle = int(median(counts))
    if to == "median":
        target = middle
    elif to.isdecimal() and len(to) < 10 and 1 <= int(to) <= middle:
        target = int(to)
    else:
        raise WrongRequest(
            f"--to is {to[:40]!r}; give median, or a number of posts from 1 to {middle:,}, the median of"
            " the labels: a label above it is not rare."
        )
    for name in chosen or ():
        if name not in labels:
            raise WrongRequest(
                f"--labels has {name[:80]!r}, which is no label of the data set; its labels are"
                f" {', '.join(labels)}."
            )
    wished = []
    for label, count in enumerate(counts):
        real = int(count)
        posts = min(target, MOST_TIMES * real) - real
        if posts > 0 and (chosen is None or labels[label] in chosen):
            wished.append(Wish(label, real, posts))
    if not wished:
        raise WrongRequest(
            f"No label{' in --labels' if chosen else ''} has fewer than {target:,} real posts, so there is"
            " nothing to augment."
        )
    return wished


def plan(
    wished: Sequence[Wish],
    labels: Sequence[str],
    posts: TrainingPosts,
    *,
    kind: TargetKind,
    definitions: Mapping[str, str],
    shots: int,
    per_call: int,
    keep: float,
    seed: int,
    is_cut: Callable[[Call], bool] = lambda call: False,
) -> list[Call]:
    """All calls, numbered: enough that a share `keep` of their posts is the wished number. It reads
    only the given training posts.

    A label's calls come in blocks of 1, 2, 4 … Where a tenth of a block's answers are cut, the
    label's later calls ask for half as many posts in as many tokens. The same answers always give
    the same calls.
    """
    lengths = [len(text.split()) for text in posts.texts]
    fold_N = folds(posts.ids)
    rows_of = {wish.label: _shown_rows(posts, wish.label, kind) for wish in wished}
    series = [_Series(wish.label, int(np.ceil(wish.posts / keep)), per_call) for wish in wished]
    calls: list[Call] = []
    block = 0
    while any(of_label.missing > 0 for of_label in series):
        for of_label in series:
            made: list[Call] = []
            for turn in of_label.turns(block):
                draw = random.Random(f"{seed} {labels[of_label.label]} {turn}")
                fold, rows = turn % FOLDS, rows_of[of_label.label]
                own = [row for row in rows if fold_N[row] == fold] or rows
                shown = [posts.texts[row] for row in draw.choices(own, k=shots)]
                wanted = draw.choices(lengths, k=of_label.count)
                prompt = _prompt(labels[of_label.label], definitions, shown, wanted, draw, per_call)
                number = len(calls) + len(made)
                made.append(Call(number, of_label.label, fold, prompt, of_label.count, block))
            of_label.heard([is_cut(call) for call in made])
            calls += made
        block += 1
    return calls


def _shown_rows(posts: TrainingPosts, label: int, kind: TargetKind) -> Sequence[int]:
    rows = posts.with_label(label)
    if kind == "several":  # a post of this label alone shows it best
        return [row for row in rows if len(posts.targets[row]) == 1] or rows
    if kind == "shares":
        return [row for row in rows if largest(posts.targets[row]) == label] or rows
    return rows


@dataclass
class _Series:
    """The calls of one label: `missing` posts are still to come, and a call asks for `count`."""

    label: int
    missing: int
    count: int
    asked: int = 0

    def turns(self, block: int) -> range:
        """The numbers of the label's next calls."""
        calls = min(2**block, -(-max(0, self.missing) // self.count))
        self.asked += calls
        return range(self.asked - calls, self.asked)

    def heard(self, cut: Sequence[bool]) -> None:
        """Note which answers of these calls were cut. Their posts stay missing, unless the call
        asked for one post. If all calls for one post are cut, the label is given up.
        """
        self.missing -= self.count * (len(cut) - sum(cut))
        if self.count == 1:
            self.missing = 0 if cut and all(cut) else self.missing - sum(cut)
        elif 10 * sum(cut) >= len(cut) > 0 and any(cut):
            self.count //= 2


def folds(ids: Sequence[str]) -> NDArray[np.int64]:
    """The fold of each post, by a hash of its id."""
    hashes = (hashlib.blake2b(post_id.encode(), digest_size=8).digest() for post_id in ids)
    return np.fromiter((int.from_bytes(digest, "big") % FOLDS for digest in hashes), np.int64, len(ids))


def _prompt(
    label: str,
    definitions: Mapping[str, str],
    shown: Sequence[str],
    lengths: Sequence[int],
    draw: random.Random,
    most: int,
) -> Prompt:
    """The prompt that asks for one post of each of these lengths, in the tokens of `most` posts."""
    parts = {
        "label": label,
        "definition": f"{label} means: {definitions[label]}\n" if label in definitions else "",
        "examples": "\n".join(f"- {' '.join(text.split())}" for text in dict.fromkeys(shown)),
        "count": str(len(lengths)),
        "register": draw.choice(_REGISTERS),
        "topics": ", ".join(draw.sample(_TOPICS, 3)),
        "lengths": ", ".join(str(max(1, length)) for length in lengths),
    }
    schema = {
        "type": "object",
        "properties": {"posts": {"type": "array", "items": {"type": "string"}}},
        "required": ["posts"],
        "additionalProperties": False,
    }
    return Prompt((Message("user", _CALL.format(**parts)),), schema, _TOKENS_A_POST * most)


def posts_in(text: str, most: int) -> list[str] | None:
    """The posts of an answer, at most `most`; None where it is not the JSON asked for. An answer
    may hold fewer posts than were asked for.
    """
    answer = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        posts = object_in(answer.strip(), _MOST_ANSWER, whole_characters=False).get("posts")
    except Unreadable:
        return None
    if not isinstance(posts, list):
        return None
    return [post for post in posts if isinstance(post, str)][:most]


def made_of(calls: Sequence[Call], answers: Sequence[Answer | None], counts: Counts) -> list[Made]:
    """All posts in the answers, cleaned as by `prepare`, in the order of the calls."""
    counts.outcomes = Counter()
    raw: list[Made] = []
    for call, answer in zip(calls, answers, strict=True):
        outcome: str = "failed" if answer is None else answer.outcome
        texts = posts_in(answer.text, call.wanted) if answer is not None and outcome == "answered" else []
        if texts is None:
            outcome, texts = "unparseable", []
        counts.outcomes[outcome] += 1
        raw += [Made(call.number, place, call.label, call.fold, text) for place, text in enumerate(texts)]
    counts.asked, counts.written = len(calls), len(raw)
    clean = _cleaned([post.text for post in raw])
    counts.unclean = sum(text is None for text in clean)
    return [post._replace(text=text) for post, text in zip(raw, clean, strict=True) if text is not None]


def _cleaned(texts: Sequence[str]) -> list[str | None]:
    """Texts as `prepare` cleans them; None for a text that it refuses."""
    from emotion_train.data.cleaning import Cleaner, Findings, Rules, rows_of
    from emotion_train.data.labels import LabelNames
    from emotion_train.sources.posts import Batch, utf8

    cleaned: list[str | None] = [None] * len(texts)
    if not texts:
        return cleaned
    cleaner = Cleaner(Rules(20_000, 0), LabelNames(None, None), Findings(["answers"]))
    whole = [text.strip().encode("utf-8", "replace").decode() for text in texts]
    good = cleaner.clean(Batch(0, np.arange(len(texts)), utf8(whole)), None)
    for row, text in zip(
        rows_of(good.column("place").to_numpy()).tolist(), good.column("text").to_pylist(), strict=True
    ):
        cleaned[row] = text
    return cleaned


def without_doubles(
    made: Sequence[Made], held: Mapping[str, Sequence[str]], counts: Counts, near: float = NEAR
) -> list[Made]:
    """The posts whose text neither equals nor is near to a split's text or an earlier synthetic
    one. `held` has the texts of all splits by name: a post that resembles a held-out post would
    teach it, and the score would be too good.
    """
    from emotion_train.data.text_filter import keys_of

    counts.same, counts.near = Counter(), Counter()
    keys = {name: {key.tobytes() for key in keys_of(texts)} for name, texts in held.items()}
    seen: set[bytes] = set()
    fresh: list[Made] = []
    for post, key in zip(made, keys_of(post.text for post in made), strict=True):
        held_by = next((name for name, known in keys.items() if key.tobytes() in known), None)
        if held_by is None and key.tobytes() in seen:
            held_by = "synthetic"
        if held_by is not None:
            counts.same[held_by] += 1
            continue
        seen.add(key.tobytes())
        fresh.append(post)
    shingles = Shingles([post.text for post in fresh])
    closest = {name: nearest(shingles, Shingles(texts)) for name, texts in held.items()}
    apart: list[Made] = []
    for row, post in enumerate(fresh):
        close = next((name for name, share_N in closest.items() if share_N[row] >= near), None)
        if close is not None:
            counts.near[close] += 1
        else:
            apart.append(post)
    kept = first_of_near([post.text for post in apart], near)
    counts.near["synthetic"] += len(apart) - len(kept)
    return [apart[row] for row in kept]


Judge = Callable[[Sequence[Made]], NDArray[np.float32]]


def best_of(
    made: Sequence[Made], wished: Sequence[Wish], judge: Judge, keep: float, counts: Counts
) -> tuple[list[Made], list[Made]]:
    """The kept posts and the dropped ones, both in the order of the calls. Kept is the best share
    `keep` of each label's posts, at most as many as wished, by the judge's probability.
    """
    prob_NC = judge(made) if made else np.zeros((0, 1), np.float32)
    kept: list[int] = []
    for wish in wished:
        own = [row for row, post in enumerate(made) if post.label == wish.label]
        best = sorted(own, key=lambda row: (-float(prob_NC[row, made[row].label]), row))
        kept += best[: min(wish.posts, int(np.ceil(keep * len(own))))]
    counts.kept, counts.filtered = len(kept), len(made) - len(kept)
    taken = set(kept)
    return [made[row] for row in sorted(kept)], [post for row, post in enumerate(made) if row not in taken]


def tfidf_judge(posts: TrainingPosts, classes: int, seed: int) -> Judge:
    """A judge that scores each post by TF-IDF and a linear support vector machine, fitted on the
    real posts of the folds that the post's call did not show.
    """
    from emotion_train.evaluation.floors import tfidf_floor

    fold_N = folds(posts.ids)

    def judge(made: Sequence[Made]) -> NDArray[np.float32]:
        prob_NC = np.zeros((len(made), classes), np.float32)
        for fold in range(FOLDS):
            rows = [row for row, post in enumerate(made) if post.fold == fold]
            train = [
                (posts.texts[row], largest(posts.targets[row]))
                for row in range(len(posts.ids))
                if fold_N[row] != fold and posts.targets[row]
            ]
            if rows and train:
                prob_NC[rows] = tfidf_floor(train, [made[row].text for row in rows], classes, seed)
        return prob_NC

    return judge
