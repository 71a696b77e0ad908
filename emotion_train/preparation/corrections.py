"""Labels that a person corrected, in a CSV such as the report's mislabelled.csv: its columns, how
they are read, and which posts they change.

A row counts if its `corrected` is filled in. Its post is found by the text's normalised form, or by
the id where the file has no texts. A row changes nothing unless the post still has the label that
was corrected. Splits are drawn before, so that a changed label never moves a held-out post into
training.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from emotion_train.console import counted
from emotion_train.data.targets import TargetKind
from emotion_train.edges.bounded import MAX_CSV_BYTES, Unreadable, bytes_of
from emotion_train.edges.paths import typed_path
from emotion_train.edges.spreadsheet import as_it_was
from emotion_train.errors import WrongRequest

if TYPE_CHECKING:
    from emotion_train.data.target_columns import PostTargets

COLUMNS = ("id", "text", "label", "suggested", "probability", "corrected")
_SHOWN = 5


def spelled_labels(names: Sequence[str], several: bool) -> str:
    """The labels as one cell: joy, or joy|anger, or JSON where a name would be misread."""
    if not several:
        return names[0]
    if names and not any("|" in name or name.startswith("[") or name != name.strip() for name in names):
        return "|".join(names)
    return json.dumps(list(names), ensure_ascii=False)


class Correction(NamedTuple):
    """A filled-in row; `row` is its number in a spreadsheet."""

    row: int
    text: str | None
    post_id: str | None
    label: str
    corrected: str

    @property
    def post(self) -> str:
        return repr((self.text or self.post_id or "")[:60])


@dataclass(frozen=True)
class Corrections:
    """The filled-in rows of a file; `blank` counts the other rows."""

    name: str
    sha256: str
    rows: tuple[Correction, ...]
    blank: int


def read_corrections(given: str | Path) -> Corrections:
    """The corrections in a file. Raises `WrongRequest` where the file cannot be read, lacks a
    column, or contradicts itself.
    """
    path = typed_path(given)
    try:
        raw = bytes_of(path, MAX_CSV_BYTES)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise WrongRequest(
            f"--corrections {given} cannot be read ({error.strerror}); give a CSV such as the mislabelled.csv"
            " beside a report."
        ) from None
    except (Unreadable, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise WrongRequest(f"--corrections {given} cannot be read: {reason}; save it as CSV UTF-8.") from None
    rows = _rows_of(str(given), text)
    filled = tuple(row for row in rows if row.corrected)
    _refuse_contradictions(str(given), filled)
    return Corrections(path.name, hashlib.sha256(raw).hexdigest(), filled, len(rows) - len(filled))


def _rows_of(name: str, text: str) -> list[Correction]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # spreadsheets of many countries save semicolons
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        present = [cell.strip() for cell in rows.fieldnames or ()]
        rows.fieldnames = present
        missing = [column for column in ("label", "corrected") if column not in present]
        if missing or not {"text", "id"} & set(present):
            raise WrongRequest(
                f"--corrections {name} has the columns {', '.join(map(repr, present[:20])) or 'none'}; it"
                " needs label, corrected, and text or id, as the mislabelled.csv beside a report has them."
            )
        corrections = []
        for number, cells in enumerate(rows, 2):  # as a spreadsheet counts: a text over lines is one row
            cell = {column: (cells.get(column) or "").strip() for column in COLUMNS}
            corrections.append(
                Correction(
                    number,
                    cell["text"] if "text" in present else None,
                    cell["id"] if "id" in present else None,
                    cell["label"],
                    cell["corrected"],
                )
            )
    except csv.Error as error:
        raise WrongRequest(f"--corrections {name} is not a CSV ({error}); save it as CSV UTF-8.") from None
    return corrections


def _refuse_contradictions(name: str, rows: Sequence[Correction]) -> None:
    from emotion_train.data.cleaning import normalised

    seen: dict[tuple[str, str], Correction] = {}
    for one in rows:
        key = ("id", one.post_id or "") if one.text is None else ("text", normalised(as_it_was(one.text)))
        before = seen.setdefault(key, one)
        if (before.label, before.corrected) != (one.label, one.corrected):
            raise WrongRequest(
                f"--corrections {name} corrects {one.post} twice and differently: {before.label} to"
                f" {before.corrected} in row {before.row}, {one.label} to {one.corrected} in row {one.row};"
                " leave one of the two rows out."
            )


@dataclass
class Applied:
    """The outcome of a file's rows."""

    corrections: Corrections
    applied: int = 0
    already: int = 0  # posts that already have the corrected label
    other: list[int] = field(default_factory=list)  # rows whose post has a third label
    unmatched: list[int] = field(default_factory=list)  # rows that no post fits

    def lines(self) -> list[str]:
        """The outcome as one line for a terminal."""
        file = self.corrections
        have = "has its" if self.already == 1 else "have their"
        parts = [f"{counted(self.applied, 'label')} corrected by {file.name}"]
        parts += [f"{counted(self.already, 'row')} {have} correction already"] if self.already else []
        for rows, one, several in (
            (self.other, "has another label now", "have another label now"),
            (self.unmatched, "fits no post", "fit no post"),
        ):
            if rows:
                parts.append(f"{len(rows):,} {one if len(rows) == 1 else several} ({_some(rows)})")
        parts += [f"{file.blank:,} left blank"] if file.blank else []
        return [f"corrections {'; '.join(parts)}"]


def _some(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(rows)[:_SHOWN]))
    return f"row{'' if len(rows) == 1 else 's'} {shown}{', …' if len(rows) > _SHOWN else ''}"


class Corrector:
    """Changes the targets of posts on their way into their splits. `code_of` maps the data set's
    labels to their codes; a target is the set of its codes.
    """

    def __init__(
        self,
        corrections: Corrections,
        code_of: dict[str, int],
        targets: TargetKind,
        *,
        allow_none: bool = False,
    ) -> None:
        import pyarrow as pa

        from emotion_train.data.cleaning import text_keys

        self.outcome = Applied(corrections)
        self._code_of = code_of
        self._several = targets == "several"
        self._allow_none = allow_none
        self._file = corrections.name
        self._by_id: dict[str, Correction] = {}
        self._by_key: dict[tuple[int, int], Correction] = {}
        self._met: Counter[int] = Counter()
        spelled: list[tuple[str, Correction]] = []
        for one in corrections.rows:
            if one.text is None:
                self._by_id[one.post_id or ""] = one
            else:
                spelled += [(form, one) for form in {one.text, as_it_was(one.text)}]
        if spelled:
            keys_N2 = text_keys(pa.array([form for form, _ in spelled], pa.string())).tolist()
            self._by_key = {
                (first, second): one for (first, second), (_, one) in zip(keys_N2, spelled, strict=True)
            }
        self._wanted = {
            one.row: (self._codes(one, one.label, known=False), self._codes(one, one.corrected, known=True))
            for one in corrections.rows
        }

    def of_rows(self, rows: Any, targets: PostTargets) -> PostTargets:
        """The targets of clean rows after their corrections."""
        import numpy as np

        from emotion_train.data.target_columns import PostTargets

        concerned = self._find(rows)
        if not concerned:
            return targets
        places, made = [], []
        for place, one in concerned:
            before = frozenset(label for label, _ in targets.target(place))
            if (after := self._after(one, before)) != before:
                places.append(place)
                made.append(sorted(after))
        if not places:
            return targets
        post_P = np.repeat(np.arange(len(made)), [len(codes) for codes in made])
        label_P = np.array([code for codes in made for code in codes], np.int64)
        label_P = label_P.astype(targets.label_P.dtype)
        others = PostTargets.of_pairs(post_P, label_P, np.ones(len(label_P)), len(made))
        order = np.arange(targets.posts)
        order[places] = targets.posts + np.arange(len(made))
        return targets.followed_by(others).take(order)

    def _find(self, rows: Any) -> list[tuple[int, Correction]]:
        """The places of posts that have a correction, with the correction."""
        keys = (rows.column(name).to_numpy().tolist() for name in ("key0", "key1"))
        ids = rows.column("id").to_pylist() if self._by_id else [""] * len(rows)
        found = []
        for place, (first, second, post_id) in enumerate(zip(*keys, ids, strict=True)):
            one = self._by_key.get((first, second)) or self._by_id.get(post_id)
            if one is not None:
                found.append((place, one))
        return found

    def _after(self, one: Correction, codes: frozenset[int]) -> frozenset[int]:
        """The labels, after the correction, of a post that has `codes`; counts the outcome."""
        old, new = self._wanted[one.row]
        self._met[one.row] += 1
        assert new is not None
        if codes == new:
            self.outcome.already += 1
        elif codes == old:
            self.outcome.applied += 1
            return new
        else:
            self.outcome.other.append(one.row)
        return codes

    def finish(self) -> Applied:
        """The outcome, once all posts were given."""
        self.outcome.unmatched = [
            one.row for one in self.outcome.corrections.rows if one.row not in self._met
        ]
        return self.outcome

    def _codes(self, one: Correction, cell: str, *, known: bool) -> frozenset[int] | None:
        """The label codes of a cell. A label that the data set does not have gives None, or raises
        `WrongRequest` where it must be `known`.
        """
        names = self._names(cell)
        if known and not names and not self._allow_none:
            raise WrongRequest(
                f"--corrections {self._file} takes all labels from {one.post} in row {one.row}; type"
                " --allow-none if a post may have none."
            )
        unknown = [name for name in names if name not in self._code_of]
        if not unknown:
            return frozenset(self._code_of[name] for name in names)
        if not known:
            return None
        labels = ", ".join(list(self._code_of)[:30])
        raise WrongRequest(
            f"--corrections {self._file} corrects {one.post} to {unknown[0][:80]!r} in row {one.row}, which"
            f" is no label of the data set; its labels are {labels}."
        )

    def _names(self, cell: str) -> list[str]:
        for whole in (cell, as_it_was(cell)):
            if whole in self._code_of:
                return [whole]
        if not self._several:
            return [cell]
        if cell.startswith("["):
            try:
                listed = json.loads(cell)
            except ValueError:
                listed = None
            if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
                return listed
        return [name.strip() for name in as_it_was(cell).split("|")]
