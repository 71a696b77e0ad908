"""Checks and mends posts batch by batch, counts its findings with their first row numbers, and
gives each post its hashes.

Costs about 5 microseconds a post, half of it for the normalised text that finds duplicates.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emotion_train.console import counted
from emotion_train.data import text_notes
from emotion_train.data.conflicts import Example
from emotion_train.data.labels import MAX_LABEL_CHARS, MAX_LABELS, LabelNames, trimmed
from emotion_train.data.target_columns import FIELDS, PostTargets
from emotion_train.data.target_values import TargetValues, weights_of
from emotion_train.data.targets import WEIGHT, TargetKind, kept_name
from emotion_train.sources.posts import SEVERAL, Batch, split_of

PLACES_SHOWN = 5
# by rank: the lowest split that has a text keeps it
SPLIT_CODES = {"test": 0, "validation": 1, "train": 2}
NO_SPLIT = 3
_SPLIT_NAMES = {code: split for split, code in SPLIT_CODES.items()}
_ROW_BITS = 40
_UNKNOWN_SHOWN = 5
_KINDS = {
    LabelNames.NONE: "no_label",
    LabelNames.OBJECT: "object_label",
    LabelNames.TOO_LONG: "label_too_long",
    LabelNames.SEVERAL: "several_labels",
    LabelNames.UNKNOWN: "unknown_label",
}
Refuse = Callable[[str, Any], None]

REFUSED = {
    "undecodable": "bytes that are not UTF-8",
    "ragged_line": "more or fewer cells than the header",
    "broken_quoting": "letters behind a closing quote",
    "stray_return": "a carriage return inside a line",
    "header_again": "the header again",
    "broken_json": "not a JSON object",
    "doubled_key": "a key twice in one object",
    "not_text": "text that is not a string",
    "empty_text": "no text",
    "too_long": "text too long",
    "no_label": "no label",
    "infinite_label": "label that is no finite number",
    "unnamed_id": "label id that its file gives no name",
    "unknown_label": "unknown label",
    "unknown_split": "split other than train, validation and test",
    "no_id": "no id",
    "object_label": "label that is an object",
    "label_too_long": f"label of more than {MAX_LABEL_CHARS} characters",
    "several_labels": "several labels",
    "gap_in_list": "list of labels with an empty one",
    "doubled_label": "list with a label twice",
    "not_binary": "label column that is neither 0 nor 1",
    "hidden_labels": "label columns that say NONE, so that the labels are hidden",
    "bad_share": "share that is negative or no number",
    "shares_off": "shares that do not add up to 1",
    "bad_weight": "weight that is no number above 0",
    "no_annotator": "no annotator",
    "other_text": "annotators of one id with different texts",
    "no_half": "no label that at least half of the annotators gave",
}
MENDED = {
    "control_characters": "control characters, made spaces",
    "surrogates": "half characters (lone surrogates), mended",
    "html_unescaped": "HTML entities, made characters",
    "label_spaces": "spaces around the label, cut off",
    "label_invisible": "invisible characters around the label, cut off",
}
DROPPED = {
    "repeated": "same text again",
    "conflicting": "same text with another label",
    "in_two_splits": "text of a later split, kept out of the earlier",
    "auxiliary_repeated": "auxiliary post whose text another post has",
}
# left as they are
NOTED = {
    "line_breaks": "texts with line breaks",
    "html_entities": "texts with HTML entities such as &amp; (--unescape-html)",
    "mojibake": "texts with UTF-8 that was read as Latin-1",
    "answered_again": "another answer of an annotator to the same post, which does not count",
    "answers": "answers of annotators, joined to posts",
    "without_label": "posts that have none of the labels",
    "auxiliary": "auxiliary posts, of other labels or with several: trained on, never scored",
}

PASSED_OVER = {"blank": "rows with nothing in them"}

# C0 without tab, line feed and carriage return; DEL; C1
_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}]"
# white space, controls, formats such as zero width, and fillers
_NO_INK = r"^[\s\p{Z}\p{Cc}\p{Cf}\x{115f}\x{1160}\x{2800}\x{3164}\x{ffa0}]*$"
_CONTROL_BYTES = np.isin(np.arange(256), [*range(9), 11, 12, *range(14, 32), 127])
# hashes of a post's text (key) and of seed and id (draw, order)
_HASHES = [("key0", pa.uint64()), ("key1", pa.uint64()), ("draw", pa.uint64()), ("order", pa.uint64())]
_ORIGIN = [("place", pa.int64()), ("split", pa.int8())]
_WORDS = [("id", pa.string()), ("text", pa.string())]


def schema_of(
    targets: TargetKind, *, weighted: bool = False, annotated: bool = False, kept: Iterable[str] = ()
) -> Any:
    """The columns of clean rows: hashes of text, id and annotator, the row's origin, its labels,
    the `kept` columns, its id and text.
    """
    more = [(WEIGHT, pa.float64())] if weighted else []
    more += [(kept_name(name), pa.string()) for name in kept]
    more += [("annotator", pa.uint64())] if annotated else []
    return pa.schema([*_HASHES, *_ORIGIN, *FIELDS[targets], *more, *_WORDS])


SCHEMA = schema_of("one")


class Rules(NamedTuple):
    max_chars: int
    seed: int
    unescape_html: bool = False
    targets: TargetKind = "one"
    allow_none: bool = False
    kept: tuple[str, ...] = ()
    hashed: bool = True  # else the hashes, half of the cost, are 0


class Findings:
    """The number of rows with each kind of trouble, and the first rows that have it."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = list(files)
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[int]] = {}
        self.unknown_labels: Counter[str] = Counter()
        self.remarks: list[str] = []
        self.conflicts: list[Example] = []  # of the `conflicting_texts` in `counts`, the first ones
        self.forms: dict[str, set[str]] = {}  # of labels (list, object, plain), by split

    def note(self, kind: str, places: Any) -> None:
        """Add rows of this kind, given by place in any order."""
        if len(places):
            self.counts[kind] += len(places)
            first = (
                np.partition(places, PLACES_SHOWN)[:PLACES_SHOWN] if len(places) > PLACES_SHOWN else places
            )
            self._first[kind] = sorted([*self._first.get(kind, []), *map(int, first)])[:PLACES_SHOWN]

    def lines(self, kinds: dict[str, str]) -> list[str]:
        """One aligned line for each kind with rows: its name, its count, its first rows."""
        met = [(name, self.counts[kind], kind) for kind, name in kinds.items() if self.counts[kind]]
        width = max((len(name) for name, _, _ in met), default=0)
        digits = max((len(f"{count:,}") for _, count, _ in met), default=0)
        return [f"{name:{width}}  {count:{digits},}  {self._where(kind)}" for name, count, kind in met]

    def unknown_lines(self, labels: LabelNames) -> list[str]:
        """A line for each of the commonest values that are no label, with the one that is meant."""
        commonest = sorted(self.unknown_labels.items(), key=lambda item: (-item[1], item[0]))
        return [
            f"  {name!r} {counted(count, 'time')}{labels.advice(name)}"
            for name, count in commonest[:_UNKNOWN_SHOWN]
        ]

    def _where(self, kind: str) -> str:
        shown = [
            f"{self.files[place >> _ROW_BITS]}:{place & ((1 << _ROW_BITS) - 1)}"
            for place in self._first[kind]
        ]
        return ", ".join(shown) + (", …" if self.counts[kind] > len(shown) else "")


class _Posts(NamedTuple):
    """Columns of posts, as numpy or Arrow arrays."""

    place_N: Any
    split_N: Any
    ids: Any
    texts: Any
    more: dict[str, Any]

    def where(self, keep_N: Any) -> _Posts:
        """The posts where `keep_N` is true."""
        if keep_N.all():
            return self
        keep = pa.array(keep_N)
        return _Posts(
            self.place_N[keep_N],
            self.split_N[keep_N],
            self.ids.filter(keep),
            self.texts.filter(keep),
            {name: _rows(column, keep_N) for name, column in self.more.items()},
        )


class _Aside:
    """Posts of a batch set aside as auxiliary, and their targets in codes of every label."""

    def __init__(self, values: TargetValues, may_N: Any) -> None:
        self._values = values
        self._may_N = may_N  # false for posts of held-out splits
        self.post_N = np.zeros(len(may_N), bool)
        nothing = np.zeros(0, np.int64)
        self.targets = PostTargets.of_pairs(nothing, nothing, nothing, len(may_N))

    def take(self, cells: Any, asked_N: Any) -> None:
        """Set aside the asked posts whose cells can be read as labels."""
        asked_N = asked_N & self._may_N
        if not asked_N.any():
            return
        spelled = [
            # with a mark before each item, as `spelled_target` writes lists; others lack the first
            cell if SEVERAL not in cell or cell.startswith(SEVERAL) else SEVERAL + cell
            for cell in cells.filter(pa.array(asked_N)).to_pylist()
        ]
        read = self._values.of_cells(pa.array(spelled, pa.string()))
        good_N = np.array([kind is None for kind in read.kind], bool)[read.index_N]
        posts = np.flatnonzero(asked_N)[good_N]
        targets = read.targets.take(read.index_N[good_N])
        self.post_N[posts] = True
        self.targets = PostTargets.of_pairs(
            posts[targets.posts_of_pairs], targets.label_P, targets.share_P, len(asked_N)
        )


class Cleaner:
    """Makes clean rows from raw batches, and fills `findings` and `labels` meanwhile."""

    def __init__(
        self, rules: Rules, labels: LabelNames, findings: Findings, every: LabelNames | None = None
    ) -> None:
        self.labels = labels
        self.findings = findings
        self.rows_read = 0
        self._rules = rules
        self._values = TargetValues(rules.targets, labels, allow_none=rules.allow_none)
        self._aside_kind: TargetKind = "several" if rules.targets == "several" else "shares"
        self._every = None if every is None else TargetValues(self._aside_kind, every, allow_none=False)

    def clean(self, batch: Batch, split: str | None) -> Any:
        """The batch's good rows as a record batch of `schema_of`; `split` comes from the file's
        name. Posts without a label column all get the code 0.
        """
        return self.separate(batch, split)[0]

    def separate(self, batch: Batch, split: str | None) -> tuple[Any, Any]:
        """The good rows as by `clean`, and the auxiliary rows; None where `every` is None.
        Auxiliary rows have other labels than the known ones, or several where a post has one. They
        are in no held-out split, have no kept columns, and use the codes of `every`.
        """
        place_N = (np.int64(batch.file) << _ROW_BITS) | batch.rows_N
        for kind, row in [*batch.broken, *(("blank", row) for row in batch.blank)]:
            self.findings.note(kind, np.array([(batch.file << _ROW_BITS) | row]))
        self.findings.remarks += batch.remarks
        self.rows_read += len(place_N) + len(batch.broken)
        good_N = np.ones(len(place_N), bool)

        def refuse(kind: str, wrong_N: Any) -> None:
            self.findings.note(kind, place_N[good_N & wrong_N])
            good_N[wrong_N] = False

        texts, undecodable_N = self._decode(batch.texts, place_N)
        refuse("undecodable", undecodable_N)
        if self._rules.unescape_html:
            texts = self._unescaped(texts, place_N)
        noted = text_notes.rows(texts)  # before controls are replaced, which broken text consists of
        texts = self._without_control_characters(texts, place_N)
        refuse("empty_text", _flags(pc.match_substring_regex(texts, _NO_INK)))
        refuse("too_long", _flags(pc.greater(pc.utf8_length(texts), self._rules.max_chars)))
        split_N = self._split_codes(batch, split)
        aside: _Aside | None = None
        if self._every is not None:
            aside = _Aside(self._every, split_N >= SPLIT_CODES["train"])
        targets = self._targets(batch, place_N, split_N, good_N, refuse, aside)
        refuse("unknown_split", split_N < 0)
        more = self._of_post(batch, refuse)
        if batch.ids is None:
            ids = pc.binary_join_element_wise(
                self.findings.files[batch.file], pc.cast(pa.array(batch.rows_N), pa.string()), ":"
            )
        else:
            ids, _ = _decode_strictly(batch.ids)
            refuse("no_id", _flags(pc.equal(pc.binary_length(ids), 0)))
        for kind, rows in noted.items():
            self.findings.note(kind, place_N[rows[good_N[rows]]])
        posts = _Posts(place_N, split_N, ids, texts, more)
        if aside is None:
            return self._rows_of(posts.where(good_N), targets.take(np.flatnonzero(good_N))), None
        own_N, aside_N = good_N & ~aside.post_N, good_N & aside.post_N
        weight = {name: column for name, column in more.items() if name == WEIGHT}
        others = self._rows_of(
            posts._replace(more=weight).where(aside_N),
            aside.targets.take(np.flatnonzero(aside_N)),
            self._aside_kind,
        )
        return self._rows_of(posts.where(own_N), targets.take(np.flatnonzero(own_N))), others

    def _rows_of(self, posts: _Posts, targets: PostTargets, kind: TargetKind | None = None) -> Any:
        """A record batch of `schema_of`; `kind` is given for posts that were set aside."""
        if self._rules.hashed:
            key_N2, draw_N2 = text_keys(posts.texts), self._draws(posts.ids)
        else:
            key_N2 = draw_N2 = np.zeros((len(posts.texts), 2), np.uint64)
        columns = [*key_N2.T, *draw_N2.T, posts.place_N, posts.split_N.astype(np.int8)]
        arrays = [pa.array(np.ascontiguousarray(column)) for column in columns]
        arrays += targets.columns(kind or self._rules.targets).values()
        arrays += [pa.array(column) for column in posts.more.values()]
        schema = schema_of(
            kind or self._rules.targets,
            weighted=WEIGHT in posts.more,
            annotated="annotator" in posts.more,
            kept=self._rules.kept if kind is None else (),
        )
        return pa.record_batch([*arrays, posts.ids, posts.texts], schema=schema)

    def _targets(
        self, batch: Batch, place_N: Any, split_N: Any, good_N: Any, refuse: Refuse, aside: _Aside | None
    ) -> PostTargets:
        """The posts' targets; arbitrary for posts that are refused or set aside."""
        if batch.label_columns:
            place = self.findings.files[batch.file]
            targets, kinds = self._values.of_columns(batch.label_columns, len(place_N), place)
            _refuse_kinds(np.array(kinds, object), refuse)
            return _first_of_each(targets) if self._rules.targets == "one" else targets
        if batch.labels is None:
            return PostTargets.of_one(np.zeros(len(place_N), np.int32))
        values, undecodable_N = _decode_strictly(batch.labels)
        refuse("undecodable", undecodable_N)
        if self._rules.targets == "one":
            code_N = self._label_codes(values, place_N)
            if aside is not None:
                aside.take(values, np.isin(code_N, (LabelNames.UNKNOWN, LabelNames.SEVERAL)))
                code_N[aside.post_N] = 0
            self._count_unknown(values, good_N & (code_N == LabelNames.UNKNOWN))
            for code, kind in _KINDS.items():
                refuse(kind, code_N == code)
            return PostTargets.of_one(code_N.astype(np.int32))
        return self._target_cells(values, split_N, good_N, refuse, aside)

    def _target_cells(
        self, values: Any, split_N: Any, good_N: Any, refuse: Refuse, aside: _Aside | None
    ) -> PostTargets:
        cells = self._values.of_cells(values)
        for form in set(cells.form) - {""}:
            has_N = np.array([own == form for own in cells.form], bool)[cells.index_N]
            for split in np.unique(split_N[good_N & has_N]).tolist():
                self.findings.forms.setdefault(_SPLIT_NAMES.get(split, ""), set()).add(form)
        kind_N = np.array(cells.kind, object)[cells.index_N]
        if aside is not None:
            aside.take(values, kind_N == "unknown_label")
            kind_N[aside.post_N] = None
        unknown_N = good_N & (kind_N == "unknown_label")
        if unknown_N.any() and len(self.findings.unknown_labels) < MAX_LABELS:
            self.findings.unknown_labels.update(cells.unknown[cell] for cell in cells.index_N[unknown_N])
        _refuse_kinds(kind_N, refuse)
        return cells.targets.take(cells.index_N)

    def _of_post(self, batch: Batch, refuse: Refuse) -> dict[str, Any]:
        """Columns of weights, kept values and annotators' hashes, where the source has them."""
        columns = {}
        if batch.weights is not None:
            columns[WEIGHT] = weights_of(batch.weights)
            refuse("bad_weight", np.isnan(columns[WEIGHT]))
        kept = batch.kept.values() if self._rules.kept else ()  # else the data set does not keep them
        for name, column in zip(self._rules.kept, kept, strict=True):
            columns[kept_name(name)] = _without_breaks(_decode_strictly(column)[0])
        if batch.annotators is not None:
            names = pc.fill_null(batch.annotators, b"")
            refuse("no_annotator", _flags(pc.equal(pc.binary_length(names), 0)))
            digests = [blake2b(name, digest_size=8).digest() for name in names.to_pylist()]
            columns["annotator"] = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
        return columns

    def _decode(self, raw: Any, place_N: Any) -> tuple[Any, Any]:
        """The text of bytes, and flags for broken bytes. Lone surrogates become U+FFFD, and pairs
        of them the character that they spell.
        """
        try:
            return raw.cast(pa.string()).fill_null(""), np.zeros(len(raw), bool)
        except pa.ArrowInvalid:
            texts, wrong_N, mended = [], np.zeros(len(raw), bool), []
            for i, value in enumerate(raw.to_pylist()):
                text = ""
                try:
                    text = (value or b"").decode()
                except UnicodeDecodeError:
                    try:
                        text = (
                            value.decode("utf-8", "surrogatepass")
                            .encode("utf-16", "surrogatepass")
                            .decode("utf-16", "replace")
                        )
                        mended.append(i)
                    except UnicodeDecodeError:
                        wrong_N[i] = True
                texts.append(text)
            self.findings.note("surrogates", place_N[mended])
            return pa.array(texts, pa.string()), wrong_N

    def _unescaped(self, texts: Any, place_N: Any) -> Any:
        rows = text_notes.with_entities(texts)
        if not len(rows):
            return texts
        self.findings.note("html_unescaped", place_N[rows])
        values = texts.to_pylist()
        for row in rows.tolist():
            values[row] = text_notes.unescaped(values[row])
        return pa.array(values, pa.string())

    def _without_control_characters(self, texts: Any, place_N: Any) -> Any:
        _, offsets, data = texts.buffers()
        if data is None:
            return texts
        bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
        raw = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
        second_of_c1 = (raw[:-1] == 0xC2) & (raw[1:] < 0xA0)
        if not (_CONTROL_BYTES[raw].any() or second_of_c1.any()):
            return texts
        self.findings.note("control_characters", place_N[_flags(pc.match_substring_regex(texts, _CONTROL))])
        return pc.replace_substring_regex(texts, _CONTROL, " ")

    def _label_codes(self, values: Any, place_N: Any) -> Any:
        encoded = values.dictionary_encode()
        words = encoded.dictionary.to_pylist()
        code_of_word = np.array([self.labels.code(word) for word in words], np.int64)
        index_N = encoded.indices.to_numpy(zero_copy_only=False)
        for kind, words_cut in (("label_spaces", _spaced), ("label_invisible", _unseen)):
            cut = np.array([words_cut(word) for word in words], bool)
            if cut.any():
                self.findings.note(kind, place_N[cut[index_N]])
        return code_of_word[index_N] if len(words) else np.zeros(0, np.int64)

    def _count_unknown(self, values: Any, unknown_N: Any) -> None:
        if unknown_N.any() and len(self.findings.unknown_labels) < MAX_LABELS:
            for counted in pc.value_counts(values.filter(pa.array(unknown_N))).to_pylist():
                self.findings.unknown_labels[trimmed(counted["values"])] += counted["counts"]

    def _split_codes(self, batch: Batch, split: str | None) -> Any:
        if batch.splits is None:
            return np.full(len(batch.rows_N), SPLIT_CODES[split] if split else NO_SPLIT)
        encoded = _decode_strictly(batch.splits)[0].dictionary_encode()
        code_of_word = np.array(
            [SPLIT_CODES.get(split_of(word) or "", -1) for word in encoded.dictionary.to_pylist()], np.int64
        )
        return (
            code_of_word[encoded.indices.to_numpy(zero_copy_only=False)]
            if len(code_of_word)
            else np.zeros(0, np.int64)
        )

    def _draws(self, ids: Any) -> Any:
        salt = self._rules.seed.to_bytes(8, "big")
        return _hashes(
            [blake2b(key, digest_size=16, salt=salt).digest() for key in ids.cast(pa.binary()).to_pylist()]
        )


def _refuse_kinds(kind_N: Any, refuse: Refuse) -> None:
    for kind in sorted(set(kind_N.tolist()) - {None}):
        refuse(kind, kind_N == kind)


def _first_of_each(targets: PostTargets) -> PostTargets:
    """The first label of each post; the code 0 for a post without labels."""
    label_N = np.zeros(targets.posts, np.int32)
    has_N = targets.counts > 0
    label_N[has_N] = targets.label_P[targets.offset_N1[:-1][has_N]]
    return PostTargets.of_one(label_N)


def files_of(places_N: Any) -> Any:
    """The file numbers in places of `SCHEMA`."""
    return places_N >> _ROW_BITS


def rows_of(places_N: Any) -> Any:
    """The row numbers in places of `SCHEMA`."""
    return places_N & ((1 << _ROW_BITS) - 1)


def _cut_off(word: str) -> str:
    """The characters around a label that are cut off; empty where there are none."""
    label = trimmed(word)
    before, _, after = word.partition(label) if label else ("", "", "")
    return before + after


def _spaced(word: str) -> bool:
    return bool(around := _cut_off(word)) and around.isspace()


def _unseen(word: str) -> bool:
    return bool(around := _cut_off(word)) and not around.isspace()


def text_keys(texts: Any) -> Any:
    """A 128-bit hash of each text's normalised form: NFKC, case folded, white space as single
    spaces. Equal forms have equal keys.
    """
    lowered = pc.ascii_lower(texts)
    # for tidy ASCII, and only for that, lower case is already the normalised form
    forms = lowered.cast(pa.binary()).to_pylist()
    untidy = pc.or_(
        pc.invert(pc.string_is_ascii(texts)), pc.match_substring_regex(lowered, r"^\s|\s\s|[\t\n\v\f\r]|\s$")
    )
    others = np.flatnonzero(_flags(untidy))
    for i, text in zip(others.tolist(), texts.take(pa.array(others)).to_pylist(), strict=True):
        forms[i] = normalised(text).encode()
    return _hashes([blake2b(form, digest_size=16).digest() for form in forms])


def normalised(text: str) -> str:
    """The form of a text that two posts share if they count as the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hashes(digests: list[bytes]) -> Any:
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def _rows(column: Any, keep_N: Any) -> Any:
    """Some rows of a numpy or Arrow column."""
    return column[keep_N] if isinstance(column, np.ndarray) else column.filter(pa.array(keep_N))


def _without_breaks(values: Any) -> Any:
    """Kept values fit for a table: trimmed, with control characters as spaces."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(values, _CONTROL, " "))


def _flags(array: Any) -> Any:
    return array.to_numpy(zero_copy_only=False).astype(bool)


def _decode_strictly(raw: Any) -> tuple[Any, Any]:
    """The text of bytes, empty for null, and flags for broken bytes."""
    try:
        return raw.cast(pa.string()).fill_null(""), np.zeros(len(raw), bool)
    except pa.ArrowInvalid:
        values = [(value or b"").decode(errors="replace") for value in raw.to_pylist()]
        return pa.array(values, pa.string()), np.array(["\ufffd" in value for value in values])
