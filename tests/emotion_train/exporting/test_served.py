"""Posts labelled by a server, and a server compared with the adapter that it should serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from emotion_train.cli import main
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.decision import Decision
from emotion_train.exporting.export import export
from emotion_train.exporting.served import AT_A_TIME, KEY, NoAnswer, Served
from tests.emotion_train.test_export import LABELS, MAX_LENGTH, TEXTS, adapter_on, predicted
from tests.helpers.classify_server import MAX_MODEL_LENGTH, ClassifyServer
from tests.helpers.tiny_models import causal_checkpoint

LONG = "a post far too long for the server too, which refuses it unless it is asked to cut it off"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return adapter_on(str(causal_checkpoint(folder / "base", "llama")), folder / "adapter")


@pytest.fixture(scope="module")
def exported(adapter: Path) -> Path:
    export(adapter, adapter.parent / "exported", dtype="fp32")
    return adapter.parent / "exported"


def test_a_server_s_probabilities_are_the_adapter_s(
    adapter: Path, exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(LONG) > MAX_MODEL_LENGTH
    texts = [*TEXTS, LONG]
    monkeypatch.setenv(KEY, "secret")
    with ClassifyServer(exported) as server:
        words = ["predict", "--endpoint", server.url, "--adapter", str(adapter), "--format", "jsonl"]
        assert main([*words, *texts]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert server.keys == ["Bearer secret"]
    assert server.requests[0]["truncate_prompt_tokens"] == MAX_LENGTH
    for line, text, prob_C in zip(lines, texts, predicted(adapter, texts), strict=True):
        assert line["text"] == text
        assert line["label"] == LABELS[prob_C.argmax()]
        assert list(line["probabilities"].values()) == pytest.approx(prob_C.tolist(), abs=1e-5)


def test_many_posts_go_in_several_requests_and_keep_their_order(adapter: Path, exported: Path) -> None:
    texts = [f"post {number}" for number in range(AT_A_TIME + 3)]
    with ClassifyServer(exported) as server:
        found = Served(f"{server.url}/", None, Decision.one(LABELS), MAX_LENGTH).probabilities(texts)
    assert [len(one["input"]) for one in server.requests] == [AT_A_TIME, 3]
    np.testing.assert_allclose(found, predicted(adapter, texts), atol=1e-5)


@pytest.mark.parametrize(
    ("mistake", "words"), [("logits", "for a probability"), ("sigmoid", "for their sum")]
)
def test_numbers_that_are_no_probabilities_are_no_answer(
    adapter: Path, exported: Path, mistake: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ClassifyServer(exported, mistake) as server:
        assert main(["predict", "--endpoint", server.url, "--adapter", str(adapter), *TEXTS]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert words in printed.err


def test_a_server_with_other_labels_is_told_beside_its_answers(
    adapter: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(mistake: str | None, folder: Path = exported) -> str:
        with ClassifyServer(folder, mistake) as server:
            assert main(["predict", "--endpoint", server.url, "--adapter", str(adapter), *TEXTS]) == 0
        return capsys.readouterr().err

    shutil.copytree(exported, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for start, wanted in (("topic ", True), ("LABEL_", False)):
        config["id2label"] = {str(number): f"{start}{number}" for number in range(len(LABELS))}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        assert ("the server calls 'topic " in said(None, tmp_path / "other")) == wanted
    assert "the server calls" not in said("nameless")
    assert "the server calls" not in said(None)


@pytest.mark.parametrize(
    ("mistake", "code", "words"),
    [
        (None, 0, "6 posts: a probability differs by"),
        ("control", 1, "posts that quote a control token differ by"),
        ("first", 1, "the server has another model, tokenizer, pooling or head"),
        ("nameless", 0, "the server has no name for"),
        ("short", 1, "differ by"),
    ],
)
def test_a_comparison_says_what_a_server_gets_wrong(
    adapter: Path,
    exported: Path,
    mistake: str | None,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ClassifyServer(exported, mistake) as server:
        assert main(["predict", "--endpoint", server.url, "--against", str(adapter), *TEXTS, LONG]) == code
    out = capsys.readouterr().out
    assert words in out
    assert len(out.splitlines()) == 1 or mistake is not None


def test_a_server_that_cuts_elsewhere_is_told_from_one_with_another_model(
    adapter: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ClassifyServer(exported, "short") as server:
        assert main(["predict", "--endpoint", server.url, "--against", str(adapter), "well", LONG]) == 1
    out = capsys.readouterr().out
    assert "posts that are cut differ by" in out
    assert "another model" not in out


def test_servers_that_refuse_or_do_not_answer(
    adapter: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NoAnswer, match=r"127.0.0.1:9 does not answer .*is the server started"):
        Served(NOWHERE, None, Decision.one(LABELS), 8)
    with pytest.raises(WrongRequest, match="no address of a server"):
        Served("localhost:8000", None, Decision.one(LABELS), 8)
    with ClassifyServer(exported) as server:
        with pytest.raises(WrongRequest, match=r"refuses with 404: .*`other` does not exist"):
            Served(server.url, "other", Decision.one(LABELS), 8).probabilities(["x"])
        with pytest.raises(WrongRequest, match=r"gives 4 probabilities a post and the adapter has 2 labels"):
            Served(server.url, None, Decision.one(LABELS[:2]), 8).probabilities(["x"])
        with pytest.raises(WrongRequest, match=r"refuses with 400: .*maximum context length is 64"):
            Served(server.url, None, Decision.one(LABELS), 1000).probabilities([LONG])
        server.mistake = "busy"
        with pytest.raises(NoAnswer, match="answers with 503"):
            Served(server.url, "emotions", Decision.one(LABELS), 8).probabilities(["x"])
        server.mistake = "nonsense"
        with pytest.raises(WrongRequest, match="does not answer as a classifier of vLLM"):
            Served(server.url, "emotions", Decision.one(LABELS), 8).probabilities(["x"])
        server.mistake = "twice"
        with pytest.raises(WrongRequest, match="does not answer as a classifier of vLLM"):
            Served(server.url, "emotions", Decision.one(LABELS), 8).probabilities(["x", "y"])
    for words, said in (
        (["--endpoint", NOWHERE], "--adapter is missing"),
        (["--adapter", "a", "--against", "b"], "--adapter and --against exclude each other"),
        (["--against", str(adapter)], "--against and --model are for a server"),
    ):
        assert main(["predict", *words, "x"]) == 2
        assert said in capsys.readouterr().err


def test_posts_are_labelled_by_a_server_without_the_adapter_s_base(
    adapter: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    facts = json.loads((copy / "emotion_train.json").read_text())
    (copy / "emotion_train.json").write_text(json.dumps(facts | {"base": "/nowhere"}))
    with ClassifyServer(exported) as server:
        assert main(["predict", "--endpoint", server.url, "--adapter", str(copy), "well"]) == 0
    assert capsys.readouterr().out.endswith("| well\n")
