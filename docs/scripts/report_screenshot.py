"""Writes docs/images/report.png: the top of the demo's real report, as a browser shows it.

    make demo && python docs/scripts/report_screenshot.py

The page is rendered anew from the demo's report.json, so that the picture has the look of this
code. Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from emotion_train.report.pages import render_html
from emotion_train.report.schema import Report

PICTURE = Path(__file__).parents[1] / "images" / "report.png"
MOST_BYTES = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demo", type=Path, default=Path(".demo"), help="folder of `make demo` (default: .demo)"
    )
    parser.add_argument("--chromium", default="chromium", help="the browser (default: chromium)")
    parser.add_argument("--size", default="1000,760", help="width and height in pixels (default: 1000,760)")
    arguments = parser.parse_args()
    if shutil.which(arguments.chromium) is None:
        parser.error(f"there is no program {arguments.chromium}; give --chromium")
    report = Report.model_validate_json((arguments.demo / "adapter" / "report" / "report.json").read_bytes())
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "report.html"
        page.write_text(render_html(report), encoding="utf-8")
        command = [arguments.chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={name}/profile"]
        command += [f"--window-size={arguments.size}", f"--screenshot={PICTURE}", page.as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)
    if (size := PICTURE.stat().st_size) > MOST_BYTES:
        parser.error(f"{PICTURE} has {size:,} bytes, and {MOST_BYTES:,} are the most; give a smaller --size")


if __name__ == "__main__":
    main()
