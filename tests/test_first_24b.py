"""benchmarks/first_24b.sh, line by line, with a tiny model, a real S3 server and a real LLM server
of this machine in place of the 24B, the cloud and the hosted models.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emotion_train.config import example_config
from tests.emotion_train.hosted.test_real_server import KEY, llm
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_words, write_posts

__all__ = ["llm"]
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def test_it_ends_with_the_rows_to_paste_and_repeats_nothing(
    own_bucket_url: str, llm: str, tmp_path: Path
) -> None:
    causal_checkpoint(tmp_path / "base", "llama")
    posts = write_posts(tmp_path / "posts")
    values = [word for word in tiny_words(tmp_path) if not word.startswith(("data.url", "run."))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OPENAI_API_KEY": KEY,
        "LOCAL": "1",
        "ACCELERATE": "cpu",
        "CONFIG": str(example_config()),
        "TUTORIAL": str(example_config()),
        "LLMS": llm,
        "PRICES": "0 0",
        "ROWS": "6",
    }
    line = [str(ROOT / "benchmarks" / "first_24b.sh"), own_bucket_url, str(posts), *values]
    first = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    rows = [row for row in first.stdout.splitlines() if row.startswith("| ")]
    assert [row.split()[1] for row in rows[1:3]] == ["recipe", "tutorial"]
    assert any("smollm2-135m" in row for row in rows)
    assert (tmp_path / "first-24b" / "comparison.html").exists()
    again = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert "accelerate launch" not in again.stdout
    assert [row for row in again.stdout.splitlines() if row.startswith("| ")] == rows
