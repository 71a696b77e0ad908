"""Posts to label come in as words, lines or files, and what cannot be read is refused in a
sentence.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotion_train.config import LoraSection
from emotion_train.data.targets import TargetKind
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import AdapterChoice, load_with_progress, refuse_small_gpu
from emotion_train.evaluation.answer_lines import Written, kept_names, printer
from emotion_train.evaluation.posts_request import PostsRequest, posts_of_request
from emotion_train.evaluation.unlabelled import Post
from emotion_train.model.facts import FACTS, LABELS, WEIGHTS, AdapterFacts
from emotion_train.model.load import BaseConfig
from emotion_train.predict import _note_files, add_arguments
from emotion_train.sizing.shape import Shape
from emotion_train.storage.open import open_store
from tests.helpers.patience import PATIENCE_S

POSTS = ["what a lovely mess", 'said "no",\tthen left', "naïve 🙂"]


def read(*words: str) -> list[Post]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with ExitStack() as stack:
        return list(posts_of_request(PostsRequest.of(parser.parse_args(["--adapter", "a", *words])), stack))


def posts(*words: str) -> list[str]:
    return [post.text for post in read(*words)]


def from_file(path: Path, content: bytes, *words: str) -> list[str]:
    path.write_bytes(content)
    return posts("--file", str(path), *words)


def refusal(path: Path, content: bytes, *words: str) -> str:
    with pytest.raises(WrongRequest) as caught:
        from_file(path, content, *words)
    assert path.name in str(caught.value)
    return str(caught.value)


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes, errors: str = "surrogateescape") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors=errors))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_the_same_posts(
    tmp_path: Path, mark: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "\n".join(POSTS).encode()
    objects = "\n\n".join(json.dumps({"text": post, "n": 1}) for post in POSTS).encode()
    quoted = ['"' + post.replace('"', '""') + '"' for post in POSTS]
    table = "\n".join(["text,n", *(f"{post},1" for post in quoted)]).encode()
    assert from_file(tmp_path / "a.txt", mark + lines.replace(b"\n", b"\r\n\n")) == POSTS
    assert from_file(tmp_path / "a.log", mark + lines) == POSTS
    assert from_file(tmp_path / "b.CSV", mark + table) == POSTS
    assert from_file(tmp_path / "b.csv.gz", gzip.compress(mark + table)) == POSTS
    assert (
        from_file(
            tmp_path / "semicolons.csv",
            mark + "\n".join(["n;Text", *(f"1;{post}" for post in quoted)]).encode(),
        )
        == POSTS
    )
    assert from_file(tmp_path / "d.jsonl", mark + objects) == POSTS
    assert from_file(tmp_path / "e.NDJSON", mark + objects) == POSTS
    pipe(monkeypatch, mark + lines)
    assert posts() == POSTS
    assert posts(*POSTS) == POSTS


def test_a_post_that_is_called_like_its_column_is_a_post(tmp_path: Path) -> None:
    assert from_file(tmp_path / "a.csv", b"n,text\n1,Text\n2,x\n") == ["Text", "x"]
    assert "the header again  1  a.csv:3" in refusal(tmp_path / "a.csv", b"n,text\n1,x\nn,text\n")


def test_posts_of_a_bucket_are_read(tmp_path: Path, bucket_url: str) -> None:
    open_store(bucket_url).write("a.jsonl", b'{"text": "well"}')
    assert posts("--file", f"{bucket_url}/a.jsonl") == ["well"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_a_parquet_file_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(
        pa.table({"n": [1, 2, 3], "text": pa.array(POSTS, pa.string()).cast(kind)}), tmp_path / "a.parquet"
    )
    assert posts("--file", str(tmp_path / "a.parquet")) == POSTS
    with pytest.raises(WrongRequest, match="has no column 'post'; it has 'n', 'text'"):
        posts("--file", str(tmp_path / "a.parquet"), "--text-column", "post")
    with pytest.raises(WrongRequest, match="holds int64, not text"):
        posts("--file", str(tmp_path / "a.parquet"), "--text-column", "n")


def test_other_columns_come_along_and_posts_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text,label\n7,"two\nlines",joy\n\n8,,anger\n9,x,\n')
    found = read("--file", str(path), "--columns", "ID,label", "--on-bad", "drop")
    assert found == [Post(2, "two\nlines", ("7", "joy")), Post(5, "x", ("9", ""))]
    kept = kept_names(["id", "label", "joy"], facts_of(tmp_path))
    posts = [Post(5, "x", ("9", "", "y"))]
    assert (
        printed("csv", Written(("joy", "anger"), False, kept, 1), posts, [[0.25, 0.75]], [(1,)])
        == "row,id,input_label,input_joy,text,label,joy,anger\n5,9,,y,x,anger,0.250000,0.750000\n"
    )
    posts = [Post(5, "x", ("9", "a\x1b"))]
    written = Written(("joy", "anger"), False, ["id", "truth"], 1)
    assert printed("text", written, posts, [[0.0, 1.0]], [(1,)]) == "anger 1.00  | id=9  truth=a\\x1b  | x\n"
    written = Written(("joy", "anger"), False, ["id"], 1)
    line = printed("jsonl", written, [Post(5, "x", ("9",))], [[0.25, 0.75]], [(1,)])
    assert json.loads(line) == {
        "row": 5,
        "id": "9",
        "text": "x",
        "label": "anger",
        "probabilities": {"joy": 0.25, "anger": 0.75},
    }


@pytest.mark.parametrize("several", [False, True])
def test_a_label_with_the_name_of_another_column_gets_a_column_of_its_own(
    tmp_path: Path, several: bool
) -> None:
    labels = ("Text", "row", "accepted", "label", "labels", "joy")
    facts = facts_of(tmp_path, labels, "several" if several else "one")
    kept = kept_names(["label_Text", "joy"], facts)
    written = Written(labels, several, kept, 1)
    head, line = printed("csv", written, [Post(1, "x", ("a", "b"))], [[0.5] * 6], [(5,)]).splitlines()
    names = head.split(",")
    assert len(line.split(",")) == len({name.casefold() for name in names}) == len(names)
    assert names[1:3] == ["input_label_Text", "input_joy"]
    taken = "labels" if several else "label"
    assert names[5:] == [
        f"label_{one}" if one.casefold() in {"text", "row", "accepted", taken} else one for one in labels
    ]


def printed(
    form: str,
    written: Written,
    posts: list[Post],
    prob_NC: list[list[float]],
    answers: list[tuple[int, ...]],
) -> str:
    out = io.StringIO()
    printer(form, written, out)(posts, np.array(prob_NC), answers)
    return out.getvalue()


def test_several_labels_are_told_with_those_that_there_are_and_none_as_none(tmp_path: Path) -> None:
    labels = ("joy", "anger", "awe", "calm")
    posts = [Post(1, "x"), Post(2, "y"), Post(3, "z")]
    prob_NC = [[0.5, 0.75, 0.25, 0.125], [0.125, 0.25, 0.0, 0.0], [0.9, 0.8, 0.7, 0.6]]
    answers = [(1, 0), (), (0, 1, 2, 3)]
    written = Written(labels, True, [], None)
    assert printed("text", written, posts, prob_NC, answers).splitlines() == [
        "anger 0.75  joy 0.50  | x",
        "none  | y",
        "joy 0.90  anger 0.80  awe 0.70  calm 0.60  | z",
    ]
    fewer = Written(labels, True, [], 1)
    assert printed("text", fewer, posts[2:], prob_NC[2:], answers[2:]) == "joy 0.90  | z\n"
    assert printed("csv", written, posts[:2], prob_NC[:2], answers[:2]).splitlines() == [
        "row,text,labels,joy,anger,awe,calm",
        "1,x,anger|joy,0.500000,0.750000,0.250000,0.125000",
        "2,y,,0.125000,0.250000,0.000000,0.000000",
    ]
    lines = printed("jsonl", written, posts, prob_NC, answers).splitlines()
    assert [json.loads(line)["labels"] for line in lines] == [["anger", "joy"], [], list(labels)]
    assert json.loads(lines[1])["probabilities"] == dict(zip(labels, prob_NC[1], strict=True))
    assert kept_names(["label", "labels", "awe"], facts_of(tmp_path, labels, "several")) == [
        "label",
        "input_labels",
        "input_awe",
    ]


def test_a_mark_says_which_answers_are_accepted(tmp_path: Path) -> None:
    out = {form: io.StringIO() for form in ("csv", "jsonl", "text")}
    posts, prob_NC = [Post(1, "x"), Post(2, "y")], np.array([[0.25, 0.75], [0.5, 0.5]])
    for form, into in out.items():
        written = Written(("joy", "anger"), False, [], 1, marked=True)
        printer(form, written, into)(posts, prob_NC, [(1,), (0,)], [True, False])
    assert out["csv"].getvalue().splitlines() == [
        "row,text,label,accepted,joy,anger",
        "1,x,anger,true,0.250000,0.750000",
        "2,y,joy,false,0.500000,0.500000",
    ]
    assert [json.loads(line)["accepted"] for line in out["jsonl"].getvalue().splitlines()] == [True, False]
    assert out["text"].getvalue().splitlines() == [
        "accepted  | anger 0.75  | x",
        "for a person  | joy 0.50  | y",
    ]
    assert kept_names(["accepted"], facts_of(tmp_path), True) == ["input_accepted"]
    assert kept_names(["probabilities"], facts_of(tmp_path)) == ["input_probabilities"]
    assert kept_names(["accepted"], facts_of(tmp_path)) == ["accepted"]


def facts_of(
    folder: Path, labels: tuple[str, ...] = ("joy", "anger"), targets: TargetKind = "one"
) -> AdapterFacts:
    sums = dict.fromkeys(("base_shape_sha256", "base_weights_sha256", "tokenizer_sha256"), "0" * 64)
    return AdapterFacts(
        base=str(folder / "base"),
        architecture="mistral",
        layout="text",
        precision="bf16",
        max_length=128,
        lora=LoraSection(),
        labels=labels,
        targets=targets,
        **sums,
    )


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_control_characters_are_those_of_a_training(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "a\0b\x1b[1m\u0085c"
    content = json.dumps({"text": word}) if name.endswith("jsonl") else f"text\n{word}\n"
    assert from_file(tmp_path / name, content.encode())[-1] == "a b [1m c"
    pipe(monkeypatch, word.encode())
    assert posts() == posts(word) == ["a b [1m c"]


def test_what_is_not_utf_8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "a.csv", "a.tsv", "a.jsonl"):
        text = refusal(tmp_path / name, b'text\ncaf\xe9\n{"text": "\xe9"}\n')
        assert "bytes that are not UTF-8" in text
    assert from_file(tmp_path / "a.txt", b"caf\xe9\n", "--encoding", "latin-1") == ["café"]
    assert "is UTF-16" in refusal(tmp_path / "a.csv", "text\nx\n".encode("utf-16"))
    pipe(monkeypatch, b"fine\ncaf\xe9\n")
    with pytest.raises(WrongRequest, match="standard input is not UTF-8"):
        posts()
    with pytest.raises(WrongRequest, match="is not UTF-8"):
        posts("caf\udce9")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[]", "JSON Lines"),
        ("a.zip", b"PK\x03\x04", "zip archive"),
        ("a.csv.gz", b"\x1f\x8b", "cannot be read"),
        ("a.parquet", b"PAR1", "not a whole Parquet file"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text\n" + b"x" * 200_000, "text too long  1  a.csv:2"),
        ("a.csv", b"id,text\n1,well\n2,I came, I saw\n", "more or fewer cells than the header  1  a.csv:3"),
        ("a.csv", b"text,label\nwell,joy\njoy\n", "more or fewer cells than the header  1  a.csv:3"),
        ("a.csv", b"text,text\na,b\n", "2 columns named 'text'"),
        ("a.csv", b'text,label\n"I never,joy\nsun,joy\nx,joy\n', "never closed: it takes in 3 lines"),
        ("a.csv", b'text,label\n"I never,joy\nsun,joy\n"stop,fear\nx,joy\n', "takes in 3 lines"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}', "text that is not a string  1  a.jsonl:2"),
        ("a.jsonl", b'{"text": "x"}\n' + b"{" * 100_000, "not a JSON object  1  a.jsonl:2"),
        ("a.jsonl", b"[" * 100_000, "one JSON array"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    assert words in refusal(tmp_path / name, content)


def test_half_characters_in_json_are_mended(tmp_path: Path) -> None:
    assert from_file(tmp_path / "a.jsonl", rb'{"text": "\ud83d\ude42 \ud83d"}') == ["🙂 \ufffd"]


def test_in_a_tsv_of_rows_quotes_are_letters(tmp_path: Path) -> None:
    table = b'text\tlabel\n"I never\tjoy\nsun\tjoy\n"stop\tfear\nx\tjoy\n'
    assert from_file(tmp_path / "a.tsv", table) == ['"I never', "sun", '"stop', "x"]


@pytest.mark.parametrize("words", [["predict", "hello"], ["predict"], ["evaluate", "--data", "nowhere"]])
def test_a_folder_that_is_no_adapter_is_refused_before_torch_is_imported_or_posts_are_read(
    tmp_path: Path, words: list[str]
) -> None:
    program = (
        "import sys\nfrom emotion_train.cli import main\ncode = main(sys.argv[1:])\nassert 'torch' not in"
        " sys.modules\nsys.exit(code)"
    )
    line = [sys.executable, "-c", program, words[0], "--adapter", str(tmp_path), *words[1:]]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.wait(PATIENCE_S) == 2  # nothing was typed
        assert process.stderr is not None
        assert "so it is no adapter of this program" in process.stderr.read()


MISTRAL_SMALL = Shape(5120, 32_768, 40, 32, 8, 128, 131_072)


@pytest.mark.parametrize(
    ("precision", "gib", "words"),
    [
        ("nf4", 22, None),
        ("bf16", 80, None),
        (
            "bf16",
            45,
            (
                "in bf16 does not fit a GPU of 45.0 GiB: even without training it needs 42.7 GiB and 42.4 are"
                " usable; type --precision nf4"
            ),
        ),
        ("fp8", 22, "type --precision nf4"),
        ("fp32", 80, "type --precision nf4"),
        ("bf16", 8, "type --device cpu, or take a larger GPU"),
        ("nf4", 8, "type --device cpu, or take a larger GPU"),
    ],
)
def test_a_gpu_too_small_for_the_weights_is_told_with_what_fits(
    precision: Any, gib: int, words: str | None
) -> None:
    if words is None:
        refuse_small_gpu("the base", MISTRAL_SMALL, precision, gib << 30)
        return
    with pytest.raises(WrongRequest, match=words):
        refuse_small_gpu("the base", MISTRAL_SMALL, precision, gib << 30)


def test_the_gpu_is_compared_with_the_weights_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter trained in bf16 and an L4; of base and adapter only the small files are there."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    sizes = {
        "hidden_size": 5120,
        "intermediate_size": 32_768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
    }
    sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131_072}
    (base / "config.json").write_text(json.dumps({"model_type": "mistral", **sizes}))
    for name in (WEIGHTS, "tokenizer.json"):
        (adapter / name).touch()
    facts = facts_of(tmp_path, ("a", "b"))
    (adapter / LABELS).write_text(json.dumps({"labels": ["a", "b"]}))
    (adapter / FACTS).write_text(facts.model_dump_json(exclude={"labels"}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("emotion_train.processes.machine.memory_of", lambda device: 23_034 << 20)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(WrongRequest, match=r"needs 42\.7 GiB and 20\.8 are usable; type --precision nf4\.$"):
        load_with_progress(AdapterChoice.of(parser.parse_args(["--adapter", str(adapter)])))
    monkeypatch.setattr("emotion_train.model.lora.load_adapter", refuse_further)
    with pytest.raises(WrongRequest, match="went on"):  # 4-bit weights fit
        load_with_progress(AdapterChoice(adapter, precision="nf4"))


def refuse_further(folder: Path, *, base: BaseConfig, **_: object) -> None:
    raise WrongRequest(f"{base.files.name} went on")


def test_a_file_that_is_typed_as_a_post_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "posts.csv"
    path.write_text("text\nhello\n")
    _note_files([str(path), "no file.csv", "p" * 5000, str(tmp_path)])
    assert capsys.readouterr().err.count("is labelled as a post; --file") == 1
