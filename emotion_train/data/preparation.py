"""A source of posts becomes a prepared data set: validated, split, shuffled, written, verified."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emotion_train.data.existing import existing_index, restore
from emotion_train.data.index import INDEX_KEY, SPLITS, Auxiliary, Index, Split, has_control, read_index
from emotion_train.data.targets import AUXILIARY, KINDS, WEIGHT, TargetKind, requires
from emotion_train.edges.paths import typed_path
from emotion_train.errors import AlreadyExists, WrongRequest
from emotion_train.progress import ProgressLine
from emotion_train.storage.document import version_of
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emotion_train.data.auxiliary import AuxiliaryPosts
    from emotion_train.data.cleaning import Findings
    from emotion_train.data.conflicts import Dispute, Example, Policy
    from emotion_train.data.corrections import Applied, Corrections, Corrector
    from emotion_train.data.label_sets import LabelSets
    from emotion_train.data.labels import LabelNames
    from emotion_train.data.spill import Spill
    from emotion_train.data.target_columns import PostTargets
    from emotion_train.sources.open import Choices, Source
    from emotion_train.sources.posts import Columns


@dataclass(frozen=True)
class Options:
    """The options of `prepare`, with their defaults."""

    text_column: str = "text"
    label_column: str = "label"
    id_column: str | None = None
    labels: tuple[str, ...] | None = None
    targets: TargetKind = "one"
    label_columns: tuple[str, ...] | None = None  # in place of label_column
    allow_none: bool = False
    annotations_by: str | None = None
    weight_column: str | None = None
    multi_label: str | None = None  # None: as on_bad
    on_bad: str = "refuse"
    on_conflict: Policy | None = None  # None: majority, of shares mean
    max_chars: int = 20_000
    unescape_html: bool = False
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 42
    rows_per_group: int = 1024
    rows_per_object: int = 262_144
    memory_mb: int = 512
    format: str | None = None
    subset: str | None = None
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"
    text_file: str | None = None
    label_file: str | None = None
    header: tuple[str, ...] | None = None
    corrections: str | None = None
    keep_columns: tuple[str, ...] = ()
    auxiliary: Literal["drop", "keep"] = "drop"
    auxiliary_sources: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `WrongRequest` for values that are out of range or do not go together."""
        from emotion_train.data.conflicts import POLICIES

        if self.targets not in KINDS:
            raise WrongRequest(f"--targets is {self.targets!r}; type one of {', '.join(KINDS)}.")
        if self.policy not in self.policies:
            raise WrongRequest(
                f"--on-conflict is {self.on_conflict!r}; type one of {', '.join(POLICIES[self.targets])}"
                f"{'' if self.targets == 'one' else f' with --targets {self.targets}'}."
            )
        if self.allow_none and self.targets != "several":
            raise WrongRequest(
                "--allow-none is for posts with several labels; type --targets several with it."
            )
        if self.annotations_by is not None and self.targets == "one":
            raise WrongRequest(
                "--annotations-by joins answers to shares or to several labels; type --targets shares or"
                " --targets several with it (for one label a post --on-conflict majority counts them)."
            )
        if self.label_columns is not None and self.labels is not None:
            raise WrongRequest("--label-columns name the labels; leave --labels and --labels-file out.")
        if self.multi_label is not None and self.targets != "one":
            raise WrongRequest(
                "--multi-label is for one label a post; leave it out, or take --targets several back."
            )
        if self.corrections is not None and self.targets == "shares":
            raise WrongRequest(
                "--corrections is for one label a post or several; leave it out with --targets shares, whose"
                " annotators may all be right."
            )
        self._refuse_unnamed_auxiliary()
        folded = [name.strip().casefold() for name in self.keep_columns]
        if strange := next(
            (
                name
                for name, plain in zip(self.keep_columns, folded, strict=True)
                if not plain or "," in name or folded.count(plain) > 1
            ),
            None,
        ):
            raise WrongRequest(
                f"--keep-columns has {strange!r}; give each column once, by a name without a comma, such as"
                " lang,source."
            )
        fractions = (self.validation_fraction, self.test_fraction)
        if not all(0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
            raise WrongRequest(
                f"--validation-fraction {fractions[0]} and --test-fraction {fractions[1]} leave nothing to"
                " train on; type for example 0.1."
            )
        least = {"max_chars": 1, "rows_per_group": 1, "rows_per_object": 1, "memory_mb": 16, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise WrongRequest(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; the smallest allowed is"
                    f" {smallest}."
                )
        most = {"max_chars": 2**31, "rows_per_group": 2**31, "rows_per_object": 2**40, "memory_mb": 2**24}
        for name, largest in most.items():
            if getattr(self, name) > largest:
                raise WrongRequest(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; the largest allowed is {largest}."
                )
        if self.seed >= 2**63:
            raise WrongRequest(f"--seed is {self.seed}; the largest allowed is {2**63 - 1}.")
        if self.labels is not None:
            from emotion_train.data.labels import require_names

            require_names(self.labels)

    def _refuse_unnamed_auxiliary(self) -> None:
        if self.auxiliary not in ("drop", "keep"):
            raise WrongRequest(f"--auxiliary is {self.auxiliary!r}; type drop or keep.")
        if not self.has_auxiliary:
            return
        option = "--auxiliary keep" if self.auxiliary == "keep" else "--auxiliary-source"
        if self.labels is None:
            raise WrongRequest(
                f"{option} is for posts of other labels than the reported ones; type --labels with the"
                " reported labels, such as --labels anger,joy,neutral, or --labels-file."
            )
        if self.annotations_by is not None:
            raise WrongRequest(
                f"{option} and --annotations-by do not go together, because answers are joined before labels"
                " are checked; leave one of them out."
            )

    @property
    def has_auxiliary(self) -> bool:
        """Whether there may be auxiliary posts, which are trained on and not scored."""
        return self.auxiliary == "keep" or bool(self.auxiliary_sources)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The allowed policies for several rows of a text, the default first."""
        from emotion_train.data.conflicts import BY_DEFAULT, POLICIES

        default = BY_DEFAULT[self.targets]
        return default, *(policy for policy in POLICIES[self.targets] if policy != default)

    @property
    def policy(self) -> Policy:
        """The policy for several rows of a text."""
        return self.policies[0] if self.on_conflict is None else self.on_conflict

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        from emotion_train.sources.posts import Columns

        return Columns(
            self.text_column,
            self.label_column if self.label_columns is None else None,
            self.id_column,
            label_columns=self.label_columns or (),
            weight=self.weight_column,
            annotator=self.annotations_by,
            lists=self.targets != "one",
            kept=self.keep_columns,
            kept_by="--keep-columns",
        )

    @property
    def columns_of_auxiliary(self) -> Columns:
        """The columns to read from an auxiliary source: its posts and labels."""
        from emotion_train.sources.posts import Columns

        return Columns(self.text_column, self.label_column, lists=True)

    @property
    def choices_of_auxiliary(self) -> Choices:
        """How an auxiliary source is read: by the endings of its files."""
        from emotion_train.sources.open import Choices

        return Choices(encoding=self.encoding, quoting=self.quoting)

    @property
    def more_columns(self) -> tuple[str, ...]:
        """The data set's columns that not every data set has, as shards name them."""
        from emotion_train.data.targets import WEIGHT, kept_name

        weight = [WEIGHT] if self.weight_column is not None else []
        return (*weight, *map(kept_name, self.keep_columns))


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
    from contextlib import ExitStack

    from emotion_train.data.cleaning import Findings
    from emotion_train.data.labels import LabelNames
    from emotion_train.sources.open import Choices, open_source

    chosen = Options(**options)
    chosen.check()
    corrections = None
    if chosen.corrections is not None:
        from emotion_train.data.corrections import read_corrections

        corrections = read_corrections(chosen.corrections)
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
        job = _Job(
            opened, chosen, store if existing is None else None, labels, findings, folder, corrections, others
        )
        index = job.run()
        if existing is None:
            raw = index.to_bytes()
            if len(raw) > Index.max_bytes:
                raise WrongRequest(
                    f"The index would have {len(raw):,} bytes, and {Index.max_bytes:,} are the most that is"
                    " read; type a larger --rows-per-group."
                )
            with suppress(AlreadyExists):
                store.create(INDEX_KEY, raw)
                return PrepareResult(store.url, index, True, findings, chosen.policy, corrected=job.corrected)
            existing = read_index(store)  # created by another process meanwhile
        written = restore(store, existing, index, folder)
        return PrepareResult(
            store.url, existing, False, findings, chosen.policy, written, corrected=job.corrected
        )


class _Job:
    """One run of `prepare`: read and clean, choose rows and splits, shuffle, write."""

    def __init__(
        self,
        source: Source,
        options: Options,
        store: Store | None,
        labels: LabelNames,
        findings: Findings,
        folder: Path,
        corrections: Corrections | None = None,
        others: Sequence[Source] = (),
    ) -> None:
        from emotion_train.data.spill import partitions_for

        self._source = source
        self._options = options
        self._store = store
        self._labels = labels
        self._findings = findings
        self._folder = folder
        self._memory = options.memory_mb << 20
        self._partitions = partitions_for(source.bytes + sum(other.bytes for other in others), self._memory)
        self._rows_read = 0
        self._code_C: Any = None  # final codes of labels, known once all rows are read
        self._lengths: dict[str, int] = {}  # of the training posts, for the index
        self._sets: LabelSets | None = None  # strata of posts with several labels
        self._corrections = corrections
        self._corrector: Corrector | None = None
        self.corrected: Applied | None = None  # the outcome of the corrections
        self._others = others
        self._auxiliary: AuxiliaryPosts | None = None

    def run(self) -> Index:
        from emotion_train.data.spill import Spill

        by_text = Spill(self._folder / "by_text", self._partitions, self._memory)
        if self._options.annotations_by is None:
            self._read(by_text)
            self._settle_labels(by_text)
        else:
            answers = Spill(self._folder / "answers", self._partitions, self._memory)
            self._read(answers)
            self._settle_labels(answers)
            self._join_answers(answers, by_text)
        self._refuse_other_forms()
        counts = self._keep_one_of_each_text(by_text)
        self._refuse_bad_posts()
        if self._auxiliary is not None:
            self._auxiliary.settle(lambda partition: self._texts_in(by_text, partition), self._findings.note)
        fractions = self._fractions(counts)
        names, id_of_code = self._final_labels(counts)
        if self._corrections is not None:
            from emotion_train.data.corrections import Corrector

            codes = {name: self._labels.codes[name] for name in names}
            options = self._options
            self._corrector = Corrector(
                self._corrections, codes, options.targets, allow_none=options.allow_none
            )
        shuffled = {
            split: Spill(self._folder / split, self._partitions, self._memory // len(SPLITS))
            for split in SPLITS
        }
        rows, label_counts = self._distribute(by_text, shuffled, id_of_code, fractions)
        if self._corrector is not None:
            self.corrected = self._corrector.finish()
        self._refuse_untrainable(names, label_counts)
        splits = {
            split: self._write(split, shuffled[split], rows[split], len(names))
            for split in SPLITS
            if rows[split]
        }
        if "validation" not in splits:
            raise self._no_validation("add posts, at least three of each label")
        auxiliary = self._write_auxiliary()
        return Index(
            requires=requires(
                self._options.targets,
                self._options.weight_column is not None,
                auxiliary=auxiliary is not None,
            ),
            labels=names,
            splits=splits,
            auxiliary=auxiliary,
            source=self._provenance(fractions),
            seed=self._options.seed,
            versions=_versions(),
        )

    def _read(self, by_text: Spill) -> None:
        """Write clean rows into partitions by text, or annotators' rows into partitions by post."""
        from emotion_train.data.cleaning import Cleaner, Rules
        from emotion_train.data.spill import partition_of

        options = self._options
        rules = Rules(
            options.max_chars,
            options.seed,
            options.unescape_html,
            options.targets,
            options.allow_none,
            options.keep_columns,
        )
        key = "draw" if options.annotations_by and options.id_column else "key0"
        every = self._open_auxiliary()
        cleaner = Cleaner(rules, self._labels, self._findings, every)
        done = 0
        with ProgressLine("reading", max(1, self._source.bytes >> 20), "MiB") as line:
            for batch in self._source.batches():
                rows, others = cleaner.separate(batch, self._source.files[batch.file].split)
                if len(rows):
                    by_text.add(rows, partition_of(rows.column(key).to_numpy(), self._partitions))
                if others is not None and self._auxiliary is not None:
                    self._auxiliary.add(others)
                done += sum(column.nbytes for column in (batch.texts, batch.labels) if column is not None)
                line.update(min(done, self._source.bytes) >> 20, f"{cleaner.rows_read:,} posts")
        by_text.flush()
        self._rows_read = cleaner.rows_read
        for other in self._others:
            self._read_auxiliary(other)

    def _open_auxiliary(self) -> LabelNames | None:
        """The names for every label of the source, if its auxiliary posts are kept; else None."""
        from emotion_train.data.auxiliary import AuxiliaryPosts, AuxiliarySource, EveryLabel
        from emotion_train.data.labels import LabelNames

        options = self._options
        if not options.has_auxiliary or options.labels is None:
            return None
        names: tuple[str, ...] = self._labels.in_order()
        self._auxiliary = AuxiliaryPosts(
            options.targets, names, self._folder, self._partitions, self._memory // len(SPLITS)
        )
        of_source = self._source.label_names
        kept = options.auxiliary == "keep"
        every = EveryLabel(names, of_source) if kept else LabelNames(names, of_source)
        self._auxiliary.sources.append(AuxiliarySource(self._source.name, every, 0))
        return every if kept else None

    def _read_auxiliary(self, source: Source) -> None:
        """Read the posts of an auxiliary source that are in train or in no split."""
        import pyarrow.compute as pc

        from emotion_train.data.auxiliary import AuxiliarySource
        from emotion_train.data.cleaning import SPLIT_CODES, Cleaner, Rules
        from emotion_train.data.labels import LabelNames

        auxiliary, options = self._auxiliary, self._options
        assert auxiliary is not None, "it is opened with the first source"
        earlier = (self._source, *self._others[: self._others.index(source)])
        files = sum(len(before.files) for before in earlier)
        names = LabelNames(None, source.label_names)
        auxiliary.sources.append(AuxiliarySource(source.name, names, files))
        rules = Rules(options.max_chars, options.seed, options.unescape_html, auxiliary.kind)
        cleaner = Cleaner(rules, names, self._findings)
        for batch in source.batches():
            batch = batch._replace(file=batch.file + files)
            rows = cleaner.clean(batch, source.files[batch.file - files].split)
            rows = rows.filter(pc.greater_equal(rows.column("split"), SPLIT_CODES["train"]))
            auxiliary.add(rows if options.weight_column is None else _weighing_one(rows))
        self._rows_read += cleaner.rows_read

    def _texts_in(self, by_text: Spill, partition: int) -> Any:
        """The first halves of the hashes of a partition's texts."""
        import numpy as np

        batches = by_text.read(partition, self._at("key0"))
        return np.concatenate(
            [np.zeros(0, np.uint64), *(batch.column("key0").to_numpy() for batch in batches)]
        )

    def _write_auxiliary(self) -> Auxiliary | None:
        if self._auxiliary is None or not self._auxiliary.rows:
            return None
        from emotion_train.data.shards import SplitWriter

        options = self._options
        weighted = options.weight_column is not None

        def new_writer(rows: int, labels: int, kind: TargetKind) -> SplitWriter:
            return SplitWriter(
                self._store,
                AUXILIARY,
                rows,
                labels,
                options.rows_per_group,
                options.rows_per_object,
                self._folder,
                kind,
                weighted,
                auxiliary=True,
            )

        return self._auxiliary.write(new_writer, weighted)

    def _settle_labels(self, by_text: Spill) -> None:
        """Fix the labels' codes. Rows whose label turned out to be several are counted here, and
        left out from here on.
        """
        from emotion_train.data.cleaning import SCHEMA
        from emotion_train.data.labels import LabelNames

        if self._options.targets != "one":
            self._code_C = self._labels.ranked()
            return
        self._code_C = self._labels.settle()
        if not (self._code_C == LabelNames.SEVERAL).any():
            return
        for partition in range(by_text.partitions):
            for batch in by_text.read(
                partition, [SCHEMA.get_field_index(name) for name in ("place", "label")]
            ):
                place, label = (batch.column(name).to_numpy() for name in ("place", "label"))
                self._findings.note("several_labels", place[self._code_C[label] == LabelNames.SEVERAL])

    def _join_answers(self, answers: Spill, by_text: Spill) -> None:
        """Join annotators' rows to posts, and write these into partitions by text."""
        import pyarrow as pa

        from emotion_train.data.annotations import joined
        from emotion_train.data.spill import partition_of

        options = self._options
        for partition in range(answers.partitions):
            batches = list(answers.read(partition))
            if not batches:
                continue
            table = pa.Table.from_batches(batches).combine_chunks()
            place = table.column("place").to_numpy()
            by_id = options.id_column is not None
            result = joined(table, self._code_C, options.targets, by_id=by_id, allow_none=options.allow_none)
            for kind in ("answers", "answered_again", "other_text", "no_half"):
                self._findings.note(kind, place[getattr(result, kind)])
            if len(result.posts):
                (posts,) = result.posts.to_batches()
                by_text.add(posts, partition_of(posts.column("key0").to_numpy(), self._partitions))
            answers.remove(partition)
        by_text.flush()
        self._code_C = self._labels.ranked()  # posts have the final codes from here on

    def _refuse_other_forms(self) -> None:
        """Raises `WrongRequest` where one split has lists and another single labels."""
        forms = {split: forms for split, forms in self._findings.forms.items() if split}
        words = {"list": "lists of labels", "object": "objects of shares", "plain": "labels without brackets"}
        for split, here in forms.items():
            for other, there in forms.items():
                if not here & there:
                    raise WrongRequest(
                        f"{self._source.name} has {words[min(here)]} in {split} and {words[min(there)]} in"
                        f" {other}; write the labels of all splits in one form."
                    )

    def _refuse_bad_posts(self) -> None:
        from emotion_train.data.cleaning import DROPPED, REFUSED

        policy = dict.fromkeys(REFUSED, self._options.on_bad)
        policy["several_labels"] = self._options.multi_label or self._options.on_bad
        policy["conflicting"] = self._options.policy
        refused = {kind: words for kind, words in (REFUSED | DROPPED).items() if policy.get(kind) == "refuse"}
        lines = self._findings.lines(refused)
        if not lines:
            return
        lines += [
            f"  {name!r} {count:,} times{self._labels.advice(name)}"
            for name, count in self._unknown_labels()
            if "unknown_label" in refused
        ]
        lines += [f"  {example}" for example in self._findings.conflicts if "conflicting" in refused]
        total = sum(self._findings.counts[kind] for kind in refused)
        failing = [kind for kind in refused if self._findings.counts[kind]]
        one_way = failing[0] if self._findings.counts[failing[0]] == self._rows_read else None
        remedies = [
            "Mend them" if one_way is None else f"All fail in one way: {_ALL_ALIKE.get(one_way, 'mend them')}"
        ]
        if "undecodable" in failing:
            remedies.append(
                "type --encoding latin-1 (or cp1252, …), or convert the file by `iconv -f LATIN1 -t UTF-8`"
            )
        if one_way is None and any(
            self._findings.counts[kind]
            for kind in refused
            if kind != "conflicting" and (kind != "several_labels" or self._options.multi_label is None)
        ):
            remedies.append("type --on-bad drop to leave them out")
        if "hidden_labels" in failing:
            remedies.append(
                "give the file that has the labels of these posts, or label them with `emotion-train predict`"
            )
        if "several_labels" in refused and self._findings.counts["several_labels"]:
            remedies.append("type --multi-label drop to leave out posts with several labels")
            remedies.append("type --targets several to train on several labels a post")
        may_be_none = self._options.targets == "several" and not self._options.allow_none
        if may_be_none and {"no_label", "no_half"} & set(failing):
            remedies.append("type --allow-none if a post may have none of the labels")
        if "object_label" in failing and self._options.targets != "shares":
            remedies.append("type --targets shares if objects hold shares of the labels")
        if "conflicting" in refused and self._findings.counts["conflicting"]:
            *others, last = self._options.policies[:-1]
            remedies.append(f"type --on-conflict {', '.join(others)} or {last} for texts with several labels")
        if "unknown_label" in refused and self._findings.counts["unknown_label"]:
            remedies.append(
                f"name all labels with --labels ({', '.join(self._labels.in_order()[:30])} are known)"
            )
            options = self._options
            if options.labels is not None and options.annotations_by is None and options.auxiliary == "drop":
                remedies.append("type --auxiliary keep to train on posts of labels that are never predicted")
        posts = f"1 of {self._rows_read:,} posts" if total == 1 else f"{total:,} of {self._rows_read:,} posts"
        raise WrongRequest(
            f"{self._source.name}: {posts} cannot be used:\n  "
            + "\n  ".join(lines)
            + f"\n{'; or '.join(remedies)}."
        )

    def _unknown_labels(self) -> list[tuple[str, int]]:
        return sorted(self._findings.unknown_labels.items(), key=lambda item: (-item[1], item[0]))[:5]

    def _keep_one_of_each_text(self, by_text: Spill) -> Any:
        """Choose among rows of the same text; returns the number of kept posts, or the sums of
        their shares, by split code and label code. The last column counts posts, whatever their
        labels.

        The row of the later split is kept (test, then validation, then train), and within a split
        the row that `--on-conflict` chooses. The choice goes to a file of flags and targets for
        each partition, and the draws of kept posts to one file for `stratify`.
        """
        import numpy as np
        import pyarrow as pa

        from emotion_train.data.cleaning import NO_SPLIT
        from emotion_train.data.conflicts import EXAMPLES_SHOWN, settle
        from emotion_train.data.labels import LabelNames
        from emotion_train.data.target_columns import PostTargets

        options, labels = self._options, max(1, len(self._labels.codes))
        used = ["key0", "key1", "split", "place", "draw"]
        counts_SC: Any = np.zeros(
            (NO_SPLIT + 1, labels + 1), np.float64 if options.targets == "shares" else np.int64
        )
        conflicts: list[tuple[Dispute, int]] = []  # with the partition of each
        with self._draws.open("wb") as draws:
            for partition in range(by_text.partitions):
                batches = list(by_text.read(partition, self._at(*used, *self._target_columns)))
                if not batches:
                    continue
                table = pa.Table.from_batches(batches)
                columns = [table.column(name).to_numpy() for name in used]
                targets = PostTargets.of_rows(table, self._code_C)
                flags = np.ones(targets.posts, bool)
                if options.targets == "one":
                    flags = targets.label_P != LabelNames.SEVERAL
                    targets = PostTargets.of_one(targets.label_P[flags])
                *keys, draw = (column[flags] for column in columns)
                split, place = keys[2:]
                choice, targets, disputes = settle(
                    (keys[0], keys[1], split, place),
                    targets,
                    options.targets,
                    options.policy,
                    labels,
                    allow_none=options.allow_none,
                )
                self._findings.note("in_two_splits", place[choice.in_two_splits_N])
                self._findings.note("conflicting", place[choice.conflicting_N])
                self._findings.note("repeated", place[choice.repeated_N])
                if choice.texts:
                    self._findings.counts["conflicting_texts"] += choice.texts
                    conflicts += [(dispute, partition) for dispute in disputes]
                    conflicts = sorted(conflicts, key=lambda item: item[0].place)[:EXAMPLES_SHOWN]
                kept = np.flatnonzero(choice.keep_N)
                flags[flags] = choice.keep_N
                targets, split = targets.take(kept), split[kept]
                self._keep(partition, flags, targets)
                at = split[targets.posts_of_pairs], targets.label_P
                np.add.at(counts_SC, at, targets.share_P.astype(counts_SC.dtype))
                counts_SC[:, labels] += np.bincount(split, minlength=len(counts_SC))
                if options.targets == "several":
                    self._findings.note("without_label", place[kept[targets.counts == 0]])
                else:
                    self._add_draws(draws, targets.largest(), draw[kept], split)
        self._findings.conflicts = [self._example(by_text, *item) for item in conflicts]
        if options.targets == "several":
            self._draw_sets(by_text, counts_SC)
        return counts_SC

    def _draw_sets(self, by_text: Spill, counts_SC: Any) -> None:
        """Count the sets of labels, each a stratum, and record the draws of their posts."""
        import numpy as np

        from emotion_train.data.cleaning import SPLIT_CODES
        from emotion_train.data.label_sets import LabelSets

        self._sets = LabelSets(counts_SC[:, :-1].sum(axis=0))
        for counted in (False, True):
            with self._draws.open("wb") as draws:
                for partition in range(by_text.partitions):
                    keep, targets = self._kept(partition)
                    if not targets.posts:
                        continue
                    batches = by_text.read(partition, self._at("draw", "split"))
                    draw, split = (
                        np.concatenate(column)[keep]
                        for column in zip(
                            *((b.column("draw").to_numpy(), b.column("split").to_numpy()) for b in batches),
                            strict=True,
                        )
                    )
                    if counted:
                        self._add_draws(draws, self._sets.of(targets), draw, split)
                    else:
                        self._sets.add(targets.take(np.flatnonzero(split >= SPLIT_CODES["train"])))
            if not counted:
                self._sets.freeze()

    def _add_draws(self, draws: Any, stratum_N: Any, draw_N: Any, split_N: Any) -> None:
        """Record the draws of posts in train or in no split, some of which go to validation and
        test.
        """
        import numpy as np

        from emotion_train.data.cleaning import SPLIT_CODES
        from emotion_train.data.stratify import DRAW

        divisible = split_N >= SPLIT_CODES["train"]
        record = np.empty(int(divisible.sum()), DRAW)
        record["label"], record["draw"] = stratum_N[divisible], draw_N[divisible]
        record.tofile(draws)

    def _example(self, by_text: Spill, dispute: Dispute, partition: int) -> Example:
        """The conflict with its text, read from that partition, and with names of labels."""
        import pyarrow.compute as pc

        from emotion_train.data.conflicts import Example, spelled

        names = {code: name for name, code in self._labels.codes.items()}
        columns = self._at("place", "text")
        (text,) = (
            text.as_py()
            for batch in by_text.read(partition, columns)
            for text in batch.column("text").filter(pc.equal(batch.column("place"), dispute.place))
        )
        votes = [(spelled(target, names), rows) for target, rows in dispute.votes]
        return Example(text, votes, None if dispute.winner is None else spelled(dispute.winner, names))

    def _fractions(self, counts_SC: Any) -> tuple[float, float]:
        """The shares of train that become validation and test; 0 for splits that the source has."""
        from emotion_train.data.cleaning import NO_SPLIT, SPLIT_CODES

        has = {split: bool(counts_SC[code, -1]) for split, code in SPLIT_CODES.items()}
        undivided = bool(counts_SC[NO_SPLIT, -1])
        if not undivided and not any(has.values()):
            raise WrongRequest(f"{self._source.name} holds no posts; give a file with posts.")
        if undivided and any(has.values()):
            raise WrongRequest(
                f"Some posts of {self._source.name} name a split and others do not; fill column 'split'"
                " everywhere or remove it."
            )
        if not undivided and not has["train"]:
            present = ", ".join(split for split in SPLITS if has[split])
            raise WrongRequest(
                f"{self._source.name} has posts for {present} only; add a file or split named train"
                f"{self._not_read()}."
            )
        validation = 0.0 if has["validation"] else self._options.validation_fraction
        test = 0.0 if has["test"] or has["validation"] else self._options.test_fraction
        if not validation and not has["validation"]:
            raise self._no_validation("raise --validation-fraction (now 0)")
        return validation, test

    def _final_labels(self, counts_SC: Any) -> tuple[tuple[str, ...], Any]:
        """The labels in their final order, and the final id of each code; -1 for a code without a
        kept row.
        """
        import numpy as np

        met = {name for name, code in self._labels.codes.items() if counts_SC[:, code].any()}
        names = tuple(name for name in self._labels.in_order() if name in met or self._labels.fixed)
        if len(names) < 2:
            raise WrongRequest(
                f"{self._source.name} has {', '.join(names) or 'no'} as its only label; at least two are"
                " needed to classify."
            )
        if strange := next((name for name in names if has_control(name)), None):
            raise WrongRequest(
                f"{self._source.name} has the label {strange[:80]!r}, which holds a control character, for"
                " example an end of line; mend the label column, or type --label-column with another."
            )
        id_of_code = np.full(counts_SC.shape[1] - 1, -1, np.int32)
        for position, name in enumerate(names):
            id_of_code[self._labels.codes[name]] = position
        return names, id_of_code

    def _distribute(
        self,
        by_text: Spill,
        shuffled: dict[str, Spill],
        id_of_code: Any,
        fractions: tuple[float, float],
    ) -> tuple[dict[str, int], dict[str, list[float]]]:
        """Write kept rows into partitions of their split's shuffled order; returns posts by split,
        and label counts by split and label id.
        """
        import numpy as np
        import pyarrow as pa

        from emotion_train.data.cleaning import SPLIT_CODES
        from emotion_train.data.spill import partition_of
        from emotion_train.data.stratify import thresholds

        codes = len(id_of_code)
        if self._sets is None:
            limits = thresholds(self._draws, codes, *fractions)
        else:
            numbers = self._sets.numbers(*fractions)
            limits = thresholds(self._draws, len(numbers), *fractions, numbers)
        of_posts = self._options.more_columns
        rows_of = dict.fromkeys(SPLITS, 0)
        counts = {split: np.zeros(codes) for split in SPLITS}
        with ProgressLine("splitting", by_text.partitions, "partitions") as line:
            for partition in range(by_text.partitions):
                keep, all_targets = self._kept(partition)
                start = post = 0
                for batch in by_text.read(partition):
                    rows = batch.filter(pa.array(keep[start : start + len(batch)]))
                    start += len(batch)
                    targets = all_targets.take(np.arange(post, post + len(rows)))
                    post += len(rows)
                    draw, split = (rows.column(name).to_numpy() for name in ("draw", "split"))
                    stratum = targets.largest() if self._sets is None else self._sets.of(targets)
                    from_train = split >= SPLIT_CODES["train"]
                    split = np.where(from_train, SPLIT_CODES["train"], split)
                    split[from_train & (draw < limits.validation_C[stratum])] = SPLIT_CODES["validation"]
                    split[from_train & (draw < limits.test_C[stratum])] = SPLIT_CODES["test"]
                    if self._corrector is not None:  # after splitting: labels before correction decide it
                        targets = self._corrector.of_rows(rows, targets)
                    targets = targets._replace(label_P=id_of_code[targets.label_P])
                    columns = {
                        name: rows.column(name) for name in ("order", "place", "id", "text", *of_posts)
                    }
                    rows = pa.record_batch(columns | targets.columns(self._options.targets))
                    for name, spill in shuffled.items():
                        chosen = split == SPLIT_CODES[name]
                        part = rows.filter(pa.array(chosen))
                        if len(part):
                            spill.add(part, partition_of(part.column("order").to_numpy(), spill.partitions))
                            rows_of[name] += len(part)
                            counts[name] += targets.take(np.flatnonzero(chosen)).label_counts(codes)
                by_text.remove(partition)
                line.update(partition + 1)
        for spill in shuffled.values():
            spill.flush()
        labels = int(id_of_code.max()) + 1
        return rows_of, {split: count.tolist()[:labels] for split, count in counts.items()}

    def _refuse_untrainable(self, names: tuple[str, ...], rows: dict[str, list[float]]) -> None:
        missing = [name for name, count in zip(names, rows["train"], strict=True) if not count]
        if missing:
            position = names.index(missing[0])
            elsewhere = ", ".join(f"{split} {rows[split][position]:,.6g}" for split in SPLITS)
            likewise = f"; neither have {len(missing) - 1} other labels" if missing[1:] else ""
            others = ",".join(name for name in names if name not in missing)
            raise WrongRequest(
                f"Label {missing[0]!r} has no post to train on ({elsewhere}{likewise}): "
                f"add posts, or leave it out with --labels {others} and --on-bad drop."
            )

    def _no_validation(self, remedy: str) -> WrongRequest:
        return WrongRequest(
            f"{self._source.name} gives no validation posts, which every run needs: {remedy}, or add a file"
            f" named validation{self._not_read()}."
        )

    def _not_read(self) -> str:
        names = self._source.passed_over
        return f" (not read: {', '.join(names[:5])})" if names else ""

    def _write(self, split: str, shuffled: Spill, rows: int, labels: int) -> Split:
        """Sort each partition by the shuffled order and write them one after the other."""
        import numpy as np
        import pyarrow as pa

        from emotion_train.data.shards import SplitWriter, schema_of

        options = self._options
        measured = _Measured()
        weighted = options.weight_column is not None
        schema = schema_of(options.targets, weighted, kept=options.keep_columns)
        writer = SplitWriter(
            self._store,
            split,
            rows,
            labels,
            options.rows_per_group,
            options.rows_per_object,
            self._folder,
            options.targets,
            weighted,
            kept=options.keep_columns,
        )
        done = 0
        with writer, ProgressLine(f"writing {split}", rows, "posts") as line:
            for partition in range(shuffled.partitions):
                batches = list(shuffled.read(partition))
                if not batches:
                    continue
                table = pa.Table.from_batches(batches).combine_chunks()
                del batches
                shuffled.remove(partition)
                order = table.column("order").to_numpy()
                by_order = np.lexsort((table.column("place").to_numpy(), order))
                table = table.select(schema.names).take(pa.array(by_order))
                _refuse_doubled_ids(
                    table, np.flatnonzero(np.diff(order[by_order]) == 0), self._options.id_column
                )
                writer.add(table.cast(schema))
                measured.add(table.column("text"))
                done += len(table)
                line.update(done)
            if split == "train":
                self._lengths = measured.recorded()
            return writer.finish()

    def _provenance(self, fractions: tuple[float, float]) -> dict[str, str | int | float | None]:
        options = self._options
        chosen = {
            name: getattr(options, name)
            for name in (
                "text_column",
                "label_column",
                "id_column",
                "on_conflict",
                "max_chars",
                "rows_per_group",
            )
        }
        chosen["on_conflict"] = options.policy
        if options.label_columns is not None:
            chosen["label_columns"] = ",".join(options.label_columns)
        for name in ("annotations_by", "weight_column"):
            if getattr(options, name) is not None:
                chosen[name] = getattr(options, name)
        if options.keep_columns:
            chosen["keep_columns"] = ",".join(options.keep_columns)
        if options.has_auxiliary:
            chosen["auxiliary"] = options.auxiliary
        if self._others:
            chosen["auxiliary_sources"] = ",".join(other.name for other in self._others)
        if self.corrected is not None:
            chosen["corrections_sha256"] = self.corrected.corrections.sha256
            chosen["corrections_applied"] = self.corrected.applied
        counts = {kind: self._findings.counts[kind] for kind in sorted(self._findings.counts)}
        return {
            "name": self._source.name,
            "format": self._source.format,
            **chosen,
            "validation_fraction": fractions[0],
            "test_fraction": fractions[1],
            "rows_read": self._rows_read,
            **counts,
            **self._lengths,
        }

    @property
    def _draws(self) -> Path:
        return self._folder / "draws"

    @property
    def _target_columns(self) -> list[str]:
        from emotion_train.data.target_columns import FIELDS

        return [name for name, _ in FIELDS[self._options.targets]]

    def _at(self, *names: str) -> list[int]:
        """The positions of columns of clean rows."""
        from emotion_train.data.cleaning import schema_of

        schema = schema_of(
            self._options.targets,
            weighted=self._options.weight_column is not None,
            kept=self._options.keep_columns,
        )
        return [schema.get_field_index(name) for name in names]

    def _keep(self, partition: int, keep_N: Any, targets: PostTargets) -> None:
        """Record which rows of a partition are kept, and their targets."""
        import numpy as np

        with (self._folder / f"kept-{partition:04}").open("wb") as file:
            for array in (keep_N, *([targets.label_P] if self._options.targets == "one" else targets)):
                np.save(file, array)

    def _kept(self, partition: int) -> tuple[Any, PostTargets]:
        """The flags and targets that `_keep` recorded; empty where it recorded none."""
        import numpy as np

        from emotion_train.data.target_columns import PostTargets

        path = self._folder / f"kept-{partition:04}"
        if not path.exists():
            return np.zeros(0, bool), PostTargets.of_one(np.zeros(0, np.int32))
        with path.open("rb") as file:
            keep_N = np.load(file)
            if self._options.targets == "one":
                return keep_N, PostTargets.of_one(np.load(file))
            return keep_N, PostTargets(*(np.load(file) for _ in PostTargets._fields))


# The likely cause or remedy where every row fails in the same way
_ALL_ALIKE = {
    "undecodable": "the file is not UTF-8",
    "ragged_line": "its rows have other cells than its header; see whether the header and the delimiter fit",
    "broken_json": "the file is not JSON Lines, one object a line",
    "not_text": "type --text-column with the column that holds the posts",
    "empty_text": "type --text-column with the column that holds the posts",
    "no_label": "type --label-column with the column that holds the labels",
    "hidden_labels": "the labels of this file are hidden",
    "unknown_label": "--labels names none of the labels that are there",
}


def _weighing_one(rows: Any) -> Any:
    """Clean rows with a weight of 1 each."""
    import numpy as np
    import pyarrow as pa

    columns = {name: rows.column(name) for name in rows.schema.names[:-2]}
    columns[WEIGHT] = pa.array(np.ones(len(rows)))
    return pa.record_batch(columns | {name: rows.column(name) for name in rows.schema.names[-2:]})


class _Measured:
    """Adds up the lengths of texts over all batches."""

    def __init__(self) -> None:
        from emotion_train.data.lengths import Lengths

        self._characters = self._bytes = Lengths.of([])

    def add(self, texts: Any) -> None:
        import pyarrow.compute as pc

        from emotion_train.data.lengths import Lengths

        self._characters += Lengths.of(pc.utf8_length(texts).to_numpy())
        self._bytes += Lengths.of(pc.binary_length(texts).to_numpy())

    def recorded(self) -> dict[str, int]:
        from emotion_train.data.lengths import recorded

        return recorded(self._characters, self._bytes)


def _refuse_doubled_ids(table: Any, places: Any, id_column: str | None) -> None:
    """Raises `WrongRequest` for an id of two posts. Equal ids have equal hashes, so they are
    neighbours, at `places`.
    """
    ids = table.column("id")
    for place in places:
        if ids[int(place)] == ids[int(place) + 1]:
            raise WrongRequest(
                f"Two posts of one split have the id {ids[int(place)].as_py()!r}; ids in column"
                f" {id_column!r} must be unique."
            )


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
