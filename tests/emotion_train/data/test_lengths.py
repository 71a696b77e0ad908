"""What max_length cuts, against plain Python on lists of lengths, and as words."""

from __future__ import annotations

import csv
import json
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emotion_train.cli import main
from emotion_train.config import LARGEST_MAX_LENGTH, SMALLEST_MAX_LENGTH, DataSection
from emotion_train.data.lengths import (
    BYTES_A_TOKEN,
    RECORDED,
    Cut,
    Lengths,
    cut_remark,
    estimated,
    recorded,
)
from emotion_train.data.reader import sample_texts
from emotion_train.preparation.spill import partitions_for
from emotion_train.preparation.steps import prepare
from emotion_train.storage.open import open_store
from tests.helpers.edited_index import sealed

SOME = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 10**6)), min_size=1, max_size=300)


@given(lengths=SOME, max_length=st.integers(1, 200))
@example(lengths=[5] * 50, max_length=4)
@example(lengths=[5] * 49 + [6], max_length=5)
def test_what_is_cut_is_that_of_plain_python(lengths: list[int], max_length: int) -> None:
    cut = Cut.of(Lengths.of(lengths), max_length)
    kept = [min(length, max_length) for length in lengths]
    assert (cut.posts, cut.tokens) == (len(lengths), sum(lengths))
    assert cut.cut_posts == sum(length > max_length for length in lengths)
    assert cut.lost_tokens == sum(lengths) - sum(kept)
    assert cut.share == pytest.approx(cut.cut_posts / len(lengths))
    assert cut.lost_share == pytest.approx(1 - sum(kept) / sum(lengths))
    assert cut.mean_tokens == pytest.approx(statistics.mean(lengths))
    assert cut.median_tokens == statistics.median_low(lengths)
    assert cut.longest_tokens == max(lengths)
    assert cut.is_much == (100 * cut.cut_posts > 5 * len(lengths))


@given(lengths=SOME, percent=st.integers(0, 100))
def test_a_limit_is_the_smallest_that_cuts_no_larger_share(lengths: list[int], percent: int) -> None:
    allowed = [
        limit
        for limit in lengths
        if 100 * sum(length > limit for length in lengths) <= percent * len(lengths)
    ]
    assert Lengths.of(lengths).limit_for(percent) == min(allowed)
    advised = Cut.of(Lengths.of(lengths), 10).max_length_for_2_percent
    assert 100 * sum(length > advised for length in lengths) <= 2 * len(lengths)
    assert advised == SMALLEST_MAX_LENGTH or 100 * sum(length > advised - 1 for length in lengths) > 2 * len(
        lengths
    )


@given(parts=st.lists(st.lists(st.integers(0, 50)), max_size=6))
def test_lengths_add_up_whatever_the_parts(parts: list[list[int]]) -> None:
    whole = Lengths.of([length for part in parts for length in part])
    added = sum((Lengths.of(np.array(part, np.int32)) for part in parts), Lengths.of([]))
    assert added.lengths_U.tolist() == whole.lengths_U.tolist() == sorted({x for part in parts for x in part})
    assert added.counts_U.tolist() == whole.counts_U.tolist()


def test_of_no_posts_nothing_is_cut() -> None:
    cut = Cut.of(Lengths.of([]), 96)
    assert (cut.share, cut.lost_share, cut.mean_tokens, cut.is_much) == (0, 0, 0, False)
    assert cut_remark(Lengths.of([]), 96) is None


# --- the estimate from an index ---


@given(sizes=SOME)
def test_an_index_keeps_percentiles_from_which_tokens_are_estimated(sizes: list[int]) -> None:
    kept = recorded(Lengths.of(sizes), Lengths.of([2 * size for size in sizes]))
    assert tuple(kept) == RECORDED
    assert kept["characters_median"] == statistics.median_low(sizes)
    assert kept["characters_longest"] == kept["bytes_p100"] / 2 == max(sizes)
    assert kept["bytes_p0"] == 2 * min(sizes)
    found = estimated(kept)
    assert found is not None
    cut = Cut.of(found, 32)
    tokens = sorted(1 + round(2 * size / BYTES_A_TOKEN) for size in sizes)
    assert cut.longest_tokens == tokens[-1]
    assert cut.median_tokens == statistics.median_low(tokens)
    exact = Cut.of(Lengths.of(tokens), 32)
    assert cut.max_length_for_2_percent == exact.max_length_for_2_percent
    if exact.share in (0, 1):
        assert cut.share == exact.share


def test_an_estimate_of_many_posts_is_near_what_they_have() -> None:
    draw = np.random.default_rng(0)
    sizes = np.maximum(1, draw.gamma(2.0, 60, 20_000)).astype(np.int64)
    found = estimated(recorded(Lengths.of(sizes), Lengths.of(sizes)))
    assert found is not None
    exact = Lengths.of(1 + np.rint(sizes / BYTES_A_TOKEN).astype(np.int64))
    for max_length in (8, 16, 32, 64, 96, 128):
        one, other = Cut.of(found, max_length), Cut.of(exact, max_length)
        assert one.share == pytest.approx(other.share, abs=0.03)
        assert one.lost_share == pytest.approx(other.lost_share, abs=0.05)


@pytest.mark.parametrize("source", [{}, {"bytes_p50": 3}, dict.fromkeys(RECORDED, "many")])
def test_an_index_of_an_earlier_version_gives_no_estimate(
    source: dict[str, str | int | float | None],
) -> None:
    assert estimated(source) is None


# --- words ---


def test_words_say_share_loss_and_a_max_length_that_cuts_2_percent() -> None:
    lengths = Lengths.of([10] * 90 + [200] * 9 + [1000])
    assert Cut.of(lengths, 100).words("training posts") == (
        "data.max_length=100 cuts 10.0 % of the 100 training posts and 48.6 % of their tokens (10 tokens at"
        " the median, 1,000 at most); data.max_length=200 would cut at most 2 %"
    )
    assert "would cut about 10.0 % of the posts" in Cut.of(lengths, 100).words("posts", estimated=True)
    assert (
        Cut.of(lengths, 1000).words("posts").startswith("data.max_length=1000 cuts none of the 100 posts (")
    )
    assert (
        Cut.of(Lengths.of([9000]), 96)
        .words("posts")
        .endswith("; even data.max_length=8192, the largest, would cut more than 2 %")
    )
    assert Cut.of(Lengths.of([1] * 5000 + [9]), 8).share_words == "less than 0.1 %"
    assert "would cut less than 0.1 % of" in Cut.of(Lengths.of([1] * 5000 + [9]), 8).words(
        "x", estimated=True
    )
    assert Cut.of(Lengths.of([9] * 5000 + [1]), 8).share_words == "99.9 %"


def test_an_advised_max_length_is_one_that_the_config_takes() -> None:
    limits = {type(one).__name__: one for one in DataSection.model_fields["max_length"].metadata}
    assert (limits["Ge"].ge, limits["Le"].le) == (SMALLEST_MAX_LENGTH, LARGEST_MAX_LENGTH)
    assert Cut.of(Lengths.of([1, 1]), 96).max_length_for_2_percent == SMALLEST_MAX_LENGTH


def test_scored_posts_that_were_cut_are_told_in_one_line() -> None:
    assert cut_remark(Lengths.of([3, 96]), 96) is None
    assert cut_remark(Lengths.of([3, 97]), 96) == (
        "1 of 2 posts was cut at the 96 tokens that the adapter was trained with: 1.0 % of all tokens were"
        " not read (the longest post has 97)"
    )


# --- prepare ---


def write_posts(path: Path, texts: list[str], labels: tuple[str, ...] = ("joy", "calm")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [(text, labels[i % len(labels)]) for i, text in enumerate(texts)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def some_texts(count: int, most_words: int, alphabet: str = "abcdef") -> list[str]:
    draw = random.Random(0)
    return [
        f"{i} " + " ".join("".join(draw.choices(alphabet, k=4)) for _ in range(draw.randint(1, most_words)))
        for i in range(count)
    ]


def test_an_index_has_the_lengths_of_the_training_posts_whatever_the_memory(tmp_path: Path) -> None:
    source = write_posts(tmp_path / "posts.csv", some_texts(1500, 300, "añ日🙂"))
    assert partitions_for(source.stat().st_size, 16 << 20) > 1
    found = [
        prepare(str(source), str(tmp_path / str(memory_mb)), memory_mb=memory_mb).index
        for memory_mb in (16, 1024)
    ]
    assert found[0].source == found[1].source
    store = open_store(str(tmp_path / "16"))
    texts = sample_texts(store, found[0].split("train"), 10**6)
    assert len(texts) == found[0].split("train").rows < 1500
    sizes = sorted(len(text.encode()) for text in texts)
    assert found[0].source["characters_median"] == statistics.median_low(len(text) for text in texts)
    assert found[0].source["characters_longest"] == max(len(text) for text in texts)
    assert (found[0].source["bytes_p0"], found[0].source["bytes_p100"]) == (sizes[0], sizes[-1])
    assert found[0].source["bytes_p98"] == sizes[::-1][len(sizes) * 2 // 100]


@pytest.mark.parametrize(("words", "starts"), [(400, "warning"), (20, "max_length")])
def test_prepare_says_what_the_default_would_cut(
    words: int, starts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{i} " + "abcd " * words for i in range(120)]
    source = write_posts(tmp_path / "posts.csv", texts)
    assert main(["prepare", str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    longest = max(len(text) for text in texts)
    assert f"characters at the median of the training posts, {longest:,} at most" in out
    line = next(line for line in out.splitlines() if line.startswith(starts))
    if words == 400:  # all 2,002 bytes or more, which are 502 tokens
        lost = 1 - 128 / (1 + 2003 / BYTES_A_TOKEN)
        assert "by default, data.max_length=128 would cut about 100.0 % of the training posts" in line
        assert f"and {100 * lost:.1f} % of their tokens" in line
        assert line.endswith("data.max_length=502 would cut about 2 %")
    else:
        assert "would cut none of the training posts" in line


def test_a_data_set_of_an_earlier_version_is_the_same_without_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_posts(tmp_path / "posts.csv", some_texts(200, 20)), tmp_path / "out"
    prepare(str(source), str(out))
    index = json.loads((out / "index.json").read_bytes())
    for key in RECORDED:
        del index["source"][key]
    (out / "index.json").write_bytes(sealed(index))
    assert main(["prepare", str(source), str(out)]) == 0
    answer = capsys.readouterr().out
    assert "already there, the same" in answer
    assert "not in this index, which an earlier version wrote" in answer
    write_posts(source, some_texts(199, 20))
    assert main(["prepare", str(source), str(out)]) == 2
    assert "rows_read 200 there, 199 now" in capsys.readouterr().err
