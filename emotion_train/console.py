"""The terminal that pages are printed on, whose reader may leave: `… | head -1` ends a program with
its own exit code.
"""

from __future__ import annotations

from rich.console import Console

from emotion_train.errors import print_nowhere


class Terminal(Console):
    """Rich's console, which would end the program with 1 when its reader has left: also one that
    has just published a run.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        print_nowhere()
