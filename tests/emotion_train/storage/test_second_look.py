"""One damaged read condemns nothing: of every kind of object the same wrong bytes must come twice
before it is called damaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotion_train.bases.staged import StagedBase, StagedIndex, read_staged_index
from emotion_train.data.index import Index, read_index
from emotion_train.data.objects import look_at_objects
from emotion_train.data.reader import RowGroupReader
from emotion_train.errors import Damaged, EmotionTrainError, StorageError
from emotion_train.model import built_kernels
from emotion_train.model.built_kernels import BuiltKernels
from emotion_train.model.staged_copy import stage
from emotion_train.model.staged_weights import staged_tensors
from emotion_train.model.staging import ObjectWriter
from emotion_train.preparation.shards import place
from emotion_train.preparation.steps import prepare
from emotion_train.runs import published
from emotion_train.runs.log import Entry, Writer, read_log, read_part, require_conditional_writes, upload_part
from emotion_train.storage import second_look as second_look_page
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from emotion_train.storage.s3 import S3Store, _Answer
from emotion_train.storage.second_look import second_look
from emotion_train.storage.store import ObjectInfo, Store
from launch.results.history import list_runs
from tests.helpers.fault_proxy import Fault, FaultProxy, with_one_bit_changed
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import write_posts

PLANS = {
    "once": ["flipped"],
    "twice with other bits": ["flipped", "elsewhere"],
    "always other bits": ["elsewhere"] * 100,
    "always the same bits": ["flipped"] * 100,
}
CONTENT = b"An adapter is here. " * 50


@dataclass(frozen=True)
class Everything:
    """One store of each object that this program verifies, below their folders, and `files`: what
    they were made of.
    """

    stores: dict[str, Store]
    files: Path
    index: Index
    base: StagedIndex
    entries: tuple[Entry, ...]


class Kind(NamedTuple):
    """`path` is in the URL of the object, `read` returns what is in it, and `damaged` is said when
    it is damaged.

    A document has no sum in itself: in a folder, which has no ETags, some flipped bits make another
    document of it.
    """

    path: str
    read: Callable[[Everything, Path], object]
    damaged: str
    is_document: bool = False


def fill(open_room: Callable[[str], Store], files: Path) -> Everything:
    """The smallest data set, staged base, run with its adapter, and archive of kernels."""
    stores = {name: open_room(name) for name in ("posts", "base", "runs", "kernels")}
    index = prepare(str(write_posts(files / "posts")), stores["posts"].url).index
    part = index.split("train").objects[0]
    (files / "part.parquet").write_bytes(stores["posts"].read(part.key))
    base = stage(str(causal_checkpoint(files / "base", "llama")), stores["base"].url).index
    writer = Writer(stores["runs"], "run", index.sha256(), "b" * 64)
    writer.claim(0, 0)
    state = writer.upload("step-1/adapter.safetensors", CONTENT)
    writer.append("checkpoint", 0, 1, (state,), {"macro_f1": 0.5})
    adapter = upload_part(stores["runs"], "run", "final/00000000/adapter/adapter.safetensors", CONTENT)
    writer.append("final", 0, 1, (adapter,))
    entry = files / "triton" / "ENTRYOFTRITONSCACHE"
    entry.mkdir(parents=True)
    (entry / "__grp__one.json").write_text(json.dumps({"child_paths": {"one.cubin": "/one.cubin"}}))
    (entry / "one.cubin").write_bytes(bytes(range(256)) * 8)
    stores["kernels"].write("kernels.zip", built_kernels.pack(files / "triton", {entry.name}))
    return Everything(stores, files, index, base, writer.log)


def rows_of(it: Everything, _: Path) -> object:
    with RowGroupReader(it.stores["posts"], it.index.split("train")) as reader:
        return reader.rows(0)


def objects_of(it: Everything, _: Path) -> object:
    document = it.index.model_dump()
    for split in document["splits"].values():
        for one in split["objects"]:
            one["etag"] = None  # a copy in another bucket
    look = look_at_objects(it.stores["posts"], Index.model_validate(document))
    if look.damaged:
        raise Damaged(str(look.damaged))
    return look


def piece_of(it: Everything, _: Path) -> object:
    import torch

    return {
        name: tensor.view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in staged_tensors(StagedBase(it.stores["base"], it.base), torch.device("cpu"))
        if isinstance(tensor, torch.Tensor)
    }


def small_file_of(it: Everything, _: Path) -> object:
    base = StagedBase(it.stores["base"], it.base)  # its files go with it
    path = base.path("config.json")
    assert path is not None
    return path.read_bytes()


def placed(it: Everything, _: Path) -> object:
    return place(it.stores["posts"], it.index.split("train").objects[0], it.files / "part.parquet")


def pulled(it: Everything, folder: Path) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "open_store", lambda _: it.stores["runs"])
        published.download("runs/run", folder / "adapter")
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def kernels_of(it: Everything, folder: Path) -> object:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built_kernels, "archive_name", lambda _: "kernels.zip")
        store = it.stores["kernels"]
        with BuiltKernels(store, folder / "triton", "sm90", said.append, keeps=False) as kernels:
            kernels.ready()
            found = built_kernels.entries(folder / "triton")
    if said:  # a run does without
        raise StorageError(said[0], transient="flips bits" in said[0])
    return found


KINDS = {
    "log entry": Kind(
        "/log/00000001", lambda it, _: read_log(it.stores["runs"], "run"), "is damaged", is_document=True
    ),
    "checkpoint": Kind(
        "/data/00000000/",
        lambda it, _: read_part(it.stores["runs"], "run", it.entries[1].parts[0]),
        "replaced or damaged",
    ),
    "published adapter": Kind("/final/", pulled, "replaced or damaged"),
    "index.json": Kind(
        "/index.json", lambda it, _: read_index(it.stores["posts"]), "damaged or was edited", is_document=True
    ),
    "row group": Kind("/train/part-", rows_of, "is not what index.json describes"),
    "objects of a copy": Kind("/train/part-", objects_of, "is not what index.json describes"),
    "object after its upload": Kind("/train/part-", placed, "do not have the hash in its name"),
    "base.json": Kind(
        "/base.json",
        lambda it, _: read_staged_index(it.stores["base"]),
        "damaged or was edited",
        is_document=True,
    ),
    "small file of a base": Kind("/base/config.json", small_file_of, "is not what base.json describes"),
    "piece of a base": Kind("/model-00001", piece_of, "is not what base.json describes"),
    "piece of a base after its upload": Kind(
        "/base/model-99999",
        lambda it, _: ObjectWriter(it.stores["base"], 1 << 20).put("model-99999", CONTENT),
        "does not hold what was written",
    ),
    "kernels": Kind("/kernels.zip", kernels_of, "it is damaged", is_document=True),
    "probe of a store": Kind(
        "/probe/",
        lambda it, _: require_conditional_writes(it.stores["runs"], "run", False),
        "overwrites an object",
    ),
    "own write without an answer": Kind(
        "/lost",
        lambda it, _: it.stores["runs"].create("lost", CONTENT),
        "exists already with other content",
    ),
}


class Requests(FaultProxy):
    """Keeps what was asked for: path, range, client and cache of each GET."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.gets: list[tuple[str, str | None, str, str | None]] = []

    def passes(self, method: str, path: str, headers: Message) -> None:
        if method == "GET":
            client = "boto3" if "Boto" in headers["User-Agent"] else "obstore"
            self.gets.append((path, headers["Range"], client, headers["Cache-Control"]))


class FlippingFolder(FolderStore):
    """A folder whose reads are spoiled as those through a `FaultProxy`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.faults: list[Fault] = []
        self.gets: list[tuple[str, int]] = []

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        data = super().read(key, start=start, length=length, if_match=if_match)
        self.gets.append((key, start))
        if self.faults and self.faults[0].path in f"{self.url}/{key}":
            elsewhere = self.faults.pop(0).kind == "elsewhere"
            other = 1 + len(self.faults) if elsewhere else 0
            return with_one_bit_changed(data, (len(data) // 2 + other) % len(data), 0x80 >> other % 8)
        return data

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None) -> int:
        return Store.read_into(self, key, buffer, start=start, if_match=if_match)


@pytest.fixture(scope="module", autouse=True)
def _without_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_look_page, "PAUSES_S", (0,) * len(second_look_page.PAUSES_S))
        yield


@pytest.fixture(scope="module")
def proxy(s3: LocalS3) -> Iterator[Requests]:
    """The way to the server for the rest of the page."""
    with Requests(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="module")
def bucket(s3: LocalS3, proxy: Requests, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    s3.create_bucket("everything")
    return fill(lambda name: open_store(f"s3://everything/{name}"), tmp_path_factory.mktemp("files"))


def after_faults(kind: Kind, it: Everything, folder: Path) -> object:
    """What reading gives, or its error."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        return kind.read(it, folder)
    except EmotionTrainError as error:
        return error


def judge(plan: str, kind: Kind, result: object, whole: object) -> None:
    if plan == "always the same bits":
        assert isinstance(result, EmotionTrainError)
        assert kind.damaged in str(result)
        assert not (isinstance(result, StorageError) and result.transient)
    elif plan == "always other bits":
        assert isinstance(result, StorageError)
        assert "flips bits" in str(result)
        assert "damaged" not in str(result)
        assert result.transient
    else:
        assert result == whole


@pytest.mark.parametrize("name", KINDS)
def test_only_the_same_wrong_bytes_twice_are_damage(
    name: str, bucket: Everything, proxy: Requests, tmp_path: Path
) -> None:
    kind = KINDS[name]
    kind.read(bucket, tmp_path)  # what is made by the first read is there
    proxy.gets.clear()
    whole = after_faults(kind, bucket, tmp_path / "whole")
    assert not isinstance(whole, EmotionTrainError)
    seen = [(path, asked) for path, asked, *_ in proxy.gets]
    assert len(set(seen)) == len(seen)  # nothing twice where the first read verifies
    for plan, faults in PLANS.items():
        proxy.struck.clear()
        proxy.faults[:] = [Fault(fault, "GET", kind.path) for fault in faults]
        result = after_faults(kind, bucket, tmp_path / "after")
        assert proxy.struck, plan
        proxy.faults.clear()
        judge(plan, kind, result, whole)
    assert after_faults(kind, bucket, tmp_path / "after") == whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    root = tmp_path_factory.mktemp("everything")
    return fill(lambda name: FlippingFolder(root / name), tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("name", KINDS)
def test_nor_is_a_file_condemned_by_one_read_of_it(name: str, folder: Everything, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.read(folder, tmp_path)
    stores = [store for store in folder.stores.values() if isinstance(store, FlippingFolder)]
    for store in stores:
        store.gets.clear()
    whole = after_faults(kind, folder, tmp_path / "whole")
    assert not isinstance(whole, EmotionTrainError)
    for plan, faults in PLANS.items():
        if kind.is_document and "other bits" in plan:
            continue
        for store in stores:
            assert len(set(store.gets)) == len(store.gets)
            store.faults = [Fault(fault, "GET", kind.path) for fault in faults]
        result = after_faults(kind, folder, tmp_path / "after")
        assert any(len(store.faults) < len(faults) for store in stores)
        for store in stores:
            store.faults.clear()
            store.gets.clear()
        judge(plan, kind, result, whole)


@given(st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_the_first_good_read_wins_and_the_first_repeated_one_condemns(reads: list[int]) -> None:
    """0 is good; the others are wrong in different ways."""

    def verify(data: bytes) -> str:
        if data != b"0":
            raise Damaged("damaged")
        return "whole"

    looks: list[int] = []

    def read(look: int) -> bytes:
        looks.append(look)
        return b"%d" % reads[look]

    ends = [at for at, one in enumerate(reads) if one == 0 or one in reads[:at]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_look_page, "PAUSES_S", (0,) * 6)
        if reads[ends[0]] == 0:
            assert second_look(read, verify, "url") == "whole"
        else:
            with pytest.raises(Damaged):
                second_look(read, verify, "url")
    assert looks == list(range(ends[0] + 1))


def test_a_store_that_is_away_at_the_second_look_is_asked_again() -> None:
    answers: list[bytes | StorageError] = [b"wrong", StorageError("away", transient=True), b"right"]

    def read(look: int) -> bytes:
        if isinstance(answer := answers[look], StorageError):
            raise answer
        return answer

    def verify(data: bytes) -> bytes:
        if data != b"right":
            raise ValueError
        return data

    assert second_look(read, verify, "url") == b"right"
    answers[2:] = [answers[1]] * 5
    with pytest.raises(StorageError, match="away"):
        second_look(read, verify, "url")


def test_a_second_look_takes_another_connection_another_client_and_no_cache(
    bucket: Everything, proxy: Requests
) -> None:
    store = bucket.stores["runs"]
    store.write("looked-at", CONTENT)
    proxy.gets.clear()
    proxy.faults[:] = [Fault("elsewhere", "GET", "/looked-at")] * 3
    assert store.read("looked-at") == CONTENT
    assert [(client, cache) for *_, client, cache in proxy.gets] == [
        ("obstore", None),
        ("boto3", "no-cache"),
        ("obstore", "no-cache"),
        ("boto3", "no-cache"),
    ]


def test_a_listing_with_any_bit_flipped_hides_no_entry(bucket: Everything, proxy: Requests) -> None:
    proxy.struck.clear()
    for _ in range(25):
        proxy.faults[:] = [Fault("elsewhere", "GET", "list-type=2")]
        assert tuple(read_log(bucket.stores["runs"], "run")) == bucket.entries
    assert len(proxy.struck) == 25


def test_sizes_of_a_listing_are_asked_of_the_objects_before_anything_is_called_lost(
    folder: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    posts, base = folder.stores["posts"], StagedBase(folder.stores["base"], folder.base)
    for store in (posts, base.store):
        wrong = [ObjectInfo(info.key, info.size + 1, None) for info in store.list()][1:]
        monkeypatch.setattr(store, "list", lambda wrong=wrong: iter(wrong))
    look = look_at_objects(posts, folder.index)
    assert not look.missing
    assert not look.damaged
    assert base.missing() == []
    base.store.write("config.json", b"{}")
    assert base.missing() == ["config.json"]


def test_a_run_that_only_a_spoiled_listing_names_hides_no_other(
    folder: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = folder.stores["runs"]
    listed = [*store.list(), ObjectInfo("rum/log/00000000.json", 1, None)]
    monkeypatch.setattr(
        store, "list", lambda prefix="": iter([info for info in listed if info.key.startswith(prefix)][:10])
    )
    there = store.list
    monkeypatch.setattr(
        store, "list", lambda prefix="": iter([]) if prefix.startswith("rum/") else there(prefix)
    )
    states = {facts.run_id: facts.state for facts in list_runs(store)}
    assert states.keys() == {"rum", "run"}
    assert states["rum"] == "damaged" != states["run"]


def test_etags_that_are_no_sums_cost_one_more_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with encryption by KMS."""
    store, looks = S3Store("bucket", ""), list[int]()

    def get(look: int, *_: object) -> _Answer:
        looks.append(look)
        return _Answer(b"data", "0" * 32)

    monkeypatch.setattr(store, "_get", get)
    assert [store.read("one"), store.read("two"), store.read("three")] == [b"data"] * 3
    assert looks == [0, 1, 0, 0]
