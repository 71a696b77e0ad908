"""The site, a bucket that its nodes reach, and a data set and a base in it, each made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emotion_train.local_s3 import LocalS3
from emotion_train.prepare import prepare
from tests.cloud.slurm_site import MISSING_VARIABLE, SITE_VARIABLE, Site
from tests.emotion_train.tiny_models import causal_checkpoint
from tests.emotion_train.tiny_runs import write_posts


@pytest.fixture(scope="session")
def site() -> Site:
    if SITE_VARIABLE not in os.environ:
        pytest.skip(os.environ.get(MISSING_VARIABLE, "the cloud tests run beside a Slurm cluster of their own; type make test-cloud"))
    return Site.of_this_process()


@pytest.fixture(scope="session")
def base(site: Site) -> Path:
    """A two-layer checkpoint where all nodes see it."""
    folder = site.shared / "base"
    causal_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def posts_url(site: Site, s3: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> str:
    s3.create_bucket("posts")
    prepare(str(write_posts(tmp_path_factory.mktemp("posts"))), "s3://posts/tiny")
    return "s3://posts/tiny"
