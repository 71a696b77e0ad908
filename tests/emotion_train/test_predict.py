"""Posts to label come in as words, lines or files, and what cannot be read is refused in a
sentence.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emotion_train.config import LoraSection
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.adapter import load_with_progress, refuse_small_gpu
from emotion_train.model.facts import FACTS, LABELS, WEIGHTS, AdapterFacts
from emotion_train.model.load import BaseConfig
from emotion_train.predict import _posts, add_arguments
from emotion_train.sizing.shape import Shape

POSTS = ["what a lovely mess", 'said "no",\tthen left', "naïve 🙂"]


def posts(*words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return list(_posts(parser.parse_args(["--adapter", "a", *words])))


def from_file(path: Path, content: bytes, *words: str) -> list[str]:
    path.write_bytes(content)
    return posts("--file", str(path), *words)


def refusal(path: Path, content: bytes, *words: str) -> str:
    with pytest.raises(WrongRequest) as caught:
        from_file(path, content, *words)
    assert str(path) in str(caught.value)
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
    assert from_file(tmp_path / "a.txt", mark + lines.replace(b"\n", b"\r\n\n")) == POSTS
    assert (
        from_file(
            tmp_path / "b.CSV", mark + "\n".join(["text,n", *(f"{post},1" for post in quoted)]).encode()
        )
        == POSTS
    )
    assert (
        from_file(
            tmp_path / "c.Tsv", mark + "\r\n".join(["n\ttext", *(f"1\t{post}" for post in quoted)]).encode()
        )
        == POSTS
    )
    assert from_file(tmp_path / "d.jsonl", mark + objects) == POSTS
    assert from_file(tmp_path / "e.NDJSON", mark + objects) == POSTS
    pipe(monkeypatch, mark + lines)
    assert posts() == POSTS
    assert posts(*POSTS) == POSTS


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_a_parquet_file_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(
        pa.table({"n": [1, 2, 3, 4], "text": pa.array([*POSTS, None], pa.string()).cast(kind)}),
        tmp_path / "a.parquet",
    )
    assert posts("--file", str(tmp_path / "a.parquet")) == [*POSTS, ""]
    with pytest.raises(WrongRequest, match="has no column 'post'; it has n, text"):
        posts("--file", str(tmp_path / "a.parquet"), "--text-column", "post")
    with pytest.raises(WrongRequest, match="holds int64, not text"):
        posts("--file", str(tmp_path / "a.parquet"), "--text-column", "n")


def test_what_is_not_utf_8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "a.csv", "a.tsv", "a.jsonl"):
        assert "is not UTF-8" in refusal(tmp_path / name, b"text\ncaf\xe9\n")
    pipe(monkeypatch, b"fine\ncaf\xe9\n")
    with pytest.raises(WrongRequest, match="standard input is not UTF-8"):
        posts()
    with pytest.raises(WrongRequest, match="is not UTF-8"):
        posts("caf\udce9")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[]", "JSON Lines"),
        ("a.csv.gz", b"\x1f\x8b", "unpack it"),
        ("a.parquet", b"PAR1", "not a whole Parquet file"),
        ("a.csv", b"", "no column 'text'"),
        ("a.csv", b"text\n" + b"x" * 200_000, "field larger than field limit"),
        ("a.csv", b"id,text\n1,well\n2,I came, I saw\n", "a.csv:3 has more cells than the header"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}', ":2 is not a JSON object"),
        ("a.jsonl", b"[" * 100_000, ":1 is not a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    assert words in refusal(tmp_path / name, content)


def test_half_characters_in_json_are_mended(tmp_path: Path) -> None:
    assert from_file(tmp_path / "a.jsonl", rb'{"text": "\ud83d\ude42 \ud83d"}') == ["🙂 \ufffd"]


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
        assert process.wait(60) == 2  # nothing was typed
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
    sums = dict.fromkeys(("base_shape_sha256", "base_weights_sha256", "tokenizer_sha256"), "0" * 64)
    facts = AdapterFacts(
        base=str(base),
        architecture="mistral",
        layout="text",
        precision="bf16",
        max_length=128,
        lora=LoraSection(),
        labels=("a", "b"),
        **sums,
    )
    (adapter / LABELS).write_text(json.dumps({"labels": ["a", "b"]}))
    (adapter / FACTS).write_text(facts.model_dump_json(exclude={"labels"}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("emotion_train.processes.machine.memory_of", lambda device: 23_034 << 20)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(WrongRequest, match=r"needs 42\.7 GiB and 20\.8 are usable; type --precision nf4\.$"):
        load_with_progress(parser.parse_args(["--adapter", str(adapter)]))
    monkeypatch.setattr("emotion_train.model.lora.load_adapter", refuse_further)
    with pytest.raises(WrongRequest, match="went on"):  # 4-bit weights fit
        load_with_progress(parser.parse_args(["--adapter", str(adapter), "--precision", "nf4"]))


def refuse_further(folder: Path, *, base: BaseConfig, **_: object) -> None:
    raise WrongRequest(f"{base.files.name} went on")
