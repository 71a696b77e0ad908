"""A `WrongRequest` for a config file that accelerate refuses.

Accelerate reads its file after the launcher, in the process that it sets up, and ends at a wrong
key or value with whatever error Python had. The price: a defect of accelerate that looks like one
of these is called the file's fault, with its own words in the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from emotion_train.errors import WrongRequest

# what a wrong file ends in before a process is started
REFUSALS = (
    *(ValueError, TypeError, AttributeError, KeyError, AssertionError),
    *(yaml.YAMLError, FileNotFoundError),
)
_IN_WORDS = (ValueError, AssertionError, FileNotFoundError)  # accelerate's own sentences


def refusal(words: Sequence[str], error: Exception) -> WrongRequest:
    """The error as a sentence about the file in accelerate's command line."""
    file = words[words.index("--config_file") + 1]
    reason = " ".join(str(error).split()).rstrip(".")
    if not reason or not isinstance(error, _IN_WORDS):
        reason = f"{type(error).__name__}: {reason}"
    return WrongRequest(
        f"Accelerate refuses its config {file} ({reason}); mend the file, or give another by"
        " --accelerate-config."
    )
