"""`emotion-launch push` against a server that plays the hub, by the hub's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from emotion_train.edges import hub
from launch.cli import main
from tests.helpers.hub_that_takes import HubThatTakes
from tests.helpers.published_runs import publish_run, write_data

WEIGHTS = b"weights " * 200
CARD = "---\nbase_model: some/base\ntags: [lora]\n---\n\n# Emotion classifier\n"


@pytest.fixture(scope="module")
def run_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pushed")
    write_data(folder)
    adapter = folder / "adapter-run-1"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (adapter / "README.md").write_text(CARD, encoding="utf-8")
    facts = {"format": "emotion-train/adapter/2", "output_url": "/home/me/runs", "data_url": "/home/me/data"}
    (adapter / "emotion_train.json").write_text(json.dumps({**facts, "run_id": "run-1"}), encoding="utf-8")
    return publish_run(folder, "run-1", texts=True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubThatTakes]:
    from huggingface_hub import constants

    with HubThatTakes() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "_away", {})
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield served


# the client hands its HTTP library large files as `data` (huggingface_hub/lfs.py)
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")
def test_the_adapter_and_its_card_are_one_commit_of_a_private_repository(
    run_url: str, server: HubThatTakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", run_url, "team/emotions", "--license", "cc-by-4.0"]) == 0
    files = server.repos["team/emotions"]
    assert server.private == {"team/emotions": True}
    assert server.messages == ["Adapter of run run-1"]
    assert server.tokens - {""} == {"Bearer hf_secret"}  # the card is checked without one
    assert files["adapter_model.safetensors"] == WEIGHTS
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "emotion_train.json",
    }
    assert files["README.md"].decode() == CARD.replace("tags: [lora]", "tags:\n- lora\nlicense: cc-by-4.0")
    facts = json.loads(files["emotion_train.json"])
    assert (facts["run_id"], facts["output_url"], facts["data_url"]) == ("run-1", None, None)
    out = capsys.readouterr().out
    assert f"{server.endpoint}/team/emotions/commit/" in out
    assert "hf_secret" not in out
    # once more, public: what exists stays as it is
    assert main(["push", run_url, "team/emotions", "--public"]) == 0
    assert server.private == {"team/emotions": True}
    assert main(["push", run_url, "team/open", "--public"]) == 0
    assert server.private["team/open"] is False


def test_a_dry_run_lists_the_files_and_needs_no_token(
    run_url: str,
    server: HubThatTakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", run_url, "team/emotions", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1,600  adapter_model.safetensors" in out
    assert "report" not in out
    assert "4 files, 0.0 MiB, would go to team/emotions (private if it is new)" in out
    assert server.repos == {}


def test_without_a_token_nothing_is_asked(
    run_url: str,
    server: HubThatTakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where one is stored on this machine: the token comes from the environment alone."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "stored")
    assert main(["push", run_url, "team/emotions"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "HF_TOKEN is not set" in line
    assert "may write to team" in line
    assert server.tokens == set()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["emotions"], "'emotions' does not name a repository; give OWNER/NAME"),
        (["a/b/c"], "does not name a repository"),
        (["team/x", "--license", "My Own!"], "--license is 'My Own!'"),
    ],
)
def test_names_that_are_none_are_refused(
    run_url: str, server: HubThatTakes, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", run_url, *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [(401, 2), (403, 2), (400, 2), (500, 1)])
def test_a_hub_that_refuses_or_fails_ends_in_a_sentence(
    run_url: str, server: HubThatTakes, status: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal = status
    assert main(["push", run_url, "team/emotions"]) == code
    err = capsys.readouterr().err
    assert str(status) in err
    assert "Traceback" not in err
    assert "hf_secret" not in err


def test_a_hub_that_is_away_ends_with_1(
    run_url: str, server: HubThatTakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", run_url, "team/emotions"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
