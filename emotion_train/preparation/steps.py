"""A source of posts becomes a prepared data set: validated, split, shuffled, written, verified."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion_train.data.index import INDEX_KEY, SPLITS, Index, read_index
from emotion_train.data.targets import requires
from emotion_train.edges.paths import typed_path
from emotion_train.errors import AlreadyExists, WrongRequest
from emotion_train.preparation.existing import existing_index, restore
from emotion_train.preparation.options import Options
from emotion_train.storage.document import version_of
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from emotion_train.data.cleaning import Findings
    from emotion_train.data.conflicts import Policy
    from emotion_train.preparation.corrections import Applied, Corrections
    from emotion_train.preparation.division import Fractions
    from emotion_train.preparation.work import Work


@dataclass(frozen=True)
class PrepareResult:
    url: str
    index: Index
    created: bool  # False: the same data set existed already
    findings: Findings
    on_conflict: Policy
    written: int = 0  # missing objects of an existing data set that were written now
    corrected: Applied | None = None


def prepare(source: str | Path | None, data_url: str, **options: Any) -> PrepareResult:
    """Prepare `source` at `data_url`; `options` are the fields of `Options`.

    Raises `WrongRequest` when posts cannot be used (naming them), or when `data_url` holds another
    data set.
    """
    from emotion_train.data.cleaning import Findings
    from emotion_train.data.labels import LabelNames
    from emotion_train.preparation.corrections import read_corrections
    from emotion_train.preparation.work import Work
    from emotion_train.sources.open import Choices, open_source

    chosen = Options(**options)
    chosen.check()
    corrections = None if chosen.corrections is None else read_corrections(chosen.corrections)
    store = open_store(data_url)
    existing = existing_index(store)
    choices = Choices(*(getattr(chosen, name) for name in Choices._fields[:-1]))
    if source is not None:
        _refuse_target_in_source(Path(source), store)
    with ExitStack() as stack:
        opened = stack.enter_context(
            open_source(None if source is None else str(source), chosen.columns, choices)
        )
        others = [
            stack.enter_context(open_source(given, chosen.columns_of_auxiliary, chosen.choices_of_auxiliary))
            for given in chosen.auxiliary_sources
        ]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emotion-train-prepare-")))
        findings = Findings(file.name for file in opened.files)
        for number, other in enumerate(others, 1):
            findings.files += [f"auxiliary {number}/{file.name}" for file in other.files]
        findings.remarks += [f"not read: {name}" for name in opened.passed_over]
        labels = LabelNames(chosen.labels, opened.label_names)
        work = Work(opened, others, chosen, labels, findings, folder)
        index, corrected = _data_set(work, store if existing is None else None, corrections)
        if existing is None:
            raw = index.to_bytes()
            if len(raw) > Index.max_bytes:
                raise WrongRequest(
                    f"The index would have {len(raw):,} bytes, and {Index.max_bytes:,} are the most that is"
                    " read; type a larger --rows-per-group."
                )
            with suppress(AlreadyExists):
                store.create(INDEX_KEY, raw)
                return PrepareResult(store.url, index, True, findings, chosen.policy, corrected=corrected)
            existing = read_index(store)  # created by another process meanwhile
        written = restore(store, existing, index, folder)
        return PrepareResult(store.url, existing, False, findings, chosen.policy, written, corrected)


def _data_set(
    work: Work, store: Store | None, corrections: Corrections | None
) -> tuple[Index, Applied | None]:
    """The index of the data set, whose objects are written; and what corrections did."""
    from emotion_train.preparation.corrections import Corrector
    from emotion_train.preparation.division import divided, final_labels, fractions_of
    from emotion_train.preparation.one_of_each import Chosen
    from emotion_train.preparation.reading import read_posts
    from emotion_train.preparation.refusals import no_validation, refuse_bad_posts, refuse_untrainable
    from emotion_train.preparation.writing import write_auxiliary, write_split

    options = work.options
    posts = read_posts(work)
    chosen = Chosen.of(work, posts)
    refuse_bad_posts(work, posts.rows_read)
    if posts.auxiliary is not None:
        posts.auxiliary.settle(posts.texts_in, work.findings.note)
    fractions = fractions_of(work, chosen.counts_SC)
    names, id_of_code = final_labels(work, chosen.counts_SC)
    corrector = None
    if corrections is not None:
        codes = {name: work.labels.codes[name] for name in names}
        corrector = Corrector(corrections, codes, options.targets, allow_none=options.allow_none)
    shuffled, rows, label_counts = divided(work, posts.by_text, chosen, id_of_code, fractions, corrector)
    corrected = None if corrector is None else corrector.finish()
    refuse_untrainable(names, label_counts)
    written = {
        split: write_split(work, store, split, shuffled[split], rows[split], len(names))
        for split in SPLITS
        if rows[split]
    }
    if "validation" not in written:
        raise no_validation(work, "add posts, at least three of each label")
    auxiliary = write_auxiliary(work, store, posts.auxiliary)
    provenance = _provenance(work, fractions, posts.rows_read, corrected) | written["train"].lengths
    index = Index(
        requires=requires(options.targets, work.weighted, auxiliary=auxiliary is not None),
        labels=names,
        splits={name: part.split for name, part in written.items()},
        auxiliary=auxiliary,
        source=provenance,
        seed=options.seed,
        versions=_versions(),
    )
    return index, corrected


def _provenance(
    work: Work, fractions: Fractions, rows_read: int, corrected: Applied | None
) -> dict[str, str | int | float | None]:
    """What the index says of the source: its name, the options, and the counts of findings."""
    options, findings = work.options, work.findings
    given = {name: getattr(options, name) for name in ("text_column", "label_column", "id_column")}
    given |= {
        "on_conflict": options.policy,
        "max_chars": options.max_chars,
        "rows_per_group": options.rows_per_group,
    }
    if options.label_columns is not None:
        given["label_columns"] = ",".join(options.label_columns)
    for name in ("annotations_by", "weight_column"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if options.keep_columns:
        given["keep_columns"] = ",".join(options.keep_columns)
    if options.has_auxiliary:
        given["auxiliary"] = options.auxiliary
    if work.others:
        given["auxiliary_sources"] = ",".join(other.name for other in work.others)
    if corrected is not None:
        given["corrections_sha256"] = corrected.corrections.sha256
        given["corrections_applied"] = corrected.applied
    return {
        "name": work.source.name,
        "format": work.source.format,
        **given,
        "validation_fraction": fractions.validation,
        "test_fraction": fractions.test,
        "rows_read": rows_read,
        **{kind: findings.counts[kind] for kind in sorted(findings.counts)},
    }


def _refuse_target_in_source(given: Path, store: Store) -> None:
    """Raises `WrongRequest` where the data set would be written into its own source."""
    if isinstance(store, FolderStore) and given.is_dir():
        target, folder = typed_path(store.url).resolve(), typed_path(given).resolve()
        if (
            target == folder
            or folder in target.parents
            or (target in folder.parents and folder.name in SPLITS)
        ):
            raise WrongRequest(
                f"DATA_URL {store.url} lies in the source {given}; name a folder outside of it."
            )


def _versions() -> dict[str, str]:
    import unicodedata

    import pyarrow

    return {
        "emotion_train": version_of("emotion-train"),
        "pyarrow": pyarrow.__version__,
        "unicode": unicodedata.unidata_version,
    }
