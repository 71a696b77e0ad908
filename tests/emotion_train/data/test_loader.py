"""From a prepared data set to packed steps: each post once, the same on any number of ranks, and
only bytes that the index describes.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion_train.data.index import Index, read_index
from emotion_train.data.lengths import Lengths
from emotion_train.data.loader import Encoder, Loader, StepBatch, encoder_threads
from emotion_train.data.order import Order
from emotion_train.data.reader import RowGroupReader, sample_texts
from emotion_train.data.targets import largest
from emotion_train.data.tokenization import CountingTokenizer, PostTokenizer
from emotion_train.errors import ObjectNotFound, StorageError, WrongRequest
from emotion_train.evaluation.floors import posts, tfidf_predictions
from emotion_train.preparation.steps import prepare
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import write_tokenizer
from tests.helpers.tiny_runs import write_posts

WEIGHTS = np.array([1.0, 2.0, 0.5, 4.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    prepare(str(write_posts(folder / "source")), str(folder / "data"))
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def prepared(folder: Path) -> tuple[Store, Index, PostTokenizer]:
    store = open_store(str(folder / "data"))
    return store, read_index(store), PostTokenizer.load(str(folder / "tokenizer"), 96)


def loader(
    prepared: tuple[Store, Index, PostTokenizer],
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    tokens: int = 256,
    threads: int = 1,
    in_slices: bool = False,
    encoder: Encoder | None = None,
) -> Loader:
    store, index, tokenizer = prepared
    split = index.split("train")
    return Loader(
        RowGroupReader(store, split),
        Order(split.row_counts, split.lanes, 7),
        encoder or tokenizer,
        WEIGHTS,
        global_batch_size=batch,
        tokens_per_microbatch=tokens,
        rank=rank,
        world_size=world_size,
        threads=threads,
        in_slices=in_slices,
    )


def steps(one: Loader, epoch: int = 0, first: int = 0) -> Iterator[StepBatch]:
    with one:
        yield from one.steps(epoch, first)


def test_an_epoch_holds_every_post_once_with_its_label_and_weight(
    prepared: tuple[Store, Index, PostTokenizer],
) -> None:
    store, index, tokenizer = prepared
    stored = {post: (text, largest(target)) for post, text, target in posts(store, index.split("train"))}
    seen: dict[str, tuple[list[int], int, float]] = {}
    for batch in steps(loader(prepared, 16)):
        for pack in batch.packs:
            for n, slot in enumerate(pack.slots_N.tolist()):
                tokens = pack.tokens_T[pack.boundaries_S[n] : pack.boundaries_S[n + 1]].tolist()
                assert batch.ids[slot] not in seen
                seen[batch.ids[slot]] = (
                    tokens,
                    int(pack.targets_NC[n].argmax()),
                    float(pack.weights_NC[n].sum()),
                )
        assert batch.weight_sum == pytest.approx(sum(seen[post_id][2] for post_id in batch.ids))
    assert seen == {
        post_id: (tokenizer.encode([text])[0].tolist(), label, WEIGHTS[label])
        for post_id, (text, label) in stored.items()
    }


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_lengths_that_the_ranks_count_are_those_of_all_posts_before_the_cut(
    prepared: tuple[Store, Index, PostTokenizer], world_size: int
) -> None:
    store, index, tokenizer = prepared
    short = PostTokenizer(tokenizer._tokenizer, 16, bos_id=1, pad_id=3)
    counted = Lengths.of([])
    for rank in range(world_size):
        counting = CountingTokenizer(short)
        one = loader(prepared, 64, rank, world_size, threads=2, in_slices=True, encoder=counting)
        longest = max(int(np.diff(pack.boundaries_S).max()) for batch in steps(one) for pack in batch.packs)
        assert longest == 16
        counted += counting.lengths
    # one token a byte, and BOS
    sizes = sorted(1 + len(text.encode()) for _, text, _ in posts(store, index.split("train")))
    assert np.repeat(counted.lengths_U, counted.counts_U).tolist() == sizes
    assert max(sizes) > 96  # longer than the tokenizer of these tests keeps


@settings(max_examples=15)
@given(batch=st.integers(1, 120), world_size=st.integers(1, 5))
def test_a_step_is_the_same_on_any_number_of_ranks(
    prepared: tuple[Store, Index, PostTokenizer], batch: int, world_size: int
) -> None:
    store, index, _ = prepared
    lengths = {post_id: len(text) + 4 for post_id, text, _ in posts(store, index.split("train"))}
    whole = [one.ids for one in steps(loader(prepared, batch), epoch=2)]
    shares = [
        [one.ids for one in steps(loader(prepared, batch, rank, world_size), epoch=2)]
        for rank in range(world_size)
    ]
    for parts, together in zip(zip(*shares, strict=True), whole, strict=True):
        assert sorted(post for part in parts for post in part) == sorted(together)
        sums = [sum(lengths[post] for post in part) for part in parts]
        assert max(sums) - min(sums) <= max(lengths[post] for post in together)


@settings(max_examples=10)
@given(batch=st.integers(1, 120), world_size=st.integers(1, 3), tokens=st.sampled_from([128, 256, 4096]))
def test_a_post_has_its_number_in_the_split_on_any_rank_and_in_any_pack(
    prepared: tuple[Store, Index, PostTokenizer], batch: int, world_size: int, tokens: int
) -> None:
    store, index, _ = prepared
    numbers = {post_id: number for number, (post_id, *_) in enumerate(posts(store, index.split("train")))}
    found = [
        (one.ids[slot], number)
        for rank in range(world_size)
        for one in steps(loader(prepared, batch, rank, world_size, tokens), epoch=1)
        for pack in one.packs
        for slot, number in zip(pack.slots_N.tolist(), pack.posts_N.tolist(), strict=True)
        if slot >= 0
    ]
    assert len(found) == len(numbers)
    assert dict(found) == numbers


@settings(max_examples=15)
@given(batch=st.integers(1, 60), world_size=st.integers(2, 5))
def test_ranks_that_take_slices_make_the_packs_of_one_process(
    prepared: tuple[Store, Index, PostTokenizer], batch: int, world_size: int
) -> None:
    alone = [
        (one.ids, [pack.tokens_T.tolist() for pack in one.packs]) for one in steps(loader(prepared, batch))
    ]
    shares = [
        steps(loader(prepared, batch * world_size, rank, world_size, in_slices=True))
        for rank in range(world_size)
    ]
    together = [
        (one.ids, [pack.tokens_T.tolist() for pack in one.packs])
        for parts in zip(*shares, strict=True)
        for one in parts
    ]
    assert [part for part in together if part[0]] == alone
    assert all(ids or packs == [] for ids, packs in together)


@settings(max_examples=10)
@given(batch=st.integers(1, 60), share=st.floats(0, 1))
def test_a_loader_started_at_a_step_gives_what_the_whole_epoch_gave_there(
    prepared: tuple[Store, Index, PostTokenizer], batch: int, share: float
) -> None:
    whole = list(steps(loader(prepared, batch), epoch=1))
    first = int(share * len(whole))
    again = list(steps(loader(prepared, batch), 1, first))
    assert [one.ids for one in again] == [one.ids for one in whole[first:]]
    for one, other in zip(again, whole[first:], strict=True):
        assert all(
            np.array_equal(a.tokens_T, b.tokens_T) for a, b in zip(one.packs, other.packs, strict=True)
        )


@pytest.mark.parametrize("row_groups", [1, 2, 3])
def test_a_sample_is_of_whole_row_groups(tmp_path: Path, row_groups: int) -> None:
    rows = [{"text": f"post number {number} of many", "label": "ab"[number % 2]} for number in range(2600)]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(str(tmp_path / "source"), str(tmp_path / "data"))
    store = open_store(str(tmp_path / "data"))
    split = read_index(store).split("train")
    counts = [group.rows for group in split.row_groups]
    assert len(counts) >= 2
    texts = [text for _, text, _ in posts(store, split)]
    wanted = sum(counts[:row_groups])
    assert sample_texts(store, split, sum(counts[: row_groups - 1]) + 1) == texts[:wanted]


def test_posts_stay_in_order_however_many_threads_tokenise_them(
    prepared: tuple[Store, Index, PostTokenizer],
) -> None:
    for one, other in zip(steps(loader(prepared, 150)), steps(loader(prepared, 150, threads=4)), strict=True):
        assert one.ids == other.ids
        for mine, yours in zip(one.packs, other.packs, strict=True):
            np.testing.assert_array_equal(mine.tokens_T, yours.tokens_T)
            np.testing.assert_array_equal(mine.slots_N, yours.slots_N)


@pytest.mark.parametrize(
    ("cores", "processes", "threads"),
    [(None, "1", 1), (1, "1", 1), (2, "1", 1), (6, "1", 3), (64, "1", 4), (64, "8", 4), (16, "8", 1)],
)
def test_half_of_a_process_share_of_the_cores_tokenises(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, processes: str, threads: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert encoder_threads() == threads


def test_a_rank_with_fewer_packs_fills_up_with_empty_ones(
    prepared: tuple[Store, Index, PostTokenizer],
) -> None:
    one = loader(prepared, 16)
    one._agree = lambda packs, weight_sum, stop: (packs + 2, weight_sum + 10, stop)
    for batch in steps(one):
        assert [pack.slots_N.tolist() for pack in batch.packs[-2:]] == [[-1], [-1]]
        assert batch.real_tokens == sum(pack.real_tokens for pack in batch.packs[:-2])


class CountingStore(FolderStore):
    """A folder that counts how often each byte range is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: Counter[tuple[str, int]] = Counter()

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        self.reads[key, start] += 1
        return super().read(key, start=start, length=length, if_match=if_match)


@pytest.mark.parametrize("batch", [1, 7, 40, 100, 1000])
@pytest.mark.parametrize("lanes", [1, 5, 20])
def test_an_epoch_fetches_each_row_group_once_however_large_the_batch(
    folder: Path, tmp_path: Path, batch: int, lanes: int
) -> None:
    prepare(str(folder / "source"), str(tmp_path / "data"), rows_per_group=2)
    store = CountingStore(tmp_path / "data")
    split = read_index(store).split("train")
    assert len(split.row_groups) > 30
    store.reads.clear()
    order = Order(split.row_counts, lanes, 7)
    encoder = PostTokenizer.load(str(folder / "tokenizer"), 96)
    reader = RowGroupReader(store, split, capacity=4)
    with Loader(reader, order, encoder, WEIGHTS, global_batch_size=batch, tokens_per_microbatch=256) as one:
        assert sum(len(step.ids) for step in one.steps(0)) == split.rows
    assert len(store.reads) == len(split.row_groups) + len(split.objects)
    again = [count for count in store.reads.values() if count > 1]
    # a row group in which one lane ends and the next begins is used at both ends of the epoch
    assert again == [2] * len(again)
    assert len(again) < lanes


def test_row_groups_are_asked_for_steps_ahead_within_half_of_the_capacity(
    prepared: tuple[Store, Index, PostTokenizer],
) -> None:
    store, index, encoder = prepared
    split = index.split("train")
    order = Order(split.row_counts, split.lanes, 7)
    asked: list[int] = []
    reader = RowGroupReader(store, split)
    reader.ask = lambda groups: asked.append(len(list(groups)))  # type: ignore[method-assign]
    with Loader(reader, order, encoder, WEIGHTS, global_batch_size=2, tokens_per_microbatch=256) as one:
        next(one._make(0, 0, lambda: False))
    assert len(asked) == 17  # this step and the 16 after it


def test_stopping_early_ends_the_background_thread(prepared: tuple[Store, Index, PostTokenizer]) -> None:
    with loader(prepared, 1) as one:
        running = one.steps(0)
        next(running)
        running.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


class Agreement:
    """What two ranks in one process tell each other, as the all-reduce of two processes does;
    counts the calls of each.
    """

    def __init__(self) -> None:
        self.calls = [0, 0]
        self._barrier = threading.Barrier(2, timeout=PATIENCE_S)
        self._said: list[tuple[int, float, bool]] = [(0, 0.0, False)] * 2

    def of(self, rank: int) -> Callable[[int, float, bool], tuple[int, float, bool]]:
        def agree(packs: int, weight_sum: float, stop: bool) -> tuple[int, float, bool]:
            self.calls[rank] += 1
            self._said[rank] = (packs, weight_sum, stop)
            self._barrier.wait()
            one, other = self._said
            self._barrier.wait()
            return max(one[0], other[0]), one[1] + other[1], one[2] or other[2]

        return agree


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_ranks_that_leave_an_epoch_early_stay_in_step(
    prepared: tuple[Store, Index, PostTokenizer], delay_s: float
) -> None:
    ranks = [loader(prepared, 4, rank, 2) for rank in range(2)]
    agreement = Agreement()
    again: list[list[StepBatch]] = [[], []]

    def train(rank: int) -> None:
        ranks[rank]._agree = agreement.of(rank)
        running = ranks[rank].steps(0)
        for _ in range(3):
            next(running)
        time.sleep(delay_s * rank)  # one rank leaves later than the other, and its thread reads on until then
        running.close()
        again[rank] = list(ranks[rank].steps(0, 3))

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert agreement.calls[0] == agreement.calls[1]
    assert [batch.weight_sum for batch in again[0]] == [
        batch.weight_sum for batch in steps(loader(prepared, 4), first=3)
    ]
    for one in ranks:
        one._reader.close()


class Interrupted(FolderStore):
    """A folder that does not answer the first reads, in a way for which waiting may help or not."""

    def __init__(self, folder: Path, times: int, transient: bool) -> None:
        super().__init__(folder)
        self.left = times
        self._transient = transient

    def read(
        self, key: str, *, start: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        if self.left:
            self.left -= 1
            raise StorageError("The network is gone.", transient=self._transient)
        return super().read(key, start=start, length=length, if_match=if_match)


@pytest.mark.parametrize(("transient", "patience_s"), [(True, 30.0), (True, 0.0), (False, 30.0)])
def test_data_that_does_not_come_is_asked_for_again_while_that_may_help(
    folder: Path,
    prepared: tuple[Store, Index, PostTokenizer],
    transient: bool,
    patience_s: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Interrupted(folder / "data", 2, transient)
    with RowGroupReader(store, prepared[1].split("train"), threads=1, patience_s=patience_s) as reader:
        if transient and patience_s:
            assert len(reader.rows(0).ids) == prepared[1].split("train").row_groups[0].rows
            assert caplog.text.count("waits for its data: The network is gone.") == 1
        else:
            with pytest.raises(StorageError, match="The network is gone"):
                reader.rows(0)


def test_the_floor_waits_for_its_posts(folder: Path, prepared: tuple[Store, Index, PostTokenizer]) -> None:
    stores = [Interrupted(folder / "data", times, transient=True) for times in (0, 2, 2)]
    at_once, late = (
        tfidf_predictions(store, prepared[1], ["validation"], 1000, 0, patience_s=30) for store in stores[:2]
    )
    np.testing.assert_array_equal(late["validation"].prob_NC, at_once["validation"].prob_NC)
    with pytest.raises(StorageError, match="The network is gone"):
        tfidf_predictions(stores[2], prepared[1], ["validation"], 1000, 0)


def test_an_error_while_reading_reaches_the_trainer(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder / "source"), str(tmp_path / "data"))
    store = open_store(str(tmp_path / "data"))
    index = read_index(store)
    store.delete(index.split("train").objects[0].key)
    with pytest.raises(ObjectNotFound):
        list(steps(loader((store, index, PostTokenizer.load(str(folder / "tokenizer"), 96)), 16)))


def test_the_same_bytes_written_again_go_on_and_others_stop(
    folder: Path, bucket_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(str(folder / "source"), f"{bucket_url}/data")
    store = open_store(f"{bucket_url}/data")
    split = read_index(store).split("train")
    key = split.objects[0].key
    raw = store.read(key)
    assert split.objects[0].etag is not None
    moved = split.model_copy(update={"objects": (split.objects[0].model_copy(update={"etag": "0" * 32}),)})
    with RowGroupReader(store, moved) as reader:
        assert len(reader.rows(0).ids) == split.row_groups[0].rows
    assert caplog.text.count("its bytes are the same") == 1
    damaged = bytearray(raw)
    damaged[split.row_groups[0].start + 20] ^= 1
    store.write(key, bytes(damaged))
    with (
        RowGroupReader(store, split) as reader,
        pytest.raises(WrongRequest, match=r"is not what index\.json describes"),
    ):
        reader.rows(0)


def test_a_copied_data_set_reads_the_same(
    folder: Path, bucket_url: str, prepared: tuple[Store, Index, PostTokenizer]
) -> None:
    old, new = prepared[0], open_store(f"{bucket_url}/copy")
    for info in old.list():
        new.write(info.key, old.read(info.key))
    assert list(posts(new, read_index(new).split("test"))) == list(posts(old, prepared[1].split("test")))
