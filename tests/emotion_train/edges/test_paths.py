"""`~` is a home where there is one, and a letter where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emotion_train.cli import main
from emotion_train.edges.paths import typed_path, unknown_user
from emotion_train.errors import WrongRequest
from emotion_train.storage.open import open_store
from launch.plan.prices import find_prices


def test_homes_are_known_and_other_names_are_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert typed_path("~/posts.csv") == Path("/home/me/posts.csv")
    assert typed_path("~root").is_absolute()
    for words in ("~nosuchuser/x.csv", "~$posts.csv", "posts~", "a/~/b", "~ü"):
        assert typed_path(words) == Path(words)


def test_a_source_of_an_unknown_user_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "~nosuchuser/x.csv", "data"]) == 2
    assert "There is no file or folder ~nosuchuser/x.csv" in capsys.readouterr().err


def test_a_file_whose_name_begins_with_a_tilde_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"post number {number},{'joy' if number % 2 else 'fear'}\n" for number in range(60))
    (tmp_path / "~$posts.csv").write_text("text,label\n" + rows)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "~$posts.csv", "data"]) == 0
    assert (tmp_path / "data" / "index.json").exists()


def test_a_store_in_the_home_of_nobody_is_refused_and_a_folder_of_that_name_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongRequest, match=r"There is no user 'nosuchuser' .* type ./~nosuchuser/x"):
        open_store("~nosuchuser/x")
    open_store("./~nosuchuser/x").write("a", b"1")
    assert open_store("~nosuchuser/x").read("a") == b"1"
    assert unknown_user("~root/x") is None


def test_a_process_without_a_home_asks_for_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has a number and no name."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda words: words)
    find_prices(None, (), {"PATH": ""})
