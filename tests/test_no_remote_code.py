"""No program that a base brings is ever run, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import io
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emotion_train.bases.files import BaseFiles
from emotion_train.config import load_config
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import WrongRequest
from emotion_train.model.card import CardFacts, reload_snippet
from emotion_train.model.load import load_base, read_config
from launch.check.base import check_base, look_at_base
from tests.helpers.tiny_models import causal_checkpoint

ROOT = Path(__file__).parents[1]
PLACES = ("emotion_train", "launch", "benchmarks", "tests")
LOADERS = ("from_pretrained", "from_config")
CARD = CardFacts("owner/model", "text", "nf4", 128, ("calm", "glee"), 16, 32, ("q_proj",))


def programs() -> Iterator[tuple[str, str]]:
    """Every page of Python, and the one that the model card prints."""
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    yield "the card's snippet", reload_snippet(CARD)


def trusting(page: str, text: str) -> list[str]:
    """Calls of transformers' Auto classes that do not say trust_remote_code=False."""
    found: list[str] = []
    if not any(loader in text for loader in LOADERS):
        return found  # parsing all pages takes seconds
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value).rpartition(".")[2]
        if node.func.attr in LOADERS and owner.startswith("Auto"):
            trust = [ast.unparse(word.value) for word in node.keywords if word.arg == "trust_remote_code"]
            if trust != ["False"]:
                found.append(f"{page}:{node.lineno}")
    return found


def test_no_call_trusts_or_leaves_open_whom_to_trust() -> None:
    pages = dict(programs())
    assert [line for page, text in pages.items() for line in trusting(page, text)] == []
    # and the program itself reads configurations without any such loader
    ours = [page for page in pages if page.startswith(("emotion_train", "launch"))]
    ours = [page for page in ours if "AutoConfig" in pages[page] and "from_pretrained" in pages[page]]
    assert not [page for page in ours if "AutoConfig.from_pretrained(" in strings_left_out(pages[page])]


def strings_left_out(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_a_call_that_leaves_it_open_is_seen() -> None:
    assert trusting("page", "AutoConfig.from_pretrained(base)") == ["page:1"]
    assert trusting("page", "t.AutoModel.from_config(c, trust_remote_code=True)") == ["page:1"]
    assert trusting("page", "AutoConfig.from_pretrained(base, trust_remote_code=False)") == []


class NobodyThere(io.StringIO):
    """Standard input that may not be read."""

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]  # as StringIO has it
        raise AssertionError("standard input was asked")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "stdin", NobodyThere())
    return tmp_path / "was_run"


def with_code(base: Path, marker: Path, **config: str) -> None:
    """Put a program beside the base that both of its configurations name."""
    (base / "evil.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForSequenceClassification\n"
        f"Path({str(marker)!r}).touch()\nclass Cfg(LlamaConfig):\n    model_type = 'evilx'\n"
        "class Model(LlamaForSequenceClassification):\n    pass\n"
    )
    runpy.run_path(str(base / "evil.py"))
    assert marker.exists()  # whoever runs it is seen
    marker.unlink()
    names = {"AutoConfig": "evil.Cfg", "AutoModelForSequenceClassification": "evil.Model"}
    for file, added in (
        ("config.json", {"auto_map": names, **config}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ):
        document = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps(document | added))


def test_a_base_of_a_known_architecture_loads_without_its_programs(tmp_path: Path, marker: Path) -> None:
    plain = causal_checkpoint(tmp_path / "plain", "llama")
    bringing = causal_checkpoint(tmp_path / "base", "llama")
    with_code(bringing, marker)
    (theirs, of_plain), (ours, info) = (load_base(str(base), "fp32", 3, "cpu") for base in (plain, bringing))
    assert info.weights_sha256 == of_plain.weights_sha256
    assert type(ours) is type(theirs)
    assert not hasattr(ours.config, "auto_map")
    ids_NT = torch.arange(4, 12)[None]
    assert torch.equal(ours.model(ids_NT).last_hidden_state, theirs.model(ids_NT).last_hidden_state)
    assert not marker.exists()


def test_a_base_that_needs_its_programs_is_refused(tmp_path: Path, marker: Path) -> None:
    base = causal_checkpoint(tmp_path / "base", "llama")
    with_code(base, marker, model_type="evilx")
    with pytest.raises(WrongRequest, match="has the architecture evilx; supported are llama"):
        read_config(str(base))
    assert not marker.exists()


def test_check_says_that_programs_of_the_base_are_not_run(tmp_path: Path, marker: Path) -> None:
    base = causal_checkpoint(tmp_path / "base", "llama")
    words = [f"model.base={base}", f"data.url={tmp_path / 'data'}", f"run.output_url={tmp_path / 'runs'}"]
    config = load_config(None, words)

    def found() -> str:
        return check_base(
            lambda: look_at_base(config, lambda: PostTokenizer.load(BaseFiles.find(str(base)), 64))
        )

    assert "auto_map" not in found()
    with_code(base, marker)
    assert "the auto_map of its config.json and tokenizer_config.json is ignored" in found()
    assert not marker.exists()
