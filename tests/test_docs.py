"""The pages for people: links lead somewhere, commands exist, README's own commands run, what is
made from the code is not stale, and quoted messages are those of the code.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from docs.scripts import picture, reference, site_pages
from emotion_train import cli
from emotion_train.command_line import LAUNCH, TRAIN
from launch import cli as launcher
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_words, write_posts
from tests.test_design import anchors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *(ROOT / name for name in site_pages.pages())]
TROUBLE = ROOT / "docs" / "guides" / "troubleshooting.md"
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def indented(text: str) -> list[str]:
    """The lines of a page's indented code, without trailing comments and shell continuations."""
    joined = re.sub(r" \\\n\s+", " ", text)
    lines = [line.strip() for line in joined.splitlines() if re.match(r" {4}\S", line)]
    return [re.split(r"\s+# ", line)[0].rstrip() for line in lines]


# --- README ---


def test_the_readme_fits_a_screen_or_two() -> None:
    lines = README.splitlines()
    assert len(lines) <= 90
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_shows_a_picture_and_the_report() -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert shown == ["docs/images/path-dark.svg", "docs/images/path-light.svg", "docs/images/report.png"]
    assert (ROOT / shown[-1]).stat().st_size < 200_000


@pytest.mark.parametrize("name", picture.COLOURS)
def test_the_picture_is_what_its_script_draws(name: str) -> None:
    drawn = picture.drawing(picture.COLOURS[name])
    assert text_of(picture.IMAGES / f"path-{name}.svg") == drawn, "type python docs/scripts/picture.py"


def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those below "Your GPU", with a folder for the bucket and a base of two layers; what
    accelerate would start runs in this process.
    """
    causal_checkpoint(tmp_path / "base", "llama")
    tables = [text_of(path).splitlines() for path in write_posts(tmp_path / "source").iterdir()]
    rows = ["text,label", *(row for table in tables for row in table[1:])]
    (tmp_path / "posts.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    small = [word for word in tiny_words(tmp_path) if not word.startswith(("data.url", "run."))]
    lines = indented(README.partition("## Your GPU")[2].partition("##")[0])
    lines = [line.replace("s3://team", str(tmp_path)) for line in lines if line.startswith("emotion-")]
    assert [line.split()[1] for line in lines] == ["prepare", "check", "run", "pull", "predict"]
    for line in lines:
        program, verb, *words = shlex.split(line)
        if verb in ("check", "run"):
            words += [*small, "train.epochs=1", "report.floor_max_rows=0", "--accelerate-config", "cpu"]
        if verb == "run":
            assert launcher.main([verb, "--dry-run", *words]) == 0
            started = shlex.split(capsys.readouterr().out.splitlines()[-1])
            program, verb = TRAIN, "train"
            words = started[started.index("emotion_train.train") + 1 :]
            monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        if verb == "predict":
            words += ["--device", "cpu"]
        assert (cli.main if program == TRAIN else launcher.main)([verb, *words]) == 0, line
    assert re.search(r"(calm|glee|rage|awe) +\d", capsys.readouterr().out)


# --- every page ---


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]+`|^ {4}[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_each_page_is_two_clicks_from_the_readme() -> None:
    """README leads to docs/README.md, and that to every page, but for pages of an index below."""
    home = ROOT / "docs" / "README.md"
    linked = set(re.findall(r"\]\(([^)#\s]+\.md)", text_of(home)))
    reached = {(home.parent / name).resolve() for name in linked}
    indexes = [path.parent for path in reached if path.name == "README.md"]
    missing = [
        page
        for page in PAGES
        if page.resolve() not in {*reached, home, ROOT / "README.md"} and page.parent not in indexes
    ]
    assert not missing, "link these in docs/README.md"


@cache
def parsers() -> dict[str, dict[str, argparse.ArgumentParser]]:
    return {
        program: {name: verb.parser for name, verb in named.items()}
        for program, named in reference.verbs().items()
    }


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_of_a_page_have_these_verbs_and_options(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # names options of earlier states
        return
    text = text_of(page)
    quoted = [code for code in re.findall(r"`([^`\n]+)`", text) if " " in code]
    for line in (*indented(text), *quoted):
        if not (found := re.match(rf"({TRAIN}|{LAUNCH}) ([a-z][a-z-]*)\b(.*)", line)):
            continue
        program, verb, rest = found.groups()
        assert verb in parsers()[program], line
        known = {word for action in parsers()[program][verb]._actions for word in action.option_strings}
        given = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest))
        assert given <= known, f"{line}: {given - known}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_sky_lines_name_files_and_variables_of_the_tasks(page: Path) -> None:
    for line in indented(text_of(page)):
        if not (found := re.match(r"sky .*?\b(sky/\w+\.yaml)", line)):
            continue
        task = yaml.safe_load((ROOT / found[1]).read_text(encoding="utf-8"))
        assert set(re.findall(r"--env (\w+)=", line)) <= set(task["envs"]), line
        assert set(re.findall(r"--secret (\w+)", line)) <= set(task["secrets"]), line


# --- what is made from the code ---


@pytest.mark.parametrize("name", ["config.md", "cli.md", "exit-codes.md"])
def test_the_reference_is_that_of_the_code(name: str) -> None:
    page = text_of(reference.REFERENCE / name)
    assert page == reference.pages()[name], "the page is stale; type python docs/scripts/reference.py"


@cache
def messages() -> tuple[str, ...]:
    """Every string of the programs, with `…` for what is filled in."""

    def template(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(template(part) or "…" for part in node.values)
        return ""

    pages = [path for package in ("emotion_train", "launch") for path in (ROOT / package).rglob("*.py")]
    trees = (ast.parse(text_of(path)) for path in pages)
    return tuple(text for tree in trees for node in ast.walk(tree) if (text := template(node)))


def quoted_messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)`", text_of(TROUBLE), re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_of_troubleshooting_is_one_of_the_code(message: str) -> None:
    assert any(message in text for text in messages()), "the code has no such message; quote the new one"


def test_troubleshooting_has_many_messages() -> None:
    assert len(quoted_messages()) > 40


# --- the site ---


def test_links_of_a_site_page_lead_into_the_site_or_to_the_repository() -> None:
    text = "[a](../../benchmarks/speed.md#labelling) [b](../../sky/train.yaml) `[c](../../sky/train.yaml)`"
    there = "docs/guides/bases.md"
    linked = site_pages.with_site_links(text, there, "https://host/owner/name/")
    assert linked == (
        "[a](../benchmarks/speed.md#labelling) [b](https://host/owner/name/blob/HEAD/sky/train.yaml)"
        " `[c](../../sky/train.yaml)`"
    )
    assert " b " in site_pages.with_site_links(text, there, None)
    gone = "[d](../../sky/gone.yaml)"  # stays, for mkdocs to refuse
    assert site_pages.with_site_links(gone, there, None) == gone


def test_links_below_an_indented_line_are_found_too() -> None:
    text = "    code\n\n[a](../../benchmarks/speed.md)\n"
    linked = site_pages.with_site_links(text, "docs/guides/bases.md", None)
    assert linked == "    code\n\n[a](../benchmarks/speed.md)\n"


def test_llms_txt_lists_every_page_once_below_its_folder() -> None:
    index = site_pages.llms_txt()
    listed = re.findall(r"^- \[[^\n]+?\]\(([^)]+)\)", index, re.MULTILINE)
    home, *others = site_pages.pages()
    assert home == "docs/README.md"
    assert listed == [site_pages.site_path(name) for name in others]
    assert index.startswith("# emotion-train\n\n> Fine-tune a large language model")
    assert index.index("## Start") < index.index("start/spot.md") < index.index("## Guides")
