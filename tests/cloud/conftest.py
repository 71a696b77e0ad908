"""The site, a bucket that its nodes reach, and a data set and a base in it, each made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from emotion_train.preparation.steps import prepare
from emotion_train.storage.local_s3 import LocalS3
from tests.helpers.launcher import Launcher
from tests.helpers.slurm_site import MISSING_VARIABLE, SITE_VARIABLE, Site
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import write_posts


@pytest.fixture(scope="session")
def site() -> Site:
    if SITE_VARIABLE not in os.environ:
        pytest.skip(
            os.environ.get(
                MISSING_VARIABLE,
                "the cloud tests run beside a Slurm cluster of their own; type make test-cloud",
            )
        )
    return Site.of_this_process()


@pytest.fixture(scope="session")
def base(site: Site) -> Path:
    """A two-layer checkpoint where all nodes may read it."""
    folder = site.shared / "base"
    causal_checkpoint(folder, "llama")
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def posts_url(s3: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 posts in a bucket that all nodes reach."""
    folder = tmp_path_factory.mktemp("posts")
    for seed in range(10):
        write_posts(folder / f"{seed}", seed)
    for split in ("train", "validation", "test"):
        parts = [
            (folder / f"{seed}" / f"{split}.csv").read_text().splitlines(keepends=True) for seed in range(10)
        ]
        (folder / f"{split}.csv").write_text(
            "".join([parts[0][0], *(line for part in parts for line in part[1:])])
        )
    for seed in range(10):
        shutil.rmtree(folder / f"{seed}")
    s3.create_bucket("cloud")
    prepare(str(folder), "s3://cloud/posts")
    return "s3://cloud/posts"


@pytest.fixture(scope="session")
def launcher(site: Site, s3: LocalS3, base: Path, posts_url: str) -> Launcher:
    return Launcher(site, s3, base, posts_url)
