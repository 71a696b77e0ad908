"""The parts of the site that mkdocs.yml cannot say: pages outside docs/, the order of the folders,
links into the repository, and llms.txt.

mkdocs loads this page as a hook (https://www.mkdocs.org/user-guide/configuration/#hooks). Pages
that are added to a folder of docs/ enter the navigation by themselves.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# pages beside docs/ that are part of the site, under their own names
OUTSIDE = ("benchmarks/*.md", "benchmarks/*.svg", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
# folders of the navigation, in their order; "" is the top folder
FOLDERS = {
    "start": "Start",
    "guides": "Guides",
    "reference": "Reference",
    "design": "Design",
    "benchmarks": "Benchmarks",
    "": "Project",
}
# pages of a folder that come first, in this order; the others follow by title
FIRST = (
    "start/own-gpu.md",
    "start/your-posts.md",
    "start/several-gpus.md",
    "start/spot.md",
    "guides/settings.md",
    "guides/bases.md",
    "guides/encoders.md",
    "guides/predict-and-evaluate.md",
    "guides/ensembles.md",
    "guides/distillation.md",
    "guides/train-on.md",
    "guides/report.md",
    "guides/probabilities.md",
    "guides/results-of-a-run.md",
    "guides/resume-and-recover.md",
    "guides/troubleshooting.md",
    "design/README.md",
    "design/architecture.md",
    "benchmarks/README.md",
    "why.md",
    "how-it-works.md",
    "python.md",
)
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]+`|^    [^\n]*$)", re.DOTALL | re.MULTILINE)


def site_path(path: str) -> str | None:
    """Where a file of the repository is in the site; None where it is not part of it."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if any(Path(path).match(pattern) for pattern in OUTSIDE) else None


def with_site_links(text: str, page: str, repository: str | None) -> str:
    """The Markdown of `page` (its path in the repository) with links that hold in the site.

    A link to a file outside the site leads to the repository's host, or becomes its text where that
    is not known. Links to files that do not exist stay, for mkdocs to refuse.
    """

    def link(match: re.Match[str]) -> str:
        shown, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if not (ROOT / file).exists():
            return match[0]
        if (place := site_path(file)) is not None:
            start = posixpath.dirname(site_path(page) or page)
            there = posixpath.relpath(place, start or ".")
            return f"{shown}({there}{'#' + anchor if anchor else ''})"
        if repository:
            return f"{shown}({repository.rstrip('/')}/blob/HEAD/{file})"
        return shown.strip("[]")

    pieces = _CODE.split(text)
    whole = "".join(f"\0{at}\0" if at % 2 else piece for at, piece in enumerate(pieces))
    return re.sub(r"\0(\d+)\0", lambda hole: pieces[int(hole[1])], _LINK.sub(link, whole))


def pages() -> list[str]:
    """The Markdown files of the site by their paths in the repository, in the order of the
    navigation; docs/README.md, the home page, first.
    """
    names = [path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")]
    names += [path.relative_to(ROOT).as_posix() for one in OUTSIDE for path in ROOT.glob(one)]

    def place(name: str) -> tuple[bool, int, int, str]:
        there = site_path(name) or name
        folder = list(FOLDERS).index(posixpath.dirname(there))
        first = FIRST.index(there) if there in FIRST else len(FIRST)
        return (name != "docs/README.md", folder, first, title(name).lower())

    return sorted((name for name in names if name.endswith(".md")), key=place)


def title(name: str) -> str:
    """The first heading of a page, without its code marks."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line[2:].replace("`", "").strip()
    return Path(name).stem


def lead(name: str) -> str:
    """The first sentence of the first paragraph of a page; empty where it begins with code."""
    text = (ROOT / name).read_text(encoding="utf-8").partition("\n# ")[2] or (ROOT / name).read_text("utf-8")
    paragraphs = [one.strip("\n") for one in text.partition("\n")[2].split("\n\n")]
    words = " ".join(next((one for one in paragraphs if re.match(r"[\w*`]", one)), "").split())
    return re.sub(r"\]\([^)]*\)", "]", re.split(r"(?<=[.:?!]) ", words)[0]).rstrip(":")


def navigation() -> list[Any]:
    """What mkdocs takes for `nav`: the home page, then a section a folder."""
    sections: dict[str, list[Any]] = {folder: [] for folder in FOLDERS}
    home, *others = pages()
    for name in others:
        there = site_path(name) or name
        sections[posixpath.dirname(there)].append({title(name): there})
    return [
        {"Home": site_path(home)},
        *({FOLDERS[folder]: entries} for folder, entries in sections.items() if entries),
    ]


def llms_txt() -> str:
    """The index of all pages for language models (https://llmstxt.org): each links to its Markdown,
    which stands beside its HTML.
    """
    home, *others = pages()
    lines = [f"# {title(home)}", "", f"> {lead(home)}", ""]
    folder = None
    for name in others:
        there = site_path(name) or name
        if posixpath.dirname(there) != folder:
            folder = posixpath.dirname(there)
            lines += ["", f"## {FOLDERS[folder]}", ""]
        told = lead(name)
        lines.append(f"- [{title(name)}]({there}){f': {told}' if told else ''}")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


# --- called by mkdocs ---


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/, and set the navigation."""
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    config["nav"] = navigation()
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    there = page.file.src_uri
    name = f"docs/{there}" if (DOCS / there).exists() else there
    return with_site_links(markdown, name, config["repo_url"])


def on_post_build(config: Any) -> None:
    """Write llms.txt, and each page's Markdown beside its HTML."""
    site = Path(config["site_dir"])
    for name in pages():
        target = site / (site_path(name) or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        target.write_text(with_site_links(text, name, config["repo_url"]), encoding="utf-8")
    (site / "llms.txt").write_text(llms_txt(), encoding="utf-8")
