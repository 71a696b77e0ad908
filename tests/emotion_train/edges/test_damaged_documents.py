"""Documents that were damaged in thousands of ways end in a sentence: never in a traceback, never
in a hang, and never believed.

The damage is drawn from a fixed seed: flipped bytes, cut and doubled pieces, and values that no
such document has, in the place of those that it has.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import save

from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import read_staged_index
from emotion_train.config import LARGEST_MAX_LENGTH, load_config
from emotion_train.data.index import Index, read_index
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.edges.bounded import Unreadable, tensors_in, tensors_of_file
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.evaluation.decision import Decision, read_decision
from emotion_train.model.built_kernels import unpack
from emotion_train.model.facts import read_facts
from emotion_train.report.figures import decided
from emotion_train.report.pages import render_html
from emotion_train.report.schema import AnyFigures, Report, Scorecard, TrainedOn
from emotion_train.report.terminal import print_report, print_scorecard
from emotion_train.runs import checkpoint
from emotion_train.runs.log import _parse
from emotion_train.sources.arrow_columns import read_parquet, schema_of
from emotion_train.sources.posts import Columns, PostFile
from emotion_train.storage.store import Store
from launch.plan.prices import find_prices
from launch.results.scored import parse_document
from launch.workload import shape_of_base
from tests.earlier.make import ARCHIVE
from tests.emotion_train.report.test_report import predictions, report
from tests.emotion_train.report.test_report import result as result_of_one
from tests.helpers.scored_sets import scored

SEED = 20261129
EACH = 120  # damaged documents of each kind
LONGEST_S = 2.0  # of CPU for one document
MOST_S = 20.0  # of CPU for all

STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**12, 10**400, 2**63, -(10**9), 0.5, -0.0, 1e308, math.nan, math.inf),
    *("", "\0", "\n", "\ud800", "x" * 5000, "../..", "/etc/passwd", "=1", "NaN", [], {}, [[]], {"": 1}),
)


class Case(NamedTuple):
    """A kind of document: one that is right, how it is read, and what holds of whatever is
    accepted.
    """

    name: str
    right: bytes
    read: Callable[[bytes], Any]
    holds: Callable[[Any], bool]


class Hang(BaseException):
    """One document took too long."""


@contextmanager
def _not_too_long() -> Iterator[None]:
    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- damage ---


def damaged(right: bytes, draw: random.Random) -> bytes:
    """The document with one to three kinds of damage."""
    raw = right
    if draw.random() < 0.5:
        with suppress(ValueError, RecursionError):
            raw = _other_value(raw, draw)
    ways = (_flipped, _cut, _doubled, _inserted, _number)
    for _ in range(draw.randint(0 if raw != right else 1, 2)):
        raw = draw.choice(ways)(raw, draw)
    return raw


def _other_value(raw: bytes, draw: random.Random) -> bytes:
    """A JSON document with one value that is strange, gone, doubled, or another's."""
    document = json.loads(raw)
    places = list(_places(document))
    holder, key = draw.choice(places)
    other, at = draw.choice(places)
    way = draw.randrange(4)
    if way == 0:
        holder[key] = copy.deepcopy(draw.choice(STRANGE))
    elif way == 1:
        del holder[key]
    elif way == 2:
        holder[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(holder[key])
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[f"{key}_"] = holder[key]
    return json.dumps(document).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _flipped(raw: bytes, draw: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(raw: bytes, draw: random.Random) -> bytes:
    at, end = sorted((draw.randint(0, len(raw)), draw.randint(0, len(raw))))
    return raw[:at] if draw.random() < 0.5 else raw[:at] + raw[end:]


def _doubled(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(raw))
    end = min(len(raw), at + draw.choice((1, 8, 100)))
    return raw[:end] + raw[at:end] * draw.choice((1, 2, 50)) + raw[end:]


def _inserted(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(raw))
    pieces = (
        b"[" * 3000,
        b"{" * 100,
        b'{"a":' * 400,
        b"9" * 5000,
        b"NaN",
        b"\x00",
        b"\xff\xfe",
        b"\\ud800",
        b'"',
    )
    return raw[:at] + draw.choice(pieces) + raw[at:]


def _number(raw: bytes, draw: random.Random) -> bytes:
    """Another number in the place of one, as text or as four bytes."""
    digits = [at for at, byte in enumerate(raw) if chr(byte).isdigit()]
    if not digits or draw.random() < 0.3:
        at = draw.randint(0, max(0, len(raw) - 4))
        return raw[:at] + draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff")) + raw[at + 4 :]
    at = draw.choice(digits)
    return raw[:at] + draw.choice((b"-7", b"1e999", b"99999999999999999999", b"0.1", b"0")) + raw[at + 1 :]


# --- kinds ---


def _store(raw: bytes) -> Store:
    def read(key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None) -> bytes:
        return raw[start:] if length is None else raw[start : start + length]

    def read_verified(key: str, verify: Callable[[bytes], Any], **where: Any) -> Any:
        return verify(read(key, **where))

    members = {"read": read, "read_verified": read_verified, "url_of": lambda key: f"memory/{key}"}
    return cast(Store, SimpleNamespace(url="memory", **members))


def _written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def _adds_up(index: Index) -> bool:
    return len(set(index.labels)) == len(index.labels) and all(
        sum(split.label_counts) == split.rows == sum(group.rows for group in split.row_groups)
        and all(
            sum(group.label_counts) == group.rows > 0 <= min(group.label_counts) for group in split.row_groups
        )
        and len(split.label_counts) == len(index.labels)
        for split in index.splits.values()
    )


def _kernels() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(
            "FIRSTENTRYOFTRITON/__grp___drop.json", json.dumps({"child_paths": {"_drop.cubin": "x"}})
        )
        file.writestr("FIRSTENTRYOFTRITON/_drop.cubin", b"cubin" * 100)
    return packed.getvalue()


def _parquet() -> bytes:
    sink = io.BytesIO()
    texts = [f"post number {number}" for number in range(50)]
    pq.write_table(pa.table({"text": texts, "label": ["calm", "glee"] * 25}), sink, row_group_size=20)
    return sink.getvalue()


PRICES = b"AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\nH100,8,98.3,30.1,us\nA100,1,3.6,1.2,eu\n"
CONFIG = b"""run: {id: one, output_url: runs, seed: 42}
data: {url: data, max_length: 64}
train:
  epochs: 3
  learning_rate: 1e-4
lora: {r: 8, targets: [q_proj]}
"""


def _cases(folder: Path) -> Iterator[Case]:
    with zipfile.ZipFile(ARCHIVE) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}

    def of(end: str) -> bytes:
        return next(raw for name, raw in files.items() if name.endswith(end))

    first = of("data/index.json")
    newest = read_index(_store(first)).model_copy(update={"schema_version": Index.newest()})
    yield Case("index/1", first, lambda raw: read_index(_store(raw)), _adds_up)
    yield Case(
        "index/2", newest.to_bytes(), lambda raw: read_index(_store(raw)), lambda index: index == newest
    )
    yield Case(
        "log entry",
        of("stopped/log/00000001.json"),
        lambda raw: _parse(raw, "log"),
        lambda entry: all(".." not in part.key for part in entry.parts) and bool(entry.to_bytes()),
    )
    for features in (("targets:several", "weight"), ("targets:shares", "weight", "source")):
        other = newest.model_copy(update={"requires": features})
        yield Case(
            f"index/2 that requires {', '.join(features)}",
            other.to_bytes(),
            lambda raw: read_index(_store(raw)),
            lambda index, other=other: index == other,  # type: ignore[misc]
        )
    yield from _reports()
    entry = _parse(of("stopped/log/00000001.json"), "log")
    parts = {name: memoryview(bytearray(of(name))) for name in (checkpoint.ADAPTER, checkpoint.OPTIMIZER)}
    yield Case(
        "state",
        of("state.json"),
        lambda raw: checkpoint.Saved(entry, parts | {checkpoint.STATE: memoryview(raw)}).state().progress,
        lambda progress: progress.step == entry.step and 0 <= progress.train_seconds < math.inf,
    )
    yield Case(
        "tensors",
        save({"a": torch.ones(3, 4), "b": torch.zeros(2)}),
        tensors_in,
        lambda tensors: all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values()),
    )
    yield Case(
        "tensors in a buffer",
        save({"a": torch.ones(3, 4), "b": torch.zeros(2), "c": torch.tensor(1.0)}),
        lambda raw: tensors_in(memoryview(bytearray(raw))),
        lambda tensors: all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values()),
    )
    adapter = folder / "adapter"
    adapter.mkdir()
    for name in ("emotion_train.json", "labels.json", "adapter_model.safetensors", "tokenizer.json"):
        (adapter / name).write_bytes(of(f"adapter/{name}"))
    for name in ("emotion_train.json", "labels.json"):
        yield Case(
            name,
            of(f"adapter/{name}"),
            lambda raw, name=name: (_written(adapter / name, raw), read_facts(adapter))[1],  # type: ignore[misc]
            lambda facts: 1 <= facts.max_length <= LARGEST_MAX_LENGTH and len(facts.labels) > 1,
        )
        (adapter / name).write_bytes(of(f"adapter/{name}"))
    yield Case(
        "adapter_model.safetensors",
        of("adapter/adapter_model.safetensors"),
        lambda raw: tensors_of_file(_written(adapter / "adapter_model.safetensors", raw)),
        lambda tensors: all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values()),
    )
    yield from _cases_of_several(adapter)
    base = folder / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes(of(f"base/{name}"))
    yield Case(
        "config.json",
        of("base/config.json"),
        lambda raw: (_written(base / "config.json", raw), shape_of_base(str(base)))[1],
        lambda shape: shape.hidden_size > 0,
    )
    yield Case(
        "tokenizer_config.json",
        of("base/tokenizer_config.json"),
        lambda raw: (
            _written(base / "tokenizer_config.json", raw),
            PostTokenizer.load(BaseFiles.find(str(base)), 8),
        )[1],
        lambda tokenizer: tokenizer.vocab_size == 260,
    )
    staged = {
        "schema_version": "emotion-train/base/1",
        "source": "a/b",
        "precision": "bf16",
        "rounded": False,
    }
    yield Case(
        "base.json",
        json.dumps(staged | {"shards": [{"key": "a", "bytes": 4, "etag": None, "pieces": ["0"]}]}).encode(),
        lambda raw: read_staged_index(_store(raw)),
        lambda index: False,  # it lacks half of its fields, whatever is changed
    )
    yield Case(
        "config.yaml",
        CONFIG,
        lambda raw: load_config(_written(folder / "config.yaml", raw)),
        lambda config: load_config(_written(folder / "again.yaml", config.to_yaml().encode())) == config,
    )
    yield Case(
        "prices.csv",
        PRICES,
        lambda raw: find_prices(_written(folder / "prices.csv", raw)),
        lambda prices: prices is not None,
    )
    columns = Columns("text", "label", None)

    def read_posts(raw: bytes) -> int:
        file = PostFile("posts", None, _written(folder / "posts.parquet", raw), "parquet")
        schema_of(file)
        return sum(len(batch.texts) for batch in read_parquet(0, file, columns))

    yield Case("posts.parquet", _parquet(), read_posts, lambda rows: 0 <= rows <= 50)
    (folder / "kernels").mkdir()
    yield Case(
        "kernels.zip",
        _kernels(),
        lambda raw: unpack(raw, folder / "kernels"),
        lambda names: names <= {"FIRSTENTRYOFTRITON"},
    )


def _reports() -> Iterator[Case]:
    """Whatever is accepted has figures of its labels, and can be shown."""
    test, labels = scored(60, 1), ["joy", "anger", "awe", "grief"]
    decision = Decision.of(test, labels)
    result = decided(test.counts(), test, None, decision, True)
    of_several = report({"validation": result}, labels)
    card = Scorecard(
        targets="several",
        source="posts.csv",
        name="file",
        run_id=None,
        base="some/base",
        precision="nf4",
        labels=tuple(labels),
        figures=of_several.splits["validation"],
        trained_on=TrainedOn(posts=3, of=60, chance=0.001),
    )

    def is_whole(figures: AnyFigures, labels: tuple[str, ...]) -> bool:
        return 0 <= figures.macro_f1 <= 1 + 1e-9 and [one.label for one in figures.per_label] == list(labels)

    def report_holds(found: Any) -> bool:
        assert isinstance(found, Report)
        print_report(found, Console(file=io.StringIO(), width=200))
        render_html(found)
        return found.headline in found.splits and all(
            is_whole(figures, found.labels) for figures in found.splits.values()
        )

    def card_holds(found: Any) -> bool:
        assert isinstance(found, Scorecard)
        print_scorecard(found, Console(file=io.StringIO(), width=200))
        return is_whole(found.figures, found.labels)

    of_one = report({"test": result_of_one(predictions(60, 3))})
    for name, right, holds in (
        ("report/2", of_several.to_bytes(), report_holds),
        ("report/2 of one label", of_one.to_bytes(), report_holds),
        ("scorecard/2", card.to_bytes(), card_holds),
    ):
        yield Case(name, right, lambda raw: parse_document(raw, "the document"), holds)


def _cases_of_several(adapter: Path) -> Iterator[Case]:
    """An adapter of several labels is never answered as one of one, nor without thresholds."""
    of_one = {name: (adapter / name).read_bytes() for name in ("emotion_train.json", "labels.json")}
    facts = json.loads(of_one["emotion_train.json"]) | {"format": "emotion-train/adapter/2"}
    labels = json.loads(of_one["labels.json"])["labels"]
    right = {
        "emotion_train.json": json.dumps(facts | {"targets": "several"}).encode(),
        "decision.json": Decision(
            targets="several", labels=labels, thresholds=(0.25,) * len(labels), folds=5
        ).to_bytes(),
    }
    for name, raw in right.items():
        (adapter / name).write_bytes(raw)

    def read(name: str, raw: bytes) -> Decision:
        _written(adapter / name, raw)
        return read_decision(adapter, read_facts(adapter))

    for name, kind in (("emotion_train.json", "adapter/2"), ("decision.json", "decision/1")):
        yield Case(
            kind,
            right[name],
            lambda raw, name=name: read(name, raw),  # type: ignore[misc]
            lambda found: (
                (found.targets, list(found.labels)) == ("several", labels)
                and len(found.thresholds) == len(labels)
                and all(0 <= one <= 1 for one in found.thresholds)
            ),
        )
        (adapter / name).write_bytes(right[name])
    (adapter / "decision.json").unlink()
    (adapter / "emotion_train.json").write_bytes(of_one["emotion_train.json"])


def _trial(case: Case, raw: bytes) -> str | None:
    """What went wrong with a damaged document; None when it was refused in a sentence, or is
    sound.
    """
    try:
        with _not_too_long():
            found = case.read(raw)
            return None if case.holds(found) else "believed"
    except (EmotionTrainError, Unreadable) as error:
        # pydantic's page for programmers, with a link that the sentence cut
        return "a page" if re.search("validation errors?|pydantic|type=", str(error)) else None
    except ValueError as error:
        return None if case.name == "kernels.zip" else f"{type(error).__name__}: {error}"[:300]
    except Hang:
        return "hangs"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def test_right_documents_are_read(tmp_path: Path) -> None:
    for case in _cases(tmp_path):
        if case.name != "base.json":
            assert case.holds(case.read(case.right)), case.name


def test_an_adapter_that_does_not_say_what_it_answers_with_is_refused(tmp_path: Path) -> None:
    """Else one of several labels would be answered by the highest probability."""
    case = next(case for case in _cases(tmp_path) if case.name == "adapter/2")
    without = {key: value for key, value in json.loads(case.right).items() if key != "targets"}
    with pytest.raises(WrongRequest, match="this version knows one, several, shares"):
        case.read(json.dumps(without).encode())


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_thousands_of_damaged_documents_end_in_a_sentence(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    started, tried = time.process_time(), 0
    problems: dict[str, bytes] = {}
    for case in _cases(tmp_path):
        for _ in range(EACH):
            raw = damaged(case.right, draw)
            tried += 1
            if raw != case.right and (problem := _trial(case, raw)) is not None:
                problems.setdefault(f"{case.name}: {problem}", raw[:200])
    assert problems == {}
    assert tried >= 2500
    assert time.process_time() - started < MOST_S
