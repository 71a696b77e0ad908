"""Verbs that do not work on this operating system, refused before anything begins.

Training holds its processes together by means that Windows lacks: signals, file locks that end with
their holder, `exec`. Work on a laptop beside a cloud, such as preparing, planning, inspecting and
predicting, needs none of them.
"""

from __future__ import annotations

import sys

from emotion_train.errors import WrongRequest

_TRAINING = ("train", "run", "label", "demo")


def require_system(verb: str | None = None, system: str = sys.platform) -> int:
    """0 where the verb works. Raises `WrongRequest` where it does not, and prints a sentence where
    it does less than on Linux; `system` is named as in `sys.platform`.
    """
    if verb not in _TRAINING:
        return 0
    if system in ("win32", "cygwin"):
        raise WrongRequest(
            f"{verb} does not work on Windows, whose processes know neither signals nor locks that end with"
            " them; type it in WSL (wsl --install), or train on a cloud's machine by sky/train.yaml."
            " Preparing, planning, pulling, evaluating and predicting work here."
        )
    if system == "darwin":
        from emotion_train.console import tell

        tell(
            "on macOS training runs on the CPU: no Metal, no fp8, no fused decoder; it is for trying things"
            " out, and real runs need Linux with an NVIDIA GPU"
        )
    return 0
