"""`emotion-launch compare`: runs on the same posts, shown in the terminal and on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from emotion_train.errors import WrongRequest
from emotion_train.storage.open import open_store
from launch.results.comparison import Comparison, compare
from launch.results.comparison_page import render_html
from launch.results.comparison_terminal import print_comparison
from launch.results.pages import a_console
from launch.results.same_posts import open_data
from launch.results.scored import common_split, names_of, open_source, read_scored

PAGE = "comparison.html"


def comparison_of(
    words: Sequence[str],
    *,
    output_url: str | None = None,
    split: str | None = None,
    group_by_config: bool = False,
) -> Comparison:
    """The comparison of the runs, folders or reports that `words` name; raises `WrongRequest` where
    they were not scored on the same posts.
    """
    if len(words) < 2:
        raise WrongRequest(
            f"{words[0] if words else 'Nothing'} alone is nothing to compare; give two or more runs,"
            " folders or"
            " reports."
        )
    sources = [open_source(word, output_url) for word in words]
    chosen = common_split(sources, split)
    scored = [
        read_scored(source, chosen, name) for source, name in zip(sources, names_of(sources), strict=True)
    ]
    return compare(scored, [open_data(one) for one in scored], group_by_config=group_by_config)


def write_page(comparison: Comparison, url: str) -> str:
    """Write the page to a file or s3:// URL, over an earlier page; returns its URL."""
    folder, _, name = url.rpartition("/")
    if not name or folder.endswith(":/"):
        whole = url if url.endswith("/") else f"{url}/"
        raise WrongRequest(f"--page is {url}, which is no file; give one such as {whole}{PAGE}.")
    store = open_store(folder or ("/" if url.startswith("/") else "."))
    store.write(name, render_html(comparison).encode())
    return store.url_of(name)


def run(
    words: Sequence[str],
    *,
    output_url: str | None,
    split: str | None,
    group_by_config: bool,
    page: str,
    fail_if_worse: bool,
) -> int:
    """Prints the comparison and writes its page. Returns 1 where `fail_if_worse` is set and a group
    is worse than the first beyond chance, else 0.
    """
    comparison = comparison_of(words, output_url=output_url, split=split, group_by_config=group_by_config)
    written = write_page(comparison, page)
    print_comparison(comparison, a_console())
    print(f"written: {written}", flush=True)
    if fail_if_worse and comparison.worse:
        print(
            f"emotion-launch: worse than {comparison.groups[0].name}: {', '.join(comparison.worse)}",
            file=sys.stderr,
        )
        return 1
    return 0
